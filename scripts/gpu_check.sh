#!/usr/bin/env bash
# Tests and a short measurement of every method on one CUDA GPU, within 9 minutes, on a machine that has PyTorch,
# transformers, Triton, pytest, scipy and pandas but not kvbench. Nothing is fetched: what else is needed is in .whl/ as
# wheels (hydra-core, omegaconf, antlr4-python3-runtime).
#
#   scripts/gpu_check.sh [PART...]            tests measure smoke, or some of these and of: correct sdpa kernels profile
#   DEV=cpu scripts/gpu_check.sh [PART...]    the same at toy size, on any machine
#
# Results go to $OUT (gpu_check/ by default): a log of each part, tests.xml, results.tar.gz with the records of the smoke
# run. Each part has a time limit of its own, at which it is interrupted and writes what it has; records are kept in
# $RESULTS (gpu_check/results) too, and a method that has one is not measured again.
# PYTHON names the interpreter, python3 by default.
# Exit status: 0 all done, 1 something failed or was cut off.
set -uo pipefail
cd "$(dirname "$0")/.."

export OUT="${OUT:-$PWD/gpu_check}" RESULTS="${RESULTS:-$PWD/gpu_check/results}" DEV="${DEV:-cuda}" PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
if compgen -G ".whl/*.whl" > /dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
fi
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 KVBENCH_CUDA_TEST_DEVICE="$DEV"

status=0
part() { # name, seconds, command...
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    echo "== $name (at most $limit s)"
    # In the foreground: otherwise the group is signalled too, and a second interrupt ends the first one's clean-up.
    timeout --foreground --signal=INT --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1
    local left=$?
    [ $left -eq 0 ] || status=1
    tail -n 25 "$OUT/$name.log" | cut -c 1-300
    echo "== $name: exit status $left after $((SECONDS - begin)) s"
}

for name in ${*:-tests measure smoke}; do
    case $name in
        tests)
            # In one process: 8 workers on 16 cores and one GPU did a third of the tests in twice the time.
            part tests 250 "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider --junitxml="$OUT/tests.xml" \
                --durations=5 \
                tests/integration/test_cuda.py tests/integration/test_graph.py \
                tests/unit/test_kernels.py tests/unit/test_coded_kernel.py tests/unit/test_packed.py \
                tests/unit/test_sdpa.py tests/unit/test_step_operations.py tests/unit/test_prompt_kernels.py ;;
        measure)
            part measure 50 "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider -m gpu \
                tests/integration/test_measure.py tests/integration/test_passes.py ;;
        smoke)
            part smoke 235 "$PYTHON" scripts/gpu_check.py smoke
            tar czf "$OUT/results.tar.gz" -C "$RESULTS" . ;;
        correct) part correct 100 "$PYTHON" scripts/gpu_check.py correct --seconds 80 ;;
        kernels) part kernels 60 "$PYTHON" scripts/gpu_check.py kernels --seconds 45 ;;
        profile) part profile 180 "$PYTHON" scripts/gpu_check.py profile --seconds 160 ;;
        sdpa) part sdpa 40 "$PYTHON" scripts/gpu_check.py sdpa --seconds 25 ;;
        *)
            echo "no part $name: tests, measure, smoke, correct, sdpa, kernels or profile" >&2
            exit 1 ;;
    esac
done
exit $status

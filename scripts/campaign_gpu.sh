#!/usr/bin/env bash
# The papers' efficiency experiments on random weights of the papers' shapes, on one CUDA GPU. Nothing is fetched.
#
#   scripts/campaign_gpu.sh RESULTS [PART...]             all parts, or some: full snapkv context minicache kivi
#                                                         pyramid h2o sharing yoco lckv
#   scripts/campaign_gpu.sh RESULTS --rehearse [PART...]  the same commands at toy size, on any machine
#   scripts/campaign_gpu.sh RESULTS --show [PART...]      only say what would be run
#
# A run that is done is not done again, so the command can be given again after it was cut off; a search goes on, a run
# of one shape begins anew. A part stops after MINUTES (25 unless set). Searches for the largest batch or prompt take
# CARD GiB (80 unless set), as the papers' cards had.
# Then: kvbench table RESULTS; kvbench paper all RESULTS; kvbench plot RESULTS -o FOLDER
# PYTHON names the interpreter; by default .venv's, or python3. Exit status: 0 done, 1 some run failed or was cut off, 2 usage.
set -uo pipefail
cd "$(dirname "$0")/.."

PARTS="full snapkv context minicache kivi pyramid h2o sharing yoco lckv"
usage() {
    sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage
results=$1
shift
rehearse=no
show=no
chosen=""
for word in "$@"; do
    case " $PARTS " in
        *" $word "*) chosen="$chosen $word" ;;
        *) case $word in --rehearse) rehearse=yes ;; --show) show=yes ;; *) usage ;; esac ;;
    esac
done
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3; }
minutes=${MINUTES:-25}
card=${CARD:-80}
small_card=24

seven=llama2-7b
thirteen=llama2-13b
three=yoco-3b
thirty=llama-30b
common=(dtype=bfloat16 device=cuda)
positions=2000000
scale=1 # by which lengths and batches are divided
search=()
if [ "$rehearse" = yes ]; then
    seven=tiny thirteen=tiny three=tiny thirty=tiny scale=64 positions=4096
    common=(dtype=float32 device=cpu runner.repeats=1 runner.warmups=0)
    search=(workload.start=2 workload.most=3 workload.step=1)
    card=64 small_card=64
fi

of() { # a length or a batch, at the rehearsal's size
    echo $((($1 + scale - 1) / scale > 2 ? ($1 + scale - 1) / scale : 2))
}

failed=0
go() { # one command line of kvbench, within what is left of the part's time
    local left=$((part_ends - SECONDS))
    if [ "$left" -le 0 ]; then
        echo "-- no time left for: $*"
        failed=1
        return
    fi
    [ "$rehearse" = yes ] && set -- "$@" 'runner.pair_with=[]'
    set -- "${common[@]}" model=random "model.max_positions=$positions" "$@"
    printf -- '-- run.py runner=efficiency'
    printf ' %q' "$@"
    echo
    [ "$show" = yes ] && return
    timeout "$left" "$PYTHON" run.py runner=efficiency "results_dir=$results" "$@"
    local status=$?
    if [ $status -ne 0 ]; then
        [ $status -eq 124 ] && echo "-- cut off; the same command goes on"
        failed=1
    fi
}

part_full() { # how near a step comes to the memory's bandwidth
    for batch in 8 1; do
        [ "$rehearse" = yes ] && [ $batch -ne 1 ] && continue
        go model.shape=$seven method=full workload.prompt_tokens="$(of 2048)" \
            workload.new_tokens="$(of 128)" batch_size=$batch
    done
}

part_snapkv() { # figure 7: time per token over the prompt's length, batch 2, 2048 tokens kept
    local budget new
    budget=$(of 2048)
    [ "$rehearse" = yes ] && budget=40
    for length in 16384 32768 65536; do
        new=512
        [ "$length" -gt 16384 ] && new=128
        [ "$rehearse" = yes ] && [ "$length" -gt 16384 ] && continue
        go model.shape=$seven method=snapkv method.budget="$budget" batch_size=2 \
            workload.prompt_tokens="$(of $length)" workload.new_tokens="$(of $new)" runner.chunk_size="$(of 8192)"
    done
}

part_context() { # the longest prompt: batch 2 with 2048 tokens kept, batch 1 with 1024; read once more to time it
    local budget
    for pair in "2 2048" "1 1024"; do
        set -- $pair
        budget=$2
        [ "$rehearse" = yes ] && { [ "$1" -eq 1 ] && continue || budget=40; }
        go model.shape=$seven method=snapkv method.budget="$budget" batch_size="$1" workload=max_context \
            workload.new_tokens=16 \
            runner.memory_limit_gib="$card" runner.chunk_size="$(of 8192)" runner.repeats=1 "${search[@]}"
    done
}

part_minicache() { # ShareGPT's shape: throughput and memory over the batch, and the largest batch
    local others='runner.pair_with=["full","kivi storage.bits=2","kivi storage.bits=2 storage.residual=32","minicache"]'
    go model.shape=$seven method=minicache_kivi4 workload=max_batch workload.prompt_tokens=161 \
        workload.new_tokens="$(of 338)" \
        runner.memory_limit_gib="$card" "$others" "${search[@]}"
    for batch in 1 8 32 128; do
        [ "$rehearse" = yes ] && [ $batch -gt 1 ] && continue
        go model.shape=$seven method=minicache_kivi4 workload=sharegpt workload.lengths=fixed \
            workload.new_tokens="$(of 338)" \
            workload.limit=$batch batch_size=$batch 'runner.pair_with=["full","kivi storage.bits=2"]'
    done
}

part_kivi() { # a long prompt, one sequence
    go model.shape=$seven method=kivi batch_size=1 workload.prompt_tokens="$(of 32768)" \
        workload.new_tokens="$(of 128)" \
        runner.chunk_size="$(of 8192)"
}

part_pyramid() { # table 1, figure 11 and table 2
    for batch in 32 1 8 64; do
        [ "$rehearse" = yes ] && [ $batch -ne 1 ] && continue
        go model.shape=$thirteen method=pyramid_infer batch_size=$batch workload.prompt_tokens="$(of 512)" \
            workload.new_tokens="$(of 256)" 'runner.pair_with=["full","h2o budget=0.2"]'
    done
    [ "$rehearse" = yes ] && return # the search is minicache's
    go model.shape=$thirteen method=pyramid_infer workload=max_batch workload.prompt_tokens="$(of 512)" \
        workload.new_tokens="$(of 256)" runner.memory_limit_gib="$card" "${search[@]}"
}

part_h2o() { # table 5
    go model.shape=$seven method=h2o method.budget=0.2 batch_size="$(of 24)" workload.prompt_tokens="$(of 2048)" \
        workload.new_tokens="$(of 2048)"
}

part_sharing() { # the largest batch on a small card, and a long prompt
    local others='runner.pair_with=["full","lckv sharing.warmup=10","cla","yoco"]'
    go model.shape=$seven method=lckv workload=max_batch workload.prompt_tokens="$(of 512)" \
        workload.new_tokens="$(of 512)" \
        runner.memory_limit_gib=$small_card "$others" "${search[@]}"
    others='runner.pair_with=["full","cla","lckv"]'
    go model.shape=$seven method=yoco batch_size=1 workload.prompt_tokens="$(of 32768)" \
        workload.new_tokens="$(of 128)" "$others"
}

part_yoco() { # figures 7 and 9: memory and prefill over the prompt's length
    for length in 32768 65536; do
        [ "$rehearse" = yes ] && [ $length -gt 32768 ] && continue
        go model.shape=$three method=yoco method.sharing.mixer=gated_retention batch_size=1 \
            workload.prompt_tokens="$(of $length)" workload.new_tokens="$(of 64)"
    done
}

part_lckv() { # table 1's largest model on one card; its 26x is of 30B on 24 GB, with the weights on the host
    go model.shape=$thirty method=lckv workload=max_batch workload.prompt_tokens="$(of 2048)" \
        workload.new_tokens="$(of 2048)" \
        runner.memory_limit_gib="$card" runner.repeats=1 "${search[@]}"
}

for part in ${chosen:-$PARTS}; do
    echo "== $part"
    part_ends=$((SECONDS + 60 * minutes))
    "part_$part"
done
exit $failed

"""Tab completion: what may follow a line, and the script in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvbench.runners.completion import SCRIPTS, candidates, main

PARTS = ("allocator", "schedule", "scorer", "storage")
CASES = [
    ("kvbench ", ["run ", "table ", "plot ", "kv-size ", "score ", "completion "]),
    ("kvbench sc", ["score "]),
    ("kvbench run method=pyr", ["method=pyramid_infer ", "method=pyramidkv "]),
    ("kvbench run metho", ["method.", "method=", *(f"method/{part}=" for part in PARTS)]),
    ("kvbench run method/storage=kivi", ["method/storage=kivi2 ", "method/storage=kivi4 ", "method/storage=kivi8 "]),
    ("kvbench run -m method=full,pyr", ["method=full,pyramid_infer", "method=full,pyramidkv"]),
    ("kvbench run method=tova method.", ["method.allocator.", "method.budget=", "method.name=", "method.recent="]),
    ("kvbench run task=needle task.h", ["task.haystack="]),
    ("kvbench run method=snapvk task.lim", ["task.limit="]),
    ("kvbench run runner.reuse=", ["runner.reuse=false ", "runner.reuse=true "]),
    ("kvbench run runner=efficiency runner.cuda_graph=t", ["runner.cuda_graph=true "]),
    ("kvbench run 'method=", []),
    ("kvbench table res", []),
]


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_what_may_follow(line, expected):
    found = candidates(line)
    assert set(expected) <= set(found)
    if not line.endswith((" ", ".")):
        assert set(found) == set(expected)
    assert len(found) == len(set(found))


def test_nothing_heavy_is_imported_for_an_answer():
    code = (
        "import sys; from kvbench.runners.completion import main\n"
        "main(['bash', '--candidates', 'kvbench run method='])\n"
        "print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "[]\n" and "method=snapkv \n" in done.stdout


def test_every_shell_has_a_script(capsys):
    for shell in SCRIPTS:
        assert main([shell]) == 0
        assert "kvbench completion" in capsys.readouterr().out


BASH = r"""
source <(cat "$1"); shift
for line in "$@"; do
    COMP_LINE="$line"; COMP_POINT=${#line}; COMPREPLY=()
    _kvbench_complete
    printf '%s|' "${COMPREPLY[@]}"; echo
done
complete -p kvbench | grep -o -- '-F .*'
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_script_works_in_bash(tmp_path: Path):
    """Bash ends words at ``=``, so the answer is what comes behind it."""
    script = tmp_path / "completion.bash"
    script.write_text(SCRIPTS["bash"])
    command = tmp_path / "kvbench"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m kvbench.runners.command "$@"\n')
    command.chmod(0o755)
    lines = ["kvbench run method=pyr", "kvbench run model=tiny method/storage=kivi", "kvbench ta"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMP_WORDBREAKS": " \t\n=:"}
    done = subprocess.run(
        ["bash", "-c", BASH, "bash", str(script), *lines], capture_output=True, text=True, env=environment
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "pyramid_infer |pyramidkv |",
        "kivi2 |kivi4 |kivi8 |",
        "table |",
        "-F _kvbench_complete kvbench",
    ]

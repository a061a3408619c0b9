"""Calls in a fresh Python process, so that earlier measurements do not affect this one."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from ..terminal import lasting_streams

A = TypeVar("A")
R = TypeVar("R")


NO_PROGRESS_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Environment of a measuring process: each one loads the model, and a progress bar for each would hide other output."""


class Killed(RuntimeError):
    """The process was killed before it had a result, as the kernel does when memory runs out."""


def in_fresh_process(function: Callable[[A], R], argument: A, environment: Mapping[str, str] | None = None) -> R:
    """``function(argument)`` in a new process.

    Args:
        function: A function of an importable module; it, its argument and its result are pickled.
        argument: The function's only argument.
        environment: Variables to set before the process starts.

    Raises:
        Killed: The process was killed from outside.
        Exception: The exception that the function raised, with its message.
    """
    with tempfile.TemporaryDirectory(prefix="kvbench-") as folder:
        call, answer = Path(folder, "call"), Path(folder, "answer")
        call.write_bytes(pickle.dumps((function, argument)))
        command = [sys.executable, "-m", __name__, str(call), str(answer)]
        status = subprocess.run(command, env={**os.environ, **(environment or {})}).returncode
        if status == -signal.SIGKILL:
            raise Killed("the measuring process was killed, as happens when the machine runs out of memory")
        if not answer.exists():
            raise RuntimeError(f"the measuring process ended with status {status} and no result")
        failed, value = pickle.loads(answer.read_bytes())
    if failed:
        raise value
    return value


def main(call: str, answer: str) -> None:
    """Run the pickled call in the new process, and pickle its result or exception."""
    function, argument = pickle.loads(Path(call).read_bytes())
    try:
        with lasting_streams():
            result = (False, function(argument))
    except Exception as error:
        error.add_note(f"in the measuring process: {traceback.format_exc()}")
        try:
            text = pickle.dumps((True, error))
            pickle.loads(text)  # some exceptions pickle and cannot be read back
        except Exception:
            text = pickle.dumps((True, RuntimeError(f"{type(error).__name__}: {error}")))
        Path(answer).write_bytes(text)
        return
    Path(answer).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Calls in a process of their own, so that earlier measurements do not affect this one.

A :class:`MeasuringProcess` is the usual one: a fork of a server that has imported torch, transformers and the measuring
code, has run nothing and has not touched CUDA, so that seconds of imports are paid once and not per method and pass. It
answers one call or several. :func:`in_fresh_process` starts Python anew, for an environment that acts when a process
starts.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TypeVar

from ..terminal import lasting_streams

A = TypeVar("A")
R = TypeVar("R")
V = TypeVar("V")


NO_PROGRESS_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Environment of a measuring process: each one loads the model, and a progress bar for each would hide other output."""

CAN_FORK = sys.platform == "linux"
"""Elsewhere the system's own libraries may not survive a fork without ``exec``."""

GRACE_S = 5.0
"""Time in which a process may end by itself after an error of its caller, such as Ctrl-C."""

SERVER_ENVIRONMENT = NO_PROGRESS_BARS | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Environment of the fork server; with the second, asking whether there is a CUDA device does not initialize CUDA."""

PRELOADED = (
    "kvbench.runners.cli",
    "kvbench.runners.accuracy",
    "kvbench.runners.efficiency",
    "kvbench.models.local",
    "transformers.models.llama.modeling_llama",
)
"""Modules that the fork server imports."""


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
        status = subprocess.run(command, env={**os.environ, **NO_PROGRESS_BARS, **(environment or {})}).returncode
        if not answer.exists():
            _raise_for_status(status)
        failed, value = pickle.loads(answer.read_bytes())
    if failed:
        raise value
    return value


class MeasuringProcess:
    """A process that has everything imported and answers calls, one after another; a context manager.

    What one call leaves in memory, such as a model, the next one finds. Where the system cannot fork, each call has a
    process of its own.

    Attributes:
        has_answered: Whether a call has been made, so that the process is no longer as it started.
    """

    def __init__(self) -> None:
        self.has_answered = False
        self._process: ForkServerProcess | None = None

    def __enter__(self) -> MeasuringProcess:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and self._process is not None:  # it may be busy
            self._connection.close()
            self._process.join(GRACE_S)
            self._process.terminate()
        self.close()

    def call(self, function: Callable[[A], R], argument: A) -> R:
        """``function(argument)`` in the process, which starts with the first call; see :func:`in_fresh_process`."""
        if not CAN_FORK:
            return in_fresh_process(function, argument)
        call = pickle.dumps((function, argument))
        if self._process is None:
            self._start()
        assert self._process is not None
        self.has_answered = True
        try:
            self._connection.send_bytes(call)
            answer = self._connection.recv_bytes()
        except (EOFError, OSError):
            self._process.join()
            _raise_for_status(self._process.exitcode)
        failed, value = pickle.loads(answer)
        if failed:
            raise value
        return value

    def close(self) -> None:
        """End the process; the next call starts another one."""
        if self._process is not None:
            self._connection.close()
            self._process.join()
        self._process, self.has_answered = None, False

    def _start(self) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(list(PRELOADED))
        with _temporarily(os.environ, SERVER_ENVIRONMENT):
            forkserver.ensure_running()
        self._connection, theirs = server.Pipe()
        self._process = server.Process(target=_answer_calls, args=(theirs, {**os.environ, **SERVER_ENVIRONMENT}))
        with _temporarily(sys.modules, {"__main__": ModuleType("__main__")}):  # else it runs the caller's script
            self._process.start()
        theirs.close()


def in_forked_process(function: Callable[[A], R], argument: A) -> R:
    """``function(argument)`` in a :class:`MeasuringProcess` of its own."""
    with MeasuringProcess() as process:
        return process.call(function, argument)


@contextmanager
def _temporarily(mapping: MutableMapping[str, V], values: Mapping[str, V]) -> Iterator[None]:
    """Set values of a mapping within the block."""
    before = {key: mapping[key] for key in values if key in mapping}
    mapping.update(values)
    try:
        yield
    finally:
        for key in values:
            del mapping[key]
        mapping.update(before)


def _answer_calls(connection: Connection, environment: Mapping[str, str]) -> None:
    """Run pickled calls in a fork and send their pickled results or exceptions, until the caller closes or ends.

    multiprocessing leaves a fork by ``os._exit``. So the exit functions of this process are run here, and those that
    the server's imports registered are dropped, as for a process that multiprocessing itself forks.
    """
    atexit._clear()
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    status = 0
    try:
        while True:
            connection.send_bytes(_pickled_result(connection.recv_bytes()))
    except (EOFError, ConnectionError):
        pass
    except KeyboardInterrupt:  # the caller has it too, and reports it
        status = 128 + signal.SIGINT
    finally:
        atexit._run_exitfuncs()
    os._exit(status)


def _end_with_caller() -> None:
    caller = multiprocessing.parent_process()
    if caller is not None:
        wait([caller.sentinel])
        os._exit(1)


def _raise_for_status(status: int | None) -> NoReturn:
    """Raise the error for a measuring process that ended without a result."""
    if status == -signal.SIGKILL:
        raise Killed("the measuring process was killed, as happens when the machine runs out of memory")
    raise RuntimeError(f"the measuring process ended with status {status} and no result")


def _pickled_result(call: bytes) -> bytes:
    """Run a pickled (function, argument); return (whether it failed, its result or exception), pickled."""
    try:
        with lasting_streams():
            function, argument = pickle.loads(call)
            return pickle.dumps((False, function(argument)))
    except Exception as error:
        error.add_note(f"in the measuring process: {traceback.format_exc()}")
        try:
            text = pickle.dumps((True, error))
            pickle.loads(text)  # some exceptions pickle and cannot be read back
        except Exception:
            text = pickle.dumps((True, RuntimeError(f"{type(error).__name__}: {error}")))
        return text


def main(call: str, answer: str) -> None:
    """Run the pickled call of one file in this new process, and write its pickled result to the other."""
    Path(answer).write_bytes(_pickled_result(Path(call).read_bytes()))


if __name__ == "__main__":
    main(*sys.argv[1:])

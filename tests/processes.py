"""Processes that have imported everything and run nothing: forks of a server that does so once.

Starting Python and importing torch and transformers takes seconds of a core. Where a test is about what a process does
or how it ends, and not about how it starts, it takes one of these.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from kvbench.runners.measure.fresh import Killed
from kvbench.runners.measure.memory import malloc_trim_env

A = TypeVar("A")
R = TypeVar("R")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "kvbench.runners.cli",
        "kvbench.runners.accuracy",
        "kvbench.runners.efficiency",
        "kvbench.models.local",
        "transformers.models.llama.modeling_llama",
    ]
)


def _started(target: Callable[..., None], *arguments: object) -> ForkServerProcess:
    with patch.dict(os.environ, malloc_trim_env()):  # for those whose memory is measured
        forkserver.ensure_running()
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    return process


def in_forked_process(function: Callable[[A], R], argument: A, environment: Mapping[str, str] | None = None) -> R:
    """``runners.fresh.in_fresh_process`` with a fork, in which an environment that acts when Python starts does not."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = _started(_answer, sender, function, argument, {**os.environ, **(environment or {})})
    sender.close()
    try:
        failed, value = receiver.recv()
    except EOFError:
        process.join()
        raise Killed(f"the process ended with status {process.exitcode} and no result") from None
    process.join()
    if failed:
        raise value
    return value


def _answer(sender: Connection, function: Callable[[A], R], argument: A, environment: Mapping[str, str]) -> None:
    _take(environment)
    try:
        result: tuple[bool, R | Exception] = (False, function(argument))
    except Exception as error:
        result = (True, error)
    sender.send(result)


def start(function: Callable[..., int | None], *arguments: object, output: Path | None) -> ForkServerProcess:
    """``function(*arguments)`` as the main program of a process, started in the current folder.

    Args:
        function: of a module that can be imported; its result is the exit status.
        arguments: pickled, as the function is.
        output: where both streams are appended; None: they are closed.
    """
    return _started(_program, function, arguments, output, dict(os.environ))


def _program(
    function: Callable[..., int | None],
    arguments: tuple[object, ...],
    output: Path | None,
    environment: Mapping[str, str],
) -> None:
    _take(environment)
    # Where the tests themselves run in the background, these may be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if output is None:
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as Python has it
    else:
        opened = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    try:
        status = function(*arguments) or 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            status = 120  # as Python has it
    os._exit(status)


def _take(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)

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
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

from kvbench.runners.measure.fresh import PRELOADED, SERVER_ENVIRONMENT
from kvbench.runners.measure.memory import malloc_trim_env

SERVER = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the server of :func:`kvbench.runners.measure.fresh.in_forked_process`, whose forks can measure memory."""
    SERVER.set_forkserver_preload(list(PRELOADED))
    with patch.dict(os.environ, SERVER_ENVIRONMENT | malloc_trim_env()):
        forkserver.ensure_running()


def _started(target: Callable[..., None], *arguments: object) -> ForkServerProcess:
    start_server()
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    return process


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

"""Processes that have imported everything and run nothing: forks of a server that does so once.

Starting Python and importing torch and transformers takes seconds of a core. Where a test is about what a process does
or how it ends, and not about how it starts, it takes one of these.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TypeVar

from kvbench.runners.fresh import Killed

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


def in_forked_process(function: Callable[[A], R], argument: A, environment: Mapping[str, str] | None = None) -> R:
    """``runners.fresh.in_fresh_process`` with a fork: an environment that acts when Python starts does nothing here."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_answer, args=(sender, function, argument, {**os.environ, **(environment or {})}))
    process.start()
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


def start_kvbench(arguments: Sequence[str], errors: Path) -> ForkServerProcess:
    """``kvbench ARGUMENTS``, started; what it writes to standard error goes to ``errors``, the rest nowhere."""
    process = SERVER.Process(target=_kvbench, args=(tuple(arguments), str(errors), dict(os.environ)))
    process.start()
    return process


def _kvbench(arguments: tuple[str, ...], errors: str, environment: Mapping[str, str]) -> None:
    from kvbench.runners.command import main

    _take(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "a", buffering=1)
    sys.exit(main(arguments))


def _take(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)

"""The terminal: messages on the standard streams, which a closed pipe, a lost terminal or a full disk does not end."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from .progress import erase_status_line

CLOSED = (errno.EPIPE, errno.EIO)
"""Errors of a closed pipe (``| head``) and of a closed terminal."""


class LastingStream:
    """A text stream whose writes never fail.

    The first error is kept in :attr:`error`, and later output goes to the null device, including that of child
    processes and of the interpreter's last flush.

    Args:
        stream: Standard output or standard error; None where the process was started without it (``>&-``).
        descriptor: Its file descriptor, 1 or 2.
    """

    def __init__(self, stream: TextIO | None, descriptor: int):
        self.error: OSError | None = None
        if stream is None:
            self.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
            _to_null(descriptor)
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (it is open as long as this object)
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop what cannot be written."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what cannot be written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if self.error is not None:
            return
        self.error = error
        with suppress(OSError, ValueError):  # a stream without a descriptor, as tests have them
            _to_null(self._stream.fileno())
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)


def _ignore_hang_up() -> bool:
    """Ignore SIGHUP; False if the process has a handler for it, or this is not the main thread."""
    if not hasattr(signal, "SIGHUP") or threading.current_thread() is not threading.main_thread():
        return False
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        return False
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return True


@contextmanager
def lasting_streams() -> Iterator[LastingStream]:
    """Within the block, a closed standard stream is no error; yields standard output.

    The hang-up signal of a closed terminal is ignored too, unless the process handles it.
    """
    before = sys.stdout, sys.stderr
    out, errors = LastingStream(sys.stdout, 1), LastingStream(sys.stderr, 2)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, errors)
    ignored = _ignore_hang_up()
    try:
        yield out
    finally:
        out.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


def shown_path(path: Path) -> str:
    """A path as messages show it: relative to the working directory if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


class TerminalHandler(logging.Handler):
    """Prints messages as plain lines: information on standard output, warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message on the stream that is current."""
        erase_status_line()
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(self.format(record), file=stream, flush=True)


@contextmanager
def terminal_logging() -> Iterator[None]:
    """Within the block, show the messages of kvbench's loggers on the terminal, and nowhere else."""
    logger, handler = logging.getLogger("kvbench"), TerminalHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a handler of the root logger would print each line twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate

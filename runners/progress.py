"""The progress of a run: one line on standard error, written again every second while the model works.

In a terminal the line replaces itself. In a file or a pipe a new line follows every half minute, so that a log stays
short.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

TERMINAL_INTERVAL_S, LOG_INTERVAL_S = 1.0, 30.0
ERASE_LINE = "\r\x1b[K"
_shown_lines = 0
"""Number of status lines of this process that a terminal shows now."""


def erase_status_line() -> None:
    """Erase the status line from the terminal, if there is one, before something else is printed."""
    if _shown_lines:
        sys.stderr.write(ERASE_LINE)
        sys.stderr.flush()


@contextmanager
def status_line(text: Callable[[], str]) -> Iterator[None]:
    """Within the block, show ``text()`` on standard error, and again at every interval."""
    global _shown_lines
    stop, stream = threading.Event(), sys.stderr
    is_terminal = stream.isatty()
    interval = TERMINAL_INTERVAL_S if is_terminal else LOG_INTERVAL_S

    def show() -> None:
        if is_terminal:
            width = shutil.get_terminal_size().columns - 1
            stream.write(ERASE_LINE + text()[:width])
        else:
            stream.write(text() + "\n")
        stream.flush()

    def show_until_stopped() -> None:
        while not stop.wait(interval):
            show()

    if is_terminal:
        show()
    thread = threading.Thread(target=show_until_stopped, name="kvbench-status-line", daemon=True)
    _shown_lines += is_terminal
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if is_terminal:
            erase_status_line()
        _shown_lines -= is_terminal


def clock(seconds: float) -> str:
    """``75 -> 1:15``, ``3700 -> 1:01:40``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def elapsed_since(begin: float, what: str) -> str:
    """``snapkv 512: time, then memory  0:42``."""
    return f"{what}  {clock(time.monotonic() - begin)}"


@dataclass(frozen=True)
class Work:
    """A batch as the progress sees it.

    Attributes:
        dataset: Data set of its examples.
        examples: Number of examples.
        prompt_tokens: Tokens that are prefilled.
        most_steps: Largest number of decode steps.
    """

    dataset: str
    examples: int
    prompt_tokens: int
    most_steps: int


class Progress:
    """What has been done of a list of batches, and how long the rest takes.

    The remaining time follows from the measured seconds per prompt token and per decode step, and from the share of the
    largest number of steps that finished batches needed.

    Args:
        work: The batches, in the order in which they run.
        now: Clock, in seconds.
    """

    def __init__(self, work: Sequence[Work], now: Callable[[], float] = time.monotonic):
        self._work, self._now = work, now
        self._begin = self._since = now()
        self._batch, self._step, self._methods = -1, 0, ""
        self._in_prefill = True
        self._prefill_s = self._decode_s = 0.0
        self._prefilled = self._decoded = self._finished_steps = self._most_finished_steps = 0

    def begin_batch(self, methods: str) -> None:
        """Begin the next batch, with these methods."""
        self._end_phase()
        if self._batch >= 0:
            self._finished_steps += self._step
            self._most_finished_steps += self._work[self._batch].most_steps
        self._batch, self._step, self._methods, self._in_prefill = self._batch + 1, 0, methods, True

    def advance(self, step: int) -> None:
        """Record that the prompt is compressed (``step`` 0), or the number of decode steps of the batch so far."""
        if step == 0:
            if self._in_prefill:
                self._prefilled += self._work[self._batch].prompt_tokens
            self._end_phase()
            self._in_prefill = False
        else:
            self._decoded += max(0, step - self._step)
            self._end_phase()
        self._step = step

    def _end_phase(self) -> None:
        now = self._now()
        if self._batch >= 0:
            if self._in_prefill:
                self._prefill_s += now - self._since
            else:
                self._decode_s += now - self._since
        self._since = now

    def seconds_left(self) -> float | None:
        """Estimated seconds until the last batch is done; None until a prompt has been prefilled."""
        if not self._prefilled:
            return None
        per_token = self._prefill_s / self._prefilled
        per_step = self._decode_s / self._decoded if self._decoded else 0.0
        share = self._finished_steps / self._most_finished_steps if self._most_finished_steps else 1.0
        left = sum(per_token * w.prompt_tokens + per_step * share * w.most_steps for w in self._work[self._batch + 1 :])
        current = self._work[self._batch]
        if self._in_prefill:
            return left + per_token * current.prompt_tokens + per_step * share * current.most_steps
        return left + per_step * max(0.0, share * current.most_steps - self._step)

    def text(self) -> str:
        """``25 %  example 3/12 (qasper): decode 17/64  [full, snapkv 256]  0:42, about 2:10 left``."""
        if self._batch < 0:
            return ""
        batch, left, elapsed = self._work[self._batch], self.seconds_left(), self._now() - self._begin
        first = sum(w.examples for w in self._work[: self._batch]) + 1
        last, total = first + batch.examples - 1, sum(w.examples for w in self._work)
        numbers = f"{first}" if first == last else f"{first}-{last}"
        if self._in_prefill:
            phase = f"prefill of {batch.prompt_tokens} tokens"
        else:
            phase = f"decode {self._step}/{batch.most_steps}" if batch.most_steps else "scoring"
        line = f"example {numbers}/{total} ({batch.dataset}): {phase}  [{self._methods}]  {clock(elapsed)}"
        if left is None:
            return line
        return f"{100 * elapsed / (elapsed + left or 1):.0f} %  {line}, about {clock(left)} left"

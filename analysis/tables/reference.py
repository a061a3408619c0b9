"""The method that the rows of a table are compared with: the full cache, or the one of ``--against``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...conf.errors import InputError, require
from ...conf.wording import near
from ..load import Run
from .marks import MAX_TESTED


@dataclass(frozen=True)
class Reference:
    """A method by name.

    Attributes:
        name: As in the first column of a table, with its budget or without; ``full``: the full cache.
    """

    name: str = "full"

    @property
    def is_full_cache(self) -> bool:
        """Whether it is the full cache, whose paired differences are in the records."""
        return self.name == "full"

    @property
    def words(self) -> str:
        """The method as a sentence has it."""
        return "the full cache" if self.is_full_cache else self.name

    def check(self, runs: Sequence[Run]) -> None:
        """Raise InputError unless some scored run is of the method, and few enough runs are compared."""
        if self.is_full_cache:
            return
        scored = [run for run in runs if run.record["kind"] == "accuracy" and run.done]
        names = sorted({name for run in scored for name in (run.record["method"], run.curve, run.label)})
        if self.name not in names:
            methods = ", ".join(sorted({run.record["method"] for run in scored})) or "no scored run"
            raise InputError(
                "--against", self.name, f"is in none of these results: they have {methods}{near(self.name, names)}"
            )
        few = f"compares at most {MAX_TESTED} runs: choose some with --tasks, --models or --methods"
        require(len(runs) <= MAX_TESTED, "--against", self.name, few)

    def run_for(self, run: Run, runs: Sequence[Run]) -> Run | None:
        """Return the run that a row is compared with.

        Args:
            run: Run of the row.
            runs: Runs of the table.

        Returns:
            The method's run of the same budget, or its run without a budget;
            None if there is none, or if it is ``run``.

        Raises:
            InputError: Several settings of the method have that budget.
        """
        if self.is_full_cache:
            candidates = [other for other in runs if other.is_full_cache][:1]
        else:
            candidates = self._candidates(run, runs)
        if len(candidates) > 1:
            labels = ", ".join(other.label for other in candidates)
            raise InputError("--against", self.name, f"is more than one method here: name one of {labels}")
        return next((other for other in candidates if other is not run), None)

    def _candidates(self, run: Run, runs: Sequence[Run]) -> list[Run]:
        exact = [other for other in runs if other.label == self.name]
        if exact:
            return exact
        of_method = [other for other in runs if other.curve == self.name] or [
            other for other in runs if other.record["method"] == self.name
        ]
        budget = run.record["budget"]
        same = [other for other in of_method if other.record["budget"] == budget]
        return same or [other for other in of_method if other.record["budget"] is None]


FULL_CACHE = Reference()

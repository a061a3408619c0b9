"""The method that the rows of a table are compared with: the full cache, or the one of ``--against``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...conf.errors import InputError, require
from ...conf.wording import near
from ..load import Run
from ..ordering import without_settings
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
        names = sorted({name for run in scored for name in (_without_settings(run), run.curve, run.label)})
        if self.name not in names:
            methods = ", ".join(sorted(set(map(_without_settings, scored)))) or "no scored run"
            raise InputError(
                "--against", self.name, f"is in none of these results: they have {methods}{near(self.name, names)}"
            )
        allowed = f"compares at most {MAX_TESTED} runs: choose some with --tasks, --models or --methods"
        require(len(runs) <= MAX_TESTED, "--against", self.name, allowed)

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
            curves = list(dict.fromkeys(other.curve for other in candidates))
            names = ", ".join(curves if len(curves) > 1 else (other.label for other in candidates))
            raise InputError("--against", self.name, f"is more than one method here: name one of {names}")
        return next((other for other in candidates if other is not run), None)

    def _candidates(self, run: Run, runs: Sequence[Run]) -> list[Run]:
        same_label = [other for other in runs if other.label == self.name]
        if same_label:
            return same_label
        of_method = [other for other in runs if other.curve == self.name] or [
            other for other in runs if _without_settings(other) == self.name
        ]
        budget = str(run.record["budget"])  # a budget of 1.0 is the whole prompt, and one of 1 is a token
        same_budget = [other for other in of_method if str(other.record["budget"]) == budget]
        return same_budget or [other for other in of_method if other.record["budget"] is None]


def _without_settings(run: Run) -> str:
    """The name of a curve without the settings that tell it from others of its method."""
    return without_settings(run.curve)


FULL_CACHE = Reference()

"""Base class of scorers that leave the first tokens out of their scores and have a number of them of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .scorers.base import Scorer

if TYPE_CHECKING:
    from ...conf.options import NonNegativeInt


class ScorerWithSinks(Scorer):
    """Scorer with an option ``sinks``, which is also the default for the policy's ``sinks``."""

    if TYPE_CHECKING:
        sinks: NonNegativeInt | None

    def __post_init__(self) -> None:
        """Give ``sinks`` the class's number in place of None (``method.sinks=null``), then check the options."""
        if self.sinks is None:
            object.__setattr__(self, "sinks", type(self).sinks)
        super().__post_init__()

    def protected_sinks(self) -> int:
        assert self.sinks is not None
        return self.sinks

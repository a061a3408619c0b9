"""The interface of a runner, and the options of the runners that compare methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

from ..conf.options import Entries, Options, PositiveInt, Wording
from ..methods.cache.method import Method
from ..models.base import ModelSource
from ..tasks.base import Described
from .config.settings import Settings
from .records.runs import MethodRun


@runtime_checkable
class Runner(Protocol):
    """A choice of the config group ``runner``: runs methods on a task or a workload, and records the runs."""

    def data_group(self) -> str:
        """Config group of what the methods are run on: ``task`` or ``workload``."""
        ...

    def run(
        self, source: ModelSource, methods: Sequence[Method], task: Described, settings: Settings
    ) -> Sequence[MethodRun]:
        """Complete the run of every method, and write one record each; a finished run is only read.

        Args:
            source: Where the model comes from.
            methods: The requested methods, then those they are paired with.
            task: The task or the workload.
            settings: The top-level configuration.

        Returns:
            The runs, in the order of ``methods``, all with a record.

        Raises:
            InputError: The runner cannot run this model, method or task.
        """
        ...


@dataclass
class PairedRunner(Options):
    """Options of the runners that compare methods.

    Attributes:
        pair_with: Methods that run on the same data in addition to the requested one; []: none. Each is a text
            (``full``, ``streaming_llm budget=256``, ``snapkv storage=kivi4``) or a mapping
            (``{method: snapkv, budgets: [128, 256], storage: kivi4}``). A method that has a budget and names none is
            run at each of ``budgets``, if these are given.
        budgets: Run the method at each of these budgets; None: only at ``method.budget``.
        chunk_size: Number of prompt tokens per forward; None: all at once.
    """

    key_prefix: ClassVar[str] = "runner."
    pair_with: Annotated[
        Sequence[str | Mapping[str, Any]], Wording("a list of methods, each text or a mapping; [] for none")
    ] = ("full",)
    budgets: Annotated[Sequence[float], Entries()] | None = None
    chunk_size: PositiveInt | None = None

    def __post_init__(self) -> None:
        if isinstance(self.pair_with, str | Mapping):  # a single value instead of a list
            self.pair_with = [self.pair_with]
        if isinstance(self.budgets, int | float):
            self.budgets = [self.budgets]
        super().__post_init__()

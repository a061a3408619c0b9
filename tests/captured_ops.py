"""A CUDA graph's stand-in on the CPU: the operations of one run, replayed on the same tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

ASKS_THE_DEVICE = (
    torch.ops.aten._local_scalar_dense,  # item, bool, int, float
    torch.ops.aten.nonzero,  # and indexing by a mask
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.unique_dim,
    torch.ops.aten._unique2,
)


class CapturedOps(TorchDispatchMode):
    """Notes every operation that is run under it; :meth:`replay` runs them again.

    As in a CUDA graph, what Python computed is a constant from then on: shapes, slices, factors and which branch was
    taken. A tensor from outside is the one that it was; a tensor made by an operation is made anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ops: list[tuple[Any, Any, Any, Any]] = []
        self._now: dict[int, torch.Tensor] = {}  # id of a captured tensor -> what the last replay made in its place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func.overloadpacket not in ASKS_THE_DEVICE, f"{func} makes the host wait for the device"
        out = func(*args, **kwargs)
        self._ops.append((func, args, kwargs, out))  # keeps every tensor, so that no id is used twice
        return out

    def replay(self) -> None:
        """Run the operations again."""
        for func, args, kwargs, out in self._ops:
            made = func(*tree_map(self.now, args), **tree_map(self.now, kwargs))
            for captured, new in zip(tree_iter(out), tree_iter(made), strict=True):
                if isinstance(captured, torch.Tensor):
                    self._now[id(captured)] = new

    def now(self, x: Any) -> Any:
        """What stands for a captured tensor in the last replay; anything else as it is."""
        return self._now.get(id(x), x) if isinstance(x, torch.Tensor) else x

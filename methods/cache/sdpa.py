"""Scaled dot-product attention by a kernel that needs no plan for its shapes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.backends import cuda


def sdpa_without_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` by flash, memory-efficient or plain kernels, for shapes that keep changing.

    cuDNN's attention works out a plan for each new shape, on the host (2.6 ms on an H100's machine); a cache that grows
    by one token a step has a new shape at every step. Whether cuDNN may be used is a flag of the process, read when a
    call is dispatched, so it is off for this call alone: to set it costs 0.4 us, ``torch.nn.attention.sdpa_kernel`` 17.
    """
    if not (query.is_cuda and cuda.cudnn_sdp_enabled()):
        return F.scaled_dot_product_attention(query, key, value, **options)
    cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(query, key, value, **options)
    finally:
        cuda.enable_cudnn_sdp(True)

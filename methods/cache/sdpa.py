"""Scaled dot-product attention without cuDNN, whose kernels need a plan for each new shape."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.backends import cuda


def sdpa_without_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Call ``F.scaled_dot_product_attention`` with cuDNN disabled, for shapes that change at every step.

    cuDNN builds a plan for each new shape on the host (2.6 ms with an H100), and a cache that grows by one token per
    step has a new shape at every step. The process-wide flag is read when a call is dispatched, so it is cleared for
    this call only. Setting it costs 0.4 us, ``torch.nn.attention.sdpa_kernel`` 17 us.
    """
    if not (query.is_cuda and cuda.cudnn_sdp_enabled()):
        return F.scaled_dot_product_attention(query, key, value, **options)
    cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(query, key, value, **options)
    finally:
        cuda.enable_cudnn_sdp(True)

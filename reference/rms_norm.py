"""RMSNorm in OLMo-2's order: everything in acc, the weight too, then rounded once.

y = w * x / sqrt(mean(x^2) + eps)            over the last dimension; a post-norm block wants r + y
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in x's dtype; plus the residual, if there is one."""
    x_acc = x.to(torch.promote_types(x.dtype, torch.float32))
    x_acc = x_acc * torch.rsqrt(x_acc.square().mean(-1, keepdim=True) + eps)
    y = (weight * x_acc).to(x.dtype)
    return y if residual is None else residual + y

"""RMSNorm in plain PyTorch. Maths: reference/rms_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    x_acc = x.to(torch.promote_types(x.dtype, torch.float32))
    x_acc = x_acc * torch.rsqrt(x_acc.square().mean(-1, keepdim=True) + eps)
    y = (weight * x_acc).to(x.dtype)
    return y if residual is None else residual + y

"""RoPE on the two halves of a head, in float32 (float64), rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin (..., head_dim / 2) of positions (...) times theta^(-2i / head_dim).

    Float32, or float64 where `dtype` is.
    """
    acc = torch.promote_types(dtype, torch.float32)
    i = torch.arange(0, head_dim, 2, device=positions.device, dtype=acc)
    angle = positions.to(acc)[..., None] * (1 / theta ** (i / head_dim))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, heads, S, head_dim) turned by cos and sin (B or 1, S, head_dim / 2)."""
    cos, sin = (part[:, None] for part in rotary)
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

"""Attention of one layer: q and k normed over their full width, turned by RoPE, softmax, v.

rope(x)_i = x_i cos(p f_i) - x_{i+d/2} sin(p f_i),  rope(x)_{i+d/2} = x_{i+d/2} cos + x_i sin,
for each head of size d, f_i = theta^(-2i/d), at position p, in acc, then rounded
y = softmax(q k^T / sqrt(d)) v over the columns that a row may see, in acc
grouped heads: head h of q reads key-value head h // (H / H_kv)
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x (B, heads, S, d) at positions (B, S)."""
    d = x.shape[-1]
    acc = torch.promote_types(x.dtype, torch.float32)
    i = torch.arange(0, d, 2, device=x.device, dtype=acc)
    frequency = 1 / theta ** (i / d)
    angle = positions.to(acc)[:, None, :, None] * frequency
    first, second = x.to(acc).chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """q (B, H, S, d), k and v (B, H_kv, C, d), allowed bool (B or 1, 1, S, C) -> (B, H, S, d)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    acc = torch.promote_types(q.dtype, torch.float32)
    p = scores.to(acc).masked_fill(~allowed, -torch.inf).softmax(-1).to(q.dtype)
    return p @ v

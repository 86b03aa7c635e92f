"""The heads of an attention layer in plain PyTorch. Maths: reference/attention.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotary import rotate
from .rms_norm import rms_norm


def rotated_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    place,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = rms_norm(q, q_weight, eps, None), rms_norm(k, k_weight, eps, None)
    q, k, v = (x.unflatten(-1, (-1, 2 * cos.shape[-1])).transpose(1, 2) for x in (q, k, v))
    q, k = rotate(q, (cos, sin)), rotate(k, (cos, sin))
    if place is None:
        return q, k, v
    keys, values, columns = place
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise ValueError("cache: got a StaticCache with gradients; accepted: in torch.no_grad")
    keys.index_copy_(2, columns, k.to(keys.dtype))
    values.index_copy_(2, columns, v.to(values.dtype))
    return q, keys, values

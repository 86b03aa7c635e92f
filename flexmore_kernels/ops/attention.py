"""Attention of one layer around torch's: heads normed, turned and put into the cache; one token.

Kernels: Triton on a GPU where nothing needs a gradient; else plain PyTorch, which autograd
differentiates and torch.compile fuses. Attention itself is torch's scaled_dot_product_attention,
but for one token against a static cache: that reads the columns that are filled, not all.
Not public ops: the decoder's own. Maths: reference/attention.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backend
from .._aten import attention as plain
from .rms_norm import LARGEST_ROW, needs_plain

_kernels = "attention"
LARGEST_HEAD = 256  # tiles of keys and values of larger heads fill the shared memory
_SHORT = (torch.bfloat16, torch.float16)


class Place(NamedTuple):
    """Where a static cache keeps a layer: keys, values (B, H_kv, C, d), columns (S,) of now."""

    keys: Tensor
    values: Tensor
    columns: Tensor


class Filled(NamedTuple):
    """What of a static cache one token may see: real columns, bool (B, C), before `end`, (B,)."""

    real: Tensor
    end: Tensor


def rotated_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    rotary: tuple[Tensor, Tensor],
    place: Place | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """rope(norm(q)), rope(norm(k)) and v, by heads.

    q (B, S, H d), k and v (B, S, H_kv d) as they are projected; the norms are over the full width
    and round, as RoPE does after them. rotary: cos and sin (B or 1, S, d / 2). Returns q (B, H, S,
    d), k and v (B, H_kv, S, d); with a `place` k and v are written there, in place and without a
    gradient, and all of its keys and values are returned. Deterministic. No host sync.
    """
    given = (q, k, v, q_weight, k_weight, *(place[:2] if place else ()))
    if needs_plain(*given) or max(q.shape[-1], k.shape[-1]) > LARGEST_ROW:
        kernels = plain
    else:
        kernels = backend.kernels(_kernels, q)
    return kernels.rotated_heads(q, k, v, q_weight, k_weight, eps, *rotary, place)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    causal: bool,
    filled: Filled | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the allowed columns, (B, H, S, d); k and v (B, H_kv, C, d).

    allowed: bool (B, 1, S, C), or None: all, or with `causal` those up to the row's own. filled: of
    one token (S = 1), the same that `allowed` says. Deterministic forward. No host sync.
    """
    shape, groups = q.shape, q.shape[1] // k.shape[1]
    # A GPU's quick exponential is not exact enough for float32; the interpreter has another.
    exact = q.dtype in _SHORT or q.device.type == "cpu"
    if filled is not None and exact and shape[3] <= LARGEST_HEAD and not needs_plain(q, k, v):
        kernels = backend.kernels(_kernels, q)
        if kernels is not plain:
            return kernels.attend_filled(q, k, v, *filled)
    if groups > 1 and shape[2] == 1:
        # One token: a group's heads are rows against the same keys, which are read once.
        q, groups = q.view(shape[0], -1, groups, shape[3]), 1
    elif groups > 1 and allowed is not None:
        # With a mask, none of the fast kernels takes groups.
        k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
        groups = 1
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=causal, enable_gqa=groups > 1
    )
    return y.reshape(shape)

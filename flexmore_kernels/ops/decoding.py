"""What a decoding step does beside the layers: begin a token, the likeliest of the next, settle it.

Kernels: Triton on a GPU, so that a step is few launches; else plain PyTorch. Nothing here has a
gradient or waits for the device. Not public ops: the decoder's own. What: reference/decoding.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from .._aten import decoding as plain

_kernels = "decoding"


def begin_token(
    end: Tensor, position: Tensor, real: Tensor, now: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Make room for one more token of each request; its cos and sin, (B, 1, d / 2).

    In place: now (1,) becomes the token's column, which `end` (B,) counts for each request alike,
    real[:, now] True, position (B, 1) and end one more. rotary: cos and sin (C, d / 2) of every
    position. Deterministic.
    """
    kernels = plain if torch.compiler.is_compiling() else backend.kernels(_kernels, real)
    return kernels.begin_token(end, position, real, now, *rotary)


def greedy(logits: Tensor) -> Tensor:
    """(B,) int64 of logits (B, V): the largest, the first among equals; NaN is above all."""
    exact = logits.dtype != torch.float64  # keys are of 32 bits
    if torch.compiler.is_compiling() or not (exact and logits.numel()):
        return plain.greedy(logits)
    return backend.kernels(_kernels, logits).greedy(logits)


def settle(chosen: Tensor, tokens: Tensor, finished: Tensor, stops: Tensor, pad: int) -> None:
    """tokens (B, 1) = chosen (B,), or `pad` where finished (B,); then finished too where in stops.

    In place; stops (n,) int64, n may be 0. Deterministic.
    """
    kernels = plain if torch.compiler.is_compiling() else backend.kernels(_kernels, tokens)
    kernels.settle(chosen, tokens, finished, stops, pad)

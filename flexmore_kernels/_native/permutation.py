"""Permutation in the compiled library: csrc/cpu/permutation.cpp and csrc/cuda/permutation.cu."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.flexmore_native


def permute(x_TD: Tensor, row_to_slot_N: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    """x_ND; tail rows are zero."""
    return _ops.permute(x_TD, row_to_slot_N, slot_to_row_TK)


def unpermute(
    x_ND: Tensor, slot_to_row_TK: Tensor, weights_TK: Tensor | None, base_TD: Tensor | None
) -> Tensor:
    """base + the weighted sum of each token's rows, in acc, rounded once to x's dtype."""
    return _ops.unpermute(x_ND, slot_to_row_TK, weights_TK, base_TD)


def unpermute_backward(
    dy_TD: Tensor, x_ND: Tensor, row_to_slot_N: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx_ND, dweights_TK acc); zero for tail rows and empty slots."""
    return _ops.unpermute_backward(dy_TD, x_ND, row_to_slot_N, weights_TK)

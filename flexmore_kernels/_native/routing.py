"""Routing and the plan in the compiled library: csrc/cpu/routing.cpp and csrc/cuda/routing.cu."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_ops = torch.ops.flexmore_native
_SCORINGS = {"softmax": 0, "sigmoid": 1, "unit": 2}  # as in csrc/common.h


def topk_route(
    logits_TE: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    norm_topk_prob: bool,
    scoring: str,
) -> tuple[Tensor, Tensor]:
    """Weights (T, K) acc and indices (T, K) int64 from the logits; softmax, sigmoid or unit."""
    code = _SCORINGS[scoring]
    return _ops.topk_route(logits_TE, bias, mask, top_k, norm_topk_prob, code)


def topk_route_linear(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    norm_topk_prob: bool,
    scoring: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, E) in x's dtype by aten's matrix product, then as `topk_route`."""
    logits_TE = F.linear(x_TD, weight_ED)
    return logits_TE, *topk_route(logits_TE, bias, mask, top_k, norm_topk_prob, scoring)


def topk_route_backward(
    dweights_TK: Tensor,
    logits_TE: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    indices_TK: Tensor,
    norm_topk_prob: bool,
    scoring: str,
) -> Tensor:
    """The gradient (T, E), acc, with respect to the biased logits; scoring softmax or sigmoid."""
    code = _SCORINGS[scoring]
    return _ops.topk_route_backward(
        dweights_TK, logits_TE, bias, mask, indices_TK, norm_topk_prob, code
    )


def make_plan(
    indices_TK: Tensor, num_experts: int, by_set: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_to_slot, slot_to_row, row_offsets, token_order, expert_to_row), all int32."""
    return _ops.make_plan(indices_TK, num_experts, by_set)

"""Routing and the plan in the compiled library: csrc/cpu/routing.cpp and csrc/cuda/routing.cu."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..schedule import DECODE_TOKENS

_ops = torch.ops.flexmore_native
_SCORINGS = {"softmax": 0, "sigmoid": 1, "unit": 2}  # as in csrc/common.h
MOST_EXPERTS_FEW_TOKENS = 32
"""Of the launch that routes few tokens from x."""


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


def few_serve(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Whether one launch can route these few tokens (on CUDA): csrc/cuda/route_linear.cu."""
    return (
        x_TD.is_cuda
        and x_TD.dtype in (torch.bfloat16, torch.float16)
        and 0 < x_TD.shape[0] <= DECODE_TOKENS
        and weight_ED.shape[0] <= MOST_EXPERTS_FEW_TOKENS
        and x_TD.shape[1] % 8 == 0
        and x_TD.data_ptr() % 16 == 0
        and weight_ED.data_ptr() % 16 == 0
    )


def topk_route_linear(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    norm_topk_prob: bool,
    scoring: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, E) in x's dtype, and with them as `topk_route`."""
    if few_serve(x_TD, weight_ED):
        code = _SCORINGS[scoring]
        return _ops.topk_route_linear(x_TD, weight_ED, bias, mask, top_k, norm_topk_prob, code)
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

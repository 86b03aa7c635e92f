"""Routing and the plan in aten: sorts and gathers, on any device. Maths: reference/routing.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _biased(logits_TE: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(v, usable), both (T, E): the biased logits, and where a softmax may use them.

    v is -inf where excluded, and 0 in the whole row of a token that has no softmax.
    """
    v_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if bias is not None:
        v_TE = v_TE + F.pad(bias.to(v_TE.dtype).clamp(max=0), (1, 0))
    if mask is not None:
        v_TE = v_TE.masked_fill(~mask, -torch.inf)
    usable_T1 = v_TE.amax(1, keepdim=True).isfinite()  # amax propagates NaN
    usable_TE = usable_T1.expand_as(v_TE) if mask is None else mask & usable_T1
    return v_TE.masked_fill(~usable_T1, 0), usable_TE


def _sigmoids(v_TK: Tensor, chosen_TK: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """sigma(v) where chosen, else 0, and 1 - sigma(v), in float64.

    `shifted`: sigma(v) times a factor of its row's, so that the largest does not underflow.
    """
    v_TK = v_TK.double()
    e_TK = (-v_TK.abs()).exp()
    low_TK = v_TK.clamp(max=0).masked_fill(~chosen_TK, -torch.inf)
    if shifted:
        top_T1 = low_TK.amax(1, keepdim=True)
        low_TK = low_TK - torch.where(top_T1.isfinite(), top_T1, 0)
    return low_TK.exp() / (1 + e_TK), torch.where(v_TK >= 0, e_TK, 1) / (1 + e_TK)


def topk_route(
    logits_TE: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    norm_topk_prob: bool,
    scoring: str,
) -> tuple[Tensor, Tensor]:
    """Weights (T, K) acc and indices (T, K) int64 from the logits; softmax, sigmoid or unit."""
    E = logits_TE.shape[1]
    v_TE, usable_TE = _biased(logits_TE, bias, mask)
    order_TE = v_TE.argsort(dim=1, descending=True, stable=True)
    if mask is not None:
        # An allowed -inf sorts with the excluded ones: a second stable sort puts the excluded last.
        excluded_TE = (~usable_TE).to(torch.uint8).gather(1, order_TE)
        order_TE = order_TE.gather(1, excluded_TE.argsort(dim=1, stable=True))
    indices_TK = order_TE[:, :top_k]
    empty_TK = ~usable_TE.gather(1, indices_TK)
    # Few numbers: in float64, rounded once, at the end.
    if scoring == "softmax":
        p_TE = v_TE.softmax(1, dtype=torch.float64)
        weights_TK = p_TE.gather(1, indices_TK).masked_fill(empty_TK, 0)
    elif scoring == "sigmoid":
        weights_TK = _sigmoids(v_TE.gather(1, indices_TK), ~empty_TK, norm_topk_prob)[0]
    else:
        weights_TK = (~empty_TK).double()
    if norm_topk_prob:
        total_T1 = weights_TK.sum(1, keepdim=True)
        weights_TK = weights_TK / torch.where(total_T1 > 0, total_T1, 1)
    return weights_TK.to(v_TE.dtype), indices_TK.masked_fill(empty_TK, E)


def topk_route_linear(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    norm_topk_prob: bool,
    scoring: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, E) in x's dtype, then as `topk_route`."""
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
    E = logits_TE.shape[1]
    v_TE, usable_TE = _biased(logits_TE, bias, mask)
    # One more column takes what belongs to empty slots.
    dp_TE = v_TE.new_zeros(v_TE.shape[0], E + 1, dtype=torch.float64)
    dp_TE = dp_TE.scatter_(1, indices_TK, dweights_TK.double())[:, :E]
    if scoring == "sigmoid" or norm_topk_prob:
        chosen_TE = torch.zeros_like(dp_TE, dtype=torch.bool)
        chosen_TE = F.pad(chosen_TE, (0, 1)).scatter_(1, indices_TK, True)[:, :E]
        usable_TE = usable_TE & chosen_TE
    if scoring == "sigmoid":
        p_TE, slope_TE = _sigmoids(v_TE, usable_TE, norm_topk_prob)
    else:
        p_TE = v_TE.softmax(1, dtype=torch.float64).masked_fill(~usable_TE, 0)
    if norm_topk_prob:
        total_T1 = p_TE.sum(1, keepdim=True)
        p_TE = p_TE / torch.where(total_T1 > 0, total_T1, 1)
    if scoring == "softmax" or norm_topk_prob:
        dp_TE = dp_TE - (p_TE * dp_TE).sum(1, keepdim=True)
    if scoring == "sigmoid":
        dp_TE = dp_TE * slope_TE
    return (p_TE * dp_TE).to(v_TE.dtype)


def make_plan(
    indices_TK: Tensor, num_experts: int, by_set: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_to_slot, slot_to_row, row_offsets, token_order, expert_to_row), all int32."""
    (T, K), E = indices_TK.shape, num_experts
    slot_expert = indices_TK.flatten()
    slot_expert = torch.where((slot_expert >= 0) & (slot_expert < E), slot_expert, E)
    row_expert, row_to_slot = slot_expert.sort(stable=True)
    row_of_slot = torch.empty_like(row_to_slot)
    row_of_slot[row_to_slot] = torch.arange(T * K, device=indices_TK.device)
    slot_to_row = row_of_slot.masked_fill(slot_expert == E, -1).view(T, K)
    row_to_slot = row_to_slot.masked_fill(row_expert == E, -1)
    experts_E1 = torch.arange(E + 1, device=indices_TK.device)
    row_offsets = torch.searchsorted(row_expert.contiguous(), experts_E1)

    if by_set:
        # The last column takes the empty slots. Of equal ids amax keeps the last slot's row.
        expert_to_row = slot_to_row.new_full((T, E + 1), -1)
        expert_to_row.scatter_reduce_(1, slot_expert.view(T, K), slot_to_row, "amax")
        expert_to_row = expert_to_row[:, :E]
        expert_set = ((expert_to_row >= 0).long() << experts_E1[:E]).sum(1)
        token_order = expert_set.argsort(stable=True)
    else:
        expert_to_row, token_order = slot_to_row.new_empty(0, 0), slot_to_row.new_empty(0)
    plan = (row_to_slot, slot_to_row, row_offsets, token_order, expert_to_row)
    return tuple(t.to(torch.int32, memory_format=torch.contiguous_format) for t in plan)

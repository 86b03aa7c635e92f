"""Routing: which experts a token uses, with which weights; and the sort of the routed rows by
expert.

    l = x G^T                                     logits, in x's dtype (or given)
    v_0 = l_0,  v_e = l_e + min(b_e, 0)  e > 0    biased logits, in acc
    e_1 .. e_K: the allowed experts by (v descending, index ascending)

    scoring          w_k, in acc; norm_topk_prob: w_k / sum_j w_j
    "softmax"        p[e_k], p = softmax of v over the allowed experts
    "topk_softmax"   softmax of v over e_1 .. e_K              = "softmax" with norm_topk_prob
    "sigmoid"        sigma(v[e_k])
    "unit"           1

An expert that the mask excludes is never selected; if fewer than K are allowed, the last slots are
*empty*: index E, weight 0. An allowed expert with logit -inf has p = 0, sigma = 0 and comes after
the finite ones. A token for which the softmax does not exist (no allowed expert, a NaN among the
allowed logits, or their largest is infinite) has only empty slots, whatever the scoring.

A *shared* expert (Nexus, arXiv 2408.15901, section 2) is no candidate: it takes no part in the
softmax and is not selected. Each token that the mask allows it to has it, with weight 1, in a slot
before e_1 .. e_K, which is empty for the others.

Gradient, given dw and s = the selected experts (p[e_k] and w_k of an empty slot are 0):

    softmax:                 dv_e = p_e ([e in s] dw_e - sum_j p_{e_j} dw_j)     over all allowed e
    softmax renormalised,
    topk_softmax:            dv_e = w_e (dw_e - sum_j w_j dw_j)                  over e in s, else 0
    sigmoid:                 dv_e = w_e (1 - sigma(v_e)) dw_e                    over e in s, else 0
    sigmoid renormalised:    dv_e = w_e (1 - sigma(v_e)) (dw_e - sum_j w_j dw_j) over e in s, else 0
    unit:                    dv_e = 0
    dl = dv,  db_e = dv_e * (1 if b_e < 0, 1/2 if b_e = 0, 0 if b_e > 0),  dx = dl G,  dG = dl^T x
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_SET_EXPERTS = 8
SCORINGS = ("softmax", "topk_softmax", "sigmoid", "unit")


class Routing(NamedTuple):
    """The router's decision: `logits` (T, E) raw, `weights` (T, K) acc, `indices` (T, K) int64.

    With a shared expert K is one more.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor


class RoutingPlan(NamedTuple):
    """What the sort found. Ids outside [0, E) are empty slots: they have no row; the tail rows have
    no slot.

    indices (T, K) int64, as given; row_to_slot (N,) int32, -1 in the tail; slot_to_row (T, K)
    int32, -1 where empty; row_offsets (E+1,) int32, expert e owns rows [row_offsets[e],
    row_offsets[e+1]); for E <= 8 token_order (T,) int32, the tokens sorted by the set of their
    experts (sum of 2^e), and expert_to_row (T, E) int32, the row of token t at expert e or -1; for
    larger E these two are (0,) and (0, 0).
    """

    indices: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    row_offsets: Tensor
    token_order: Tensor
    expert_to_row: Tensor
    num_experts: int
    top_k: int


def topk_route(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    top_k: int,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    norm_topk_prob: bool = False,
    scoring: str = "softmax",
    shared: int | None = None,
) -> Routing:
    """Choose `top_k` experts per token from x (T, D) and weight (E, D), or from logits x (T, E) if
    weight is None.

    `bias` (E-1,) belongs to experts 1..; `mask` is bool (E,) or (T, E), True where the token may
    use the expert. With `shared` there are K + 1 slots.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring: got {scoring!r}; accepted: {', '.join(map(repr, SCORINGS))}")
    logits_TE = x if weight is None else F.linear(x, weight)
    T, E = logits_TE.shape
    v_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if bias is not None:
        b_E = torch.minimum(bias, torch.zeros_like(bias)).to(v_TE.dtype)
        v_TE = v_TE + F.pad(b_E, (1, 0))
    allowed_TE = torch.ones_like(v_TE, dtype=torch.bool) if mask is None else mask.expand(T, E)
    if shared is not None:
        has_shared_T1 = allowed_TE[:, shared, None]
        allowed_TE = allowed_TE & (torch.arange(E, device=v_TE.device) != shared)

    top_T1 = v_TE.detach().masked_fill(~allowed_TE, -torch.inf).amax(1, keepdim=True)  # NaN wins
    usable_TE = allowed_TE & top_T1.isfinite()
    usable_T1 = usable_TE.any(1, keepdim=True)
    # A token without a softmax gets zeros in its place, so that no NaN enters the gradient.
    v_TE = v_TE.masked_fill(~usable_TE, -torch.inf).masked_fill(~usable_T1, 0)

    by_logit_TE = v_TE.detach().argsort(dim=1, descending=True, stable=True)
    allowed_first_TE = (~usable_TE).gather(1, by_logit_TE).int().argsort(dim=1, stable=True)
    indices_TK = by_logit_TE.gather(1, allowed_first_TE)[:, :top_k]
    chosen_TK = usable_TE.gather(1, indices_TK)

    def softmax_over_chosen(u_TK: Tensor) -> Tensor:
        u_TK = u_TK.masked_fill(~chosen_TK, -torch.inf).masked_fill(~usable_T1, 0)
        return u_TK.softmax(1) * chosen_TK

    v_TK = v_TE.gather(1, indices_TK)
    if scoring == "softmax":
        weights_TK = v_TE.softmax(1).gather(1, indices_TK) * chosen_TK
    elif scoring == "topk_softmax":
        weights_TK = softmax_over_chosen(v_TK)
    elif scoring == "sigmoid" and norm_topk_prob:
        weights_TK = softmax_over_chosen(F.logsigmoid(v_TK))  # sigma / sum of sigma, no underflow
    elif scoring == "sigmoid":
        weights_TK = v_TK.sigmoid() * chosen_TK
    else:
        weights_TK = chosen_TK.to(v_TE.dtype)
    if norm_topk_prob and scoring in ("softmax", "unit"):
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).masked_fill(~usable_T1, 1)
    indices_TK = indices_TK.masked_fill(~chosen_TK, E)
    if shared is not None:
        weights_TK = torch.cat([has_shared_T1.to(weights_TK.dtype), weights_TK], 1)
        indices_TK = torch.cat([torch.where(has_shared_T1, shared, E), indices_TK], 1)
    return Routing(logits_TE, weights_TK, indices_TK)


def make_plan(indices: Tensor, num_experts: int) -> RoutingPlan:
    """Sort the slots of `indices` (T, K) by expert, stably: a loop over experts, tokens, slots."""
    (T, K), E = indices.shape, num_experts
    ids = indices.tolist()
    row_to_slot, row_offsets = [], [0]
    slot_to_row = [[-1] * K for _ in range(T)]
    expert_to_row = [[-1] * E for _ in range(T)]
    for e in range(E):
        for t in range(T):
            for k in range(K):
                if ids[t][k] == e:
                    slot_to_row[t][k] = expert_to_row[t][e] = len(row_to_slot)
                    row_to_slot.append(t * K + k)
        row_offsets.append(len(row_to_slot))
    row_to_slot += [-1] * (T * K - len(row_to_slot))

    expert_set = [sum(1 << e for e in {*row} if 0 <= e < E) for row in ids]
    token_order = sorted(range(T), key=lambda t: expert_set[t])  # sorted() is stable
    by_set = E <= MAX_SET_EXPERTS

    def int32(values, *shape):
        return torch.tensor(values, dtype=torch.int32, device=indices.device).reshape(shape)

    return RoutingPlan(
        indices,
        int32(row_to_slot, T * K),
        int32(slot_to_row, T, K),
        int32(row_offsets, E + 1),
        int32(token_order, T) if by_set else int32([], 0),
        int32(expert_to_row, T, E) if by_set else int32([], 0, 0),
        E,
        K,
    )

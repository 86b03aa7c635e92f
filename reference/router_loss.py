"""Router losses and counters: are the tokens spread evenly over the experts, are the logits small?

    v, allowed, indices, weights                    as in routing, for T tokens of one layer
    q_t = softmax of v_t over the allowed experts   the router's distribution, whatever it selects;
    scoring "sigmoid":  q_te = sigma(v_te) / sum over the allowed j of sigma(v_tj)

A token *counts* if the padding mask says so and if its softmax exists (see routing). Over the
tokens that count: n their number, c_e the number of slots with index e, S_e = sum_t q_te, and A the
number of experts that at least one of them may use (E without a mask; an expert that is excluded
for all is as good as deleted).

    load balancing, "huggingface"     A sum_e (c_e / n) (S_e / n),  c, S, n summed over all layers
    load balancing, "olmo_core"       A sum_e (c_e / n) (S_e / n) / K,  summed over the layers
    z                                 sum_t (logsumexp of v_t over the allowed)^2 / n,  likewise
    entropy of expert e               sum_t -q_te ln q_te; 0 ln 0 = 0

An even spread gives K and, for each layer, 1. With n = 0 all is 0. Sums are in acc.

Gradient, given the gradient g of the loss; c, n and A are constant:

    load balancing:   dq_te = g A c_e / n^2;  olmo_core: the same / K
                      dv_te = q_te (dq_te - sum_j q_tj dq_tj);  sigmoid: that (1 - sigma(v_te))
    z:                dv_te = g 2 logsumexp(v_t) p_te / n,  p the softmax
    dl = dv, db as in routing; 0 at a token that does not count
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class RouterStatistics(NamedTuple):
    """Sums over the tokens that count: tokens n () int64, load c (E,) int64, and (E,) in acc
    weight_sum (of the routing weights), score_sum S, entropy_sum.
    """

    tokens: Tensor
    load: Tensor
    weight_sum: Tensor
    score_sum: Tensor
    entropy_sum: Tensor


class Counted(NamedTuple):
    """One layer's tokens that count: v (n, E) with -inf where excluded, ids and weights (n, K)."""

    v: Tensor
    indices: Tensor | None
    weights: Tensor | None
    experts: Tensor  # bool (E,): some token may use it


def count(logits, bias, mask, padding_mask, indices=None, weights=None) -> Counted:
    """Keeps the tokens that count, by indexing."""
    E = logits.shape[-1]
    v_TE = logits.reshape(-1, E).to(torch.promote_types(logits.dtype, torch.float32))
    T = len(v_TE)
    if bias is not None:
        v_TE = v_TE + F.pad(torch.minimum(bias, torch.zeros_like(bias)).to(v_TE.dtype), (1, 0))
    allowed_TE = torch.ones_like(v_TE, dtype=torch.bool)
    if mask is not None:
        allowed_TE = mask.expand(T, E) if mask.dim() == 1 else mask.reshape(T, E)
    v_TE = v_TE.masked_fill(~allowed_TE, -torch.inf)
    counts_T = v_TE.amax(1).isfinite()
    if padding_mask is not None:
        counts_T = counts_T & padding_mask.reshape(T)
    slots = (None if t is None else t.reshape(T, t.shape[-1])[counts_T] for t in (indices, weights))
    return Counted(v_TE[counts_T], *slots, allowed_TE[counts_T].any(0))


def distribution(v_nE: Tensor, scoring: str) -> Tensor:
    """q (n, E)."""
    return (F.logsigmoid(v_nE) if scoring == "sigmoid" else v_nE).softmax(1)


def slots_per_expert(indices_nK: Tensor, num_experts: int) -> Tensor:
    """c (E,) int64."""
    return torch.stack([(indices_nK == e).sum() for e in range(num_experts)])


def layers(*values) -> list[tuple]:
    """The arguments of each layer: a sequence has one entry a layer, None is None for each."""
    if isinstance(values[0], Tensor):
        return [values]
    count = len(values[0])
    columns = [[value] * count if value is None else value for value in values]
    return list(zip(*columns, strict=True))


def load_balancing_loss(
    logits: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    *,
    form: str = "huggingface",
    scoring: str = "softmax",
    bias: Tensor | Sequence[Tensor | None] | None = None,
    mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """The loss () of raw logits (..., E) and selected ids (..., K), of one layer or of several.

    `bias` (E-1,) as in `topk_route`; `mask` is bool (E,) or (..., E), True where the token may use
    the expert; `padding_mask` is bool (...,), True at real tokens; both hold for every layer.
    """
    c, S, n, experts, loss = 0, 0, 0, False, 0
    for given, ids, b in layers(logits, indices, bias):
        layer = count(given, b, mask, padding_mask, ids)
        c_l = slots_per_expert(layer.indices, given.shape[-1]).to(layer.v.dtype)
        S_l, n_l = distribution(layer.v, scoring).sum(0), max(len(layer.v), 1)
        loss = loss + layer.experts.sum() * (c_l / n_l * (S_l / n_l)).sum() / ids.shape[-1]
        c, S, n = c + c_l, S + S_l, n + len(layer.v)
        experts = experts | layer.experts
    if form == "olmo_core":
        return loss
    return experts.sum() * (c / max(n, 1) * (S / max(n, 1))).sum()


def router_z_loss(
    logits: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """The z-loss () of raw logits (..., E), of one layer or summed over several."""
    loss = 0
    for given, b in layers(logits, bias):
        layer = count(given, b, mask, padding_mask)
        loss = loss + layer.v.logsumexp(1).square().sum() / max(len(layer.v), 1)
    return loss


def router_statistics(
    logits: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> RouterStatistics:
    """The counters of one layer; without `weights` (..., K) their sums are 0."""
    E = logits.shape[-1]
    layer = count(logits.detach(), bias, mask, padding_mask, indices, weights)
    q_nE = distribution(layer.v, scoring)
    weight_sum_E = q_nE.new_zeros(E)
    for e in range(E if weights is not None else 0):
        weight_sum_E[e] = (layer.weights * (layer.indices == e)).sum()
    return RouterStatistics(
        torch.tensor(len(q_nE), device=logits.device),
        slots_per_expert(layer.indices, E),
        weight_sum_E,
        q_nE.sum(0),
        torch.special.entr(q_nE).sum(0),
    )

"""Experts joining and leaving a live layer: see `membership` for whole models.

Experts that stay keep their bits and, where each matrix is a parameter of its own, their Parameter
objects: see layer_change.py. Source: FlexOlmo (arXiv 2507.07024, section 3.3), whose experts join
and leave by their weights and router rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_int
from .layer_change import Change, entry_of, factor_dtype, tensors_of
from .member_rows import row_for
from .members import Newcomer, Weights, check_routed, with_one
from .reranking import parse_rank, reranked
from .storage import PROJECTIONS


def add_expert(
    layer: Any,
    weights: Any,
    router_row: Tensor | str | None = None,
    embedding: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> int:
    """Add an expert behind the others; its number.

    Args:
        layer: a `FlexMoRE`.
        weights: gate, up and down, each a full-size matrix (out, in), a pair a (r, in), b (out, r),
            or None, the base's own; taken to the layer's device and dtypes (a narrower one rounds).
        router_row: (D,), "zeros" or "mean" (see `members.router_row`), of a linear router, which
            has no row for a stranger: what none is given for is refused.
        embedding: (m,), of a projected router, which makes the row of it.
        bias: of a router with expert_bias; default: 0.

    `top_k` stays. The new parameters learn (requires_grad) if those of any expert beside the base
    do. Optimizers, captured CUDA graphs and KV caches know the old layer. A prepared layer is
    prepared again as it was; experts that were listed there stay listed. Waits for the device.
    Raises ValueError or TypeError by name; the layer is then as it was.
    """
    row = _row(layer, router_row, new=True)
    newcomer = Newcomer(weights, row, embedding, bias)
    Change(layer, [*range(layer.num_experts), newcomer]).apply()
    return layer.num_experts - 1


def remove_expert(layer: Any, expert: int) -> None:
    """Remove an expert; those behind it move up, and `top_k` goes down to what is left.

    What the layer computes is what it computed with this expert excluded. Not the base, nor the
    shared expert, nor the last that a router beside a shared one can select. Otherwise as
    `add_expert`.
    """
    expert = routed(layer, expert)
    Change(layer, [e for e in range(layer.num_experts) if e != expert]).apply()


def replace_expert(
    layer: Any,
    expert: int,
    weights: Any,
    router_row: Tensor | str | None = None,
    embedding: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> None:
    """Put other weights in an expert's place, of any rank; what of the router is not given stays.

    Otherwise as `add_expert`.
    """
    expert = routed(layer, expert)
    row = _row(layer, router_row, new=False)
    newcomer = Newcomer(weights, row, embedding, bias, instead_of=expert)
    Change(layer, with_one(layer.num_experts, expert, newcomer)).apply()


def rerank_expert(layer: Any, expert: int, rank: Any, *, method: str = "exact") -> None:
    """Give an expert another rank: see `reranking.reranked`.

    rank: an int, 0 for full-size, or a triple (gate, up, down) of a rank, 0 for no delta, or
    "full". A matrix that is full-size, and stays so, and one without a delta keep their bits.
    Otherwise as `add_expert`.
    """
    expert = routed(layer, expert)
    newcomer = rerank_member(layer, expert, rank, method)
    Change(layer, with_one(layer.num_experts, expert, newcomer)).apply()


def rerank_member(layer: Any, expert: int, rank: Any, method: str) -> Newcomer:
    """The expert at another rank, to take its own place."""
    triple = parse_rank(rank, min(layer.hidden_size, layer.intermediate_size))
    found = []
    with torch.no_grad():
        for name, own in zip(PROJECTIONS, triple, strict=True):
            base, entry = entry_of(layer, name, 0).detach(), entry_of(layer, name, expert)
            kind = factor_dtype(layer)
            found.append(reranked(entry, base, own, dtype=kind, method=method))
    return Newcomer(tuple(found), instead_of=expert)


def expert_entries(layer: Any, expert: int) -> Weights:
    """An expert's matrices as the layer has them, detached; of stacked factors copies."""
    gate, up, down = (entry_of(layer, name, expert) for name in PROJECTIONS)
    return gate, up, down


def routed(layer: Any, expert: Any) -> int:
    """The number of an expert that may go or change: not the base, not the shared one."""
    expert = check_int("expert", expert, 0, layer.num_experts - 1)
    check_routed(expert, layer.shared_expert)
    return expert


def _row(layer: Any, given: Any, *, new: bool) -> Tensor | None:
    gate = tensors_of(layer.gate)
    return row_for(gate, "router_row", given, None, layer.shared_expert, new=new)

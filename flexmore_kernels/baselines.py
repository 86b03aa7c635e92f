"""What the library is compared with: the same layer in plain PyTorch, three ways, and a dense FFN.

All take what `ops.experts` takes (x (T, D), indices and weights (T, K), and gate, up, down as E
entries each: a full-size weight, a pair (a, b), or None), compute the same numbers, and work under
autograd and torch.compile as written. `fair_eager` and `every_expert` use the identity that the
library is built on, the base computed once per token; `published` is what the authors' code does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Entries = Sequence["Tensor | tuple[Tensor, Tensor] | None"]


def route(x: Tensor, router: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """indices and weights (T, K) as Hugging Face's FlexOlmo router computes them."""
    p_TE = F.linear(x, router).float().softmax(-1)
    weights_TK, indices_TK = p_TE.topk(top_k, dim=-1)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return indices_TK, weights_TK


def dense_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One SwiGLU FFN of the base's size: the floor of every layer that contains it."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def fair_eager(
    x: Tensor, indices: Tensor, weights: Tensor, gate: Entries, up: Entries, down: Entries
) -> Tensor:
    """The identity, base once per token; each expert on its own tokens, by index and addmm."""
    base_gate, base_up = F.linear(x, gate[0]), F.linear(x, up[0])
    mixed, y = torch.zeros_like(base_gate), torch.zeros_like(x)
    for e in range(len(gate)):
        tokens, slots = torch.where(indices == e)
        x_n = x[tokens]
        g, u = _pre(x_n, base_gate[tokens], gate, e), _pre(x_n, base_up[tokens], up, e)
        h = F.silu(g) * u * weights[tokens, slots, None].to(x.dtype)
        if e > 0 and isinstance(down[e], Tensor):
            y = y.index_add(0, tokens, F.linear(h, down[e]))
            continue
        mixed = mixed.index_add(0, tokens, h)
        if down[e] is not None and e > 0:
            y = y.index_add(0, tokens, _low_rank(h, down[e]))
    return torch.addmm(y, mixed, down[0].T)


def every_expert(
    x: Tensor, indices: Tensor, weights: Tensor, gate: Entries, up: Entries, down: Entries
) -> Tensor:
    """The identity, base once per token; every expert on every token, weight 0 where not selected.

    Static shapes and no indexing: the form that torch.compile does best.
    """
    base_gate, base_up = F.linear(x, gate[0]), F.linear(x, up[0])
    mixed, y = torch.zeros_like(base_gate), torch.zeros_like(x)
    for e in range(len(gate)):
        weight = (weights * (indices == e)).sum(-1, keepdim=True).to(x.dtype)
        h = F.silu(_pre(x, base_gate, gate, e)) * _pre(x, base_up, up, e) * weight
        if e > 0 and isinstance(down[e], Tensor):
            y = y + F.linear(h, down[e])
            continue
        mixed = mixed + h
        if down[e] is not None and e > 0:
            y = y + _low_rank(h, down[e])
    return torch.addmm(y, mixed, down[0].T)


def published(
    x: Tensor, indices: Tensor, weights: Tensor, gate: Entries, up: Entries, down: Entries
) -> Tensor:
    """Base + B A for each expert on its own tokens: the base is computed K times a token."""
    y = torch.zeros_like(x)
    for e in range(len(gate)):
        tokens, slots = torch.where(indices == e)
        x_n = x[tokens]
        h = F.silu(_expert(x_n, gate, e)) * _expert(x_n, up, e)
        out = _expert(h, down, e) * weights[tokens, slots, None].to(x.dtype)
        y = y.index_add(0, tokens, out)
    return y


def _low_rank(x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    a, b = pair
    return F.linear(F.linear(x, a), b)


def _pre(x: Tensor, base: Tensor, entries: Entries, e: int) -> Tensor:
    """Gate or up pre-activation of expert e for rows x, from the base's for the same rows."""
    if e == 0 or entries[e] is None:
        return base
    if isinstance(entries[e], Tensor):
        return F.linear(x, entries[e])
    a, b = entries[e]
    return torch.addmm(base, F.linear(x, a), b.T)


def _expert(x: Tensor, entries: Entries, e: int) -> Tensor:
    """One projection of one expert, the base computed for it."""
    if isinstance(entries[e], Tensor):
        return F.linear(x, entries[e])
    y = F.linear(x, entries[0])
    return y if entries[e] is None else y + _low_rank(x, entries[e])

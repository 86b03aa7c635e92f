"""Rows of their own in the backward: dh before the nonlinearity's backward, that, and dx after it.

The nonlinearity, of those rows alone, in one pass:

    h = silu(g) u;  dp = <dh, h>;  du = p dh silu(g);  dg = p dh u silu'(g);  p h replaces dh

Floor: three rows of F in, three out, at the memory's rate. A row's dot product is one program's, so
its order is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..projection import Projection, padded_rank
from ..ragged import SEGMENT, RowProducts, Term
from . import tiles
from .routed import Routed
from .tiles import sigmoid


@triton.jit
def flexmore_swiglu_rows_backward(
    dgate_ptr, dup_ptr, dweights_ptr, rows_ptr, gate_ptr, up_ptr, weights_ptr, slot_to_row_ptr, F,
    ACC: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    row = tl.load(slot_to_row_ptr + slot).to(tl.int64)
    if row < 0:
        tl.store(dweights_ptr + slot, tl.zeros((), ACC))
        return
    weight = tl.load(weights_ptr + slot).to(ACC)
    dtype = rows_ptr.dtype.element_ty
    dot = tl.zeros((BLOCK_F,), ACC)
    for first in range(0, F, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        live = column < F
        at = row * F + column
        g = tl.load(gate_ptr + at, mask=live, other=0.0).to(ACC)
        u = tl.load(up_ptr + at, mask=live, other=0.0).to(ACC)
        dh = tl.load(rows_ptr + at, mask=live, other=0.0).to(ACC)
        s = sigmoid(g, dtype)
        silu = g * s
        h = silu * u
        dot += dh * h
        dh *= weight
        tl.store(rows_ptr + at, (weight * h).to(dtype), mask=live)
        tl.store(dup_ptr + at, (dh * silu).to(dtype), mask=live)
        tl.store(dgate_ptr + at, (dh * u * (s + silu * (1.0 - s))).to(dtype), mask=live)
    tl.store(dweights_ptr + slot, tl.sum(dot, 0))


def swiglu_rows_backward(
    rows: Tensor, gate: Tensor, up: Tensor, weights: Tensor, slot_to_row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dgate, dup (N, F), dweights (T, K), 0 for slots without a row; `rows` is dh, and becomes p h.

    Rows that `slot_to_row` (T, K) does not name, -1 elsewhere, stay as they are.
    """
    F = gate.shape[1]
    dgate, dup = torch.empty_like(rows), torch.empty_like(rows)
    dweights = torch.empty_like(weights)
    if dweights.numel() == 0:
        return dgate, dup, dweights
    with tiles.device_guard(rows):
        flexmore_swiglu_rows_backward[(dweights.numel(),)](
            dgate, dup, dweights, rows, gate, up, weights, slot_to_row, F,
            ACC=tiles.accumulator(rows.dtype), BLOCK_F=min(1024, tiles.padded(F)), num_warps=4,
        )  # fmt: skip
    return dgate, dup, dweights


def fill_hidden_gradient(
    layer: Routed, dy: Tensor, dmixed: Tensor | None, down: Projection, own, by_shared, slots, dh_NF
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """dh of the own experts' rows, not yet times their weights; dmixed: dy W_d.

    Gives dy permuted (N, D), None if nobody reads it, and q = B_d^T dy (T, rank padded), the rows
    of a segment, of those that have factors.
    """
    dy_ND, q, shrinks, products = None, {}, [], []
    reads = tuple(e for e in own if e not in by_shared or down.ranks[e])
    if reads:
        dy_ND = layer.permutation.permute(dy, layer.plan.row_to_slot, slots(reads))
    pairs = down.factor_pairs()
    for e in own:
        if e not in by_shared:
            term = Term(dy_ND, down.full[e].T)
        elif down.ranks[e]:
            a, b = pairs[e]
            q[e] = dy.new_empty(dy.shape[0], padded_rank(down.ranks[e]))
            shrinks.append(RowProducts(e, q[e], Term(dy_ND, b.T)))
            term = Term(q[e], a.T, dmixed, SEGMENT)
        else:
            term = Term(base=dmixed)
        products.append(RowProducts(e, dh_NF, term))
    layer.sum_rows(shrinks, None, SEGMENT)
    layer.sum_rows(products)
    return dy_ND, q


def add_rows(layer: Routed, total: Tensor | None, terms: dict[int, list[Term]], slots) -> Tensor:
    """dx (T, D): total and each expert's products of its rows, summed by token."""
    x = layer.x
    if not terms:
        return total.to(x.dtype)
    dx_ND = x.new_empty(layer.plan.num_rows, x.shape[1])
    layer.sum_rows([RowProducts(e, dx_ND, *own) for e, own in terms.items()])
    return layer.permutation.unpermute(dx_ND, slots(tuple(terms)), None, total)

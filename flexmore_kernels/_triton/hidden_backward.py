"""The token-major middle's backward with what follows from it for the factors around it.

On Hopper three kernels of the library: one by token, and two by expert, which form dg, du and h
once more: to shrink them to ds, and for the factors' gradients. No row is written there, for that
and reading it again takes longer. Elsewhere Triton's kernel by token writes the rows that shrinks
and factor gradients read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..ragged import RoutingPlan
from . import token_major
from .routed import Routed
from .token_major_backward import ROWS_GATE, ROWS_H, ROWS_UP, mix_backward, token_rows


class HiddenBackward(NamedTuple):
    """What the middle's backward gives; factors' gradients packed, of experts that were not wanted
    anything, None if of none."""

    dgate: Tensor  # (T, F)
    dup: Tensor  # (T, F)
    dots: Tensor  # (N,): dp of each row
    ds: Tensor | None  # (T, R_gate + R_up), 0 where not chosen; None if not wanted
    db_gate: Tensor | None  # (F, R_gate)
    db_up: Tensor | None  # (F, R_up)
    da: Tensor | None  # (R_down, F)


def hidden_backward(
    layer: Routed, plan: RoutingPlan, dmixed_TF, gate_TF, up_TF, weights, s_TR, q_TR,
    need_s: bool, wants,
) -> HiddenBackward:  # fmt: skip
    """Of the layer's experts without rows. s: A x; q: B_d^T dy, of all tokens. need_s: whether ds
    is wanted; wants: of each expert, whether the gradients of its B of gate, its B of up and its A
    of down are."""
    given = (dmixed_TF, gate_TF, up_TF, weights, plan, s_TR, q_TR)
    hopper = backend.hopper("token_major", gate_TF)
    if hopper is None or not hopper.serves(*gate_TF.shape, [side.ranks for side in layer.sides]):
        return _by_rows(layer, given, need_s, wants)
    found = hopper.mix_backward(*given, layer.sides)
    ds_TR = s_TR
    if need_s and s_TR.shape[1]:
        ds_TR = hopper.input_grads(*given, layer.sides)
    grads = (None, None, None)
    if any(map(any, wants)):
        grads = hopper.factor_grads(*given, layer.sides, wants)
        grads = [grad if any(own) else None for grad, own in zip(grads, wants, strict=True)]
    return HiddenBackward(*found, ds_TR if need_s else None, *grads)


def _by_rows(layer: Routed, given, need_s: bool, wants) -> HiddenBackward:
    *_, weights, plan, s_TR, q_TR = given
    gate, up, down = layer.packed
    writes = tuple(
        (ROWS_GATE if gate.ranks[e] and (need_s or wants[0][e]) else 0)
        | (ROWS_UP if up.ranks[e] and (need_s or wants[1][e]) else 0)
        | (ROWS_H if wants[2][e] else 0)
        for e in range(len(gate.ranks))
    )
    factors = (gate.b, gate.ranks, up.b, up.ranks, down.a, down.ranks)
    dgate, dup, *drows, h_NF, dots = mix_backward(*given, *factors, writes)
    ds, dbs, first, ones = [], [], 0, torch.ones_like(weights)
    for low, drow, wanted in zip((gate, up), drows, wants, strict=False):
        if need_s and low.any:
            dz = layer.shrink(drow, low.b.T, low.ranks)
            ds.append(token_major.weighted(dz, ones, plan, low.ranks))
        z = token_rows(s_TR[:, first:], plan, low.ranks) if any(wanted) else None
        db = _factor_grad(layer, z, drow, low.ranks, wanted)
        dbs.append(None if db is None else db.T)
        first += sum(low.ranks)
    q = token_rows(q_TR, plan, down.ranks, weights) if any(wants[2]) else None
    da = _factor_grad(layer, q, h_NF, down.ranks, wants[2])
    ds_TR = torch.cat(ds, 1) if ds else s_TR  # no column
    return HiddenBackward(dgate, dup, dots, ds_TR if need_s else None, *dbs, da)


def _factor_grad(layer: Routed, z, rows, ranks, wanted) -> Tensor | None:
    needs = [want for want, rank in zip(wanted, ranks, strict=True) if rank]
    return layer.factor_grad(z, rows, ranks, needs)

"""Backward of the experts: recomputes what the nonlinearity read from the saved x, G, U.

It pays the base once: a product with each of its three weights, for dmixed and dx, and (only if
wanted) one for each weight's gradient. Of few experts tokens stay in order (token_backward.py);
here each stage is a kernel over rows. Maths: reference/experts.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend, schedule
from ..kept import Kept
from ..projection import RANK_MULTIPLE, Projection
from ..ragged import MAX_SET_EXPERTS, RoutingPlan, rows_to_slots
from . import token_backward
from .routed import Routed, mm


def backward(dy, x, indices, weights, kept: Kept, sides, needs, side_needs):
    """(dx, dweights, gradients of the three projections), None where not needed."""
    down = sides[2]
    need_x, need_weights = needs
    own = _own(x, sides)
    if own is not None:
        return token_backward.backward(dy, x, indices, weights, kept, sides, own, needs, side_needs)
    need_hidden = need_x or need_weights or any(n for s in side_needs[:2] for n in s.tensors)
    layer = Routed(x, indices, sides)
    plan = layer.plan
    in_gate, in_up, out_down = layer.packed
    z = [layer.shrink(x, side.a, side.ranks, gather=True) for side in (in_gate, in_up)]
    rows = kept[4:6]
    if kept.rows_gate is None:
        bases = kept[:2] if kept.gate is not None else [x @ side.full[0].T for side in sides[:2]]
        rows = layer.preactivations(*bases, z)

    if need_hidden:
        dh_NF = _hidden_gradient(layer, dy)
        positions = torch.arange(plan.num_rows, device=x.device, dtype=torch.int32)
        positions = torch.where(plan.row_to_slot >= 0, positions, -1)
        *drows, dweight_rows, h_NF = layer.mix.swiglu_mix_backward(
            dh_NF, None, *rows, _row_weights(weights, plan), positions, 1
        )
        dweights = rows_to_slots(dweight_rows, plan.slot_to_row) if need_weights else None
    else:
        dweights, drows = None, [None, None]
        h_NF = layer.mix.swiglu_mix(*rows, weights, plan.slot_to_row)[1]

    dz = [
        layer.shrink(drow, packed.b.T, packed.ranks)
        if packed.any and (need_x or any(side_need.factor_needs()[0]))
        else None
        for drow, packed, side_need in zip(drows, layer.packed, side_needs, strict=False)
    ]
    grads = [
        _input_grads(layer, index, drows[index], z[index], dz[index], side_needs[index])
        for index in (0, 1)
    ]
    grads.append(_down_grads(layer, dy, h_NF, weights, kept.s_down, side_needs[2]))
    dbases = []
    for index, side in enumerate(sides[:2]):
        wanted = need_x or side_needs[index].full[0]
        dbase = layer.unpermute(drows[index], layer.base_weights(side, None)) if wanted else None
        dbases.append(dbase)
        if side_needs[index].full[0]:
            grads[index]["full"][0] = dbases[index].T @ x
    if side_needs[2].full[0]:
        mixed = kept.mixed
        if mixed is None:
            mixed = layer.unpermute(h_NF, layer.base_weights(down, weights))
        grads[2]["full"][0] = dy.T @ mixed
    dx = _input_gradient(layer, dbases, drows, dz) if need_x else None
    return dx, dweights, [_collect(s, g) for s, g in zip(sides, grads, strict=True)]


def _own(x: Tensor, sides) -> tuple[int, ...] | None:
    """Which experts have rows while others' tokens stay in order; None where all have rows."""
    layouts = [side.layout for side in sides]
    if not 1 < len(layouts[0]) <= MAX_SET_EXPERTS:
        return None
    largest = max(map(max, layouts))
    if largest <= schedule.FUSED_RANK and not any(side.has_extra_full for side in sides):
        return ()
    return schedule.choose(
        layouts, x.shape[0], hidden=x.shape[1], width=sides[0].full[0].shape[0], dtype=x.dtype,
        decode=False,
    ).own or None  # fmt: skip


def _row_weights(weights: Tensor, plan: RoutingPlan) -> Tensor:
    """Slot weights (T, K) as a column of row weights (N, 1); 0 in the tail."""
    if plan.num_rows == 0:
        return weights.new_empty((0, 1))
    values = weights.view(-1)[plan.row_to_slot.clamp(min=0).long()]
    return torch.where(plan.row_to_slot >= 0, values, 0).unsqueeze(1)


def _hidden_gradient(layer: Routed, dy: Tensor) -> Tensor:
    """(N, F): Wd_e^T dy for each row, W_d^T dy once per token; not yet times the row's weight."""
    down, packed = layer.sides[2], layer.packed[2]
    q = layer.shrink(dy, packed.b.T, packed.ranks, gather=True)
    dh_NF = layer.expand(q, packed.a.T, packed.ranks, dy @ down.full[0], gather=True)
    if down.has_extra_full:
        layer.full_rows(layer.permute(dy), down, dh_NF, transpose=True)
    return dh_NF


def _input_gradient(layer: Routed, dbases, drows, dz) -> Tensor:
    """dx (T, D): the base's part once per token, the experts' own parts summed by unpermute."""
    total = None
    for side, dbase in zip(layer.sides[:2], dbases, strict=True):
        total = mm(dbase, side.full[0], total)
    own = None
    sides = zip(layer.sides[:2], layer.packed, drows, dz, strict=False)
    for side, packed, drow, dz_side in sides:
        if packed.any:
            own = layer.expand(dz_side, packed.a.T, packed.ranks, own)
        if side.has_extra_full:
            part = layer.x.new_zeros((drow.shape[0], layer.x.shape[1]))
            layer.full_rows(drow, side, part, transpose=True)
            own = part if own is None else own.add_(part)
    return total.to(layer.x.dtype) if own is None else layer.unpermute(own, None, total)


def _input_grads(layer: Routed, index: int, drow, z, dz, needs: Projection) -> dict:
    """Weight gradients of gate (0) or up (1), but for the base's."""
    side, ranks, x = layer.sides[index], layer.packed[index].ranks, layer.x
    need_a, need_b = needs.factor_needs()
    da = layer.factor_grad(dz, x, ranks, need_a, gather=True)
    db = layer.factor_grad(z, drow, ranks, need_b)
    full = _full_grads(layer, needs, drow, lambda: layer.permute(x))
    return {"full": full, "factors": side.unpack(da, db, RANK_MULTIPLE)}


def _down_grads(layer: Routed, dy, h_NF, weights, s_down, needs: Projection) -> dict:
    """Weight gradients of down, but for the base's; s_down: p A_d h by token, if it was kept."""
    side, packed = layer.sides[2], layer.packed[2]
    need_a, need_b = needs.factor_needs()
    da = db = None
    if any(need_a):
        q = layer.shrink(dy, packed.b.T, packed.ranks, gather=True, weights=weights)
        da = layer.factor_grad(q, h_NF, packed.ranks, need_a)
    if any(need_b) and s_down is not None:
        db = s_down.T @ dy
    elif any(need_b):
        z_down = layer.shrink(h_NF, packed.a, packed.ranks, weights=weights)
        db = layer.factor_grad(z_down, dy, packed.ranks, need_b, gather=True)
    full = {}
    if any(needs.full[1:]):
        dy_ND = (layer.permute(dy) * _row_weights(weights, layer.plan)).to(dy.dtype)
        full = _full_grads(layer, needs, dy_ND, lambda: h_NF)
    return {"full": full, "factors": side.unpack(da, db, RANK_MULTIPLE)}


def _full_grads(layer: Routed, needs: Projection, dy_rows, x_rows) -> dict[int, Tensor]:
    wanted = [e for e, need in enumerate(needs.full) if e and need]
    if not wanted:
        return {}
    kernels = backend.kernels("grouped_gemm", dy_rows)
    grads = kernels.grouped_gemm_dweight(dy_rows, x_rows(), layer.plan.row_offsets, wanted)
    return dict(zip(wanted, grads, strict=True))


def _collect(side: Projection, grads: dict) -> Projection:
    full = tuple(grads["full"].get(e) for e in range(len(side.layout)))
    return Projection(full, tuple(grads["factors"]), side.layout, side.stacked)

"""Experts by ragged kernels: no host sync, sizes from T, K and E alone, capturable in a CUDA graph.

Forward. The dense base products G, U = x W_g^T, x W_u^T are aten's (cuBLAS). The factors are packed
into one (R, in) and one (out, R) matrix a projection, ranks padded to the tile's 16, once a call:
a copy of the factors, a few percent of the base's bytes, never of the base. Then

    z = A_e x (shrink)  ->  h = SwiGLU(G + B z, U + B z), mixed = sum_e p_e h_e (gated_mix)
    delta = B_d A_d h (shrink, expand)  ->  y = W_d mixed + sum_e p_e delta_e (cuBLAS, unpermute)

where W_d mixed stays in float32 until the deltas are added. With few experts the last line, but for
its shrink, is token-major (token_major.py), and with small ranks the first one too. Full-size
experts fill their rows by grouped_gemm. Backward recomputes z and the pre-activation rows from the
saved x, G, U, and pays the base once: a product with each of its three weights, for dmixed and dx,
and (only if wanted) one for each weight's gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend, schedule
from ..projection import FULL, RANK_MULTIPLE, Projection
from ..ragged import MAX_SET_EXPERTS, RoutingPlan, packed_size, ranks_tensor, rows_to_slots
from . import token_major


class _Packed(NamedTuple):
    """One projection's factors as the kernels read them."""

    a: Tensor  # (R, in)
    b: Tensor  # (out, R)
    ranks: tuple[int, ...]  # padded

    @property
    def any(self) -> bool:
        return any(self.ranks)


class _Layer:
    """The plan, packed factors and raw kernels of one call."""

    def __init__(self, x: Tensor, indices: Tensor, sides: list[Projection]) -> None:
        self.x = x
        self.sides = sides
        self.top_k = indices.shape[1]
        num_experts = len(sides[0].full)
        by_set = num_experts <= MAX_SET_EXPERTS
        maps = backend.kernels("routing", x).make_plan(indices.contiguous(), num_experts, by_set)
        self.plan = RoutingPlan(indices, *maps, num_experts, self.top_k)
        self.packed = [
            _Packed(*side.pack(RANK_MULTIPLE), side.padded_ranks(RANK_MULTIPLE)) for side in sides
        ]
        self.lowrank = backend.kernels("lowrank", x)
        self.permutation = backend.kernels("permutation", x)
        self.mix = backend.kernels("gated_mix", x)

    def shrink(self, x, a, ranks, gather=False, weights=None) -> Tensor:
        plan = self.plan
        size = packed_size(ranks, plan.num_tokens, self.top_k)
        return self.lowrank.shrink(
            x, a, plan.row_offsets, ranks, plan.row_to_slot, self.top_k, size, gather, weights
        )

    def expand(self, z, b, ranks, base=None, gather=False) -> Tensor:
        plan = self.plan
        return self.lowrank.expand(
            z, b, plan.row_offsets, ranks, plan.num_rows, base, plan.row_to_slot, self.top_k, gather
        )

    def factor_grad(self, z, x, ranks, needs, gather=False) -> Tensor | None:
        """Gradient of the packed factors; `needs` says of which, None if of none."""
        if not any(needs):
            return None
        plan, wanted = self.plan, None
        if len(needs) > 1:
            experts = [e for e, rank in enumerate(ranks) if rank]
            wanted = tuple(e for e, need in zip(experts, needs, strict=True) if need)
        maps = (plan.row_offsets, ranks, plan.row_to_slot, self.top_k)
        return self.lowrank.factor_grad(z, x, *maps, gather, wanted)

    def full_rows(self, x: Tensor, side: Projection, out: Tensor, transpose: bool = False) -> None:
        """Fill the rows of experts 1.. that are full-size in this projection."""
        if side.has_extra_full:
            kernels = backend.kernels("grouped_gemm", x)
            kernels.grouped_gemm(x, side.extra_full, self.plan.row_offsets, transpose, out)

    def permute(self, x: Tensor) -> Tensor:
        return self.permutation.permute(x, self.plan.row_to_slot, self.plan.slot_to_row)

    def unpermute(self, x, weights=None, base=None) -> Tensor:
        return self.permutation.unpermute(x, self.plan.slot_to_row, weights, base)

    def base_weights(self, side: Projection, weights: Tensor | None) -> Tensor | None:
        """Slot weights, 0 where the slot's expert is full-size in this projection; None means 1."""
        if not side.has_extra_full:
            return weights
        ids, num_experts = self.plan.indices, len(side.layout)
        full = (0, *(int(kind == FULL) for kind in side.layout[1:]), 0)  # last: an empty slot
        ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
        if weights is None:
            acc = torch.promote_types(self.x.dtype, torch.float32)
            weights = torch.ones(ids.shape, dtype=acc, device=ids.device)
        return weights.masked_fill(ranks_tensor(full, ids.device)[ids] > 0, 0)

    def preactivations(self, gate_TF, up_TF, z) -> list[Tensor]:
        """Rows (N, F) of gate and up before the nonlinearity."""
        rows = []
        x_ND = self.permute(self.x) if any(s.has_extra_full for s in self.sides[:2]) else None
        for side, packed, base, z_side in zip(
            self.sides[:2], self.packed, (gate_TF, up_TF), z, strict=False
        ):
            out = self.expand(z_side, packed.b, packed.ranks, base, gather=True)
            self.full_rows(x_ND, side, out)
            rows.append(out)
        return rows


def _mm(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """base + a b, kept in the accumulator's dtype (float32; float64 for float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b if base is None else torch.addmm(base, a, b)
    if a.device.type == "cuda":
        product = torch.mm(a, b, out_dtype=torch.float32)
    else:
        product = a.float() @ b.float()
    return product if base is None else base.add_(product)


def forward(x, indices, weights, sides) -> tuple[Tensor, Tensor, Tensor]:
    """(y (T, D), G (T, F), U (T, F)), the base pre-activations as saved for `backward`."""
    gate, up, down = sides
    bases = x @ gate.full[0].T, x @ up.full[0].T
    layer = _Layer(x, indices, sides)
    (T, D), F = x.shape, gate.full[0].shape[0]
    layouts = [side.layout for side in sides]
    how = schedule.choose(layouts, T, top_k=layer.top_k, hidden=D, width=F, dtype=x.dtype)
    mixed, h_NF = _hidden(layer, how, *bases, layer.base_weights(down, weights))
    low, plan = layer.packed[2], layer.plan
    if not (low.any or down.has_extra_full):
        return mixed @ down.full[0].T, *bases
    y = _mm(mixed, down.full[0].T)
    z_down = layer.shrink(h_NF, low.a, low.ranks)
    if how.dense_down:
        s_down = token_major.weighted(z_down, weights, plan, low.ranks)
        return token_major.add_expanded(y, s_down, low.b), *bases
    delta_ND = layer.expand(z_down, low.b, low.ranks)
    layer.full_rows(h_NF, down, delta_ND)
    return layer.unpermute(delta_ND, weights, y), *bases


def _hidden(layer: _Layer, how: schedule.Schedule, gate_TF, up_TF, weights):
    """mixed (T, F) and h (N, F); of h the rows of experts with a delta or weight of their own."""
    gate, up, down = layer.sides
    low_gate, low_up, _ = layer.packed
    plan, x = layer.plan, layer.x
    if how.all_fused:
        s_TR = x @ torch.cat([low_gate.a, low_up.a]).T
        writes = tuple(int(kind != 0) for kind in (0, *down.layout[1:]))
        factors = (low_gate.b, low_gate.ranks, low_up.b, low_up.ranks)
        return token_major.mix(gate_TF, up_TF, weights, plan, s_TR, *factors, writes)
    z = [layer.shrink(x, low.a, low.ranks, gather=True) for low in (low_gate, low_up)]
    if "full" in how.ways:
        rows = layer.preactivations(gate_TF, up_TF, z)
        return layer.mix.swiglu_mix(*rows, weights, plan.slot_to_row)
    factors = (z[0], low_gate.b, low_gate.ranks, z[1], low_up.b, low_up.ranks)
    return layer.mix.gated_mix(gate_TF, up_TF, weights, plan, *factors)


def backward(dy, x, indices, weights, gate_TF, up_TF, sides, needs, side_needs):
    """(dx, dweights, gradients of the three projections), None where not needed."""
    down = sides[2]
    need_x, need_weights = needs
    need_hidden = need_x or need_weights or any(n for s in side_needs[:2] for n in s.tensors)
    layer = _Layer(x, indices, sides)
    plan = layer.plan
    in_gate, in_up, out_down = layer.packed
    z = [layer.shrink(x, side.a, side.ranks, gather=True) for side in (in_gate, in_up)]
    rows = layer.preactivations(gate_TF, up_TF, z)

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
    grads.append(_down_grads(layer, dy, h_NF, weights, side_needs[2]))
    dbases = []
    for index, side in enumerate(sides[:2]):
        wanted = need_x or side_needs[index].full[0]
        dbase = layer.unpermute(drows[index], layer.base_weights(side, None)) if wanted else None
        dbases.append(dbase)
        if side_needs[index].full[0]:
            grads[index]["full"][0] = dbases[index].T @ x
    if side_needs[2].full[0]:
        mixed = layer.unpermute(h_NF, layer.base_weights(down, weights))
        grads[2]["full"][0] = dy.T @ mixed
    dx = _input_gradient(layer, dbases, drows, dz) if need_x else None
    return dx, dweights, [_collect(s, g) for s, g in zip(sides, grads, strict=True)]


def _row_weights(weights: Tensor, plan: RoutingPlan) -> Tensor:
    """Slot weights (T, K) as a column of row weights (N, 1); 0 in the tail."""
    if plan.num_rows == 0:
        return weights.new_empty((0, 1))
    values = weights.view(-1)[plan.row_to_slot.clamp(min=0).long()]
    return torch.where(plan.row_to_slot >= 0, values, 0).unsqueeze(1)


def _hidden_gradient(layer: _Layer, dy: Tensor) -> Tensor:
    """(N, F): Wd_e^T dy for each row, W_d^T dy once per token; not yet times the row's weight."""
    down, packed = layer.sides[2], layer.packed[2]
    q = layer.shrink(dy, packed.b.T, packed.ranks, gather=True)
    dh_NF = layer.expand(q, packed.a.T, packed.ranks, dy @ down.full[0], gather=True)
    if down.has_extra_full:
        layer.full_rows(layer.permute(dy), down, dh_NF, transpose=True)
    return dh_NF


def _input_gradient(layer: _Layer, dbases, drows, dz) -> Tensor:
    """dx (T, D): the base's part once per token, the experts' own parts summed by unpermute."""
    total = None
    for side, dbase in zip(layer.sides[:2], dbases, strict=True):
        total = _mm(dbase, side.full[0], total)
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


def _input_grads(layer: _Layer, index: int, drow, z, dz, needs: Projection) -> dict:
    """Weight gradients of gate (0) or up (1), but for the base's."""
    side, ranks, x = layer.sides[index], layer.packed[index].ranks, layer.x
    need_a, need_b = needs.factor_needs()
    da = layer.factor_grad(dz, x, ranks, need_a, gather=True)
    db = layer.factor_grad(z, drow, ranks, need_b)
    full = _full_grads(layer, needs, drow, lambda: layer.permute(x))
    return {"full": full, "factors": side.unpack(da, db, RANK_MULTIPLE)}


def _down_grads(layer: _Layer, dy, h_NF, weights, needs: Projection) -> dict:
    """Weight gradients of down, but for the base's."""
    side, packed = layer.sides[2], layer.packed[2]
    need_a, need_b = needs.factor_needs()
    da = db = None
    if any(need_a):
        q = layer.shrink(dy, packed.b.T, packed.ranks, gather=True, weights=weights)
        da = layer.factor_grad(q, h_NF, packed.ranks, need_a)
    if any(need_b):
        z_down = layer.shrink(h_NF, packed.a, packed.ranks, weights=weights)
        db = layer.factor_grad(z_down, dy, packed.ranks, need_b, gather=True)
    full = {}
    if any(needs.full[1:]):
        dy_ND = (layer.permute(dy) * _row_weights(weights, layer.plan)).to(dy.dtype)
        full = _full_grads(layer, needs, dy_ND, lambda: h_NF)
    return {"full": full, "factors": side.unpack(da, db, RANK_MULTIPLE)}


def _full_grads(layer: _Layer, needs: Projection, dy_rows, x_rows) -> dict[int, Tensor]:
    wanted = [e for e, need in enumerate(needs.full) if e and need]
    if not wanted:
        return {}
    kernels = backend.kernels("grouped_gemm", dy_rows)
    grads = kernels.grouped_gemm_dweight(dy_rows, x_rows(), layer.plan.row_offsets, wanted)
    return dict(zip(wanted, grads, strict=True))


def _collect(side: Projection, grads: dict) -> Projection:
    full = tuple(grads["full"].get(e) for e in range(len(side.layout)))
    return Projection(full, tuple(grads["factors"]), side.layout, side.stacked)

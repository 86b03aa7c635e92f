"""Experts by ragged kernels: no host sync, sizes from T, K and E alone, capturable in a CUDA graph.

Forward. The dense base products G, U = x W_g^T, x W_u^T are aten's (cuBLAS). The factors are packed
into one (R, in) and one (out, R) matrix a projection, ranks padded to the tile's 16, once a call:
a copy of the factors, a few percent of the base's bytes, never of the base. Then

    z = A_e x (shrink)  ->  h = SwiGLU(G + B z, U + B z), mixed = sum_e p_e h_e (gated_mix)
    delta = B_d A_d h (shrink, expand)  ->  y = W_d mixed + sum_e p_e delta_e (cuBLAS, unpermute)

where W_d mixed stays in float32 until the deltas are added. Of many experts of small ranks the
compiled library does both lines, but for the product with W_d (csrc/cuda/expert_major.cu). With few
experts the last line, but for its shrink, is token-major (token_major.py), and with small ranks the
first one too; with many tokens, experts of large ranks and full-size ones then have rows of their
own (own_rows.py). Else full-size experts fill their rows by grouped_gemm.
"""

from __future__ import annotations

from torch import Tensor

from .. import backend, schedule
from ..kept import Kept
from ..ragged import MAX_SET_EXPERTS
from . import own_rows, token_major
from .experts_backward import backward as backward
from .routed import Routed, mm


def forward(x, indices, weights, sides, wanted: Kept) -> tuple[Tensor, Kept]:
    """y (T, D), and of what is `wanted` for the backward at least that."""
    gate, up, down = sides
    names = ("triton",)
    if len(gate.full) > MAX_SET_EXPERTS and backend.library("expert_major", x) is not None:
        names = ("native", "triton")
    how = schedule_of(x, sides, names)
    if how.own:
        return own_rows.forward(x, indices, weights, sides, how.own, wanted)
    bases = x @ gate.full[0].T, x @ up.full[0].T
    layer = Routed(x, indices, sides)
    if how.by_library:
        found = _by_library(layer, *bases, weights)
        if found is not None:
            return found[0], Kept(*bases, mixed=found[1])
        how = schedule_of(x, sides)
    low, plan, rows, s_TR = layer.packed[2], layer.plan, (None, None), None
    if how.all_fused:
        s_TR = layer.shrunk()
        mixed, s_down = layer.hidden(*bases, weights, plan, s_TR)
    else:
        mixed, h_NF, rows = _hidden(layer, how, *bases, layer.base_weights(down, weights))
        z_down = layer.shrink(h_NF, low.a, low.ranks) if low.any else x.new_empty(0)
        s_down = None
        if how.dense_down:
            s_down = token_major.weighted(z_down, weights, plan, low.ranks)
    kept = Kept(*bases, s_down, mixed, *rows, s_TR)
    if s_down is not None:
        return layer.down(mixed, down.full[0], s_down, low.b), kept
    if not (low.any or down.has_extra_full):
        return mixed @ down.full[0].T, kept
    y = mm(mixed, down.full[0].T)
    delta_ND = layer.expand(z_down, low.b, low.ranks)
    layer.full_rows(h_NF, down, delta_ND)
    return layer.unpermute(delta_ND, weights, y), kept


def schedule_of(x: Tensor, sides, kernels: tuple[str, ...] = ("triton",)) -> schedule.Schedule:
    """Which way each expert is computed where a backward may follow."""
    sizes = {"hidden": x.shape[1], "width": sides[0].full[0].shape[0], "dtype": x.dtype}
    layouts = [side.layout for side in sides]
    return schedule.choose(layouts, x.shape[0], **sizes, decode=False, kernels=kernels)


def _by_library(layer: Routed, gate_TF, up_TF, weights) -> tuple[Tensor, Tensor] | None:
    """y (T, D) and the hidden sum (T, F) of many experts of small ranks by the compiled library;
    None where it cannot."""
    factors = [(low.a, low.b, low.ranks) for low in layer.packed]
    kernels = backend.library("expert_major", layer.x)
    if not kernels.serves(factors, layer.x, gate_TF, up_TF):
        return None
    mixed, planes = kernels.hidden_sum(layer.x, gate_TF, up_TF, weights, layer.plan, *factors)
    w_DF = layer.sides[2].full[0]
    if not layer.packed[2].any:
        return mixed @ w_DF.T, mixed
    y = kernels.add_down(mm(mixed, w_DF.T), weights, layer.plan, planes, factors[2])
    return y, mixed


def _hidden(layer: Routed, how: schedule.Schedule, gate_TF, up_TF, weights):
    """mixed (T, F) and h (N, F), of h the rows of experts with a delta or weight of their own; and
    rows of gate and up, if there are any."""
    low_gate, low_up, _ = layer.packed
    plan, x = layer.plan, layer.x
    z = [layer.shrink(x, low.a, low.ranks, gather=True) for low in (low_gate, low_up)]
    if "full" in how.ways:
        rows = layer.preactivations(gate_TF, up_TF, z)
        return *layer.mix.swiglu_mix(*rows, weights, plan.slot_to_row), rows
    factors = (z[0], low_gate.b, low_gate.ranks, z[1], low_up.b, low_up.ranks)
    return *layer.mix.gated_mix(gate_TF, up_TF, weights, plan, *factors), (None, None)

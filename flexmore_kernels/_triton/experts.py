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
from ..ragged import MAX_SET_EXPERTS
from . import own_rows, token_major
from .experts_backward import backward as backward
from .routed import Routed, mm


def forward(x, indices, weights, sides) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y (T, D); G and U (T, F), the base pre-activations, None where nothing needed them."""
    gate, up, down = sides
    (T, D), F = x.shape, gate.full[0].shape[0]
    sizes = {"hidden": D, "width": F, "dtype": x.dtype, "decode": False}
    layouts, names = [side.layout for side in sides], ("triton",)
    if len(gate.full) > MAX_SET_EXPERTS and backend.library("expert_major", x) is not None:
        names = ("native", "triton")
    how = schedule.choose(layouts, T, **sizes, kernels=names)
    if how.own:
        return own_rows.forward(x, indices, weights, sides, how.own)
    bases = x @ gate.full[0].T, x @ up.full[0].T
    layer = Routed(x, indices, sides)
    if how.by_library:
        y = _by_library(layer, *bases, weights)
        if y is not None:
            return y, *bases
        how = schedule.choose(layouts, T, **sizes)
    low, plan = layer.packed[2], layer.plan
    if how.all_fused:
        mixed, s_down = layer.hidden(*bases, weights, plan)
        return layer.down(mixed, down.full[0], s_down, low.b), *bases
    mixed, h_NF = _hidden(layer, how, *bases, layer.base_weights(down, weights))
    if not (low.any or down.has_extra_full):
        return mixed @ down.full[0].T, *bases
    z_down = layer.shrink(h_NF, low.a, low.ranks)
    if how.dense_down:
        s_down = token_major.weighted(z_down, weights, plan, low.ranks)
        return layer.down(mixed, down.full[0], s_down, low.b), *bases
    y = mm(mixed, down.full[0].T)
    delta_ND = layer.expand(z_down, low.b, low.ranks)
    layer.full_rows(h_NF, down, delta_ND)
    return layer.unpermute(delta_ND, weights, y), *bases


def _by_library(layer: Routed, gate_TF, up_TF, weights) -> Tensor | None:
    """y (T, D) of many experts of small ranks by the compiled library; None where it cannot."""
    factors = [(low.a, low.b, low.ranks) for low in layer.packed]
    kernels = backend.library("expert_major", layer.x)
    if not kernels.serves(factors, layer.x, gate_TF, up_TF):
        return None
    mixed, planes = kernels.hidden_sum(layer.x, gate_TF, up_TF, weights, layer.plan, *factors)
    w_DF = layer.sides[2].full[0]
    if not layer.packed[2].any:
        return mixed @ w_DF.T
    return kernels.add_down(mm(mixed, w_DF.T), weights, layer.plan, planes, factors[2])


def _hidden(layer: Routed, how: schedule.Schedule, gate_TF, up_TF, weights):
    """mixed (T, F) and h (N, F); of h the rows of experts with a delta or weight of their own."""
    low_gate, low_up, _ = layer.packed
    plan, x = layer.plan, layer.x
    z = [layer.shrink(x, low.a, low.ranks, gather=True) for low in (low_gate, low_up)]
    if "full" in how.ways:
        rows = layer.preactivations(gate_TF, up_TF, z)
        return layer.mix.swiglu_mix(*rows, weights, plan.slot_to_row)
    factors = (z[0], low_gate.b, low_gate.ranks, z[1], low_up.b, low_up.ranks)
    return layer.mix.gated_mix(gate_TF, up_TF, weights, plan, *factors)

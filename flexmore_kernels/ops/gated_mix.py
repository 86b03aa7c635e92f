"""Gated mix: base + low-rank pre-activations, SwiGLU, weight, sum over a token's experts.

Kernels: on a GPU one Triton kernel that owns a tile of tokens of like expert sets (E <= 8, ranks up
to 256), else expand + SwiGLU; on a CPU expand by aten, the rest in the compiled library if it is
there. Cost: the base parts 2*T*F are read, mixed T*F and rows N*F written, 2*P*F operations a
projection.
Maths: reference/gated_mix.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..checks import FLOATS, check_ranks, check_tensor, check_weights
from ..library import define
from ..ragged import Ragged, RoutingPlan, packed_size, rows_to_slots
from ..slow_paths import contiguous

_kernels = "gated_mix"


def gated_mix(
    gate: Tensor,
    up: Tensor,
    weights: Tensor,
    plan: RoutingPlan,
    z_gate: Tensor,
    b_gate: Tensor,
    ranks_gate: Ragged | Sequence[int],
    z_up: Tensor,
    b_up: Tensor,
    ranks_up: Ragged | Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Mix the hidden states of a token's experts that share the base pre-activations.

    For row n of token t, slot k, expert e:  h_n = silu(gate_t + B_gate,e z_gate,n) * (up_t + B_up,e
    z_up,n);  mixed_t = sum over the token's rows of weights[t, k] h_n.

    Args:
        gate, up: (T, F) base pre-activations W_g x and W_u x, any float dtype.
        weights: (T, K) float32 (float64 for float64 gate).
        plan: from `make_plan`.
        z_gate, z_up: flat, as `shrink` returns them for ranks_gate, ranks_up; gate's dtype.
        b_gate, b_up: (F, R), the experts' B side by side; gate's dtype.
        ranks_gate, ranks_up: E ranks >= 0; 0 means the bare base.

    Returns: (mixed (T, F), rows (N, F)): the weighted sum, and h_n unweighted for each row, zero in
    the tail of empty slots. Base and delta are added in float32 (float64) and rounded once.
    Raises ValueError or TypeError naming the argument.
    Deterministic. No host sync on CUDA. Differentiable in every float argument.
    Source: FlexMoRE (arXiv 2602.08818); that its base can be shared follows from linearity.
    """
    device = plan.row_to_slot.device
    check_tensor("gate", gate, (plan.num_tokens, "F"), FLOATS, device)
    check_tensor("up", up, gate.shape, (gate.dtype,), device)
    check_weights("weights", weights, (plan.num_tokens, plan.top_k), gate)
    ranks = []
    for side, z, b, given in (("gate", z_gate, b_gate, ranks_gate), ("up", z_up, b_up, ranks_up)):
        given = check_ranks(f"ranks_{side}", given, plan.num_experts)
        size = packed_size(given, plan.num_tokens, plan.top_k)
        check_tensor(f"z_{side}", z, (size,), (gate.dtype,), device)
        check_tensor(f"b_{side}", b, (gate.shape[1], sum(given)), (gate.dtype,), device)
        ranks.append(given)
    maps = (plan.indices, *plan[1:6])
    return torch.ops.flexmore.gated_mix(
        gate, up, weights, *maps, z_gate, b_gate, ranks[0], z_up, b_up, ranks[1]
    )


def _gated_mix(gate, up, weights, *rest):
    *maps, z_gate, b_gate, ranks_gate, z_up, b_up, ranks_up = rest
    plan = RoutingPlan(*maps, len(ranks_gate), weights.shape[1])
    return backend.kernels(_kernels, gate).gated_mix(
        contiguous("gate", gate),
        contiguous("up", up),
        weights.contiguous(),
        plan,
        contiguous("z_gate", z_gate),
        b_gate,
        tuple(ranks_gate),
        contiguous("z_up", z_up),
        b_up,
        tuple(ranks_up),
    )


def _gated_mix_fake(gate, up, weights, *rest):
    return gate.new_empty(gate.shape), gate.new_empty((rest[1].shape[0], gate.shape[1]))


def _gated_mix_backward(dmixed, drows, gate, up, weights, *rest):
    _, row_to_slot, slot_to_row, row_offsets, _, _, *factors = rest
    top_k, num_rows = weights.shape[1], row_to_slot.shape[0]
    lowrank = backend.kernels("lowrank", gate)
    unpermute = backend.kernels("permutation", gate).unpermute
    (z_gate, *rest_gate), (z_up, *rest_up) = factors[:3], factors[3:]
    sides = ((z_gate.contiguous(), *rest_gate), (z_up.contiguous(), *rest_up))
    bases, slots = (gate.contiguous(), up.contiguous()), (row_to_slot, top_k, True)
    rows = [
        lowrank.expand(z, b, row_offsets, tuple(ranks), num_rows, base, *slots)
        for base, (z, b, ranks) in zip(bases, sides, strict=True)
    ]
    *drow_sides, dweight_rows, _ = backend.kernels(_kernels, gate).swiglu_mix_backward(
        dmixed.contiguous(), drows.contiguous(), *rows, weights.contiguous(), row_to_slot, top_k
    )
    dbase, dfactors = [], []
    for drow, (z, b, ranks) in zip(drow_sides, sides, strict=True):
        maps = (row_offsets, tuple(ranks), row_to_slot, top_k)
        dbase.append(unpermute(drow, slot_to_row, None, None))
        dfactors.append(lowrank.shrink(drow, b.T, *maps, z.shape[0]))
        dfactors.append(lowrank.factor_grad(z, drow, *maps).T.contiguous())
    dweights = rows_to_slots(dweight_rows, slot_to_row)
    return (*dbase, dweights, *dfactors)


def _gated_mix_backward_fake(dmixed, drows, gate, up, weights, *rest):
    z_gate, b_gate, _, z_up, b_up, _ = rest[6:]
    like = (gate, up, weights, z_gate, b_gate, z_up, b_up)
    return tuple(tensor.new_empty(tensor.shape) for tensor in like)


def _setup_gated_mix(ctx, inputs, output):
    *tensors, z_gate, b_gate, ctx.ranks_gate, z_up, b_up, ctx.ranks_up = inputs
    ctx.save_for_backward(*tensors, z_gate, b_gate, z_up, b_up)


def _backward_gated_mix(ctx, dmixed, drows):
    *tensors, z_gate, b_gate, z_up, b_up = ctx.saved_tensors
    dgate, dup, dweights, dz_gate, db_gate, dz_up, db_up = torch.ops.flexmore.gated_mix_backward(
        dmixed, drows, *tensors, z_gate, b_gate, ctx.ranks_gate, z_up, b_up, ctx.ranks_up
    )
    maps = (None,) * 6
    return (dgate, dup, dweights, *maps, dz_gate, db_gate, None, dz_up, db_up, None)


_MAPS = (
    "Tensor indices, Tensor row_to_slot, Tensor slot_to_row, Tensor row_offsets,"
    " Tensor token_order, Tensor expert_to_row"
)
_FACTORS = (
    "Tensor z_gate, Tensor b_gate, int[] ranks_gate, Tensor z_up, Tensor b_up, int[] ranks_up"
)

define(
    f"gated_mix(Tensor gate, Tensor up, Tensor weights, {_MAPS}, {_FACTORS}) -> (Tensor, Tensor)",
    _gated_mix,
    _gated_mix_fake,
    backward=_backward_gated_mix,
    setup_context=_setup_gated_mix,
)
define(
    f"gated_mix_backward(Tensor dmixed, Tensor drows, Tensor gate, Tensor up, Tensor weights,"
    f" {_MAPS}, {_FACTORS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_mix_backward,
    _gated_mix_backward_fake,
)

"""The middle of a token-major layer on Hopper in the library: csrc/cuda/token_major.cu and, of the
backward, token_major_backward.cu, token_major_factors.cu and token_major_shrink.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..projection import Projection
from ..ragged import RoutingPlan

_ops = torch.ops.flexmore_native

FEWEST_TOKENS = 512
"""With fewer, Triton's kernels, which fill the device sooner, are faster (measured on an H100)."""
MOST_LOW_RANK = 6
MOST_LOW_RANK_WITH_ROWS = 5
MOST_ROWS = 8
MOST_RANK = 64


def serves(tokens: int, width: int, ranks: Sequence[Sequence[int]], rows_a_token: int = 0) -> bool:
    """Whether `hidden` takes these sizes, K rows a token if any are given to it; the device and the
    dtype are the caller's to check. ranks: E of gate, up and down.
    """
    low_rank = [max(own) for own in zip(*ranks, strict=True)]
    return (
        tokens >= FEWEST_TOKENS
        and width % 16 == 0
        and sum(rank > 0 for rank in low_rank)
        <= (MOST_LOW_RANK_WITH_ROWS if rows_a_token else MOST_LOW_RANK)
        and rows_a_token <= MOST_ROWS
        and max(low_rank) <= MOST_RANK
    )


def hidden(
    gate_TF: Tensor,
    up_TF: Tensor,
    weights_TK: Tensor,
    plan: RoutingPlan,
    s_TR: Tensor,
    sides: Sequence[Projection],
    rows_NF: Tensor | None = None,
    row_slots_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """mixed (T, F) = sum_e p_e h_e and s_down (T, R) = p_e A_d,e h_e, 0 where e was not chosen.

    s is A x of gate, then of up, for all tokens; in s and s_down each expert's rank is padded to a
    multiple of 16. The factors are read where they lie. To mixed, the weighted rows of h (N, F)
    that `row_slots` names for each slot (T, K), -1 for none, are added.
    """
    pairs = [[pair for pair in side.factor_pairs() if pair is not None] for side in sides]
    return _ops.token_mix(
        gate_TF,
        up_TF,
        weights_TK,
        plan.token_order,
        plan.expert_to_row,
        plan.row_to_slot,
        s_TR,
        [b for _, b in pairs[0]],
        [b for _, b in pairs[1]],
        [a for a, _ in pairs[2]],
        *(side.ranks for side in sides),
        rows_NF,
        row_slots_TK,
    )


def mix_backward(
    dmixed_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    weights_TK: Tensor,
    plan: RoutingPlan,
    s_TR: Tensor,
    q_TR: Tensor,
    sides: Sequence[Projection],
) -> tuple[Tensor, Tensor, Tensor]:
    """dgate, dup (T, F), and dp of each row, (N,), in float32: `_triton/token_major_backward.py`'s
    without rows, for what `serves`.
    """
    dgate_TF, dup_TF, planes = _ops.token_mix_backward(
        *(dmixed_TF, gate_TF, up_TF, weights_TK),
        *(plan.token_order, plan.expert_to_row, plan.row_to_slot, s_TR, q_TR),
        *_factors(sides),
    )
    return dgate_TF, dup_TF, planes.sum(0)


def factor_grads(
    dmixed_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    weights_TK: Tensor,
    plan: RoutingPlan,
    s_TR: Tensor,
    q_TR: Tensor,
    sides: Sequence[Projection],
    wanted: Sequence[Sequence[bool]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of B_gate (F, R), B_up (F, R) and A_down (R, F), packed as `Packed` packs them.

    Of what `mix_backward` is given, for what `serves`, each from h, dg and du formed anew. wanted:
    of gate, up and down each expert's; the others' columns (rows of A_down) hold anything.
    """
    return _ops.token_factor_grads(
        *(dmixed_TF, gate_TF, up_TF, weights_TK),
        *(plan.row_offsets, plan.row_to_slot, s_TR, q_TR),
        *_factors(sides),
        [gate + 2 * up + 4 * down for gate, up, down in zip(*wanted, strict=True)],
    )


def input_grads(
    dmixed_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    weights_TK: Tensor,
    plan: RoutingPlan,
    s_TR: Tensor,
    q_TR: Tensor,
    sides: Sequence[Projection],
) -> Tensor:
    """ds (T, R) = dg B_gate,e, then du B_up,e: columns as s's, 0 where e was not chosen.

    Of what `mix_backward` is given, for what `serves`, from dg and du formed anew.
    """
    return _ops.token_input_grads(
        *(dmixed_TF, gate_TF, up_TF, weights_TK),
        *(plan.row_offsets, plan.row_to_slot, s_TR, q_TR),
        *_factors(sides),
    )


def _factors(sides: Sequence[Projection]) -> list:
    """What the kernels of the backward read of them: B of gate, B of up, A of down; the ranks."""
    pairs = [[pair for pair in side.factor_pairs() if pair is not None] for side in sides]
    read = [[b for _, b in pairs[0]], [b for _, b in pairs[1]], [a for a, _ in pairs[2]]]
    return [*read, *(side.ranks for side in sides)]

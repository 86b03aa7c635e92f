"""Many experts of small ranks in the compiled library: csrc/cuda/expert_major_shrink.cu makes z of
all rows, expert_major.cu h, its weighted sum, and the down deltas.

For CUDA tensors of 16-bit floats whose rows and factors start at multiples of 16 bytes, ranks that
are multiples of 16 up to `SWEPT_RANK`. z of all rows is (N, 2 R), gate's columns then up's, R the
largest rank made a power of two; what the down projection shrinks is (planes, N, R) in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ragged import RoutingPlan, rank_offsets_tensor, ranks_tensor
from ..schedule import SWEPT_RANK

_ops = torch.ops.flexmore_native


def serves(factors: list[tuple[Tensor, Tensor, tuple[int, ...]]], *rows: Tensor) -> bool:
    """Whether these kernels take (a, b, ranks) of gate, up and down, and contiguous rows."""
    if max(max(ranks) for _, _, ranks in factors) > SWEPT_RANK:
        return False
    tensors = [*rows, *(a for a, _, _ in factors), *(b for _, b, _ in factors)]
    return all(
        t.is_contiguous() and t.data_ptr() % 16 == 0 and (t.dim() < 2 or t.shape[1] % 8 == 0)
        for t in tensors
    )


def _columns(*rank_lists: tuple[int, ...]) -> int:
    """R: 16 or 32."""
    return 16 if max(map(max, rank_lists)) <= 16 else 32


def _factor(matrix: Tensor, ranks: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    device = matrix.device
    return matrix, ranks_tensor(ranks, device), rank_offsets_tensor(ranks, device)


def hidden_sum(x, gate_TF, up_TF, weights, plan: RoutingPlan, gate, up, down):
    """mixed (T, F) = sum of w h over a token's rows, and A_d h of every row, in planes.

    gate, up and down are (a, b, ranks).
    """
    R = _columns(gate[2], up[2], down[2])
    maps = (plan.row_to_slot, plan.slot_to_row, plan.row_offsets)
    z = _ops.shrink_rows(
        x, plan.row_to_slot, plan.row_offsets, plan.top_k,
        *_factor(gate[0], gate[2]), *_factor(up[0], up[2]), R,
    )  # fmt: skip
    return _ops.mix_rows(
        gate_TF, up_TF, weights, *maps, z, *_factor(gate[1], gate[2]), *_factor(up[1], up[2]),
        *_factor(down[0], down[2]),
    )  # fmt: skip


def add_down(base_TD, weights, plan: RoutingPlan, planes, down) -> Tensor:
    """y (T, D) = base + sum of w B_d (A_d h) over a token's rows, rounded once."""
    maps = (plan.row_to_slot, plan.slot_to_row, plan.row_offsets)
    return _ops.add_rows(base_TD, weights, *maps, planes, *_factor(down[1], down[2]))

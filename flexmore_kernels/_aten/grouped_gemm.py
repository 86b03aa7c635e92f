"""Grouped GEMM in aten: one matrix product per expert that has rows. Maths:
reference/grouped_gemm.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grouped_gemm(
    x_NI: Tensor,
    weight: Sequence[Tensor | None],
    row_offsets: Tensor,
    transpose: bool,
    out_NO: Tensor,
) -> None:
    """Write W_e x_n (or, transposed, W_e^T x_n) to the rows of each expert that has a weight;
    others are untouched.
    """
    offsets = row_offsets.tolist()
    for e, w in enumerate(weight):
        start, stop = offsets[e], offsets[e + 1]
        if w is not None and stop > start:
            torch.mm(x_NI[start:stop], w if transpose else w.t(), out=out_NO[start:stop])


def grouped_gemm_dweight(
    dy_NO: Tensor, x_NI: Tensor, row_offsets: Tensor, experts: Sequence[int]
) -> list[Tensor]:
    """For each of `experts`, the sum over its rows of dy_n x_n^T, (O, I); zeros if it has none."""
    offsets = row_offsets.tolist()
    return [
        dy_NO[offsets[e] : offsets[e + 1]].t() @ x_NI[offsets[e] : offsets[e + 1]] for e in experts
    ]

"""Experts for few tokens in the compiled library, CUDA only: csrc/cuda/experts.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..projection import Projection

_ops = torch.ops.flexmore_native


def decode_serves(x: Tensor, sides: Sequence[Projection]) -> bool:
    """Whether the tensors lie as the kernels read them: rows end to end, of whole 16 bytes."""
    read_in_words = [side.full[0] for side in sides]
    for side in sides:
        for a, b in side.factors:
            read_in_words.append(a)
            if not _end_to_end(b):
                return False
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, *read_in_words))
    return aligned and x.is_contiguous() and all(map(_end_to_end, read_in_words))


def _end_to_end(matrix: Tensor) -> bool:
    """By strides: of a single row or column, `is_contiguous` says yes to any."""
    return matrix.stride() == (matrix.shape[1], 1)


def decode(x: Tensor, indices: Tensor, weights: Tensor, sides: Sequence[Projection]) -> Tensor:
    """y (T, D) for a layout that `schedule.choose` sends to "decode"; nothing else is kept."""
    tensors, layout = [], []
    for side in sides:
        tensors.append(side.full[0])
        layout.extend(side.layout)
        for pair in side.factor_pairs() if side.stacked else side.factors:
            if pair is not None:
                tensors.extend(pair)
    return _ops.experts_decode(x, indices, weights, tensors, layout)

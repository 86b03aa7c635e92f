"""RMSNorm in OLMo-2's order of precision, with the residual that a post-norm block adds.

Kernels: one pass over the rows by Triton on a GPU where nothing needs a gradient; else plain
PyTorch, which autograd differentiates and torch.compile fuses. Not a public op: the decoder's own.
Cost: x and the residual are read once, y is written once. Maths: reference/rms_norm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from .._aten import rms_norm as plain

_kernels = "rms_norm"

LARGEST_ROW = 32768  # a Triton program holds a row: 32 entries a thread, of 32 warps


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """y = round(w * x / sqrt(mean(x^2) + eps)), in float32 (float64); with a residual, r + y.

    x and residual (..., D), weight (D,); y has x's dtype. Deterministic, the same bits for a row in
    any company. No host sync. Source: OLMo 2 (arXiv 2501.00656), Hugging Face's Olmo2RMSNorm.
    """
    if needs_plain(x, weight, residual) or x.shape[-1] > LARGEST_ROW:
        return plain.rms_norm(x, weight, eps, residual)
    return backend.kernels(_kernels, x).rms_norm(x, weight, eps, residual)


def needs_plain(*tensors: Tensor | None) -> bool:
    """Whether autograd or a compiler must see what is computed, or a dtype is none for kernels."""
    if torch.compiler.is_compiling():
        return True
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return True
    return len({tensor.dtype for tensor in given}) > 1

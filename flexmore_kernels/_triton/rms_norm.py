"""Triton kernel of RMSNorm: a program a row, which it holds whole. Maths: reference/rms_norm.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles


@triton.jit
def row_scale(x, width, EPS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of a row; what lies past its width is 0."""
    return tl.rsqrt(tl.sum(x * x, 0) / width + EPS)


@triton.jit
def flexmore_rms_norm(
    out_ptr, x_ptr, weight_ptr, residual_ptr, width,
    EPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    live = at < width
    x = tl.load(x_ptr + start + at, mask=live, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(ACC)
    y = (weight * (x * row_scale(x, width, EPS))).to(out_ptr.dtype.element_ty)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + start + at, mask=live, other=0.0)
        y = (residual.to(ACC) + y.to(ACC)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + at, y, mask=live)


def warps(block: int) -> int:
    """Warps for a row of `block` entries: 16 entries a thread, up to 32 warps."""
    return max(1, min(32, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    width = x.shape[-1]
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    rows, block = x.numel() // max(width, 1), tiles.padded(width)
    if rows:
        with tiles.device_guard(x):
            flexmore_rms_norm[(rows,)](
                out, x, weight, residual, width,
                EPS=eps, ACC=tiles.accumulator(x.dtype), BLOCK=block, num_warps=warps(block),
            )  # fmt: skip
    return out

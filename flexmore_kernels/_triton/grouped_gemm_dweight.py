"""Gradients of matrices that multiply rows by expert, in Triton: of each expert left^T right.

Maths: reference/grouped_gemm.py. Floor: 2 n M N operations for n rows. An expert and matrix a
launch; rows of results of few tiles are cut into parts, whose sums are added up in order.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from ..ragged import SORTED, RoutingPlan, RowGrads
from . import tiles
from .tiles import add_product, swizzle


@triton.jit
def flexmore_weight_grads(
    out_ptr, left_ptr, right_ptr, row_offsets_ptr, rows, height, width,
    stride_out, stride_left, stride_right, num_splits, plane_size,
    LEFT_SORTED: tl.constexpr, RIGHT_SORTED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    m_tile, o_tile = swizzle(
        tl.program_id(0), tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_O), GROUP
    )
    split = tl.program_id(1)
    begin = 0
    end = rows
    if row_offsets_ptr is not None:
        begin = tl.load(row_offsets_ptr)
        end = tl.load(row_offsets_ptr + 1)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    m_live = (m < height)[:, None]
    o_live = (o < width)[None, :]
    part = tl.cdiv(tl.cdiv(end - begin, BLOCK_K), num_splits) * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    for first in range(split * part, tl.minimum(end - begin, (split + 1) * part), BLOCK_K):
        row = first + tl.arange(0, BLOCK_K).to(tl.int64)
        live = row < end - begin
        left_row = row
        right_row = row
        if LEFT_SORTED:
            left_row += begin
        if RIGHT_SORTED:
            right_row += begin
        left = left_ptr + left_row[None, :] * stride_left + m[:, None]
        right = right_ptr + right_row[:, None] * stride_right + o[None, :]
        x = tl.load(left, mask=m_live & live[None, :], other=0.0)
        y = tl.load(right, mask=live[:, None] & o_live, other=0.0)
        acc = add_product(acc, x, y, PRECISION, ACC)
    out = out_ptr + split.to(tl.int64) * plane_size
    out += m.to(tl.int64)[:, None] * stride_out + o[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=m_live & o_live)


def weight_grads(work: Sequence[RowGrads], plan: RoutingPlan) -> None:
    """out = left^T right over the rows of the expert, in the order of rows."""
    for item in work:
        _launch(item, plan)


def _launch(item: RowGrads, plan: RoutingPlan) -> None:
    out, (height, width) = item.out, item.out.shape
    left, right = (t if t.stride(1) == 1 else t.contiguous() for t in (item.left, item.right))
    if out.numel() == 0:
        return
    if left.shape[0] == 0 or right.shape[0] == 0:
        out.zero_()
        return
    usual = left.shape[0] if item.expert < 0 else triton.cdiv(plan.num_rows, plan.num_experts)
    sizes = (min(128, tiles.padded(size, 16)) for size in (height, width))
    m, o, k, warps = tiles.blocks(out.dtype, *sizes, 64)
    programs = triton.cdiv(height, m) * triton.cdiv(width, o)
    splits, into = tiles.splits(programs, usual, k), out
    if splits > 1:
        acc = tiles.torch_accumulator(out.dtype)
        into = out.new_empty(splits, height, width, dtype=acc)
    with tiles.device_guard(out):
        flexmore_weight_grads[(programs, splits)](
            into, left, right, None if item.expert < 0 else plan.row_offsets[item.expert :],
            left.shape[0], height, width, into.stride(-2), left.stride(0), right.stride(0),
            splits, height * width, LEFT_SORTED=item.left_place == SORTED,
            RIGHT_SORTED=item.right_place == SORTED, ACC=tiles.accumulator(out.dtype),
            PRECISION=tiles.dot_precision(out.dtype), BLOCK_M=m, BLOCK_O=o, BLOCK_K=k, GROUP=8,
            num_warps=warps, num_stages=tiles.stages(out, m, o, k, most=3),
        )  # fmt: skip
        if splits > 1:
            whole = out if out.is_contiguous() else out.new_empty(height, width)
            tiles.sum_planes(whole, into)
            if whole is not out:
                out.copy_(whole)

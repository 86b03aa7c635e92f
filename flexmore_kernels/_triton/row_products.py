"""Products of one expert's rows in Triton, as sums and as gates: `ragged.RowProducts`.

What rows of experts of large ranks or of full size need, in the forward and in the backward; an
expert a launch. Maths: reference/grouped_gemm.py, reference/lowrank.py, reference/experts.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import SEGMENT, SORTED, RoutingPlan, RowProducts, Term
from . import tiles
from .tiles import add_product, sigmoid, swizzle


@triton.jit
def _add_term(
    acc, left_ptr, right_ptr, base_ptr, depth, rows_right, stride_left, stride_right,
    stride_depth, begin, row, row_live, token, o, width,
    IS_SORTED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + left right^T + base; rows past the end read the last one again."""
    if left_ptr is not None:
        i = tl.arange(0, BLOCK_K)
        source = row
        if IS_SORTED:
            source += begin
        left = left_ptr + source[:, None] * stride_left + i[None, :]
        right = right_ptr + o.to(tl.int64)[None, :] * stride_right
        right += i.to(tl.int64)[:, None] * stride_depth
        for first in range(0, depth, BLOCK_K):
            x = tl.load(left, mask=(first + i < depth)[None, :], other=0.0)
            o_live = (o < rows_right)[None, :]
            w = tl.load(right, mask=(first + i < depth)[:, None] & o_live, other=0.0)
            acc = add_product(acc, x, w, PRECISION, ACC)
            left += BLOCK_K
            right += BLOCK_K * stride_depth
    if base_ptr is not None:
        base = base_ptr + token[:, None] * width + o[None, :]
        acc += tl.load(base, mask=row_live & (o < width)[None, :], other=0.0).to(ACC)
    return acc


@triton.jit
def _store_rows(out_ptr, values, place, row_live, o, width, stride):
    out = out_ptr + place[:, None] * stride + o[None, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=row_live & (o < width)[None, :])


@triton.jit
def flexmore_row_products(
    out_ptr, kept_0, kept_1, row_offsets_ptr, row_to_slot_ptr, weights_ptr,
    left_0, right_0, base_0, depth_0, rows_right_0, stride_left_0, stride_right_0, stride_depth_0,
    left_1, right_1, base_1, depth_1, rows_right_1, stride_left_1, stride_right_1, stride_depth_1,
    rows, width, stride_out, stride_kept_0, stride_kept_1, top_k, row_tiles,
    GATED: tl.constexpr, SORTED_0: tl.constexpr, SORTED_1: tl.constexpr, PLACE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, o_tile = swizzle(tl.program_id(0), row_tiles, tl.cdiv(width, BLOCK_O), GROUP)
    begin = tl.zeros((), tl.int64)
    if row_offsets_ptr is not None:
        begin += tl.load(row_offsets_ptr)
        rows = tl.load(row_offsets_ptr + 1) - begin.to(tl.int32)
    if tile * BLOCK_M >= rows:
        return
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = (row < rows)[:, None]
    row = tl.minimum(row, rows - 1).to(tl.int64)
    token = row
    slot = row * top_k  # of all tokens' rows each token's first
    by_token: tl.constexpr = (base_0 is not None or base_1 is not None) or PLACE == 2
    if row_offsets_ptr is not None and (by_token or weights_ptr is not None):
        slot = tl.load(row_to_slot_ptr + begin + row)
        token = (slot // top_k).to(tl.int64)
    o = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    acc = _add_term(
        acc, left_0, right_0, base_0, depth_0, rows_right_0, stride_left_0,
        stride_right_0, stride_depth_0, begin, row, row_live, token, o, width, SORTED_0, ACC,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    gate = acc
    if GATED:
        if kept_0 is not None:
            _store_rows(kept_0, acc, begin + row, row_live, o, width, stride_kept_0)
        gate = acc * sigmoid(acc, out_ptr.dtype.element_ty)
        acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    acc = _add_term(
        acc, left_1, right_1, base_1, depth_1, rows_right_1, stride_left_1,
        stride_right_1, stride_depth_1, begin, row, row_live, token, o, width, SORTED_1, ACC,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    if GATED:
        if kept_1 is not None:
            _store_rows(kept_1, acc, begin + row, row_live, o, width, stride_kept_1)
        acc *= gate
    if weights_ptr is not None:
        acc *= tl.load(weights_ptr + slot).to(ACC)[:, None]
    place = row
    if PLACE == 0:
        place += begin
    if PLACE == 2:
        place = token
    _store_rows(out_ptr, acc, place, row_live, o, width, stride_out)


def sum_rows(
    work: Sequence[RowProducts],
    plan: RoutingPlan,
    weights: Tensor | None = None,
    place: int = SORTED,
) -> None:
    """out = first + second, times the slot's weight, at the place; an expert a launch."""
    for item in work:
        _launch(item, plan, (None, None), weights, place, False)


def gated_rows(
    work: Sequence[RowProducts], plan: RoutingPlan, kept: tuple[Tensor, Tensor] | None = None
) -> None:
    """out = silu(first) * second, at the sorted rows; kept (two (N, F)): first and second too."""
    for item in work:
        _launch(item, plan, kept or (None, None), None, SORTED, True)


def _term(term: Term) -> tuple:
    if term.left is None:
        return (None, None, term.base, 0, 0, 0, 0, 0)
    right, depth = term.right, term.left.shape[1]
    if right.stride(0) == 1 and right.stride(1) != 1:  # lies transposed, and is read so
        depth = min(depth, right.shape[1])
    elif right.shape[1] < depth:  # zeros beside, so that rows are aligned
        right = torch.nn.functional.pad(right, (0, depth - right.shape[1]))
    elif right.stride(1) != 1:
        right = right.contiguous()
    depths = (depth, right.shape[0])
    return (term.left, right, term.base, *depths, term.left.stride(0), *right.stride())


def _launch(item: RowProducts, plan: RoutingPlan, kept, weights, place: int, gated: bool) -> None:
    out, width = item.out, item.out.shape[1]
    rows = out.shape[0] if item.expert < 0 else plan.num_tokens  # an expert's tokens are distinct
    if rows == 0 or width == 0:
        return
    block = 64 if width % 8 else 128
    m, o, k, warps = tiles.blocks(out.dtype, tiles.row_block(rows, 1, block), block, 64)
    row_tiles = triton.cdiv(rows, m)
    with tiles.device_guard(out):
        flexmore_row_products[(row_tiles * triton.cdiv(width, o),)](
            out, *kept, None if item.expert < 0 else plan.row_offsets[item.expert :],
            plan.row_to_slot, weights, *_term(item.first), *_term(item.second), rows, width,
            *(0 if t is None else t.stride(0) for t in (out, *kept)), plan.top_k, row_tiles,
            GATED=gated, SORTED_0=item.first.place != SEGMENT,
            SORTED_1=item.second.place != SEGMENT, PLACE=place, ACC=tiles.accumulator(out.dtype),
            PRECISION=tiles.dot_precision(out.dtype), BLOCK_M=m, BLOCK_O=o, BLOCK_K=k, GROUP=8,
            num_warps=warps, num_stages=tiles.stages(out, m, o, k, most=3),
        )  # fmt: skip

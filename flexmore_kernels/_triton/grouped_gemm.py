"""Grouped GEMM in Triton: rows times their expert's weight. Maths: reference/grouped_gemm.py.

Weights are read where they lie. Experts whose weights follow each other at a constant distance in
one storage (a stacked weight) share a launch, others have one each; a grid is sized for all N rows
on its experts, and programs past the last row of the device's counts return at once.

Floor: 2 N O I operations; row tiles are walked in groups, so that the column tiles of a weight are
read from memory once for each group's rows and from L2 by the others.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .grouped_gemm_dweight import weight_grads
from .row_products import gated_rows, sum_rows
from .tiles import add_product, ragged_tile, swizzle

__all__ = ["gated_rows", "grouped_gemm", "grouped_gemm_dweight", "sum_rows", "weight_grads"]


@triton.jit
def flexmore_grouped_gemm(
    out_ptr, x_ptr, w_ptr, row_offsets_ptr, width_in, width_out, row_tiles,
    stride_we, stride_wi, stride_wo,
    E: tl.constexpr, E_PAD: tl.constexpr, WHOLE_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, o_tile = swizzle(tl.program_id(0), row_tiles, tl.cdiv(width_out, BLOCK_O), GROUP)
    expert, begin, end = ragged_tile(tile, row_offsets_ptr, E, E_PAD, BLOCK_M)
    if expert >= E:
        return
    row = begin + tl.arange(0, BLOCK_M)
    o = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    row_live = (row < end)[:, None]
    o_live = (o < width_out)[None, :]
    i = tl.arange(0, BLOCK_K)
    # Rows past the end read the last one again: no mask in the loop, and nothing is stored of them.
    x_tile = x_ptr + tl.minimum(row, end - 1)[:, None] * width_in + i[None, :]
    w_ptr += expert.to(tl.int64) * stride_we
    w_tile = w_ptr + i.to(tl.int64)[:, None] * stride_wi + o.to(tl.int64)[None, :] * stride_wo
    acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    for left in range(width_in, 0, -BLOCK_K):
        if WHOLE_K:
            x = tl.load(x_tile)
            w = tl.load(w_tile, mask=o_live, other=0.0)
        else:
            x = tl.load(x_tile, mask=(i < left)[None, :], other=0.0)
            w = tl.load(w_tile, mask=(i < left)[:, None] & o_live, other=0.0)
        acc = add_product(acc, x, w, PRECISION, ACC)
        x_tile += BLOCK_K
        w_tile += BLOCK_K * stride_wi
    out = out_ptr + row[:, None] * width_out + o[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_live & o_live)


@triton.jit
def flexmore_grouped_gemm_dweight(
    out_ptr, dy_ptr, x_ptr, row_offsets_ptr, width_in, width_out,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    o_tile, i_tile = swizzle(
        tl.program_id(0), tl.cdiv(width_out, BLOCK_O), tl.cdiv(width_in, BLOCK_I), GROUP
    )
    start = tl.load(row_offsets_ptr)
    end = tl.load(row_offsets_ptr + 1)
    o = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    i = i_tile * BLOCK_I + tl.arange(0, BLOCK_I)
    o_live = (o < width_out)[:, None]
    i_live = (i < width_in)[None, :]
    acc = tl.zeros((BLOCK_O, BLOCK_I), ACC)
    for first in range(start, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        at = row.to(tl.int64)
        dy = dy_ptr + at[None, :] * width_out + o[:, None]
        x = x_ptr + at[:, None] * width_in + i[None, :]
        dy = tl.load(dy, mask=o_live & (row < end)[None, :], other=0.0)
        x = tl.load(x, mask=(row < end)[:, None] & i_live, other=0.0)
        acc = add_product(acc, dy, x, PRECISION, ACC)
    out = out_ptr + o.to(tl.int64)[:, None] * width_in + i[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=o_live & i_live)


def _stacks(weight: list[Tensor | None]) -> Iterator[tuple[int, int, int]]:
    """(first expert, how many, distance in elements) of weights that one launch can walk."""
    e = 0
    while e < len(weight):
        first, count, step = e, 1, 0
        e += 1
        if weight[first] is None:
            continue
        storage = weight[first].untyped_storage().data_ptr()
        while e < len(weight) and weight[e] is not None:
            distance = weight[e].data_ptr() - weight[e - 1].data_ptr()
            same = weight[e].untyped_storage().data_ptr() == storage
            if not same or (count > 1 and distance != step):
                break
            count, step, e = count + 1, distance, e + 1
        yield first, count, step // weight[first].element_size()


def _config(kernel: str, x: Tensor, rows: int, widths: tuple[int, int]) -> tuple[int, int, dict]:
    """(rows, columns, options) of a tile.

    Widths that are not multiples of 8 mean scalar loads, whose addresses fill the registers.
    """
    odd = any(width % 8 for width in widths)
    size = (min(rows, 64), 64, 32) if odd else (rows, 128, 64)
    safe = tiles.safe_tile(x, *size, most=3)._replace(group=8)
    tile = tiles.tile(kernel, x, safe, usual=not odd)
    options = {
        "ACC": tiles.accumulator(x.dtype),
        "PRECISION": tiles.dot_precision(x.dtype),
        "GROUP": tile.group,
        "BLOCK_K": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return tile.rows, tile.columns, options


def grouped_gemm(
    x: Tensor, weight: list[Tensor | None], row_offsets: Tensor, transpose: bool, out: Tensor
) -> None:
    """out[n] = W_e x[n] (transpose: W_e^T x[n]); rows of experts without weight are left."""
    (N, width_in), width_out = x.shape, out.shape[1]
    if out.numel() == 0:
        return
    rows = tiles.row_block(N, len(weight), 128)
    m, o, config = _config("grouped_gemm", x, rows, (width_in, width_out))
    with tiles.device_guard(x):
        for first, count, step in _stacks(weight):
            row_tiles = tiles.max_tiles(N, count, m)
            stride_out, stride_in = weight[first].stride()
            if transpose:
                stride_out, stride_in = stride_in, stride_out
            flexmore_grouped_gemm[(row_tiles * triton.cdiv(width_out, o),)](
                out, x, weight[first], row_offsets[first:], width_in, width_out, row_tiles,
                step, stride_in, stride_out, E=count, E_PAD=tiles.padded(count),
                WHOLE_K=width_in % config["BLOCK_K"] == 0, BLOCK_M=m, BLOCK_O=o, **config,
            )  # fmt: skip


def grouped_gemm_dweight(
    dy: Tensor, x: Tensor, row_offsets: Tensor, experts: list[int]
) -> list[Tensor]:
    """For each of `experts` (O, I): the sum over its rows of dy[n] x[n]^T, in the order of rows."""
    width_out, width_in = dy.shape[1], x.shape[1]
    grads = [x.new_empty(width_out, width_in) for _ in experts]
    o, i, config = _config("grouped_gemm_dweight", x, 128, (width_in, width_out))
    grid = (triton.cdiv(width_out, o) * triton.cdiv(width_in, i),)
    with tiles.device_guard(x):
        for e, grad in zip(experts, grads, strict=True):
            if grad.numel() == 0 or x.shape[0] == 0:
                grad.zero_()
                continue
            flexmore_grouped_gemm_dweight[grid](
                grad, dy, x, row_offsets[e:], width_in, width_out,
                BLOCK_O=o, BLOCK_I=i, **config,
            )  # fmt: skip
    return grads

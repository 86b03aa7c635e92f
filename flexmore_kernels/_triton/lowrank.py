"""Triton kernels of the ragged low-rank products. Maths: reference/lowrank.py.

All three walk the packed z: expert e's block starts at sum_{e' < e} count_e' r_e' and is (count_e,
r_e) row-major, so that neither rows nor ranks are padded. Tiles are cut per expert, the rank loop
runs to the expert's own rank, and only an expert's last rank block has masked columns.

Cost, for n rows of an expert of rank r: shrink and factor_grad read each row once per rank block
and do 2 n r I operations; expand writes n O results, which bounds it for r below a few hundred. The
order of a sum depends on shapes alone: where the tiles of the result would leave the device idle,
the summed axis is split and a second kernel adds the partial sums in order.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import ragged
from . import tiles
from .tiles import add_product, aligned, packed_offset, ragged_tile, rank_offset, swizzle


@triton.jit
def _row_rank_tile(
    pid, row_offsets_ptr, ranks_ptr,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(expert, first row, first rank column) of tile `pid`; the expert is E_PAD past the last one.

    Rank blocks run fastest, so that neighbouring programs read the same rows of x.
    """
    e = tl.arange(0, E_PAD)
    start = tl.load(row_offsets_ptr + e, mask=e < E, other=0)
    stop = tl.load(row_offsets_ptr + e + 1, mask=e < E, other=0)
    rank_tiles = (tl.load(ranks_ptr + e, mask=e < E, other=0) + BLOCK_R - 1) // BLOCK_R
    count = (stop - start + BLOCK_M - 1) // BLOCK_M * rank_tiles
    last = tl.cumsum(count, 0)
    expert = tl.sum((last <= pid).to(tl.int32), 0)
    own = e == expert
    index = pid - tl.sum(tl.where(own, last - count, 0), 0)
    across = tl.maximum(tl.sum(tl.where(own, rank_tiles, 0), 0), 1)
    begin = tl.sum(tl.where(own, start, 0), 0) + index // across * BLOCK_M
    return expert, begin, index % across * BLOCK_R


@triton.jit
def flexmore_shrink(
    z_ptr, x_ptr, a_ptr, row_offsets_ptr, ranks_ptr, row_to_slot_ptr, weights_ptr,
    size, width, top_k, num_tiles, num_zeroers, split_width, stride_ar, stride_ai,
    E: tl.constexpr, E_PAD: tl.constexpr, GATHER: tl.constexpr, ALIGN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = tl.program_id(1)
    if pid >= num_tiles:  # the last programs write the zeros past z's used length
        first = packed_offset(E, row_offsets_ptr, ranks_ptr, E, E_PAD)
        first += (pid - num_tiles) * (BLOCK_M * BLOCK_R)
        while first < size:
            at = first + tl.arange(0, BLOCK_M * BLOCK_R)
            tl.store(z_ptr + at, tl.zeros(at.shape, z_ptr.dtype.element_ty), mask=at < size)
            first += num_zeroers * (BLOCK_M * BLOCK_R)
        return
    expert, begin, r_begin = _row_rank_tile(
        pid, row_offsets_ptr, ranks_ptr, E, E_PAD, BLOCK_M, BLOCK_R
    )
    if expert >= E:
        return
    start = tl.load(row_offsets_ptr + expert)
    end = tl.load(row_offsets_ptr + expert + 1)
    rank = aligned(tl.load(ranks_ptr + expert), ALIGN)
    z_offset = aligned(packed_offset(expert, row_offsets_ptr, ranks_ptr, E, E_PAD), ALIGN)
    a_offset = aligned(rank_offset(expert, ranks_ptr, E, E_PAD), ALIGN)

    row = begin + tl.arange(0, BLOCK_M)
    m_live = (row < end)[:, None]
    r = r_begin + tl.arange(0, BLOCK_R)
    r_live = (r < rank)[None, :]
    source = row.to(tl.int64)
    if row_to_slot_ptr is not None:
        slot = tl.load(row_to_slot_ptr + row, mask=row < end, other=0)
        if GATHER:
            source = (slot // top_k).to(tl.int64)
    x_rows = x_ptr + source[:, None] * width
    a_rows = a_ptr + a_offset * stride_ar + r.to(tl.int64)[None, :] * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    for first in range(split * split_width, tl.minimum(width, (split + 1) * split_width), BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + i[None, :], mask=m_live & (i < width)[None, :], other=0.0)
        a_columns = i.to(tl.int64)[:, None] * stride_ai
        a = tl.load(a_rows + a_columns, mask=(i < width)[:, None] & r_live, other=0.0)
        acc = add_product(acc, x, a, PRECISION, ACC)
    if weights_ptr is not None:
        acc *= tl.load(weights_ptr + slot, mask=row < end, other=0.0).to(ACC)[:, None]
    z_rows = z_ptr + split.to(tl.int64) * size + z_offset
    z_rows += (row - start).to(tl.int64)[:, None] * rank
    tl.store(z_rows + r[None, :], acc.to(z_ptr.dtype.element_ty), mask=m_live & r_live)


@triton.jit
def flexmore_expand(
    y_ptr, z_ptr, b_ptr, base_ptr, row_offsets_ptr, ranks_ptr, row_to_slot_ptr,
    N, width, top_k, row_tiles, stride_bo, stride_br,
    E: tl.constexpr, E_PAD: tl.constexpr, ALIGN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile, o_tile = swizzle(tl.program_id(0), row_tiles, tl.cdiv(width, BLOCK_O), GROUP)
    expert, begin, end = ragged_tile(tile, row_offsets_ptr, E, E_PAD, BLOCK_M)
    o = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    o_live = (o < width)[None, :]
    if expert >= E:  # the tail is one more segment, of zeros
        e = tl.arange(0, E_PAD)
        lower = tl.load(row_offsets_ptr + e, mask=e < E, other=0)
        upper = tl.load(row_offsets_ptr + e + 1, mask=e < E, other=0)
        before = tl.sum((upper - lower + BLOCK_M - 1) // BLOCK_M, 0)
        row = tl.load(row_offsets_ptr + E) + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        out = y_ptr + row.to(tl.int64)[:, None] * width + o[None, :]
        zeros = tl.zeros((BLOCK_M, BLOCK_O), y_ptr.dtype.element_ty)
        tl.store(out, zeros, mask=(row < N)[:, None] & o_live)
        return
    start = tl.load(row_offsets_ptr + expert)
    rank = aligned(tl.load(ranks_ptr + expert), ALIGN)
    z_offset = aligned(packed_offset(expert, row_offsets_ptr, ranks_ptr, E, E_PAD), ALIGN)
    b_offset = aligned(rank_offset(expert, ranks_ptr, E, E_PAD), ALIGN)

    row = begin + tl.arange(0, BLOCK_M)
    m_live = (row < end)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    if base_ptr is not None:
        source = row
        if row_to_slot_ptr is not None:
            source = (tl.load(row_to_slot_ptr + row, mask=row < end, other=0) // top_k).to(tl.int64)
        base = base_ptr + source[:, None] * width + o[None, :]
        acc = tl.load(base, mask=m_live & o_live, other=0.0).to(ACC)
    z_rows = z_ptr + z_offset + (row - start)[:, None] * rank
    b_rows = b_ptr + b_offset * stride_br + o.to(tl.int64)[None, :] * stride_bo
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        z = tl.load(z_rows + r[None, :], mask=m_live & (r < rank)[None, :], other=0.0)
        b_columns = r.to(tl.int64)[:, None] * stride_br
        b = tl.load(b_rows + b_columns, mask=(r < rank)[:, None] & o_live, other=0.0)
        acc = add_product(acc, z, b, PRECISION, ACC)
    out = y_ptr + row[:, None] * width + o[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=m_live & o_live)


@triton.jit
def flexmore_factor_grad(
    out_ptr, z_ptr, x_ptr, row_offsets_ptr, rank_offsets_ptr, wanted_offsets_ptr, ranks_ptr,
    row_to_slot_ptr, width, top_k, num_splits, plane_size,
    E: tl.constexpr, E_PAD: tl.constexpr, ALIGN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(2)
    # Tiles of the wanted experts' ranks, laid end to end.
    expert, tile, _ = ragged_tile(tl.program_id(1), wanted_offsets_ptr, E, E_PAD, BLOCK_R)
    start = tl.load(row_offsets_ptr + expert)
    end = tl.load(row_offsets_ptr + expert + 1)
    rank = aligned(tl.load(ranks_ptr + expert), ALIGN)
    z_offset = aligned(packed_offset(expert, row_offsets_ptr, ranks_ptr, E, E_PAD), ALIGN)
    z_column = aligned(tile - tl.load(wanted_offsets_ptr + expert), ALIGN)

    r = tl.arange(0, BLOCK_R)
    r_live = (z_column + r < rank)[:, None]
    r_begin = tl.load(rank_offsets_ptr + expert) + z_column
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    i_live = (i < width)[None, :]
    z_columns = z_ptr + z_offset + z_column + r[:, None]
    part = tl.cdiv(tl.cdiv(end - start, BLOCK_K), num_splits) * BLOCK_K
    acc = tl.zeros((BLOCK_R, BLOCK_I), ACC)
    for first in range(start + split * part, tl.minimum(end, start + (split + 1) * part), BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        live = row < end
        source = row.to(tl.int64)
        if row_to_slot_ptr is not None:
            source = (tl.load(row_to_slot_ptr + row, mask=live, other=0) // top_k).to(tl.int64)
        z_rows = (row - start).to(tl.int64)[None, :] * rank
        z = tl.load(z_columns + z_rows, mask=r_live & live[None, :], other=0.0)
        x = x_ptr + source[:, None] * width + i[None, :]
        x = tl.load(x, mask=live[:, None] & i_live, other=0.0)
        acc = add_product(acc, z, x, PRECISION, ACC)
    out = out_ptr + split.to(tl.int64) * plane_size + (r_begin + r)[:, None] * width + i[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=r_live & i_live)


def _launch(x: Tensor, ranks: tuple[int, ...]) -> dict:
    """Compile-time arguments that the three products share."""
    return {
        "E": len(ranks),
        "E_PAD": tiles.padded(len(ranks)),
        "ALIGN": tiles.alignment(ranks),
        "ACC": tiles.accumulator(x.dtype),
        "PRECISION": tiles.dot_precision(x.dtype),
    }


def shrink(
    x: Tensor, a: Tensor, row_offsets: Tensor, ranks: tuple[int, ...], row_to_slot: Tensor,
    top_k: int, size: int, gather: bool = False, weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """z_n = w_slot A_e x_row, packed (size,); x_row = x[token of n] if gather, else x[n]."""
    z = x.new_empty(size)
    if size == 0:
        return z
    N, width = row_to_slot.shape[0] if gather else x.shape[0], x.shape[1]
    common, E = _launch(x, ranks), len(ranks)
    across = min(128, tiles.padded(max(ranks), 16))
    tile = tiles.safe_tile(x, tiles.row_block(N, E, 128), across, 64)
    tile = tiles.tile("shrink", x, tile, usual=tiles.alignment(ranks) > 1 and width % 8 == 0)
    m, r, k = tile.shape
    by_rows = tiles.max_tiles(N, E, m) * triton.cdiv(max(ranks), r)
    by_area = size // (m * r) + N // m + sum(ranks) // r + E
    num_tiles = min(by_rows, by_area)
    splits = tiles.splits(num_tiles, width, k)
    out, zeroers = z, min(64, triton.cdiv(size, m * r))
    if splits > 1:
        out, zeroers = x.new_empty(splits, size, dtype=tiles.torch_accumulator(x.dtype)), 0
    ranks_on_device = ragged.ranks_tensor(ranks, x.device)
    with tiles.device_guard(x):
        flexmore_shrink[(num_tiles + zeroers, splits)](
            out, x, a, row_offsets, ranks_on_device,
            row_to_slot if gather or weights is not None else None, weights,
            size, width, top_k, num_tiles, zeroers,
            triton.cdiv(triton.cdiv(width, splits), k) * k, *a.stride(),
            GATHER=gather, BLOCK_M=m, BLOCK_R=r, BLOCK_K=k,
            num_warps=tile.warps, num_stages=tile.stages, **common,
        )  # fmt: skip
        if splits > 1:
            tiles.sum_planes(z, out, row_offsets, ranks_on_device)
    return z


def expand(
    z: Tensor,
    b: Tensor,
    row_offsets: Tensor,
    ranks: tuple[int, ...],
    num_rows: int,
    base: Tensor | None = None,
    row_to_slot: Tensor | None = None,
    top_k: int = 1,
    gather: bool = False,
) -> Tensor:
    """y_n = base_row + B_e z_n (num_rows, O), one sum; base_row = base[token of n] if gather."""
    width, E = b.shape[0], len(ranks)
    y = z.new_empty(num_rows, width)
    if y.numel() == 0:
        return y
    # Without aligned ranks loads are scalar and need registers: a narrower tile avoids spills.
    vectors = tiles.alignment(ranks) > 1
    depth = min(64, tiles.padded(max(ranks), 16))
    rows = tiles.row_block(num_rows, E, 128)
    tile = tiles.safe_tile(z, rows, 128 if vectors else 64, depth, most=3)._replace(group=4)
    tile = tiles.tile("expand", z, tile, usual=vectors and width % 8 == 0)
    m, o, r = tile.shape
    row_tiles = tiles.max_tiles(num_rows, E + 1, m)
    with tiles.device_guard(z):
        flexmore_expand[(row_tiles * triton.cdiv(width, o),)](
            y, z, b, base, row_offsets, ragged.ranks_tensor(ranks, z.device),
            row_to_slot if gather else None, num_rows, width, top_k, row_tiles, *b.stride(),
            GROUP=tile.group, BLOCK_M=m, BLOCK_O=o, BLOCK_R=r,
            num_warps=tile.warps, num_stages=tile.stages, **_launch(z, ranks),
        )  # fmt: skip
    return y


def factor_grad(
    z: Tensor, x: Tensor, row_offsets: Tensor, ranks: tuple[int, ...], row_to_slot: Tensor,
    top_k: int, gather: bool = False, wanted: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """(R, I): rows of expert e are sum over its rows n of z_n (r_e) outer x_row.

    With `wanted`, only the rows of these experts are computed, the others are not written.
    """
    width, E, R = x.shape[1], len(ranks), sum(ranks)
    out = x.new_empty(R, width)
    some = ranks if wanted is None else tuple(r * (e in wanted) for e, r in enumerate(ranks))
    N = row_to_slot.shape[0] if gather else x.shape[0]
    if width * sum(some) == 0 or N == 0:
        return out.zero_()
    r, i, k, warps = tiles.blocks(x.dtype, min(64, tiles.padded(max(ranks), 16)), 128, 64)
    rank_tiles, i_tiles = sum(triton.cdiv(rank, r) for rank in some), triton.cdiv(width, i)
    splits = tiles.splits(rank_tiles * i_tiles, triton.cdiv(N, E), k)
    planes = out
    if splits > 1:
        planes = x.new_empty(splits, R, width, dtype=tiles.torch_accumulator(x.dtype))
    with tiles.device_guard(x):
        flexmore_factor_grad[(i_tiles, rank_tiles, splits)](
            planes, z, x, row_offsets, ragged.rank_offsets_tensor(ranks, x.device),
            ragged.rank_offsets_tensor(some, x.device),
            ragged.ranks_tensor(ranks, x.device), row_to_slot if gather else None,
            width, top_k, splits, R * width, BLOCK_R=r, BLOCK_I=i, BLOCK_K=k,
            num_warps=warps, num_stages=tiles.stages(x, r, i, k), **_launch(x, ranks),
        )  # fmt: skip
        if splits > 1:
            tiles.sum_planes(out, planes)
    return out

"""What the Triton kernels share: a program's tile on a ragged axis, and choosing launch sizes.

Both ragged axes (rows per expert, rank per expert) are described by offsets (E+1,): segment e owns
[offsets[e], offsets[e+1]). Row counts stay on the device, so a grid is sized by an upper bound
(`max_tiles`) and every program finds its own segment (`ragged_tile`).
"""

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl

from .. import tuning
from ..tuning import Tile

# Devices of compute capability 8.6, 8.9 and 12.0 allow a block 99 KiB; the interpreter has no limit
# but follows the same choice, so that what is tested is what is shipped.
SMALLEST_SHARED_MEMORY = 99 * 1024

ENOUGH_PROGRAMS = 264  # two for each multiprocessor of an H100; with fewer, long sums are split
MOST_SPLITS = 16

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2_HIGH = tl.constexpr(0.693145751953125)  # few bits: n times it is exact in float32
_LN_2_LOW = tl.constexpr(1.42860682030941723e-6)


@triton.jit
def ragged_tile(pid, offsets_ptr, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """(segment, begin, end) of tile `pid`; every segment is cut into tiles of BLOCK from its start.

    begin, end are int64, and begin + i < end masks the elements of the tile. A pid past the last
    tile gets segment E_PAD and begin >= end: return before loading anything by segment.
    E_PAD is a power of two, at least E and 2.
    """
    e = tl.arange(0, E_PAD)
    start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    stop = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    count = stop - start
    tiles = count // BLOCK + (count % BLOCK != 0).to(tl.int32)
    last = tl.cumsum(tiles, 0)
    segment = tl.sum((last <= pid).to(tl.int32), 0)
    own = e == segment
    index = (pid - tl.sum(tl.where(own, last - tiles, 0), 0)).to(tl.int64)
    begin = tl.sum(tl.where(own, start, 0), 0).to(tl.int64) + index * BLOCK
    end = tl.sum(tl.where(own, stop, 0), 0).to(tl.int64)
    return segment, begin, end


@triton.jit
def packed_offset(expert, row_offsets_ptr, ranks_ptr, E: tl.constexpr, E_PAD: tl.constexpr):
    """First element (int64) of `expert`'s (count, rank) block in the packed z.

    It is the sum over e < expert of count_e * r_e; with expert >= E, the used length of z.
    """
    e = tl.arange(0, E_PAD)
    before = (e < expert) & (e < E)
    start = tl.load(row_offsets_ptr + e, mask=before, other=0)
    stop = tl.load(row_offsets_ptr + e + 1, mask=before, other=0)
    rank = tl.load(ranks_ptr + e, mask=before, other=0)
    return tl.sum((stop - start).to(tl.int64) * rank.to(tl.int64), 0)


@triton.jit
def rank_offset(expert, ranks_ptr, E: tl.constexpr, E_PAD: tl.constexpr):
    """First column (int64) of `expert` on the rank axis: the sum over e < expert of r_e."""
    e = tl.arange(0, E_PAD)
    return tl.sum(tl.load(ranks_ptr + e, mask=(e < expert) & (e < E), other=0).to(tl.int64), 0)


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """value, which the host knows to be a multiple of ALIGN, so that loads by it can vectorise.

    The division and product are what the compiler trusts; they cost nothing beside a loop.
    """
    if ALIGN > 1:
        value = value // ALIGN * ALIGN
    return value


@triton.jit
def sigmoid(v, dtype: tl.constexpr):
    """1 / (1 + exp(-v)), in error well below one rounding to dtype, the type that is stored."""
    if dtype == tl.float64:
        s = 1.0 / (1.0 + tl.exp(-v))
    elif dtype == tl.float32:
        # exp(-v) = 2^n exp(f) with n whole: a plain exp2(-v log2 e) loses the bits of n.
        n = tl.floor(v * -_LOG2_E + 0.5)
        f = tl.where(tl.abs(n) < 150, -v - n * _LN_2_HIGH - n * _LN_2_LOW, 0.0)
        s = tl.div_rn(1.0, 1.0 + tl.exp2(f * _LOG2_E) * tl.exp2(n))
    else:
        # Two special-function instructions and three others; a division would be six more.
        root = tl.rsqrt(1.0 + tl.exp2(v * -_LOG2_E))
        s = root * root
    return s


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """acc + a b, tile by tile.

    In IEEE float32 the product of a block is summed by itself first: one chain of additions through
    all of K loses more bits than sums of blocks. Subtracted, because the compiler would fold an
    added product back into the chain.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        acc = acc - tl.dot(-a, b, input_precision=PRECISION, out_dtype=ACC)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(m, n) of program `pid`: GROUP row tiles share their column tiles in L2."""
    group = pid // (GROUP * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP, GROUP)
    rest = pid % (GROUP * tiles_n)
    return group * GROUP + rest % size, rest // size


@triton.jit
def flexmore_sum_planes(
    out_ptr, planes_ptr, row_offsets_ptr, ranks_ptr, size, num_planes,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the planes' sum in order; planes of a packed z hold nothing past its used length."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = size
    if ranks_ptr is not None:
        used = packed_offset(E, row_offsets_ptr, ranks_ptr, E, E_PAD)
    acc = tl.zeros((BLOCK,), planes_ptr.dtype.element_ty)
    for _ in range(num_planes):
        acc += tl.load(planes_ptr + at, mask=at < used, other=0.0)
        planes_ptr += size
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=at < size)


def padded(n: int, least: int = 2) -> int:
    """The power of two that a block over n elements is padded to (scans need two elements)."""
    return max(least, triton.next_power_of_2(n))


def splits(programs: int, length: int, block: int) -> int:
    """Into how many parts to cut a sum of `length`, so that `programs` tiles fill the device."""
    return max(1, min(MOST_SPLITS, ENOUGH_PROGRAMS // programs, length // (4 * block)))


def row_block(num_rows: int, num_experts: int, most: int) -> int:
    """Row tile for the mean number of rows an expert has, within [16, most]."""
    return min(most, padded(triton.cdiv(num_rows, num_experts), 16))


def blocks(dtype: torch.dtype, rows: int, columns: int, depth: int) -> tuple[int, int, int, int]:
    """(rows, columns, depth, warps) of a tile, cut down for types without fast tensor cores."""
    if dtype.itemsize >= 4:
        rows, columns, depth = min(rows, 64), min(columns, 64), 128 // dtype.itemsize
    return rows, columns, depth, 8 if rows * columns >= 64 * 128 else 4


def max_tiles(total: int, segments: int, block: int) -> int:
    """The most tiles that `total` elements in `segments` segments need: a grid without a sync."""
    busy = min(total, segments)
    return busy + (total - busy) // block


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type in which sums over values of `dtype` are formed."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def torch_accumulator(dtype: torch.dtype) -> torch.dtype:
    """`accumulator` as a torch dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: fp32 means IEEE unless torch allows TF32 for matmuls."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@functools.lru_cache(maxsize=1024)
def alignment(*rank_lists: tuple[int, ...]) -> int:
    """16, 8 or 1: what divides every rank, and so every offset into a packed z or a rank axis."""
    divisor = math.gcd(*(rank for ranks in rank_lists for rank in ranks)) or 16
    return next(align for align in (16, 8, 1) if divisor % align == 0)


@functools.cache
def _shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use on `device`."""
    if device.type != "cuda":
        return SMALLEST_SHARED_MEMORY
    return _shared_memory(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of `device`; (0, 0) in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def fitting_stages(stage_bytes: int, most: int, limit: int, fixed_bytes: int = 0) -> int:
    """Pipeline stages (1 to `most`) of `stage_bytes` that fit in `limit` beside `fixed_bytes`."""
    return max(1, min(most, (limit - fixed_bytes) // stage_bytes))


def stages(x: torch.Tensor, rows: int, columns: int, depth: int, most: int = 4) -> int:
    """Pipeline stages of a matrix product's tiles that fit in a block's shared memory."""
    stage = (rows + columns) * depth * x.element_size()
    return fitting_stages(stage, most, shared_memory(x.device))


def tile(kernel: str, x: torch.Tensor, safe: Tile, usual: bool = True) -> Tile:
    """The tile that a kernel runs with: the device's tuned one where it has one, else `safe`.

    usual: whether loads are vectors, as they were when tiles were tuned.
    """
    return tuning.find(kernel, capability(x.device), x.element_size(), safe) if usual else safe


def safe_tile(x: torch.Tensor, rows: int, columns: int, depth: int, most: int = 4) -> Tile:
    """A matrix product's tile of about this size that runs wherever its shared memory fits."""
    rows, columns, depth, warps = blocks(x.dtype, rows, columns, depth)
    return Tile(rows, columns, depth, warps, stages(x, rows, columns, depth, most))


def sum_planes(out: torch.Tensor, planes: torch.Tensor, row_offsets=None, ranks=None) -> None:
    """out = sum over the planes' first axis, in order; for a packed z give what defines its length.

    Entries of a packed z past its used length become zero.
    """
    E = 0 if ranks is None else ranks.shape[0]
    flexmore_sum_planes[(triton.cdiv(out.numel(), 1024),)](
        out, planes, row_offsets, ranks, out.numel(), planes.shape[0], E, padded(E), 1024
    )


def device_guard(tensor: torch.Tensor):
    """Context in which Triton launches on `tensor`'s device, which need not be the current one."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)

"""What the Triton kernels share: a program's tile on a ragged axis, and choosing launch sizes.

Both ragged axes (rows per expert, rank per expert) are described by offsets (E+1,): segment e owns
[offsets[e], offsets[e+1]). Row counts stay on the device, so a grid is sized by an upper bound
(`max_tiles`) and every program finds its own segment (`ragged_tile`).
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl

# Devices of compute capability 8.6, 8.9 and 12.0 allow a block 99 KiB; the interpreter has no limit
# but follows the same choice, so that what is tested is what is shipped.
SMALLEST_SHARED_MEMORY = 99 * 1024


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
def swizzle(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(m, n) of program `pid`: GROUP row tiles share their column tiles in L2."""
    group = pid // (GROUP * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP, GROUP)
    rest = pid % (GROUP * tiles_n)
    return group * GROUP + rest % size, rest // size


def padded(n: int, least: int = 2) -> int:
    """The power of two that a block over n elements is padded to (scans need two elements)."""
    return max(least, triton.next_power_of_2(n))


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


@functools.cache
def _shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use on `device`."""
    if device.type != "cuda":
        return SMALLEST_SHARED_MEMORY
    return _shared_memory(torch.cuda.current_device() if device.index is None else device.index)


def fitting_stages(stage_bytes: int, most: int, limit: int, fixed_bytes: int = 0) -> int:
    """Pipeline stages (1 to `most`) of `stage_bytes` that fit in `limit` beside `fixed_bytes`."""
    return max(1, min(most, (limit - fixed_bytes) // stage_bytes))


def device_guard(tensor: torch.Tensor):
    """Context in which Triton launches on `tensor`'s device, which need not be the current one."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)

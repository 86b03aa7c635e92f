"""Triton kernels of a decoding step beside the layers. What: reference/decoding.py.

Each is a few microseconds, nearly all of it the launch. The likeliest token takes two: a row is cut
into parts, so that more than one multiprocessor reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles

PART = 4096  # logits that one program looks at
LAST = (
    0x7FFFFFFF  # an index is packed as its distance from here: the first of equals is the largest
)


@triton.jit
def flexmore_begin_token(
    cos_out_ptr, sin_out_ptr, now_ptr, end_ptr, position_ptr, real_ptr, cos_ptr, sin_ptr, columns,
    HALF: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    column = tl.load(end_ptr + request)
    position = tl.load(position_ptr + request)
    d = tl.arange(0, PAD)
    live = d < HALF
    cos = tl.load(cos_ptr + position * HALF + d, mask=live)
    sin = tl.load(sin_ptr + position * HALF + d, mask=live)
    tl.debug_barrier()  # all of the program's threads have read what is counted on below
    tl.store(cos_out_ptr + request * HALF + d, cos, mask=live)
    tl.store(sin_out_ptr + request * HALF + d, sin, mask=live)
    tl.store(real_ptr + request * columns + column, 1)
    tl.store(end_ptr + request, column + 1)
    tl.store(position_ptr + request, position + 1)
    if request == 0:
        tl.store(now_ptr, column)


@triton.jit
def flexmore_greedy_part(
    best_ptr, logits_ptr, width, stride, BLOCK: tl.constexpr, LAST: tl.constexpr
):
    request = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + request * stride + at, mask=at < width, other=float("-inf"))
    x = x.to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # of both zeros the same
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # in the order of the numbers
    key = tl.where(x != x, 0x7FFFFFFF, key)
    packed = (key.to(tl.int64) << 32) | (LAST - at).to(tl.int64)
    tl.store(best_ptr + request * tl.num_programs(1) + part, tl.max(packed, 0))


@triton.jit
def flexmore_greedy_join(out_ptr, best_ptr, parts, PAD: tl.constexpr, LAST: tl.constexpr):
    request = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PAD)
    live = part < parts
    # The first part stands for those that are not there: a most negative number is none of int64.
    best = tl.load(best_ptr + request * parts + tl.where(live, part, 0))
    tl.store(out_ptr + request, LAST - (tl.max(best, 0) & LAST))


@triton.jit
def flexmore_settle(
    tokens_ptr, finished_ptr, chosen_ptr, stops_ptr, num_stops, pad, PAD: tl.constexpr
):
    request = tl.program_id(0).to(tl.int64)
    ended = tl.load(finished_ptr + request) != 0
    token = tl.where(ended, pad, tl.load(chosen_ptr + request))
    stop = tl.arange(0, PAD)
    stops = tl.load(stops_ptr + stop, mask=stop < num_stops, other=-1)
    ends = tl.max((stops == token).to(tl.int32), 0) != 0
    tl.debug_barrier()
    tl.store(tokens_ptr + request, token)
    tl.store(finished_ptr + request, ended | ends)


def begin_token(
    end: Tensor, position: Tensor, real: Tensor, now: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    (batch, columns), half = real.shape, cos.shape[1]
    rows = [torch.empty(batch, 1, half, device=x.device, dtype=x.dtype) for x in (cos, sin)]
    with tiles.device_guard(real):
        flexmore_begin_token[(batch,)](
            *rows, now, end, position, real, cos, sin, columns,
            HALF=half, PAD=tiles.padded(half), num_warps=1,
        )  # fmt: skip
    return rows[0], rows[1]


def greedy(logits: Tensor) -> Tensor:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    batch, width = logits.shape
    parts = triton.cdiv(width, PART)
    best = torch.empty(batch, parts, device=logits.device, dtype=torch.int64)
    out = torch.empty(batch, device=logits.device, dtype=torch.int64)
    with tiles.device_guard(logits):
        flexmore_greedy_part[(batch, parts)](
            best, logits, width, logits.stride(0), BLOCK=PART, LAST=LAST, num_warps=8
        )
        flexmore_greedy_join[(batch,)](
            out, best, parts, PAD=tiles.padded(parts), LAST=LAST, num_warps=1
        )
    return out


def settle(chosen: Tensor, tokens: Tensor, finished: Tensor, stops: Tensor, pad: int) -> None:
    with tiles.device_guard(tokens):
        flexmore_settle[(tokens.shape[0],)](
            tokens, finished, chosen, stops, stops.shape[0], pad,
            PAD=tiles.padded(stops.shape[0]), num_warps=1,
        )  # fmt: skip

"""Triton kernel of attribution, one launch. What: reference/attribution.py.

A program takes tokens that follow each other. Most often all are of one request: then a few experts
are counted in registers first, each beside all slots, and one addition an expert goes to memory.
Where there are about as many experts as a program has slots, that would save nothing: slots are
added one by one, but for those of one expert, the first of the first token, which is the shared one
if there is one. One by one too in a decoding step, where each token is another request's. All
additions are of integers, so that atomics may come in any order: the same bits in every run, and
whatever the launch is.

Bytes: T K (8 + 4) read, 1 MB for 16384 tokens of 5 slots, 0.3 us at 3 TB/s; the launch is the rest.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._aten.attribution import UNITS
from . import tiles

DENSE_EXPERTS = 32  # up to so many are counted in registers
MOST_SLOTS = 1024  # of a program
FEWEST_SLOTS = 128
PAIRS = 8192  # slots times experts that a program compares


@triton.jit(do_not_specialize=["T", "span", "B"])
def flexmore_attribute(
    rows_ptr, units_ptr, tokens_ptr, indices_ptr, weights_ptr, request_ptr, counted_ptr,
    T, span, B, UNITS: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK // K
    first = tl.program_id(0).to(tl.int64) * TOKENS
    slot = tl.arange(0, BLOCK)
    token = slot // K
    mine = (token < TOKENS) & (first + token < T)
    if request_ptr is not None:
        request = tl.load(request_ptr + first + token, mask=mine, other=-1).to(tl.int64)
        mine &= (request >= 0) & (request < B)
    else:
        # A division of 64-bit integers is slow: one a program, the rest in 32 bits.
        past = (first % span).to(tl.int32)
        request = first // span + ((past + token) // span.to(tl.int32)).to(tl.int64)
    if counted_ptr is not None:
        mine &= tl.load(counted_ptr + first + token, mask=mine, other=0).to(tl.int1)
    expert = tl.load(indices_ptr + first * K + slot, mask=mine, other=E)
    live = mine & (expert >= 0) & (expert < E)
    weight = tl.load(weights_ptr + first * K + slot, mask=mine, other=0)
    weight = tl.where(live, weight, 0).to(tl.float64)  # of an empty slot it may be no number
    units = tl.floor(weight * UNITS + 0.5).to(tl.int64)
    at = request * E + expert
    once = mine & (slot % K == 0)

    lowest = tl.min(tl.where(mine, request, B), 0)
    highest = tl.max(tl.where(mine, request, -1), 0)
    if lowest == highest:
        if DENSE:
            e = tl.arange(0, E_PAD)
            chosen = live[:, None] & (expert[:, None] == e[None, :])
            total = tl.sum(tl.where(chosen, units[:, None], 0), 0)
        else:
            e = tl.load(indices_ptr + first * K)
            chosen = live & (expert == e)
            total = tl.sum(tl.where(chosen, units, 0), 0)
        count = tl.sum(chosen.to(tl.int32), 0)
        to = lowest * E + e
        tl.atomic_add(rows_ptr + to, count.to(tl.int64), mask=count > 0, sem="relaxed")
        tl.atomic_add(units_ptr + to, total, mask=count > 0, sem="relaxed")
        live &= (slot < 0) if DENSE else (expert != e)  # what is left
        if tokens_ptr is not None:
            number = tl.sum(once.to(tl.int32), 0)
            tl.atomic_add(tokens_ptr + lowest, number.to(tl.int64), sem="relaxed")
            once &= slot < 0
    one = tl.full(at.shape, 1, tl.int64)
    tl.atomic_add(rows_ptr + at, one, mask=live, sem="relaxed")
    tl.atomic_add(units_ptr + at, units, mask=live, sem="relaxed")
    if tokens_ptr is not None:
        tl.atomic_add(tokens_ptr + request, one, mask=once, sem="relaxed")


def launch(T: int, K: int, E: int) -> dict[str, int]:
    """How a launch is cut: enough programs for the device, none with too much in registers."""
    dense = E <= DENSE_EXPERTS
    pad = tiles.padded(E)
    most = min(MOST_SLOTS, PAIRS // pad) if dense else MOST_SLOTS
    block = tiles.padded(triton.cdiv(T * K, tiles.ENOUGH_PROGRAMS))
    block = tiles.padded(K, max(FEWEST_SLOTS, min(most, block)))
    work = block * pad if dense else block * 8
    return {
        "E_PAD": pad, "BLOCK": block, "DENSE": dense, "num_warps": 4 if work <= PAIRS // 2 else 8,
    }  # fmt: skip


def attribute_(
    rows: Tensor,
    units: Tensor,
    tokens: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    request: Tensor | None,
    counted: Tensor | None,
) -> None:
    """Adds to rows and units (B, E), and to tokens (B,), all int64; T and B are at least 1."""
    (B, E), (T, K) = rows.shape, indices.shape
    how = launch(T, K, E)
    with tiles.device_guard(rows):
        flexmore_attribute[(triton.cdiv(T, how["BLOCK"] // K),)](
            rows, units, tokens, indices, weights, request, counted,
            T, T // B, B, UNITS=UNITS, E=E, K=K, **how,
        )  # fmt: skip

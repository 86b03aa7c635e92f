"""The stable counting sort behind make_plan: slots by expert and tokens by expert set at once.

Four launches: (1) zeros; (2) every program ranks the keys of its block among equal ones by pairwise
comparison, and the last of each key writes the block's count of it; (3) one cumulative sum over the
(key, block) counts; (4) every slot and token adds its rank to the sum of the counts before its own.
Integers only and no atomics, so the result is the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles

_CHUNK = tl.constexpr(32)  # keys that a block is compared with at a time


@triton.jit
def _keys(indices_ptr, i, count, E: tl.constexpr, K: tl.constexpr, SETS: tl.constexpr):
    """Keys of slots i (SETS = 0): the expert, E if none; or of tokens i: their set, the sum of 2^e.

    Past `count` the key is the number of keys.
    """
    if SETS == 0:
        expert = tl.load(indices_ptr + i, mask=i < count, other=-1)
        key = tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)
        for k in range(K - 1):  # a token's second slot of an expert is empty
            earlier = (i < count) & (k < i % K)
            other = tl.load(indices_ptr + i // K * K + k, mask=earlier, other=-1)
            key = tl.where(earlier & (other == expert), E, key)
    else:
        key = tl.where(i < count, 0, SETS)
        for k in range(K):
            expert = tl.load(indices_ptr + i * K + k, mask=i < count, other=-1)
            valid = (expert >= 0) & (expert < E)
            key = key | tl.where(valid, 1 << tl.where(valid, expert, 0).to(tl.int32), 0)
    return key


@triton.jit
def _count_block(
    indices_ptr, ranks_ptr, counts_ptr, block, blocks, count,
    E: tl.constexpr, K: tl.constexpr, SETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes each key's rank among its block's equal ones, and the block's count of each key."""
    begin = block.to(tl.int64) * BLOCK
    i = begin + tl.arange(0, BLOCK)
    key = _keys(indices_ptr, i, count, E, K, SETS)
    rank = tl.zeros((BLOCK,), tl.int32)
    same = tl.zeros((BLOCK,), tl.int32)
    for chunk in range(0, BLOCK, _CHUNK):
        j = begin + chunk + tl.arange(0, _CHUNK)
        equal = key[:, None] == _keys(indices_ptr, j, count, E, K, SETS)[None, :]
        rank += tl.sum((equal & (j[None, :] < i[:, None])).to(tl.int32), 1)
        same += tl.sum(equal.to(tl.int32), 1)
    tl.store(ranks_ptr + i, rank.to(tl.int16), mask=i < count)
    last = (rank == same - 1) & (key < (E if SETS == 0 else SETS))
    tl.store(counts_ptr + key.to(tl.int64) * blocks + block, same, mask=last)


@triton.jit(do_not_specialize=["N", "T", "row_blocks", "token_blocks"])
def flexmore_plan_count(
    indices_ptr, ranks_ptr, counts_ptr, N, T, row_blocks, token_blocks,
    E: tl.constexpr, K: tl.constexpr, SETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs below row_blocks count slots by expert; the others, if any, tokens by set."""
    pid = tl.program_id(0)
    if pid < row_blocks:
        _count_block(indices_ptr, ranks_ptr, counts_ptr, pid, row_blocks, N, E, K, 0, BLOCK)
    elif SETS > 0:
        counts_ptr += E * row_blocks.to(tl.int64)
        block = pid - row_blocks
        _count_block(
            indices_ptr, ranks_ptr + N, counts_ptr, block, token_blocks, T, E, K, SETS, BLOCK
        )


@triton.jit(do_not_specialize=["N", "T", "row_blocks", "token_blocks"])
def flexmore_plan_place(
    indices_ptr, ranks_ptr, ends_ptr, row_to_slot_ptr, slot_to_row_ptr, row_offsets_ptr,
    token_order_ptr, expert_to_row_ptr, N, T, row_blocks, token_blocks,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    SETS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """ends: the inclusive sum of the blocks' counts, so what precedes entry i is ends[i - 1]."""
    pid = tl.program_id(0)
    token = pid.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    k = tl.arange(0, K_PAD)
    real = (token < T)[:, None] & (k < K)[None, :]
    slot = token[:, None] * K + k[None, :]
    expert = tl.load(indices_ptr + slot, mask=real, other=-1)
    routed = real & (expert >= 0) & (expert < E)
    for j in range(K - 1):
        earlier = tl.load(indices_ptr + token * K + j, mask=token < T, other=-1)
        routed &= (k <= j)[None, :] | (expert != earlier[:, None])
    entry = expert * row_blocks + slot // BLOCK
    row = tl.load(ranks_ptr + slot, mask=routed, other=0).to(tl.int32)
    row += tl.load(ends_ptr + entry - 1, mask=routed & (entry > 0), other=0)
    tl.store(row_to_slot_ptr + row, slot.to(tl.int32), mask=routed)
    row = tl.where(routed, row, -1)
    tl.store(slot_to_row_ptr + slot, row, mask=real)
    used = tl.load(ends_ptr + E * row_blocks.to(tl.int64) - 1)
    tl.store(row_to_slot_ptr + slot, tl.full(slot.shape, -1, tl.int32), mask=real & (slot >= used))

    if pid == 0:
        end = ends_ptr + e.to(tl.int64) * row_blocks - 1
        tl.store(row_offsets_ptr + e, tl.load(end, mask=(e > 0) & (e <= E), other=0), mask=e <= E)

    if SETS > 0:
        own = expert[:, :, None] == e[None, None, :]
        found = tl.max(tl.where(own, row[:, :, None], -1), 1)
        at = token[:, None] * E + e[None, :]
        tl.store(expert_to_row_ptr + at, found, mask=(token < T)[:, None] & (e < E)[None, :])
        in_set = (found >= 0) & (e < E)[None, :]
        key = tl.sum(tl.where(in_set, 1 << e[None, :], 0), 1).to(tl.int64)
        entry = E * row_blocks.to(tl.int64) + key * token_blocks + token // BLOCK
        place = tl.load(ranks_ptr + N + token, mask=token < T, other=0).to(tl.int32)
        place += tl.load(ends_ptr + entry - 1, mask=token < T, other=0) - used
        tl.store(token_order_ptr + place, token.to(tl.int32), mask=token < T)


def plan(
    indices_TK: Tensor, num_experts: int, by_set: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_to_slot, slot_to_row, row_offsets, token_order, expert_to_row), all int32."""
    (T, K), E = indices_TK.shape, num_experts
    N = T * K

    def int32(*shape):
        return indices_TK.new_empty(shape, dtype=torch.int32)

    row_to_slot, slot_to_row, row_offsets = int32(N), int32(T, K), int32(E + 1)
    token_order, expert_to_row = (int32(T), int32(T, E)) if by_set else (int32(0), int32(0, 0))
    if N == 0:
        return row_to_slot, slot_to_row, row_offsets.zero_(), token_order, expert_to_row

    block = 128 if E <= 64 else 512  # the table of counts has E * N / block entries
    sets = 1 << E if by_set else 0
    row_blocks = triton.cdiv(N, block)
    token_blocks = triton.cdiv(T, block) if by_set else 0
    ranks = indices_TK.new_empty(N + T if by_set else N, dtype=torch.int16)
    counts = indices_TK.new_zeros(E * row_blocks + sets * token_blocks, dtype=torch.int32)
    k_pad = tiles.padded(K)
    block_t = max(1, 256 // k_pad)
    with tiles.device_guard(indices_TK):
        flexmore_plan_count[(row_blocks + token_blocks,)](
            indices_TK, ranks, counts, N, T, row_blocks, token_blocks,
            E=E, K=K, SETS=sets, BLOCK=block, num_warps=4 if block == 128 else 8,
        )  # fmt: skip
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        flexmore_plan_place[(triton.cdiv(T, block_t),)](
            indices_TK, ranks, ends, row_to_slot, slot_to_row, row_offsets,
            token_order, expert_to_row, N, T, row_blocks, token_blocks,
            E=E, E_PAD=tiles.padded(E + 1), K=K, K_PAD=k_pad, SETS=sets,
            BLOCK=block, BLOCK_T=block_t, num_warps=4,
        )  # fmt: skip
    return row_to_slot, slot_to_row, row_offsets, token_order, expert_to_row

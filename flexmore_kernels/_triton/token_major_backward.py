"""The middle of the backward for few experts of small ranks, token-major, in one kernel.

From the saved G, U and the gradient of mixed it computes, expert by expert and without a row in
between, the pre-activations again, h, and their gradients; dG and dU are summed over a token's
experts in registers, so the base's products of the backward read one row a token, as in the
forward. Tiles and the order of a tile's experts are `token_major.mix`'s.

    g = G + S_g B_g^T,  u = U + S_u B_u^T,  h = silu(g) u          S = A x, all experts' (T, R)
    dh = dmixed + Q A_d                                            Q = B_d^T dy
    dp = <dh, h>, summed over the columns of a tile, a plane a tile
    du = p dh silu(g),  dg = p dh u silu'(g)

Rows of dg, du and h are written only for experts whose factors they are multiplied with.

Floors at T=16384, F=11008, 5 of 7 experts, six of rank 64, bf16, on an H100: 1.8 GB of G, U,
dmixed, dG and dU, 0.6 ms; 5.4 GB of rows if all are wanted, 1.8 ms; 0.6 TFLOP, 0.8 ms. Measured
with all rows: 7.4 ms (255 registers, a block of 8 warps a multiprocessor).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ragged
from . import tiles
from .tiles import add_product, aligned, packed_offset, ragged_tile, sigmoid

ROWS_H, ROWS_GATE, ROWS_UP = 1, 2, 4
"""In `writes`: which rows of an expert are wanted."""


@triton.jit
def flexmore_token_mix_backward(
    dgate_ptr, dup_ptr, rows_gate_ptr, rows_up_ptr, rows_ptr, dots_ptr,
    gate_ptr, up_ptr, dmixed_ptr, weights_ptr, token_order_ptr, expert_to_row_ptr, row_to_slot_ptr,
    s_ptr, q_ptr, b_gate_ptr, ranks_gate_ptr, offsets_gate_ptr, b_up_ptr, ranks_up_ptr,
    offsets_up_ptr, a_down_ptr, ranks_down_ptr, offsets_down_ptr, writes_ptr,
    T, F, N, R, Q, stride_bg_f, stride_bg_r, stride_bu_f, stride_bu_r, stride_ad_r, stride_ad_f,
    E: tl.constexpr, E_PAD: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    column_live = (column < F)[None, :]
    live = (place < T)[:, None] & column_live
    token = tl.load(token_order_ptr + place, mask=place < T, other=0)
    e = tl.arange(0, E_PAD)
    chosen = expert_to_row_ptr + token[:, None] * E + e[None, :]
    chosen = tl.load(chosen, mask=(place < T)[:, None] & (e < E)[None, :], other=-1)
    slot = tl.load(row_to_slot_ptr + chosen, mask=chosen >= 0, other=0)
    weights = tl.load(weights_ptr + slot, mask=chosen >= 0, other=0.0).to(ACC)
    ranks_g = tl.load(ranks_gate_ptr + e, mask=e < E, other=0)
    ranks_u = tl.load(ranks_up_ptr + e, mask=e < E, other=0)
    ranks_d = tl.load(ranks_down_ptr + e, mask=e < E, other=0)
    offsets_g = tl.load(offsets_gate_ptr + e, mask=e < E, other=0)
    offsets_u = tl.load(offsets_up_ptr + e, mask=e < E, other=0)
    offsets_d = tl.load(offsets_down_ptr + e, mask=e < E, other=0)
    writes = tl.load(writes_ptr + e, mask=e < E, other=0)
    # The experts of the tile, four bits each, in ascending order.
    present = tl.max((chosen >= 0).to(tl.int32), 0)
    nibble = tl.cumsum(present, 0) - present
    order = tl.sum(tl.where(present > 0, e << (4 * nibble), 0), 0)

    at = token.to(tl.int64)[:, None] * F + column[None, :]
    gate = tl.load(gate_ptr + at, mask=live, other=0.0)
    up = tl.load(up_ptr + at, mask=live, other=0.0)
    dmixed = tl.load(dmixed_ptr + at, mask=live, other=0.0)
    dtype = gate_ptr.dtype.element_ty
    r = tl.arange(0, BLOCK_R)
    s_tile = s_ptr + token.to(tl.int64)[:, None] * R + r[None, :]
    q_tile = q_ptr + token.to(tl.int64)[:, None] * Q + r[None, :]
    # 32 bits reach all of B and A: R is at most MAX_SET_EXPERTS * FUSED_RANK.
    bg_tile = b_gate_ptr + (column[None, :] * stride_bg_f + r[:, None] * stride_bg_r)
    bu_tile = b_up_ptr + (column[None, :] * stride_bu_f + r[:, None] * stride_bu_r)
    ad_tile = a_down_ptr + (column[None, :] * stride_ad_f + r[:, None] * stride_ad_r)
    s_up = aligned(tl.load(offsets_gate_ptr + E), ALIGN)
    dots_ptr += tl.program_id(0).to(tl.int64) * N
    dgate = tl.zeros((BLOCK_T, BLOCK_F), ACC)
    dup = tl.zeros((BLOCK_T, BLOCK_F), ACC)
    for step in tl.range(0, tl.sum(present, 0), num_stages=STAGES):
        is_e = e == (order >> (4 * step)) & 15
        row = tl.max(tl.where(is_e[None, :], chosen, -1), 1)
        weight = tl.sum(tl.where(is_e[None, :], weights, 0.0), 1)
        rank_g = aligned(tl.sum(tl.where(is_e, ranks_g, 0), 0), ALIGN)
        rank_u = aligned(tl.sum(tl.where(is_e, ranks_u, 0), 0), ALIGN)
        rank_d = aligned(tl.sum(tl.where(is_e, ranks_d, 0), 0), ALIGN)
        at_g = aligned(tl.sum(tl.where(is_e, offsets_g, 0), 0), ALIGN)
        at_u = aligned(tl.sum(tl.where(is_e, offsets_u, 0), 0), ALIGN)
        at_d = aligned(tl.sum(tl.where(is_e, offsets_d, 0), 0), ALIGN)
        sg = tl.load(s_tile + at_g, mask=(r < rank_g)[None, :], other=0.0)
        su = tl.load(s_tile + (s_up + at_u), mask=(r < rank_u)[None, :], other=0.0)
        q = tl.load(q_tile + at_d, mask=(r < rank_d)[None, :], other=0.0)
        bg_live = (r < rank_g)[:, None] & column_live
        bu_live = (r < rank_u)[:, None] & column_live
        ad_live = (r < rank_d)[:, None] & column_live
        bg = tl.load(bg_tile + at_g * stride_bg_r, mask=bg_live, other=0.0)
        bu = tl.load(bu_tile + at_u * stride_bu_r, mask=bu_live, other=0.0)
        ad = tl.load(ad_tile + at_d * stride_ad_r, mask=ad_live, other=0.0)
        g = add_product(gate.to(ACC), sg, bg, PRECISION, ACC)
        share = sigmoid(g, dtype)
        silu = g * share
        u = add_product(up.to(ACC), su, bu, PRECISION, ACC)
        h = silu * u
        dh = add_product(dmixed.to(ACC), q, ad, PRECISION, ACC)
        # Selected, not multiplied: Inf or NaN of experts not chosen must not reach the sums.
        row_live = (row >= 0)[:, None]
        dot = tl.sum(tl.where(row_live, dh * h, 0.0), 1)
        tl.store(dots_ptr + row, dot, mask=row >= 0)
        dh = weight[:, None] * dh
        du = dh * silu
        dg = dh * u * (share + silu * (1.0 - share))
        dup += tl.where(row_live, du, 0.0)
        dgate += tl.where(row_live, dg, 0.0)
        written = tl.sum(tl.where(is_e, writes, 0), 0)
        out = row.to(tl.int64)[:, None] * F + column[None, :]
        wanted = row_live & column_live
        all_of = tl.zeros_like(row)[:, None] + written
        tl.store(rows_ptr + out, h.to(dtype), mask=wanted & ((all_of & 1) > 0))
        tl.store(rows_gate_ptr + out, dg.to(dtype), mask=wanted & ((all_of & 2) > 0))
        tl.store(rows_up_ptr + out, du.to(dtype), mask=wanted & ((all_of & 4) > 0))
    tl.store(dgate_ptr + at, dgate.to(dtype), mask=live)
    tl.store(dup_ptr + at, dup.to(dtype), mask=live)


@triton.jit
def flexmore_token_rows(
    z_ptr, s_ptr, weights_ptr, row_to_slot_ptr, row_offsets_ptr, ranks_ptr, offsets_ptr, K, R,
    E: tl.constexpr, E_PAD: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    expert, begin, end = ragged_tile(tl.program_id(0), row_offsets_ptr, E, E_PAD, BLOCK_M)
    if begin >= end:
        return
    rank = aligned(tl.load(ranks_ptr + expert), ALIGN)
    row = begin + tl.arange(0, BLOCK_M)
    live = (row < end)[:, None]
    slot = tl.load(row_to_slot_ptr + row, mask=row < end, other=0)
    start = tl.load(row_offsets_ptr + expert)
    z_ptr += aligned(packed_offset(expert, row_offsets_ptr, ranks_ptr, E, E_PAD), ALIGN)
    z_rows = z_ptr + (row - start)[:, None] * rank
    s_rows = s_ptr + (slot // K).to(tl.int64)[:, None] * R
    s_rows += aligned(tl.load(offsets_ptr + expert), ALIGN)
    for first in range(0, rank, BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R))[None, :]
        s = tl.load(s_rows + r, mask=live & (r < rank), other=0.0)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + slot, mask=row < end, other=0.0)[:, None]
            s = (s * weight).to(z_ptr.dtype.element_ty)
        tl.store(z_rows + r, s, mask=live & (r < rank))


def token_rows(
    s: Tensor, plan: ragged.RoutingPlan, ranks: tuple[int, ...], weights: Tensor | None = None
) -> Tensor:
    """The packed z of s (T, R): of each row its token's columns of its expert, times its weight.

    Rows of s may lie apart: the columns of one projection among others'.
    """
    size = ragged.packed_size(ranks, plan.num_tokens, plan.indices.shape[1])
    z, E, block = s.new_empty(size), plan.num_experts, 64
    if not size:
        return z
    with tiles.device_guard(s):
        flexmore_token_rows[(tiles.max_tiles(plan.num_rows, E, block),)](
            z, s, weights, plan.row_to_slot, plan.row_offsets,
            ragged.ranks_tensor(ranks, s.device), ragged.rank_offsets_tensor(ranks, s.device),
            plan.indices.shape[1], s.stride(0), E=E, E_PAD=tiles.padded(E),
            ALIGN=tiles.alignment(ranks), BLOCK_M=block,
            BLOCK_R=min(64, tiles.padded(max(ranks), 16)), num_warps=4,
        )  # fmt: skip
    return z


def mix_backward(
    dmixed: Tensor, gate: Tensor, up: Tensor, weights: Tensor, plan: ragged.RoutingPlan,
    s: Tensor, q: Tensor, b_gate: Tensor, ranks_gate: tuple[int, ...], b_up: Tensor,
    ranks_up: tuple[int, ...], a_down: Tensor, ranks_down: tuple[int, ...],
    writes: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dgate, dup (T, F); rows (N, F) of dgate, dup and h; dp of each row, (N,).

    dmixed (T, F) is W_d^T dy, not yet times a weight; s (T, R_gate + R_up) A x and q (T, R_down)
    B_d^T dy of all experts. writes: an expert's ROWS_H + ROWS_GATE + ROWS_UP that are wanted; other
    rows hold anything, as those of no expert.
    """
    (T, F), N, device = gate.shape, plan.num_rows, gate.device
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    rows = [
        gate.new_empty(N if any(which & bit for which in writes) else 0, F)
        for bit in (ROWS_GATE, ROWS_UP, ROWS_H)
    ]
    depth = tiles.padded(max(*ranks_gate, *ranks_up, *ranks_down), 16)
    block = 64 if gate.element_size() == 2 else 32
    stage, fixed = 6 * block * depth * gate.element_size(), 2 * block * block * 4
    stages = tiles.fitting_stages(stage, 2, tiles.shared_memory(device), fixed)
    align = tiles.alignment(ranks_gate, ranks_up, ranks_down)
    tile = tiles.Tile(block, block, depth, 8, stages)
    tile = tiles.tile("token_mix_backward", gate, tile, usual=align > 1 and F % 8 == 0)
    tiles_f = triton.cdiv(F, tile.columns)
    dots = gate.new_zeros(tiles_f, N, dtype=tiles.torch_accumulator(gate.dtype))
    if gate.numel() == 0:
        return dgate, dup, *rows, dots.sum(0)
    with tiles.device_guard(gate):
        flexmore_token_mix_backward[(tiles_f, triton.cdiv(T, tile.rows))](
            dgate, dup, *rows, dots, gate, up, dmixed, weights, plan.token_order,
            plan.expert_to_row, plan.row_to_slot, s, q,
            b_gate, ragged.ranks_tensor(ranks_gate, device),
            ragged.rank_offsets_tensor(ranks_gate, device),
            b_up, ragged.ranks_tensor(ranks_up, device),
            ragged.rank_offsets_tensor(ranks_up, device),
            a_down, ragged.ranks_tensor(ranks_down, device),
            ragged.rank_offsets_tensor(ranks_down, device),
            ragged.ranks_tensor(writes, device),
            T, F, N, s.shape[1], q.shape[1], *b_gate.stride(), *b_up.stride(), *a_down.stride(),
            E=plan.num_experts, E_PAD=tiles.padded(plan.num_experts),
            ALIGN=align, ACC=tiles.accumulator(gate.dtype),
            PRECISION=tiles.dot_precision(gate.dtype), BLOCK_T=tile.rows, BLOCK_F=tile.columns,
            BLOCK_R=tile.depth, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return dgate, dup, *rows, dots.sum(0)

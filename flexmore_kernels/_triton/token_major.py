"""The forward of few experts of small ranks, token-major: nothing is sorted but the middle's tiles.

Every factor's columns lie side by side, and what multiplies them is dense in tokens: s (T, R) holds
A_e x of all experts for all tokens, because one cuBLAS product of width R = 2 * 6 * 64 costs less
than gathering the chosen rows. Three kernels replace gated_mix, expand and unpermute:

- `mix`: a program owns 64 tokens of like expert sets and 64 columns. Its experts are packed into
  one integer before the loop, so each step's addresses depend on the step alone and the loads of s
  and B for the next experts run while this one's sigmoid does; no load waits for another. Rows of s
  are found by token, the same for every expert, where a packed z is gathered once an expert.
- `weighted`: s_down (T, R) = p_e A_d,e h_e from the packed z, zero for experts not chosen.
- `add_expanded`: y = base + s_down B_d^T, in one accumulator; B_d must be finite, since the zeros
  of s_down meet all of it.

Floors at T=16384, F=11008, 5 of 7 experts, six of rank 64, bf16, on an H100: `mix` as in
gated_mix.py: 0.36 ms of memory and 0.60 for rows of h, 0.25 ms of tensor cores, 0.49 ms of special
functions.
`add_expanded`: 0.42 GB, 0.14 ms; 52 GFLOP, 0.07 ms. Measured on one: `mix` 2.1 ms (with z packed
and no pipeline 3.2; registers, 255 of 255, keep it at two programs a multiprocessor, and 8 warps,
larger tiles or fewer registers were slower), `weighted` 0.03, `add_expanded` 0.25 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ragged
from . import tiles
from .tiles import add_product, aligned, packed_offset, sigmoid


@triton.jit
def flexmore_token_mix(
    mixed_ptr, rows_ptr, gate_ptr, up_ptr, weights_ptr, token_order_ptr, expert_to_row_ptr,
    row_to_slot_ptr, s_ptr, b_gate_ptr, ranks_gate_ptr, offsets_gate_ptr,
    b_up_ptr, ranks_up_ptr, offsets_up_ptr, writes_ptr,
    T, F, R, stride_bg_f, stride_bg_r, stride_bu_f, stride_bu_r,
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
    offsets_g = tl.load(offsets_gate_ptr + e, mask=e < E, other=0)
    offsets_u = tl.load(offsets_up_ptr + e, mask=e < E, other=0)
    writes = tl.load(writes_ptr + e, mask=e < E, other=0)
    # The experts of the tile, four bits each, in ascending order.
    present = tl.max((chosen >= 0).to(tl.int32), 0)
    nibble = tl.cumsum(present, 0) - present
    order = tl.sum(tl.where(present > 0, e << (4 * nibble), 0), 0)

    at = token.to(tl.int64)[:, None] * F + column[None, :]
    gate = tl.load(gate_ptr + at, mask=live, other=0.0)
    up = tl.load(up_ptr + at, mask=live, other=0.0)
    r = tl.arange(0, BLOCK_R)
    s_tile = s_ptr + token.to(tl.int64)[:, None] * R + r[None, :]
    # 32 bits reach all of B: R is at most MAX_SET_EXPERTS * FUSED_RANK.
    bg_tile = b_gate_ptr + (column[None, :] * stride_bg_f + r[:, None] * stride_bg_r)
    bu_tile = b_up_ptr + (column[None, :] * stride_bu_f + r[:, None] * stride_bu_r)
    s_up = aligned(tl.load(offsets_gate_ptr + E), ALIGN)
    mixed = tl.zeros((BLOCK_T, BLOCK_F), ACC)
    for step in tl.range(0, tl.sum(present, 0), num_stages=STAGES):
        is_e = e == (order >> (4 * step)) & 15
        row = tl.max(tl.where(is_e[None, :], chosen, -1), 1)
        weight = tl.sum(tl.where(is_e[None, :], weights, 0.0), 1)
        rank_g = aligned(tl.sum(tl.where(is_e, ranks_g, 0), 0), ALIGN)
        rank_u = aligned(tl.sum(tl.where(is_e, ranks_u, 0), 0), ALIGN)
        at_g = aligned(tl.sum(tl.where(is_e, offsets_g, 0), 0), ALIGN)
        at_u = aligned(tl.sum(tl.where(is_e, offsets_u, 0), 0), ALIGN)
        sg = tl.load(s_tile + at_g, mask=(r < rank_g)[None, :], other=0.0)
        su = tl.load(s_tile + (s_up + at_u), mask=(r < rank_u)[None, :], other=0.0)
        bg_live = (r < rank_g)[:, None] & column_live
        bu_live = (r < rank_u)[:, None] & column_live
        bg = tl.load(bg_tile + at_g * stride_bg_r, mask=bg_live, other=0.0)
        bu = tl.load(bu_tile + at_u * stride_bu_r, mask=bu_live, other=0.0)
        g = add_product(gate.to(ACC), sg, bg, PRECISION, ACC)
        silu = g * sigmoid(g, gate_ptr.dtype.element_ty)
        u = add_product(up.to(ACC), su, bu, PRECISION, ACC)
        h = silu * u
        # Selected, not multiplied: Inf or NaN of experts not chosen must not reach the sum.
        row_live = (row >= 0)[:, None]
        mixed += tl.where(row_live, weight[:, None] * h, 0.0)
        written = tl.zeros_like(row) + tl.sum(tl.where(is_e, writes, 0), 0) > 0
        wanted = row_live & column_live & written[:, None]
        out = rows_ptr + row.to(tl.int64)[:, None] * F + column[None, :]
        tl.store(out, h.to(rows_ptr.dtype.element_ty), mask=wanted)
    tl.store(mixed_ptr + at, mixed.to(mixed_ptr.dtype.element_ty), mask=live)


@triton.jit
def flexmore_token_weighted(
    s_ptr, z_ptr, weights_ptr, expert_to_row_ptr, row_to_slot_ptr, row_offsets_ptr, ranks_ptr,
    offsets_ptr, T, R, E: tl.constexpr, E_PAD: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.load(expert_to_row_ptr + token * E + expert, mask=token < T, other=-1)
    slot = tl.load(row_to_slot_ptr + row, mask=row >= 0, other=0)
    weight = tl.load(weights_ptr + slot, mask=row >= 0, other=0.0)[:, None]
    rank = aligned(tl.load(ranks_ptr + expert), ALIGN)
    start = tl.load(row_offsets_ptr + expert)
    z_offset = aligned(packed_offset(expert, row_offsets_ptr, ranks_ptr, E, E_PAD), ALIGN)
    z_rows = z_ptr + z_offset + (row - start).to(tl.int64)[:, None] * rank
    out = s_ptr + token.to(tl.int64)[:, None] * R + aligned(tl.load(offsets_ptr + expert), ALIGN)
    for first in range(0, rank, BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R))[None, :]
        z = tl.load(z_rows + r, mask=(row >= 0)[:, None] & (r < rank), other=0.0)
        s = (z * weight).to(s_ptr.dtype.element_ty)
        tl.store(out + r, s, mask=(token < T)[:, None] & (r < rank))


@triton.jit
def flexmore_token_add_expanded(
    y_ptr, base_ptr, s_ptr, b_ptr, T, D, R, stride_b_d, stride_b_r,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_d = tl.cdiv(D, BLOCK_D)
    t = tl.program_id(0) // tiles_d * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    t_live, d_live = (t < T)[:, None], (d < D)[None, :]
    at = t.to(tl.int64)[:, None] * D + d[None, :]
    acc = tl.load(base_ptr + at, mask=t_live & d_live, other=0.0).to(ACC)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        s = s_ptr + t.to(tl.int64)[:, None] * R + r[None, :]
        s = tl.load(s, mask=t_live & (r < R)[None, :], other=0.0)
        b = b_ptr + d[None, :].to(tl.int64) * stride_b_d + r[:, None] * stride_b_r
        b = tl.load(b, mask=d_live & (r < R)[:, None], other=0.0)
        acc = add_product(acc, s, b, PRECISION, ACC)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=t_live & d_live)


def mix(
    gate: Tensor, up: Tensor, weights: Tensor, plan: ragged.RoutingPlan, s: Tensor,
    b_gate: Tensor, ranks_gate: tuple[int, ...], b_up: Tensor, ranks_up: tuple[int, ...],
    writes: tuple[int, ...], rows: Tensor,
) -> Tensor:  # fmt: skip
    """mixed (T, F), as `gated_mix`, from s (T, R_gate + R_up), A x of all tokens.

    Into rows (N, F) go those of h of the experts whose `writes` is not 0, and no others.
    """
    (T, F), device = gate.shape, gate.device
    mixed = torch.empty_like(gate)
    if mixed.numel() == 0:
        return mixed
    depth = tiles.padded(max(*ranks_gate, *ranks_up), 16)
    block = 64 if gate.element_size() == 2 else 32
    # The tiles that are exchanged between layouts take their room beside the stages.
    stage, fixed = 4 * block * depth * gate.element_size(), block * block * 4
    stages = tiles.fitting_stages(stage, 3, tiles.shared_memory(device), fixed)
    align = tiles.alignment(ranks_gate, ranks_up)
    tile = tiles.Tile(block, block, depth, 4, stages)
    tile = tiles.tile("token_mix", gate, tile, usual=align > 1 and F % 8 == 0)
    with tiles.device_guard(gate):
        flexmore_token_mix[(triton.cdiv(F, tile.columns), triton.cdiv(T, tile.rows))](
            mixed, rows, gate, up, weights, plan.token_order, plan.expert_to_row,
            plan.row_to_slot, s,
            b_gate, ragged.ranks_tensor(ranks_gate, device),
            ragged.rank_offsets_tensor(ranks_gate, device),
            b_up, ragged.ranks_tensor(ranks_up, device),
            ragged.rank_offsets_tensor(ranks_up, device),
            ragged.ranks_tensor(writes, device),
            T, F, s.shape[1], *b_gate.stride(), *b_up.stride(),
            E=plan.num_experts, E_PAD=tiles.padded(plan.num_experts),
            ALIGN=align, ACC=tiles.accumulator(gate.dtype),
            PRECISION=tiles.dot_precision(gate.dtype), BLOCK_T=tile.rows, BLOCK_F=tile.columns,
            BLOCK_R=tile.depth, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return mixed


def weighted(
    z: Tensor, weights: Tensor, plan: ragged.RoutingPlan, ranks: tuple[int, ...]
) -> Tensor:
    """s (T, R): each token's weight times its experts' blocks of the packed z, 0 for the others."""
    T, R, E = plan.num_tokens, sum(ranks), plan.num_experts
    s = z.new_empty(T, R)
    if s.numel() == 0:
        return s
    with tiles.device_guard(z):
        flexmore_token_weighted[(triton.cdiv(T, 64), E)](
            s, z, weights, plan.expert_to_row, plan.row_to_slot, plan.row_offsets,
            ragged.ranks_tensor(ranks, z.device), ragged.rank_offsets_tensor(ranks, z.device),
            T, R, E=E, E_PAD=tiles.padded(E), ALIGN=tiles.alignment(ranks), BLOCK_T=64,
            BLOCK_R=min(64, tiles.padded(max(ranks), 16)), num_warps=4,
        )  # fmt: skip
    return s


def add_expanded(base: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """y (T, D) in s's dtype = base + s b^T, one sum; base (T, D) in the accumulator's dtype."""
    (T, D), R = base.shape, s.shape[1]
    y = s.new_empty(T, D)
    if y.numel() == 0:
        return y
    safe = tiles.safe_tile(s, tiles.row_block(T, 1, 128), 128, 64, most=3)
    tile = tiles.tile("add_expanded", s, safe, usual=R % 8 == 0 and D % 8 == 0)
    t, d, r = tile.shape
    with tiles.device_guard(s):
        flexmore_token_add_expanded[(triton.cdiv(T, t) * triton.cdiv(D, d),)](
            y, base, s, b, T, D, R, *b.stride(), ACC=tiles.accumulator(s.dtype),
            PRECISION=tiles.dot_precision(s.dtype), BLOCK_T=t, BLOCK_D=d, BLOCK_R=r,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y

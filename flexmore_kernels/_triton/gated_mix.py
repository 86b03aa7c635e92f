"""The middle of the layer in Triton: expand, base, SwiGLU, sum. Maths: reference/gated_mix.py.

With few experts and small ranks one token-major kernel does all of it. A program owns a tile of
tokens in the order of their expert sets (so that most tiles visit only experts that all of their
tokens chose) and some columns of F; it reads G and U once, visits each expert that any of its
tokens chose, and sums in registers. Otherwise two expansions and an elementwise kernel do it.

Floors at T=16384, F=11008, 5 of 7 experts, six of rank 64, bf16, on an H100 (132 multiprocessors):
- memory: G, U in and mixed out 1.08 GB, every h out 1.80 GB: 0.36 + 0.60 ms at 3.0 TB/s;
- tensor cores, 4.3 low-rank experts a token: 0.20 PFLOP, 0.25 ms at 790 TFLOP/s;
- special functions, 2 for each of T K F sigmoids, 16 a clock and multiprocessor: 0.49 ms;
- L2 to shared memory, 32 KB of z and B for each (tile of 64 x 64, expert): 1.1 ms at 5.5 TB/s.

Columns run fastest over the grid: programs in flight at one time then share a few token tiles.
Their z (0.14 MB a tile) and all B (17 MB) stay in L2, since about 11 MB of G, U, mixed and h stream
by between two uses of a piece of B; the other order would keep z and evict B. It also makes the
rows of G, U, mixed and h contiguous in time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ragged
from . import lowrank, tiles
from .tiles import add_product, aligned, sigmoid

_MOST_FUSED_RANK = 256
"""Above this rank the expansion is bound by its products, and needs larger tiles than the fused."""
_MOST_TOKENS = 2**20  # a grid's second axis has at most 65535 programs
_TOGETHER = ((0, 0), (9, 0))  # without wgmma's few registers, two rank loops in turn are better
_ZERO_TILES = 8  # row tiles of programs that write the zeros of the tail


@triton.jit
def _add_delta(
    acc, z_rows, b_columns, row_live, column_live, rank, stride_br,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + z B^T for a tile; rows of z that do not exist count as zero."""
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        z = tl.load(z_rows + r[None, :], mask=row_live & (r < rank)[None, :], other=0.0)
        b_live = (r < rank)[:, None] & column_live
        b = tl.load(b_columns + r[:, None] * stride_br, mask=b_live, other=0.0)
        acc = add_product(acc, z, b, PRECISION, ACC)
    return acc


@triton.jit
def flexmore_gated_mix(
    mixed_ptr, rows_ptr, gate_ptr, up_ptr, weights_ptr, token_order_ptr, expert_to_row_ptr,
    row_to_slot_ptr, row_offsets_ptr, z_gate_ptr, b_gate_ptr, ranks_gate_ptr,
    z_up_ptr, b_up_ptr, ranks_up_ptr,
    T, F, N, token_tiles, stride_bg_f, stride_bg_r, stride_bu_f, stride_bu_r,
    E: tl.constexpr, E_PAD: tl.constexpr, TOGETHER: tl.constexpr, ALIGN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, ZERO_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    column_live = (column < F)[None, :]
    place = tl.arange(0, BLOCK_T)
    if tile >= token_tiles:  # the last programs write the zeros of the rows of no expert
        first = tl.load(row_offsets_ptr + E) + (tile - token_tiles) * BLOCK_T
        while first < N:
            row = first + place
            out = rows_ptr + row.to(tl.int64)[:, None] * F + column[None, :]
            zeros = tl.zeros(out.shape, rows_ptr.dtype.element_ty)
            tl.store(out, zeros, mask=(row < N)[:, None] & column_live)
            first += ZERO_TILES * BLOCK_T
        return
    place += tile * BLOCK_T
    token = tl.load(token_order_ptr + place, mask=place < T, other=0)
    e = tl.arange(0, E_PAD)
    chosen = expert_to_row_ptr + token[:, None] * E + e[None, :]
    chosen = tl.load(chosen, mask=(place < T)[:, None] & (e < E)[None, :], other=-1)
    present = tl.sum(tl.max((chosen >= 0).to(tl.int32), 0) << e, 0)

    live = (place < T)[:, None] & column_live
    at = token.to(tl.int64)[:, None] * F + column[None, :]
    gate = tl.load(gate_ptr + at, mask=live, other=0.0)
    up = tl.load(up_ptr + at, mask=live, other=0.0)
    mixed = tl.zeros((BLOCK_T, BLOCK_F), ACC)
    gate_column = column[None, :] * stride_bg_f
    up_column = column[None, :] * stride_bu_f
    for expert in range(E):
        start = tl.load(row_offsets_ptr + expert)
        count = tl.load(row_offsets_ptr + expert + 1) - start
        rank_g = aligned(tl.load(ranks_gate_ptr + expert), ALIGN)
        rank_u = aligned(tl.load(ranks_up_ptr + expert), ALIGN)
        if (present >> expert) & 1:
            # Read again, not kept: registers limit how many programs run at a time.
            token = tl.load(token_order_ptr + place, mask=place < T, other=0)
            row = tl.load(expert_to_row_ptr + token * E + expert, mask=place < T, other=-1)
            slot = tl.load(row_to_slot_ptr + row, mask=row >= 0, other=0)
            weight = tl.load(weights_ptr + slot, mask=row >= 0, other=0.0).to(ACC)
            row_live = (row >= 0)[:, None]
            g = gate.to(ACC)
            u = up.to(ACC)
            z_row = (row - start)[:, None] * rank_g
            if TOGETHER:  # gate and up of equal ranks: twice the loads in flight
                for first in range(0, rank_g, BLOCK_R):
                    r = first + tl.arange(0, BLOCK_R)
                    z_live = row_live & (r < rank_g)[None, :]
                    b_live = (r < rank_g)[:, None] & column_live
                    z_at = z_row + r[None, :]
                    gate_at = gate_column + r[:, None] * stride_bg_r
                    up_at = up_column + r[:, None] * stride_bu_r
                    zg = tl.load(z_gate_ptr + z_at, mask=z_live, other=0.0)
                    bg = tl.load(b_gate_ptr + gate_at, mask=b_live, other=0.0)
                    zu = tl.load(z_up_ptr + z_at, mask=z_live, other=0.0)
                    bu = tl.load(b_up_ptr + up_at, mask=b_live, other=0.0)
                    g = add_product(g, zg, bg, PRECISION, ACC)
                    u = add_product(u, zu, bu, PRECISION, ACC)
            else:
                g = _add_delta(
                    g, z_gate_ptr + z_row, b_gate_ptr + gate_column, row_live, column_live,
                    rank_g, stride_bg_r, ACC, PRECISION, BLOCK_R,
                )  # fmt: skip
                z_row = (row - start)[:, None] * rank_u
                u = _add_delta(
                    u, z_up_ptr + z_row, b_up_ptr + up_column, row_live, column_live,
                    rank_u, stride_bu_r, ACC, PRECISION, BLOCK_R,
                )  # fmt: skip
            h = g * sigmoid(g, gate_ptr.dtype.element_ty) * u
            # Selected, not multiplied: Inf or NaN of experts not chosen must not reach the sum.
            mixed = tl.where(row_live, mixed + weight[:, None] * h, mixed)
            out = rows_ptr + row.to(tl.int64)[:, None] * F + column[None, :]
            tl.store(out, h.to(rows_ptr.dtype.element_ty), mask=row_live & column_live)
        # On to the next expert's block of the packed z and columns of B.
        z_gate_ptr += count.to(tl.int64) * rank_g
        z_up_ptr += count.to(tl.int64) * rank_u
        b_gate_ptr += rank_g.to(tl.int64) * stride_bg_r
        b_up_ptr += rank_u.to(tl.int64) * stride_bu_r
    token = tl.load(token_order_ptr + place, mask=place < T, other=0)
    out = mixed_ptr + token.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(out, mixed.to(mixed_ptr.dtype.element_ty), mask=live)


def _config(gate: Tensor, ranks: tuple[int, ...]) -> dict:
    """Tile and launch options of the fused kernel.

    On Hopper eight warps a tile of 64 x 64 and at most 128 registers let two programs run at a time
    on a multiprocessor: one waits for memory while the other computes. Scalar loads, of ranks or
    rows that are not aligned, and older tensor cores need more registers than that.
    """
    depth = min(64, tiles.padded(max(ranks), 16))
    config = {"BLOCK_T": 64, "BLOCK_F": 64, "BLOCK_R": depth, "num_warps": 8, "num_stages": 2}
    if gate.element_size() >= 4:
        return config | {"BLOCK_T": 32, "BLOCK_F": 32, "BLOCK_R": min(32, depth)}
    vector_loads = tiles.alignment(ranks) > 1 and gate.shape[1] % 8 == 0
    if vector_loads and tiles.capability(gate.device) == (9, 0):
        config["maxnreg"] = 128
    return config


def gated_mix(
    gate: Tensor, up: Tensor, weights: Tensor, plan: ragged.RoutingPlan,
    z_gate: Tensor, b_gate: Tensor, ranks_gate: tuple[int, ...],
    z_up: Tensor, b_up: Tensor, ranks_up: tuple[int, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(mixed (T, F) = sum of w h over a token's rows, rows (N, F) = h), with h = silu(g) u."""
    T, F = gate.shape
    N = plan.row_to_slot.shape[0]
    both = (*ranks_gate, *ranks_up)
    if not 0 < plan.token_order.numel() <= _MOST_TOKENS or max(both) > _MOST_FUSED_RANK:
        rows_gate, rows_up = (
            lowrank.expand(
                z, b, plan.row_offsets, ranks, N, base, plan.row_to_slot, plan.top_k, gather=True
            )
            for z, b, ranks, base in (
                (z_gate, b_gate, ranks_gate, gate),
                (z_up, b_up, ranks_up, up),
            )
        )
        return swiglu_mix(rows_gate, rows_up, weights, plan.slot_to_row)
    mixed, rows = torch.empty_like(gate), gate.new_empty(N, F)
    if mixed.numel() == 0:
        return mixed, rows
    config = _config(gate, both)
    token_tiles = triton.cdiv(T, config["BLOCK_T"])
    grid = (triton.cdiv(F, config["BLOCK_F"]), token_tiles + _ZERO_TILES)
    with tiles.device_guard(gate):
        flexmore_gated_mix[grid](
            mixed, rows, gate, up, weights, plan.token_order, plan.expert_to_row,
            plan.row_to_slot, plan.row_offsets,
            z_gate, b_gate, ragged.ranks_tensor(ranks_gate, gate.device),
            z_up, b_up, ragged.ranks_tensor(ranks_up, gate.device),
            T, F, N, token_tiles, *b_gate.stride(), *b_up.stride(),
            E=plan.num_experts, E_PAD=tiles.padded(plan.num_experts),
            TOGETHER=ranks_gate == ranks_up and tiles.capability(gate.device) in _TOGETHER,
            ALIGN=tiles.alignment(both), ACC=tiles.accumulator(gate.dtype),
            PRECISION=tiles.dot_precision(gate.dtype), ZERO_TILES=_ZERO_TILES, **config,
        )  # fmt: skip
    return mixed, rows


@triton.jit
def flexmore_swiglu_mix(
    mixed_ptr, rows_ptr, gate_ptr, up_ptr, weights_ptr, slot_to_row_ptr, used_ptr,
    T, F, N, K, ACC: tl.constexpr, ZEROERS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    tiles_f = tl.cdiv(F, BLOCK_F)
    token = (tl.program_id(0) // tiles_f).to(tl.int64)
    column = tl.program_id(0) % tiles_f * BLOCK_F + tl.arange(0, BLOCK_F)
    live = column < F
    if token >= T:  # the last programs write the zeros of the rows of no expert
        row = tl.load(used_ptr) + token - T
        while row < N:
            zeros = tl.zeros((BLOCK_F,), rows_ptr.dtype.element_ty)
            tl.store(rows_ptr + row * F + column, zeros, mask=live)
            row += ZEROERS
        return
    mixed = tl.zeros((BLOCK_F,), ACC)
    for k in range(K):
        row = tl.load(slot_to_row_ptr + token * K + k).to(tl.int64)
        if row >= 0:
            g = tl.load(gate_ptr + row * F + column, mask=live, other=0.0).to(ACC)
            u = tl.load(up_ptr + row * F + column, mask=live, other=0.0).to(ACC)
            h = g * sigmoid(g, gate_ptr.dtype.element_ty) * u
            mixed += tl.load(weights_ptr + token * K + k).to(ACC) * h
            tl.store(rows_ptr + row * F + column, h.to(rows_ptr.dtype.element_ty), mask=live)
    tl.store(mixed_ptr + token * F + column, mixed.to(mixed_ptr.dtype.element_ty), mask=live)


@triton.jit
def flexmore_swiglu_mix_backward(
    dgate_ptr, dup_ptr, dweights_ptr, rows_ptr, dmixed_ptr, drows_ptr, gate_ptr, up_ptr,
    weights_ptr, row_to_slot_ptr, F, K, ACC: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_to_slot_ptr + row)
    weight = tl.load(weights_ptr + slot, mask=slot >= 0, other=0.0).to(ACC)
    token = tl.maximum(slot // K, 0).to(tl.int64)
    routed = tl.where(slot >= 0, F, 0)  # a row of no expert reads zeros, hence writes zeros
    dot = tl.zeros((BLOCK_F,), ACC)
    for first in range(0, F, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        live = column < F
        at = row * F + column
        read = column < routed
        g = tl.load(gate_ptr + at, mask=read, other=0.0).to(ACC)
        u = tl.load(up_ptr + at, mask=read, other=0.0).to(ACC)
        dmixed = tl.load(dmixed_ptr + token * F + column, mask=read, other=0.0).to(ACC)
        s = sigmoid(g, gate_ptr.dtype.element_ty)
        silu = g * s
        h = silu * u
        dot += dmixed * h
        dh = weight * dmixed
        if drows_ptr is not None:
            dh += tl.load(drows_ptr + at, mask=read, other=0.0).to(ACC)
        dtype = rows_ptr.dtype.element_ty
        tl.store(rows_ptr + at, h.to(dtype), mask=live)
        tl.store(dup_ptr + at, (dh * silu).to(dtype), mask=live)
        tl.store(dgate_ptr + at, (dh * u * (s + silu * (1.0 - s))).to(dtype), mask=live)
    tl.store(dweights_ptr + row, tl.sum(dot, 0))


def swiglu_mix(gate: Tensor, up: Tensor, weights: Tensor, slot_to_row: Tensor):
    """mixed (T, F), rows (N, F) as `gated_mix`, from the rows' own pre-activations (N, F)."""
    (T, K), (N, F) = slot_to_row.shape, gate.shape
    mixed, rows = gate.new_empty(T, F), torch.empty_like(gate)
    if mixed.numel() == 0 or rows.numel() == 0:
        return mixed.zero_(), rows.zero_()
    block = min(1024, tiles.padded(F))
    used = slot_to_row.amax() + 1
    with tiles.device_guard(gate):
        flexmore_swiglu_mix[(triton.cdiv(F, block) * (T + _ZERO_TILES),)](
            mixed, rows, gate, up, weights, slot_to_row, used, T, F, N, K,
            ACC=tiles.accumulator(gate.dtype), ZEROERS=_ZERO_TILES, BLOCK_F=block, num_warps=4,
        )  # fmt: skip
    return mixed, rows


def swiglu_mix_backward(
    dmixed: Tensor, drows: Tensor | None, gate: Tensor, up: Tensor, weights: Tensor,
    row_to_slot: Tensor, top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dgate, dup, dweights (N,) per row, rows recomputed); one program sums a whole row."""
    N, F = gate.shape
    dgate, dup, rows = (torch.empty_like(gate) for _ in range(3))
    dweights = gate.new_zeros(N, dtype=tiles.torch_accumulator(gate.dtype))
    if gate.numel() == 0:
        return dgate, dup, dweights, rows
    with tiles.device_guard(gate):
        flexmore_swiglu_mix_backward[(N,)](
            dgate, dup, dweights, rows, dmixed, drows, gate, up, weights, row_to_slot, F, top_k,
            ACC=tiles.accumulator(gate.dtype), BLOCK_F=min(1024, tiles.padded(F)), num_warps=4,
        )  # fmt: skip
    return dgate, dup, dweights, rows

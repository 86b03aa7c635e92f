"""Moving rows to experts and back in Triton. Maths: reference/permutation.py.

A program owns whole output elements and sums in a fixed order, so nothing is added concurrently and
the bits never change. All are bound by memory traffic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles


@triton.jit(do_not_specialize=["T"])
def flexmore_permute(
    x_ptr, row_to_slot_ptr, slot_to_row_ptr, out_ptr, T, D,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reads a token once and writes all its rows. The tail, as many rows as there are empty slots,
    is zeroed by the programs whose slots have the tail's row numbers.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BLOCK_D)
    token = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (token < T)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + token[:, None] * D + d[None, :], mask=inside, other=0)
    zeros = tl.zeros((ROWS, BLOCK_D), out_ptr.dtype.element_ty)
    for k in range(K):
        slot = token * K + k
        row = tl.load(slot_to_row_ptr + slot, mask=token < T, other=-1).to(tl.int64)
        out_at = out_ptr + row[:, None] * D + d[None, :]
        tl.store(out_at, x, mask=inside & (row >= 0)[:, None])
        routed = tl.load(row_to_slot_ptr + slot, mask=token < T, other=0) >= 0
        tail_at = out_ptr + slot[:, None] * D + d[None, :]
        tl.store(tail_at, zeros, mask=inside & ~routed[:, None])


@triton.jit(do_not_specialize=["T"])
def flexmore_unpermute(
    x_ptr, slot_to_row_ptr, weights_ptr, base_ptr, out_ptr, T, D,
    K: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BLOCK_D)
    token = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = token[:, None] * D + d[None, :]
    inside = (token < T)[:, None] & (d < D)[None, :]
    total = tl.zeros((ROWS, BLOCK_D), ACC)
    if base_ptr is not None:
        total += tl.load(base_ptr + at, mask=inside, other=0).to(ACC)
    for k in range(K):
        row = tl.load(slot_to_row_ptr + token * K + k, mask=token < T, other=-1).to(tl.int64)
        used = (row >= 0)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=used, other=0).to(ACC)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + token * K + k, mask=row >= 0, other=0).to(ACC)
            x *= weight[:, None]
        total += x
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def flexmore_unpermute_backward(
    dy_ptr, x_ptr, row_to_slot_ptr, weights_ptr, dx_ptr, dweights_ptr, N, D,
    K: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(row_to_slot_ptr + row, mask=row < N, other=-1)
    token = (slot // K).to(tl.int64)
    weight = tl.load(weights_ptr + slot, mask=slot >= 0, other=0).to(ACC)
    products = tl.zeros((ROWS, BLOCK_D), ACC)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        used = (slot >= 0)[:, None] & (d < D)[None, :]
        at = row[:, None] * D + d[None, :]
        dy = tl.load(dy_ptr + token[:, None] * D + d[None, :], mask=used, other=0).to(ACC)
        x = tl.load(x_ptr + at, mask=used, other=0).to(ACC)
        products += x * dy
        dx = (weight[:, None] * dy).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + at, dx, mask=(row < N)[:, None] & (d < D)[None, :])
    tl.store(dweights_ptr + slot, tl.sum(products, 1), mask=slot >= 0)


def _tile(D: int, itemsize: int) -> dict[str, int]:
    """Tile of a row-moving program: up to 1 KiB to 2 KiB of a row, 8 KiB in all, for 4 warps."""
    block_d = min(tiles.padded(D, 16), 2048 // itemsize)
    return {"ROWS": max(1, min(32, 8192 // (block_d * itemsize))), "BLOCK_D": block_d}


def _programs(rows: int, D: int, tile: dict[str, int]) -> int:
    return triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(D, tile["BLOCK_D"])


def permute(x_TD: Tensor, row_to_slot_N: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    """Rows (N, D): row n is the token of slot row_to_slot[n]; zeros in the tail."""
    (T, D), K = x_TD.shape, slot_to_row_TK.shape[1]
    out_ND = x_TD.new_empty(row_to_slot_N.shape[0], D)
    if T and D:
        tile = _tile(D, x_TD.dtype.itemsize)
        with tiles.device_guard(x_TD):
            flexmore_permute[(_programs(T, D, tile),)](
                x_TD, row_to_slot_N, slot_to_row_TK, out_ND, T, D, K=K, **tile, num_warps=4
            )
    return out_ND


def unpermute(
    x_ND: Tensor, slot_to_row_TK: Tensor, weights_TK: Tensor | None, base_TD: Tensor | None
) -> Tensor:
    """(T, D): base plus the weighted sum of each token's rows, in slot order, rounded once."""
    (T, K), D = slot_to_row_TK.shape, x_ND.shape[1]
    out_TD = x_ND.new_empty(T, D)
    if T and D:
        tile = _tile(D, x_ND.dtype.itemsize)
        with tiles.device_guard(x_ND):
            flexmore_unpermute[(_programs(T, D, tile),)](
                x_ND, slot_to_row_TK, weights_TK, base_TD, out_TD, T, D,
                K=K, ACC=tiles.accumulator(x_ND.dtype), **tile, num_warps=4,
            )  # fmt: skip
    return out_TD


def unpermute_backward(
    dy_TD: Tensor, x_ND: Tensor, row_to_slot_N: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx (N, D), dweights (T, K) acc): dx = w dy of the token, dw = <x, dy>; 0 where no row."""
    N, D = x_ND.shape
    dx_ND = torch.empty_like(x_ND)
    dweights_TK = torch.zeros_like(weights_TK)
    if N and D:
        tile = _tile(D, x_ND.dtype.itemsize)
        with tiles.device_guard(x_ND):
            flexmore_unpermute_backward[(triton.cdiv(N, tile["ROWS"]),)](
                dy_TD, x_ND, row_to_slot_N, weights_TK, dx_ND, dweights_TK, N, D,
                K=weights_TK.shape[1], ACC=tiles.accumulator(x_ND.dtype), **tile, num_warps=4,
            )  # fmt: skip
    return dx_ND, dweights_TK

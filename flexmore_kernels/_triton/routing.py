"""Routing and the plan in Triton. Maths: reference/routing.py.

Routing is one launch: a program holds the logits of a few tokens, ranks them in K rounds of arg-max
and scatters the chosen to their slots. With up to 64 experts the router's matmul is in the same
launch. The plan is in counting_sort.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import counting_sort, tiles
from .tiles import add_product

MAX_FUSED_EXPERTS = 64
"""Up to this many experts the router's matmul is fused into the routing kernel."""


@triton.jit
def _usable(raw, inside, bias_ptr, mask_ptr, mask_t, mask_e, token, e, E, ACC: tl.constexpr):
    """Biased logits, where a softmax may use them, and their largest; all (tokens, experts)."""
    v = raw.to(ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + e - 1, mask=(e > 0) & (e < E), other=0).to(ACC)
        v += tl.where(bias > 0, 0, bias)[None, :]  # keeps a NaN
    allowed = inside
    if mask_ptr is not None:
        at = mask_ptr + token[:, None] * mask_t + e[None, :] * mask_e
        allowed &= tl.load(at, mask=inside, other=0).to(tl.int1)
    nans = tl.sum((allowed & (v != v)).to(tl.int32), 1)
    largest = tl.max(tl.where(allowed & (v == v), v, float("-inf")), 1)
    finite = (nans == 0) & (tl.abs(largest) < float("inf"))
    return v, allowed & finite[:, None], tl.where(finite, largest, 0)


@triton.jit
def _softmax(v, members, largest):
    """Softmax over the members of each row, 0 elsewhere, in float64.

    These are few numbers, and the fp32 exp and division are off by several roundings.
    """
    v64 = tl.where(members, v, float("-inf")).to(tl.float64)
    p = tl.exp(v64 - largest[:, None].to(tl.float64))
    total = tl.sum(p, 1)
    return p / tl.where(total > 0, total, 1)[:, None]


@triton.jit
def _sigmoids(v, members, largest, NORM: tl.constexpr):
    """sigma(v) of the members, 0 elsewhere, and 1 - sigma(v) where v is a number, in float64.

    Renormalised, each sigma is taken times e^-min(largest, 0), which cancels, so that the largest
    does not underflow.
    """
    v64 = tl.where(members, v, 0).to(tl.float64)
    e = tl.exp(-tl.abs(v64))
    low = tl.where(v64 < 0, v64, 0)
    if NORM:
        low -= tl.where(largest < 0, largest, 0)[:, None].to(tl.float64)
    p = tl.exp(tl.where(members, low, float("-inf"))) / (1 + e)
    if NORM:
        total = tl.sum(p, 1)
        p /= tl.where(total > 0, total, 1)[:, None]
    return p, tl.where(v64 < 0, 1, e) / (1 + e)


@triton.jit
def _choose(
    v, usable, largest, token, e, weights_ptr, indices_ptr, T,
    E: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, NORM: tl.constexpr,
    SCORING: tl.constexpr,
):  # fmt: skip
    """Writes the weights and ids of the first K usable experts by (v descending, index)."""
    rank = tl.full(v.shape, K, tl.int32)
    left = usable
    for k in range(K):
        top = tl.max(tl.where(left, v, float("-inf")), 1)
        winners = left & (v == top[:, None])
        first = tl.min(tl.where(winners, e[None, :], E), 1)
        rank = tl.where(left & (e[None, :] == first[:, None]), k, rank)
        left = usable & (rank == K)
    chosen = usable & (rank < K)

    if SCORING == "softmax":
        p = _softmax(v, chosen if NORM else usable, largest)
    elif SCORING == "sigmoid":
        p, _ = _sigmoids(v, chosen, largest, NORM)
    else:
        p = tl.full(v.shape, 1, tl.float64)
        if NORM:
            count = tl.sum(chosen.to(tl.int32), 1)
            p /= tl.where(count > 0, count, 1)[:, None]
    slot = token[:, None] * K + rank
    tl.store(weights_ptr + slot, p.to(v.dtype), mask=chosen)
    tl.store(indices_ptr + slot, tl.broadcast_to(e[None, :], slot.shape).to(tl.int64), mask=chosen)

    k = tl.arange(0, K_PAD)
    count = tl.sum(usable.to(tl.int32), 1)
    empty = (k[None, :] >= count[:, None]) & (k[None, :] < K) & (token[:, None] < T)
    slot = token[:, None] * K + k[None, :]
    tl.store(weights_ptr + slot, tl.zeros(slot.shape, v.dtype), mask=empty)
    tl.store(indices_ptr + slot, tl.full(slot.shape, E, tl.int64), mask=empty)


@triton.jit(do_not_specialize=["T"])
def flexmore_route(
    logits_ptr, bias_ptr, mask_ptr, mask_t, mask_e, weights_ptr, indices_ptr, T,
    E: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, SCORING: tl.constexpr, ACC: tl.constexpr,
    E_PAD: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    inside = (token < T)[:, None] & (e < E)[None, :]
    raw = tl.load(logits_ptr + token[:, None] * E + e[None, :], mask=inside, other=0)
    v, usable, top = _usable(raw, inside, bias_ptr, mask_ptr, mask_t, mask_e, token, e, E, ACC)
    _choose(v, usable, top, token, e, weights_ptr, indices_ptr, T, E, K, K_PAD, NORM, SCORING)


@triton.jit(do_not_specialize=["T"])
def flexmore_route_linear(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, mask_t, mask_e,
    logits_ptr, weights_ptr, indices_ptr, T, D,
    E: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, SCORING: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, E_PAD: tl.constexpr, K_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + token[:, None] * D + d[None, :]
    weight_at = weight_ptr + e[None, :].to(tl.int64) * D + d[:, None]
    sums = tl.zeros((BLOCK_T, E_PAD), ACC)
    for begin in range(0, D, BLOCK_D):
        x = tl.load(x_at, mask=(token < T)[:, None] & (begin + d < D)[None, :], other=0)
        w = tl.load(weight_at, mask=(begin + d < D)[:, None] & (e < E)[None, :], other=0)
        sums = add_product(sums, x, w, PRECISION, ACC)
        x_at += BLOCK_D
        weight_at += BLOCK_D
    raw = sums.to(logits_ptr.dtype.element_ty)
    inside = (token < T)[:, None] & (e < E)[None, :]
    tl.store(logits_ptr + token[:, None] * E + e[None, :], raw, mask=inside)
    v, usable, top = _usable(raw, inside, bias_ptr, mask_ptr, mask_t, mask_e, token, e, E, ACC)
    _choose(v, usable, top, token, e, weights_ptr, indices_ptr, T, E, K, K_PAD, NORM, SCORING)


@triton.jit(do_not_specialize=["T"])
def flexmore_route_backward(
    dweights_ptr, logits_ptr, bias_ptr, mask_ptr, mask_t, mask_e, indices_ptr, dlogits_ptr, T,
    E: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, SCORING: tl.constexpr, ACC: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    inside = (token < T)[:, None] & (e < E)[None, :]
    at = token[:, None] * E + e[None, :]
    raw = tl.load(logits_ptr + at, mask=inside, other=0)
    v, usable, top = _usable(raw, inside, bias_ptr, mask_ptr, mask_t, mask_e, token, e, E, ACC)
    dp = tl.zeros(v.shape, ACC)
    chosen = tl.zeros(v.shape, tl.int1)
    for k in range(K):
        index = tl.load(indices_ptr + token * K + k, mask=token < T, other=-1)
        dweight = tl.load(dweights_ptr + token * K + k, mask=token < T, other=0)
        own = index[:, None] == e[None, :]
        dp = tl.where(own, dweight[:, None], dp)
        chosen = chosen | own
    # Sigmoids, and a softmax that is renormalised, are those of the chosen alone.
    if NORM or SCORING == "sigmoid":
        usable = usable & chosen
    dp = tl.where(usable, dp, 0).to(tl.float64)
    if SCORING == "sigmoid":
        p, slope = _sigmoids(v, usable, top, NORM)
        if NORM:
            dp -= tl.sum(p * dp, 1)[:, None]
        dv = p * slope * dp
    else:
        p = _softmax(v, usable, top)
        dv = p * (dp - tl.sum(p * dp, 1)[:, None])
    tl.store(dlogits_ptr + at, dv.to(ACC), mask=inside)


def _tokens_per_program(E: int) -> tuple[int, int]:
    """(tokens, warps) of a routing program: about 1024 logits, few warps to a long row."""
    pad = tiles.padded(E)
    return max(1, min(64, 1024 // pad)), pad // 128 if pad >= 128 else 4


def _linear_tile(T: int, E: int, itemsize: int, shared: int) -> dict[str, int]:
    """Tile of the fused router: few tokens a program until the machine is full, then wide reads."""
    block_t = 16 if T <= 2048 else 32 if T <= 8192 or E > 32 else 64
    block_d = (512 if block_t == 16 else 256) // itemsize
    stage = (block_t + tiles.padded(E, 16)) * block_d * itemsize
    stages = tiles.fitting_stages(stage, 4, shared, fixed_bytes=8192)
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": 4, "num_stages": stages}


def _mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else mask.stride()


def topk_route(
    logits_TE: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    norm_topk_prob: bool,
    scoring: str,
) -> tuple[Tensor, Tensor]:
    """Weights (T, K) acc and indices (T, K) int64 from the logits; softmax, sigmoid or unit."""
    T, E = logits_TE.shape
    dtype = logits_TE.dtype
    weights_TK = logits_TE.new_empty(T, top_k, dtype=tiles.torch_accumulator(dtype))
    indices_TK = logits_TE.new_empty(T, top_k, dtype=torch.int64)
    if T:
        block, warps = _tokens_per_program(E)
        with tiles.device_guard(logits_TE):
            flexmore_route[(triton.cdiv(T, block),)](
                logits_TE, bias, mask, *_mask_strides(mask), weights_TK, indices_TK, T,
                E=E, K=top_k, NORM=norm_topk_prob, SCORING=scoring,
                ACC=tiles.accumulator(dtype), E_PAD=tiles.padded(E), K_PAD=tiles.padded(top_k),
                BLOCK_T=block, num_warps=warps,
            )  # fmt: skip
    return weights_TK, indices_TK


def topk_route_linear(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    norm_topk_prob: bool,
    scoring: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, E) in x's dtype, then as `topk_route`."""
    (T, D), E = x_TD.shape, weight_ED.shape[0]
    if E > MAX_FUSED_EXPERTS:
        logits_TE = F.linear(x_TD, weight_ED)
        return logits_TE, *topk_route(logits_TE, bias, mask, top_k, norm_topk_prob, scoring)
    dtype = x_TD.dtype
    logits_TE = x_TD.new_empty(T, E)
    weights_TK = x_TD.new_empty(T, top_k, dtype=tiles.torch_accumulator(dtype))
    indices_TK = x_TD.new_empty(T, top_k, dtype=torch.int64)
    if T:
        tile = _linear_tile(T, E, dtype.itemsize, tiles.shared_memory(x_TD.device))
        with tiles.device_guard(x_TD):
            flexmore_route_linear[(triton.cdiv(T, tile["BLOCK_T"]),)](
                x_TD, weight_ED, bias, mask, *_mask_strides(mask),
                logits_TE, weights_TK, indices_TK, T, D,
                E=E, K=top_k, NORM=norm_topk_prob, SCORING=scoring,
                ACC=tiles.accumulator(dtype), PRECISION=tiles.dot_precision(dtype),
                E_PAD=tiles.padded(E, 16), K_PAD=tiles.padded(top_k), **tile,
            )  # fmt: skip
    return logits_TE, weights_TK, indices_TK


def topk_route_backward(
    dweights_TK: Tensor,
    logits_TE: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    indices_TK: Tensor,
    norm_topk_prob: bool,
    scoring: str,
) -> Tensor:
    """The gradient (T, E), acc, with respect to the biased logits; scoring softmax or sigmoid."""
    T, E = logits_TE.shape
    dlogits_TE = torch.empty_like(logits_TE, dtype=dweights_TK.dtype)
    if T:
        block, warps = _tokens_per_program(E)
        with tiles.device_guard(logits_TE):
            flexmore_route_backward[(triton.cdiv(T, block),)](
                dweights_TK, logits_TE, bias, mask, *_mask_strides(mask), indices_TK, dlogits_TE, T,
                E=E, K=indices_TK.shape[1], NORM=norm_topk_prob, SCORING=scoring,
                ACC=tiles.accumulator(logits_TE.dtype),
                E_PAD=tiles.padded(E), BLOCK_T=block, num_warps=warps,
            )  # fmt: skip
    return dlogits_TE


def make_plan(
    indices_TK: Tensor, num_experts: int, by_set: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_to_slot, slot_to_row, row_offsets, token_order, expert_to_row), all int32."""
    return counting_sort.plan(indices_TK, num_experts, by_set)

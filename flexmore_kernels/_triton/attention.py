"""Triton kernels around attention in inference. Maths: reference/attention.py.

Heads: a program holds one row of q, k or v over its full width, norms and turns it, and writes it
by heads, k and v straight into the cache. One token against a cache: a program a key-value head and
part of the filled columns, a second kernel joins the parts; how many there are depends on shapes
alone, where they end on the device's count, so that a CUDA graph holds any length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .rms_norm import row_scale, warps

_LOG2_E = 1.4426950408889634
MOST_PARTS = 32


@triton.jit
def _turned(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, at, width,
    HEAD: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """rope(norm(row)) in ACC; the norm rounds to x's dtype before it is turned."""
    live = at < width
    x = tl.load(x_ptr + at, mask=live, other=0.0)
    scale = row_scale(x.to(ACC), width, EPS)
    half = HEAD // 2
    first = at % HEAD < half
    partner = tl.where(first, at + half, at - half)
    weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(ACC)
    own = (weight * (x.to(ACC) * scale)).to(x.dtype).to(ACC)
    other = tl.load(x_ptr + partner, mask=live, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + partner, mask=live, other=0.0).to(ACC)
    other = (weight * (other * scale)).to(x.dtype).to(ACC)
    cos = tl.load(cos_ptr + at % half, mask=live, other=0.0).to(ACC)
    sin = tl.load(sin_ptr + at % half, mask=live, other=0.0).to(ACC)
    return own * cos + tl.where(first, -other, other) * sin


@triton.jit
def flexmore_rotated_heads(
    q_out_ptr, k_out_ptr, v_out_ptr, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr,
    cos_ptr, sin_ptr, columns_ptr, length, q_width, k_width, q_stride, k_stride, v_stride,
    stride_b, stride_h, stride_s,
    ONE_ANGLE: tl.constexpr, HEAD: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    request = row // length
    step = row % length
    angle = row
    if ONE_ANGLE:
        angle = step
    cos_ptr += angle * (HEAD // 2)
    sin_ptr += angle * (HEAD // 2)
    at = tl.arange(0, BLOCK)
    if part == 0:
        y = _turned(
            q_ptr + row * q_stride, q_weight_ptr, cos_ptr, sin_ptr, at, q_width, HEAD, EPS, ACC
        )
        tl.store(
            q_out_ptr + row * q_width + at, y.to(q_out_ptr.dtype.element_ty), mask=at < q_width
        )
    else:
        column = step
        if columns_ptr is not None:
            column = tl.load(columns_ptr + step)
        place = request * stride_b + column * stride_s + at // HEAD * stride_h + at % HEAD
        if part == 1:
            y = _turned(
                k_ptr + row * k_stride, k_weight_ptr, cos_ptr, sin_ptr, at, k_width, HEAD, EPS, ACC
            )
            tl.store(k_out_ptr + place, y.to(k_out_ptr.dtype.element_ty), mask=at < k_width)
        else:
            v = tl.load(v_ptr + row * v_stride + at, mask=at < k_width, other=0.0)
            tl.store(v_out_ptr + place, v, mask=at < k_width)


@triton.jit
def flexmore_attend_filled(
    sum_ptr, stats_ptr, q_ptr, keys_ptr, values_ptr, real_ptr, end_ptr, columns,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr,
    PARTS: tl.constexpr, G_PAD: tl.constexpr, D_PAD: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)  # request and key-value head
    part = tl.program_id(1)
    end = tl.load(end_ptr + pair // KV_HEADS).to(tl.int32)
    share = ((end + BLOCK_N - 1) // BLOCK_N + PARTS - 1) // PARTS * BLOCK_N
    begin = part * share
    stop = tl.minimum(begin + share, end)
    g = tl.arange(0, G_PAD)
    d = tl.arange(0, D_PAD)
    row = pair * GROUPS + g
    d_live = (d < HEAD)[None, :]
    q_live = (g < GROUPS)[:, None] & d_live
    q = tl.load(q_ptr + row[:, None] * HEAD + d[None, :], mask=q_live, other=0.0)
    keys_ptr += pair * columns * HEAD
    values_ptr += pair * columns * HEAD
    real_ptr += pair // KV_HEADS * columns
    top = tl.full((G_PAD,), float("-inf"), ACC)
    total = tl.zeros((G_PAD,), ACC)
    acc = tl.zeros((G_PAD, D_PAD), ACC)
    for start in range(begin, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = tl.load(real_ptr + n, mask=n < stop, other=0) != 0
        place = n[:, None] * HEAD + d[None, :]
        inside = seen[:, None] & d_live
        k = tl.load(keys_ptr + place, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * SCALE
        s = tl.where(seen[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        p = tl.exp2(s - shift[:, None])
        keep = tl.exp2(top - shift)
        v = tl.load(values_ptr + place, mask=inside, other=0.0)
        total = total * keep + tl.sum(p, 1)
        acc = acc * keep[:, None] + tl.dot(
            p.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACC
        )
        top = higher
    g_live = g < GROUPS
    sums = sum_ptr + (row * PARTS + part)[:, None] * HEAD + d[None, :]
    tl.store(sums, acc, mask=q_live)
    tl.store(stats_ptr + row * 2 * PARTS + part, top, mask=g_live)
    tl.store(stats_ptr + (row * 2 + 1) * PARTS + part, total, mask=g_live)


@triton.jit
def flexmore_attend_join(
    out_ptr, sum_ptr, stats_ptr,
    HEAD: tl.constexpr, PARTS: tl.constexpr, P_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, P_PAD)
    d = tl.arange(0, D_PAD)
    live = part < PARTS
    top = tl.load(stats_ptr + row * 2 * PARTS + part, mask=live, other=float("-inf"))
    total = tl.load(stats_ptr + (row * 2 + 1) * PARTS + part, mask=live, other=0.0)
    highest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    place = (row * PARTS + part)[:, None] * HEAD + d[None, :]
    sums = tl.load(sum_ptr + place, mask=live[:, None] & (d < HEAD)[None, :], other=0.0)
    whole = tl.sum(total * weight, 0)
    y = tl.sum(sums * weight[:, None], 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out_ptr + row * HEAD + d, y.to(out_ptr.dtype.element_ty), mask=d < HEAD)


def rotated_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    place,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, q_width), k_width, head = q.shape, k.shape[2], 2 * cos.shape[-1]
    values = v.unflatten(-1, (-1, head)).transpose(1, 2)
    (q, q_stride), (k, k_stride), (v, v_stride) = map(_even_rows, (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    heads = q.new_empty(batch, length, q_width // head, head).transpose(1, 2)
    if place is None:
        keys = k.new_empty(batch, length, k_width // head, head).transpose(1, 2)
        columns = None
    else:
        keys, values, columns = place
    block = tiles.padded(max(q_width, k_width))
    if batch * length:
        with tiles.device_guard(q):
            flexmore_rotated_heads[(batch * length, 2 if place is None else 3)](
                heads, keys, values, q, k, v, q_weight, k_weight, cos, sin, columns,
                length, q_width, k_width, q_stride, k_stride, v_stride, *keys.stride()[:3],
                ONE_ANGLE=cos.shape[0] == 1, HEAD=head, EPS=eps,
                ACC=tiles.accumulator(q.dtype), BLOCK=block, num_warps=warps(block),
            )  # fmt: skip
    return heads, keys, values


def _even_rows(x: Tensor) -> tuple[Tensor, int]:
    """x (B, S, W) with all rows at one distance, a copy if it must be; that distance."""
    if x.shape[1] == 1:  # its stride may be anything
        x = x[:, 0] if x.stride(2) == 1 else x[:, 0].contiguous()
        return x, x.stride(0)
    if x.stride(2) != 1 or x.stride(0) != x.shape[1] * x.stride(1):
        x = x.contiguous()
    return x, x.stride(1)


def parts(pairs: int, columns: int, block: int) -> int:
    """Into how many parts the columns of `pairs` key-value heads are cut to fill the device."""
    wanted = min(MOST_PARTS, tiles.ENOUGH_PROGRAMS // pairs, triton.cdiv(columns, block))
    return max(1, wanted)


def attend_filled(q: Tensor, keys: Tensor, values: Tensor, real: Tensor, end: Tensor) -> Tensor:
    """q (B, H, 1, d) against keys, values (B, H_kv, C, d): columns real (B, C), before end (B,)."""
    (batch, heads, _, head), kv_heads, columns = q.shape, keys.shape[1], keys.shape[2]
    groups, d_pad, block = heads // kv_heads, tiles.padded(head, 16), 128 // keys.element_size()
    acc = tiles.torch_accumulator(q.dtype)
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    count = parts(batch * kv_heads, columns, block)
    sums = torch.empty(batch * heads, count, head, device=q.device, dtype=acc)
    stats = torch.empty(batch * heads, 2, count, device=q.device, dtype=acc)
    stage = 2 * block * d_pad * keys.element_size()
    fixed = 4 * tiles.padded(groups, 16) * (d_pad + block)  # q, and p on its way to the product
    stages = tiles.fitting_stages(stage, 2, tiles.shared_memory(q.device), fixed)
    with tiles.device_guard(q):
        flexmore_attend_filled[(batch * kv_heads, count)](
            sums, stats, q, keys, values, real, end, columns,
            SCALE=_LOG2_E * head**-0.5, GROUPS=groups, KV_HEADS=kv_heads, HEAD=head, PARTS=count,
            G_PAD=tiles.padded(groups, 16), D_PAD=d_pad, ACC=tiles.accumulator(q.dtype),
            PRECISION=tiles.dot_precision(q.dtype), BLOCK_N=block, num_warps=4, num_stages=stages,
        )  # fmt: skip
        flexmore_attend_join[(batch * heads,)](
            out, sums, stats, HEAD=head, PARTS=count, P_PAD=tiles.padded(count), D_PAD=d_pad,
            num_warps=4,
        )  # fmt: skip
    return out

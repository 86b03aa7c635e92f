"""Attention around torch's: heads normed, turned and put into the cache, one token against it.

Traps covered: norms over the full width before the split, grouped heads, heads of any size, columns
that are padding or not yet written (and hold what would show), requests of unequal length.
"""

from __future__ import annotations

import pytest
import torch
from common import skip_narrow
from torch.nn import functional as F

import reference.attention as reference
import reference.rms_norm as norms
from flexmore_kernels import testing
from flexmore_kernels.ops.attention import Filled, Place, attend, rotated_heads
from flexmore_kernels.positions import among_themselves
from flexmore_kernels.rotary import rotary_table

EPS, THETA = 1e-5, 10000.0
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SHAPES = {  # B, S, H, H_kv, d
    "even": (2, 5, 4, 4, 16),
    "grouped": (2, 3, 6, 2, 10),
    "one_token": (3, 1, 4, 1, 32),
    "large_heads": (1, 2, 2, 2, 200),
}


def draw(*shape, device, dtype):
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def projected(shape, device, dtype):
    B, S, H, kv, d = shape
    sizes = (H * d, kv * d, kv * d)
    q, k, v = (draw(B, S, size, device=device, dtype=dtype) for size in sizes)
    weights = [1 + draw(size, device=device, dtype=dtype) / 4 for size in sizes[:2]]
    return q, k, v, *weights


def expected(q, k, v, q_weight, k_weight, positions, d):
    def split(x):
        return x.unflatten(-1, (-1, d)).transpose(1, 2)

    q, k = norms.rms_norm(q, q_weight, EPS), norms.rms_norm(k, k_weight, EPS)
    return *(reference.rope(split(x), positions, THETA) for x in (q, k)), split(v)


def plainly(kernels):
    """What an error is measured by: of torch's attention its own, whose exp is torch's affair."""
    if kernels == "triton":
        return reference.attention

    def attention(q, k, v, allowed):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    return attention


def skip(kernels, device, dtype):
    skip_narrow(kernels, device, dtype)
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("each", (False, True), ids=("one_angle", "angle_a_request"))
def test_rotated_heads(each, shape, dtype, device, kernels):
    skip(kernels, device, dtype)
    B, S, _, kv, d = shape
    given = projected(shape, device, dtype)
    positions = torch.randint(500, (B if each else 1, S), device=device)
    rotary = rotary_table(positions, d, THETA, dtype)
    exact = expected(*testing.to_float64(given), positions, d)
    same = expected(*given, positions, d)
    for found, wanted, plain in zip(rotated_heads(*given, EPS, rotary), exact, same, strict=True):
        testing.assert_accurate(found, wanted, plain)
    columns = torch.arange(S, device=device) + 2
    place = Place(
        *(torch.full((B, kv, S + 5, d), 7.0, device=device, dtype=dtype) for _ in "kv"), columns
    )
    q, keys, values = rotated_heads(*given, EPS, rotary, place)
    assert keys is place.keys and values is place.values
    for found, wanted, plain in zip(
        (q, keys[:, :, 2:-3], values[:, :, 2:-3]), exact, same, strict=True
    ):
        testing.assert_accurate(found, wanted, plain)
    for stored in (keys, values):
        assert (stored[:, :, :2] == 7).all() and (stored[:, :, -3:] == 7).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", ("parts_of_one", "turned"))
def test_heads_that_do_not_lie_end_to_end(how, shape, device, kernels):
    """As parts of one product, and as rows that a transposed tensor has: with one token, strides
    that nothing is to read."""
    B, S, _, kv, d = shape
    q, k, v, *weights = projected(shape, device, torch.float32)
    rotary = rotary_table(torch.arange(S, device=device)[None], d, THETA, torch.float32)
    if how == "turned":
        apart = [x.new_empty(S, B, x.shape[-1]) for x in (q, k, v)]
        parts = [y.transpose(0, 1).copy_(x) for x, y in zip((q, k, v), apart, strict=True)]
    else:
        parts = torch.cat([q, k, v], -1).split([x.shape[-1] for x in (q, k, v)], -1)
    assert any(a.stride() != b.stride() for a, b in zip(parts, (q, k, v), strict=True))
    found, expected = [], []
    for given, kept in ((parts, found), ((q, k, v), expected)):
        kept += rotated_heads(*given, *weights, EPS, rotary)
        stored = [torch.zeros(B, kv, S + 3, d, device=device) for _ in "kv"]
        columns = torch.arange(S, device=device) + 1
        kept += rotated_heads(*given, *weights, EPS, rotary, Place(*stored, columns))
    for one, other in zip(found, expected, strict=True):
        testing.assert_same(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "end"),
    [("even", 1), ("grouped", 33), ("grouped", 150), ("one_token", 150), ("large_heads", 33)],
)
def test_one_token_against_a_cache(shape, end, dtype, device, kernels):
    skip(kernels, device, dtype)
    if (device, kernels, dtype) == ("cuda", "triton", torch.float32):
        pytest.skip("torch's attention serves it")
    B, _, H, kv, d = SHAPES[shape]
    columns = 160
    real = torch.zeros(B, columns, dtype=torch.bool, device=device)
    for row in range(B):  # left padding, a whole part of the columns among it
        real[row, min(row * 47, end - 1) : end] = True
    allowed = real[:, None, None]
    filled = Filled(real, torch.tensor([end] * B, device=device))
    found, exact, same = [], [], []
    # All numbers of a head share the few roundings of its weights; float64 has room for any luck.
    for _ in range(1 if dtype == torch.float64 else 12):
        q = draw(B, H, 1, d, device=device, dtype=dtype)
        keys, values = (draw(B, kv, columns, d, device=device, dtype=dtype) for _ in "kv")
        given = (q, keys, values)
        found.append(attend(*given, allowed, False, filled))
        exact.append(reference.attention(*testing.to_float64(given), allowed))
        same.append(plainly(kernels)(*given, allowed))
    testing.assert_accurate_draws(found, exact, same)
    # What is not real is not read: only the plain way must find a number there.
    if kernels == "triton":
        for stored in (keys, values):
            stored.masked_fill_(~real[:, None, :, None], float("nan"))
        testing.assert_same(attend(*given, allowed, False, filled), found[-1])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("padded", (False, True))
def test_attention_among_themselves(padded, shape, device):
    B, S, H, kv, d = shape
    q, k, v = (draw(B, heads, S, d, device=device, dtype=torch.float32) for heads in (H, kv, kv))
    mask = torch.ones(B, S, dtype=torch.bool, device=device)
    mask[0, : S // 2] = not padded
    allowed = among_themselves(mask if padded else None, S)
    y = attend(q, k, v, allowed, allowed is None)
    seen = among_themselves(mask, S)
    exact = reference.attention(q.double(), k.double(), v.double(), seen)
    testing.assert_accurate(y, exact, plainly(None)(q, k, v, seen))

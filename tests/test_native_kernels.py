"""The compiled library's CPU kernels against aten's.

They also go through every test with the `kernels` fixture. Here is what those cannot see: all
16-bit values through the conversions, exp near its ends, rows that end anywhere in a vector, bits
that must not depend on the number of threads, and wrong calls from Python.
"""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels import native
from flexmore_kernels._aten import gated_mix as aten_gated_mix
from flexmore_kernels._aten import permutation as aten_permutation
from flexmore_kernels._aten import routing as aten_routing

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no library: {native.why_not()}")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)
# Around the lanes of every vector width (4 to 16) and around the block of columns (1024).
WIDTHS = (1, 3, 4, 5, 8, 9, 15, 16, 17, 33, 1023, 1024, 1025, 1100)
INF, NAN = float("inf"), float("nan")

if native.available():
    from flexmore_kernels._native import gated_mix, permutation, routing


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def vector_width(request):
    """Every vector width that this machine can run, the slower ones too."""
    try:
        with native.use_vector_width(request.param):
            assert native.vector_width() == request.param
            yield request.param
    except ValueError:
        pytest.skip(f"no {request.param} here")


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def assert_close(ours, theirs, dtype, scale: float = 4.0):
    """Equal ints; floats within `scale` roundings of `dtype` of the largest entry."""
    if isinstance(ours, torch.Tensor):
        ours, theirs = (ours,), (theirs,)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if not a.dtype.is_floating_point:
            assert torch.equal(a, b)
        elif a.numel():
            atol = scale * torch.finfo(dtype).eps * max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


def some_ids(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Distinct ids a token; `experts` itself marks an empty slot."""
    return torch.rand(tokens, experts + 1).argsort(1)[:, :top_k].contiguous()


# --- conversions and exp


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_all_16_bit_values_survive(dtype, vector_width):
    x = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)[None]
    y = permutation.unpermute(x, torch.zeros(1, 1, dtype=torch.int32), None, None)
    nan = x.isnan()
    assert torch.equal(nan, y.isnan())
    assert torch.equal(x[~nan], y[~nan])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounds_to_16_bits_as_torch(dtype, vector_width):
    special = [0.0, -0.0, INF, -INF, NAN, 65504, 65519.9, 65520, 5.96e-8, 2.98e-8, 2.99e-8, 3.4e38]
    x = torch.randn(100_000) * 10.0 ** torch.randint(-9, 7, (100_000,))
    x = torch.cat([x, torch.tensor(special)])[None]
    nobody = torch.full((1, 1), -1, dtype=torch.int32)
    y = permutation.unpermute(torch.zeros_like(x, dtype=dtype), nobody, None, x)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~y.isnan()], x.to(dtype)[~y.isnan()])


def silu(x: torch.Tensor) -> torch.Tensor:
    one = torch.ones(1, 1, dtype=acc(x.dtype))
    slot = torch.zeros(1, 1, dtype=torch.int32)
    return gated_mix.swiglu_mix(x[None], torch.ones_like(x)[None], one, slot)[1][0]


def test_silu_is_as_good_as_the_math_library(vector_width):
    x = torch.cat([torch.linspace(-86, 90, 200_001), torch.randn(100_000)])
    truth = torch.nn.functional.silu(x.double())
    error = ((silu(x) - truth) / truth).abs()[truth != 0]
    assert error.max() <= 2 * torch.finfo(torch.float32).eps
    x = torch.linspace(-700, 90, 200_001, dtype=torch.float64)
    torch.testing.assert_close(silu(x), torch.nn.functional.silu(x), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_at_the_ends(dtype, vector_width):
    x = torch.tensor([INF, -INF, NAN, 1000, -1000, 0, -87.5, -104], dtype=dtype)
    y = silu(x)
    assert y[0] == INF and y[1] == 0 and y[2].isnan() and y[3] == 1000 and y[4] == 0 and y[5] == 0
    assert (y[6:].abs() <= 1e-35).all()
    ones, one = torch.ones_like(x)[None], torch.ones(1, 1, dtype=acc(dtype))
    slot = torch.zeros(1, dtype=torch.int32)
    dgate = gated_mix.swiglu_mix_backward(ones, None, x[None], ones, one, slot, 1)[0][0]
    assert dgate[0] == 1 and dgate[1] == 0 and dgate[2].isnan() and dgate[3] == 1 and dgate[4] == 0
    assert dgate[5] == 0.5


# --- each kernel as aten's


@pytest.mark.parametrize("scoring", ("softmax", "sigmoid", "unit"))
@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("masked", ("all", "each", "expanded"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_route(dtype, masked, norm, scoring):
    for T, E, K in ((0, 4, 2), (1, 1, 1), (33, 7, 5), (40, 8, 8), (50, 40, 3), (9, 300, 300)):
        logits = (torch.randint(-9, 9, (T, E)) / 4).to(dtype)  # many ties
        bias = torch.randn(E - 1).to(dtype)
        mask = None if masked == "all" else torch.rand(T, E) < 0.6
        if masked == "expanded":
            mask = (torch.rand(1, E) < 0.6).expand(T, E)
        out = routing.topk_route(logits, bias, mask, K, norm, scoring)
        assert_close(out, aten_routing.topk_route(logits, bias, mask, K, norm, scoring), acc(dtype))
        if scoring == "unit":
            continue
        dweights = torch.randn(T, K, dtype=acc(dtype)).masked_fill(out[1] == E, 0)
        arguments = (dweights, logits, bias, mask, out[1], norm, scoring)
        dlogits = aten_routing.topk_route_backward(*arguments)
        assert_close(routing.topk_route_backward(*arguments), dlogits, acc(dtype))


def test_topk_route_without_a_softmax():
    logits = torch.tensor(
        [[1.0, 2, 2, 1], [NAN, 0, 0, 0], [0, -INF, 1, -INF], [-INF] * 4, [INF, 0, 0, 0]]
    )
    weights, indices = routing.topk_route(logits, None, None, 3, False, "softmax")
    assert indices.tolist() == [[1, 2, 0], [4, 4, 4], [2, 0, 1], [4, 4, 4], [4, 4, 4]]
    assert (weights[[1, 3, 4]] == 0).all() and weights.isfinite().all()
    arguments = (logits, None, None, indices, False, "softmax")
    dlogits = routing.topk_route_backward(torch.ones(5, 3), *arguments)
    assert dlogits.isfinite().all() and (dlogits[[1, 3, 4]] == 0).all()


def test_topk_route_linear():
    x, weight = torch.randn(20, 24), torch.randn(6, 24)
    arguments = (x, weight, None, None, 3, True, "softmax")
    ours = routing.topk_route_linear(*arguments)
    assert_close(ours, aten_routing.topk_route_linear(*arguments), x.dtype)


@pytest.mark.parametrize("tokens", (0, 1, 5, 300))
@pytest.mark.parametrize("experts", (1, 3, 8, 9, 1024))
def test_make_plan(tokens, experts):
    for top_k in {1, min(experts, 5)}:
        ids, by_set = some_ids(tokens, experts, top_k), experts <= 8
        ours = routing.make_plan(ids, experts, by_set)
        assert_close(ours, aten_routing.make_plan(ids, experts, by_set), torch.float32)


def test_make_plan_skips_ids_out_of_range():
    ids = torch.tensor([[-1, 2], [2**40, 0], [-(2**40), 3], [1, 2**31]])
    ours = routing.make_plan(ids, 3, True)
    assert_close(ours, aten_routing.make_plan(ids, 3, True), torch.float32)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permutation_and_gated_mix(dtype, width, vector_width):
    T, E, K = 7, 4, 3
    row_to_slot, slot_to_row, offsets, *_ = routing.make_plan(some_ids(T, E, K), E, True)
    weights = torch.rand(T, K, dtype=acc(dtype))
    x, dy, drows = (torch.randn(n, width).to(dtype) for n in (T, T, T * K))
    rows = permutation.permute(x, row_to_slot, slot_to_row)
    assert torch.equal(rows, aten_permutation.permute(x, row_to_slot, slot_to_row))
    for w in (None, weights):
        for base in (None, x, torch.randn(T, width, dtype=acc(dtype))):
            arguments = (rows, slot_to_row, w, base)
            expected = aten_permutation.unpermute(*arguments)
            assert_close(permutation.unpermute(*arguments), expected, dtype)
    arguments = (dy, rows, row_to_slot, weights)
    dx, dweights = permutation.unpermute_backward(*arguments)
    expected = aten_permutation.unpermute_backward(*arguments)
    assert_close(dx, expected[0], dtype)
    assert_close(dweights, expected[1], acc(dtype), scale=32)

    gate, up = (2 * torch.randn(T * K, width).to(dtype) for _ in range(2))
    arguments = (gate, up, weights, slot_to_row)
    assert_close(gated_mix.swiglu_mix(*arguments), aten_gated_mix.swiglu_mix(*arguments), dtype)
    for extra in (None, drows):
        arguments = (dy, extra, gate, up, weights, row_to_slot, K)
        dgate, dup, dw, h = gated_mix.swiglu_mix_backward(*arguments)
        expected = aten_gated_mix.swiglu_mix_backward(*arguments)
        assert_close((dgate, dup, h), (*expected[:2], expected[3]), dtype)
        assert_close(dw, expected[2], acc(dtype), scale=32)
    for e in range(E):
        block = slice(int(offsets[e]), int(offsets[e + 1]))
        arguments = (gate[block], up[block], weights, row_to_slot[block], K)
        mixed = torch.randn(T, width, dtype=acc(dtype))
        expected = mixed.clone()
        h = gated_mix.swiglu_accumulate(mixed, *arguments)
        assert_close(h, aten_gated_mix.swiglu_accumulate(expected, *arguments), dtype)
        assert_close(mixed, expected, acc(dtype), scale=8)


def test_bits_do_not_depend_on_the_number_of_threads():
    T, E, K, F = 64, 7, 5, 1500
    row_to_slot, slot_to_row, *_ = routing.make_plan(some_ids(T, E, K), E, True)
    gate, up, dmixed = torch.randn(T * K, F), torch.randn(T * K, F), torch.randn(T, F)
    weights, threads = torch.rand(T, K), torch.get_num_threads()

    def everything():
        return (
            *gated_mix.swiglu_mix(gate, up, weights, slot_to_row),
            *gated_mix.swiglu_mix_backward(dmixed, None, gate, up, weights, row_to_slot, K),
            permutation.unpermute(gate, slot_to_row, weights, None),
            *permutation.unpermute_backward(dmixed, gate, row_to_slot, weights),
        )

    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- a wrong call is refused, not read out of bounds


def route(logits, bias, mask, top_k, code=0):
    return torch.ops.flexmore_native.topk_route(logits, bias, mask, top_k, False, code)


def unit_backward(logits, indices):
    return torch.ops.flexmore_native.topk_route_backward(
        torch.zeros(indices.shape), logits, None, None, indices, False, 2
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: route(torch.zeros(2, 3), None, None, 4), "top_k must be in"),
        (lambda: route(torch.zeros(2, 3).int(), None, None, 1), "dtype Int"),
        (lambda: route(torch.zeros(3, 2).T, None, None, 1), "contiguous"),
        (lambda: route(torch.zeros(2, 3), torch.zeros(3), None, 1), "bias"),
        (lambda: route(torch.zeros(2, 3), None, None, 1, 3), "scoring must be in \\[0, 2\\]"),
        (lambda: unit_backward(torch.zeros(2, 3), torch.zeros(2, 1).long()), "scoring must be in"),
        (lambda: routing.make_plan(torch.zeros(2, 2).int(), 3, True), "indices has dtype Int"),
        (lambda: routing.make_plan(torch.zeros(2, 2).long(), 9, True), "at most 8"),
        (
            lambda: permutation.unpermute(
                torch.zeros(4, 3), torch.zeros(2, 2).int(), torch.zeros(2, 3), None
            ),
            "weights has size 3",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()

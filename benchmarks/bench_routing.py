"""Price of routing: from x it reads x once; from logits, T E numbers, it is a few launches.

The plan reads T K ids and writes two numbers a row and E + 1 a token. What a layer waits for is
both together. Run: `python -m pytest benchmarks/bench_routing.py` (or any of these files).
"""

from __future__ import annotations

import pytest

import reference
from benchmarks import bench
from benchmarks.bench import Price
from benchmarks.problem import normal
from flexmore_kernels import baselines, ops

MANY = (256, 8)
"""Experts and top-k of today's large mixtures, beside those of the shape."""


def prices(shape, tokens, device, dtype):
    found = []
    for more, experts, top_k in (("", len(shape.ranks), shape.top_k), (" E=256 k=8", *MANY)):
        logits = normal(tokens, experts, device=device, dtype=dtype)
        found += _from_logits(logits, experts, top_k, more)
    x = normal(tokens, shape.hidden, device=device, dtype=dtype)
    router = normal(len(shape.ranks), shape.hidden, device=device, dtype=dtype, scale=0.02)
    # From here on only logits are compared: where two nearly tie, a rounding decides.
    from_x = Price(
        "topk_route from x", "routing",
        lambda x, router: ops.topk_route(x, router, top_k=shape.top_k), (x, router),
        lambda x, router: reference.topk_route(x, router, top_k=shape.top_k),
        nbytes=x.nbytes, flops=2 * tokens * shape.hidden * len(shape.ranks),
        plain=lambda x, router: _plain(x, router, shape.top_k), part=lambda routing: routing[0],
    )  # fmt: skip
    return [*found, from_x]


def _from_logits(logits, experts, top_k, more):
    indices = ops.topk_route(logits, top_k=top_k).indices
    read = logits.nbytes
    routed = indices.numel() * (8 + 4)  # ids in int64, weights in float32
    maps = 4 * (2 * indices.numel() + (experts + 1) * (logits.shape[0] if experts <= 8 else 1))

    def route(logits):
        return ops.topk_route(logits, top_k=top_k)

    def truth(logits):
        return reference.topk_route(logits, top_k=top_k)

    alone = Price(f"topk_route{more}", "routing", route, (logits,), truth, read + routed)
    by_weight = alone._replace(part=lambda routing: routing[1])
    return [
        alone,
        bench.with_backward(by_weight, (0,), nbytes=2 * (read + routed)),
        Price(
            f"make_plan{more}", "routing", lambda ids: ops.make_plan(ids, experts), (indices,),
            lambda ids: reference.make_plan(ids, experts), indices.nbytes + maps,
        ),
        Price(
            f"topk_route and make_plan{more}", "routing",
            lambda logits: ops.make_plan(route(logits).indices, experts), (logits,),
            lambda logits: reference.make_plan(truth(logits).indices, experts),
            read + 2 * routed + maps,
        ),
    ]  # fmt: skip


def _plain(x, router, top_k):
    indices, weights = baselines.route(x, router, top_k, False)
    return x @ router.T, weights, indices


@pytest.mark.parametrize(("op", "kernels", "device"), bench.parameters("routing", prices))
def bench_routing(benchmark, op, kernels, device):
    bench.under_pytest(benchmark, prices, op, kernels, device)

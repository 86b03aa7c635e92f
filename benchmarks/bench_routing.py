"""Price of routing: reads x once (T D elements) and G; the plan reads and writes T K ids.

Run: `python -m pytest benchmarks/bench_routing.py` (or any of these files).
"""

from __future__ import annotations

import pytest

from benchmarks import bench
from flexmore_kernels import ops
from flexmore_kernels.testing import make_weight


@pytest.mark.parametrize(("device", "kernels"), bench.candidates("routing"))
def bench_topk_route(benchmark, device, kernels):
    shape, x, _, _ = bench.rows(device)
    E = len(shape.ranks)
    weight = make_weight(E, shape.hidden, device, x.dtype)
    bench.measure(
        benchmark, kernels, device, lambda: ops.topk_route(x, weight, top_k=shape.top_k),
        moved=x.nbytes, flops=2 * x.shape[0] * shape.hidden * E,
    )  # fmt: skip


@pytest.mark.parametrize(("device", "kernels"), bench.candidates("routing"))
def bench_make_plan(benchmark, device, kernels):
    shape, _, indices, _ = bench.rows(device)
    E = len(shape.ranks)
    bench.measure(
        benchmark, kernels, device, lambda: ops.make_plan(indices, E), moved=2 * indices.nbytes
    )

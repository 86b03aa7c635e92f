"""Price of permutation: moves rows. permute reads T D elements, writes N D; unpermute reverses."""

from __future__ import annotations

import pytest

from benchmarks import bench
from flexmore_kernels import ops


@pytest.mark.parametrize(("device", "kernels"), bench.candidates("permutation"))
def bench_permute(benchmark, device, kernels):
    shape, x, indices, _ = bench.rows(device)
    plan = ops.make_plan(indices, len(shape.ranks))
    moved = x.nbytes * (1 + shape.top_k)
    bench.measure(benchmark, kernels, device, lambda: ops.permute(x, plan), moved=moved)


@pytest.mark.parametrize(("device", "kernels"), bench.candidates("permutation"))
def bench_unpermute(benchmark, device, kernels):
    shape, x, indices, weights = bench.rows(device)
    plan = ops.make_plan(indices, len(shape.ranks))
    rows = ops.permute(x, plan)
    moved = x.nbytes * (1 + shape.top_k)
    bench.measure(
        benchmark, kernels, device, lambda: ops.unpermute(rows, plan, weights), moved=moved
    )

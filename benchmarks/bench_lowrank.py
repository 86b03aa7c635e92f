"""Price of the low-rank ops: shrink reads the rows, N D elements; expand writes them, N F.

At the usual ranks both are bound by that traffic: 2 N r D operations are few beside it.
"""

from __future__ import annotations

import pytest

from benchmarks import bench
from flexmore_kernels import ops
from flexmore_kernels.testing import make_weight


@pytest.mark.parametrize(("device", "kernels"), bench.candidates("lowrank"))
def bench_shrink(benchmark, device, kernels):
    shape, x, indices, _ = bench.rows(device)
    plan = ops.make_plan(indices, len(shape.ranks))
    rows, a = ops.permute(x, plan), make_weight(sum(shape.ranks), shape.hidden, device, x.dtype)
    bench.measure(
        benchmark, kernels, device, lambda: ops.shrink(rows, a, plan, shape.ranks),
        moved=rows.nbytes,
    )  # fmt: skip


@pytest.mark.parametrize(("device", "kernels"), bench.candidates("lowrank"))
def bench_expand(benchmark, device, kernels):
    shape, x, indices, _ = bench.rows(device)
    plan = ops.make_plan(indices, len(shape.ranks))
    R, F = sum(shape.ranks), shape.intermediate
    rows, a = ops.permute(x, plan), make_weight(R, shape.hidden, device, x.dtype)
    z, b = ops.shrink(rows, a, plan, shape.ranks), make_weight(F, R, device, x.dtype)
    bench.measure(
        benchmark, kernels, device, lambda: ops.expand(z, b, plan, shape.ranks),
        moved=rows.shape[0] * F * rows.element_size(),
    )  # fmt: skip

"""Price of the grouped GEMM: 2 N I O operations, whatever the split over the experts.

Full-size experts of the layer's width; the number that counts is TFLOP/s beside a dense matmul's.
"""

from __future__ import annotations

import pytest

from benchmarks import bench
from flexmore_kernels import ops
from flexmore_kernels.testing import make_weight


@pytest.mark.parametrize(("device", "kernels"), bench.candidates("grouped_gemm"))
def bench_grouped_gemm(benchmark, device, kernels):
    shape, x, indices, _ = bench.rows(device)
    E, D, F = len(shape.ranks), shape.hidden, shape.intermediate
    plan = ops.make_plan(indices, E)
    rows = ops.permute(x, plan)
    weights = [make_weight(F, D, device, x.dtype) for _ in range(E)]
    bench.measure(
        benchmark, kernels, device, lambda: ops.grouped_gemm(rows, weights, plan),
        flops=2 * rows.shape[0] * D * F,
    )  # fmt: skip

"""Price of the grouped GEMM: 2 N I O operations, whatever the split over the experts.

Full-size experts of the layer's width; the number that counts is the share of a large dense
product's rate. Beside it torch's own grouped product, on the matrices stacked.
"""

from __future__ import annotations

import pytest

import reference
from benchmarks import bench
from benchmarks.bench import Price
from benchmarks.problem import normal
from flexmore_kernels import ops


def prices(shape, tokens, device, dtype):
    _, _, plan = bench.routed(shape, tokens, device)
    E, D, F = len(shape.ranks), shape.hidden, shape.intermediate
    rows = normal(plan.num_rows, D, device=device, dtype=dtype)
    weights = normal(E * F, D, device=device, dtype=dtype, scale=D**-0.5).view(E, F, D)

    def plain(x, weights, plan):
        from torch.nn.functional import grouped_mm

        return grouped_mm(x, weights.mT, offs=plan.row_offsets[1:])

    forward = Price(
        "grouped_gemm", "grouped_gemm", ops.grouped_gemm, (rows, weights, plan),
        reference.grouped_gemm, rows.nbytes + weights.nbytes + rows.nbytes // D * F,
        2 * rows.shape[0] * D * F, plain,
    )  # fmt: skip
    return [forward, bench.with_backward(forward, (0, 1), flops=3 * forward.flops)]


@pytest.mark.parametrize(("op", "kernels", "device"), bench.parameters("grouped_gemm", prices))
def bench_grouped_gemm(benchmark, op, kernels, device):
    bench.under_pytest(benchmark, prices, op, kernels, device)

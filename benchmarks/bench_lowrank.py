"""Price of the low-rank ops: shrink reads the rows, N D numbers; expand writes them, N F.

At the usual ranks both are bound by that traffic: 2 N r D operations are few beside it. Backward:
shrink's gradients read the rows again and write dx; expand's read dy twice, for dz and for dB.
"""

from __future__ import annotations

import pytest
import torch

import reference
from benchmarks import bench
from benchmarks.bench import Price
from benchmarks.problem import normal
from flexmore_kernels import ops


def prices(shape, tokens, device, dtype):
    _, _, plan = bench.routed(shape, tokens, device)
    D, F, R, ranks = shape.hidden, shape.intermediate, sum(shape.ranks), shape.ranks
    rows = normal(plan.num_rows, D, device=device, dtype=dtype)
    a = normal(R, D, device=device, dtype=dtype, scale=D**-0.5)
    b = normal(F, R, device=device, dtype=dtype, scale=0.1)
    with torch.no_grad():
        z = ops.shrink(rows, a, plan, ranks)
    units = sum(n * r for n, r in zip(plan.rows.sizes, ranks, strict=True))
    wide = plan.num_rows * F * dtype.itemsize
    shrink = Price(
        "shrink", "lowrank", lambda x, a, plan: ops.shrink(x, a, plan, ranks), (rows, a, plan),
        lambda x, a, plan: reference.shrink(x, a, plan, ranks), rows.nbytes, 2 * units * D,
    )  # fmt: skip
    expand = Price(
        "expand", "lowrank", lambda z, b, plan: ops.expand(z, b, plan, ranks), (z, b, plan),
        lambda z, b, plan: reference.expand(z, b, plan, ranks), wide, 2 * units * F,
    )  # fmt: skip
    return [
        shrink,
        bench.with_backward(shrink, (0, 1), nbytes=3 * rows.nbytes, flops=6 * units * D),
        expand,
        bench.with_backward(expand, (0, 1), nbytes=2 * wide, flops=6 * units * F),
    ]


@pytest.mark.parametrize(("op", "kernels", "device"), bench.parameters("lowrank", prices))
def bench_lowrank(benchmark, op, kernels, device):
    bench.under_pytest(benchmark, prices, op, kernels, device)

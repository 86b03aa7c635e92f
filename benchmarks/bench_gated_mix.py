"""Price of the gated mix: reads G and U (2 T F), writes the mixed rows (T F) and every h (N F).

Operations: 4 r F for each routed row of rank r, and T K F sigmoids.
"""

from __future__ import annotations

import pytest

from benchmarks import bench
from flexmore_kernels import ops
from flexmore_kernels.testing import make_weight, make_x


@pytest.mark.parametrize(("device", "kernels"), bench.candidates("gated_mix"))
def bench_gated_mix(benchmark, device, kernels):
    shape, x, indices, weights = bench.rows(device)
    T, D, F, R = x.shape[0], shape.hidden, shape.intermediate, sum(shape.ranks)
    plan = ops.make_plan(indices, len(shape.ranks))
    rows = ops.permute(x, plan)
    gate, up = (make_x(T, F, device, x.dtype) for _ in range(2))
    b_gate, b_up = (make_weight(F, R, device, x.dtype) for _ in range(2))
    z_gate, z_up = (
        ops.shrink(rows, make_weight(R, D, device, x.dtype), plan, shape.ranks) for _ in range(2)
    )
    bench.measure(
        benchmark, kernels, device,
        lambda: ops.gated_mix(
            gate, up, weights, plan, z_gate, b_gate, shape.ranks, z_up, b_up, shape.ranks
        ),
        moved=3 * gate.nbytes + indices.numel() * F * x.element_size(),
    )  # fmt: skip

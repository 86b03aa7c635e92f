"""Price of permutation: moves rows. permute reads T D numbers once and writes N D; unpermute
reverses. The number that counts is the share of what a plain copy moves in the same run."""

from __future__ import annotations

import pytest

import reference
from benchmarks import bench
from benchmarks.bench import Price
from benchmarks.problem import normal
from flexmore_kernels import ops


def prices(shape, tokens, device, dtype):
    _, weights, plan = bench.routed(shape, tokens, device)
    x = normal(tokens, shape.hidden, device=device, dtype=dtype)
    rows = normal(plan.num_rows, shape.hidden, device=device, dtype=dtype)
    moved = x.nbytes + rows.nbytes + plan.row_to_slot.nbytes
    unpermute = Price(
        "unpermute", "permutation", ops.unpermute, (rows, plan, weights), reference.unpermute,
        moved + weights.nbytes,
    )  # fmt: skip
    return [
        Price(
            "permute", "permutation", ops.permute, (x, plan), reference.permute, moved,
            plain=lambda x, plan: x[plan.row_to_slot // plan.top_k],
        ),
        unpermute,
        bench.with_backward(unpermute, (0, 2), nbytes=2 * moved + rows.nbytes),
    ]  # fmt: skip


@pytest.mark.parametrize(("op", "kernels", "device"), bench.parameters("permutation", prices))
def bench_permutation(benchmark, op, kernels, device):
    bench.under_pytest(benchmark, prices, op, kernels, device)

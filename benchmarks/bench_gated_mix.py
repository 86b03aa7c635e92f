"""Price of the gated mix: reads G and U (2 T F), writes the mixed rows (T F) and every h (N F).

Operations: 4 r F for each routed row of rank r, and T K F sigmoids. The backward reads G, U and dm,
and writes dG and dU, if it computes every h again.
"""

from __future__ import annotations

import pytest
import torch

import reference
from benchmarks import bench
from benchmarks.bench import Price
from benchmarks.problem import normal
from flexmore_kernels import ops
from flexmore_kernels.ragged import packed_size


def plain_mix(gate, up, weights, plan, z_gate, b_gate, ranks_gate, z_up, b_up, ranks_up):
    """The op in plain PyTorch, every step stored in dtype. The twin rounds once, at the end; but
    gradients go through pre-activations and their gradients, which the kernels store in dtype.
    """
    g = reference.permute(gate, plan) + reference.expand(z_gate, b_gate, plan, ranks_gate)
    u = reference.permute(up, plan) + reference.expand(z_up, b_up, plan, ranks_up)
    rows = torch.nn.functional.silu(g) * u
    return reference.unpermute(rows, plan, weights), rows


def prices(shape, tokens, device, dtype):
    _, weights, plan = bench.routed(shape, tokens, device)
    F, R, ranks = shape.intermediate, sum(shape.ranks), shape.ranks
    gate, up = (normal(tokens, F, device=device, dtype=dtype) for _ in range(2))
    b_gate, b_up = (normal(F, R, device=device, dtype=dtype, scale=0.1) for _ in range(2))
    size = packed_size(ranks, tokens, shape.top_k)
    z_gate, z_up = (normal(size, device=device, dtype=dtype) for _ in range(2))
    units = sum(n * r for n, r in zip(plan.rows.sizes, ranks, strict=True))

    def call(op):
        return lambda gate, up, weights, plan, z_gate, b_gate, z_up, b_up: op(
            gate, up, weights, plan, z_gate, b_gate, ranks, z_up, b_up, ranks
        )

    forward = Price(
        "gated_mix", "gated_mix", call(ops.gated_mix),
        (gate, up, weights, plan, z_gate, b_gate, z_up, b_up), call(reference.gated_mix),
        3 * gate.nbytes + plan.num_rows * F * dtype.itemsize, 4 * units * F,
    )  # fmt: skip
    return [
        forward,
        bench.with_backward(
            forward, (0, 1, 2, 4, 5, 6, 7), nbytes=forward.nbytes + 5 * gate.nbytes,
            flops=4 * forward.flops, same=call(plain_mix),
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(("op", "kernels", "device"), bench.parameters("gated_mix", prices))
def bench_gated_mix(benchmark, op, kernels, device):
    bench.under_pytest(benchmark, prices, op, kernels, device)

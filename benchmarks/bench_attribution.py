"""Price of attribution: reads T K ids and weights once, 12 bytes a slot, and adds to B E integers.

Predicted on an H100 before it was measured, in a graph, the launch being about 2 us of each: 16384
tokens of 7 experts, top-5 (1 MB, 0.3 us at 3 TB/s): 4 us; of 256 experts, top-8 (1.6 MB, and an
addition in memory for each slot, twice 131072): 6 us; a decoding step's 64 requests: 3 us.
`attribute_`, in place, is what staying on costs a layer; `attribute` clears and converts besides.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reference
from benchmarks import bench
from benchmarks.bench import Price
from flexmore_kernels import backend, ops
from flexmore_kernels.attribution import Attribution

MANY = (256, 8)
"""Experts and top-k of today's large mixtures, beside those of the shape."""
REQUESTS = 64


def prices(shape, tokens, device, dtype):
    found = []
    for more, experts, top_k in (("", len(shape.ranks), shape.top_k), (" E=256 k=8", *MANY)):
        given = _routed(tokens, experts, top_k, device)
        found.append(_price(f"attribute{more}", _attribute(experts), given, 1, experts))
        found.append(_price(f"attribute_{more}", _layer(1, experts), given, 1, experts))
    B, E = min(REQUESTS, tokens), len(shape.ranks)
    given = _routed(B, E, shape.top_k, device)
    found.append(_price("attribute_ decode", _layer(B, E), given, B, E))
    return found


def _routed(tokens: int, experts: int, top_k: int, device: str) -> tuple[Tensor, Tensor]:
    routing = ops.topk_route(torch.randn(tokens, experts, device=device), top_k=top_k)
    return routing.indices, routing.weights


def _price(name: str, function: Callable, given: tuple[Tensor, Tensor], B: int, E: int) -> Price:
    nbytes = sum(tensor.nbytes for tensor in given) + 2 * 8 * B * E
    return Price(
        name, "attribution", function, given,
        lambda indices, weights: reference.attribute(indices, weights, B, E), nbytes,
    )  # fmt: skip


def _attribute(experts: int) -> Callable:
    return lambda indices, weights: ops.attribute(indices, weights, 1, experts)


def _layer(requests: int, experts: int) -> Callable:
    """Adds to an account of the kernels that run: what is checked is each one's first call."""
    accounts: dict[str, Attribution] = {}

    def count(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        name = backend.chosen("attribution", indices.device)
        first = name not in accounts
        if first:
            accounts[name] = Attribution.zeros(2, requests, experts, indices.device)
        shape = (requests, -1, indices.shape[1])
        # Of a layer that is not the first, which counts the tokens besides.
        accounts[name].count_(1, indices.view(shape), weights.view(shape))
        return (accounts[name].rows, accounts[name].weight_sum) if first else None

    return count


@pytest.mark.parametrize(("op", "kernels", "device"), bench.parameters("attribution", prices))
def bench_attribution(benchmark, op, kernels, device):
    bench.under_pytest(benchmark, prices, op, kernels, device)

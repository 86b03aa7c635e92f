"""Calls that reach every kernel, forward and backward, one function an op: for the gates.

Nothing is compared here. The compile gate runs these with launches replaced by compilations, the
sanitizer's tests run them on a GPU; both see to it that no kernel is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexmore_kernels import ops
from flexmore_kernels.attribution import Attribution
from flexmore_kernels.ops.attention import Filled, Place, attend, rotated_heads
from flexmore_kernels.ops.decoding import begin_token, greedy, settle
from flexmore_kernels.ops.rms_norm import rms_norm
from flexmore_kernels.ragged import RoutingPlan, packed_size
from flexmore_kernels.testing import (
    make_pair,
    make_projection,
    make_weight,
    make_x,
    projection_ranks,
)


class Setup(NamedTuple):
    """What a call is made of. `ranks` is a layer's expert_ranks."""

    ranks: tuple
    tokens: int
    dtype: torch.dtype
    top_k: int = 3
    hidden: int = 512
    intermediate: int = 256
    device: str = "cpu"

    def x(self, rows: int, width: int) -> Tensor:
        return make_x(rows, width, self.device, self.dtype).requires_grad_()

    def weight(self, out: int, width: int) -> Tensor:
        return make_weight(out, width, self.device, self.dtype).requires_grad_()

    def plan(self) -> RoutingPlan:
        return ops.make_plan(self.indices(), len(self.ranks))

    def indices(self) -> Tensor:
        """(T, K): token t goes to the K experts from t on, but every fifth slot is empty."""
        tokens, E = self.tokens, len(self.ranks)
        ids = (torch.arange(tokens)[:, None] + torch.arange(self.top_k)) % E
        empty = torch.arange(tokens * self.top_k).view(tokens, self.top_k) % 5 == 4
        return ids.masked_fill(empty, E).to(self.device)

    def weights(self) -> Tensor:
        acc = torch.promote_types(self.dtype, torch.float32)
        return torch.rand(self.tokens, self.top_k).to(self.device, acc).requires_grad_()

    def lowrank_ranks(self) -> list[int]:
        """A rank an expert, 0 for the full-size ones, for the ops that know ranks alone."""
        gate = projection_ranks(self.ranks)[0]
        return [0 if rank == "full" else rank for rank in gate]


def _backward(*outputs: Tensor) -> list[Tensor]:
    """Runs the backward from every output; the outputs, for a look at their values."""
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return [output.detach() for output in outputs]


def routing(s: Setup) -> list[Tensor]:
    E = len(s.ranks)
    bias = torch.linspace(-1, 1, E - 1).to(s.device).requires_grad_()
    mask = (torch.rand(s.tokens, E) < 0.8).to(s.device)
    mask[:, 0] = True
    limits = {"bias": bias, "mask": mask}
    found = []
    for given in ((s.x(s.tokens, E),), (s.x(s.tokens, s.hidden), s.weight(E, s.hidden))):
        for scoring, options in (
            ("softmax", {}),
            ("softmax", {"norm_topk_prob": True, **limits}),
            ("sigmoid", {"norm_topk_prob": True, **limits}),
            ("unit", limits),
        ):
            routing = ops.topk_route(*given, top_k=s.top_k, scoring=scoring, **options)
            found += [routing.logits, routing.weights]
    differentiable = [output for output in found if output.grad_fn is not None]
    return [*_backward(*differentiable), *found, s.plan().row_to_slot]


def attribution(s: Setup) -> list[Tensor]:
    """Tokens of one request and of several, those that count, and an account that is added to."""
    indices, weights, E = s.indices(), s.weights().detach(), len(s.ranks)
    counted = torch.arange(s.tokens).to(s.device) % 3 > 0
    found = [
        *ops.attribute(indices, weights, 1, E, counted=counted),
        *ops.attribute(indices, weights, s.tokens, E),
        *ops.attribute(indices, weights, 2, E, request=indices[:, 0].contiguous() % 3),
    ]
    account = Attribution.zeros(1, 1, E, s.device)
    account.count_(0, indices[None], weights[None])
    return [*found, *account]


def permutation(s: Setup) -> list[Tensor]:
    x, plan = s.x(s.tokens, s.hidden), s.plan()
    rows = ops.permute(x, plan)
    return _backward(ops.unpermute(rows, plan, s.weights()), ops.unpermute(rows, plan))


def grouped_gemm(s: Setup) -> list[Tensor]:
    plan, E = s.plan(), len(s.ranks)
    x = s.x(plan.num_rows, s.hidden)
    stack = s.weight(E * s.intermediate, s.hidden).view(E, s.intermediate, s.hidden)
    apart = [s.weight(s.intermediate, s.hidden) for _ in range(E)]
    return _backward(ops.grouped_gemm(x, stack, plan), ops.grouped_gemm(x, apart, plan))


def _factors(s: Setup, out: int, width: int) -> tuple[Tensor, Tensor]:
    a, b = make_pair(out, width, sum(s.lowrank_ranks()), s.device, s.dtype)
    return a.requires_grad_(), b.requires_grad_()


def lowrank(s: Setup) -> list[Tensor]:
    plan, ranks = s.plan(), s.lowrank_ranks()
    a, b = _factors(s, s.intermediate, s.hidden)
    z = ops.shrink(s.x(plan.num_rows, s.hidden), a, plan, ranks)
    return _backward(ops.expand(z, b, plan, ranks))


def gated_mix(s: Setup) -> list[Tensor]:
    plan, ranks = s.plan(), s.lowrank_ranks()
    size = packed_size(tuple(ranks), s.tokens, s.top_k)
    sides = []
    for _ in ("gate", "up"):
        sides += [s.x(1, size).view(-1), _factors(s, s.intermediate, s.hidden)[1], ranks]
    gate, up = (s.x(s.tokens, s.intermediate) for _ in range(2))
    return _backward(*ops.gated_mix(gate, up, s.weights(), plan, *sides))


def experts(s: Setup) -> list[Tensor]:
    D, F = s.hidden, s.intermediate
    shapes = ((F, D), (F, D), (D, F))
    sides = []
    for ranks, (out, width) in zip(projection_ranks(s.ranks), shapes, strict=True):
        sides.append(make_projection(ranks, out, width, s.device, s.dtype))
    for entry in (entry for side in sides for entry in side if entry is not None):
        for tensor in entry if isinstance(entry, tuple) else (entry,):
            tensor.requires_grad_()
    given = (s.x(s.tokens, D), s.indices(), s.weights(), *sides)
    with torch.no_grad():  # a way of its own for few tokens
        alone = ops.experts(*given)
    return [*_backward(ops.experts(*given)), alone]


@torch.no_grad()
def decoder(s: Setup) -> list[Tensor]:
    """What stands around the layer: norms, heads of 64 with and without a cache, one token."""
    heads, head, rows = 4, 64, min(s.tokens, 64)
    width, narrow = heads * head, heads // 2 * head
    place = torch.zeros(2, rows, heads // 2, rows + 16, head).to(s.device, s.dtype)
    columns = torch.arange(rows + 16).to(s.device)
    acc = torch.promote_types(s.dtype, torch.float32)
    rotary = tuple(torch.rand(1, 1, head // 2).to(s.device, acc) for _ in "cs")
    weights = tuple(s.x(1, size)[0].detach() for size in (width, narrow))
    q, k, v = (s.x(rows, size).detach()[:, None] for size in (width, narrow, narrow))
    alone = rotated_heads(q, k, v, *weights, 1e-6, rotary)
    where = Place(*place, columns[3:4])
    cached = rotated_heads(q, k, v, *weights, 1e-6, rotary, where)
    real = torch.ones(rows, rows + 16, dtype=torch.bool).to(s.device)
    filled = Filled(real, columns[4:5].repeat(rows))
    x = s.x(s.tokens, s.hidden).detach()
    norms = [rms_norm(x, weight, 1e-6, r) for weight in x[:1] for r in (None, x)]
    tables = (torch.rand(rows + 16, head // 2).to(s.device, acc) for _ in "cs")
    begun = begin_token(filled.end, columns[:rows, None].clone(), real, columns[:1], tuple(tables))
    chosen, ended = greedy(x), torch.zeros(len(x), dtype=torch.bool).to(s.device)
    settle(chosen, chosen.clone()[:, None], ended, chosen[:1], 0)
    attended = attend(*cached, real[:, None, None], False, filled)
    return [*norms, *alone, *begun, attended]


FAMILIES = {
    function.__name__: function
    for function in (routing, attribution, permutation, grouped_gemm, lowrank, gated_mix, experts,
                     decoder)
}  # fmt: skip

"""The reference against itself: the formulas on top of its files, each computed another way.

Traps covered: the identity that the kernels rest on, merged weights, the order of ties, masks
against a router without those rows, the gradient of min(b, 0), probabilities that do not exist.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import reference
from flexmore_kernels import testing
from flexmore_kernels.testing import CASE_IDS, CASES, assert_accurate

F64 = torch.float64


def make(case):
    x = testing.make_x(case.tokens, case.hidden, dtype=F64)
    indices, weights = testing.make_routing(case, dtype=F64)
    return x, indices, weights, *testing.make_experts(case, dtype=F64)


def merged(entries):
    """Every expert's own full-size matrix, W_0 + B A."""
    base = entries[0]
    full = [base if entry is None else entry for entry in entries]
    return [base + w[1] @ w[0] if isinstance(w, tuple) else w for w in full]


def output_and_gradients(function, inputs):
    leaves = testing.leaves(inputs)
    wanted = [t for t in testing.tensors(leaves) if t.requires_grad]
    y = function(*leaves)
    return y, torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_experts_are_their_merged_matrices(case):
    x, indices, weights, gate, up, down = make(case)
    y = reference.experts(x, indices, weights, gate, up, down)
    same = reference.experts(x, indices, weights, merged(gate), merged(up), merged(down))
    assert_accurate(y, same)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_base_is_paid_once(case):
    """The kernels' identity, forward and backward: the shared down projection acts on one sum."""

    def once(x, indices, weights, gate, up, down):
        G, U, h_sum, y = x @ gate[0].T, x @ up[0].T, 0, torch.zeros_like(x)

        def delta(value, base, entry):
            if entry is None:
                return base
            if isinstance(entry, torch.Tensor):
                return value @ entry.T
            return base + value @ entry[0].T @ entry[1].T

        for e in range(len(gate)):
            p = torch.where(indices == e, weights, 0).sum(1, keepdim=True)
            h = F.silu(delta(x, G, gate[e])) * delta(x, U, up[e])
            if isinstance(down[e], torch.Tensor) and e > 0:
                y = y + (p * h) @ down[e].T
                continue
            h_sum = h_sum + p * h
            if isinstance(down[e], tuple):
                a, b = down[e]
                y = y + p * (h @ a.T) @ b.T
        return y + h_sum @ down[0].T

    inputs = make(case)
    y, grads = output_and_gradients(reference.experts, inputs)
    y_once, grads_once = output_and_gradients(once, inputs)
    assert_accurate(y_once, y.detach(), name="y")
    for index, (mine, grad) in enumerate(zip(grads_once, grads, strict=True)):
        assert (mine is None) == (grad is None)
        if grad is not None:
            assert_accurate(mine, grad, name=f"gradient {index}")


@pytest.mark.parametrize(
    "name", ["plain", "odd_sizes", "ragged_ranks", "no_tokens", "many_experts"]
)
def test_experts_are_the_small_ops_in_a_row(name):
    case = CASES[CASE_IDS.index(name)]
    x, indices, weights, gate, up, down = make(case)
    plan = reference.make_plan(indices, case.num_experts)

    def stacked(entries):
        ranks = tuple(0 if isinstance(e, torch.Tensor) else e[0].shape[0] for e in entries)
        a = torch.cat([e[0] for e in entries[1:]])
        return a, torch.cat([e[1] for e in entries[1:]], dim=1), ranks

    (a_g, b_g, r_g), (a_u, b_u, r_u), (a_d, b_d, r_d) = map(stacked, (gate, up, down))
    x_N = reference.permute(x, plan)
    z_g, z_u = reference.shrink(x_N, a_g, plan, r_g), reference.shrink(x_N, a_u, plan, r_u)
    base = x @ gate[0].T, x @ up[0].T
    mixed, h_N = reference.gated_mix(*base, weights, plan, z_g, b_g, r_g, z_u, b_u, r_u)
    y_N = reference.expand(reference.shrink(h_N, a_d, plan, r_d), b_d, plan, r_d)
    y = mixed @ down[0].T + reference.unpermute(y_N, plan, weights)
    assert_accurate(y, reference.experts(x, indices, weights, gate, up, down))
    grouped = reference.grouped_gemm(h_N, torch.stack(merged(down)), plan)
    assert_accurate(reference.unpermute(grouped, plan, weights), y)
    sides = [reference.StackedFactors((p[0], *[None] * (case.num_experts - 1)), *stacked(p))
             for p in (gate, up, down)]  # fmt: skip
    assert_accurate(reference.experts(x, indices, weights, *sides), y)


def test_experts_of_sorted_rows():
    case = CASES[CASE_IDS.index("triples")]
    _, _, _, *sides = make(case)
    counts = torch.tensor([2, 0, 3, 1, 2])
    x, weights = torch.randn(10, case.hidden, dtype=F64), torch.rand(10, dtype=F64)
    indices = torch.cat([torch.arange(5).repeat_interleave(counts), torch.tensor([5, 5])])
    one_each = reference.experts(x, indices[:, None], weights[:, None], *sides)
    assert_accurate(reference.experts(x, None, weights, *sides, counts=counts), one_each)


@pytest.mark.parametrize("norm", [False, True])
def test_routing_gradient_is_the_formula(norm):
    logits = torch.randn(6, 5, dtype=F64, requires_grad=True)
    mask = torch.rand(6, 5) > 0.3
    mask[0], mask[1] = False, torch.tensor([True, False, False, False, False])
    _, w, indices = reference.topk_route(logits, top_k=3, mask=mask, norm_topk_prob=norm)
    dw = torch.randn_like(w)
    (dv,) = torch.autograd.grad(w, logits, dw)
    expected = torch.zeros_like(dv)
    for t in range(6):
        chosen = {int(e): k for k, e in enumerate(indices[t]) if e < 5}
        allowed = chosen if norm else mask[t].nonzero().flatten().tolist()
        p = logits[t].detach().masked_fill(~mask[t], -torch.inf).softmax(0)
        if norm:
            p = p / sum(p[e] for e in chosen) if chosen else p
        mean = sum(p[e] * dw[t, k] for e, k in chosen.items())
        for e in allowed:
            expected[t, e] = p[e] * ((dw[t, chosen[e]] if e in chosen else 0) - mean)
    assert_accurate(dv, expected)


def test_routing_ties_go_to_the_smaller_index():
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert reference.topk_route(logits, top_k=3).indices.tolist() == [[1, 2, 0], [0, 1, 2]]


def test_routing_mask_is_a_router_without_those_rows():
    x, weight = torch.randn(9, 8, dtype=F64), torch.randn(6, 8, dtype=F64)
    keep = torch.tensor([0, 2, 3, 5])
    mask = torch.zeros(6, dtype=torch.bool).index_fill(0, keep, True)
    masked = reference.topk_route(x, weight, top_k=5, mask=mask)
    sliced = reference.topk_route(x, weight[keep], top_k=4)
    assert torch.equal(masked.indices[:, :4], keep[sliced.indices])
    assert (masked.indices[:, 4] == 6).all() and (masked.weights[:, 4] == 0).all()
    assert_accurate(masked.weights[:, :4], sliced.weights)


def test_routing_bias_counts_only_below_zero():
    logits = torch.zeros(1, 4, dtype=F64)
    bias = torch.tensor([-1.0, 0.0, 1.0], dtype=F64, requires_grad=True)
    routing = reference.topk_route(logits, top_k=4, bias=bias)
    assert routing.indices.tolist() == [[0, 2, 3, 1]]
    dw = torch.randn(1, 4, dtype=F64)
    (dbias,) = torch.autograd.grad(routing.weights, bias, dw)
    v = torch.tensor([[0.0, -1.0, 0.0, 0.0]], dtype=F64, requires_grad=True)
    (dv,) = torch.autograd.grad(reference.topk_route(v, top_k=4).weights, v, dw)
    assert_accurate(dbias, dv[0, 1:] * torch.tensor([1.0, 0.5, 0.0], dtype=F64))


def test_routing_without_a_softmax_is_empty():
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[1.0, -inf, 0.0], [nan, 0.0, 1.0], [-inf, -inf, -inf], [inf, 0.0, 0.0], [nan, 0.0, 1.0]],
        dtype=F64, requires_grad=True,
    )  # fmt: skip
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[4, 0] = False
    routing = reference.topk_route(logits, top_k=3, mask=mask)
    assert routing.indices.tolist() == [[0, 2, 1], [3, 3, 3], [3, 3, 3], [3, 3, 3], [2, 1, 3]]
    (grad,) = torch.autograd.grad(routing.weights, logits, torch.randn(5, 3, dtype=F64))
    assert grad.isfinite().all() and (grad[1:4] == 0).all()


def test_from_dense_is_the_dense_ffn():
    gate, up, down = (torch.randn(s, dtype=F64) for s in ((12, 8), (12, 8), (8, 12)))
    layer = reference.FlexMoRE.from_dense(
        gate, up, down, [0, 3, 0, (0, "full", 2)], 2, norm_topk_prob=True
    )
    x = torch.randn(7, 8, dtype=F64)
    dense = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert_accurate(layer(x), dense)

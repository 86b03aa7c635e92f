"""Gated mix against the reference: both outputs and seven gradients by the accuracy rule.

Traps covered: tokens grouped by set and not (E > 8), ranks too large for the fused kernel, tiles
that some tokens' experts only are in, Inf and NaN of one token beside others, tails and empty
tokens (memory is poisoned: an unwritten number would show as NaN).
"""

from __future__ import annotations

import pytest
import torch
from common import skip_interpreted, skip_narrow, some_plan
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from benchmarks.bench_gated_mix import plain_mix
from flexmore_kernels import backend, ops
from flexmore_kernels.ragged import packed_size
from flexmore_kernels.testing import (
    CASE_IDS,
    CASES,
    Case,
    assert_accurate,
    assert_accurate_draws,
    assert_same,
    make_routing,
    make_weight,
    make_x,
    projection_ranks,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MORE = (
    Case("tiles", "tokens and columns past a tile of 64; the last tile of tokens has one",
         65, 8, 80, (0, 16, 16, 16), 2),
    Case("eight_experts", "the most experts that tokens are grouped by set for",
         21, 8, 24, (0, *(2,) * 7), 3),
    Case("rank_steps", "ranks past a rank block of 64, gate unlike up",
         9, 8, 40, (0, (80, 16, 0), (144, 96, 0)), 2),
    Case("large_rank", "a rank too large for the fused kernel: expand, then mix",
         7, 8, 24, (0, 272, 3), 2),
)  # fmt: skip
DRAWS = 8  # of the reference: a case of few numbers may be right by luck in one draw
NAMES = ("gate", "up", "weights", "z_gate", "b_gate", "z_up", "b_up")


def ranks_of(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The case's gate and up ranks; an expert of full size has none."""
    gate, up, _ = projection_ranks(case.ranks)
    return tuple(tuple(0 if r == "full" else r for r in side) for side in (gate, up))


def make_inputs(plan, ranks, width, device, dtype=torch.float32) -> dict[str, Tensor]:
    """The float arguments of the op, by name."""
    T, K = plan.slot_to_row.shape
    sides = {}
    for side, side_ranks in zip(("gate", "up"), ranks, strict=True):
        z = make_x(1, packed_size(side_ranks, T, K), device, dtype).flatten()
        sides |= {f"z_{side}": z, f"b_{side}": make_weight(width, sum(side_ranks), device, dtype)}
    weights = torch.rand(T, K, device=device, dtype=torch.promote_types(dtype, torch.float32))
    made = {name: make_x(T, width, device, dtype) for name in ("gate", "up")}
    return made | {"weights": weights} | sides


def grads(function, plan, ranks, inputs, dmixed, drows):
    """mixed, rows and the gradients of the seven float arguments."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES}
    out = function(plan=plan, ranks_gate=ranks[0], ranks_up=ranks[1], **leaves)
    return *(o.detach() for o in out), *torch.autograd.grad(
        out, list(leaves.values()), (dmixed, drows)
    )


def float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in inputs.items()}


@pytest.mark.parametrize("case", (*CASES, *MORE), ids=[*CASE_IDS, *(c.name for c in MORE)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_cases(case, dtype, device, kernels):
    skip_interpreted(kernels, device, dtype)
    ranks, width = ranks_of(case), case.intermediate
    plan = ops.make_plan(make_routing(case, device)[0], case.num_experts)
    truth, same = [], []
    for _ in range(1 if dtype == torch.float64 else DRAWS):  # float64 has a fixed allowance
        inputs = make_inputs(plan, ranks, width, device, dtype)
        cotangents = [make_x(n, width, device, dtype) for n in (plan.num_tokens, plan.num_rows)]
        wide = [c.double() for c in cotangents]
        truth.append(grads(reference.gated_mix, plan, ranks, float64(inputs), *wide))
        twin = grads(reference.gated_mix, plan, ranks, inputs, *cotangents)
        same.append((*twin[:2], *grads(plain_mix, plan, ranks, inputs, *cotangents)[2:]))
    ours = grads(ops.gated_mix, plan, ranks, inputs, *cotangents)
    names = ("mixed", "rows", *(f"d{name}" for name in NAMES))
    for name, o, *columns in zip(
        names, ours, zip(*truth, strict=True), zip(*same, strict=True), strict=True
    ):
        assert_accurate_draws([o], *columns, name)


@pytest.mark.parametrize("ranks", ((0, 3, 17, 1), (16, 0, 32, 16)), ids=str)
def test_strided_inputs(ranks, device, kernels):
    """B of any strides is read in place; all else may be strided too."""
    plan = some_plan(device)
    plain = make_inputs(plan, (ranks, ranks), 40, device)
    strided = {name: torch.stack((t, t), -1)[..., 0] for name, t in plain.items()}
    strided |= {name: plain[name].T.contiguous().T for name in ("gate", "b_gate", "b_up")}
    cotangents = [torch.randn(40, n, device=device).T for n in (6, 18)]
    ours = grads(ops.gated_mix, plan, (ranks, ranks), strided, *cotangents)
    same = grads(reference.gated_mix, plan, (ranks, ranks), plain, *cotangents)
    wide = [c.double() for c in cotangents]
    truth = grads(reference.gated_mix, plan, (ranks, ranks), float64(plain), *wide)
    for o, t, s in zip(ours, truth, same, strict=True):
        assert_accurate(o, t, s)


def test_the_bare_base_is_swiglu(device, kernels):
    """Without any rank, h is SwiGLU of the token's base and mixed is it times the weights' sum."""
    plan = some_plan(device)
    ranks = ((0,) * 4, (0,) * 4)
    inputs = make_inputs(plan, ranks, 40, device)
    mixed, rows = ops.gated_mix(plan=plan, ranks_gate=ranks[0], ranks_up=ranks[1], **inputs)
    h = torch.nn.functional.silu(inputs["gate"]) * inputs["up"]
    torch.testing.assert_close(rows, ops.permute(h, plan))
    weights = inputs["weights"].masked_fill(plan.slot_to_row < 0, 0)
    torch.testing.assert_close(mixed, h * weights.sum(1, keepdim=True))


def test_base_and_delta_that_cancel(device, kernels):
    """Added before they are rounded: a delta that is rounded by itself would leave nothing."""
    dtype, ranks = torch.bfloat16, (3, 0, 16, 5)
    skip_narrow(kernels, device, dtype)
    plan = some_plan(device, 40, 4, 1)
    inputs = make_inputs(plan, (ranks, ranks), 24, device, dtype)
    factors = (inputs[name].double() for name in ("z_gate", "b_gate"))
    delta = reference.unpermute(reference.expand(*factors, plan, ranks), plan)
    inputs["gate"] = -delta.to(dtype)
    options = {"plan": plan, "ranks_gate": ranks, "ranks_up": ranks}
    truth = reference.gated_mix(**options, **float64(inputs))
    same = reference.gated_mix(**options, **inputs)
    for columns in zip(ops.gated_mix(**options, **inputs), truth, same, strict=True):
        assert_accurate(*columns)


@pytest.mark.parametrize("bad", (float("inf"), float("nan")), ids=str)
def test_one_token_does_not_reach_another(bad, device, kernels):
    """Token 0 and its rows hold Inf or NaN; the other tokens of its tile are as without."""
    plan, ranks = some_plan(device, 40), ((3, 0, 16, 5),) * 2
    inputs = make_inputs(plan, ranks, 24, device)
    options = {"plan": plan, "ranks_gate": ranks[0], "ranks_up": ranks[1]}
    want = ops.gated_mix(**options, **inputs)
    for name in ("gate", "up", "weights"):
        inputs[name] = inputs[name].clone()
        inputs[name][0] = bad
    mixed, rows = ops.gated_mix(**options, **inputs)
    assert_same(mixed[1:], want[0][1:])
    own = torch.zeros(plan.num_rows, dtype=torch.bool, device=device)
    own[plan.slot_to_row[0][plan.slot_to_row[0] >= 0].long()] = True
    assert_same(rows[~own], want[1][~own])


def test_what_no_row_owns_is_not_read(device, kernels):
    """NaN in z past its used length and in weights of empty slots reaches nothing."""
    plan, ranks = some_plan(device, 12), ((3, 0, 16, 5), (2, 4, 0, 1))
    inputs = make_inputs(plan, ranks, 24, device)
    for side, side_ranks in zip(("z_gate", "z_up"), ranks, strict=True):
        used = sum(n * r for n, r in zip(plan.rows.sizes, side_ranks, strict=True))
        inputs[side][used:] = float("nan")
    inputs["weights"][plan.slot_to_row < 0] = float("nan")
    cotangents = torch.randn(12, 24, device=device), torch.randn(36, 24, device=device)
    cotangents[1][plan.row_offsets[-1] :] = float("nan")
    results = grads(ops.gated_mix, plan, ranks, inputs, *cotangents)
    assert all(result.isfinite().all() for result in results)
    assert (results[1][plan.row_offsets[-1] :] == 0).all()
    assert (results[4][plan.slot_to_row < 0] == 0).all()


def test_extreme_pre_activations(device, kernels):
    """silu at both ends: no overflow where exp overflows, zero where the sigmoid underflows."""
    plan = ops.make_plan(torch.zeros(1, 1, dtype=torch.int64, device=device), 2)
    gate = torch.tensor([[-1e30, -200.0, -88.0, -1e-30, 0.0, 88.0, 200.0, 1e30]], device=device)
    inputs = make_inputs(plan, ((0, 0), (0, 0)), 8, device) | {"gate": gate}
    inputs["up"] = torch.ones_like(gate)
    cotangents = torch.ones_like(gate), torch.ones_like(gate)
    ours = grads(ops.gated_mix, plan, ((0, 0), (0, 0)), inputs, *cotangents)
    assert all(result.isfinite().all() for result in ours)
    torch.testing.assert_close(ours[1], torch.nn.functional.silu(gate))


def test_swiglu_mix_is_gated_mix_of_rows(device, kernels):
    """The raw kernel of ready rows, which large ranks and many experts go through."""
    plan = some_plan(device, 20)
    raw = backend.kernels("gated_mix", plan.indices)
    gate, up = (torch.randn(60, 48, device=device) for _ in range(2))
    weights = torch.rand(20, 3, device=device)
    mixed, rows = raw.swiglu_mix(gate, up, weights, plan.slot_to_row)
    routed = (plan.row_to_slot >= 0)[:, None]
    want = (torch.nn.functional.silu(gate) * up).where(routed, 0)
    torch.testing.assert_close(rows, want)
    torch.testing.assert_close(mixed, reference.unpermute(want, plan, weights))
    dmixed = torch.randn(20, 48, device=device)
    rest = (gate, up, weights, plan.row_to_slot, plan.top_k)
    results = raw.swiglu_mix_backward(dmixed, None, *rest)
    zeros = raw.swiglu_mix_backward(dmixed, torch.zeros_like(gate), *rest)
    for a, b in zip(results, zeros, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(results[3], rows)


@given(data=st.data())
def test_any_shape(data, device, kernels):
    T, E, width = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 10)), 5
    K = data.draw(st.integers(1, E))
    lists = st.lists(st.integers(0, 9), min_size=E, max_size=E).map(tuple)
    ranks = data.draw(lists), data.draw(lists)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    plan = some_plan(device, T, E, K)
    inputs = make_inputs(plan, ranks, width, device)
    ours = ops.gated_mix(plan=plan, ranks_gate=ranks[0], ranks_up=ranks[1], **inputs)
    twin = reference.gated_mix(plan=plan, ranks_gate=ranks[0], ranks_up=ranks[1], **inputs)
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", (4, 9), ids=("by_set", "many_experts"))
def test_gradcheck(experts, device, kernels):
    plan = some_plan(device, 4, experts)
    ranks = (2, 0, 3, 1, *(1,) * (experts - 4)), (1, 2, 0, 3, *(0,) * (experts - 4))
    inputs = make_inputs(plan, ranks, 3, device, torch.float64)
    leaves = [inputs[name].requires_grad_() for name in NAMES]

    def check(*values):
        given = dict(zip(NAMES, values, strict=True))
        return ops.gated_mix(plan=plan, ranks_gate=ranks[0], ranks_up=ranks[1], **given)

    assert torch.autograd.gradcheck(check, leaves, fast_mode=True)


def test_same_bits_every_time(device, kernels):
    plan, ranks = some_plan(device, 90), ((0, 16, 3, 40),) * 2
    inputs = make_inputs(plan, ranks, 40, device)
    cotangents = torch.randn(90, 40, device=device), torch.randn(270, 40, device=device)
    first, again = (grads(ops.gated_mix, plan, ranks, inputs, *cotangents) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)

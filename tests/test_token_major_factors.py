"""Gradients of the factors by recomputation, the compiled library's on Hopper, by the rule.

Cases and traps: test_token_major.py; and experts and projections whose gradients are not asked for,
rows in several parts, Inf and NaN of experts that a token did not choose.
"""

from __future__ import annotations

import functools

import pytest
import torch
from common import some_ids
from test_token_major import CASES, Case, make_inputs, projection
from torch import Tensor
from torch.nn.functional import silu

from flexmore_kernels.projection import padded_rank
from flexmore_kernels.testing import assert_accurate_draws, assert_same, make_x, to_float64

pytest.importorskip("triton")

DRAWS = 2
NAMES = ("dB of gate", "dB of up", "dA of down")
OTHER_CASES = {
    "long": Case("many steps, more than a chunk of columns", 3000, 32, 272, (0, 64, 33, 0), 3),
    "experts": Case("eight experts", 500, 32, 144, (0, 0, *[16, 32, 64] * 2), 6),
}


def plain(inputs, ids: Tensor, dmixed: Tensor, dy: Tensor) -> list[Tensor]:
    """The packed gradients in plain PyTorch: every expert on every token, by autograd."""
    x, gate, up, weights, sides = inputs
    grads: list[list] = [[], [], []]
    for e, entries in enumerate(zip(*sides, strict=True)):
        pairs = [entry if isinstance(entry, tuple) else None for entry in entries]
        chosen = ids == e
        p = (weights * chosen).sum(1, keepdim=True).to(x.dtype)
        bs = [None if pair is None else pair[1].detach().requires_grad_() for pair in pairs[:2]]
        g, u = (
            base.detach() + 0 if b is None else base + (x @ pair[0].T) @ b.T
            for base, pair, b in zip((gate, up), pairs, bs, strict=False)
        )
        q = None if pairs[2] is None else dy @ pairs[2][1]
        dh = dmixed if q is None else dmixed + q @ pairs[2][0]
        h = silu(g) * u
        some = chosen.any(1, keepdim=True)
        dh = torch.where(some, p * dh, 0)
        wanted = [b for b in bs if b is not None]
        found = iter(torch.autograd.grad(h, wanted, dh) if wanted else ())
        for index, b in enumerate(bs):
            if b is not None:
                grads[index].append(padded(next(found)))
        if q is not None:
            grads[2].append(padded((torch.where(some, h, 0).T @ (p * q)).detach()))
    width = gate.shape[1]
    db_gate, db_up, da = (torch.cat(g, 1) if g else gate.new_empty(width, 0) for g in grads)
    return [db_gate, db_up, da.T]


def padded(b: Tensor) -> Tensor:
    return torch.nn.functional.pad(b, (0, padded_rank(b.shape[1]) - b.shape[1]))


def ours(hopper, inputs, ids: Tensor, dmixed: Tensor, dy: Tensor, wanted=None) -> tuple:
    from flexmore_kernels._triton.routed import Routed

    layer = Routed(inputs.x, ids, [projection(side) for side in inputs.sides])
    s = layer.shrunk()
    q = dy @ layer.packed[2].b
    wanted = wanted or [[True] * len(inputs.sides[0])] * 3
    given = (dmixed, inputs.gate, inputs.up, inputs.weights, layer.plan, s, q, layer.sides)
    return hopper.factor_grads(*given, wanted)


def make_all(case: Case, device: str, dtype: torch.dtype) -> tuple:
    inputs = make_inputs(case, device, dtype)
    ids = some_ids(case.tokens, len(case.ranks), case.top_k, case.empty).to(device)
    dmixed = make_x(case.tokens, case.width, device, dtype)
    return inputs, ids, dmixed, make_x(case.tokens, case.hidden, device, dtype)


def assert_right(name: str, case: Case, names: tuple, device, dtype, ours, plain) -> None:
    """What a kernel gives (ours) twice the same bits, and by the rule against plain PyTorch."""
    draws: list[tuple] = []
    for _ in range(DRAWS):
        given = make_all(case, device, dtype)
        if name == "unused":
            given[1].masked_fill_(given[1] == 2, len(case.ranks))
        found = ours(*given)
        for a, b in zip(found, ours(*given), strict=True):
            assert_same(a, b)
        draws.append((found, plain(*to_float64(given)), plain(*given)))
    for index, what in enumerate(names):
        if draws[0][0][index].numel():
            outs, exact, same = (
                [part[index] for part in parts] for parts in zip(*draws, strict=True)
            )
            assert_accurate_draws(outs, exact, same, what)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", (*CASES, *OTHER_CASES))
def test_gradients_of_the_factors(name, dtype, device, hopper):
    case, mine = {**CASES, **OTHER_CASES}[name], functools.partial(ours, hopper)
    assert_right(name, case, NAMES, device, dtype, mine, plain)


@pytest.mark.gpu
def test_only_those_that_are_wanted(device, hopper):
    case = CASES["rank_32"]._replace(ranks=(0, 32, 20, 16))
    given = make_all(case, device, torch.bfloat16)
    everything = ours(hopper, *given)
    wanted = [(False, True, False, False), (False, True, False, True), (False, False, False, True)]
    columns = [slice(0, 32), slice(32, 64), slice(64, 80)]  # of experts 1, 2 and 3
    found = ours(hopper, *given, wanted)
    for index, which in enumerate(wanted):
        for e, span in enumerate(columns, 1):
            if which[e]:
                a, b = (g[index].T if index == 2 else g[index] for g in (found, everything))
                assert torch.equal(a[:, span], b[:, span])


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_was_not_chosen_does_not_reach_a_sum(bad, device, hopper):
    case = CASES["rank_16"]
    inputs, ids, dmixed, dy = make_all(case, device, torch.bfloat16)
    chose = (ids == 3).any(1)
    assert chose.any() and not chose.all()
    for values in (inputs.x, inputs.gate, dmixed, dy, inputs.weights):
        values[~chose] = bad
    inputs.sides[1][2][1].fill_(bad)  # B of up of expert 2
    mine = slice(32, 48)  # of expert 3
    db_gate, db_up, da = ours(hopper, inputs, ids, dmixed, dy)
    for grad in (db_gate[:, mine], db_up[:, mine], da[mine]):
        assert grad.isfinite().all()
    assert not db_up[:, 16:32].isfinite().any()

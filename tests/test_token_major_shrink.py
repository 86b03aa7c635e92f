"""Gradients of the shrunk inputs by recomputation, the compiled library's on Hopper, by the rule.

Cases and traps: test_token_major.py; and tiles of experts of unlike size, columns in planes, zeros
where a token did not choose an expert, Inf and NaN of other tokens and experts.
"""

from __future__ import annotations

import functools

import pytest
import torch
from test_token_major import CASES, Case, projection
from test_token_major_factors import assert_right, make_all
from torch import Tensor
from torch.nn.functional import silu

from flexmore_kernels.projection import padded_rank
from flexmore_kernels.testing import assert_accurate_draws, to_float64

pytest.importorskip("triton")

NAMES = ("ds of gate", "ds of up")
OTHER_CASES = {
    "long": Case("many tiles, columns in planes", 3000, 32, 1040, (0, 64, 33, 0), 3),
    "experts": Case("eight experts", 900, 32, 144, (0, 0, *[16, 32, 64] * 2), 6),
    "whole": Case("columns in one piece", 20000, 16, 496, (0, 64, 64, 64), 3),
}


def plain(inputs, ids: Tensor, dmixed: Tensor, dy: Tensor) -> list[Tensor]:
    """ds of gate and of up in plain PyTorch: every expert on every token, by autograd."""
    x, gate, up, weights, sides = inputs
    grads: list[list] = [[], []]
    for e, entries in enumerate(zip(*sides, strict=True)):
        pairs = [entry if isinstance(entry, tuple) else None for entry in entries]
        chosen = ids == e
        p = (weights * chosen).sum(1, keepdim=True).to(x.dtype)
        ss = [None if pair is None else (x @ pair[0].T).requires_grad_() for pair in pairs[:2]]
        g, u = (
            base.detach() + 0 if s is None else base + s @ pair[1].T
            for base, pair, s in zip((gate, up), pairs, ss, strict=False)
        )
        dh = dmixed if pairs[2] is None else dmixed + (dy @ pairs[2][1]) @ pairs[2][0]
        h = silu(g) * u
        some = chosen.any(1, keepdim=True)
        wanted = [s for s in ss if s is not None]
        found = iter(torch.autograd.grad(h, wanted, p * dh) if wanted else ())
        for index, s in enumerate(ss):
            if s is not None:
                ds = torch.where(some, next(found), 0)
                padding = padded_rank(ds.shape[1]) - ds.shape[1]
                grads[index].append(torch.nn.functional.pad(ds, (0, padding)))
    return [torch.cat(g, 1) if g else gate.new_empty(len(x), 0) for g in grads]


def ours(hopper, inputs, ids: Tensor, dmixed: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    from flexmore_kernels._triton.routed import Routed

    layer = Routed(inputs.x, ids, [projection(side) for side in inputs.sides])
    gate, up, down = layer.packed
    s, q = layer.shrunk(), dy @ down.b
    given = (dmixed, inputs.gate, inputs.up, inputs.weights, layer.plan, s, q, layer.sides)
    return hopper.input_grads(*given).split([len(gate.a), len(up.a)], 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", (*CASES, *OTHER_CASES))
def test_gradients_of_the_shrunk_inputs(name, dtype, device, hopper):
    case, mine = {**CASES, **OTHER_CASES}[name], functools.partial(ours, hopper)
    assert_right(name, case, NAMES, device, dtype, mine, plain)


@pytest.mark.gpu
def test_tiles_of_experts_of_unlike_size(device, hopper):
    case = OTHER_CASES["long"]._replace(ranks=(0, 16, 16, 16), top_k=1)
    inputs, _, dmixed, dy = make_all(case, device, torch.bfloat16)
    ids = (torch.rand(case.tokens, 1, device=device) * 40).long().clamp(max=2) + 1
    given = inputs, ids, dmixed, dy
    outs, exact, same = ours(hopper, *given), plain(*to_float64(given)), plain(*given)
    for index, what in enumerate(NAMES):
        assert_accurate_draws([outs[index]], [exact[index]], [same[index]], what)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_was_not_chosen_does_not_reach_a_sum(bad, device, hopper):
    inputs, ids, dmixed, dy = make_all(CASES["rank_16"], device, torch.bfloat16)
    chose = (ids == 3).any(1)
    assert chose.any() and not chose.all()
    for values in (inputs.x, inputs.gate, dmixed, dy, inputs.weights):
        values[~chose] = bad
    inputs.sides[1][2][1].fill_(bad)  # B of up of expert 2
    mine = slice(32, 48)  # of expert 3
    for ds in ours(hopper, inputs, ids, dmixed, dy):
        assert ds[:, mine].isfinite().all()
        assert not ds[~chose][:, mine].any() and ds[chose][:, mine].any()

"""The middle of a token-major backward: dG, dU, their rows and those of h, dp, by the rule.

Triton's kernel in the interpreter (float32) and on a GPU, the compiled library's on Hopper. Cases
and traps: test_token_major.py; and rows that are not asked for, which must not be written.
"""

from __future__ import annotations

import pytest
import torch
from common import skip_interpreted, some_ids
from test_token_major import CASES, DTYPES, make_inputs, projection
from torch import Tensor
from torch.nn.functional import silu

from flexmore_kernels import backend
from flexmore_kernels.testing import assert_accurate_draws, make_x, to_float64

pytest.importorskip("triton")

DRAWS = 2
ALL = 7


def plain(inputs, ids: Tensor, dmixed: Tensor, dy: Tensor) -> list[Tensor]:
    """dgate, dup, and of each expert rows of dgate, dup, h and dp for all tokens, by autograd."""
    x, gate, up, weights, sides = inputs
    sums = [torch.zeros_like(gate) for _ in "gu"]
    rows = []
    for e, entries in enumerate(zip(*sides, strict=True)):
        pairs = [entry if isinstance(entry, tuple) else None for entry in entries]
        chosen = (ids == e).any(1, keepdim=True)
        p = (weights * (ids == e)).sum(1, keepdim=True).to(x.dtype)
        g, u = (
            (base if pair is None else base + x @ pair[0].T @ pair[1].T).detach().requires_grad_()
            for base, pair in zip((gate, up), pairs, strict=False)
        )
        dh = dmixed if pairs[2] is None else dmixed + dy @ pairs[2][1] @ pairs[2][0]
        h = silu(g) * u
        dg, du = torch.autograd.grad(h, (g, u), p * dh)
        for total, one in zip(sums, (dg, du), strict=True):
            total += torch.where(chosen, one, 0)
        rows.append((dg, du, h.detach(), (dh * h).sum(1).detach()))
    return [*sums, *(torch.stack(part) for part in zip(*rows, strict=True))]


def ours(inputs, ids: Tensor, dmixed: Tensor, dy: Tensor, writes: tuple):
    """What the kernels give, and the rows' tokens and experts."""
    from flexmore_kernels._triton import token_major_backward
    from flexmore_kernels._triton.routed import Routed

    layer = Routed(inputs.x, ids, [projection(side) for side in inputs.sides])
    gate, up, down = layer.packed
    given = (inputs.gate, inputs.up, inputs.weights, layer.plan, layer.shrunk(), dy @ down.b)
    hopper = backend.hopper("token_major", inputs.x)
    ranks = [side.ranks for side in layer.sides]
    if hopper is not None and hopper.serves(*inputs.gate.shape, ranks):
        dgate, dup, dots = hopper.mix_backward(dmixed, *given, layer.sides)
        return layer, (dgate, dup, *[dmixed.new_empty(0, dmixed.shape[1])] * 3, dots)
    factors = (gate.b, gate.ranks, up.b, up.ranks, down.a, down.ranks)
    return layer, token_major_backward.mix_backward(dmixed, *given, *factors, writes)


def fuses(device: str, dtype: torch.dtype) -> bool:
    """Whether the kernel is the library's, which writes no rows."""
    return backend.hopper("token_major", torch.empty(0, device=device, dtype=dtype)) is not None


@pytest.fixture(autouse=True)
def small_batches_too(monkeypatch, device, kernels):
    if "triton" not in backend.available("experts", device) or kernels == "aten":
        pytest.skip("needs Triton's interpreter or a GPU")
    from flexmore_kernels._native import token_major

    monkeypatch.setattr(token_major, "FEWEST_TOKENS", 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_of_the_middle(case, dtype, device, kernels):
    skip_interpreted(kernels, device, dtype)
    E = len(case.ranks)
    names = ("dgate", "dup", "rows of dgate", "rows of dup", "rows of h", "dp")
    draws: dict[str, tuple[list, list, list]] = {name: ([], [], []) for name in names}
    ids = some_ids(case.tokens, E, case.top_k, case.empty).to(device)
    for _ in range(24 if case.tokens == 1 else DRAWS):  # a handful of numbers is right by luck
        inputs = make_inputs(case, device, dtype)
        dmixed = make_x(case.tokens, case.width, device, dtype)
        dy = make_x(case.tokens, case.hidden, device, dtype)
        layer, found = ours(inputs, ids, dmixed, dy, (ALL,) * E)
        exact = plain(*to_float64((inputs, ids, dmixed, dy)))
        same = plain(inputs, ids, dmixed, dy)
        slot = layer.plan.row_to_slot
        rows = torch.where(slot >= 0)[0]
        token, k = slot[rows].long() // case.top_k, slot[rows].long() % case.top_k
        expert = ids[token, k]
        low_rank = torch.tensor(
            [e > 0 and any(side.ranks[e] for side in layer.sides) for e in range(E)],
            device=device,
        )[expert]
        for index, name in enumerate(names):
            parts = [found[index], exact[index], same[index]]
            if index >= 2:
                kept = torch.ones_like(low_rank) if name == "dp" else low_rank
                if name != "dp" and not len(found[index]):
                    assert not kept.any() or fuses(device, dtype)
                    continue
                parts = [parts[0][rows[kept]], *(p[expert[kept], token[kept]] for p in parts[1:])]
            if parts[0].numel():
                if name == "dp":  # the kernels' sums are float32, plain PyTorch's are rounded
                    parts[2] = parts[2].to(parts[0].dtype)
                for kept, part in zip(draws[name], parts, strict=True):
                    kept.append(part)
    for name, (outs, exact, same) in draws.items():
        if outs:
            assert_accurate_draws(outs[-DRAWS:], exact, same, name)


@pytest.mark.parametrize("writes", ((0, 0, 0, 0), (0, 1, 0, 0), (0, 2, 4, 6)), ids=str)
def test_only_the_rows_that_are_wanted(writes, device, kernels):
    case, dtype = CASES["unused"], torch.float32
    inputs = make_inputs(case, device, dtype)
    ids = some_ids(case.tokens, 4, case.top_k, 0.2).to(device)
    dmixed = make_x(case.tokens, case.width, device, dtype)
    dy = make_x(case.tokens, case.hidden, device, dtype)
    layer, everything = ours(inputs, ids, dmixed, dy, (ALL,) * 4)
    _, found = ours(inputs, ids, dmixed, dy, writes)
    for index in (0, 1, 5):
        assert torch.equal(found[index], everything[index])
    slot = layer.plan.row_to_slot
    expert = torch.where(slot >= 0, ids.flatten()[slot.clamp(min=0).long()], -1)
    for index, bit in ((2, 2), (3, 4), (4, 1)):
        assert bool(len(found[index])) == any(which & bit for which in writes)
        for e in range(1, 4):
            if writes[e] & bit:
                mine = expert == e
                assert torch.equal(found[index][mine], everything[index][mine])

"""The middle of a token-major forward: the hidden sum and the shrunk rows by the accuracy rule.

Triton's three kernels in the interpreter (float32) and on a GPU, the compiled library's one kernel
on Hopper. Traps covered: ranks unlike by projection and none, ranks that are no multiple of 16,
tokens of one tile that chose different experts, tiles past the last token, empty slots, experts
that no token chose, widths that end within a chunk, Inf and NaN of experts that were not chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from common import skip_interpreted, some_ids
from torch import Tensor
from torch.nn.functional import silu

from flexmore_kernels import backend
from flexmore_kernels.projection import Projection
from flexmore_kernels.testing import (
    assert_accurate_draws,
    assert_same,
    make_projection,
    make_x,
    projection_ranks,
    to_float64,
)

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAWS = 2


class Case(NamedTuple):
    why: str
    tokens: int
    hidden: int
    width: int
    ranks: tuple
    top_k: int
    empty: float = 0.1


CASES = {
    "one": Case("a base and one expert", 70, 32, 48, (0, 64), 2),
    "rank_16": Case("six of rank 16", 130, 32, 208, (0, *[16] * 6), 5),
    "rank_32": Case("width past the last chunk", 77, 24, 112, (0, 32, 20), 2),
    "rank_64": Case("six of rank 64, every token all of them", 65, 32, 96, (0, *[64] * 6), 7, 0.0),
    "odd": Case("no multiples of 16", 100, 24, 80, (0, 1, 5, 48, 33), 3),
    "depths": Case("ranks of every size", 150, 32, 80, (0, 1, 17, 33, 64, (0, 33, 5)), 3),
    "one_depth": Case("a small rank beside a large", 70, 24, 64, (0, 3, 40), 1, 0.0),
    "triples": Case("unlike by projection", 90, 24, 64, (0, (16, 0, 3), (0, 0, 40), (0, 9, 0)), 2),
    "no_delta": Case("experts that are the base", 40, 16, 48, (0, (0, 0, 0), 16), 2),
    "unused": Case("an expert that no token chose", 33, 16, 32, (0, 16, 16, 16), 1, 0.5),
    "one_token": Case("less than a tile", 1, 16, 32, (0, 16, 64), 2, 0.0),
}


class Inputs(NamedTuple):
    x: Tensor
    gate: Tensor
    up: Tensor
    weights: Tensor
    sides: list  # of gate, up, down: E entries, a pair (a, b) or None


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    shapes = [(case.width, case.hidden)] * 2 + [(case.hidden, case.width)]
    sides = [
        make_projection(ranks, *shape, device, dtype)
        for ranks, shape in zip(projection_ranks(case.ranks), shapes, strict=True)
    ]
    gate, up = (make_x(case.tokens, case.width, device, dtype) for _ in range(2))
    weights = torch.rand(case.tokens, case.top_k, device=device)
    return Inputs(make_x(case.tokens, case.hidden, device, dtype), gate, up, weights, sides)


def plain(inputs: Inputs, ids: Tensor) -> tuple[Tensor, Tensor]:
    """mixed and s_down in plain PyTorch, in the inputs' dtype: every expert on every token."""
    x, gate, up, weights, sides = inputs
    mixed, shrunk = torch.zeros_like(gate), []
    for e, entries in enumerate(zip(*sides, strict=True)):
        pairs = [entry if isinstance(entry, tuple) else None for entry in entries]
        chosen = ids == e
        p = (weights * chosen).sum(1, keepdim=True).to(x.dtype)
        g, u = (
            base if pair is None else base + x @ pair[0].T @ pair[1].T
            for base, pair in zip((gate, up), pairs, strict=False)
        )
        h = torch.where(chosen.any(1, keepdim=True), silu(g) * u, 0)
        mixed += p * h
        if pairs[2] is not None:
            a = pairs[2][0]
            padding = x.new_zeros(len(x), -len(a) % 16)
            shrunk += [p * (h @ a.T), padding]
    return mixed, torch.cat(shrunk, 1) if shrunk else x.new_empty(len(x), 0)


def projection(entries: list) -> Projection:
    pairs = tuple(entry for entry in entries if isinstance(entry, tuple))
    full = tuple(entry if isinstance(entry, Tensor) else None for entry in entries)
    layout = tuple(
        -1 if isinstance(entry, Tensor) else 0 if entry is None else len(entry[0])
        for entry in entries
    )
    return Projection(full, pairs, layout, False)


def fused(inputs: Inputs, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the kernels under test."""
    from flexmore_kernels._triton.routed import Routed

    layer = Routed(inputs.x, ids, [projection(side) for side in inputs.sides])
    return layer.hidden(inputs.gate, inputs.up, inputs.weights, layer.plan, layer.shrunk())


def halved(h: Tensor, ids: Tensor) -> Tensor:
    """h of its expert: so many times halved, which is exact."""
    return h * (0.5 ** ids.clamp(min=0)[:, None]).to(h.dtype)


def fused_with_rows(inputs: Inputs, ids: Tensor, own: tuple, h: Tensor) -> tuple[Tensor, Tensor]:
    """The same where rows of h (T, F) of `own` experts are there already; other rows are NaN."""
    from flexmore_kernels._triton import own_rows
    from flexmore_kernels._triton.routed import Routed

    layer = Routed(inputs.x, ids, [projection(side) for side in inputs.sides])
    slots = own_rows.slots_of(layer, own)
    rows = h.new_full((layer.plan.num_rows, h.shape[1]), float("nan"))
    token, k = torch.where(slots >= 0)
    rows[slots[token, k].long()] = halved(h[token], ids[token, k])
    plan = own_rows.others(layer.plan, own)
    given = (inputs.gate, inputs.up, inputs.weights, plan, layer.shrunk())
    return layer.hidden(*given, (rows, slots))


def plain_with_rows(inputs: Inputs, ids: Tensor, own: tuple, h: Tensor) -> tuple[Tensor, Tensor]:
    """That in plain PyTorch: each own expert's h is the given one, halved e times."""
    is_own = torch.isin(ids, torch.tensor(own, device=ids.device))
    mixed, s_down = plain(inputs, ids.masked_fill(is_own, -1))
    for k in range(ids.shape[1]):
        p = (inputs.weights[:, k] * is_own[:, k])[:, None].to(h.dtype)
        mixed = mixed + p * halved(h, ids[:, k])
    return mixed, s_down


@pytest.fixture(
    params=[
        pytest.param("triton", marks=pytest.mark.triton),
        pytest.param("hopper", marks=pytest.mark.gpu),
    ]
)
def way(request, device, monkeypatch):
    """Triton's kernels, or the compiled library's on Hopper, from the first token on."""
    if request.param == "hopper":
        native = backend.hopper("token_major", torch.empty(0, device=device, dtype=torch.bfloat16))
        if native is None:
            pytest.skip("needs a Hopper GPU and the compiled library")
        monkeypatch.setattr(native, "FEWEST_TOKENS", 1)
        yield "hopper"
        return
    if "triton" not in backend.available("experts", device):
        pytest.skip("needs Triton's interpreter or a GPU")
    with backend.use("triton"):
        yield "triton"


def check_hidden(draw: Callable) -> None:
    """draw() makes inputs and gives a call of the kernels, and what it is to be in float64 and as
    plain PyTorch computes it in the same dtype: pairs of mixed and s_down.
    """
    draws = []
    for _ in range(DRAWS):
        run, wide, same = draw()
        out = run()
        for a, b in zip(out, run(), strict=True):
            assert_same(a, b)
        draws.append((out, wide, same))
    for index, what in enumerate(("mixed", "s_down")):
        if draws[0][0][index].numel():
            outs, refs64, sames = (
                [part[index] for part in parts] for parts in zip(*draws, strict=True)
            )
            assert_accurate_draws(outs, refs64, sames, what)


def skip_dtype(way: str, device: str, dtype: torch.dtype) -> None:
    if way == "hopper" and dtype == torch.float32:
        pytest.skip("the kernel for Hopper takes 16-bit floats")
    skip_interpreted(way, device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_hidden(name, dtype, device, way):
    skip_dtype(way, device, dtype)
    case = CASES[name]

    def draw():
        inputs = make_inputs(case, device, dtype)
        ids = some_ids(case.tokens, len(case.ranks), case.top_k, case.empty).to(device)
        if name == "unused":
            ids = ids.masked_fill(ids == 2, len(case.ranks))
        return lambda: fused(inputs, ids), plain(to_float64(inputs), ids), plain(inputs, ids)

    check_hidden(draw)


OWN_CASES = {
    "one": (Case("one row a token at most", 70, 32, 48, (0, 64, 0), 2), (2,)),
    "rank_16": (Case("several", 130, 32, 208, (0, 16, 0, 9, 0, 0, 16), 5), (2, 4, 5)),
    "rank_32": (Case("width past the last chunk", 77, 24, 112, (0, 32, 0), 2), (2,)),
    "depths": (Case("ranks of every size", 90, 32, 80, (0, 1, 17, 0, 64, (0, 33, 5)), 4), (3,)),
    "rank_64": (Case("every row", 65, 32, 96, (0, 64, 64, 0, 0, 0, 64), 7, 0.0), (3, 4, 5)),
    "no_delta": (Case("no other experts but the base", 80, 16, 48, (0, 0, 0), 2, 0.3), (1, 2)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OWN_CASES)
def test_rows_of_other_experts_are_added(name, dtype, device, way):
    skip_dtype(way, device, dtype)
    case, own = OWN_CASES[name]

    def draw():
        inputs = make_inputs(case, device, dtype)
        h = make_x(case.tokens, case.width, device, dtype)
        ids = some_ids(case.tokens, len(case.ranks), case.top_k, case.empty).to(device)
        wide = plain_with_rows(to_float64(inputs), ids, own, h.double())
        same = plain_with_rows(inputs, ids, own, h)
        return lambda: fused_with_rows(inputs, ids, own, h), wide, same

    check_hidden(draw)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("side, part", [(0, 1), (2, 0)], ids=("B of gate", "A of down"))
def test_what_was_not_chosen_does_not_reach_a_sum(side, part, bad, device, way):
    dtype = torch.float32 if device == "cpu" or way == "triton" else torch.bfloat16
    case = CASES["rank_16"]
    inputs = make_inputs(case, device, dtype)
    ids = some_ids(case.tokens, len(case.ranks), case.top_k, 0.2).to(device)
    inputs.sides[side][3][part].fill_(bad)  # all of expert 3's h, or what is shrunk of it
    mixed, s_down = fused(inputs, ids)
    chose = (ids == 3).any(1)
    assert mixed[~chose].isfinite().all() and s_down[~chose].isfinite().all()
    assert not (s_down if side == 2 else mixed)[chose].isfinite().all(1).any()


@pytest.mark.gpu
def test_one_graph_serves_every_routing(device, way):
    if device == "cpu":
        pytest.skip("needs an NVIDIA GPU")
    case = CASES["rank_64"]._replace(top_k=4)
    inputs = make_inputs(case, device, torch.bfloat16)
    routings = [some_ids(case.tokens, len(case.ranks), case.top_k).to(device) for _ in range(3)]
    ids = routings[0].clone()
    fused(inputs, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(inputs, ids)
    for routing in routings:
        ids.copy_(routing)
        graph.replay()
        for a, b in zip(out, fused(inputs, routing), strict=True):
            assert_same(a, b)

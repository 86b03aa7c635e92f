"""What is timed side by side: the library, the same mathematics in plain PyTorch, other libraries.

A candidate is made from a problem (weights are brought into its layout then, outside the timing)
and gives a call without arguments. What cannot be made, fails, or takes too long is recorded with
its reason and stops nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.problem import Problem
from flexmore_kernels import baselines, ops
from flexmore_kernels.testing import tensors
from flexmore_kernels.timing import Call

MANY = 8
"""With more experts than this nobody would run every expert on every token, or compile a loop."""


class Candidate(NamedTuple):
    """One way to compute a layer.

    what: "layer" routes, then mixes; "experts" is given the routing; "dense" is one FFN of the
    base's size, the floor of all layers that contain it; "adapter" is that with the first expert's
    factors on every token. trains: what gets a gradient in a backward; None, or giving None, where
    it has none that compares. fits: why it does not apply, or "". only_forward: also where the
    others do forward and backward.
    """

    make: Callable[[Problem], Call]
    what: str = "experts"
    trains: Callable[[Problem], list[Tensor] | None] | None = None
    fits: Callable[[Problem], str] = lambda p: ""
    only_forward: bool = False


def _mix(mix: Callable[..., Tensor], compiled: bool = False) -> Callable[[Problem], Call]:
    def make(p: Problem) -> Call:
        run = torch.compile(mix, dynamic=False) if compiled else mix
        return lambda: run(p.x, p.indices, p.gates, *p.weights)

    return make


def _dense(compiled: bool) -> Callable[[Problem], Call]:
    def make(p: Problem) -> Call:
        ffn = baselines.dense_ffn
        run = torch.compile(ffn, dynamic=False) if compiled else ffn
        return lambda: run(p.x, *p.base)

    return make


def sorted_grouped_mm(
    x: Tensor, indices: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Full-size experts by torch's own grouped product: sort, gather, two products, sum.

    x (T, D), indices and gates (T, K), gate_up (E, 2F, D), down (E, D, F) -> (T, D).
    """
    ids, order = indices.flatten().sort(stable=True)
    token = order // indices.shape[1]
    experts = torch.arange(gate_up.shape[0], device=x.device)
    ends = torch.searchsorted(ids, experts, right=True).to(torch.int32)
    gate, up = F.grouped_mm(x[token], gate_up.mT, offs=ends).chunk(2, dim=-1)
    h = F.silu(gate) * up * gates.flatten()[order, None].to(x.dtype)
    y = F.grouped_mm(h, down.mT, offs=ends)
    return torch.empty_like(y).index_copy_(0, order, y).view(*indices.shape, -1).sum(1)


def _dense_forward(p: Problem) -> Call:
    return torch.no_grad()(_dense(True)(p))


def _grouped_mm(p: Problem) -> Call:
    return lambda: sorted_grouped_mm(p.x, p.indices, p.gates, *p.merged)


def _trained(given: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in given if tensor.requires_grad]


def _given(p: Problem) -> list[Tensor]:
    return [p.x, p.gates, *_trained(tensors(p.weights))]


def _own_given(p: Problem) -> list[Tensor]:
    return [p.x, p.gates, *_trained(p.layer.experts.parameters())]


def _layer(p: Problem) -> list[Tensor]:
    return [p.x, *_trained(p.layer.parameters())]


def _dense_trains(p: Problem) -> list[Tensor]:
    return [p.x, *_trained(p.base)]


def _adapter(p: Problem) -> list[Tensor]:
    return [p.x, *_trained(p.factors)]


def _few(p: Problem) -> str:
    count = len(p.shape.ranks)
    return "" if count <= MANY else f"not for {count} experts"


def _full(p: Problem) -> list[Tensor] | None:
    """Of candidates that know merged matrices alone: theirs are frozen, like all full-size ones."""
    frozen = p.training.only is None and not p.training.full_size
    return [p.x, p.gates] if frozen else None


def _merged(p: Problem) -> list[Tensor] | None:
    return [p.x, p.gates, *p.merged] if p.trains_merged else _full(p)


def _all_full(p: Problem) -> str:
    """For libraries of full-size experts that need a minute to compile: merged deltas would show
    what torch grouped_mm shows."""
    return "" if not any(p.shape.ranks) else "full-size experts only"


def _pair(p: Problem) -> str:
    alone = len(p.shape.ranks) == p.shape.top_k == 2 and p.shape.ranks[1] > 0
    return "" if alone else "an adapter on every token: 2 of 2 only"


CANDIDATES: dict[str, Candidate] = {
    "ours, layer": Candidate(lambda p: lambda: p.layer(p.x), "layer", _layer),
    "ours, experts": Candidate(
        lambda p: (
            lambda: ops.experts(
                p.x, p.indices, p.gates, *p.own_weights, recompute=p.training.recompute
            )
        ),
        trains=_own_given,
    ),
    "dense FFN": Candidate(_dense(False), "dense", _dense_trains),
    "dense FFN compiled": Candidate(_dense(True), "dense", _dense_trains),
    "dense FFN forward": Candidate(_dense_forward, "dense", only_forward=True),
    "fair eager, by index": Candidate(_mix(baselines.fair_eager), trains=_given),
    "fair eager, every expert": Candidate(_mix(baselines.every_expert), trains=_given, fits=_few),
    "fair eager, by index, compiled": Candidate(
        _mix(baselines.fair_eager, True), trains=_given, fits=_few
    ),
    "fair eager, every expert, compiled": Candidate(
        _mix(baselines.every_expert, True), trains=_given, fits=_few
    ),
    "published": Candidate(_mix(baselines.published), trains=_given),
    "torch grouped_mm": Candidate(_grouped_mm, trains=_merged),
    "Hugging Face eager": Candidate(peers.hugging_face("eager"), trains=_full),
    "Hugging Face grouped_mm": Candidate(peers.hugging_face("grouped_mm"), trains=_full),
    "Hugging Face block": Candidate(peers.hugging_face_block, "layer"),
    "PEFT LoRA": Candidate(peers.peft_lora, trains=_adapter, fits=_pair),
    "PEFT LoRA on a dense FFN": Candidate(peers.peft_dense, "adapter", _adapter, _pair),
    "Liger dense FFN": Candidate(peers.liger_dense, "dense", _dense_trains),
    "Liger experts": Candidate(peers.liger_experts, trains=_full, fits=_all_full),
    "ScatterMoE": Candidate(peers.scattermoe, trains=_merged, fits=_all_full),
    "SonicMoE": Candidate(peers.sonicmoe, trains=_full, fits=_all_full),
}
PEERS = ("Liger experts", "ScatterMoE", "SonicMoE")
"""Kernels of other libraries for full-size experts."""


def with_backward(p: Problem, candidate: Candidate, forward: Call) -> Callable[[], Any]:
    """Forward and backward of the candidate, from dy to what it trains."""
    trained = candidate.trains(p)
    return lambda: torch.autograd.grad(forward(), trained, p.dy, allow_unused=True)

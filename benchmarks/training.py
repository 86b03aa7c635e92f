"""What a step of training trains, by the name of its pass in a record; and whether it is right.

In all of them x and the routing's weights get gradients: a layer stands in a model, and a router's
logits are a function of x whether or not its rows are trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reference
from flexmore_kernels.testing import accuracy, saved_bytes, tensors, tree_map


class Training(NamedTuple):
    """only: the one expert that is trained, full-size or low-rank, and nothing else; None: router
    and factors of all experts, with `full_size` the base and the full-size experts too."""

    only: int | None = None
    full_size: bool = False
    recompute: bool = False

    def trains(self, expert: int, full_size: bool) -> bool:
        """Whether the tensors of this expert, full-size or factors, get gradients."""
        if self.only is not None:
            return expert == self.only
        return self.full_size or not full_size

    def wants(self, name: str) -> bool:
        """The same of a parameter of the layer, by its name."""
        if name.startswith("gate."):
            return self.only is None
        expert = name.split(".")[1]
        if not expert.isdecimal() and self.only is not None:  # stacked: all of them or none
            raise ValueError(f"{name}: got stacked factors; accepted: one tensor an expert")
        number = int(expert) if expert.isdecimal() else -1
        return self.trains(number, name.endswith("_proj.weight"))


FORWARD, STEP = "forward", "forward + backward"
ONE, ALL, RECOMPUTE = f"{STEP}, one expert", f"{STEP}, base too", f"{STEP}, recompute"
PASSES: dict[str, Training] = {
    FORWARD: Training(),
    STEP: Training(),
    ONE: Training(only=1),
    ALL: Training(full_size=True),
    RECOMPUTE: Training(recompute=True),
}


def gradient_error(
    problem: Any, what: str, forward: Callable[[], Tensor], trained: Sequence[Tensor], rows: int
) -> float:
    """The largest error over what is allowed of the gradients, of each its first rows.

    The step runs at its full number of tokens, through the kernels that are timed, but dy is zero
    behind the first `rows` tokens: so the gradients are those of these alone, which fit the
    reference in float64. Weights are compared together, each scaled alike, for the rounding of a
    small one may be luck. Gradients in stacked factors are not compared.
    """
    dy = problem.dy.clone()
    dy[rows:] = 0
    found = torch.autograd.grad(forward(), list(trained), dy, allow_unused=True)
    truth = _reference(problem, what, trained, rows, torch.float64)
    same = _reference(problem, what, trained, rows, None)
    groups: dict[str, list[tuple[Tensor, ...]]] = {}
    for own, grad in zip(trained, found, strict=True):
        if id(own) not in truth:
            continue
        grad = torch.zeros_like(own) if grad is None else grad
        parts = [part[:rows] for part in (grad, truth[id(own)], same[id(own)])]
        scale = 2.0 ** -math.frexp(parts[1].abs().max().item())[1]
        name = "weights"
        if own is problem.x or own is problem.gates or own is problem.layer.gate.weight:
            name = str(id(own))
        groups.setdefault(name, []).append(tuple(part.flatten() * scale for part in parts))
    return max(accuracy(*map(torch.cat, zip(*one, strict=True))).ratio for one in groups.values())


def _reference(
    p: Any, what: str, trained: Sequence[Tensor], rows: int, dtype: torch.dtype | None
) -> dict[int, Tensor]:
    """By the id of the trained tensor: the reference's gradient in `dtype`, None for its own."""
    wanted, copies = {id(tensor) for tensor in trained}, {}

    def copy(tensor: Tensor, part: slice = slice(None)) -> Tensor:
        leaf = tensor.detach()[part].to(dtype or tensor.dtype)
        copies[id(tensor)] = leaf.requires_grad_(id(tensor) in wanted)
        return leaf

    some = slice(0, rows)
    x, weights, indices = copy(p.x, some), tree_map(copy, p.weights), p.indices[some]
    if what == "layer":
        logits = x @ copy(p.layer.gate.weight).T
        wide = torch.promote_types(logits.dtype, torch.float32)
        gates = logits.softmax(-1, dtype=wide).gather(1, indices)
    else:
        gates = copy(p.gates, some)
    y = reference.experts(x, indices, gates, *weights)
    leaves = {name: leaf for name, leaf in copies.items() if name in wanted}
    grads = torch.autograd.grad(y, list(leaves.values()), p.dy[some].to(y.dtype), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def saved_kb_a_token(problem: Any, forward: Callable[[], Tensor]) -> float:
    """What is kept for the backward, x included and weights not, in 1000 bytes a token."""
    weights = [*problem.layer.parameters(), *tensors(problem.weights)]
    weights += problem.__dict__.get("merged", ())
    return saved_bytes(forward, weights) / problem.tokens / 1000

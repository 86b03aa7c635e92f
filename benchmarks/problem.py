"""What goes into a layer's benchmark: a layer with weights drawn where it runs, tokens, routing.

No B is zero and every number is random: zeros need less power, so a GPU runs faster on them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

import reference
from benchmarks.shapes import Shape
from benchmarks.training import FORWARD, PASSES, Training
from flexmore_kernels import FlexMoRE
from flexmore_kernels.checkpoint import expert_weights
from flexmore_kernels.checkpoint_forms import dense_weight
from flexmore_kernels.storage import PROJECTIONS, StackedExperts
from flexmore_kernels.testing import to_float64

CHECKED_ROWS = 256
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def normal(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers, drawn on the device (a matrix of a layer takes the CPU a second)."""
    return torch.randn(shape, device=device, dtype=torch.float32).mul_(scale).to(dtype)


def merge(weights: Iterable, gate_up: Tensor, down: Tensor) -> None:
    """Write each expert's full-size matrices into Hugging Face's tensors, W + B A rounded once.

    weights: gate, up and down, E entries each: a matrix, a pair (a, b), or None for the base's.
    """
    F = down.shape[2]
    for entries, target in zip(weights, (gate_up[:, :F], gate_up[:, F:], down), strict=True):
        for e, entry in enumerate(entries):
            full = isinstance(entry, Tensor)
            target[e].copy_(entry if full else dense_weight(entries[0], entry))


class Problem:
    """A layer, its tensors as plain lists, tokens x, the routing that the layer chose, and dy.

    weights: gate, up, down with E entries each, a matrix or a pair (a, b); own_weights: the same
    as the layer holds them (stacked factors for many experts). Gradients go to x, the routing's
    weights and what `train` says; before that to router and factors.
    """

    def __init__(self, shape: Shape, tokens: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shape, self.tokens, self.device, self.dtype = shape, tokens, device, dtype
        sizes = shape.hidden, shape.intermediate, shape.ranks, shape.top_k
        self.layer = FlexMoRE(*sizes, device=device, dtype=dtype)
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                scale = 0.5 if name.endswith(("_b.weight", "_b")) else 1.0
                # b's sum is over the rank of one expert, also where the factors are stacked.
                width = max(shape.ranks) if name.endswith("_b") else parameter.shape[1]
                scale /= math.sqrt(max(width, 1))
                parameter.copy_(normal(*parameter.shape, device=device, dtype=dtype, scale=scale))
        self.train(Training())
        stacked = isinstance(self.layer.experts, StackedExperts)
        held = self.layer.state_dict() if stacked else dict(self.layer.named_parameters())
        self.weights = expert_weights(held, shape.ranks)
        self.own_weights = [self.layer.experts.projection(name) for name in PROJECTIONS]
        self.x = normal(tokens, shape.hidden, device=device, dtype=dtype)
        with torch.no_grad():
            _, routing = self.layer(self.x, return_routing=True)
        self.indices = routing.indices
        self.gates = routing.weights.detach().requires_grad_()
        self.x.requires_grad_()
        self.dy = normal(tokens, shape.hidden, device=device, dtype=dtype)
        self._truths: dict[str, tuple[Tensor, Tensor]] = {}

    def train(self, training: Training) -> None:
        """Choose which parameters get gradients, and what is kept for the backward."""
        self.training = training
        for name, parameter in self.layer.named_parameters():
            parameter.requires_grad_(training.wants(name))
        self.layer.recompute = training.recompute
        for merged in self.__dict__.get("merged", ()):
            merged.requires_grad_(self.trains_merged)

    @property
    def trains_merged(self) -> bool:
        """Whether `merged` is what is trained, with gradients of the same mathematics."""
        return self.training.full_size and not any(self.shape.ranks)

    @property
    def base(self) -> list[Tensor]:
        """Gate, up and down of the shared FFN."""
        return [entries[0] for entries in self.weights]

    @property
    def factors(self) -> list[Tensor]:
        """Every A and B."""
        return [t for entries in self.weights for e in entries if isinstance(e, tuple) for t in e]

    @functools.cached_property
    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor]:
        """Full-size experts of the same mathematics, in Hugging Face's layout: gate_up (E, 2F, D)
        and down (E, D, F)."""
        E, F, D = len(self.shape.ranks), self.shape.intermediate, self.shape.hidden
        like = {"device": self.device, "dtype": self.dtype}
        gate_up, down = torch.empty(E, 2 * F, D, **like), torch.empty(E, D, F, **like)
        merge(self.weights, gate_up, down)
        return gate_up.requires_grad_(self.trains_merged), down.requires_grad_(self.trains_merged)

    @torch.no_grad()
    def truth(self, what: str) -> tuple[Tensor, Tensor]:
        """The first rows in float64 and in the problem's dtype, by the reference: of a candidate's
        `what`, a layer's being its experts' given the routing."""
        what = "experts" if what == "layer" else what
        if what not in self._truths:
            x, indices, gates = (t[:CHECKED_ROWS] for t in (self.x, self.indices, self.gates))
            if what == "dense":
                function, given = self.dense, (x, self.base)
            else:
                if what == "adapter":  # expert 1 alone, on every token
                    indices = torch.ones_like(indices[:, :1])
                    gates = torch.ones_like(gates[:, :1])
                function, given = reference.experts, (x, indices, gates, *self.weights)
            self._truths[what] = function(*to_float64(given)), function(*given)
        return self._truths[what]

    @staticmethod
    def dense(x: Tensor, base: Iterable[Tensor]) -> Tensor:
        gate, up, down = base
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def work(self, which: str = FORWARD, what: str = "layer") -> tuple[int, int]:
        """(bytes, operations) that must be, whoever computes the pass of a layer, of the dense FFN
        ("dense"), or of that with the first expert's factors on every token ("adapter").

        Each input read and each output written once, the base once a token, 2 r (in + out)
        operations for each pair of a routed row, full-size experts on their own rows.

        Backward: once more what the forward does, for the gradients of activations, and again for
        those of the weights that are trained. G and U, where they are not kept, once more.
        """
        training = PASSES[which]
        ranks, D, F = self.shape.ranks, self.shape.hidden, self.shape.intermediate
        rows = torch.bincount(self.indices.flatten(), minlength=len(ranks)).tolist()
        on_base = torch.tensor([e == 0 or r > 0 for e, r in enumerate(ranks)], device=self.device)
        base_rows = int(on_base[self.indices].any(1).sum())
        others = list(enumerate(zip(rows, ranks, strict=True)))[1:]
        if what in ("dense", "adapter"):
            base_rows = self.tokens
            others = [(1, (self.tokens, ranks[1]))] if what == "adapter" else []
        parts = [(base_rows, 3 * D * F, training.trains(0, True))]
        parts += [
            (n, 3 * r * (D + F) if r else 3 * D * F, training.trains(e, not r))
            for e, (n, r) in others
        ]
        flops = sum(2 * n * size for n, size, _ in parts)
        x, width = self.tokens * D, self.dtype.itemsize
        forward = sum(size for n, size, _ in parts if n) + 2 * x
        if which == FORWARD:
            return width * forward, flops
        trained = [(n, size) for n, size, trains in parts if trains]
        again = 4 * D * F * base_rows if training.recompute and what in ("layer", "experts") else 0
        return (
            width * (2 * forward + x + sum(size for n, size in trained if n)),
            2 * flops + sum(2 * n * size for n, size in trained) + again,
        )

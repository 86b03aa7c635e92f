"""How long a forward takes: mixtures of each rank, of full-size experts, and the base alone.

One layer by itself, and the whole decoder; all candidates of one kind in turns (timing.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flexolmo import FULL, active_of, early_mixture
from seeds import Seed

from flexmore_kernels.timing import compare

BUDGET_S = 4.0
"""Of one kind of candidates, beside the calls before anything is timed."""


@torch.no_grad()
def measure(seed: Seed) -> list[dict[str, Any]]:
    """The entries of "speed" in results.json, of one seed's models."""
    s = seed.settings
    models = {("dense", 1): _Active(seed.base_model(seed.base, seed.dtype), 1)}
    for rank in (*s.ranks, FULL):
        kind = FULL if rank == FULL else "uniform"
        model, experts, _ = early_mixture(seed, kind, "all", rank)
        for active in s.active:
            models[rank, active] = _Active(model, active_of(active, len(experts) + 1))
    ids = seed.sample(seed.corpus.early[0])[: s.batch]
    dtype = torch.float32 if seed.dtype is None else seed.dtype
    generator = torch.Generator().manual_seed(seed.number)
    x = torch.randn(ids.numel(), s.hidden_size, generator=generator).to(seed.device, dtype)
    layers = {
        name: (lambda m=model: m.run(lambda inner: inner.model.layers[0].mlp(x)))
        for name, model in models.items()
    }
    whole = {
        name: (lambda m=model: m.run(lambda inner: inner(ids, logits_to_keep=1)))
        for name, model in models.items()
    }
    return _timed("layer", layers, seed, ids.numel()) + _timed("model", whole, seed, ids.numel())


class _Active:
    """A model with so many experts a token, which candidates that share it set for themselves."""

    def __init__(self, model, top_k: int) -> None:
        self.model, self.top_k = model, top_k

    def run(self, call):
        for block in self.model.model.layers:
            block.mlp.top_k = self.top_k
        return call(self.model)


def _timed(what: str, calls: Mapping, seed: Seed, tokens: int) -> list[dict[str, Any]]:
    named = {f"{name} {active}": call for (name, active), call in calls.items()}
    times = compare(named, seed.device, budget_s=BUDGET_S)
    found = []
    for name, active in calls:
        one = times[f"{name} {active}"]
        found.append({"what": what, "name": name, "active": active, "tokens": tokens,
                      "ms": one.ms, "p20": one.p20, "p80": one.p80})  # fmt: skip
    return found

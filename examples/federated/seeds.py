"""One seed's weights: the base, an expert and a whole model of every domain, and their factors.

Made when they are first asked for, kept in the store, and for as long as the seed is at work on the
device. All of a seed's random numbers are its own: initialisation, which windows a training sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from corpus import MIX, Corpus
from factors import Factored, factored
from models import (
    PROJECTIONS,
    Ffn,
    Tensors,
    built,
    config_of,
    ffn_of,
    gate_key,
    joined_rows,
    key,
    mixture,
    new_base,
)
from parts import Store
from settings import Settings
from torch import Tensor
from train import Group, Plan, Source, generator_of, train, windows

import flexmore_kernels as fk
from flexmore_kernels.conversion.activations import Activations, gather
from flexmore_kernels.router_ridge import RidgeStatistics


class Seed:
    """See above. dtype: that models are scored in; None: as they are trained, float32."""

    def __init__(self, settings: Settings, corpus: Corpus, store: Store, number: int) -> None:
        self.settings, self.corpus, self.store, self.number = settings, corpus, store, number
        self.device = store.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else None
        self._made: dict[tuple, Any] = {}

    def name(self, part: str) -> str:
        """Of a piece in the store."""
        return f"seed-{self.number}/{part}"

    def plan(self, tokens: int, **more) -> Plan:
        """Of a training on so many tokens."""
        s = self.settings
        steps = max(1, round(tokens / (s.batch * s.length)))
        return Plan(steps, s.batch, s.length, s.warmup, s.clip, **more)

    @property
    def base(self) -> Tensors:
        """A dense decoder trained on the public mix: expert 0 alone."""
        return self.stored("base", self._train_base)

    @property
    def base_ffn(self) -> Ffn:
        return ffn_of(self.base, self.settings.layers)

    def expert(self, domain: str) -> Ffn:
        """A full-size expert, trained on its domain beside the frozen base, 2 of 2 active."""
        tensors = self._expert(domain)
        return {(n, p): tensors[f"{n}.{p}"] for n in range(self.settings.layers)
                for p in PROJECTIONS}  # fmt: skip

    def expert_rows(self, domain: str) -> Tensor:
        """Its rows of the router (L, D), trained with it."""
        return self._expert(domain)["rows"]

    def dense(self, domain: str) -> Tensors:
        """A whole model, trained from the base on one domain."""
        return self.stored(f"dense-{domain}", lambda: self._train_dense(domain))

    def factored(self, domain: str, weighted: bool = False) -> Factored:
        """The expert's factors, weighted by what its owner sees or not."""

        def make() -> Factored:
            seen = self._seen(domain) if weighted else None
            return factored(self.expert(domain), self.base_ffn, seen)

        return self._once(("factored", domain, weighted), make)

    def pair(self, ffn: Ffn, domain: str, dtype: torch.dtype | None = None):
        """The base and one expert, both active."""
        rows = joined_rows(self.base, [self.expert_rows(domain)], self.settings.layers)
        return mixture(self.settings, self.base, [ffn], rows, 2, dtype)

    def rows(self, domains: Sequence[str]) -> Tensor:
        """(L, E, D): rows of the base and of these domains' experts, as owners trained them."""
        own = [self.expert_rows(domain) for domain in domains]
        return joined_rows(self.base, own, self.settings.layers)

    def base_model(self, tensors: Tensors, dtype: torch.dtype | None = None):
        """A dense decoder that holds these tensors."""
        return built(config_of(self.settings, [0], 1), tensors, dtype)

    def as_scored(self, model: fk.FlexMoREForCausalLM) -> fk.FlexMoREForCausalLM:
        """A model that was trained, in the dtype that models are scored in."""
        return model if self.dtype is None else built(model.config, model.state_dict(), self.dtype)

    def source(self, *names: str) -> Source:
        """These texts, in equal shares."""
        return Source.of(*((self.corpus.train[name], 1.0) for name in names))

    def sample(self, domain: str) -> Tensor:
        """Windows (n, length) of a domain's text to gather statistics over."""
        s, source = self.settings, self.source(domain)
        count = max(1, s.calibration_tokens // s.length)
        starts = windows(source, count, s.length, generator_of(self.name("sample"), domain))
        places = starts[:, None] + torch.arange(s.length)
        return source.ids[places.to(source.ids.device)].long()

    def stored(self, part: str, make: Callable[[], Tensors]) -> Tensors:
        """Tensors of this seed in the store, read or made once."""
        return self._once((part,), lambda: self.store.tensors(self.name(part), make))

    def train(self, model, groups, source: Source, plan: Plan, what: str) -> float:
        """`train.train` under this seed's name."""
        return train(model, groups, source, plan, self.name(what))

    def _expert(self, domain: str) -> Tensors:
        return self.stored(f"expert-{domain}", lambda: self._train_expert(domain))

    def let_go(self) -> None:
        """Of what is on the device; the store has it still."""
        self._made.clear()

    def _once(self, name: tuple, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _train_base(self) -> Tensors:
        s = self.settings
        model = new_base(s, self.device, self.number)
        trained = [p for n, p in model.named_parameters() if ".mlp.gate." not in n]
        groups, plan = [Group(trained, s.base_rate)], self.plan(s.base_tokens)
        self.train(model, groups, self.source(MIX), plan, "base")
        return model.state_dict()

    def _train_expert(self, domain: str) -> Tensors:
        s = self.settings
        ffn = {place: weight.clone() for place, weight in self.base_ffn.items()}
        rows = joined_rows(self.base, [self._first_rows(domain)], s.layers)
        model = mixture(s, self.base, [ffn], rows, 2, None)
        named = dict(model.named_parameters())
        own = [named[key(n, 1, p)] for n, p in ffn]
        gates = [named[gate_key(n)] for n in range(s.layers)]
        self.train(
            model, [Group(own, s.expert_rate), Group(gates, s.row_rate)], self.source(domain),
            self.plan(s.expert_tokens, z_loss=s.z_loss, own=1), f"expert-{domain}",
        )  # fmt: skip
        tensors = {f"{n}.{p}": named[key(n, 1, p)] for n, p in ffn}
        return tensors | {"rows": torch.stack([gate[1] for gate in gates])}

    def _first_rows(self, domain: str) -> Tensor:
        """An expert's rows before they are trained (L, D), made by its owner and the public alone.

            u, v = mean x over the domain's text, and over the public mix,    c = u - v
            row = scale a / std(x a),    a = c - v (c v) / (v v)

        with x what the base's layers see: FlexOlmo's rows from hidden states of the public model
        (arXiv 2507.07024, its ablation), centred, since what all texts share is in every logit,
        and without the part along v, which would favour one expert for every token.
        """
        (us, own), (vs, public) = self._moments(domain), self._moments(MIX)
        rows = []
        for layer, (u, v) in enumerate(zip(us, vs, strict=True)):
            c = u - v
            a = c - v * (c @ v) / (v @ v)
            mean = a @ (u + v) / 2
            square = a @ (own[layer] + public[layer]) @ a / 2
            rows.append(a * (self.settings.row_scale / (square - mean.square()).sqrt()))
        return torch.stack(rows).to(self.device, torch.float32)  # the sums came to the CPU

    def _moments(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """Of each layer mean x (D,) and mean x x^T (D, D), of a text through the base alone."""

        def make() -> tuple[list[Tensor], list[Tensor]]:
            model = self.base_model(self.base, self.dtype)
            texts = list(self.sample(name))
            found = RidgeStatistics.collect(model, texts, base=self.name("base"), batch=64)
            totals = [layer.total / found.tokens for layer in found.layers]
            return totals, [layer.gram / found.tokens for layer in found.layers]

        return self._once(("moments", name), make)

    def _train_dense(self, domain: str) -> Tensors:
        s = self.settings
        model = self.base_model({name: t.clone() for name, t in self.base.items()})
        trained = [p for n, p in model.named_parameters() if ".mlp.gate." not in n]
        self.train(
            model, [Group(trained, s.dense_rate)],
            self.source(domain), self.plan(s.dense_tokens), f"dense-{domain}",
        )  # fmt: skip
        return model.state_dict()

    def _seen(self, domain: str) -> Activations:
        """Second moments of the expert's inputs over its own domain: what its owner can send."""
        parts = [(part, None) for part in self.sample(domain).split(64)]
        model = self.pair(self.expert(domain), domain, self.dtype)
        return gather(model, parts, inputs="full", hidden="full")

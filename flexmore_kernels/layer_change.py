"""One change of a live layer's experts: planned with all its checks and new tensors, then made.

It is made by assignments alone: what is refused leaves the layer as it was. Experts that stay keep
their bits and, where each matrix is a parameter of its own, their Parameter objects. Stacked
factors are put together anew where factors come or go, the router's rows always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_config import as_triple
from .member_rows import router_tensors
from .members import (
    Entry,
    Newcomer,
    Order,
    check_weights,
    expert_rank,
    placed,
    renumbered,
)
from .ragged import rank_offsets
from .storage import PROJECTIONS, Experts, Weight

_ROUTER = ("weight", "domain_embeddings", "expert_bias")


class Change:
    """A layer's experts in a new order: checked and laid out, then made by `apply`.

    Raises ValueError or TypeError naming what is wrong with a newcomer, and what cannot be left.
    """

    def __init__(self, layer: Any, order: Order) -> None:
        self.layer = layer
        parameters = list(layer.parameters())
        if any(type(parameter).__name__ == "DTensor" for parameter in parameters):
            raise ValueError("layer: got sharded parameters; accepted: unsharded ones")
        if not 1 <= len(order) <= 1024:
            raise ValueError(f"experts: {len(order)} would be left; accepted: 1 to 1024")
        with torch.inference_mode(False), torch.no_grad():
            self.order = [self._placed(who) if isinstance(who, Newcomer) else who for who in order]
        self.shared = renumbered(order, layer.shared_expert)
        routed = len(order) - (self.shared is not None)
        if routed < 1:
            raise ValueError(
                "expert: the last one that the router can select; accepted: another, or none"
            )
        self.top_k = min(layer.top_k, routed)
        ranks = layer.expert_ranks
        self.expert_ranks = tuple(
            expert_rank(who.weights) if isinstance(who, Newcomer) else ranks[who]
            for who in self.order
        )
        with torch.inference_mode(False), torch.no_grad():
            self._router = router_tensors(tensors_of(layer.gate), self.order)
            self._modules, self._stacks = self._laid_out()

    def apply(self) -> None:
        """Make the change, and prepare again what was prepared."""
        self.assign()
        self.prepare()

    def assign(self) -> None:
        """Make the change; what was prepared is so no more."""
        layer, gate, experts = self.layer, self.layer.gate, self.layer.experts
        copies = layer._modules.get("prepared")
        self._again = () if copies is None else (self._choice(copies.choice),)
        del copies
        kept = gate.keep(False)
        layer.unprepare()
        experts._modules.clear()
        experts._modules.update(self._modules)
        for name, stack in self._stacks.items():
            setattr(experts, name, stack)
        if not isinstance(experts, Experts):
            experts.num_experts = len(self.order)
            triples = [as_triple(entry) for entry in self.expert_ranks]
            for index, name in enumerate(PROJECTIONS):
                experts.ranks[name] = tuple(0 if t[index] == "full" else t[index] for t in triples)
        for name, tensor in self._router.items():
            old = getattr(gate, name)
            learns = isinstance(old, nn.Parameter)
            setattr(gate, name, nn.Parameter(tensor, old.requires_grad) if learns else tensor)
        layer.num_experts, layer.expert_ranks = len(self.order), self.expert_ranks
        layer.top_k, layer.shared_expert = self.top_k, self.shared
        gate.keep(kept)

    def prepare(self) -> None:
        """Prepare again what was prepared: it takes memory, so of all layers it comes last."""
        for choice in self._again:
            self.layer.prepare(choice)

    def _choice(self, choice: Any) -> Any:
        """What was chosen of `prepare(merge)`, by the experts' new numbers."""
        if not isinstance(choice, (list, tuple)):
            return choice
        return [new for e in choice if (new := renumbered(self.order, e)) is not None]

    def _placed(self, who: Newcomer) -> Newcomer:
        """A newcomer with checked weights in the layer's dtypes, on its device."""
        layer = self.layer
        weights = check_weights(who.weights, layer.hidden_size, layer.intermediate_size)
        base = entry_of(layer, "gate_proj", 0)
        return who._replace(weights=placed(weights, base, factor_dtype(layer)))

    def _laid_out(self) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter | None]]:
        """The experts' modules, and the stacks that change."""
        experts, modules, stacks = self.layer.experts, {}, {}
        stacked = not isinstance(experts, Experts)
        for e, who in enumerate(self.order):
            if isinstance(who, Newcomer):
                module = self._module(who, factors=not stacked)
            else:
                module = experts._modules.get(str(who))
            if module is not None and (module._modules or not stacked):
                modules[str(e)] = module
        for name in PROJECTIONS if stacked else ():
            stacks |= self._stack(name)
        return modules, stacks

    def _module(self, who: Newcomer, *, factors: bool) -> nn.Module:
        module, learns = nn.Module(), _learns(self.layer, who.instead_of)
        for name, entry in zip(PROJECTIONS, who.weights, strict=True):
            if isinstance(entry, Tensor):
                module.add_module(name, _weight(entry, learns))
            elif entry is not None and factors:
                module.add_module(f"{name}_a", _weight(entry[0], learns))
                module.add_module(f"{name}_b", _weight(entry[1], learns))
        return module.train(self.layer.training)

    def _stack(self, name: str) -> dict[str, nn.Parameter | None]:
        """The two stacks of a projection; nothing where no factor comes or goes."""
        experts, index = self.layer.experts, PROJECTIONS.index(name)
        ranks, offsets = experts.ranks[name], rank_offsets(experts.ranks[name])
        old = [getattr(experts, f"{name}_{side}") for side in "ab"]
        pieces, stay = [], 0
        for who in self.order:
            if isinstance(who, Newcomer):
                pieces += [entry] if isinstance(entry := who.weights[index], tuple) else []
            elif ranks[who]:
                stay += ranks[who]
                here = (offsets[who], ranks[who])
                pieces.append(tuple(stack.narrow(dim, *here) for dim, stack in enumerate(old)))
        total = sum(piece[0].shape[0] for piece in pieces)
        if total == stay == sum(ranks):
            return {}
        if not pieces:
            return {f"{name}_a": None, f"{name}_b": None}
        done = {}
        for dim, (side, stack) in enumerate(zip("ab", old, strict=True)):
            learns = _learns(self.layer, None) if stack is None else stack.requires_grad
            joined = torch.cat([piece[dim] for piece in pieces], dim)
            done[f"{name}_{side}"] = nn.Parameter(joined, learns)
        return done


def tensors_of(gate: nn.Module) -> Mapping[str, Tensor]:
    """What a router holds of its experts, by name."""
    found = {name: getattr(gate, name, None) for name in _ROUTER}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def entry_of(layer: Any, name: str, expert: int) -> Entry:
    """What a layer has of an expert's projection, detached; of stacked factors copies."""
    experts = layer.experts
    side = experts.projection(name)
    if isinstance(side, list):
        entry = side[expert]
        return tuple(s.detach() for s in entry) if isinstance(entry, tuple) else _detached(entry)
    if not side.ranks[expert]:
        return _detached(side.full[expert])
    start, rank = rank_offsets(side.ranks)[expert], side.ranks[expert]
    a, b = side.a.detach(), side.b.detach()
    return a[start : start + rank].clone(), b[:, start : start + rank].clone()


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _weight(tensor: Tensor, learns: bool) -> Weight:
    module = Weight(*tensor.shape, device="meta")
    module.weight = nn.Parameter(tensor, learns)
    return module


def factor_dtype(layer: Any) -> torch.dtype:
    """The dtype of a layer's factors; without any, the base's."""
    for name in PROJECTIONS:
        side = layer.experts.projection(name)
        if not isinstance(side, list):
            return side.a.dtype
        for entry in side:
            if isinstance(entry, tuple):
                return entry[0].dtype
    return entry_of(layer, "gate_proj", 0).dtype


def _learns(layer: Any, expert: int | None) -> bool:
    """Whether an expert's parameters get gradients; of None, a new one: as those beside the base,
    or, where there are none, the base."""
    experts = layer.experts
    own = experts._modules.get(str(expert))
    found = [] if own is None else list(own.parameters())
    if not found:
        base = {id(p) for p in experts._modules["0"].parameters()}
        found = [p for p in experts.parameters() if id(p) not in base] or list(experts.parameters())
    return any(parameter.requires_grad for parameter in found)

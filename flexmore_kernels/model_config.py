"""Sizes of the decoder, as in a checkpoint's config.json: see `FlexMoREConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cards import KEY, check_cards, config_cards
from .checkpoint_config import largest_ranks
from .checks import SCORINGS, check_int, check_one_of
from .router_kinds import ROUTER_FIELDS, check_router_sizes, check_shared_expert

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads")  # fmt: skip
# What a config.json may say where only some values are computed; the first is the default.
_ONLY = {
    "model_type": ("flexmore", "flex_olmo"),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "sliding_window": (None,),
    "scoring": SCORINGS,
}


@dataclass
class FlexMoREConfig:
    """Sizes of the decoder, as in the authors' config.json; the defaults are FlexOlmo-7x7B's.

    expert_ranks is one list of E entries for all layers (see `FlexMoRE`) or a list of such lists,
    one a layer; None makes every expert full-size. In a config.json `expert_ranks` are E ints, of
    each expert the largest rank that it has anywhere (0: full-size everywhere); where ranks differ
    by layer or projection, `layer_expert_ranks` holds the lists, one a layer. router,
    domain_embedding_size, projector_size and shared_expert are as `FlexMoRE` takes them. experts:
    the experts' cards (cards.py), a list of E objects with name, owner, licence, or None.
    `extra` holds the fields of a config.json that nothing here uses, and `to_dict` returns them.
    """

    vocab_size: int = 100352
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    num_experts: int | None = None
    num_experts_per_tok: int = 5
    norm_topk_prob: bool = False
    scoring: str = "softmax"
    expert_bias: bool = False
    router: str = "linear"
    domain_embedding_size: int | None = None
    projector_size: int | None = None
    shared_expert: bool | int = False
    expert_ranks: Sequence | None = None
    experts: Sequence | None = None
    tie_word_embeddings: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _SIZES:
            setattr(self, name, check_int(name, getattr(self, name), 1))
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        groups = check_int("num_key_value_heads", self.num_key_value_heads, 1, heads)
        if heads % groups:
            raise ValueError(f"num_key_value_heads: got {groups}; accepted: a divisor of {heads}")
        if self.head_dim is None:
            if self.hidden_size % heads:
                accepted = f"a divisor of hidden_size, {self.hidden_size}, or head_dim given too"
                raise ValueError(f"num_attention_heads: got {heads}; accepted: {accepted}")
            self.head_dim = self.hidden_size // heads
        if check_int("head_dim", self.head_dim, 2) % 2:
            raise ValueError(f"head_dim: got {self.head_dim}; accepted: an even number")
        self._check_experts()

    def _check_experts(self) -> None:
        if self.expert_ranks is None:
            self.expert_ranks = [0] * (7 if self.num_experts is None else self.num_experts)
        if not isinstance(self.expert_ranks, (list, tuple)):
            raise TypeError(f"expert_ranks: got {self.expert_ranks!r}; accepted: a list")
        if self._per_layer and len(self.expert_ranks) != self.num_hidden_layers:
            raise ValueError(
                f"expert_ranks: got {len(self.expert_ranks)} lists; accepted: one list, or "
                f"num_hidden_layers, {self.num_hidden_layers}, lists"
            )
        if self.num_experts is None:
            self.num_experts = len(self.layer_ranks(0))
        check_int("num_experts", self.num_experts, 1)
        for layer in range(self.num_hidden_layers):
            found = len(self.layer_ranks(layer))
            if found != self.num_experts:
                raise ValueError(
                    f"expert_ranks: got {found} entries for layer {layer}; accepted: num_experts, "
                    f"{self.num_experts}"
                )
        shared = check_shared_expert(self.shared_expert, self.num_experts)
        routed = self.num_experts - (shared is not None)
        check_int("num_experts_per_tok", self.num_experts_per_tok, 1, routed)
        check_router_sizes(self.router, self.domain_embedding_size, self.projector_size)
        if self.experts is not None:
            self.experts = config_cards(check_cards(self.experts, self.num_experts))

    @property
    def _per_layer(self) -> bool:
        # Entry 0 of a layer's list is the int 0, so a list in its place can only be a layer's list.
        return len(self.expert_ranks) > 0 and isinstance(self.expert_ranks[0], (list, tuple))

    def layer_ranks(self, layer: int) -> Sequence:
        """The `expert_ranks` of one layer."""
        return self.expert_ranks[layer] if self._per_layer else self.expert_ranks

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlexMoREConfig:
        """The config of a config.json; refuses, by name, what the decoder does not compute."""
        for name, accepted in _ONLY.items():
            check_one_of(name, values.get(name, accepted[0]), accepted)
        for name in ("rope_parameters", "rope_scaling"):
            rope = values.get(name) or {}
            kind = rope.get("rope_type", rope.get("type", "default"))
            check_one_of(f"{name}.rope_type", kind, ("default",))
            if "rope_theta" in rope:
                values = {**values, "rope_theta": rope["rope_theta"]}
        values = dict(values)
        per_layer = values.pop("layer_expert_ranks", None)
        # Where expert_ranks says itself what E ints cannot, a loader found it in the tensors.
        if per_layer is not None and _plain(values.get("expert_ranks") or ()):
            values["expert_ranks"] = per_layer
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {name: value for name, value in values.items() if name not in known}
        return cls(**{name: values[name] for name in known & values.keys()}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: `extra`, then the fields."""
        values = {"architectures": ["FlexMoREForCausalLM"], **self.extra, "model_type": "flexmore"}
        for part in dataclasses.fields(self):
            if part.name != "extra":
                values[part.name] = getattr(self, part.name)
        # Of what is as everywhere else nothing is said: other readers do not know these fields.
        for name in (*ROUTER_FIELDS, KEY):
            if values[name] in (None, False, "linear"):
                del values[name]
        if isinstance(values.get("rope_parameters"), Mapping):
            values["rope_parameters"] = {**values["rope_parameters"], "rope_theta": self.rope_theta}
        if not _plain(self.expert_ranks):
            layers = [self.layer_ranks(layer) for layer in range(self.num_hidden_layers)]
            values["expert_ranks"] = largest_ranks(layers)
            values["layer_expert_ranks"] = [list(ranks) for ranks in layers]
        return values


def _plain(ranks: Sequence) -> bool:
    """Whether E ints say it all."""
    return not any(isinstance(entry, (list, tuple)) for entry in ranks)

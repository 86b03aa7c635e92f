"""The bare decoder around the layer: FlexOlmo's OLMo-2 blocks with FlexMoRE as their feed-forward.

Post-norm (the norm follows attention and feed-forward), RMSNorm over the whole width of q and k in
OLMo-2's order of precision, RoPE in float32, grouped key-value heads. No cache, no sampling.
Maths: reference/model.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import SCORINGS, check_int, check_one_of, check_tensor
from .layer import FlexMoRE

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
    one a layer; None makes every expert full-size. `extra` holds the fields of a config.json that
    nothing here uses, and `to_dict` returns them.
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
    expert_ranks: Sequence | None = None
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
        check_int("num_experts_per_tok", self.num_experts_per_tok, 1, self.num_experts)

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
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {name: value for name, value in values.items() if name not in known}
        return cls(**{name: values[name] for name in known & values.keys()}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: `extra`, then the fields."""
        values = {"architectures": ["FlexMoREForCausalLM"], **self.extra, "model_type": "flexmore"}
        for part in dataclasses.fields(self):
            if part.name != "extra":
                values[part.name] = getattr(self, part.name)
        if isinstance(values.get("rope_parameters"), Mapping):
            values["rope_parameters"] = {**values["rope_parameters"], "rope_theta": self.rope_theta}
        return values


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in float32 (float64), rounded once: OLMo-2's order."""

    def __init__(self, size: int, eps: float, **kind) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, **kind))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_acc = x.to(torch.promote_types(x.dtype, torch.float32))
        x_acc = x_acc * torch.rsqrt(x_acc.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * x_acc).to(x.dtype)


def rotary_table(length: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim / 2) of position times frequency, in float32 (float64)."""
    acc = torch.promote_types(like.dtype, torch.float32)
    frequency = 1 / theta ** (
        torch.arange(0, head_dim, 2, device=like.device, dtype=acc) / head_dim
    )
    angle = torch.arange(length, device=like.device, dtype=acc)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on the two halves of x (B, heads, S, head_dim), rounded once."""
    cos, sin = rotary
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with full-width norms of q and k and grouped key-value heads."""

    def __init__(self, config: FlexMoREConfig, **kind) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        D, eps = config.hidden_size, config.rms_norm_eps
        width = config.num_attention_heads * self.head_dim
        groups = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(D, width, bias=False, **kind)
        self.k_proj = nn.Linear(D, groups, bias=False, **kind)
        self.v_proj = nn.Linear(D, groups, bias=False, **kind)
        self.o_proj = nn.Linear(width, D, bias=False, **kind)
        self.q_norm, self.k_norm = RMSNorm(width, eps, **kind), RMSNorm(groups, eps, **kind)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, h: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        q = rotate(self._split(self.q_norm(self.q_proj(h))), rotary)
        k = rotate(self._split(self.k_norm(self.k_proj(h))), rotary)
        v = self._split(self.v_proj(h))
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One decoder layer: h + norm(attention(h)), then h + norm(FlexMoRE(h))."""

    def __init__(self, config: FlexMoREConfig, layer: int, **kind) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, **kind)
        self.mlp = FlexMoRE(
            D,
            config.intermediate_size,
            config.layer_ranks(layer),
            config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            scoring=config.scoring,
            expert_bias=config.expert_bias,
            **kind,
        )
        self.post_attention_layernorm = RMSNorm(D, eps, **kind)
        self.post_feedforward_layernorm = RMSNorm(D, eps, **kind)

    def forward(self, h, rotary, mask, expert_mask) -> Tensor:
        h = h + self.post_attention_layernorm(self.self_attn(h, rotary, mask))
        return h + self.post_feedforward_layernorm(self.mlp(h, expert_mask=expert_mask))


class Decoder(nn.Module):
    """Embedding, blocks and the final norm."""

    def __init__(self, config: FlexMoREConfig, **kind) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **kind)
        self.layers = nn.ModuleList(
            Block(config, layer, **kind) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kind)

    def forward(self, input_ids, attention_mask, expert_mask) -> Tensor:
        length, mask = input_ids.shape[1], None
        if attention_mask is not None:
            visible = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
            # A token may always see itself, so that a padded one has a softmax.
            itself = torch.eye(length, dtype=torch.bool, device=input_ids.device)
            mask = visible & (attention_mask.bool()[:, None, None, :] | itself)
        h = self.embed_tokens(input_ids)
        rotary = rotary_table(length, self.head_dim, self.rope_theta, h)
        for layer in self.layers:
            h = layer(h, rotary, mask, expert_mask)
        return self.norm(h)


class FlexMoREForCausalLM(nn.Module):
    """The language model: ids to logits. state_dict keys are those of the authors' checkpoints.

    With `config.tie_word_embeddings` there is no `lm_head.weight`. Builds on the meta device; after
    `to_empty`, `reset_parameters` or `load_state_dict` fills it.
    """

    def __init__(
        self,
        config: FlexMoREConfig,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.model = Decoder(config, **kind)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **kind)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices normal(0.02), norms one, the layers as `FlexMoRE.reset_parameters`."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, FlexMoRE):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        expert_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, S, vocab_size) of ids (B, S); each position sees itself and those before it.

        attention_mask (B, S) is 0 at padding, which no other token sees (positions count padding).
        expert_mask is bool (E,) or (B, S, E) and holds for every layer.
        """
        check_tensor("input_ids", input_ids, ("B", "S"), (torch.int64, torch.int32))
        if attention_mask is not None:
            shape, device = tuple(input_ids.shape), input_ids.device
            check_tensor("attention_mask", attention_mask, shape, None, device)
        h = self.model(input_ids, attention_mask, expert_mask)
        if self.lm_head is None:
            return F.linear(h, self.model.embed_tokens.weight)
        return self.lm_head(h)

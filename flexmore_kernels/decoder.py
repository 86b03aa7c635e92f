"""The blocks around the layer: FlexOlmo's OLMo-2 decoder with FlexMoRE as its feed-forward.

Post-norm (the norm follows attention and feed-forward), RMSNorm over the whole width of q and k in
OLMo-2's order of precision, RoPE in float32, grouped key-value heads. Maths: reference/model.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kv_cache import KVCache
from .layer import FlexMoRE
from .model_config import FlexMoREConfig
from .ops.attention import attend, rotated_heads
from .ops.rms_norm import rms_norm
from .ops.routing import Routing
from .positions import Step, heads_of, uncached
from .rank_limit import RequestLimits

Watcher = Callable[[Routing, "Tensor | None", "Tensor | None"], None]
"""Is given a routing, the mask of the experts between which it chose, and which tokens count."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in float32 (float64), rounded once; plus a residual."""

    def __init__(self, size: int, eps: float, **kind) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, **kind))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    """Causal attention with full-width norms of q and k and grouped key-value heads."""

    def __init__(self, config: FlexMoREConfig, layer: int, **kind) -> None:
        super().__init__()
        self.layer = layer
        D, eps = config.hidden_size, config.rms_norm_eps
        width = config.num_attention_heads * config.head_dim
        groups = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, width, bias=False, **kind)
        self.k_proj = nn.Linear(D, groups, bias=False, **kind)
        self.v_proj = nn.Linear(D, groups, bias=False, **kind)
        self.o_proj = nn.Linear(width, D, bias=False, **kind)
        self.q_norm, self.k_norm = RMSNorm(width, eps, **kind), RMSNorm(groups, eps, **kind)

    @torch.no_grad()
    def prepare(self) -> None:
        """Lay the weights of q, k and v end to end: without gradients they are one product then.

        The parameters stay what they are, as parts of one tensor. What gives them other memory
        (`to` another device, an assigning `load_state_dict`, a copy) undoes it.
        """
        weights = [linear.weight for linear in self._linears]
        with torch.inference_mode(False):
            joined = torch.cat([weight.detach() for weight in weights])
            parts = joined.split([weight.shape[0] for weight in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.data = part

    @property
    def _linears(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def _joined(self) -> Tensor | None:
        """The three weights as one, where they lie so and nothing but their product is asked for:
        no gradient of theirs, no hook or wrapper of a projection."""
        if torch.compiler.is_compiling():
            return None
        rows, end = 0, None
        for linear in self._linears:
            plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
            if not plain or linear._forward_hooks or linear._forward_pre_hooks:
                return None
            weight = linear.weight
            if torch.is_grad_enabled() and weight.requires_grad:
                return None
            storage = weight.untyped_storage().data_ptr()
            if not weight.is_contiguous() or end not in (None, (storage, weight.storage_offset())):
                return None
            rows, end = rows + weight.shape[0], (storage, weight.storage_offset() + weight.numel())
        first = self.q_proj.weight.detach()
        return first.as_strided((rows, first.shape[1]), first.stride())

    def _projected(self, h: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of h, by one product where `prepare` laid their weights together."""
        joined = self._joined()
        if joined is None:
            return tuple(linear(h) for linear in self._linears)
        return F.linear(h, joined).split([linear.out_features for linear in self._linears], -1)

    def forward(self, h: Tensor, step: Step, cache: KVCache | None) -> Tensor:
        place = None if cache is None else cache.place(self.layer)
        q, k, v = rotated_heads(
            *self._projected(h),
            *(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps),
            step.rotary,
            place,
        )
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = attend(q, k, v, step.allowed, step.causal, step.filled)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One decoder layer: h + norm(attention(h)), then h + norm(FlexMoRE(h))."""

    def __init__(self, config: FlexMoREConfig, layer: int, **kind) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, **kind)
        self.mlp = FlexMoRE(
            D,
            config.intermediate_size,
            config.layer_ranks(layer),
            config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            scoring=config.scoring,
            expert_bias=config.expert_bias,
            router=config.router,
            domain_embedding_size=config.domain_embedding_size,
            projector_size=config.projector_size,
            shared_expert=config.shared_expert,
            **kind,
        )
        # By what for, who is told of each routing: see `FlexMoREForCausalLM.counting`.
        self.watchers: dict[str, Watcher] = {}
        self.post_attention_layernorm = RMSNorm(D, eps, **kind)
        self.post_feedforward_layernorm = RMSNorm(D, eps, **kind)

    def forward(self, h, step, expert_mask, limits, cache, counted) -> Tensor:
        h = self.post_attention_layernorm(self.self_attn(h, step, cache), h)
        if not self.watchers:
            y = self._mixture(h, expert_mask, limits, False)
        else:
            y, routing = self._mixture(h, expert_mask, limits, True)
            for watcher in self.watchers.values():
                watcher(routing, self._selectable(expert_mask, h.device), counted)
        return self.post_feedforward_layernorm(y, h)

    def _selectable(self, expert_mask: Tensor | None, device) -> Tensor | None:
        """The experts between which the router chooses."""
        shared = self.mlp.shared_expert
        if shared is None:
            return expert_mask
        others = torch.arange(self.mlp.num_experts, device=device) != shared
        return others if expert_mask is None else expert_mask & others

    def _mixture(self, h, expert_mask, limits: RequestLimits | None, return_routing: bool):
        """The layer's y, and its routing if asked."""
        if limits is None:
            asked = {"return_routing": True} if return_routing else {}
            return self.mlp(h, expert_mask=expert_mask, **asked)
        return limits.run(self.mlp, h, expert_mask, self.mlp.expert_ranks, return_routing)


class Decoder(nn.Module):
    """Embedding, blocks and the final norm."""

    def __init__(self, config: FlexMoREConfig, **kind) -> None:
        super().__init__()
        self.num_experts, self.heads = config.num_experts, heads_of(config, torch.float32)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **kind)
        self.layers = nn.ModuleList(
            Block(config, layer, **kind) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kind)

    def forward(self, input_ids, attention_mask, expert_mask, limits, cache, keep) -> Tensor:
        batch, length = input_ids.shape
        h = self.embed_tokens(input_ids)
        heads = self.heads._replace(dtype=h.dtype, layers=len(self.layers))
        mask = None if attention_mask is None else attention_mask.to(torch.bool)
        if cache is None:
            step = uncached(mask, length, h.device, heads)
        else:
            expert_mask = cache.bind(expert_mask, batch, self.num_experts)
            limits = cache.bind_limits(limits)
            step = cache.begin(mask, batch, length, h.device, heads)
        if expert_mask is not None and expert_mask.dim() == 2:  # one for all tokens of a request
            expert_mask = expert_mask[:, None].expand(-1, length, -1).contiguous()
        counted = mask
        if cache is not None and cache.ended is not None and self.layers[0].watchers:
            alive = ~cache.ended[:, None].expand(batch, length)
            counted = alive if mask is None else alive & mask
        for layer in self.layers:
            h = layer(h, step, expert_mask, limits, cache, counted)
        return self.norm(h[:, -keep:])

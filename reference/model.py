"""The decoder around the layer: FlexOlmo, that is OLMo-2 blocks whose feed-forward is FlexMoRE.

h = embed(ids)
per layer:   h = h + norm(attention(h));   h = h + norm(FlexMoRE(h))        norms after, not before
logits = W_lm norm(h)

norm: rms_norm.py; attention (attention.py): q = rope(norm(Wq h)), k = rope(norm(Wk h)) with the
norm over the full width, all heads together; v = Wv h; softmax(q k^T / sqrt(d)) v over the earlier
positions; Wo. Positions count a request's tokens from 0, padding not.

With a cache, the keys and values of earlier calls' tokens come before those of this call's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import attention, rope
from .layer import FlexMoRE
from .rms_norm import rms_norm


class RMSNorm(nn.Module):
    """norm(x) over the last dimension."""

    def __init__(self, size: int, eps: float, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention with full-width q and k norms and grouped key-value heads."""

    def __init__(self, config, **kind) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.theta, self.head_dim = config.rope_theta, config.head_dim
        D, width, kv = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(D, width, bias=False, **kind)
        self.k_proj = nn.Linear(D, kv, bias=False, **kind)
        self.v_proj = nn.Linear(D, kv, bias=False, **kind)
        self.o_proj = nn.Linear(width, D, bias=False, **kind)
        self.q_norm = RMSNorm(width, config.rms_norm_eps, **kind)
        self.k_norm = RMSNorm(kv, config.rms_norm_eps, **kind)

    def forward(self, h: Tensor, positions: Tensor, allowed: Tensor, past: list) -> Tensor:
        """`past` holds k, v (B, heads, columns, d) of earlier tokens; these tokens' are added."""

        def split(x, heads):
            return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

        q = rope(split(self.q_norm(self.q_proj(h)), self.heads), positions, self.theta)
        k = rope(split(self.k_norm(self.k_proj(h)), self.kv_heads), positions, self.theta)
        v = split(self.v_proj(h), self.kv_heads)
        k, v = (
            torch.cat([*old, new], 2) for old, new in zip(past or ((), ()), (k, v), strict=True)
        )
        past[:] = [(k,), (v,)]
        return self.o_proj(attention(q, k, v, allowed).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config, ranks, **kind) -> None:
        super().__init__()
        self.self_attn = Attention(config, **kind)
        self.mlp = FlexMoRE(
            config.hidden_size,
            config.intermediate_size,
            ranks,
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
        eps = config.rms_norm_eps
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps, **kind)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps, **kind)

    def forward(self, h, positions, allowed, expert_mask, limits, past: list) -> Tensor:
        h = h + self.post_attention_layernorm(self.self_attn(h, positions, allowed, past))
        y = self.mlp(h, expert_mask=expert_mask, rank_limit=limits)
        return h + self.post_feedforward_layernorm(y)


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config, **kind) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **kind)
        ranks = config.expert_ranks
        one_for_all = not isinstance(ranks[0], (list, tuple))  # else a list for each layer
        self.layers = nn.ModuleList(
            Block(config, ranks if one_for_all else ranks[n], **kind)
            for n in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kind)

    def forward(self, input_ids, attention_mask, expert_mask, limits, cache, keep) -> Tensor:
        B, S = input_ids.shape
        cache = {} if cache is None else cache
        if not cache:
            cache["real"] = torch.zeros(B, 0, dtype=torch.bool, device=input_ids.device)
            cache["past"] = [[] for _ in self.layers]
            cache["expert_mask"], cache["rank_limit"] = expert_mask, limits
        now = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        before = cache["real"].shape[1]
        cache["real"] = real = torch.cat([cache["real"], now.bool()], 1)
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, before:]
        column = torch.arange(before + S, device=input_ids.device)
        earlier, itself = (op(column, column[before:, None]) for op in (torch.lt, torch.eq))
        # A token may always see itself, so that a padded one has a softmax.
        allowed = earlier & real[:, None, None, :] | itself
        expert_mask = cache["expert_mask"]
        if expert_mask is not None and expert_mask.dim() == 2:
            expert_mask = expert_mask[:, None].expand(-1, S, -1)
        h = self.embed_tokens(input_ids)
        for layer, past in zip(self.layers, cache["past"], strict=True):
            h = layer(h, positions, allowed, expert_mask, cache["rank_limit"], past)
        return self.norm(h[:, -keep:])


class FlexMoREForCausalLM(nn.Module):
    """The language model; `config` is a `flexmore_kernels.FlexMoREConfig` or has its fields."""

    def __init__(self, config, *, device=None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.config = config
        self.model = Decoder(config, **kind)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **kind)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices normal(0.02), norms one, the layers as `FlexMoRE.reset_parameters`."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=0.02)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, FlexMoRE):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        expert_mask: Tensor | None = None,
        rank_limit=None,
        cache: dict | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Ids (B, S) -> logits (B, S, vocab), or of the last `logits_to_keep` positions.

        attention_mask (B, S) is 0 at padding; expert_mask is (E,), (B, E) or (B, S, E). rank_limit
        has E entries for all requests, each None or a rank. `cache` is {} at first, and then what
        earlier calls made of it, with the expert mask and rank limit of the first.
        """
        h = self.model(input_ids, attention_mask, expert_mask, rank_limit, cache, logits_to_keep)
        if self.config.tie_word_embeddings:
            return F.linear(h, self.model.embed_tokens.weight)
        return self.lm_head(h)

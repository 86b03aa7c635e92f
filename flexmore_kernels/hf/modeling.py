"""FlexMoRE as a model of transformers: FlexOlmo's decoder with `fk.FlexMoRE` for its mixture.

All but the mixture is transformers' own FlexOlmo (attention through its interface, masks, caches,
RoPE, losses), and the classes are subclasses of FlexOlmo's, so that what transformers knows of
those (what can be recorded, which weights are tied) holds here too. Parameters have the names of
the authors' checkpoints: nothing is converted when loading or saving.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.flex_olmo.modeling_flex_olmo import (
    FlexOlmoAttention,
    FlexOlmoDecoderLayer,
    FlexOlmoForCausalLM,
    FlexOlmoModel,
    FlexOlmoPreTrainedModel,
    FlexOlmoRMSNorm,
    FlexOlmoRotaryEmbedding,
    FlexOlmoTopKRouter,
)

from .. import ops
from ..layer import FlexMoRE
from ..ops.router_loss import biased
from ..ops.routing import Routing
from ..storage import Weight
from .cache_mask import check_mask_of, keep_mask
from .children import children_of
from .configuration import FlexMoREConfig


class FlexMoRETopKRouter(FlexOlmoTopKRouter):
    """The router: `weight` (E, D) and, if the config asks for it, `expert_bias` (E - 1,)."""

    def __init__(self, config: FlexMoREConfig) -> None:
        super().__init__(config)
        self.scoring = config.scoring
        bias = nn.Parameter(torch.zeros(self.num_experts - 1)) if config.expert_bias else None
        self.register_parameter("expert_bias", bias)

    def forward(
        self, hidden_states: Tensor, expert_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(scores, weights, indices, logits) of tokens (T, D).

        scores (T, E), what transformers records as router logits: their softmax is the router's
        distribution, also with a bias or by sigmoids, so that its auxiliary loss is the right one.
        """
        routing = ops.topk_route(
            hidden_states,
            self.weight.to(hidden_states.dtype),
            top_k=self.top_k,
            bias=self.expert_bias,
            mask=expert_mask,
            norm_topk_prob=self.norm_topk_prob,
            scoring=self.scoring,
        )
        scores = biased(routing.logits, self.expert_bias)
        if self.scoring == "sigmoid":
            scores = nn.functional.logsigmoid(scores)
        return scores, routing.weights, routing.indices, routing.logits


class FlexMoRESparseMoeBlock(FlexMoRE):
    """`fk.FlexMoRE` of one layer of a config.

    A child's own forward never runs, the kernels read its weight. So where accelerate has hooked
    the children (weights on the CPU or on disk), this block runs their hooks around its forward,
    and is the unit that is brought in.
    """

    def __init__(self, config: FlexMoREConfig, layer: int) -> None:
        super().__init__(
            config.hidden_size,
            config.intermediate_size,
            config.layer_ranks(layer),
            config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            scoring=config.scoring,
            stacked_factors=False,  # transformers loads parameters by their names
        )
        self.gate = FlexMoRETopKRouter(config)
        for name, child in self.experts.named_modules():
            if isinstance(child, Weight):
                # For `_init_weights`, which sees a module without its name.
                child.side = name[-1] if name.endswith(("_a", "_b")) else "full"
        self._children: tuple[tuple[dict, str, nn.Module], ...] | None = None

    def forward(
        self,
        x: Tensor,
        *,
        expert_mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        kept = self._children  # a walk for each token is slow
        if kept is None or not all(own.get(name) is module for own, name, module in kept):
            self._children = kept = children_of(self)
        hooked = [module for _, _, module in kept if _is_hooked(module)]
        for module in hooked:
            module._hf_hook.pre_forward(module)
        try:
            return super().forward(x, expert_mask=expert_mask, return_routing=return_routing)
        finally:
            for module in hooked:
                module._hf_hook.post_forward(module, None)

    def _route_and_mix(self, x_TD, expert_mask, gate, up, down) -> tuple[Tensor, Routing]:
        # Called as a module, for transformers records its first output.
        _, weights, indices, logits = self.gate(x_TD, expert_mask)
        p_TK = weights.to(torch.promote_types(x_TD.dtype, torch.float32))
        y_TD = ops.experts(x_TD, indices, p_TK, gate, up, down)
        return y_TD, Routing(logits, weights, indices)


def _is_hooked(module: nn.Module) -> bool:
    """Whether accelerate brings the module's weights in before its forward."""
    if torch.compiler.is_compiling():
        return hasattr(module, "_hf_hook")
    return "_hf_hook" in module.__dict__  # a missing attribute takes a module twenty times as long


class FlexMoREDecoderLayer(FlexOlmoDecoderLayer):
    """One decoder layer; `_no_split_modules` names it."""

    def __init__(self, config: FlexMoREConfig, layer_idx: int) -> None:
        # Not FlexOlmo's own: it would allocate every expert at full size.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = FlexOlmoAttention(config=config, layer_idx=layer_idx)
        self.mlp = FlexMoRESparseMoeBlock(config, layer_idx)
        self.post_attention_layernorm = FlexOlmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = FlexOlmoRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, *, expert_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        attended, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        if expert_mask is not None and expert_mask.dim() == 2:
            # (B, E), one row a request: the same experts at every position.
            batch, length = hidden_states.shape[:2]
            expert_mask = expert_mask[:, None].expand(batch, length, -1)
        mixed = self.mlp(hidden_states, expert_mask=expert_mask)
        return hidden_states + self.post_feedforward_layernorm(mixed)


class FlexMoREPreTrainedModel(FlexOlmoPreTrainedModel):
    config_class = FlexMoREConfig
    _no_split_modules = ["FlexMoREDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        side = getattr(module, "side", None) if isinstance(module, Weight) else None
        if side == "full":
            initialization.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif side == "a":
            initialization.kaiming_uniform_(module.weight, a=5**0.5)
        elif side == "b":
            initialization.zeros_(module.weight)
        elif isinstance(module, FlexMoRETopKRouter) and module.expert_bias is not None:
            initialization.zeros_(module.expert_bias)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False  # there is one, `fk.ops.experts`

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Does nothing: the config's `save_pretrained` always writes `auto_map`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """As transformers'; the ranks of a local directory are those of its tensors."""
        if isinstance(config, FlexMoREConfig) and pretrained_model_name_or_path is not None:
            directory = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            config = config.of_directory(directory) if directory.is_dir() else config
        return super().from_pretrained(
            pretrained_model_name_or_path, *args, config=config, **kwargs
        )


class FlexMoREModel(FlexMoREPreTrainedModel, FlexOlmoModel):
    """Embedding, decoder layers and the final norm."""

    def __init__(self, config: FlexMoREConfig) -> None:
        FlexMoREPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            FlexMoREDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = FlexOlmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = FlexOlmoRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        expert_mask: Tensor | None = None,
        **kwargs: Any,
    ):
        """As transformers' FlexOlmo; `expert_mask` as `FlexMoREForCausalLM.forward`."""
        check_mask_of(past_key_values, expert_mask)
        if expert_mask is not None:
            kwargs["expert_mask"] = expert_mask
        as_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        keep_mask(output.past_key_values, expert_mask)
        return output.to_tuple() if as_dict is False else output


class FlexMoREForCausalLM(FlexMoREPreTrainedModel, FlexOlmoForCausalLM):
    """The language model, for `AutoModelForCausalLM`, `generate` and `Trainer`."""

    def __init__(self, config: FlexMoREConfig) -> None:
        FlexMoREPreTrainedModel.__init__(self, config)
        self.model = FlexMoREModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        expert_mask: Tensor | None = None,
        **kwargs: Any,
    ):
        """As transformers' FlexOlmo, with the experts that a request may use.

        expert_mask is bool (E,), (B, E) or (B, S, E) and holds for every layer. A request keeps its
        mask for its life: another one with the same cache raises ValueError. To `generate` give
        (B, E), which it repeats for beams; `generate_batch` takes none.
        """
        if expert_mask is not None:
            kwargs["expert_mask"] = expert_mask
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def generate_batch(self, *args: Any, **kwargs: Any):
        """As transformers', which has no place for a mask of each request: `expert_mask` raises."""
        if kwargs.pop("expert_mask", None) is not None:
            raise ValueError(
                "expert_mask: got a mask for generate_batch, which would not apply it; accepted: "
                "generate(..., expert_mask=)"
            )
        return super().generate_batch(*args, **kwargs)

"""The models that benchmarks.generation times: ours, the same around one dense FFN, transformers'.

Four layers of FlexOlmo-7x7B's width with six experts of rank 64. All three share embeddings,
attention and head; transformers' FlexOlmo has full-size experts of the same mathematics, each
W + B A rounded once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.problem import merge
from benchmarks.shapes import SHAPES
from flexmore_kernels import FlexMoREConfig, FlexMoREForCausalLM, baselines
from flexmore_kernels.checkpoint import expert_weights
from flexmore_kernels.decode_step import DecodeStep
from flexmore_kernels.kv_cache import DynamicCache, StaticCache
from flexmore_kernels.sampling import Sampling


class Work(NamedTuple):
    """What is asked of the models of one shape, and their sizes beside the layer's own numbers."""

    layers: int
    heads: int
    vocab: int
    prompts: tuple[int, int]  # requests and tokens of the prefill
    context: int  # tokens of a prompt that decoding goes on from
    steps: int  # that are timed together
    batches: tuple[int, ...]  # requests that are decoded together
    new_tokens: int  # of `generate`

    @property
    def columns(self) -> int:
        """Of a static cache: the prompt, and as many steps as are ever taken from it."""
        return self.context + 2 * self.steps


WORK = {
    "flexolmo_6x64": Work(4, 32, 100352, (2, 4096), 512, 16, (1, 16), 64),
    "small": Work(2, 8, 2048, (1, 64), 32, 4, (1, 4), 8),
    "tiny": Work(2, 4, 64, (1, 12), 6, 3, (1, 2), 4),
}


def config_of(shape_name: str) -> FlexMoREConfig:
    """The model's sizes."""
    shape, work = SHAPES[shape_name], WORK[shape_name]
    return FlexMoREConfig(
        vocab_size=work.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_experts_per_tok=shape.top_k,
        expert_ranks=list(shape.ranks),
    )


@torch.no_grad()
def ours(config: FlexMoREConfig, device: str, dtype: torch.dtype) -> FlexMoREForCausalLM:
    """Random weights, no B zero; routers that decide."""
    torch.manual_seed(0)
    model = FlexMoREForCausalLM(config, device=device, dtype=dtype)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            continue
        scale = 0.5 if name.endswith(("_b.weight", "_b")) else 1.0
        scale = 1.0 if "embed" in name else scale / math.sqrt(max(weight.shape[-1], 1))
        weight.copy_(torch.randn(weight.shape, device=device).mul_(scale))
    return model.requires_grad_(False)


class DenseFFN(nn.Module):
    """One SwiGLU FFN of the base's size in a block's place for the layer, under torch.compile."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList([gate, up, down])
        self.run = torch.compile(baselines.dense_ffn, dynamic=False)

    def forward(self, h: Tensor, expert_mask: Tensor | None = None) -> Tensor:
        return self.run(h, *self.weights)


def dense(model: FlexMoREForCausalLM) -> FlexMoREForCausalLM:
    """The same model with each layer's base alone; it shares all tensors."""
    with torch.device("meta"):
        other = FlexMoREForCausalLM(model.config)
    other.lm_head, other.model.embed_tokens = model.lm_head, model.model.embed_tokens
    other.model.norm = model.model.norm
    for block, like in zip(other.model.layers, model.model.layers, strict=True):
        for name, module in like.named_children():
            if name != "mlp":
                setattr(block, name, module)
        block.mlp = DenseFFN(*(entries[0] for entries in entries_of(like.mlp)))
    return other.requires_grad_(False)


def entries_of(layer: nn.Module) -> list:
    """A layer's gate, up and down: a matrix or a pair for each expert."""
    return expert_weights(layer.state_dict(), layer.expert_ranks)


@torch.no_grad()
def hugging_face(model: FlexMoREForCausalLM) -> Any:
    """transformers' FlexOlmo with this model's experts at full size."""
    from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

    c = model.config
    config = FlexOlmoConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_experts=c.num_experts,
        intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_experts_per_tok=c.num_experts_per_tok,
        norm_topk_prob=c.norm_topk_prob, rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    weight = model.model.embed_tokens.weight
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with torch.device(weight.device):
            other = FlexOlmoForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    mine = dict(model.named_parameters())
    for name, target in other.named_parameters():
        if name in mine:
            target.data = mine[name].data
    for block, like in zip(other.model.layers, model.model.layers, strict=True):
        experts = block.mlp.experts
        merge(entries_of(like.mlp), experts.gate_up_proj, experts.down_proj)
    return other.requires_grad_(False)


class OurSteps:
    """Decoding from prompts (B, S) by the library: one token a request at each `step`."""

    def __init__(self, model: FlexMoREForCausalLM, prompts: Tensor, columns: int) -> None:
        (batch, self.past), weight = prompts.shape, model.lm_head.weight
        kind = {"device": weight.device, "dtype": weight.dtype}
        self.cache = StaticCache(model.config, batch, columns, **kind)
        graph = weight.device.type == "cuda"
        self.step = DecodeStep(model, self.cache, Sampling(), (), 0, cuda_graph=graph)
        with torch.no_grad():
            self.step.take(model(prompts, cache=self.cache, logits_to_keep=1))
        self.first = self.step.tokens.clone()

    def restart(self) -> None:
        """Back to the end of the prompts."""
        self.cache.length = self.past
        self.cache.end.fill_(self.past)
        self.cache.position.fill_(self.past)
        self.cache.real[:, self.past :] = False
        self.step.tokens.copy_(self.first)


class TheirSteps:
    """The same by transformers: its static cache, its forward under its own compile settings.

    experts: its implementation while decoding; its `generate` takes batched_mm. compiled: by
    torch.compile as its `generate` does, else as it is.
    """

    def __init__(
        self, model: Any, prompts: Tensor, columns: int, experts: str, compiled: bool
    ) -> None:
        from transformers import CompileConfig
        from transformers.cache_utils import StaticCache as TheirCache

        self.model, self.experts, self.past = model, experts, prompts.shape[1]
        self.cache = TheirCache(config=model.config, max_cache_len=columns)
        model.set_experts_implementation("grouped_mm")
        with torch.no_grad():
            logits = model(prompts, past_key_values=self.cache, logits_to_keep=1).logits
        self.first = logits[:, -1].argmax(-1, keepdim=True)
        self.tokens, self.forward = self.first.clone(), model.__call__
        if compiled:
            self.forward = torch.compile(model.__call__, **CompileConfig().to_dict())

    def restart(self) -> None:
        """Back to the end of the prompts."""
        self.model.set_experts_implementation(self.experts)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.past)
        self.tokens.copy_(self.first)

    @torch.no_grad()
    def step(self) -> None:
        logits = self.forward(self.tokens, past_key_values=self.cache).logits
        self.tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))


def prefill(model: FlexMoREForCausalLM, ids: Tensor) -> Tensor:
    """Logits (B, 1, V) of prompts' last tokens, their keys and values kept."""
    with torch.no_grad():
        return model(ids, cache=DynamicCache(), logits_to_keep=1)


def their_prefill(model: Any, ids: Tensor, forward: Any = None) -> Tensor:
    """The same by transformers; `forward`: the model's, compiled."""
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        return (forward or model)(ids, use_cache=True, logits_to_keep=1).logits

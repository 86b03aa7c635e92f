"""What the models of benchmarks.generation must move and compute, whoever does.

Each weight that is used is read once a forward, keys and values of the tokens so far once; low-rank
experts read their factors, and transformers' full-size ones their three matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.decoders import Work
from flexmore_kernels import FlexMoREForCausalLM
from flexmore_kernels.kv_cache import DynamicCache

Priced = dict[str, tuple[int, int]]
"""(bytes, operations) of "ours", "dense" and "theirs"."""


def prefilling(model: FlexMoREForCausalLM, work: Work) -> Priced:
    """Of the long prompts; of the logits the last ones."""
    batch, length = work.prompts
    every = [list(range(model.config.num_experts))] * model.config.num_hidden_layers
    pairs = batch * length * (length + 1) // 2
    return _priced(model, batch * length, batch, pairs, batch * length, every)


@torch.no_grad()
def decoding(model: FlexMoREForCausalLM, prompts: Tensor) -> Priced:
    """Of one more token of each request; the experts are those of the prompts' last tokens."""
    batch, length = prompts.shape
    cache = DynamicCache()
    model(prompts[:, :-1], cache=cache, logits_to_keep=1)
    with model.counting() as counted:
        model(prompts[:, -1:], cache=cache)
    chosen = [one.load.nonzero()[:, 0].tolist() for one in counted]
    return _priced(model, batch, batch, batch * length, batch * length, chosen)


def _priced(
    model: FlexMoREForCausalLM, tokens: int, last: int, pairs: int, past: int, chosen: list
) -> Priced:
    """tokens go through the layers, `last` through the head; `pairs` of tokens attend."""
    c = model.config
    D, F, K = c.hidden_size, c.intermediate_size, c.num_experts_per_tok
    width, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention, ffn, head = 2 * D * (width + keys), 3 * D * F, c.vocab_size * D
    layers = c.num_hidden_layers
    common = layers * (attention + 2 * past * keys) + head
    flops = 2 * (layers * (tokens * attention + 2 * pairs * width) + last * head)
    ranks = [rank for rank in c.expert_ranks if rank]
    mean = 3 * (D + F) * sum(ranks) / len(ranks)  # entries of an expert's factors
    low = sum(mean * sum(e > 0 for e in experts) for experts in chosen)
    full = sum(ffn * len(experts) for experts in chosen)
    rows = tokens * K * (c.num_experts - 1) / c.num_experts  # of low-rank experts, routed evenly
    size = model.lm_head.weight.element_size()
    base = 2 * layers * tokens * ffn
    return {
        "ours": (
            round(size * (common + layers * ffn + low)),
            round(flops + base + 2 * layers * rows * mean),
        ),
        "dense": (size * (common + layers * ffn), flops + base),
        "theirs": (size * (common + full), flops + K * base),
    }

"""Whether the models of benchmarks.generation compute what they should: error over allowed.

Ours with as many experts allowed to a request as it chooses, so that no rounding chooses others:
its logits by the accuracy rule, and of the tokens that it generates (static cache, CUDA graph),
how far the float64 logit of each is below the largest, over what two allowed errors explain. Of the
dense model its FFN; of transformers' its logits, whatever experts rounding made it choose.
"""

from __future__ import annotations

from typing import Any

import torch

import reference
from benchmarks.problem import Problem
from flexmore_kernels import FlexMoREForCausalLM
from flexmore_kernels.testing import accuracy, to_float64

REQUESTS, PROMPT, NEW = 16, 24, 8


class Checks:
    """The plain reference of a model, in its dtype and in float64."""

    def __init__(self, model: FlexMoREForCausalLM) -> None:
        weight = model.lm_head.weight
        self.model, kind = model, {"device": weight.device, "dtype": weight.dtype}
        with torch.no_grad():
            self.same, self.wide = (
                reference.FlexMoREForCausalLM(model.config, **kind | {"dtype": dtype})
                for dtype in (weight.dtype, torch.float64)
            )
            for one in (self.same, self.wide):
                one.load_state_dict(model.state_dict())
        vocab = model.config.vocab_size
        self.ids = torch.randint(vocab, (REQUESTS, PROMPT), device=weight.device)

    @torch.no_grad()
    def all(self, dense: FlexMoREForCausalLM, theirs: Any) -> dict[str, float]:
        """Of "ours", "dense" and, if it is there, "theirs"."""
        found = {"ours": self.ours(), "dense": self.dense(dense)}
        if theirs is not None:
            ids = self.ids
            found["theirs"] = accuracy(theirs(ids).logits, self.wide(ids), self.same(ids)).ratio
        return found

    def ours(self) -> float:
        """Logits and generated tokens."""
        config, device = self.model.config, self.ids.device
        E, K = config.num_experts, config.num_experts_per_tok
        turn = torch.arange(K)[None] + torch.arange(REQUESTS)[:, None]
        masks = torch.zeros(REQUESTS, E, dtype=torch.bool).scatter_(1, turn % E, True).to(device)
        graph = True if device.type == "cuda" else None
        made = self.model.generate(
            self.ids, max_new_tokens=NEW, expert_mask=masks, eos_token_id=(), cuda_graph=graph
        )
        truth, same, ours = (
            one(made[:, :-1], expert_mask=masks) for one in (self.wide, self.same, self.model)
        )
        found = accuracy(ours, truth, same)
        seen = truth[:, PROMPT - 1 :]
        behind = seen.amax(-1) - seen.gather(-1, made[:, PROMPT:, None])[..., 0]
        return max(found.ratio, behind.max().item() / (2 * found.allowed_max))

    def dense(self, model: FlexMoREForCausalLM) -> float:
        """Its FFN: what is around it, it shares with ours."""
        ffn = model.model.layers[0].mlp
        h = torch.randn(REQUESTS, PROMPT, model.config.hidden_size, device=self.ids.device)
        h, base = h.to(ffn.weights[0].dtype), list(ffn.weights)
        truth = Problem.dense(*to_float64((h, base)))
        return accuracy(ffn(h), truth, Problem.dense(h, base)).ratio

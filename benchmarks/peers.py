"""Other libraries' ways to compute the layer, where they are installed; ImportError where not.

Each takes a problem and gives a call on its tokens and routing. All but PEFT know full-size experts
alone, so they get merged matrices, which are made before anything is timed.
"""

from __future__ import annotations

import torch

from benchmarks.problem import Problem
from flexmore_kernels.timing import Call


def _hugging_face_config(p: Problem, implementation: str):
    from transformers import FlexOlmoConfig

    config = FlexOlmoConfig(
        hidden_size=p.shape.hidden,
        intermediate_size=p.shape.intermediate,
        num_experts=len(p.shape.ranks),
        num_experts_per_tok=p.shape.top_k,
        norm_topk_prob=False,
    )
    config._experts_implementation = implementation
    return config


def _hugging_face_experts(p: Problem, experts: torch.nn.Module) -> None:
    """Give the module the problem's matrices; no copy."""
    for name, merged in zip(("gate_up_proj", "down_proj"), p.merged, strict=True):
        setattr(experts, name, torch.nn.Parameter(merged, requires_grad=False))


def hugging_face(implementation: str):
    """FlexOlmo's experts in transformers, given the routing: "eager" or "grouped_mm"."""

    def make(p: Problem) -> Call:
        from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoExperts

        with torch.device("meta"):
            experts = FlexOlmoExperts(_hugging_face_config(p, implementation))
        _hugging_face_experts(p, experts)
        # The router of this model gives its weights in x's dtype.
        gates = p.gates if p.dtype == torch.float64 else p.gates.to(p.dtype)
        return lambda: experts(p.x, p.indices, gates)

    return make


def hugging_face_block(p: Problem) -> Call:
    """FlexOlmo's block in transformers: its router, then its experts by grouped_mm."""
    from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoSparseMoeBlock

    with torch.device("meta"):
        block = FlexOlmoSparseMoeBlock(_hugging_face_config(p, "grouped_mm"))
    _hugging_face_experts(p, block.experts)
    block.gate.weight = torch.nn.Parameter(p.layer.gate.weight.detach(), requires_grad=False)
    return lambda: block(p.x[None])[0]


def _with_adapter(p: Problem) -> tuple[torch.nn.Module, list]:
    """The base FFN with a LoRA of PEFT's on all three projections, the first expert's factors; and
    PEFT's modules."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = ("gate_proj", "up_proj", "down_proj")

    class FFN(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, weight in zip(names, p.base, strict=True):
                linear = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
                linear.weight = weight
                setattr(self, name, linear)

        def forward(self, x):
            h = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(h)

    rank = p.shape.ranks[1]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names))
    ffn = inject_adapter_in_model(config, FFN()).to(p.device)
    layers = [module for module in ffn.modules() if isinstance(module, BaseTunerLayer)]
    for layer, entries in zip((getattr(ffn, name) for name in names), p.weights, strict=True):
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = entries[1]
    return ffn, layers


def peft_dense(p: Problem) -> Call:
    """One FFN with its adapters, as PEFT is used: no mixture, one pass."""
    ffn, _ = _with_adapter(p)
    return lambda: ffn(p.x)


def peft_lora(p: Problem) -> Call:
    """The base, and the base with its adapters, for a base and one expert that are always on.

    PEFT has one adapter state a pass, so a mixture of both takes two passes over the base.
    """
    ffn, layers = _with_adapter(p)
    shares = [(p.gates * (p.indices == e)).sum(-1, keepdim=True).to(p.dtype) for e in (0, 1)]
    shares = [share.detach() for share in shares]

    def run():
        y = 0
        for adapter, share in zip((False, True), shares, strict=True):
            for layer in layers:
                layer.enable_adapters(adapter)
            y = y + share * ffn(p.x)
        return y

    return run


def liger_dense(p: Problem) -> Call:
    """The dense FFN with Liger's SwiGLU kernel."""
    from liger_kernel.ops import LigerSiLUMulFunction

    gate, up, down = p.base
    linear, mul = torch.nn.functional.linear, LigerSiLUMulFunction.apply
    return lambda: linear(mul(linear(p.x, gate), linear(p.x, up), 1.0, 1.0), down)


def liger_experts(p: Problem) -> Call:
    """Liger's fused mixture of experts, given the routing."""
    from liger_kernel.ops import LigerFusedMoEFunction

    indices = p.indices.to(torch.int32)
    return lambda: LigerFusedMoEFunction.apply(p.x, *p.merged, indices, p.gates)


def scattermoe(p: Problem) -> Call:
    """ScatterMoE's scattered products, given the routing; silu and product in PyTorch, as there."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    gate_up, down = (merged.transpose(1, 2) for merged in p.merged)
    gates = p.gates.to(p.dtype)

    def run():
        where = flatten_sort_count(p.indices, num_experts=gate_up.shape[0])
        h = parallel_linear(p.x, gate_up, p.shape.top_k, *where, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        return parallel_linear(h, down, 1, *where, grouped_in=True, gates=gates)

    return run


def sonicmoe(p: Problem) -> Call:
    """SonicMoE's layer, given the routing, as transformers calls it."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    tokens, top_k = p.indices.shape
    token = torch.arange(tokens, device=p.device, dtype=torch.int32).repeat_interleave(top_k)
    expert = p.indices.flatten().to(torch.int32)
    gate_up, down = (merged.permute(1, 2, 0) for merged in p.merged)

    def run():
        return moe_general_routing_inputs(
            p.x, p.gates.flatten(), token, expert, gate_up, None, down, None, len(p.shape.ranks),
            None, ActivationType.SWIGLU, not torch.is_grad_enabled(), concat_layout=True,
        )[0]  # fmt: skip

    return run

"""Small models, and adapters that PEFT makes on them, for the tests of imports."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from flexmore_kernels import checkpoint

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
FFN = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[3, 9, 27, 1, 30, 11]])
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def dense_model(**change):
    torch.manual_seed(0)
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES | change))
    return randomised(model)


def mixture_model():
    torch.manual_seed(0)
    config = transformers.FlexOlmoConfig(**SIZES, num_experts=3, num_experts_per_tok=3)
    model = transformers.FlexOlmoForCausalLM(config)
    model.set_experts_implementation("eager")  # the one that computes in float64
    return randomised(model)


def randomised(model, only=""):
    """Weights as large as the FFN's inputs, none zero, so that every delta and scale shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
                parameter.copy_(torch.randn_like(parameter) * scale + (parameter.dim() == 1))
    return model.eval()


def adapt(model, directory, seed, **options):
    """A random adapter on the model, saved; returns PEFT's logits in float64 and float32."""
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": FFN, **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    randomised(wrapped, "lora_")
    wrapped.save_pretrained(directory)
    with torch.no_grad():
        same = wrapped(IDS).logits
        return wrapped.double()(IDS).logits, same


def stored(directory):
    """Every tensor of a directory."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def logits(directory, expert=None):
    """Of a checkpoint in float32, with all experts or one."""
    model = checkpoint.load_model(directory)
    mask = None
    if expert is not None:
        mask = torch.zeros(model.config.num_experts, dtype=torch.bool)
        mask[expert] = True
    with torch.no_grad():
        return model(IDS, expert_mask=mask)

"""The model that is trained: made, given a new expert, watched, and written when a run ends."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from pathlib import Path

import run_text
import torch
from torch import nn

import flexmore_kernels as fk
from flexmore_kernels.adapter_export import export_adapter
from flexmore_kernels.checkpoint import save_checkpoint
from flexmore_kernels.checkpoint_writer import SIDE_FILES
from flexmore_kernels.layer import STACK_ABOVE
from flexmore_kernels.text import TOKENIZER_FILE

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
UNFINISHED = "unfinished"  # the folder where the result is made


def small_decoder(options, device: str, dtype: torch.dtype) -> fk.FlexMoREForCausalLM:
    """A decoder of random weights over bytes, with the public expert alone; it knows nothing."""
    config = fk.FlexMoREConfig(
        vocab_size=run_text.BYTES,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_experts_per_tok=1,
        expert_ranks=[0],
    )
    model = fk.FlexMoREForCausalLM(config, device=device, dtype=dtype)
    # The head stays frozen: larger than usual, so that what an expert changes reaches the logits.
    nn.init.normal_(model.lm_head.weight, std=2 * options.hidden_size**-0.5)
    return model


def with_expert(public: fk.FlexMoREForCausalLM, rank: int) -> fk.FlexMoREForCausalLM:
    """The model with one more expert, as `FlexMoRE` starts one: A Kaiming, B zero, so that it
    computes what the public expert does; its row of the router normal(0.02), its bias zero."""
    config, tensors = public.config, public.state_dict()
    new, largest = config.num_experts, min(config.hidden_size, config.intermediate_size)
    if rank > largest:
        raise ValueError(f"--rank: got {rank}; accepted: up to min(D, F), {largest}")
    if new >= STACK_ABOVE:  # the factors of more are one parameter, not the new expert's own
        raise ValueError(f"--checkpoint: has {new} experts; accepted: fewer than {STACK_ABOVE}")
    ranks = [[*config.layer_ranks(layer), rank] for layer in range(config.num_hidden_layers)]
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp."
        gate = tensors[f"{mlp}gate.weight"]
        row = torch.empty_like(gate[:1]).normal_(std=0.02)
        tensors[f"{mlp}gate.weight"] = torch.cat([gate, row])
        if config.expert_bias:
            bias = tensors[f"{mlp}gate.expert_bias"]
            tensors[f"{mlp}gate.expert_bias"] = torch.cat([bias, bias.new_zeros(1)])
        for projection in PROJECTIONS:
            rows, columns = tensors[f"{mlp}experts.0.{projection}.weight"].shape
            a = nn.init.kaiming_uniform_(gate.new_empty(rank, columns), a=math.sqrt(5))
            name = f"{mlp}experts.{new}.{projection}"
            tensors[f"{name}_a.weight"], tensors[f"{name}_b.weight"] = a, a.new_zeros(rows, rank)
    config = dataclasses.replace(config, num_experts=new + 1, expert_ranks=ranks)
    model = fk.FlexMoREForCausalLM(config, device="meta")
    model.load_state_dict(tensors, assign=True)
    return model


def write_result(model, out: Path, dtype: torch.dtype, new: int | None, options, bytewise) -> None:
    """out/model, a checkpoint, and out/expert, the new expert alone as a LoRA adapter.

    In `dtype`, made in another folder and renamed, the model last: where it is, all is there.
    """
    work = out / UNFINISHED
    shutil.rmtree(work, ignore_errors=True)
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    config |= {name: options.dtype for name in ("dtype", "torch_dtype") if name in config}
    save_checkpoint(work / "model", tensors, config)
    if options.checkpoint is not None:
        beside = [path for pattern in SIDE_FILES for path in Path(options.checkpoint).glob(pattern)]
        for path in filter(Path.is_file, beside):
            shutil.copy2(path, work / "model")
    if bytewise:
        (work / "model" / TOKENIZER_FILE).write_text(run_text.byte_tokenizer())
    if new is not None:
        base = options.checkpoint or ""
        export_adapter(work / "model", new, work / "expert", base_name=base)
        shutil.rmtree(out / "expert", ignore_errors=True)
        os.replace(work / "expert", out / "expert")
    os.replace(work / "model", out / "model")
    work.rmdir()

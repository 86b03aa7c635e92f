"""One low-rank expert of a checkpoint, written as a PEFT LoRA adapter of the public expert's FFN.

    lora_A = a,  lora_B = b,  scale = alpha / r = 1

so that the dense model whose FFN is expert 0, with the adapter, computes what the mixture computes
with that expert alone (whose routing weight is then 1).
"""

from __future__ import annotations

import collections
import os
from pathlib import Path

from torch import Tensor

from .adapter_config import CONFIG_FILE, WEIGHTS_FILE
from .checkpoint import read_tensors
from .checkpoint_config import as_triple
from .checkpoint_folders import made_whole, refuse_existing
from .checkpoint_layout import PROJECTIONS, mlp_prefix, read_layout
from .checkpoint_writer import write_json, write_tensors
from .checks import check_int


def export_adapter(
    checkpoint: str | os.PathLike, expert: int, out: str | os.PathLike, *, base_name: str = ""
) -> dict[str, int]:
    """Write expert `expert` as a PEFT adapter directory; returns the rank of each module.

    Args:
        checkpoint: a FlexMoRE checkpoint.
        expert: 1 to E - 1, low-rank (or equal to the base) in every layer and projection.
        out: a new or an empty directory, written whole or not at all.
        base_name: goes into `base_model_name_or_path`: the dense model whose FFNs are expert 0.

    Raises ValueError naming the weight that is full-size.
    """
    layout = read_layout(checkpoint)
    expert = check_int("expert", expert, 1, layout.config["num_experts"] - 1)
    directory = Path(out)
    refuse_existing(directory)
    ranks: dict[str, int] = {}
    for layer, entries in enumerate(layout.layer_ranks):
        for projection, kind in zip(PROJECTIONS, as_triple(entries[expert]), strict=True):
            if kind == "full":
                raise ValueError(
                    f"expert: {expert} is full-size in {projection}_proj of layer {layer}; "
                    "accepted: a low-rank expert (`flexmore convert` makes it one)"
                )
            if kind:
                ranks[f"{mlp_prefix(layer)}{projection}_proj"] = kind
    if not ranks:
        raise ValueError(f"expert: {expert} equals the base; accepted: one with a delta")
    tensors: dict[str, Tensor] = {}
    for layer in range(len(layout.layer_ranks)):
        prefix = f"{mlp_prefix(layer)}experts.{expert}."
        for name, tensor in read_tensors(layout, prefix).items():
            module, side = name.removesuffix(".weight").rsplit("_", 1)
            key = f"base_model.model.{mlp_prefix(layer)}{module}.lora_{side.upper()}.weight"
            tensors[key] = tensor
    with made_whole(directory) as partial:
        write_tensors(partial / WEIGHTS_FILE, tensors)
        config = _config(ranks, len(layout.layer_ranks), base_name)
        write_json(partial / CONFIG_FILE, config)
    return ranks


def _config(ranks: dict[str, int], num_layers: int, base_name: str) -> dict:
    """adapter_config.json: the commonest rank for all, patterns for modules of another one."""
    common = collections.Counter(ranks.values()).most_common(1)[0][0]
    apart = {module: rank for module, rank in ranks.items() if rank != common}
    every = len(ranks) == num_layers * len(PROJECTIONS)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": apart,
        "alpha_pattern": apart,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [f"{p}_proj" for p in PROJECTIONS] if every else sorted(ranks),
    }

"""A checkpoint's routers, and a copy of it with other ones: everything else is the same bits.

The copy is written layer by layer, in the memory of one layer, and appears when it is complete
(checkpoint_writer.py).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cards import cards_of
from .checkpoint import load_model, model_config, read_tensors
from .checkpoint_folders import refuse_existing, removed_if_bad
from .checkpoint_forms import config_for
from .checkpoint_layout import Layout, mlp_prefix
from .checkpoint_writer import CheckpointWriter, fingerprint
from .checks import check_int
from .model import FlexMoREForCausalLM
from .progress import Progress
from .router_inputs import Say, layers_of


def load_routers(layout: Layout) -> FlexMoREForCausalLM:
    """The model of a checkpoint with its routers, on the CPU; all else is on the meta device.

    For what needs no text: rows from embeddings, or from statistics.
    """
    model = FlexMoREForCausalLM(model_config(layout), device="meta")
    _set_routers(model, layout, "cpu", None)
    return model


def load_to_route(layout: Layout, device: Any, dtype: torch.dtype) -> FlexMoREForCausalLM:
    """The model of a checkpoint in `dtype`, its routers in float32 or wider, so that rows that are
    trained or kept are not rounded."""
    model = load_model(layout, device, dtype)
    _set_routers(model, layout, device, torch.promote_types(dtype, torch.float32))
    return model


def write_routers(
    layout: Layout,
    model: FlexMoREForCausalLM,
    out: str | os.PathLike,
    *,
    top_k: int | None = None,
    say: Say = None,
) -> Layout:
    """Write the checkpoint with the routers of `model`, in the dtype that it has them in.

    Every other tensor is copied, to the bit; of padded factors what is in use. Files of a
    tokenizer come along. The same call takes up what a killed one has written.

    Args:
        layout: the checkpoint.
        model: of that checkpoint: `load_routers`, `load_to_route`, or a model of its sizes.
        out: a new or an empty directory.
        top_k: experts a token, for config.json; None: as they are.
        say: is told how far it is.

    Raises ValueError for routers of other sizes or that the dtype cannot hold, or as
    `CheckpointWriter` does.
    """
    refuse_existing(Path(out))
    config, layers = dict(layout.config), layers_of(model)
    if top_k is not None:
        config["num_experts_per_tok"] = check_top_k(layout, top_k)
    routers = [_router_for(layout, n, layer) for n, layer in enumerate(layers)]
    digest = hashlib.sha256()
    for router in routers:
        for name, tensor in router.items():
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    kind = "flexmore" if layout.kind == "flexmore" else "flex_olmo"
    written = config_for(config, layout.layer_ranks, kind=kind)
    mark = fingerprint([layout], task="router", rows=digest.hexdigest(), top_k=top_k)
    units: dict[str, int | None] = {"embeddings": None}
    units |= {f"layer {n}": n for n in range(len(routers))}
    with CheckpointWriter(out, list(units), config=written, fingerprint=mark) as writer:
        progress = Progress(len(writer.remaining), say)
        with removed_if_bad(writer.folder):
            for unit in writer.remaining:
                layer = units[unit]
                tensors = read_tensors(layout, names=_names(layout, layer))
                writer.write(unit, tensors if layer is None else tensors | routers[layer])
                progress.done(1, unit)
        writer.add(layout.directory)
        return writer.finish()


def check_top_k(layout: Layout, top_k: int) -> int:
    """Check experts a token against those of a checkpoint that can be selected."""
    shared = layout.config.get("shared_expert", False) is not False
    return check_int("top_k", top_k, 1, layout.config["num_experts"] - shared)


@torch.no_grad()
def rows_in_words(model: FlexMoREForCausalLM) -> list[str]:
    """Of each expert that is routed to how long its rows are, and which other's are most like them:
    means over the layers. Rows that are alike do not tell their experts apart.
    """
    layers = layers_of(model)
    cards, shared = cards_of(model.config, layers[0].num_experts), layers[0].shared_expert
    rows = torch.stack([layer.gate.rows().double().cpu() for layer in layers])
    unit = torch.nn.functional.normalize(rows, dim=-1)
    cosines = (unit @ unit.mT).mean(0)
    lines = []
    for expert in (routed := [e for e in range(len(cards)) if e != shared]):
        words = f"  {cards[expert].name}: rows of length {rows[:, expert].norm(dim=-1).mean():.3g}"
        others = [e for e in routed if e != expert]
        if others:
            like = max(others, key=lambda e: float(cosines[expert, e]))
            words += f", most like {cards[like].name}'s (cosine {cosines[expert, like]:.2f})"
        lines.append(words)
    return lines


def _set_routers(model: FlexMoREForCausalLM, layout: Layout, device: Any, dtype: Any) -> None:
    for number, layer in enumerate(layers_of(model)):
        tensors = read_tensors(layout, f"{mlp_prefix(number)}gate.", dtype, device=device)
        layer.gate.load_state_dict(tensors, assign=True)


def _router_for(layout: Layout, number: int, layer: Any) -> dict[str, Tensor]:
    """A live layer's router under a checkpoint's names, in its dtype, on the CPU."""
    prefix = f"{mlp_prefix(number)}gate."
    stored = read_tensors(layout, prefix)
    live = layer.gate.state_dict()
    if {name: t.shape for name, t in stored.items()} != {n: t.shape for n, t in live.items()}:
        raise ValueError(
            f"model: its router of layer {number} is of another kind or size than "
            f"{layout.directory}'s; accepted: a model of that checkpoint"
        )
    found = {}
    for name, tensor in live.items():
        before, now = stored[name], tensor.detach().cpu()
        # What was not written keeps its bits, also where the model runs in fewer of them.
        found[prefix + name] = before.where(before.to(now.dtype) == now, now.to(before.dtype))
        if not bool(found[prefix + name].isfinite().all()):
            kind = str(stored[name].dtype).removeprefix("torch.")
            raise ValueError(f"{prefix}{name}: beyond {kind}; accepted: numbers that it can hold")
    return found


def _names(layout: Layout, layer: int | None) -> list[str]:
    """The canonical names of a layer, or of what is in no layer."""
    start = "model.layers." if layer is None else f"model.layers.{layer}."
    return [name for name in layout.files if name.startswith(start) == (layer is not None)]

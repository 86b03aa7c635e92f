"""Checkpoints made of checkpoints: merged, split, experts dropped, experts made full-size.

All of it goes layer by layer, in the memory of one layer (and of the embeddings), is taken up by
the same call after a kill, and appears when it is complete (checkpoint_writer.py). Tokenizer files
of the first source come along. Merge and opt-out are FlexOlmo's (arXiv 2507.07024, section 3.3):
experts and router rows are put side by side or left out, nothing is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .cards import cards_of, find
from .checkpoint import check_finite, read_tensors
from .checkpoint_folders import refuse_existing, removed_if_bad
from .checkpoint_forms import check_kind, config_for, fuse_experts, pad_experts, padded_ranks
from .checkpoint_layout import Layout, read_layout
from .checkpoint_picks import Pick, PickedExperts, members_of
from .checkpoint_shared import check_alike, check_equal, mean_tensors, shared_names
from .checkpoint_writer import CheckpointWriter, fingerprint
from .progress import Progress
from .router_kinds import check_shared_expert

Say = Callable[[str], None] | None


def merge(
    directories: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    shared: str = "equal",
    top_k: int | None = None,
    mixed: bool = False,
    compat: bool = False,
    say: Say = None,
) -> Layout:
    """One checkpoint of the experts of several: expert 0 of the first, then 1.. of each in order.

    Args:
        directories: two or more checkpoints. All but their experts 1.. and those's router rows is
            shared: attention, norms, embeddings, expert 0.
        out: the new checkpoint's directory.
        shared: "equal": shared tensors must be the same bits. "average": their mean is taken;
            factors, which were deltas of their own checkpoint's expert 0, are then deltas of that.
        top_k: experts a token; None is the first checkpoint's.
        mixed: accept model types "flexmore" and "flex_olmo" side by side.
        compat: write for the authors' reader, see `save_checkpoint`.
        say: is told how far it is.

    Raises ValueError naming the shared tensors, config fields or dtypes that differ, or as
    `read_layout` and `CheckpointWriter` do.
    """
    if shared not in ("equal", "average"):
        raise ValueError(f"shared: got {shared!r}; accepted: 'equal', 'average'")
    refuse_existing(Path(out))
    layouts = [read_layout(directory) for directory in directories]
    if len(layouts) < 2:
        raise ValueError(f"directories: got {len(layouts)}; accepted: two or more")
    check_alike(layouts, mixed)
    experts = [Pick(x, e) for x in layouts for e in range(1, x.config["num_experts"])]
    picks = [Pick(layouts[0], 0), *experts]
    if top_k is None:
        top_k = layouts[0].config["num_experts_per_tok"]
    routed = len(picks) - (layouts[0].config.get("shared_expert", False) is not False)
    if not 1 <= top_k <= routed:
        raise ValueError(f"top_k: got {top_k}; accepted: 1 to {routed}")
    if shared == "equal":
        check_equal(layouts, say)
    averaged = layouts if shared == "average" else layouts[:1]
    return _compose(out, picks, averaged, top_k, task=f"merge {shared}", compat=compat, say=say)


def drop(
    directory: str | os.PathLike,
    experts: Sequence[int],
    out: str | os.PathLike,
    *,
    compat: bool = False,
    say: Say = None,
) -> Layout:
    """The checkpoint without some of its experts and their router rows; others move up, and keep
    their names.

    Computes what the whole one does with these experts excluded (`expert_mask`). Of fewer experts
    than a token had, all are used.

    Args:
        experts: numbers from 1 to E - 1, or names; expert 0, the base, and a shared one stay.

    Raises ValueError naming what is wrong, or as `read_layout` and `CheckpointWriter` do.
    """
    refuse_existing(Path(out))
    layout = read_layout(directory)
    count = layout.config["num_experts"]
    cards = cards_of(layout.config, count)
    shared = check_shared_expert(layout.config.get("shared_expert", False), count)
    experts = [find(cards, e, "experts") if isinstance(e, str) else e for e in experts]
    for expert in experts:
        if type(expert) is not int or not 1 <= expert < count:
            raise ValueError(f"experts: got {expert!r}; accepted: 1 to {count - 1}")
        if expert == shared:
            raise ValueError(f"experts: got {expert}, the shared expert; accepted: others")
    if not experts or len(set(experts)) != len(experts):
        raise ValueError(f"experts: got {list(experts)}; accepted: one or more, each once")
    picks = [Pick(layout, e) for e in range(count) if e not in experts]
    routed = len(picks) - (shared is not None)
    if not routed:
        raise ValueError("experts: got all routed ones; accepted: what leaves one")
    top_k = min(layout.config["num_experts_per_tok"], routed)
    return _compose(out, picks, [layout], top_k, task="pick", compat=compat, say=say)


def split(
    directory: str | os.PathLike,
    out: str | os.PathLike,
    *,
    compat: bool = False,
    say: Say = None,
) -> list[Path]:
    """A checkpoint for each expert e of 1..: expert 0 and it, in `out`/expert-{e}; the directories.

    What `merge` makes one of again. Each uses at most two experts a token.

    Raises ValueError as `read_layout` and `CheckpointWriter` do, and for one expert alone.
    """
    out = Path(out)
    refuse_existing(out)
    layout = read_layout(directory)
    count, top_k = layout.config["num_experts"], min(2, layout.config["num_experts_per_tok"])
    if count < 2:
        raise ValueError(f"directory: {directory} has one expert; accepted: two or more")
    shared = check_shared_expert(layout.config.get("shared_expert", False), count)
    if shared:
        raise ValueError(f"shared_expert: {directory} has {shared}; accepted: the base, or none")
    top_k = 1 if shared == 0 else top_k
    # Under a name that says of what, so that a call after a kill finds what it had written.
    print_of = fingerprint([layout], task="split", compat=compat)
    partial = out.parent / f".{out.name}.{print_of}.partial"
    names = [f"expert-{expert}" for expert in range(1, count)]
    for expert, name in enumerate(names, start=1):
        if not (partial / name).exists():
            picks = [Pick(layout, 0), Pick(layout, expert)]
            tell = say and (lambda text, name=name: say(f"{name}: {text}"))
            _compose(
                *(partial / name, picks, [layout], top_k),
                **{"task": "pick", "compat": compat, "say": tell, "whole": partial},
            )
    os.replace(partial, out)
    return [out / name for name in names]


def densify(
    directory: str | os.PathLike,
    out: str | os.PathLike,
    *,
    fused: bool = False,
    device: Any = "cpu",
    say: Say = None,
) -> Layout:
    """The checkpoint as a FlexOlmo: every expert full-size, W_0 + B A, rounded once to W_0's dtype.

    Args:
        fused: write mlp.experts.gate_up_proj and down_proj, not a matrix an expert.
        device: where W_0 + B A is computed, in float32 (float64 for weights of float32).

    Raises ValueError for what FlexOlmo does not compute (expert_bias, another scoring), or as
    `read_layout` and `CheckpointWriter` do.
    """
    refuse_existing(Path(out))
    layout = read_layout(directory)
    count = layout.config["num_experts"]
    kind = "flex_olmo_fused" if fused else "flex_olmo"
    ranks = [(0,) * count] * len(layout.layer_ranks)
    check_kind(kind, layout.config, ranks, layout.expert_bias)

    def read(layer: int | None) -> dict[str, Tensor]:
        tensors = read_tensors(layout, names=names_of(layout, layer), device=device)
        tensors = pad_experts(tensors, [0] * count)
        return fuse_experts(tensors, count) if fused else tensors

    print_of = fingerprint([layout], task="densify", fused=fused)
    config = config_for(layout.config, ranks, kind=kind)
    return write_layers(out, layout, config, print_of, read, say)


def _compose(
    out: str | os.PathLike,
    picks: Sequence[Pick],
    averaged: Sequence[Layout],
    top_k: int,
    *,
    task: str,
    compat: bool,
    say: Say,
    whole: Path | None = None,
) -> Layout:
    """Write a checkpoint of these experts; what is shared is the mean over `averaged`."""
    first = picks[0].layout
    ranks = [
        tuple(pick.layout.layer_ranks[layer][pick.expert] for pick in picks)
        for layer in range(len(first.layer_ranks))
    ]
    factors = any(entry != 0 for entries in ranks for entry in entries)
    low_rank = factors or any(pick.layout.kind == "flexmore" for pick in picks)
    kind = "flexmore" if low_rank else "flex_olmo"
    changed = {"num_experts_per_tok": top_k, "num_experts": len(picks), **members_of(picks)}
    config = config_for({**first.config, **changed}, ranks, kind=kind, compat=compat)
    padded, experts = padded_ranks(ranks), PickedExperts(picks, averaged)

    def read(layer: int | None) -> dict[str, Tensor]:
        tensors = mean_tensors(averaged, shared_names(first, names_of(first, layer)))
        if layer is not None:
            tensors |= experts.read(layer)
        return pad_experts(tensors, padded) if compat else tensors

    layouts = list({id(x): x for x in (*averaged, *(pick.layout for pick in picks))}.values())
    order = [(layouts.index(pick.layout), pick.expert) for pick in picks]
    print_of = fingerprint(layouts, task=task, order=order, top_k=top_k, compat=compat)
    return write_layers(out, first, config, print_of, read, say, whole)


def names_of(layout: Layout, layer: int | None) -> list[str]:
    """The canonical names of a layer, or of what is in no layer."""
    start = "model.layers." if layer is None else f"model.layers.{layer}."
    return [name for name in layout.files if name.startswith(start) == (layer is not None)]


def write_layers(
    out: str | os.PathLike,
    source: Layout,
    config: dict[str, Any],
    print_of: str,
    read: Callable[[int | None], dict[str, Tensor]],
    say: Say,
    whole: Path | None = None,
) -> Layout:
    """Write what `read` gives of each layer, and of None, which is all that is in no layer.

    whole: the folder to be removed for a bad source, if it is more than this checkpoint's.
    """
    layers: dict[str, int | None] = {"embeddings": None}
    layers |= {f"layer {layer}": layer for layer in range(len(source.layer_ranks))}
    with CheckpointWriter(out, list(layers), config=config, fingerprint=print_of) as writer:
        progress = Progress(len(writer.remaining), say)
        with removed_if_bad(whole or writer.folder):
            for unit in writer.remaining:
                tensors = read(layers[unit])
                for name, tensor in tensors.items():  # a sum may be beyond its dtype
                    check_finite(name, tensor)
                writer.write(unit, tensors)
                progress.done(1, unit)
        writer.add(source.directory)
        return writer.finish()

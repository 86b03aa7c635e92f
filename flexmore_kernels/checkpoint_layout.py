"""What a checkpoint directory holds, found in its config.json and the headers of its files.

Three kinds are read, and all of them by the same, canonical, names, those of the authors' format
(see checkpoint.py):

    "flexmore"         the authors' format: full-size experts and low-rank factors
    "flex_olmo"        FlexOlmo, every expert full-size under the same names
    "flex_olmo_fused"  FlexOlmo with mlp.experts.gate_up_proj (E, 2F, D), gate first, and
                       mlp.experts.down_proj (E, D, F)

Checks every name and shape, and that every file is as long as it says, before anything is loaded.
What an expert is follows from the tensors, not from config.json; where the two disagree,
`Layout.notes` says so. Ranks are those in use: trailing rank rows that are zero on both sides, as
the authors' ragged checkpoints have, are left out of `Layout` and of what is read through it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint_config import (
    as_triple,
    check_config,
    check_model_type,
    declared_ranks,
    disagreements,
    in_words,
    shortest,
)
from .checkpoint_headers import FLOAT_BYTES, Stored, ZeroTails, read_headers, read_json
from .router_kinds import check_router_fields, router_shapes

PROJECTIONS = ("gate", "up", "down")
FUSED = ("experts.gate_up_proj", "experts.down_proj")
KINDS = ("flexmore", "flex_olmo", "flex_olmo_fused")


class Part(NamedTuple):
    """The piece of a stored tensor that a canonical name stands for; index () is all of it."""

    stored: Stored
    shape: tuple[int, ...]
    index: tuple = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOAT_BYTES[self.stored.dtype]


@dataclass(frozen=True)
class Layout:
    """What a checkpoint directory holds, checked; nothing is loaded yet.

    config: config.json as a dict, with num_experts in it (and FlexOlmo's defaults in a FlexOlmo's).
    kind: one of KINDS. parts: canonical tensor name -> where its numbers are. files, shapes: the
    same names -> file name, shape. layer_ranks: for each layer `expert_ranks` as FlexMoRE takes
    them, from the tensors. notes: in words, where config.json and the tensors disagree, and what
    was trimmed.
    """

    directory: Path
    config: dict[str, Any]
    kind: str
    parts: dict[str, Part]
    files: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    layer_ranks: tuple[tuple, ...]
    expert_bias: bool
    notes: tuple[str, ...]


def read_layout(directory: str | os.PathLike) -> Layout:
    """Read and check a checkpoint directory's config and the headers of its files.

    Raises ValueError naming the file or tensor when one is missing, extra, misshapen, truncated or
    not floating point, or the model type when it is another; FileNotFoundError when the directory
    does not exist.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"checkpoint: no directory {directory}")
    config = read_json(directory / "config.json")
    model_type = check_model_type(config)
    stored = read_headers(directory)
    kind = _kind(model_type, stored)
    config = check_config(config)
    check_router_fields(config)
    parts = _canonical(config, stored, kind)
    shapes = {name: part.shape for name, part in parts.items()}
    said_ranks = layer_ranks_of(config, shapes)
    expert_bias = f"{mlp_prefix(0)}gate.expert_bias" in shapes
    expected = tensor_shapes(config, said_ranks, expert_bias)
    _check_shapes(shapes, expected)
    notes = disagreements(config, said_ranks)
    parts = {name: parts[name] for name in expected}
    layer_ranks, more = _trim(directory, config, parts, said_ranks)
    files = {name: part.stored.file for name, part in parts.items()}
    shapes = {name: part.shape for name, part in parts.items()}
    return Layout(
        directory, config, kind, parts, files, shapes, layer_ranks, expert_bias, notes + more
    )


def tensor_shapes(
    config: Mapping[str, Any], layer_ranks: Sequence[Sequence], expert_bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint with these ranks holds."""
    D, F = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or D // config["num_attention_heads"]
    heads = config["num_attention_heads"] * head
    groups = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], D)}
    for layer, ranks in enumerate(layer_ranks):
        block = f"model.layers.{layer}."
        shapes |= {
            f"{block}self_attn.q_proj.weight": (heads, D),
            f"{block}self_attn.k_proj.weight": (groups, D),
            f"{block}self_attn.v_proj.weight": (groups, D),
            f"{block}self_attn.o_proj.weight": (D, heads),
            f"{block}self_attn.q_norm.weight": (heads,),
            f"{block}self_attn.k_norm.weight": (groups,),
            f"{block}post_attention_layernorm.weight": (D,),
            f"{block}post_feedforward_layernorm.weight": (D,),
        }
        for name, shape in router_shapes(config, expert_bias).items():
            shapes[f"{mlp_prefix(layer)}gate.{name}"] = shape
        for expert, entry in enumerate(ranks):
            for projection, kind in zip(PROJECTIONS, as_triple(entry), strict=True):
                name = f"{mlp_prefix(layer)}experts.{expert}.{projection}_proj"
                out, width = (D, F) if projection == "down" else (F, D)
                if kind == "full":
                    shapes[f"{name}.weight"] = (out, width)
                elif kind:
                    shapes |= {f"{name}_a.weight": (kind, width), f"{name}_b.weight": (out, kind)}
    shapes["model.norm.weight"] = (D,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], D)
    return shapes


def mlp_prefix(layer: int) -> str:
    return f"model.layers.{layer}.mlp."


def _kind(model_type: str, stored: Mapping[str, Stored]) -> str:
    """The kind of the tensors, which must be one that a config.json of this model type has."""
    fused = [name for name in stored if name.endswith(FUSED)]
    factors = [name for name in stored if name.endswith(("_proj_a.weight", "_proj_b.weight"))]
    if model_type == "flexmore" and fused:
        raise ValueError(
            f"{fused[0]}: fused experts, as of model_type 'flex_olmo'; config.json says 'flexmore'"
        )
    if model_type == "flex_olmo" and factors:
        raise ValueError(
            f"{factors[0]}: a low-rank factor, as of model_type 'flexmore'; config.json says "
            "'flex_olmo'"
        )
    return "flex_olmo_fused" if fused else model_type


def _canonical(config: dict, stored: Mapping[str, Stored], kind: str) -> dict[str, Part]:
    """Canonical name -> part; a fused tensor is cut into its experts' matrices."""
    parts = {name: Part(one, one.shape) for name, one in stored.items()}
    if kind != "flex_olmo_fused":
        return parts
    D, F, E = config["hidden_size"], config["intermediate_size"], config["num_experts"]
    for layer in range(config["num_hidden_layers"]):
        both, down = (f"{mlp_prefix(layer)}{name}" for name in FUSED)
        for name, shape in ((both, (E, 2 * F, D)), (down, (E, D, F))):
            if name not in stored:
                raise ValueError(f"{name}: missing")
            if stored[name].shape != shape:
                raise ValueError(f"{name}: shape {stored[name].shape}; accepted: {shape}")
        pieces = {"gate": (both, slice(0, F)), "up": (both, slice(F, 2 * F)), "down": (down,)}
        for expert in range(E):
            for projection, (source, *rows) in pieces.items():
                name = f"{mlp_prefix(layer)}experts.{expert}.{projection}_proj.weight"
                if name in parts:
                    raise ValueError(f"{name}: extra beside {source}")
                shape = (D, F) if projection == "down" else (F, D)
                parts[name] = Part(stored[source], shape, (expert, *rows))
        del parts[both], parts[down]
    return parts


def layer_ranks_of(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple, ...]:
    """For each layer what the tensors say its experts are, as `FlexMoRE(expert_ranks=)` takes it.

    A matrix that is in no tensor has no delta, where config.json says rank 0 of it; else ValueError
    names the tensor that is missing.
    """
    experts, layers = range(config["num_experts"]), range(config["num_hidden_layers"])
    found = []
    for layer in layers:
        declared = declared_ranks(config, layer)
        said = [as_triple("?" if declared is None else declared[e]) for e in experts]
        found.append(tuple(_expert_entry(shapes, layer, e, said[e]) for e in experts))
    return tuple(found)


def _expert_entry(shapes: Mapping, layer: int, expert: int, declared: tuple) -> Any:
    """What the tensors say an expert of a layer is: an entry of `expert_ranks`."""
    found: list[int | str] = []
    for projection, said in zip(PROJECTIONS, declared, strict=True):
        name = f"{mlp_prefix(layer)}experts.{expert}.{projection}_proj"
        full, a, b = f"{name}.weight", f"{name}_a.weight", f"{name}_b.weight"
        if full in shapes:
            for side in (a, b):
                if side in shapes:
                    raise ValueError(f"{side}: extra beside {full}")
            found.append("full")
        elif expert == 0:
            raise ValueError(f"{full}: missing; expert 0 is full-size")
        elif a in shapes or b in shapes:
            for side in (a, b):
                if side not in shapes:
                    raise ValueError(f"{side}: missing")
                if len(shapes[side]) != 2:
                    raise ValueError(f"{side}: shape {shapes[side]}; accepted: a matrix")
            if shapes[a][0] < 1:
                raise ValueError(f"{a}: rank 0; accepted: 1 or more")
            found.append(shapes[a][0])
        elif said == 0:
            found.append(0)
        else:
            raise ValueError(f"{full if said == 'full' else a}: missing")
    return shortest(found)


def _check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{name}: missing")
        if found[name] != shape:
            raise ValueError(f"{name}: shape {found[name]}; accepted: {shape}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{name}: extra; config.json has no place for it")


def _trim(
    directory: Path, config: dict, parts: dict[str, Part], stored_ranks: Sequence[Sequence]
) -> tuple[tuple[tuple, ...], tuple[str, ...]]:
    """Cut zero rank rows off the factors in `parts`; the ranks that are left, and notes of it."""
    tails, limit = ZeroTails(directory), min(config["hidden_size"], config["intermediate_size"])
    layer_ranks, stored, left = [], {}, {}
    for layer, ranks in enumerate(stored_ranks):
        entries = []
        for expert, entry in enumerate(ranks):
            kinds = list(as_triple(entry))
            for i, projection in enumerate(PROJECTIONS):
                if kinds[i] in ("full", 0):
                    continue
                name = f"{mlp_prefix(layer)}experts.{expert}.{projection}_proj"
                a, b = f"{name}_a.weight", f"{name}_b.weight"
                rank = kinds[i] - tails.count(parts[a].stored, parts[b].stored)
                if rank > limit:
                    raise ValueError(f"{a}: rank {rank}; accepted: 1 to min(D, F), {limit}")
                if rank < kinds[i]:
                    stored.setdefault(expert, set()).add(kinds[i])
                    left.setdefault(expert, set()).add(rank)
                    (_, width), (out, _) = parts[a].shape, parts[b].shape
                    parts[a] = Part(parts[a].stored, (rank, width), (slice(0, rank),))
                    parts[b] = Part(parts[b].stored, (out, rank), (slice(None), slice(0, rank)))
                    if rank == 0:
                        del parts[a], parts[b]
                    kinds[i] = rank
            entries.append(shortest(kinds))
        layer_ranks.append(tuple(entries))
    notes = (
        f"expert {e}: zero rows of factors trimmed: {in_words([(k,) for k in stored[e]])} stored, "
        f"{in_words([(k,) for k in left[e]])} in use"
        for e in stored
    )
    return tuple(layer_ranks), tuple(notes)

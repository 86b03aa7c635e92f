"""What a checkpoint directory holds, found in its config.json and the headers of its files.

Checks every name and shape, and that every file is as long as it says, before anything is loaded.
What an expert is follows from the tensors, not from `expert_ranks`, which cannot say that ranks
differ by layer or projection; where the two disagree, `Layout.notes` says so. The format is
described in checkpoint.py.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECTIONS = ("gate", "up", "down")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOAT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Layout:
    """What a checkpoint directory holds, checked; nothing is loaded yet.

    config: config.json as a dict. files: tensor name -> file name. shapes: tensor name -> shape.
    layer_ranks: for each layer `expert_ranks` as FlexMoRE takes them, from the tensors.
    notes: where config.json and the tensors disagree, in words.
    """

    directory: Path
    config: dict[str, Any]
    files: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    layer_ranks: tuple[tuple, ...]
    expert_bias: bool
    notes: tuple[str, ...]


def read_layout(directory: str | os.PathLike) -> Layout:
    """Read and check a checkpoint directory's config and the headers of its files.

    Raises ValueError naming the file or tensor when one is missing, extra, misshapen, truncated or
    not floating point; FileNotFoundError when the directory does not exist.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"checkpoint: no directory {directory}")
    config = _read_json(directory / "config.json")
    _check_config(config)
    files, shapes = _read_headers(directory)
    layer_ranks = tuple(
        tuple(_expert_entry(config, shapes, layer, e) for e in range(config["num_experts"]))
        for layer in range(config["num_hidden_layers"])
    )
    expert_bias = f"{mlp_prefix(0)}gate.expert_bias" in shapes
    _check_shapes(shapes, tensor_shapes(config, layer_ranks, expert_bias))
    notes = _disagreements(config, layer_ranks)
    return Layout(directory, config, files, shapes, layer_ranks, expert_bias, notes)


def tensor_shapes(
    config: Mapping[str, Any], layer_ranks: Sequence[Sequence], expert_bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint with these ranks holds."""
    D, F, E = config["hidden_size"], config["intermediate_size"], config["num_experts"]
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
            f"{mlp_prefix(layer)}gate.weight": (E, D),
        }
        if expert_bias:
            shapes[f"{mlp_prefix(layer)}gate.expert_bias"] = (E - 1,)
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


def declared_ranks(config: Mapping[str, Any], layer: int) -> Sequence:
    """What config.json says of a layer: its `expert_ranks`, or its entry of a list of them."""
    ranks = config["expert_ranks"]
    return ranks[layer] if isinstance(ranks[0], (list, tuple)) else ranks


def as_triple(entry: Any) -> tuple:
    """An entry of expert_ranks as (gate, up, down) of "full", 0 or a rank."""
    if isinstance(entry, (tuple, list)):
        return tuple(entry)
    return ("full" if entry == 0 else entry,) * 3


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.name}: missing in {path.parent}")
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: got a {type(found).__name__}; accepted: an object")
    return found


def _check_config(config: dict[str, Any]) -> None:
    ranks = config.get("expert_ranks")
    if not isinstance(ranks, list) or not ranks:
        raise ValueError(f"config.json: expert_ranks is {ranks!r}; accepted: a list of E entries")
    config.setdefault("num_experts", len(ranks[0]) if isinstance(ranks[0], list) else len(ranks))
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "vocab_size", "num_experts", "num_experts_per_tok")  # fmt: skip
    optional = ("num_key_value_heads", "head_dim")
    for field in (*fields, *(name for name in optional if config.get(name) is not None)):
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json: {field} is {value!r}; accepted: an integer >= 1")
    if (top_k := config["num_experts_per_tok"]) > (num_experts := config["num_experts"]):
        raise ValueError(
            f"config.json: num_experts_per_tok is {top_k}; accepted: 1 to {num_experts}"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act is {config['hidden_act']!r}; accepted: 'silu'")
    if isinstance(ranks[0], list) and len(ranks) != config["num_hidden_layers"]:
        raise ValueError(
            f"config.json: expert_ranks has {len(ranks)} lists; accepted: one list, or "
            f"num_hidden_layers, {config['num_hidden_layers']}"
        )
    for layer in range(config["num_hidden_layers"]):
        _check_declared(declared_ranks(config, layer), config["num_experts"])


def _check_declared(ranks: Any, num_experts: int) -> None:
    if not isinstance(ranks, list) or len(ranks) != num_experts:
        raise ValueError(
            f"config.json: expert_ranks is {ranks!r}; accepted: num_experts, {num_experts}, entries"
        )
    for entry in ranks:
        kinds = as_triple(entry)
        numbers = [kind for kind in kinds if kind != "full"]
        if len(kinds) != 3 or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(
                f"config.json: expert_ranks holds {entry!r}; accepted: an integer >= 0, or three "
                'for gate, up, down, each an integer >= 0 or "full"'
            )


def _read_headers(directory: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Tensor name -> file and tensor name -> shape, over all files."""
    if (directory / SINGLE_FILE).exists() or not (directory / INDEX_FILE).exists():
        shapes = _read_header(directory / SINGLE_FILE)
        return dict.fromkeys(shapes, SINGLE_FILE), shapes
    files = _read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{INDEX_FILE}: no weight_map")
    shapes = {}
    for file in sorted(set(map(str, files.values()))):
        if Path(file).name != file:
            raise ValueError(f"{INDEX_FILE}: {file!r}; accepted: names of files beside it")
        for name, shape in _read_header(directory / file).items():
            if files.get(name) != file:
                raise ValueError(f"{name}: in {file}, but not there in {INDEX_FILE}")
            shapes[name] = shape
    for name, file in files.items():
        if name not in shapes:
            raise ValueError(f"{name}: missing in {file}")
    return files, shapes


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a safetensors file, which must be as long as its header says."""
    if not path.is_file():
        raise ValueError(f"{path.name}: missing in {path.parent}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if 8 + length > size:
            raise ValueError(f"{path.name}: truncated in its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [(*t["data_offsets"], n, t["dtype"], t["shape"]) for n, t in header.items()]
            entries.sort()
            if not all(type(k) is int for entry in entries for k in (*entry[:2], *entry[4])):
                raise TypeError("a size that is no integer")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name}: not a safetensors file ({error!r})") from error
    shapes, position = {}, 0
    for begin, end, name, dtype, shape in entries:
        if dtype not in _FLOAT_BYTES:
            accepted = ", ".join(_FLOAT_BYTES)
            raise ValueError(f"{name}: dtype {dtype} in {path.name}; accepted: {accepted}")
        if end - begin != math.prod(shape) * _FLOAT_BYTES[dtype]:
            raise ValueError(f"{name}: {end - begin} bytes in {path.name} for shape {shape}")
        if begin != position:
            raise ValueError(f"{name}: at byte {begin} of {path.name}; accepted: {position}")
        if 8 + length + end > size:
            raise ValueError(f"{name}: truncated in {path.name}")
        position = end
        shapes[name] = tuple(shape)
    if 8 + length + position != size:
        raise ValueError(f"{path.name}: {size - 8 - length - position} bytes after its tensors")
    return shapes


def _expert_entry(config: dict, shapes: dict[str, tuple[int, ...]], layer: int, expert: int) -> Any:
    """What the tensors say an expert of a layer is: an entry of `expert_ranks`."""
    declared = as_triple(declared_ranks(config, layer)[expert])
    limit = min(config["hidden_size"], config["intermediate_size"])
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
            rank = shapes[a][0]
            if not 1 <= rank <= limit:
                raise ValueError(f"{a}: rank {rank}; accepted: 1 to min(D, F), {limit}")
            found.append(rank)
        elif said == 0:
            found.append(0)
        else:
            raise ValueError(f"{full if said == 'full' else a}: missing")
    if found == ["full"] * 3:
        return 0
    return found[0] if found[0] != 0 and len(set(found)) == 1 else tuple(found)


def _check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{name}: missing")
        if found[name] != shape:
            raise ValueError(f"{name}: shape {found[name]}; accepted: {shape}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{name}: extra; config.json has no place for it")


def _disagreements(config: dict, layer_ranks: Sequence[Sequence]) -> tuple[str, ...]:
    """Where `expert_ranks` differs from the tensors, one line an expert."""
    notes = []
    for expert in range(config["num_experts"]):
        pairs = [
            (as_triple(declared_ranks(config, layer)[expert]), as_triple(ranks[expert]))
            for layer, ranks in enumerate(layer_ranks)
        ]
        if all(said == found for said, found in pairs):
            continue
        said, found = (_in_words({kind for pair in pairs for kind in pair[i]}) for i in (0, 1))
        notes.append(f"expert {expert}: expert_ranks says {said}; its tensors hold {found}")
    return tuple(notes)


def _in_words(kinds: set) -> str:
    """{"full", 4, 16} as "full size and ranks 4 to 16"."""
    ranks = sorted(kinds - {"full"})
    words = ["full size"] if "full" in kinds else []
    if ranks:
        low, high = ranks[0], ranks[-1]
        words.append(f"rank {low}" if low == high else f"ranks {low} to {high}")
    return " and ".join(words)

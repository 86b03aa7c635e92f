"""The ranks that a directory's safetensors files hold, from their headers."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint_layout import PROJECTIONS

_KEY = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj(_a|_b)?\.weight$")


def stored_ranks(directory: Path, num_experts: int = 1) -> list[list] | None:
    """L lists of at least `num_experts` entries as `FlexMoRE(expert_ranks=)` takes them: 0 for a
    full-size expert, else three of "full", 0 (no tensor) or the rows of A.

    None where there are no safetensors files under transformers' names, or no experts in them.
    Raises ValueError for fused experts, which are not this model's tensors, for a missing file, and
    for a matrix of which one factor is missing, or which is there whole and in factors.
    """
    sides: dict[tuple, dict[str, int]] = {}
    for path in _files(directory):
        if not path.is_file():
            raise ValueError(f"{path.name}: missing in {directory}")
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                if name.endswith("mlp.experts.gate_up_proj"):
                    raise ValueError(
                        f"{name}: got fused experts; accepted: a key for each expert. Load them as "
                        "transformers' FlexOlmoForCausalLM, then swap_experts makes this model"
                    )
                if match := _KEY.search(name):
                    layer, expert, projection, side = match.groups()
                    shape = opened.get_slice(name).get_shape()
                    rank = shape[-1] if side == "_b" else shape[0]
                    sides.setdefault((int(layer), int(expert), projection), {})[side or ""] = rank
    if not sides:
        return None
    shapes = {key: _kind(key, found) for key, found in sides.items()}
    layers, experts = (1 + max(key[axis] for key in shapes) for axis in (0, 1))
    experts = max(experts, num_experts)
    return [[_entry(shapes, layer, e) for e in range(experts)] for layer in range(layers)]


def _kind(key: tuple, found: dict[str, int]) -> int | str:
    """ "full" or the rank of a matrix, by the tensors that are there of it."""
    if found.keys() == {""}:
        return "full"
    if found.keys() != {"_a", "_b"} or found["_a"] != found["_b"]:
        name = "model.layers.{}.mlp.experts.{}.{}_proj".format(*key)
        told = ", ".join(f"{side or 'whole'} ({rank})" for side, rank in sorted(found.items()))
        raise ValueError(f"{name}: got {told}; accepted: whole, or _a and _b of one rank")
    return found["_a"]


def _entry(shapes: dict, layer: int, expert: int) -> int | list:
    found = [shapes.get((layer, expert, projection), 0) for projection in PROJECTIONS]
    return 0 if found == ["full"] * 3 else found


def _files(directory: Path) -> list[Path]:
    if (directory / SAFE_WEIGHTS_NAME).exists():
        return [directory / SAFE_WEIGHTS_NAME]
    if not (directory / SAFE_WEIGHTS_INDEX_NAME).exists():
        return []
    names = json.loads((directory / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values()
    return [directory / name for name in sorted(set(names))]

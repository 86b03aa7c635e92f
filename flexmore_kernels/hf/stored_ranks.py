"""The ranks that a directory's safetensors files hold, from their headers."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint_layout import PROJECTIONS

_KEY = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj(_a)?\.weight$")


def stored_ranks(directory: Path, num_experts: int = 1) -> list[list] | None:
    """L lists of at least `num_experts` entries as `FlexMoRE(expert_ranks=)` takes them: 0 for a
    full-size expert, else three of "full", 0 (no tensor) or the rows of A.

    None where there are no safetensors files under transformers' names, or no experts in them.
    Raises ValueError for fused experts, which are not this model's tensors, and for a missing file.
    """
    shapes = {}
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
                    layer, expert, projection, is_a = match.groups()
                    entry = opened.get_slice(name).get_shape()[0] if is_a else "full"
                    shapes[int(layer), int(expert), projection] = entry
    if not shapes:
        return None
    layers, experts = (1 + max(key[axis] for key in shapes) for axis in (0, 1))
    experts = max(experts, num_experts)
    return [[_entry(shapes, layer, e) for e in range(experts)] for layer in range(layers)]


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

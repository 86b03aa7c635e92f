"""What an adapter_config.json of PEFT says: ranks, scales, and whether its deltas are plain ones.

    W' = W + s B A,   s = alpha / r,  or alpha / sqrt(r) with `use_rslora`

where r and alpha may differ by module (`rank_pattern`, `alpha_pattern`). What PEFT can do beside
that is refused with the reason: it is no low-rank delta of the base's weights.
Source: PEFT's LoraConfig (Apache-2.0), release 0.21.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Options that do not change what the stored tensors mean, or that are read below.
_KNOWN = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "use_rslora",
)  # fmt: skip
_REASONS = {
    "use_dora": "DoRA rescales every row of the base's weight",
    "fan_in_fan_out": "it is for weights stored as (in, out)",
    "lora_bias": "a bias is no delta of a weight, and the experts have none",
    "use_qalora": "QA-LoRA pools the inputs before lora_A",
    "alora_invocation_tokens": "an activated LoRA applies to a part of the tokens",
    "layer_replication": "the base's layers are repeated",
    "trainable_token_indices": "rows of the embedding are replaced",
}
# Initialisations that leave the base as it is; the others subtract the initial delta from it.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterConfig:
    """What of an adapter_config.json its tensors' meaning depends on."""

    directory: Path
    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    base: str | None = None

    def rank_of(self, path: str) -> int:
        """The rank that the config gives a module (its path without PEFT's prefix)."""
        return _by_pattern(self.rank_pattern, self._target(path), self.rank)

    def scale_of(self, path: str) -> float:
        """s of a module: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        rank = self.rank_of(path)
        alpha = _by_pattern(self.alpha_pattern, self._target(path), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _target(self, path: str) -> str:
        """What PEFT holds patterns against: a targeted parameter's own path, else the module's."""
        own = f"{path}.weight"
        return own if any(own.endswith(target) for target in self.target_parameters) else path


def read_adapter_config(directory: str | os.PathLike) -> AdapterConfig:
    """Read adapter_config.json; ValueError with the reason where no plain LoRA is stored."""
    directory = Path(directory)
    path = directory / CONFIG_FILE
    if not directory.is_dir():
        raise FileNotFoundError(f"adapter: no directory {directory}")
    if not path.is_file():
        raise ValueError(f"{CONFIG_FILE}: missing in {directory}")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a {type(values).__name__}; accepted: an object")
    _refuse_variants(path, values)
    ranks = _pattern(path, values, "rank_pattern")
    alphas = _pattern(path, values, "alpha_pattern")
    rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    for name, entries in (("r", [rank]), ("rank_pattern", ranks.values())):
        if any(type(entry) is not int or entry < 1 for entry in entries):
            raise ValueError(f"{path}: {name} is {values.get(name)!r}; accepted: integers >= 1")
    for name, entries in (("lora_alpha", [alpha]), ("alpha_pattern", alphas.values())):
        if any(type(e) not in (int, float) or not math.isfinite(e) for e in entries):
            raise ValueError(f"{path}: {name} is {values.get(name)!r}; accepted: finite numbers")
    if not isinstance(values.get("use_rslora", False), bool):
        found = values["use_rslora"]
        raise ValueError(f"{path}: use_rslora is {found!r}; accepted: true, false")
    return AdapterConfig(
        directory,
        rank,
        float(alpha),
        bool(values.get("use_rslora")),
        ranks,
        alphas,
        tuple(values.get("target_parameters") or ()),
        values.get("base_model_name_or_path") or None,
    )


def _refuse_variants(path: Path, values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}; accepted: 'LORA'")
    for name, reason in _REASONS.items():
        if values.get(name):
            raise ValueError(f"{path}: {name} is {values[name]!r}; refused: {reason}")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {values['bias']!r}; accepted: 'none'")
    start = values.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        accepted = ", ".join(map(str, _PLAIN_STARTS))
        raise ValueError(
            f"{path}: init_lora_weights is {start!r}; accepted: {accepted}"
            " (others change the base: save the adapter converted to the unchanged base, with "
            "PEFT's path_initial_model_for_weight_conversion)"
        )
    for name, value in values.items():
        if name not in _KNOWN and name not in _REASONS and value not in (None, False, {}, [], ""):
            raise ValueError(f"{path}: {name} is {value!r}; refused: it is not plain LoRA")


def _pattern(path: Path, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {name} is {found!r}; accepted: an object")
    for key in found:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{path}: {name} has {key!r}, no regular expression") from error
    return found


def _by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The first entry whose key is the path, or a regular expression of its end after a dot.

    An adapter that was made on the decoder without its head knew paths without "model.".
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path) or re.match(
            f"({key})$", path.removeprefix("model.")
        ):
            return value
    return default

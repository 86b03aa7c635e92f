"""The mask that a cache of transformers was filled under, which a request keeps for its life."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import checks_values


class _Kept(NamedTuple):
    """A mask as it was given, its version then, and a copy: the caller may change his own."""

    given: Tensor | None
    version: int | None
    values: Tensor | None


def check_mask_of(cache: Any, mask: Tensor | None) -> None:
    """Raise if the cache's keys and values were computed under another mask.

    No host sync on CUDA for the tensor that was given before, unchanged.
    """
    if cache is None or torch.compiler.is_compiling():
        return
    kept = getattr(cache, "expert_mask", None)
    if kept is None or _is_given(kept, mask):
        return
    before = kept.values
    same = before is not None and mask is not None and before.shape == mask.shape
    if same and torch.equal(before.to(mask.device), mask):
        return
    if int(cache.get_seq_length()) > 0:
        raise ValueError(
            f"expert_mask: got {_name(mask)} with a cache of {_name(before)}; accepted: the "
            "mask that the cache was filled under"
        )


def keep_mask(cache: Any, mask: Tensor | None) -> None:
    """Let the cache know under which mask it was filled."""
    if cache is None or torch.compiler.is_compiling():
        return
    kept = getattr(cache, "expert_mask", None)
    if kept is None or not _is_given(kept, mask):
        copy = None if mask is None else mask.clone()
        cache.expert_mask = _Kept(mask, _version(mask), copy)


def _is_given(kept: _Kept, mask: Tensor | None) -> bool:
    """Whether this is the mask that was kept, unchanged; told without waiting for the device."""
    if kept.given is not mask:
        return False
    if mask is not None and mask.is_inference():  # such a tensor does not count its changes
        return not checks_values(mask)
    return kept.version == _version(mask)


def _version(mask: Tensor | None) -> int | None:
    return None if mask is None or mask.is_inference() else mask._version


def _name(mask: Tensor | None) -> str:
    return "no mask" if mask is None else f"a mask {mask.tolist()}"

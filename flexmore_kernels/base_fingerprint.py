"""Which base an expert was trained beside: a fingerprint of the base's FFN weights.

    sha256 over, layer by layer and of gate, up and down in this order, "{dtype} {rows} {columns}"
    and the numbers of expert 0 as they are stored, row by row; of it the first 16 hex digits

A low-rank expert is a delta: beside another base its product B A adds up to other weights, which no
shape gives away. The bits count, so that a live model, a checkpoint of any layout and the dense
model that a mixture grew from say the same where the base is the same, and a cast of the base to
another dtype says something else: its numbers are others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_base import BaseCheckpoint
from .checkpoint import read_tensors
from .checkpoint_layout import PROJECTIONS, Layout, mlp_prefix

DIGITS = 16


def of_weights(weights: Iterator[Tensor]) -> str:
    """The fingerprint of W_0, each layer's gate, up and down in turn; each waits for its device."""
    digest = hashlib.sha256()
    for weight in weights:
        kind = str(weight.dtype).removeprefix("torch.")
        digest.update(" ".join(map(str, (kind, *weight.shape))).encode())
        numbers = weight.detach().cpu().contiguous().view(torch.uint8)
        digest.update(memoryview(numbers.numpy()))
    return digest.hexdigest()[:DIGITS]


def of_model(model: Any) -> str:
    """The fingerprint of a live model's base. Copies it to the host, a matrix at a time."""
    return of_weights(
        block.mlp.experts.full(f"{projection}_proj")[0]
        for block in model.model.layers
        for projection in PROJECTIONS
    )


def of_checkpoint(
    checkpoint: str | os.PathLike | Layout, say: Callable[[str], None] | None = None
) -> str:
    """The fingerprint of a mixture's or a dense OLMo-2's base, read a matrix at a time.

    Raises ValueError as `read_layout` does, and for a NaN or Inf in the base.
    """
    layout = checkpoint if isinstance(checkpoint, Layout) else BaseCheckpoint(checkpoint).layout

    def weights() -> Iterator[Tensor]:
        for layer in range(len(layout.layer_ranks)):
            for projection in PROJECTIONS:
                name = f"{mlp_prefix(layer)}experts.0.{projection}_proj.weight"
                yield read_tensors(layout, names=[name])[name]
            if say is not None:
                say(f"fingerprint of the base, layer {layer} read")

    return of_weights(weights())


def check_base(
    expert: str | None, expert_from: str | Path, base: str, base_from: str | Path
) -> str | None:
    """Refuse an expert of another base; what to tell the user where its base is not known.

    Raises ValueError with both fingerprints and where both are from.
    """
    if expert is None:
        return (
            f"{expert_from} does not say which base it was trained beside; it now stands beside "
            f"{base}, of {base_from}"
        )
    if expert != base:
        raise ValueError(
            f"expert: {expert_from} was trained beside base {expert}, {base_from} has base {base};"
            " accepted: an expert of the same base, bit by bit. A cast of the base to another "
            "dtype changes its fingerprint too: where that is all, give the expert with base=None "
            "(--any-base)"
        )
    return None

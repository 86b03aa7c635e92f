"""Where the tokens of one forward stand: their positions, and which columns each may see."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .model_config import FlexMoREConfig
from .ops.attention import Filled
from .rotary import rotary_table


class Step(NamedTuple):
    """Where the tokens of one forward stand.

    rotary: cos and sin (B or 1, S, d/2) of their positions. allowed: bool, broadcast to (B, 1, S,
    columns), the columns that a token may see, or None: all, or with `causal` those before it.
    filled: the same, of one token against a static cache, as `ops.attention` takes it.
    """

    rotary: tuple[Tensor, Tensor]
    allowed: Tensor | None
    causal: bool
    filled: Filled | None = None


class Heads(NamedTuple):
    """What of a model a step needs: head_dim, RoPE's theta, the dtype; and what a cache is for."""

    size: int
    theta: float
    dtype: torch.dtype
    groups: int  # key-value heads
    layers: int


def heads_of(config: FlexMoREConfig, dtype: torch.dtype) -> Heads:
    """A model's heads."""
    layers, groups = config.num_hidden_layers, config.num_key_value_heads
    return Heads(config.head_dim, config.rope_theta, dtype, groups, layers)


def first_positions(mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """(B, S), or (1, S) without a mask: tokens count from 0, padding does not, as Hugging Face."""
    if mask is None:
        return torch.arange(length, device=device)[None]
    return (mask.to(torch.int64).cumsum(1) - 1).clamp(min=0)


def among_themselves(mask: Tensor | None, length: int) -> Tensor | None:
    """What tokens without a past may see, bool (B, 1, S, S); None without padding: causal."""
    if mask is None:
        return None
    column = torch.arange(length, device=mask.device)
    # A token may always see itself, so that a padded one has a softmax.
    return visible(mask, column, column)


def visible(real: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """bool (B, 1, rows, columns): real columns up to the row's own, and that in any case."""
    before, own = columns < rows[:, None], columns == rows[:, None]
    return (before & real[:, None, None, :]) | own


def uncached(mask: Tensor | None, length: int, device: torch.device, heads: Heads) -> Step:
    """The step of tokens that have no past and leave nothing behind."""
    positions = first_positions(mask, length, device)
    allowed = among_themselves(mask, length)
    return Step(rotary_table(positions, *heads[:3]), allowed, allowed is None)

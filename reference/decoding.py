"""A decoding step beside the layers: where a token stands, which is the likeliest, who has ended.

begin_token   column = end[0], the same for all; position p_b of request b: its cos and sin; then
              real[b, column] = True, end + 1, p_b + 1
greedy        the smallest i with logits_i = max logits
settle        token_b = pad where finished, else chosen_b; finished, or token_b among the stops
"""

from __future__ import annotations

import torch
from torch import Tensor


def begin_token(end: Tensor, position: Tensor, real: Tensor, cos: Tensor, sin: Tensor) -> tuple:
    """(now, end, position, real, cos, sin): the first four as they are afterwards, all anew."""
    now, real = end[:1].clone(), real.clone()
    real[:, int(now)] = True
    rows = position[:, 0]
    return now, end + 1, position + 1, real, cos[rows][:, None], sin[rows][:, None]


def greedy(logits: Tensor) -> Tensor:
    """(B,) of logits (B, V)."""
    largest = [(row == row.max()).nonzero()[0, 0] for row in logits]
    return torch.stack(largest)


def settle(chosen: Tensor, finished: Tensor, stops: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """tokens (B, 1), finished (B,)."""
    tokens = torch.where(finished, pad, chosen)
    return tokens[:, None], finished | torch.isin(tokens, stops)

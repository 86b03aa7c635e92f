"""A decoding step beside the layers in plain PyTorch. What: reference/decoding.py."""

from __future__ import annotations

from torch import Tensor


def begin_token(
    end: Tensor, position: Tensor, real: Tensor, now: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    now.copy_(end[:1])
    real.index_fill_(1, now, True)
    rotary = cos[position], sin[position]
    end += 1
    position += 1
    return rotary


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def settle(chosen: Tensor, tokens: Tensor, finished: Tensor, stops: Tensor, pad: int) -> None:
    chosen = chosen.masked_fill(finished, pad)[:, None]
    finished |= (chosen == stops).any(1)
    tokens.copy_(chosen)

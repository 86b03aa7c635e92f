"""Which token comes next: the likeliest, or one drawn from what temperature, top-k, top-p leave.

On the device alone and of fixed shapes, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_int
from .ops.decoding import greedy


class Sampling(NamedTuple):
    """How to choose; in Hugging Face's order: temperature, then top_k, then top_p."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int | None = None  # only the k likeliest
    top_p: float | None = None  # only the likeliest that together reach this probability

    def checked(self) -> Sampling:
        """Itself, if the values can be; else ValueError or TypeError by name."""
        temperature = _check_number("temperature", self.temperature, "a finite number >= 0")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: got {temperature}; accepted: a finite number >= 0")
        if self.top_k is not None:
            check_int("top_k", self.top_k, 1)
        if self.top_p is not None:
            accepted = "a number above 0, up to 1"
            if not 0 < _check_number("top_p", self.top_p, accepted) <= 1:
                raise ValueError(f"top_p: got {self.top_p}; accepted: {accepted}")
        return self


def choose(logits: Tensor, how: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """A token id (B,) int64 for each row of logits (B, V).

    Greedy: the largest logit, the smallest id among equals. Else softmax(logits / temperature) in
    float32 (float64), cut to the `top_k` largest and then to the fewest whose sum reaches `top_p`
    (the first is always kept), and one drawn by `generator`: argmax p_i / e_i with e_i exponential,
    which is i with probability p_i / sum p. No host sync.
    """
    if how.temperature == 0:
        return greedy(logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest becomes 0, which no temperature makes infinite; 1e-30 is greedy, and a float32.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(how.temperature, 1e-30)
    # What reaches 1 is all: a rounded sum would cut the last ones.
    top_p = how.top_p if how.top_p is not None and how.top_p < 1 else None
    ids = None
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        logits, ids = logits.topk(how.top_k, dim=-1)
    elif top_p is not None:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    p = logits.softmax(-1)
    if top_p is not None:
        before = p.cumsum(-1) - p  # of those that are likelier
        beyond = before >= top_p
        beyond[:, 0] = False
        p = p.masked_fill(beyond, 0)
    drawn = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return (drawn if ids is None else ids.gather(1, drawn))[:, 0]


def _check_number(name: str, value: object, accepted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}; accepted: {accepted}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: got an integer beyond float; accepted: {accepted}") from None

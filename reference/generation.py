"""Greedy generation without a cache: the whole text again for each token.

next = argmax of the last position's logits, the smallest id among equals; a request that made one
of the ids in `eos` gets `pad` from then on, and all stop when the last one did.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    eos: Sequence[int] = (),
    pad: int = 0,
    expert_mask: Tensor | None = None,
) -> Tensor:
    """Prompts (B, S), left-padded -> (B, S + n)."""
    ids = input_ids
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        logits = model(ids, mask, expert_mask=expert_mask)[:, -1]
        best = torch.where(finished, pad, logits.argmax(-1))
        ids = torch.cat([ids, best[:, None].to(ids.dtype)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        for stop in eos:
            finished = finished | (best == stop)
        if finished.all():
            break
    return ids

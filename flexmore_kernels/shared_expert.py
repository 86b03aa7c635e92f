"""A shared expert around the routing of the others: who can be selected, and its own slot.

Nexus (arXiv 2408.15901, section 2): always on, weight 1, outside the softmax. Maths:
reference/routing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ragged import device_constant


def all_but(shared: int, num_experts: int, device: torch.device) -> Tensor:
    """bool (E,), False at the shared expert; made once a device."""
    return device_constant(tuple(e != shared for e in range(num_experts)), device, torch.bool)


def candidates(like: Tensor, num_experts: int, mask: Tensor | None, shared: int | None):
    """The mask (T, E) of the experts that can be selected: all but the shared one."""
    if shared is None:
        return mask
    others_E = all_but(shared, num_experts, like.device)
    return others_E.expand(like.shape[0], num_experts) if mask is None else mask & others_E


def with_slot(
    weights: Tensor, indices: Tensor, mask: Tensor | None, shared: int | None, num_experts: int
) -> tuple[Tensor, Tensor]:
    """(weights, indices) with the shared expert's slot before the others; empty by the mask."""
    if shared is None:
        return weights, indices
    if mask is None:
        shape = (indices.shape[0], 1)
        one = device_constant((1,), weights.device, weights.dtype).expand(shape)
        first = device_constant((shared,), indices.device, indices.dtype).expand(shape)
    else:
        one = mask[:, shared, None].to(weights.dtype)
        first = torch.where(mask[:, shared, None], shared, num_experts)
    return torch.cat([one, weights], 1), torch.cat([first, indices], 1)

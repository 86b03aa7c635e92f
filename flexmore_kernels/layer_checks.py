"""What the layer checks of its arguments and of its own weights, before it computes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import FLOATS, check_tensor, checks_values
from .ragged import StackedFactors


def check_x(x: Tensor, width: int, dtype: torch.dtype | None, device: torch.device) -> None:
    """x (..., width); `dtype` None lets every floating dtype pass (autocast)."""
    check_tensor("x", x)
    if x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(f"x: got shape {tuple(x.shape)}; accepted: (..., {width})")
    check_tensor("x", x, None, FLOATS if dtype is None else (dtype,), device)
    if dtype == torch.float64 and device.type == "cuda":
        raise TypeError("x: got dtype float64 on cuda; accepted: float32, bfloat16, float16")


def check_weight_dtypes(layer: nn.Module, weights: Sequence[Any], dtype: torch.dtype) -> None:
    """Full-size matrices in `dtype`, factors and router in that or in float32."""
    # Only to report a fault are the parameters looked up by name.
    wide = (dtype, torch.float32)
    router = (*layer.gate.parameters(), *layer.gate.buffers())
    right = all(part.dtype in wide for part in router)
    for side in weights:
        stacked = isinstance(side, StackedFactors)
        for entry in (*side.full, (side.a, side.b)) if stacked else side:
            if isinstance(entry, Tensor):
                right = right and entry.dtype == dtype
            elif entry is not None:
                right = right and entry[0].dtype in wide and entry[1].dtype in wide
    if right and dtype in FLOATS:
        return
    for name, parameter in (*layer.named_parameters(), *layer.gate.named_buffers("gate")):
        full = name.endswith("_proj.weight")
        accepted = (dtype,) if dtype in FLOATS else FLOATS
        accepted = accepted if full else tuple(dict.fromkeys((*accepted, torch.float32)))
        check_tensor(name, parameter, None, accepted)


def check_router_device(router: nn.Module, device: torch.device) -> None:
    """The router beside the experts."""
    for name, part in (*router._parameters.items(), *router._buffers.items()):
        if part is not None:
            check_tensor(f"gate.{name}", part, None, None, device)


def check_mask(mask: Tensor, x: Tensor, num_experts: int) -> None:
    """bool (E,) or one row a token of x; an expert for each token, where values are looked at."""
    check_tensor("expert_mask", mask, None, (torch.bool,), x.device)
    shapes = ((num_experts,), (*x.shape[:-1], num_experts))
    # Size by size: a compiler's symbolic sizes become guards so, not unequal tuples.
    if not any(
        mask.dim() == len(shape) and all(map(operator.eq, mask.shape, shape)) for shape in shapes
    ):
        raise ValueError(
            f"expert_mask: got shape {tuple(mask.shape)}; accepted: {shapes[0]} or "
            f"{tuple(shapes[1])}"
        )
    if checks_values(mask):
        none = ~mask.any(-1)
        if bool(none.any()):
            at = tuple(int(i) for i in none.nonzero()[0])
            token = f"token {at}" if at else "any token"
            raise ValueError(
                f"expert_mask: got no allowed expert for {token}; accepted: at least one True "
                "for every token"
            )

"""The dtype that a layer computes in, and its weights brought to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ragged import StackedFactors


def autocast_dtype(x: object) -> torch.dtype | None:
    """The dtype that autocast asks for on x's device, None when it is off."""
    kind = x.device.type if isinstance(x, Tensor) else ""
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, or the tensors of a projection, in `dtype`; what has it already is passed on."""
    if isinstance(value, Tensor):
        return value if value.dtype == dtype else value.to(dtype)
    if isinstance(value, StackedFactors):
        full = cast(tuple(value.full), dtype)
        return StackedFactors(full, cast(value.a, dtype), cast(value.b, dtype), value.ranks)
    if isinstance(value, (list, tuple)):
        for part in value:
            for tensor in part if isinstance(part, tuple) else (part,):
                if tensor is not None and getattr(tensor, "dtype", None) != dtype:
                    return type(value)(cast(part, dtype) for part in value)
    return value

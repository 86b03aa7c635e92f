"""Shared by several test files: routed ids, a plan, what the interpreter cannot do, kills."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flexmore_kernels import ops
from flexmore_kernels.ragged import RoutingPlan


def some_ids(tokens: int, experts: int, top_k: int, empty: float = 0.2) -> Tensor:
    """Distinct ids a token; about this part of the slots is empty."""
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k].contiguous()
    return ids.masked_fill(torch.rand(tokens, top_k) < empty, experts)


def some_plan(device: str, tokens: int = 6, experts: int = 4, top_k: int = 3) -> RoutingPlan:
    return ops.make_plan(some_ids(tokens, experts, top_k).to(device), experts)


def to_device(value: Any, device: str) -> Any:
    """Tensors, also in a list, on the device; those on meta stay, to be refused there."""
    if isinstance(value, list):
        return [to_device(entry, device) for entry in value]
    moves = isinstance(value, Tensor) and value.device.type != "meta"
    return value.to(device) if moves else value


def skip_narrow(kernels: str, device: str, dtype: torch.dtype) -> None:
    """The interpreter's bf16 and fp16 arithmetic is not the GPU's."""
    if kernels == "triton" and device == "cpu" and dtype.itemsize == 2:
        pytest.skip("the interpreter computes float32 and float64 only")


def skip_interpreted(kernels: str, device: str, dtype: torch.dtype) -> None:
    """The interpreter has no 16-bit floats and is slow: gradcheck covers its float64."""
    if kernels == "triton" and device == "cpu" and dtype != torch.float32:
        pytest.skip("in the interpreter: float32, and float64 by gradcheck")


@contextlib.contextmanager
def second_target_stops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, a sweep is interrupted where its second checkpoint is about to appear."""
    from flexmore_kernels.conversion.targets import Target

    finish, done = Target.finish, []

    def second(self):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(Target, "finish", second)
        yield

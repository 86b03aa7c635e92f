"""The `flexmore` op library: one line registers an op with its kernel, its fake and its gradient.

Schemas live beside the documentation in ops/<stem>.py. An op's kernel is a Python function that
picks the raw kernels of the tensor's device (backend.py), so the ops exist on every install.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("flexmore", "DEF")


def _without_autocast(kernel: Callable, device: str) -> Callable:
    """The kernel as it is: autocast would recast what the aten calls inside it are given."""

    @functools.wraps(kernel)
    def run(*args):
        if not torch.is_autocast_enabled(device):
            return kernel(*args)
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    return run


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("flexmore ops are differentiable once, not twice")


def define(
    schema: str,
    kernel: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Define `flexmore::<schema>` for CPU and CUDA; differentiable when `backward` is given.

    What is named `..._backward` refuses to be differentiated again.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    name = schema.split("(")[0]
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, _without_autocast(kernel, device), device.upper())
    torch.library.register_fake(f"flexmore::{name}", fake, lib=_LIBRARY)
    if backward is None and name.endswith("_backward"):
        backward = _no_second_derivative
    if backward is not None:
        torch.library.register_autograd(
            f"flexmore::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )

"""Which kernels run: one module of raw kernels per device and stem, of equal names and signatures.

`_native` is the compiled library (CPU: C++; CUDA: CUDA C++), `_triton` runs on any GPU, `_aten` is
plain PyTorch and runs everywhere. The rule is short: the compiled library where it has the stem,
else Triton on a GPU and aten on a CPU; where a measurement says otherwise of one function on a GPU,
its op asks for the other (`on_gpu`). Tests and benchmarks choose with `use`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import native

NAMES = ("native", "triton", "aten")
STEMS = ("routing", "permutation", "grouped_gemm", "lowrank", "gated_mix", "experts")

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("forced", default=None)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_interprets() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    if not _triton_installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def available(stem: str, device: torch.device | str) -> tuple[str, ...]:
    """Names of the kernels that can run `stem` on `device`, the preferred one first."""
    return _available(stem, torch.device(device).type)


@functools.cache
def _available(stem: str, kind: str) -> tuple[str, ...]:
    names = []
    if stem in native.STEMS.get(kind, ()) and (
        native.cuda_runs_on() if kind == "cuda" else native.available()
    ):
        names.append("native")
    if kind == "cuda" and _triton_installed():
        names.append("triton")
    if kind == "cpu" or not _triton_installed():
        names.append("aten")
    if kind == "cpu" and _triton_interprets():
        names.append("triton")
    return tuple(names)


@functools.cache
def _module(name: str, stem: str) -> ModuleType:
    return importlib.import_module(f"flexmore_kernels._{name}.{stem}")


def chosen(stem: str, device: torch.device | str) -> str:
    """Name of the kernels that `stem` runs on `device`: `use`'s if it can, else the preferred."""
    names = available(stem, device)
    forced = _forced.get()
    return forced if forced in names else names[0]


def kernels(stem: str, tensor: Tensor, on_gpu: str | None = None) -> ModuleType:
    """The module of raw kernels that runs `stem` on the tensor's device.

    `on_gpu` names those that a measurement prefers for one function on a GPU, if they are there.
    """
    name = chosen(stem, tensor.device)
    if tensor.is_cuda and _forced.get() is None and on_gpu in available(stem, tensor.device):
        name = on_gpu
    return _module(name, stem)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within, run the kernels of this name ("native", "triton", "aten") wherever they can run."""
    if name not in NAMES:
        raise ValueError(f"name: got {name!r}; accepted: {', '.join(NAMES)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)

"""Which kernels run: one module of raw kernels per device and stem, of equal names and signatures.

`_native` is the compiled library (CPU: C++; CUDA: CUDA C++), `_triton` runs on any GPU, `_aten` is
plain PyTorch and runs everywhere. The rule is short: the compiled library where it has the whole
stem (native.STEMS), else Triton on a GPU and aten on a CPU; `ON_GPU` lists the functions for which
measurements on a GPU say otherwise. Ops choose so by `kernels`. Before that, and inside Triton's
experts, callers ask for what the library does better for some sizes of 16-bit floats on a GPU:
`library` (few tokens, many experts), `hopper` (many tokens, compute capability 9.0); whether the
sizes fit is theirs to ask of the module that they get. Tests and benchmarks choose with `use`.

`flexmore env` asks `selected`, `why_not`, `library_runs` and `hopper_runs`: the same rules, so that
it reports what runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .slow_paths import warn_once

NAMES = ("native", "triton", "aten")
STEMS = ("routing", "attribution", "permutation", "grouped_gemm", "lowrank", "gated_mix", "experts")


class Preference(NamedTuple):
    """Kernels that a measurement puts before the rule's, on a GPU, up to some number of experts."""

    name: str
    up_to: int
    measured: str


ON_GPU = {
    "topk_route_linear": Preference(
        "triton", 64, "52 us against 129 on an H100, T=16384, D=4096, E=7: one launch reads x once"
    ),
}
"""By the name of the raw function."""

_forced: list[str] = []
"""What `use` asked for, the innermost last. Of all threads: a backward on CUDA runs in torch's."""


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
    return _forced[-1] if _forced and _forced[-1] in names else names[0]


def selected(
    stem: str, device: torch.device | str, function: str = "", num_experts: int = 0
) -> str:
    """Name of the kernels that run a stem's raw function for so many experts on a device."""
    preference = ON_GPU.get(function)
    if (
        preference is not None
        and torch.device(device).type == "cuda"
        and num_experts <= preference.up_to
        and not _forced
        and preference.name in available(stem, device)
    ):
        return preference.name
    return chosen(stem, device)


def kernels(stem: str, tensor: Tensor, function: str = "", num_experts: int = 0) -> ModuleType:
    """The module of raw kernels that runs `stem` on the tensor's device.

    With `function` and the number of experts, what `ON_GPU` says of that function counts too.
    """
    name = selected(stem, tensor.device, function, num_experts) if function else None
    name = name or chosen(stem, tensor.device)
    if not _forced:
        _warn_where_slow(stem, name, tensor.device.type)
    return _module(name, stem)


def library(stem: str, tensor: Tensor) -> ModuleType | None:
    """The library's CUDA kernels of `stem`, for what only they do, with 16-bit floats; None where
    they cannot run on the tensor, or others are asked for by `use`.
    """
    return _module("native", stem) if library_runs(tensor.device, tensor.dtype) else None


def library_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `library` gives kernels for tensors of this dtype there."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return (not _forced or _forced[-1] == "native") and native.cuda_runs_on(device.index)


def hopper(stem: str, tensor: Tensor) -> ModuleType | None:
    """As `library`, where the kernels are for compute capability 9.0 alone."""
    return _module("native", stem) if hopper_runs(tensor.device, tensor.dtype) else None


def hopper_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `hopper` gives kernels for tensors of this dtype there."""
    return library_runs(device, dtype) and _is_hopper(device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    # Code for 9.0 without the "a", or made from older PTX, has empty kernels.
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return capable and "90a" in native.cuda_archs()


def why_not(name: str, stem: str, device: torch.device | str) -> str | None:
    """Why these kernels cannot run `stem` on `device`; None if they can, preferred or not."""
    kind = torch.device(device).type
    if name in available(stem, device):
        return None
    if name == "triton":
        return "not installed" if kind == "cuda" else "runs on a GPU only"
    if name == "aten":
        return "runs on a GPU only where Triton is missing"
    part = native.CUDA_PARTS.get(stem) if kind == "cuda" else None
    if stem not in native.STEMS.get(kind, ()) and part is None:
        return f"the compiled library has no {kind} kernels for it"
    if kind == "cpu":
        return native.why_not()
    return native.why_not_cuda(torch.cuda.current_device()) or part


@functools.cache
def _warn_where_slow(stem: str, name: str, kind: str) -> None:
    """Warn of what is missing for the kernels that should run here; asked once for each choice."""
    if name == "native":
        return
    if kind == "cuda" and name == "aten":
        warn_once(
            "no triton",
            "CUDA tensors run plain PyTorch kernels, many times slower, since Triton is not "
            "installed: pip install triton (torch's CUDA builds for Linux bring it).",
        )
    if stem not in native.STEMS.get(kind, ()):
        return
    if not native.available():
        broken = native.built()
        if broken or kind == "cpu":
            warn_once(
                "no library",
                f"The compiled library is not used ({native.why_not()}); slower kernels take over, "
                "Triton's on a GPU, plain PyTorch on a CPU. Install again where torch, a C++ "
                "compiler and cmake are found; `flexmore env` shows what was.",
            )
    elif kind == "cuda" and native.cuda_built() and not native.cuda_runs_on():
        warn_once(
            "no cuda code",
            f"The library's CUDA kernels do not run on this GPU, Triton's do: "
            f"{native.why_not_cuda(torch.cuda.current_device())}. Build for it, with "
            "TORCH_CUDA_ARCH_LIST, or update the driver.",
        )


def device_or_default(device: str | None) -> str:
    """The device that a command was asked to run on; by default "cuda" where torch finds a GPU."""
    here = torch.cuda.is_available()
    if device is not None and torch.device(device).type == "cuda" and not here:
        raise ValueError(
            f"device: got {device!r}, but torch finds no NVIDIA GPU here; accepted: 'cpu'"
        )
    return device or ("cuda" if here else "cpu")


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within, run the kernels of this name ("native", "triton", "aten") wherever they can run.

    In all threads of the process: for tests and benchmarks.
    """
    if name not in NAMES:
        raise ValueError(f"name: got {name!r}; accepted: {', '.join(NAMES)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()

"""The compiled library `flexmore_kernels/_C.abi3.so`: whether it is here, and what is in it.

The package works without it (Triton and aten kernels take over), so nothing here raises when the
library is absent or does not fit the running torch; `why_not` keeps the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator

import torch

STEMS = {"cpu": {"routing", "permutation", "gated_mix"}, "cuda": {"routing", "permutation"}}
"""The stems that the library holds kernels of, by device type; `_native/<stem>.py` wraps them."""


@functools.cache
def why_not() -> str | None:
    """Why the library is not used, or None when it is loaded. The first call loads it."""
    name = f"{__package__}._C"
    if importlib.util.find_spec(name) is None:
        return "not built: no C++ compiler or no torch was found when the package was installed"
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return f"does not load with torch {torch.__version__}: {error}"
    return None


def available() -> bool:
    """Whether the compiled library is loaded, and with it the C++ kernels for the CPU."""
    return why_not() is None


@functools.cache
def cuda_built() -> bool:
    """Whether the library holds CUDA kernels, and this torch is a CUDA build."""
    return available() and torch.version.cuda is not None and _ops().cuda_archs() != ""


@functools.cache
def _cuda_runs_on(index: int) -> bool:
    return _ops().cuda_runs_on(index)


def cuda_runs_on(device: int | None = None) -> bool:
    """Whether this CUDA device (default: the current one) and its driver can run those kernels.

    False where there is no device, where the library has no code for its architecture, and where
    the driver is older than the CUDA that the library was built with. Makes a CUDA context.
    """
    if not cuda_built() or not torch.cuda.is_available():
        return False
    return _cuda_runs_on(torch.cuda.current_device() if device is None else device)


def vector_width() -> str:
    """The instruction set that the CPU kernels use here ("avx512", ...); "none" if not loaded."""
    return _ops().vector_width() if available() else "none"


@contextlib.contextmanager
def use_vector_width(name: str) -> Iterator[None]:
    """Within, the CPU kernels (of all threads) use this instruction set: for tests.

    name: "baseline", "avx2" or "avx512". ValueError if it was not compiled or cannot run here.
    """
    before = vector_width()
    if not available() or not _ops().use_vector_width(name):
        raise ValueError(f"name: got {name!r}; accepted: what this processor can run")
    try:
        yield
    finally:
        _ops().use_vector_width(before)


def build_info() -> dict[str, object]:
    """What was built and how: for `flexmore env` and bug reports.

    Always: loaded, why_not, vector_width, cuda_archs. From the small pybind11 module `_host`, where
    it was built: compilers, flags, vector widths, the torch that it was built against, the commit.
    """
    info: dict[str, object] = {
        "loaded": available(),
        "why_not": why_not(),
        "vector_width": vector_width(),
        "cuda_archs": _ops().cuda_archs() if available() else "",
    }
    try:
        host = importlib.import_module(f"{__package__}._host")
    except (ImportError, OSError):
        return info
    return info | host.build_info()


def _ops():
    return torch.ops.flexmore_native

"""The compiled library `flexmore_kernels/_C.abi3.so`: whether it is here, and what is in it.

The package works without it (Triton and aten kernels take over), so nothing here raises when the
library is absent or does not fit the running torch; `why_not` keeps the reason. Nor does anything
need the module `_host` beside it, which tests ask how CUDA kernels are launched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

STEMS = {"cpu": {"routing", "permutation", "gated_mix"}, "cuda": {"routing", "permutation"}}
"""The stems of which the library has every function, for any size, by device type: there it is
preferred (backend.py). `_native/<stem>.py` wraps them.
"""

CUDA_PARTS = {
    "grouped_gemm": "the compiled library has it inside the experts alone",
    "lowrank": "the compiled library has it inside the experts alone",
    "experts": "the compiled library serves forwards of 16-bit floats and some sizes, listed apart",
}
"""Stems of which the library has kernels for some sizes of 16-bit floats on a GPU, and what to say
where it is asked why they are not preferred for all; `backend.library` and `hopper` give them.
"""


@functools.cache
def facts() -> dict[str, object]:
    """What setup.py noted when it built the package; empty in a source tree that was not built."""
    try:
        return json.loads(Path(__file__).with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}


def built() -> bool:
    """Whether the library's file is here, be it of use or not."""
    return importlib.util.find_spec(f"{__package__}._C") is not None


@functools.cache
def why_not() -> str | None:
    """Why the library is not used, or None when it is loaded. The first call loads it."""
    if not built():
        return f"not built: {facts().get('why_no_library') or 'this is an unbuilt source tree'}"
    try:
        importlib.import_module(f"{__package__}._C")
    except (ImportError, OSError, RuntimeError) as error:
        return f"does not load with torch {torch.__version__}: {error}"
    return None


def host() -> ModuleType | None:
    """The module `_host` (csrc/host.cpp); None where it was not built for this Python."""
    try:
        return importlib.import_module(f"{__package__}._host")
    except (ImportError, OSError):
        return None


def available() -> bool:
    """Whether the compiled library is loaded, and with it the C++ kernels for the CPU."""
    return why_not() is None


def cuda_archs() -> str:
    """The architectures that the library has CUDA kernels for, "80-real 90a-real ..."; "": none."""
    return _ops().cuda_archs() if available() else ""


@functools.cache
def why_not_cuda_built() -> str | None:
    """Why the library has no CUDA kernels for this torch, on any device; None when it has."""
    if not available():
        return why_not()
    if not cuda_archs():
        return f"no CUDA kernels in it: {facts().get('why_no_cuda') or 'built without nvcc'}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    return None


@functools.cache
def why_not_cuda(index: int) -> str | None:
    """Why the CUDA kernels do not run on this CUDA device, or None when they do.

    They do not where the library has none, has no code for its architecture, or was built with a
    CUDA newer than the driver. Makes a CUDA context.
    """
    if why_not_cuda_built():
        return why_not_cuda_built()
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if _ops().cuda_runs_on(index):
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"no code in it for sm_{major}{minor} (built for {cuda_archs()}), or the driver is older "
        f"than CUDA {facts().get('nvcc')}"
    )


def cuda_built() -> bool:
    """Whether the library holds CUDA kernels, and this torch is a CUDA build."""
    return why_not_cuda_built() is None


def cuda_runs_on(device: int | None = None) -> bool:
    """Whether this CUDA device (default: the current one) and its driver can run those kernels."""
    if not cuda_built() or not torch.cuda.is_available():
        return False
    return why_not_cuda(torch.cuda.current_device() if device is None else device) is None


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
    """What was built and how, for `flexmore env` and bug reports.

    loaded, why_not, vector_width (in use), cuda_archs, host (whether `_host` is here); and
    setup.py's facts: commit, python and torch built with, why_no_library, why_no_cuda; with a
    library: compiler, flags, nvcc, vector_widths.
    """
    own = {
        "loaded": available(),
        "why_not": why_not(),
        "vector_width": vector_width(),
        "cuda_archs": cuda_archs(),
        "host": host() is not None,
    }
    return own | facts()


def _ops():
    return torch.ops.flexmore_native

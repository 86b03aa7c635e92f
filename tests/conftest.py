"""One seed per test, one fixture per question: which device, which kernels.

Traps set for every test: memory that the package allocates without filling, in Python or in the
compiled library, holds NaN (floats) or an integer that is no index, so that an unwritten row shows
(tests/test_poison.py plants some); the seed comes from the test's name, so that no test depends on
the order.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import random
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

import reference
from flexmore_kernels import _native, backend

# An install carries reference/ as flexmore_kernels.reference; in a bare source tree this stands in.
if importlib.util.find_spec("flexmore_kernels.reference") is None:
    sys.modules["flexmore_kernels.reference"] = reference

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    max_examples=8 if INTERPRET else 20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("house")


def _kernel_names(stem: str, device: str) -> list[str]:
    """Kernels to try on a device: the file's own stem's, or all for the layers above the ops."""
    stems = (stem,) if stem in backend.STEMS and stem != "experts" else backend.STEMS
    names = {name for s in stems for name in backend.available(s, device)}
    if device == "cpu" and INTERPRET:
        # The interpreter's process tests nothing but the Triton kernels: all else ran without it.
        names &= {"triton"}
    return [name for name in backend.NAMES if name in names]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    stem = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    if "kernels" in metafunc.fixturenames:
        params = []
        # The interpreter has one thread and one order: there, two runs cannot differ.
        repeats = INTERPRET and "same_bits" in metafunc.function.__name__
        for device in () if repeats else DEVICES:
            for name in _kernel_names(stem, device):
                marks = [pytest.mark.triton] if name == "triton" else []
                marks += [pytest.mark.gpu] if device == "cuda" else []
                params.append(pytest.param((device, name), marks=marks, id=f"{device}-{name}"))
        metafunc.parametrize("_device_and_kernels", params, indirect=True)
    elif "device" in metafunc.fixturenames:
        marks = {"cpu": [], "cuda": [pytest.mark.gpu]}
        params = [pytest.param((d, None), marks=marks[d], id=d) for d in DEVICES]
        metafunc.parametrize("_device_and_kernels", params, indirect=True)


@pytest.fixture
def _device_and_kernels(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    return request.param


@pytest.fixture
def device(_device_and_kernels: tuple[str, str | None]) -> str:
    """ "cpu", and "cuda" where there is one."""
    return _device_and_kernels[0]


@pytest.fixture
def kernels(_device_and_kernels: tuple[str, str | None]):
    """Name of the raw kernels ("native", "triton", "aten") that run while the test does."""
    name = _device_and_kernels[1]
    with backend.use(name):
        yield name


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.detach().fill_(float("nan")).requires_grad_(tensor.requires_grad)
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).min)


def _poisoned(allocate):
    def call(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(tensor) if caller.startswith("flexmore_kernels") else tensor

    return call


class _PoisonedLibrary:
    """The compiled library's ops; torch fills what they allocate, as in its deterministic mode.

    That mode is on only while one of them runs: elsewhere it would choose other kernels in torch.
    """

    def __getattr__(self, name: str):
        op = getattr(torch.ops.flexmore_native, name)

        def call(*args):
            before = torch.get_deterministic_debug_mode()
            torch.set_deterministic_debug_mode("warn")
            try:
                return op(*args)
            finally:
                torch.set_deterministic_debug_mode(before)

        return call


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
    for module in pkgutil.iter_modules(_native.__path__):
        wrapper = importlib.import_module(f"{_native.__name__}.{module.name}")
        monkeypatch.setattr(wrapper, "_ops", _PoisonedLibrary())


@pytest.fixture
def hopper(device: str):
    """The compiled library's token-major kernels, where there is a GPU for them."""
    module = backend.hopper("token_major", torch.empty(0, device=device, dtype=torch.bfloat16))
    if module is None:
        pytest.skip("needs a Hopper GPU and the compiled library")
    return module

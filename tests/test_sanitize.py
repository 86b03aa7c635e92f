"""Tiny cases through every GPU kernel, forward and backward, for compute-sanitizer to watch.

`make sanitize` runs these under memcheck, racecheck, initcheck and synccheck (tests/sanitize.sh).
Values are for other tests: here they are only finite. That no kernel is left out is checked twice:
of Triton's on any machine, by what would be launched; of all on a GPU, by what a profiler saw.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from exercise import FAMILIES, Setup

from flexmore_kernels import backend

SOURCES = Path(__file__).parent.parent / "csrc/cuda"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ALL = tuple(FAMILIES)

# What a case is for, its size, its ops. Tokens are few but for the plan of more than one block.
CASES = {
    "token-major, sums in parts": (
        Setup((0, 16, 5, 3), 9, BF16, hidden=512, intermediate=136),
        ALL,
    ),
    "full-size and odd": (
        Setup((0, "full", 7, (2, 0, "full")), 13, FP32, hidden=37, intermediate=53),
        ALL,
    ),
    "rows of their own": (
        Setup((0, 72, 8, (96, "full", 80)), 530, BF16, hidden=64, intermediate=48),
        ("experts",),
    ),
    "rows, more than 8 experts": (
        Setup((0, *[4] * 11), 70, FP16, hidden=48, intermediate=32),
        ALL,
    ),
    "gradients of rows in parts": (
        Setup((0, 72, 8), 1300, BF16, hidden=64, intermediate=48),
        ("experts",),
    ),
    "columns in parts": (
        Setup((0, 16, 5, 3), 9, BF16, hidden=64, intermediate=1040),
        ("experts",),
    ),
    "plan of several blocks": (
        Setup((0, 1, 1, 1), 3000, BF16, hidden=16),
        ("routing", "attribution", "permutation"),
    ),
    "200 experts": (
        Setup((0, *[1] * 199), 5, FP32, hidden=20),
        ("routing", "attribution", "permutation"),
    ),
    "double": (Setup((0, 1, 1), 6, FP64, hidden=10), ("routing", "permutation")),
    "300 experts": (Setup((0, *[1] * 299), 5, FP32, hidden=20), ("routing",)),
    "double, 300 experts": (Setup((0, *[1] * 299), 5, FP64, hidden=7), ("routing", "permutation")),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Not here: initcheck can find a read of unwritten memory only where nobody filled it."""


@pytest.fixture(autouse=True)
def _kernels_for_many_tokens(monkeypatch):
    """For few tokens, too: a case has hardly any."""
    from flexmore_kernels._native import token_major

    monkeypatch.setattr(token_major, "FEWEST_TOKENS", 1)


@pytest.fixture
def _plain_products():
    """Products of torch's as plain sums: of cuBLAS's bulk copies initcheck sees no writing, and
    racecheck ends in an exception.
    """

    def mm(a, b, out_dtype=None):
        acc = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(acc), b.to(acc)
        product = a.new_zeros(a.shape[0], b.shape[1])
        # A long sum is one of several blocks, of whose exchange initcheck sees no writing either.
        for part in torch.arange(a.shape[1]).split(64):
            some = slice(int(part[0]), int(part[-1]) + 1)
            product += (a[:, some, None] * b[None, some]).sum(1)
        return product.to(out_dtype or a.dtype)

    def addmm(base, a, b, *, beta=1, alpha=1):
        return (beta * base + alpha * mm(a, b)).to(base.dtype)

    def addmm_into(base, a, b, out_dtype, *, beta=1, alpha=1, out):
        return out.copy_(beta * base + alpha * mm(a, b, out_dtype))

    given = {"mm": mm, "mm.dtype": mm, "addmm": addmm, "addmm.dtype_out": addmm_into}
    with (
        warnings.catch_warnings(),
        torch.library._scoped_library("aten", "IMPL") as library,
    ):
        warnings.simplefilter("ignore")  # a kernel of torch's is replaced
        for name, function in given.items():
            library.impl(name, function, "CUDA")
        yield


def run(case: str, family: str, device: str) -> None:
    setup, _ = CASES[case]
    for output in FAMILIES[family](setup._replace(device=device)):
        assert output.isfinite().all()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("name", ("native", "triton"))
@pytest.mark.parametrize(
    ("case", "family"), [(case, f) for case, (_, families) in CASES.items() for f in families]
)
def test_runs(case, family, name, _plain_products):
    # The layer has kernels in the library beside those of its ops: few tokens, Hopper's.
    stem = "routing" if family == "experts" else family
    if name == "native" and "native" not in backend.available(stem, "cuda"):
        pytest.skip("no CUDA kernels for this op here")
    with backend.use(name):
        run(case, family, "cuda")
        torch.cuda.synchronize()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="launches are not replaced")
def test_every_triton_kernel_would_be_launched(monkeypatch):
    pytest.importorskip("triton")
    from compiling import entry_kernels
    from triton.runtime.jit import JITFunction

    launched = set()
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: launched.add(self.__name__))
    monkeypatch.setattr(backend, "chosen", lambda stem, device: "triton")
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, getattr(torch, name.replace("empty", "zeros")))
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    for case, (_, families) in CASES.items():
        for family in families:
            run(case, family, "cpu")
    assert entry_kernels() - launched == set()


@needs_gpu
@pytest.mark.gpu
def test_every_kernel_is_launched():
    pytest.importorskip("triton")
    from compiling import entry_kernels

    written = set()
    if "native" in backend.available("routing", "cuda"):
        hopper = torch.cuda.get_device_capability() == (9, 0)
        for path in SOURCES.iterdir():
            text = path.read_text()
            if hopper or "__CUDA_ARCH_FEAT_SM90_ALL" not in text:
                written |= set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text))
        assert written
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for case, (_, families) in CASES.items():
            for family in families:
                for name in ("native", "triton"):
                    with backend.use(name):
                        run(case, family, "cuda")
        torch.cuda.synchronize()
    seen = {word for event in profile.events() for word in re.findall(r"\w+", event.name)}
    if not any("kernel" in word for word in seen):
        pytest.skip("the profiler sees no kernels here")
    assert (entry_kernels() | written) - seen == set()

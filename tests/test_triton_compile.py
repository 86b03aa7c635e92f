"""Every Triton kernel compiles ahead of time for real GPUs, without one, and fits their memory.

A stand-in driver names the target; launches are replaced by compilations, so what is compiled is
what the launchers would launch: their configurations, specialised to their arguments. The whole
layer runs this way, forward and backward, on tensors whose contents mean nothing.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from flexmore_kernels import backend, ops  # noqa: E402
from flexmore_kernels._triton import tiles  # noqa: E402
from flexmore_kernels.testing import make_projection, make_weight, make_x  # noqa: E402

KIB = 1024
# Compute capability -> shared memory that a block may use (CUDA C++ programming guide).
TARGETS = {80: 163 * KIB, 86: 99 * KIB, 90: 227 * KIB}
MIXED = (0, 1, 4, 8, 64, "full", (16, 0, "full"))
EQUAL = (0, *[64] * 6)
MANY = (0, *[16] * 16)


def entry_kernels() -> set[str]:
    """Names of the kernels in _triton/ that are launched: those that ask which program they are."""
    names = set()
    for path in Path(tiles.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"flexmore_kernels._triton.{path.stem}")
        for function in vars(module).values():
            own = isinstance(function, JITFunction) and function.__module__ == module.__name__
            if own and "program_id" in function.src:
                names.add(f"{path.stem}.{function.__name__}")
    return names


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Not here: nothing is written, and the plan's maps should hold indices that exist."""


@pytest.fixture
def compiled(monkeypatch):
    """A function that compiles all launches of a call for a target: {kernel: shared memory}."""

    def compile_for(target: int, call) -> dict[str, int]:
        found: dict[str, int] = {}
        launch = JITFunction.run

        def run(self, *args, grid, warmup, **kwargs):
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
            name = f"{self.__module__.rpartition('.')[2]}.{self.__name__}"
            found[name] = max(found.get(name, 0), kernel.metadata.shared)
            return kernel

        driver = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", target, 32),
            get_current_device=lambda: -target,
            get_current_stream=lambda device: 0,
        )
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, getattr(torch, name.replace("empty", "zeros")))
        monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
        monkeypatch.setattr(backend, "chosen", lambda stem, device: "triton")
        monkeypatch.setattr(tiles, "shared_memory", lambda device: TARGETS[target])
        monkeypatch.setattr(tiles, "capability", lambda device: divmod(target, 10))
        monkeypatch.setattr(JITFunction, "run", run)
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        call()
        return found

    return compile_for


def layer(ranks: tuple, tokens: int, dtype: torch.dtype, top_k: int = 3) -> None:
    """Every op once, and the experts forward and backward."""
    D, F, E = 512, 256, len(ranks)
    full = {e for e, rank in enumerate(ranks) if rank == 0 or rank == "full"}
    triples = [r if isinstance(r, tuple) else ("full" if e in full else r,) * 3
               for e, r in enumerate(ranks)]  # fmt: skip
    projections = [
        make_projection([t[i] for t in triples], out, width, dtype=dtype)
        for i, (out, width) in enumerate([(F, D), (F, D), (D, F)])
    ]
    for entries in projections:
        for tensor in entries:
            for leaf in tensor if isinstance(tensor, tuple) else (tensor,):
                if leaf is not None:
                    leaf.requires_grad_()
    x = make_x(tokens, D, dtype=dtype).requires_grad_()
    router = make_weight(E, D, dtype=dtype).requires_grad_()
    bias = torch.zeros(E - 1, requires_grad=True)
    mask = torch.ones(E, dtype=torch.bool)
    logits = make_x(tokens, E, dtype=dtype).requires_grad_()
    indices = torch.arange(top_k).expand(tokens, top_k).contiguous()
    plan = ops.make_plan(indices, E)
    for given in ((logits,), (x, router)):
        routing = ops.topk_route(*given, top_k=top_k, bias=bias, mask=mask)
        ops.unpermute(ops.permute(x, plan), plan, routing.weights).sum().backward()
    ranks = [0] * E
    z, b = torch.empty(0, dtype=dtype), torch.empty(F, 0, dtype=dtype)
    pre = make_x(tokens, F, dtype=dtype)
    ops.gated_mix(pre, pre, torch.ones(tokens, top_k), plan, z, b, ranks, z, b, ranks)
    y = ops.experts(x, indices, torch.ones(tokens, top_k, requires_grad=True), *projections)
    y.backward(torch.ones_like(y))


CALLS = {
    "bfloat16, equal ranks": (EQUAL, 4096, torch.bfloat16),
    "bfloat16, mixed": (MIXED, 1024, torch.bfloat16),
    "bfloat16, decode": (EQUAL, 1, torch.bfloat16),
    "float32, mixed": (MIXED, 1024, torch.float32),
    "float16, many experts": (MANY, 1024, torch.float16),
}
GRID = [
    (80, "bfloat16, mixed"),
    (80, "bfloat16, equal ranks"),
    (86, "bfloat16, equal ranks"),
    (86, "float32, mixed"),
    (90, "bfloat16, equal ranks"),
    (90, "bfloat16, mixed"),
    (90, "bfloat16, decode"),
    (90, "float32, mixed"),
    (90, "float16, many experts"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "call"), GRID, ids=[f"sm_{t} {c}" for t, c in GRID])
def test_compiles_and_fits(compiled, target, call):
    found = compiled(target, lambda: layer(*CALLS[call]))
    for kernel, shared in sorted(found.items()):
        print(
            f"sm_{target} {call}: {kernel}: {shared / KIB:.1f} of {TARGETS[target] / KIB:.0f} KiB"
        )
    assert found
    assert {k: s for k, s in found.items() if s > TARGETS[target]} == {}


@pytest.mark.slow
def test_every_kernel_is_compiled(compiled):
    found: dict[str, int] = {}
    for call in ("bfloat16, mixed", "bfloat16, equal ranks", "bfloat16, decode"):
        found |= compiled(90, lambda call=call: layer(*CALLS[call]))
    assert entry_kernels() - set(found) == set()

"""Every Triton configuration that ships compiles ahead of time, fits its GPUs, and stays in budget.

No GPU is needed: tests/compiling.py says how, and which calls there are. With Triton 3.6, which
torch 2.11 brings, all of them are compiled for all targets and held to docs/registers.md. Other
versions compile differently: with those, three calls for one target and one call for all targets.
"""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import registers  # noqa: E402
import triton.language as tl  # noqa: E402
from compiling import CALLS, compile_all, entry_kernels  # noqa: E402
from registers import CUDA, TARGETS, Compiled  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

MAIN_TARGET, MAIN_CALLS = 90, ("bf16, equal ranks", "bf16, mixed", "fp32, TF32 allowed")
IS_GATE = triton.__version__.startswith("3.6.")
JOBS = [
    (target, call)
    for call in CALLS
    for target in TARGETS
    if IS_GATE or call == MAIN_CALLS[0] or (target == MAIN_TARGET and call in MAIN_CALLS)
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_all(JOBS)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Nothing runs, so there is nothing to poison."""


def test_every_kernel_is_compiled(compiled):
    for target in TARGETS:
        kernels = {one.kernel for one in compiled if one.target == target}
        if IS_GATE or target == MAIN_TARGET:
            assert entry_kernels() - kernels == set(), f"sm_{target}"
        assert kernels, f"sm_{target}"


def test_shared_memory_and_registers_fit(compiled):
    assert [one for one in compiled if one.shared > TARGETS[one.target].block] == []
    assert [one for one in compiled if one.blocks == 0] == []


def test_fp32_products_are_ieee_unless_tf32_is_allowed(compiled):
    with_tf32 = {call for call in CALLS if CALLS[call].tf32}
    assert [one for one in compiled if one.tf32 and one.call not in with_tf32] == []
    # The same search finds those that are there.
    for target in {target for target, call in JOBS if call in with_tf32}:
        found = {one.kernel for one in compiled if one.tf32 and one.target == target}
        assert len(found) >= 5, f"sm_{target}: {found}"


def test_no_kernel_adds_floats_atomically(compiled):
    assert [one for one in compiled if one.atomics] == []


@triton.jit
def planted(out_ptr):
    place = tl.arange(0, 32)
    tl.atomic_add(out_ptr + place, tl.full((32,), 1.0, out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp64"))
@pytest.mark.parametrize("target", TARGETS)
def test_an_atomic_addition_would_be_seen(target, dtype):
    source = triton.compiler.ASTSource(fn=planted, signature={"out_ptr": f"*{dtype}"})
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32))
    assert registers.float_atomics(kernel.asm["ptx"])


@pytest.mark.skipif(
    not IS_GATE, reason=f"the budget holds for Triton 3.6, not {triton.__version__}"
)
def test_registers_and_spills_stay_in_budget(compiled):
    recorded, versions = registers.read()
    assert versions.split(",")[0] == "Triton 3.6"
    recorded = {row: cells for row, cells in recorded.items() if row[1] != CUDA}
    broken = registers.violations(registers.table(compiled), recorded)
    assert not broken, "\n".join(["docs/registers.md; `make registers` writes it anew:", *broken])

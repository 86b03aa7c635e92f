"""The traps of conftest.py close: what nobody wrote is NaN, or no index, in a test.

Each test plants a row that a kernel does not write, by maps that name no slot for it.
"""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels import backend, native

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
NOBODY = 2  # the row without a slot
SLOT_TO_ROW = torch.tensor([[0, 1], [3, -1]], dtype=torch.int32)


def unwritten(rows: torch.Tensor) -> list[int]:
    return rows.isnan().all(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_a_row_that_a_library_kernel_on_the_cpu_does_not_write(dtype):
    if not native.available():
        pytest.skip(f"no library: {native.why_not()}")
    from flexmore_kernels._native import gated_mix

    pre = torch.randn(4, 3).to(dtype)
    weights = torch.rand(2, 2, dtype=torch.promote_types(dtype, torch.float32))
    assert unwritten(gated_mix.swiglu_mix(pre, pre, weights, SLOT_TO_ROW)[1]) == [NOBODY]


@needs_gpu
@pytest.mark.gpu
def test_a_row_that_a_library_kernel_on_the_gpu_does_not_write():
    if "native" not in backend.available("permutation", "cuda"):
        pytest.skip("no CUDA kernels in the library")
    from flexmore_kernels._native import permutation

    # Row 2 has a slot, but that slot names another row: nobody writes it.
    row_to_slot = torch.tensor([0, 1, 2, 2], dtype=torch.int32, device="cuda")
    x = torch.randn(2, 3, device="cuda")
    assert unwritten(permutation.permute(x, row_to_slot, SLOT_TO_ROW.cuda())) == [NOBODY]


@pytest.mark.triton
@pytest.mark.parametrize("where", ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])))
def test_a_row_that_a_triton_kernel_does_not_write(where):
    if "triton" not in backend.available("gated_mix", where):
        pytest.skip("no Triton here, or not its interpreter")
    from flexmore_kernels._triton import gated_mix

    pre, weights = torch.randn(4, 3, device=where), torch.rand(2, 2, device=where)
    rows = gated_mix.swiglu_mix(pre, pre, weights, SLOT_TO_ROW.to(where))[1]
    assert unwritten(rows) == [NOBODY]


def test_python_allocations():
    for make in ("torch.empty(3)", "x.new_empty(3)", "torch.empty_like(x)"):
        scope = {"__name__": "flexmore_kernels.planted", "torch": torch, "x": torch.zeros(3)}
        assert eval(make, scope).isnan().all(), make
    scope["x"] = torch.zeros(3, dtype=torch.int32)
    assert (eval("torch.empty_like(x)", scope) < 0).all()


def test_torch_leaves_its_deterministic_mode_after_a_library_kernel():
    if not native.available():
        pytest.skip(f"no library: {native.why_not()}")
    from flexmore_kernels._native import permutation

    permutation.unpermute(torch.zeros(4, 3), SLOT_TO_ROW, None, None)
    with pytest.raises(RuntimeError):
        permutation.unpermute(torch.zeros(4, 3), SLOT_TO_ROW.long(), None, None)
    assert not torch.are_deterministic_algorithms_enabled()

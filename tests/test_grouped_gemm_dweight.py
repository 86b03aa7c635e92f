"""The raw gradients of matrices that multiply rows by expert: left^T right over an expert's rows.

Traps covered: segments that end anywhere, beside NaN of others' rows and of memory that nobody
wrote; experts without rows; results of less than a tile, of many, and with rows apart; rows in
parts. Triton's kernel in the interpreter (float32) and on a GPU, the compiled library's on Hopper.
"""

from __future__ import annotations

import pytest
import torch
from common import skip_interpreted, some_plan

from flexmore_kernels import backend, ops, testing
from flexmore_kernels.ragged import SEGMENT, SORTED, RowGrads
from flexmore_kernels.testing import assert_accurate, assert_same

RAW = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (64, 136), (8, 520), (136, 64), (264, 128), (136, 264), (264, 776), (64, 1032), (72, 8),
)  # fmt: skip
INTERPRETED = ((64, 136), (264, 72), (72, 8))


def module_for(device: str, dtype: torch.dtype):
    """The raw kernels that a backward would take."""
    x = torch.empty(1, device=device, dtype=dtype)
    module = backend.hopper("grouped_gemm", x) or backend.kernels("grouped_gemm", x)
    if not hasattr(module, "weight_grads"):
        pytest.skip("without Triton each gradient is a product of its own")
    return module


def sizes_for(kernels: str, device: str):
    interpreted = kernels == "triton" and device == "cpu"
    return INTERPRETED if interpreted else SHAPES, 90 if interpreted else 700


def some_work(plan, shapes, device: str, dtype: torch.dtype):
    """Of each expert and shape an item in every mix of places, and what is right for it."""
    offsets, N = plan.row_offsets.tolist(), plan.num_rows
    work, truth, same = [], [], []
    for at, (height, width) in enumerate(shapes):
        given = {}
        for name, size in (("left", height), ("right", width)):
            given[name] = testing.make_x(N, size, device, dtype)
            given[name][offsets[-1] :] = torch.nan
        for e in range(plan.num_experts):
            rows = slice(offsets[e], offsets[e + 1])
            places = ((SORTED, SEGMENT)[(at + e) % 2], (SORTED, SEGMENT)[(at + e) // 2 % 2])
            operands = []
            for (name, size), place in zip(
                (("left", height), ("right", width)), places, strict=True
            ):
                operand = given[name]
                if place == SEGMENT:
                    operand = torch.full((plan.num_tokens, size), torch.nan).to(device, dtype)
                    operand[: rows.stop - rows.start] = given[name][rows]
                operands.append(operand)
            out = torch.full((height, width + 8), 7.0, device=device, dtype=dtype)
            work.append(RowGrads(e, out[:, :width], *operands, *places))
            left, right = (given[name][rows] for name in ("left", "right"))
            truth.append(left.double().T @ right.double())
            same.append(left.T @ right)
    return work, truth, same


@pytest.mark.parametrize("dtype", RAW, ids=str)
def test_weight_grads(dtype, device, kernels):
    skip_interpreted(kernels, device, dtype)
    module = module_for(device, dtype)
    shapes, tokens = sizes_for(kernels, device)
    plan = some_plan(device, tokens, 5, 2)
    work, truth, same = some_work(plan, shapes, device, dtype)
    module.weight_grads(work, plan)
    for item, ref64, plain in zip(work, truth, same, strict=True):
        assert_accurate(item.out, ref64, plain, f"expert {item.expert}, {tuple(ref64.shape)}")
        whole = item.out.as_strided((len(ref64), ref64.shape[1] + 8), (ref64.shape[1] + 8, 1))
        assert (whole[:, -8:] == 7).all()  # nothing beside it was written


@pytest.mark.parametrize("ends", (0, 1, 63, 64, 65, 128, 300))
def test_where_a_segment_ends(ends, device, kernels):
    """The next expert's rows hold NaN, and an expert may have no row, or all."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    module = module_for(device, dtype)
    ids = torch.tensor([[0]] * ends + [[1]] * (300 - ends)).to(device)
    plan = ops.make_plan(ids, 2)
    left, right = testing.make_x(300, 72, device, dtype), testing.make_x(300, 136, device, dtype)
    for e, rows in enumerate((slice(0, ends), slice(ends, 300))):
        given = []
        for operand in (left, right):
            others = operand.clone()
            others[:] = torch.nan
            others[rows] = operand[rows]
            given.append(others)
        out = torch.full((72, 136), torch.nan, device=device, dtype=dtype)
        module.weight_grads([RowGrads(e, out, *given)], plan)
        assert_accurate(
            out, left[rows].double().T @ right[rows].double(), left[rows].T @ right[rows]
        )


@pytest.mark.parametrize("dtype", RAW, ids=str)
def test_all_rows(dtype, device, kernels):
    skip_interpreted(kernels, device, dtype)
    module, plan = module_for(device, dtype), some_plan(device)
    for rows, height, width in ((0, 64, 64), (1, 64, 72), (200, 136, 328)):
        left = testing.make_x(rows, height, device, dtype)
        right = testing.make_x(rows, width, device, dtype)
        out = torch.full((height, width), torch.nan, device=device, dtype=dtype)
        module.weight_grads([RowGrads(-1, out, left, right)], plan)
        assert_accurate(out, left.double().T @ right.double(), left.T @ right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("parts", (1, 2, 5, 16))
@pytest.mark.parametrize("dtype", RAW[1:], ids=str)
def test_rows_in_parts(parts, dtype):
    """Hopper's kernel: any number of parts, also more than there are steps; the same bits again."""
    module = backend.hopper("grouped_gemm", torch.empty(1, device="cuda", dtype=dtype))
    if module is None:
        pytest.skip("needs the compiled library on Hopper")
    plan = some_plan("cuda", 700, 5, 2)
    work, truth, same = some_work(plan, SHAPES, "cuda", dtype)
    module.weight_grads(work, plan, parts)
    for item, ref64, plain in zip(work, truth, same, strict=True):
        assert_accurate(item.out, ref64, plain, f"expert {item.expert}, {tuple(ref64.shape)}")
    first = [item.out.clone() for item in work]
    module.weight_grads(work, plan, parts)
    for item, before in zip(work, first, strict=True):
        assert_same(item.out, before)

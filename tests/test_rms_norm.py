"""RMSNorm, with and without the residual: the order of precision, rows of any width, gradients."""

from __future__ import annotations

import pytest
import torch
from common import skip_narrow

import reference.rms_norm as reference
from flexmore_kernels import testing
from flexmore_kernels.ops.rms_norm import rms_norm

EPS = 1e-5
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", (False, True))
@pytest.mark.parametrize("shape", ((5, 37), (2, 3, 64), (1, 1, 700), (0, 16), (3, 1)), ids=str)
def test_forward(shape, with_residual, dtype, device, kernels):
    skip_narrow(kernels, device, dtype)
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    x, residual = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(2))
    x = x * 3
    weight = torch.rand(shape[-1], dtype=torch.float64).to(device, dtype)
    residual = residual if with_residual else None
    y = rms_norm(x, weight, EPS, residual)
    assert y.dtype == dtype and y.shape == x.shape
    exact = reference.rms_norm(
        *testing.to_float64((x, weight)),
        EPS,
        *testing.to_float64([residual] if with_residual else []),
    )
    testing.assert_accurate(y, exact, reference.rms_norm(x, weight, EPS, residual))


def test_rows_that_do_not_lie_end_to_end(kernels):
    x, weight = torch.randn(4, 6, 20), torch.rand(20)
    part, residual = x[:, -2:], x.transpose(0, 1)[:4, :2]
    y = rms_norm(part, weight, EPS, residual)
    testing.assert_same(y, rms_norm(part.contiguous(), weight, EPS, residual.contiguous()))


def test_gradients_and_compilation_take_plain_pytorch():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    given = [t.requires_grad_() for t in (x, weight, torch.randn_like(x))]
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, EPS, r), given)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        testing.assert_same(compiled(x, weight, EPS, x), rms_norm(x, weight, EPS, x))


def test_weights_of_another_dtype():
    x, weight = torch.randn(3, 8).bfloat16(), torch.rand(8)
    y = rms_norm(x, weight, EPS)
    assert y.dtype == torch.bfloat16
    testing.assert_accurate(
        y, reference.rms_norm(x.double(), weight.double(), EPS), reference.rms_norm(x, weight, EPS)
    )

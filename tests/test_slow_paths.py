"""Each reason why something runs slower than it could is said once, and what is promised is not."""

from __future__ import annotations

import warnings

import pytest
import torch

import flexmore_kernels as fk
from flexmore_kernels import backend, native, ops, slow_paths
from flexmore_kernels.projection import FULL, Projection
from flexmore_kernels.testing import make_weight, make_x
from tests.common import some_plan


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    """Each test as in a new process, and nothing that it caches is kept."""
    caches = (backend._available, backend._warn_where_slow)
    monkeypatch.setattr(slow_paths, "_said", set())
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def said(call) -> list[str]:
    """The warnings of a call, which must all be of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert {w.category for w in caught} <= {fk.SlowPathWarning}
    return [str(w.message) for w in caught]


def some_layer(device="cpu", **kwargs) -> fk.FlexMoRE:
    return fk.FlexMoRE(16, 24, (0, 2, 3), 2, device=device, **kwargs)


def test_what_an_install_promises_runs_without_a_word(device):
    layer, x = some_layer(device), make_x(5, 16, device).requires_grad_()
    assert said(lambda: layer(x).sum().backward()) == []


def test_strided_rows_are_said_once(device):
    layer, x = some_layer(device), make_x(5, 32, device)[:, ::2]
    (message,) = said(lambda: layer(x))
    assert message.startswith("x of shape (5, 16) is copied at each call") and "(32, 2)" in message
    assert said(lambda: layer(x)) == []


def test_every_op_says_what_it_copies(device):
    plan = some_plan(device, tokens=6, experts=4, top_k=3)
    wide = make_x(18, 32, device)[:, ::2]
    assert "x of" in said(lambda: ops.permute(wide[:6], plan))[0]
    stack = torch.randn(4, 16, 8, device=device).transpose(1, 2)
    assert "weight of" in said(lambda: ops.grouped_gemm(wide.contiguous(), stack, plan))[0]
    assert "logits of" in said(lambda: ops.topk_route(wide, top_k=2))[0]


def test_gradients_are_nobody_s_fault(device):
    """A sum's gradient has stride 0: the user did not make it."""
    plan = some_plan(device, tokens=6, experts=4, top_k=3)
    x, weights = make_x(6, 16, device).requires_grad_(), torch.rand(6, 3, device=device)
    ranks, a = (0, 2, 3, 1), make_weight(6, 16, device).requires_grad_()

    def run():
        rows = ops.permute(x, plan)
        ops.unpermute(rows, plan, weights).sum().backward(retain_graph=True)
        ops.unpermute(rows, plan).sum().backward(retain_graph=True)
        z = ops.shrink(rows, a, plan, ranks)
        z.sum().backward(retain_graph=True)
        ops.expand(z, make_weight(24, 6, device), plan, ranks).sum().backward(retain_graph=True)
        ops.grouped_gemm(rows, make_weight(4 * 8, 16, device).view(4, 8, 16), plan).sum().backward()

    assert said(run) == []


def test_warning_breaks_no_graph(device):
    layer, x = some_layer(device), make_x(5, 32, device)[:, ::2]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert len(said(lambda: compiled(x))) == 1
    assert said(lambda: compiled(x)) == []


def test_warning_can_be_an_error_or_be_silenced():
    x, layer = make_x(5, 32)[:, ::2], some_layer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fk.SlowPathWarning)
        layer(x)
    slow_paths._said.clear()
    with pytest.raises(fk.SlowPathWarning), warnings.catch_warnings():
        warnings.simplefilter("error", fk.SlowPathWarning)
        layer(x)


def test_missing_library_is_said_on_a_cpu(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: "not built: no C++ compiler")
    monkeypatch.setattr(native, "built", lambda: False)
    (message,) = said(lambda: some_layer()(make_x(5, 16)))
    assert "not used (not built: no C++ compiler)" in message and "Install again" in message


def test_broken_library_is_said_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: "does not load with torch 2.11: symbol x")
    (message,) = said(lambda: backend._warn_where_slow("routing", "triton", "cuda"))
    assert "does not load" in message


def test_gpu_without_library_is_promised(monkeypatch):
    """Python and Triton alone: what README offers where there is no compiler or no nvcc."""
    monkeypatch.setattr(native, "built", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "not built: no C++ compiler")
    assert said(lambda: backend._warn_where_slow("routing", "triton", "cuda")) == []
    monkeypatch.setattr(native, "why_not", lambda: None)
    monkeypatch.setattr(native, "cuda_built", lambda: False)
    assert said(lambda: backend._warn_where_slow("routing", "triton", "cuda")) == []


def test_kernels_of_another_gpu_are_said(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: None)
    monkeypatch.setattr(native, "cuda_built", lambda: True)
    monkeypatch.setattr(native, "cuda_runs_on", lambda: False)
    monkeypatch.setattr(native, "why_not_cuda", lambda index: "no code in it for sm_75")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    (message,) = said(lambda: backend._warn_where_slow("routing", "triton", "cuda"))
    assert "no code in it for sm_75" in message and "TORCH_CUDA_ARCH_LIST" in message
    assert said(lambda: backend._warn_where_slow("permutation", "triton", "cuda")) == []


def test_missing_triton_is_said():
    (message,) = said(lambda: backend._warn_where_slow("lowrank", "aten", "cuda"))
    assert "pip install triton" in message


def test_chosen_kernels_are_not_commented():
    with backend.use("aten"):
        assert said(lambda: some_layer()(make_x(5, 16))) == []


@pytest.mark.parametrize(("ranks", "words"), [((0, 16, 32), 0), ((0, 16, 3), 1)])
def test_padded_stacks_are_said(ranks, words):
    total = sum(ranks)
    pair = (torch.zeros(total, 8), torch.zeros(6, total))
    side = Projection((torch.zeros(6, 8), None, None), (pair,), (FULL, *ranks[1:]), True)
    assert len(said(lambda: side.pack_a(16))) == words

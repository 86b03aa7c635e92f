"""layer.prepare(): the same function, faster to serve; nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from common import skip_narrow

import reference
from flexmore_kernels import FlexMoRE, SlowPathWarning, slow_paths, testing
from flexmore_kernels.checkpoint import expert_weights
from flexmore_kernels.preparation import merged_weight
from flexmore_kernels.ragged import StackedFactors

RANKS = (0, 3, 24, 0, (5, 0, "full"), (0, 17, 2))
D, F, K = 32, 48, 3
MERGES = (None, "auto", 16, [1, 4], 0)
stacked_or_apart = pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])


def make(stacked=False, device="cpu", dtype=torch.float32, ranks=RANKS):
    layer = FlexMoRE(D, F, ranks, K, stacked_factors=stacked, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return layer


def twin(layer, dtype) -> reference.FlexMoRE:
    """The reference with the layer's weights."""
    ours = reference.FlexMoRE(D, F, layer.expert_ranks, K, dtype=layer.gate.weight.dtype)
    ours.load_state_dict(layer.state_dict())
    return ours.to(layer.gate.weight.device, dtype)


@pytest.mark.parametrize("merge", MERGES, ids=str)
@stacked_or_apart
def test_prepared_layer_computes_the_same(merge, stacked, device, kernels):
    """Merging moves a rounding from the activations into W + B A: the rule is the layer's own."""
    if (kernels, device) == ("triton", "cpu") and merge not in (None, "auto"):
        pytest.skip("in the interpreter, which is slow: nothing and what is chosen")
    layer, x = make(stacked, device), testing.make_x(90, D, device)
    truth = twin(layer, torch.float64)(x.double())
    same = twin(layer, torch.float32)(x)
    with torch.no_grad():
        plain = layer(x)
        layer.prepare(merge=merge)
        prepared = layer(x)
        testing.assert_accurate(prepared, truth, same)
        testing.assert_same(prepared, layer(x))
        layer.unprepare()
        testing.assert_same(layer(x), plain)


@pytest.mark.parametrize("merge", [None, 16, 0], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prepared_layer_in_half_precision(dtype, merge, device, kernels):
    """Given the routing; merged matrices are rounded once more than factors, within the rule."""
    skip_narrow(kernels, device, dtype)
    layer, x = make(device=device, dtype=dtype), testing.make_x(90, D, device, dtype)
    weights = expert_weights(layer.state_dict(), layer.expert_ranks)
    with torch.no_grad():
        layer.prepare(merge=merge)
        y, routing = layer(x, return_routing=True)
    given = (x, routing.indices, routing.weights, *weights)
    truth = reference.experts(*testing.to_float64(given))
    testing.assert_accurate(y, truth, reference.experts(*given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merged_weight_is_rounded_once(dtype, device):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 runs on the CPU only")
    base = testing.make_weight(1500, 40, device, dtype)
    a, b = testing.make_pair(1500, 40, 24, device, dtype)
    exact = base.double() + b.double() @ a.double()
    same = (base.double() + b.double() @ a.double()).to(dtype)
    testing.assert_accurate(merged_weight(base, a, b), exact, same)


def test_what_is_merged():
    layer = make()
    assert layer.prepare(merge=16).merged == (2, 5)
    assert layer.prepare(merge=[2, 3]).merged == (2,)  # 3 is full-size
    assert layer.prepare(merge=None).merged == ()
    # D F / (D + F) = 19.2: by operations, where no measurement of the device says otherwise.
    done = layer.prepare()
    assert done.merged == (2,) and done.packed == (1, 4, 5)
    assert done.nbytes == sum(buffer.nbytes for buffer in layer.buffers())
    assert str(done).startswith("prepared: merged expert 2, packed experts 1, 4-5; 0.0 MB beside")
    layer.unprepare()
    assert list(layer.buffers()) == []


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("all", "merge: got 'all'; accepted"),
        (-1, "merge: got -1"),
        (1.5, "merge: got 1.5"),
        ([6], r"merge\[0\]: got 6"),
    ],
)
def test_prepare_refuses(merge, message):
    layer = make()
    with pytest.raises((ValueError, TypeError), match=message):
        layer.prepare(merge=merge)
    assert "prepared" not in dict(layer.named_children())


@stacked_or_apart
def test_state_dict_is_the_same_before_while_and_after(stacked):
    layer = make(stacked)
    names = [name for name, _ in layer.named_parameters()]
    before = {key: value.clone() for key, value in layer.state_dict().items()}

    def unchanged():
        now = layer.state_dict()
        assert list(now) == list(before)
        for key, value in before.items():
            testing.assert_same(now[key], value, key)
        assert [name for name, _ in layer.named_parameters()] == names

    layer.prepare(merge=0)
    unchanged()
    with torch.no_grad():
        layer(testing.make_x(5, D))
    unchanged()
    layer.unprepare()
    unchanged()


@pytest.mark.parametrize("assign", [False, True])
@stacked_or_apart
def test_loading_unprepares(assign, stacked):
    layer, other, x = make(stacked), make(not stacked), testing.make_x(99, D)
    layer.prepare(merge=0)
    layer.load_state_dict(other.state_dict(), assign=assign)
    with torch.no_grad():
        new = make(stacked)
        new.load_state_dict(other.state_dict())
        testing.assert_same(layer(x), new(x))
    assert list(layer.buffers()) == []


WRITES = {
    "in place": lambda weight: weight.mul_(1.1),
    "an optimizer": lambda weight: torch.optim.AdamW([weight], lr=0.1).step(),
    "data replaced": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", ["1.gate_proj_a", "2.down_proj_b", "5.up_proj_a", "0.up_proj"])
def test_stale_copies_are_refused(name, write):
    """A written factor, and the base where something is merged into it."""
    layer, x = make(), testing.make_x(99, D)
    layer.prepare(merge=16)
    weight = layer.experts.get_submodule(name).weight
    weight.grad = torch.ones_like(weight)
    with torch.no_grad():
        WRITES[write](weight)
        with pytest.raises(RuntimeError, match=r"changed after layer.prepare\(\)"):
            layer(x)
        layer.prepare(merge=16)
        fresh = layer(x)
        layer.unprepare()
        torch.testing.assert_close(fresh, layer(x))


@pytest.mark.parametrize(("merge", "taken"), [([1], "live"), ([2], "merged"), (None, "packed")])
def test_few_tokens_take_what_is_fewer_bytes(merge, taken):
    """D F / (D + F) = 19.2: expert 1 is of rank 3, expert 2 of rank 24."""
    layer = make().requires_grad_(False)
    layer.prepare(merge=merge)
    few, many = (layer._expert_weights(testing.make_x(n, D))[0] for n in (64, 65))
    assert isinstance(many, StackedFactors) and isinstance(few, list) == (taken == "live")
    assert taken == "live" or (few.full[2] is None) == (taken == "packed")


def test_what_is_not_copied_may_change():
    layer, x = make(), testing.make_x(99, D)
    layer.prepare(merge=None)
    with torch.no_grad():
        for weight in (layer.gate.weight, *layer.experts.full("gate_proj")):
            if weight is not None:
                weight.mul_(1.1)
        prepared = layer(x)
        layer.unprepare()
        torch.testing.assert_close(prepared, layer(x))


def test_copies_start_unprepared():
    layer, x = make(), testing.make_x(99, D)
    layer.prepare(merge=16)
    with torch.no_grad():
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert list(other.buffers()) == []
            torch.testing.assert_close(other(x), layer(x))
            other.prepare(merge=16)
            testing.assert_same(other(x), layer(x))
        assert list(layer.buffers())


@stacked_or_apart
def test_moving_and_casting_prepares_again(stacked):
    layer, x = make(stacked), testing.make_x(99, D)
    layer.prepare(merge=16)
    kept = list(layer.buffers())
    layer.to("cpu")
    assert all(a is b for a, b in zip(kept, layer.buffers(), strict=True))
    layer.double()
    fresh = copy.deepcopy(layer)
    fresh.prepare(merge=16)
    with torch.no_grad():
        testing.assert_same(layer(x.double()), fresh(x.double()))


@stacked_or_apart
def test_training_unprepares(stacked, monkeypatch):
    layer, x = make(stacked), testing.make_x(99, D)
    layer(x).sum().backward()
    wanted = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer.prepare(merge=0)
    monkeypatch.setattr(slow_paths, "_said", set())
    with pytest.warns(SlowPathWarning, match="which unprepared it"):
        layer(x).sum().backward()
    assert list(layer.buffers()) == []
    for name, parameter in layer.named_parameters():
        if name in wanted:
            testing.assert_same(parameter.grad, wanted[name], name)


@stacked_or_apart
def test_frozen_experts_serve_prepared_and_pass_gradients_on(stacked, device, kernels):
    layer = make(stacked, device).requires_grad_(False)
    x = testing.make_x(99, D, device).requires_grad_()
    wide = x.detach().double().requires_grad_()
    truth = torch.autograd.grad(twin(layer, torch.float64)(wide).sum(), wide)[0]
    same = torch.autograd.grad(twin(layer, torch.float32)(x).sum(), x)[0]
    with torch.inference_mode():
        layer.prepare(merge=16)
    testing.assert_accurate(torch.autograd.grad(layer(x).sum(), x)[0], truth, same)


@stacked_or_apart
def test_prepared_layer_compiles_to_one_graph(stacked):
    layer, x = make(stacked), testing.make_x(99, D)
    layer.prepare(merge=16)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        testing.assert_same(compiled(x), layer(x))


def test_float32_factors_are_cast_once():
    layer, x = make(dtype=torch.bfloat16), testing.make_x(99, D, dtype=torch.bfloat16)
    for name, parameter in layer.experts.named_parameters():
        if name.endswith(("_a.weight", "_b.weight")):
            parameter.data = parameter.data.float()
    with torch.no_grad():
        plain = layer(x)
        layer.prepare(merge=None)
        assert {buffer.dtype for buffer in layer.buffers()} == {torch.bfloat16}
        testing.assert_same(layer(x), plain)


def test_aligned_stacks_are_read_in_place():
    assert make(True, ranks=(0, 4, 8)).prepare(merge=None).nbytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("merge", [None, 16, 0])
@pytest.mark.parametrize(
    "ranks", [RANKS, (0, *[16] * 20), (0, 16, 16)], ids=["mixed", "20", "small"]
)
def test_prepared_layer_in_a_cuda_graph(ranks, merge):
    """Routing changes between replays; the buffers stay where they are."""
    layer = make(device="cuda", dtype=torch.bfloat16, ranks=ranks)
    x = testing.make_x(70, D, "cuda", torch.bfloat16)
    with torch.no_grad():
        layer.prepare(merge=merge)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            testing.assert_same(y, layer(x))
            assert y.isfinite().all()

"""The layer against the reference: values, gradients, shapes, masks, compilation.

Traps covered: every named case, with the factors apart and stacked; the layer's own output (a later
norm would hide the scale of the routing weights); leading dimensions and strides; fewer experts
allowed than asked for, and an excluded one whose logit would win; one graph for all T.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import flexmore_kernels as fk
import reference
from flexmore_kernels import testing
from flexmore_kernels.checks import SCORINGS
from flexmore_kernels.testing import CASE_IDS, CASES, assert_accurate

RANKS = (0, 3, (2, 0, "full"), 0, (0, 0, 0))


def fill(layer, seed=0):
    """Non-zero everywhere, B included; the size of a signal is kept."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            scale = parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return layer


def make(ranks=RANKS, top_k=3, hidden=16, intermediate=24, device="cpu", seed=0, **options):
    return fill(fk.FlexMoRE(hidden, intermediate, ranks, top_k, device=device, **options), seed)


def twin(layer, dtype=None, **options):
    """The reference layer of the same weights and options."""
    same = ("norm_topk_prob", "scoring", "router_dtype")
    options = {name: getattr(layer, name) for name in same} | options
    copy = reference.FlexMoRE(
        layer.hidden_size,
        layer.intermediate_size,
        layer.expert_ranks,
        layer.top_k,
        expert_bias=layer.gate.expert_bias is not None,
        device=layer.gate.weight.device,
        **options,
    )
    copy.load_state_dict(layer.state_dict(), assign=True)
    return copy if dtype is None else copy.to(dtype)


def gradients(layer, x, dy):
    """y, dx and the parameters' gradients by their state_dict names."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy.to(y.dtype))
    named = layer.state_dict(keep_vars=True)
    grads = {"y": y.detach(), "dx": leaf.grad}
    if isinstance(layer.experts, fk.storage.StackedExperts):
        for parameter in layer.parameters():
            # The slices of a stack share its gradient: let them carry it.
            parameter.data, parameter.grad = parameter.grad, None
        return grads | {name: t.detach() for name, t in layer.state_dict().items()}
    zeros = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    return grads | zeros


STACKED = [CASES[CASE_IDS.index(n)] for n in ("ragged_ranks", "triples", "many_experts")]


@pytest.mark.parametrize(
    ("case", "stacked"),
    [pytest.param(case, False, id=case.name) for case in CASES]
    + [pytest.param(case, True, id=f"{case.name}-stacked") for case in STACKED],
)
def test_layer_forward_and_backward(case, stacked, device, kernels):
    """In float64; on a GPU, where the layer takes none, in float32 over draws scaled alike.

    There the router's gradients are left to the ops' tests: small differences of large numbers.
    """
    groups = ("y", "dx", "_proj_a", "_proj_b", "_proj.")
    dtype, count = torch.float32, 20
    if device == "cpu":
        groups, dtype, count = (*groups, "gate.weight", "gate.expert_bias"), torch.float64, 1

    def grouped(layer, x, dy):
        # One group's gradients together: a tensor of two or three numbers may be lucky.
        grads = sorted(gradients(layer, x, dy).items())
        parts = [[t.flatten() for name, t in grads if group in name] for group in groups]
        return [torch.cat(part or [dy[:0].flatten()]) for part in parts]

    draws = []
    for seed in range(count):
        layer = make(
            case.ranks, case.top_k, case.hidden, case.intermediate, device,
            expert_bias=True, stacked_factors=stacked, seed=seed, dtype=dtype,
        )  # fmt: skip
        x = testing.make_x(case.tokens, case.hidden, device, dtype)
        dy = torch.randn_like(x)
        truth = grouped(twin(layer, torch.float64), x.double(), dy)
        same, ours = grouped(twin(layer), x, dy), grouped(layer, x, dy)
        scales = [2.0 ** -math.frexp(t.norm().item())[1] for t in truth]
        draws.append([[a * b for a, b in zip(p, scales, strict=True)] for p in (ours, truth, same)])
    for index, group in enumerate(groups):
        columns = zip(*([part[index] for part in draw] for draw in draws), strict=True)
        testing.assert_accurate_draws(*columns, name=group)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_layer_scoring(scoring, norm, device, kernels):
    layer = make(device=device, scoring=scoring, norm_topk_prob=norm, expert_bias=True)
    assert f"scoring={scoring!r}" in repr(layer)
    truth, same = [], []
    for _ in range(8):
        x, dy = testing.make_x(33, 16, device), testing.make_x(33, 16, device)
        truth.append(gradients(twin(layer, torch.float64), x.double(), dy))
        same.append(gradients(twin(layer), x, dy))
    ours = gradients(layer, x, dy)
    for name in ("y", "dx", "gate.weight", "gate.expert_bias"):
        columns = ([draw[name] for draw in draws] for draws in ([ours], truth, same))
        testing.assert_accurate_draws(*columns, name=name)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_layer_gradcheck(scoring, norm):
    layer = make((0, 2, (1, "full", 0)), 2, 4, 5, dtype=torch.float64, expert_bias=True,
                 norm_topk_prob=norm, scoring=scoring)  # fmt: skip
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = testing.make_x(5, 4, dtype=torch.float64).requires_grad_()

    def function(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


def test_layer_shapes_and_strides(device):
    layer = make(device=device)
    x = testing.make_x(30, 16, device)
    y = layer(x)
    testing.assert_same(layer(x.view(2, 3, 5, 16)), y.view(2, 3, 5, 16))
    testing.assert_same(layer(x[4]), layer(x[4:5])[0])
    spread = torch.zeros(30, 3, 32, device=device)[:, 1, ::2].copy_(x)
    testing.assert_same(layer(spread), y)
    testing.assert_same(layer(x.T.contiguous().T), y)
    assert layer(x.view(2, 15, 16)[:, :0]).shape == (2, 0, 16)
    before = x.clone()
    _, routing = layer(x.view(2, 15, 16), return_routing=True)
    testing.assert_same(x, before)
    assert [tuple(part.shape) for part in routing] == [(2, 15, 5), (2, 15, 3), (2, 15, 3)]
    assert routing.indices.dtype == torch.int64 and routing.weights.dtype == torch.float32


def test_layer_mask(device, kernels):
    layer = make(device=device)
    x = testing.make_x(40, 16, device)
    mask = torch.rand(40, 5, device=device) > 0.6
    mask[:, 1] |= ~mask.any(1)
    y, routing = layer(x, expert_mask=mask, return_routing=True)
    chosen = torch.zeros(40, 6, dtype=torch.bool, device=device)
    chosen.scatter_(1, routing.indices, True)
    assert not (chosen[:, :5] & ~mask).any()
    testing.assert_same(chosen[:, :5].sum(1), mask.sum(1).clamp(max=3))
    assert (routing.weights[routing.indices == 5] == 0).all()
    wide = twin(layer, torch.float64)(x.double(), expert_mask=mask)
    assert_accurate(y, wide.detach(), twin(layer)(x, expert_mask=mask).detach())
    shared = layer(x, expert_mask=mask[0])
    testing.assert_same(layer(x, expert_mask=mask[:1].expand(40, 5)), shared)
    testing.assert_same(layer(x.view(8, 5, 16), expert_mask=mask.view(8, 5, 5)).view(40, 16), y)


def test_layer_mask_of_the_winner(device, kernels):
    """The excluded expert's logit is so large that all others' share of a whole softmax is 0."""
    layer = make(device=device, top_k=2)
    with torch.no_grad():
        layer.gate.weight[3] = 1000 * layer.gate.weight[0]
    x = testing.make_x(20, 16, device)
    x = x * (x @ layer.gate.weight[0]).sign().detach()[:, None]
    mask = torch.tensor([True, True, True, False, True], device=device)
    y, routing = layer(x, expert_mask=mask, return_routing=True)
    assert (routing.indices != 3).all() and (routing.indices < 5).all()
    assert (routing.weights.sum(1) > 0.2).all()
    wide = twin(layer, torch.float64)(x.double(), expert_mask=mask)
    assert_accurate(y, wide.detach(), twin(layer)(x, expert_mask=mask).detach())


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
def test_layer_compiles_to_one_graph(stacked, device):
    torch._dynamo.reset()
    layer = make(device=device, stacked_factors=stacked, expert_bias=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (6, 40, 1, 17, 64):
        x = testing.make_x(tokens, 16, device).requires_grad_()
        y, eager = compiled(x), layer(x)
        testing.assert_same(y, eager)
        dy = torch.randn_like(y)
        pairs = [torch.autograd.grad(out, (x, layer.gate.weight), dy) for out in (y, eager)]
        for mine, other in zip(*pairs, strict=True):
            assert_accurate(mine, other.double(), other)
    assert counter.frame_count <= 3, "more than two recompiles"
    masked = counter.frame_count
    for tokens in (9, 12, 33):  # the first mask comes when the number of tokens varies already
        x, mask = (
            testing.make_x(tokens, 16, device),
            torch.rand(tokens, len(RANKS), device=device) < 0.5,
        )
        mask[:, 0] = True
        testing.assert_same(compiled(x, expert_mask=mask), layer(x, expert_mask=mask))
    assert counter.frame_count <= masked + 3, "more than two recompiles with a mask"


def test_layer_from_dense_starts_as_the_dense_ffn(device):
    gate, up = (testing.make_weight(24, 16, device) for _ in range(2))
    down = testing.make_weight(16, 24, device)
    layer = fk.FlexMoRE.from_dense(gate, up, down, RANKS, 3, norm_topk_prob=True)
    assert layer.gate.weight.device.type == device and layer.experts[3].up_proj.weight is not up
    x = testing.make_x(20, 16, device)

    def dense(*tensors):
        x, gate, up, down = tensors
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    wide = dense(*(t.double() for t in (x, gate, up, down)))
    # Not the layer's twin: it would copy what the layer made of the three matrices.
    plain = reference.FlexMoRE.from_dense(gate, up, down, RANKS, 3, norm_topk_prob=True)
    plain.gate.load_state_dict(layer.gate.state_dict())
    assert_accurate(layer(x), wide, plain(x).detach())
    wider = fk.FlexMoRE.from_dense(gate, up, down, [0, 2], 1, dtype=torch.bfloat16)
    assert {p.dtype for p in wider.parameters()} == {torch.bfloat16}


def test_layer_top_k_may_change(device):
    """The published a2, a4 and a7 models differ in nothing else."""
    layer, x = make(device=device), testing.make_x(20, 16, device)
    for top_k in (1, 5):
        layer.top_k = top_k
        y, routing = layer(x, return_routing=True)
        assert routing.indices.shape == (20, top_k)
        truth = twin(layer, torch.float64)(x.double()).detach()
        assert_accurate(y, truth, twin(layer)(x).detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("ranks", (RANKS, (0, 16, 16, 64, 16)), ids=("mixed", "few_small"))
def test_layer_training_step_captured_in_a_cuda_graph(ranks):
    """Forward and backward, replayed on tokens that choose other experts."""
    layer = make(ranks, 3, 64, 96, "cuda", dtype=torch.bfloat16)
    x = testing.make_x(40, 64, "cuda", torch.bfloat16).requires_grad_()
    inputs = (x, *layer.parameters())

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(testing.make_x(40, 64, "cuda", torch.bfloat16))
    graph.replay()
    for replayed, now in zip(captured, step(), strict=True):
        testing.assert_same(replayed, now)

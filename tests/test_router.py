"""Routers: rows that are projected from domain embeddings, and what is kept of them.

Traps covered: kept rows after each kind of write (in place, loading, casting, a step of training),
rows kept while gradients flow, another dtype, a layer that is copied, the projector's gradient.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

import flexmore_kernels as fk
import reference
from flexmore_kernels.router import ProjectedRouter
from flexmore_kernels.testing import assert_accurate, assert_same

SIZES = {"hidden_size": 24, "intermediate_size": 40, "expert_ranks": [0, 3, (2, 0, "full"), 0]}
PROJECTED = {**SIZES, "top_k": 2, "router": "projected", "domain_embedding_size": 10}


def layers(dtype=torch.float32, device="cpu", **options):
    """The layer and its reference with the same weights; embeddings of about length 1."""
    options = {**PROJECTED, **options}
    theirs = reference.FlexMoRE(**options, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("_b.weight"):
                parameter.normal_(std=0.1)
        theirs.gate.projector_out.weight.mul_(50)  # far from even
        theirs.gate.domain_embeddings.normal_(std=theirs.gate.domain_embeddings.shape[1] ** -0.5)
    ours = fk.FlexMoRE(**options, dtype=dtype, device=device)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [None, 7])
def test_rows_and_gradients_match_the_reference(device, dtype, size):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 runs on the CPU")
    ours, theirs = layers(dtype, device, projector_size=size)
    theirs.load_state_dict({k: v.double() for k, v in ours.state_dict().items()})
    same = copy.deepcopy(theirs).to(device, dtype)
    cotangent = torch.randn(ours.gate.rows().shape, dtype=torch.float64)
    found = []
    for layer in (ours, theirs, same):
        rows = layer.gate.rows()
        weights = [layer.gate.projector_in.weight, layer.gate.projector_out.weight]
        found.append([rows, *torch.autograd.grad(rows, weights, cotangent.to(rows))])
    for name, mine, true, plain in zip(("rows", "W_1", "W_2"), *found, strict=True):
        assert_accurate(mine, true, plain, name=name)


def test_layer_gradcheck_through_the_projector():
    ours, _ = layers(torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    names = ["gate.projector_in.weight", "gate.projector_out.weight"]
    weights = [ours.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(x, *weights):
        parameters = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(ours, parameters, (x,))

    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("prepared", [False, True])
def test_equals_a_linear_router_with_the_same_rows(device, prepared):
    """To the bit, the rows kept or not."""
    ours, _ = layers(device=device)
    linear = fk.FlexMoRE(**SIZES, top_k=2, device=device)
    kept = {k: v for k, v in ours.state_dict().items() if not k.startswith("gate.")}
    linear.load_state_dict({**kept, "gate.weight": ours.gate.rows().detach()})
    if prepared:
        ours.prepare(None), linear.prepare(None)
    x = torch.randn(9, 24, device=device)
    with torch.inference_mode():
        (y, routing), (other, theirs) = (one(x, return_routing=True) for one in (ours, linear))
    for mine, same in zip((y, *routing), (other, *theirs), strict=True):
        assert_same(mine, same)


def writes():
    def in_place(layer):
        with torch.no_grad():
            layer.gate.projector_in.weight.mul_(2)

    def embeddings(layer):
        layer.gate.domain_embeddings[1] = 1.0

    def another_tensor(layer):
        layer.gate.projector_out.weight = torch.nn.Parameter(torch.randn(24, 24))

    def another_data(layer):
        layer.gate.projector_out.weight.data = torch.randn(24, 24)

    def loaded(layer):
        state = layer.gate.state_dict()
        layer.gate.load_state_dict({k: v * 2 for k, v in state.items()})

    def assigned(layer):
        state = layer.gate.state_dict()
        layer.gate.load_state_dict({k: v * 2 for k, v in state.items()}, assign=True)

    def cast(layer):
        layer.gate.to(torch.float64)

    def trained(layer):
        optimizer = torch.optim.SGD(layer.gate.parameters(), lr=1.0)
        layer(torch.randn(4, 24)).square().sum().backward()
        optimizer.step()

    return [in_place, embeddings, another_tensor, another_data, loaded, assigned, cast, trained]


@pytest.mark.parametrize("write", writes(), ids=lambda f: f.__name__)
def test_kept_rows_are_never_stale(write):
    layer, _ = layers()
    layer.gate.keep(True)
    with torch.no_grad():
        before = layer.gate.rows()
        assert layer.gate.rows() is before, "not kept"
    write(layer)
    with torch.no_grad():
        rows = layer.gate.rows()
    layer.gate.keep(False)
    assert not torch.equal(rows.double(), before.double())
    assert_same(rows, layer.gate.rows().detach(), name="rows")


def test_fused_step_after_a_forward_is_seen():
    """An optimizer whose writes are not counted, a validation between: the forward with gradients
    ended the keeping."""
    layer, _ = layers()
    layer.gate.keep(True)
    with torch.no_grad():
        before = layer.gate.rows()
    layer(torch.randn(4, 24)).sum().backward()
    with torch.no_grad():
        layer(torch.randn(4, 24))
    layer.gate.projector_out.weight.data.mul_(2)
    with torch.no_grad():
        assert_same(layer.gate.rows(), 2 * before, name="rows")


@pytest.mark.parametrize("swap", ["parameter", "assign", "data"])
def test_memory_that_is_used_again_is_not_taken_for_the_old(swap):
    """Two new tensors in a parameter's place: the second may lie where the first rows' source lay,
    written as often."""
    layer, _ = layers()
    gate = layer.gate
    gate.keep(True)
    for _ in range(20):
        with torch.no_grad():
            before = gate.rows().clone()
        for _ in range(2):
            new = torch.randn(24, 24)
            if swap == "parameter":
                gate.projector_out.weight = torch.nn.Parameter(new)
            elif swap == "assign":
                gate.projector_out.load_state_dict({"weight": new}, assign=True)
            else:
                gate.projector_out.weight.data = new
            del new
        with torch.no_grad():
            rows = gate.rows()
            assert not torch.equal(rows, before)
            assert_same(rows, gate._project())


def test_generations_side_by_side_leave_nothing_behind():
    config = fk.FlexMoREConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=2, num_experts_per_tok=1, expert_ranks=[0, 2],
        router="projected", domain_embedding_size=10,
    )  # fmt: skip
    model = fk.FlexMoREForCausalLM(config)
    gate, ids, seen = model.model.layers[0].mlp.gate, torch.randint(50, (1, 3)), []

    def stream(_):
        if not seen:
            seen.append(gate.rows())
            model.generate(ids, max_new_tokens=2)
            assert gate.rows() is seen[0], "a call within dropped the outer one's rows"

    with torch.no_grad():
        model.generate(ids, max_new_tokens=4, stream=stream)
        assert not gate.keeps and seen
        gate.keep(True)
        kept = gate.rows()
        model.generate(ids, max_new_tokens=4)
        assert gate.keeps and gate.rows() is kept, "a graph may read them"


def test_embeddings_of_a_wider_dtype():
    layer, _ = layers()
    layer.gate.to(torch.bfloat16)
    narrow = layer.gate.rows()
    layer.gate.domain_embeddings = layer.gate.domain_embeddings.float()
    assert_same(layer.gate.rows(), narrow)


def test_gradients_flow_where_rows_are_kept():
    layer, _ = layers()
    layer.gate.keep(True)
    with torch.no_grad():
        layer(torch.randn(4, 24))
    assert layer.gate._kept is not None
    layer(torch.randn(4, 24)).square().sum().backward()
    assert layer.gate.projector_in.weight.grad.abs().sum() > 0


def test_generate_keeps_rows_for_its_call_alone(monkeypatch):
    config = fk.FlexMoREConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_experts_per_tok=2, expert_ranks=[0, 2, 3],
        router="projected", domain_embedding_size=10,
    )  # fmt: skip
    model = fk.FlexMoREForCausalLM(config)
    made = []
    project = ProjectedRouter._project
    monkeypatch.setattr(
        ProjectedRouter, "_project", lambda self: (made.append(1), project(self))[1]
    )
    ids = torch.randint(50, (2, 3))
    model.generate(ids, max_new_tokens=6)
    assert len(made) == 2, "once a layer"
    model.generate(ids, max_new_tokens=6)
    assert len(made) == 4, "anew for another call"


def test_a_copy_does_not_share_rows():
    layer, _ = layers()
    layer.gate.keep(True)
    with torch.no_grad():
        layer.gate.rows()
        other = copy.deepcopy(layer)
        assert not other.gate.keeps
        other.gate.projector_out.weight.mul_(2)
        assert_same(other.gate.rows(), 2 * layer.gate.rows(), name="rows")


def test_compiled_layer_computes_rows(device):
    layer, _ = layers(device=device)
    layer.prepare(None)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(4, 24, device=device)
    with torch.no_grad():
        compiled(x)
        layer.gate.projector_out.weight.mul_(-1)
        assert_same(compiled(x), layer(x), name="y")


def test_initial_rows_have_a_linear_router_s_size():
    """std 0.02 for embeddings of length 1, by 256 x 8 entries: 2 % are 3 sigma."""
    router = ProjectedRouter(8, 256, False, (64, 512))
    router.reset_parameters()
    with torch.no_grad():
        router.domain_embeddings.normal_()
        router.domain_embeddings /= router.domain_embeddings.norm(dim=1, keepdim=True)
        std = float(router.rows().std())
    assert math.isclose(std, 0.02, rel_tol=0.1)


def test_state_dict_of_model_and_reference_agree():
    ours, theirs = layers(expert_bias=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert "gate.weight" not in ours.state_dict()

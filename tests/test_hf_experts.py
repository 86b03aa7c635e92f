"""`experts_implementation="flexmore"` on stock models: equal to transformers' own, both ways.

Traps covered: several families; K of E, one token, no token for an expert; the id E with weight 0
(expert parallelism), whose outputs and gradients are finite; autocast; frozen experts; modules that
compute something else.
"""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels import testing
from tests.hf_models import SIZES, filled, some_ids

transformers = pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("flexmore_kernels.hf")

FAMILIES = {
    "FlexOlmo": {"num_experts": 4},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": {"num_experts": 4},
}


def model_of(family, experts="flexmore"):
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    cls = getattr(transformers, f"{family}ForCausalLM")
    return filled(cls._from_config(config, experts_implementation=experts))


def experts_of(model):
    return next(
        m for m in model.modules() if isinstance(getattr(m, "down_proj", None), torch.Tensor)
    )


def run(model, name, x, ids, weights):
    """y and the gradients of x, weights and the parameters of one experts module."""
    model.set_experts_implementation(name)
    experts = experts_of(model)
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    leaves += [experts.gate_up_proj, experts.down_proj]
    y = experts(leaves[0], ids, leaves[1])
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_the_stock_ones(family, tokens, top_k):
    model = model_of(family).double()
    x = torch.randn(tokens, 32, dtype=torch.float64)
    ids = torch.rand(tokens, 4).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, dtype=torch.float64)
    names = ("y", "dx", "dweights", "dgate_up", "ddown")
    found, wanted = (run(model, name, x, ids, weights) for name in ("flexmore", "eager"))
    for name, a, b in zip(names, found, wanted, strict=True):
        testing.assert_accurate(a, b, name=name)


def test_slots_of_other_ranks_are_empty():
    """Ids equal to num_experts with weight 0, at any place; and a token of nothing else."""
    model = model_of("FlexOlmo").double()
    x = torch.randn(5, 32, dtype=torch.float64)
    ids = torch.tensor([[0, 4], [4, 2], [4, 4], [3, 1], [1, 4]])
    weights = torch.rand(5, 2, dtype=torch.float64).masked_fill(ids == 4, 0)
    found = run(model, "flexmore", x, ids, weights)
    wanted = run(model, "eager", x, torch.where(ids == 4, 0, ids), weights)
    wanted[2] = wanted[2].masked_fill(ids == 4, 0)  # nobody computes what those would have given
    for a, b in zip(found, wanted, strict=True):
        testing.assert_accurate(a, b)
    assert not found[0][2].any() and not found[1][2].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_and_trains(family, tmp_path):
    model_of(family).save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, experts_implementation="flexmore")
    ids = some_ids()
    found, wanted = [], []
    for name, results in (("flexmore", found), ("eager", wanted)):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        results.append(model.generate(ids, max_new_tokens=4, do_sample=False))
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        results.append(experts_of(model).gate_up_proj.grad)
    assert found[0].equal(wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


def test_frozen_experts_and_autocast():
    model = model_of("Olmoe")
    experts = experts_of(model).requires_grad_(False)
    x, weights = torch.randn(6, 32, requires_grad=True), torch.rand(6, 2)
    ids = torch.rand(6, 4).argsort(1)[:, :2]
    experts(x, ids, weights).sum().backward()
    assert x.grad.isfinite().all() and experts.down_proj.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(x, ids, weights)
    assert found.dtype == torch.float32
    wanted = experts.bfloat16()(x.bfloat16(), ids, weights)
    testing.assert_same(found.bfloat16(), wanted)


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    model, ids = model_of("FlexOlmo"), some_ids()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
        torch.testing.assert_close(found, model(ids).logits)


OTHERS = {
    "has_bias": (True, "FlexOlmoExperts.has_bias: got True; accepted: False"),
    "has_gate": (False, "FlexOlmoExperts.has_gate: got False"),
    "is_transposed": (True, "FlexOlmoExperts.is_transposed: got True"),
    "is_concatenated": (False, "FlexOlmoExperts.is_concatenated: got False"),
    "has_post_expert_norm": (True, "FlexOlmoExperts.has_post_expert_norm: got True"),
    "act_fn": (torch.nn.GELU(), "FlexOlmoExperts.act_fn: got GELU; accepted: SiLU"),
    "__class__": (None, "Other._apply_gate: got its own"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_refuses_other_experts(name):
    experts = experts_of(model_of("FlexOlmo"))
    value, message = OTHERS[name]
    if name == "__class__":
        value = type("Other", (type(experts),), {"_apply_gate": lambda self, x: x})
    setattr(experts, name, value)
    with pytest.raises(ValueError, match=f"^{message}"):
        experts(torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def test_an_unknown_implementation_is_refused_and_ours_is_not_saved(tmp_path):
    model = model_of("FlexOlmo")
    with pytest.raises((ValueError, KeyError)):
        model.set_experts_implementation("flexmoor")
    model.save_pretrained(tmp_path)
    assert "flexmore" not in (tmp_path / "config.json").read_text()

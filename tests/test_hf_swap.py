"""`swap_experts`: a loaded FlexOlmo, in place, becomes what loading a converted checkpoint gives.

Traps covered: factors from an SVD at full and at lower rank, given as tensors, or in a directory;
hooks, frozen parameters and the router's parameter stay; nothing is changed by a refused call.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch

from flexmore_kernels import testing
from flexmore_kernels.conversion.svd import decompose
from tests.hf_models import RAGGED, RANKS, make, make_stock, some_ids

transformers = pytest.importorskip("transformers", minversion="5.17")
hf = pytest.importorskip("flexmore_kernels.hf")


def dense(stock, layer, expert, projection):
    experts = stock.model.layers[layer].mlp.experts
    if projection == "down":
        return experts.down_proj[expert].detach()
    return experts.gate_up_proj[expert].detach().chunk(2)[projection == "up"]


def test_all_full_size_and_all_of_full_rank_compute_the_same():
    stock, ids = make_stock(), some_ids()
    wanted = stock(ids, labels=ids, output_router_logits=True, output_hidden_states=True)
    for ranks in ([0] * 4, [0, 32, 32, 32], [[0, 32, 0, 32], [0, [32, "full", 32], 0, 32]]):
        model = copy.deepcopy(stock)
        assert hf.swap_experts(model, ranks) is model
        assert type(model) is hf.FlexMoREForCausalLM and type(model.model) is hf.FlexMoREModel
        found = model(ids, labels=ids, output_router_logits=True, output_hidden_states=True)
        # Rank min(D, F) is the matrix itself, to the rounding of its factors; issue: 1e-5.
        for name in ("logits", "loss", "aux_loss"):
            a, b = getattr(found, name), getattr(wanted, name)
            assert (a - b).norm() <= 1e-5 * b.norm(), name
        assert len(found.router_logits) == 2 and len(found.hidden_states) == 3
        for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
        greedy = {"max_new_tokens": 4, "do_sample": False}
        assert model.generate(ids, **greedy).equal(stock.generate(ids, **greedy))


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_lower_rank_drops_the_smallest_singular_values(method):
    stock = make_stock()
    model = hf.swap_experts(copy.deepcopy(stock), RANKS, method=method)
    state = model.state_dict()
    for layer, projection in ((0, "gate"), (1, "up"), (1, "down")):
        for expert in (1, 3):
            name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
            delta = dense(stock, layer, expert, projection).double()
            delta -= dense(stock, layer, 0, projection).double()
            a, b = (state[f"{name}_{side}.weight"].double() for side in "ab")
            left = (delta - b @ a).norm()
            dropped = torch.linalg.svdvals(delta)[RANKS[expert] :].norm()
            # The factors are rounded to float32, 2^-24 each: of their product, which is not larger
            # than delta, 2^-23, and of the roundings at most sqrt(rank) add up.
            rounding = 2.0**-23 * RANKS[expert] ** 0.5 * delta.norm()
            bound = decompose(delta, rank=RANKS[expert], method=method).bound
            assert dropped - rounding <= left <= dropped + bound + rounding


def test_given_factors_of_a_ragged_directory(tmp_path):
    model = make(RAGGED)
    model.save_pretrained(tmp_path)
    found = hf.swap_experts(make_stock(), weights=tmp_path)
    assert found.config.layer_expert_ranks == RAGGED
    for name, tensor in found.state_dict().items():
        if ".mlp." in name:
            testing.assert_same(tensor, model.state_dict()[name], name)


def test_given_factors_by_name_and_by_directory(tmp_path):
    model, ids = make(), some_ids()
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    for weights in (state, tmp_path):
        stock = make_stock()
        outside = {k: t for k, t in state.items() if ".mlp." not in k}
        stock.load_state_dict(outside, strict=False)
        hf.swap_experts(stock, weights=weights)
        assert stock.config.expert_ranks == RANKS
        for name, tensor in stock.state_dict().items():
            testing.assert_same(tensor, state[name], name)
        testing.assert_same(stock(ids).logits, model(ids).logits)
    only = {k: t for k, t in state.items() if ".experts.1." in k}
    stock = make_stock()
    kept = dense(stock, 1, 2, "up").clone()
    hf.swap_experts(stock, weights=only)
    assert stock.config.expert_ranks == [0, 3, 0, 0]
    testing.assert_same(stock.model.layers[1].mlp.experts[2].up_proj.weight, kept)


def test_saves_and_loads_as_a_flexmore_model(tmp_path):
    model = hf.swap_experts(make_stock(), [0, 3, [2, 0, "full"], 5])
    model.save_pretrained(tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(found) is hf.FlexMoREForCausalLM
    for name, tensor in model.state_dict().items():
        testing.assert_same(found.state_dict()[name], tensor, name)
    assert found._no_split_modules == model._no_split_modules == {"FlexMoREDecoderLayer"}
    assert found._tp_plan == model._tp_plan


def test_what_is_not_replaced_stays():
    stock, ids = make_stock().bfloat16().train(), some_ids()
    stock(ids, output_router_logits=True)  # installs transformers' hooks
    stock.requires_grad_(False)
    before = {n: p for n, p in stock.named_parameters() if ".experts." not in n}
    stock.set_attn_implementation("eager")
    model = hf.swap_experts(stock, RANKS)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not any(p.requires_grad for p in after.values())
    assert {p.dtype for p in after.values()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert all(module.training for module in model.modules())
    out = model(ids, output_router_logits=True, output_attentions=True)
    assert len(out.router_logits) == len(out.attentions) == 2
    # A base that is a view would keep the fused tensor of all experts in memory.
    base = model.model.layers[0].mlp.experts[0].gate_proj.weight
    assert base.untyped_storage().nbytes() == base.nbytes


def test_the_decoder_alone():
    stock, ids = make_stock().model, some_ids()
    wanted = stock(ids).last_hidden_state
    found = hf.swap_experts(stock, [0] * 4)(ids).last_hidden_state
    assert type(stock) is hf.FlexMoREModel
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("field, theirs, own, cure", [
    ("hidden_size", 64, 32, "convert the checkpoint"),
    ("intermediate_size", 40, 48, "convert the checkpoint"),
    ("num_hidden_layers", 3, 2, "convert the checkpoint"),
    ("num_hidden_layers", 1, 2, "convert the checkpoint"),
    ("num_experts", 5, 4, "convert the checkpoint"),
    ("num_experts_per_tok", 3, 2, "load the model with num_experts_per_tok=3"),
    ("norm_topk_prob", True, False, "load the model with norm_topk_prob=True"),
    ("scoring", "sigmoid", "softmax", "FlexOlmo has no other: load"),
    ("expert_bias", True, False, "FlexOlmo has no other: load"),
])  # fmt: skip
def test_a_directory_of_another_mixture_is_refused(field, theirs, own, cure, tmp_path):
    """Its factors would be run with the model's sizes and routing, not those they were made for."""
    experts = theirs if field == "num_experts" else 4
    change = {} if field == "num_experts" else {field: theirs}
    make([0, 3, 0, 5, 0][:experts], **change).save_pretrained(tmp_path)
    stock = make_stock()
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    wanted = f"^weights: {tmp_path} has {field} {theirs!r}; accepted: the model's, {own!r} .{cure}"
    for ranks in (None, RANKS):
        with pytest.raises(ValueError, match=wanted):
            hf.swap_experts(stock, ranks, weights=tmp_path)
    assert type(stock) is transformers.FlexOlmoForCausalLM
    for name, tensor in stock.state_dict().items():
        testing.assert_same(tensor, before[name], name)


def test_the_routing_of_a_directory_is_what_the_model_was_loaded_with(tmp_path):
    """As the message says; what config.json leaves out, as the authors' does, is the default."""
    options = {"num_experts_per_tok": 3, "norm_topk_prob": True}
    model, ids = make(**options), some_ids()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scoring"], config["expert_bias"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    stock = make_stock(**options)
    outside = {k: t for k, t in model.state_dict().items() if ".mlp." not in k}
    stock.load_state_dict(outside, strict=False)
    testing.assert_same(hf.swap_experts(stock, weights=tmp_path)(ids).logits, model(ids).logits)


def bad(name):
    """(arguments, error, message) of a refused call, and a model."""
    stock = make_stock()
    given = {k: t for k, t in make().state_dict().items() if ".experts.1." in k}
    first = "model.layers.0.mlp.experts.1.gate_proj_a.weight"
    if name == "NaN":
        stock.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = float("nan")
    if name == "meta":
        stock.model.layers[1].mlp.to("meta")
    cases = {
        "no ranks": ({}, "expert_ranks: got None without weights"),
        "entries": ({"expert_ranks": [0, 1]}, "expert_ranks: got 2 entries"),
        "rank": ({"expert_ranks": [0, -1, 1, 1]}, r"expert_ranks\[1\]: got -1"),
        "method": ({"expert_ranks": RANKS, "method": "fast"}, "method: got 'fast'"),
        "NaN": ({"expert_ranks": RANKS}, r"model.layers.1.mlp.experts.3.down_proj: holds NaN"),
        "meta": ({"expert_ranks": RANKS}, "model.layers.1.mlp.experts.gate_up_proj: got weights"),
        "half": ({"weights": {first: given[first]}}, "weights: .*gate_proj_b.weight is missing"),
        "shape": ({"weights": given | {first: torch.zeros(3, 5)}}, f"weights: {first}: got shape"),
        "place": ({"expert_ranks": [0] * 4, "weights": given}, "weights: .* has no place"),
        "no svd": ({"expert_ranks": [0] * 4, "method": "fast"}, "method: got 'fast'"),
        "prefix": (
            {"weights": given | {"layers.0.mlp.gate.weight": torch.zeros(4, 32)}},
            "weights: got layers.0.mlp.gate.weight; accepted",
        ),
        "layer": (
            {"weights": given | {"model.layers.2.mlp.gate.weight": torch.zeros(4, 32)}},
            "weights: got model.layers.2.mlp.gate.weight; accepted",
        ),
        "type": ({"weights": [1]}, "weights: got list; accepted: a mapping"),
    }
    return stock, *cases[name]


@pytest.mark.parametrize("name", ["no ranks", "entries", "rank", "method", "NaN", "meta",
                                  "half", "shape", "place", "no svd", "prefix", "layer",
                                  "type"])  # fmt: skip
def test_a_refused_call_changes_nothing(name):
    stock, arguments, message = bad(name)
    blocks = [layer.mlp for layer in stock.model.layers]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        hf.swap_experts(stock, **arguments)
    assert type(stock) is transformers.FlexOlmoForCausalLM
    assert all(layer.mlp is block for layer, block in zip(stock.model.layers, blocks, strict=True))


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="^model: got FlexMoREForCausalLM; accepted: FlexOlmo"):
        hf.swap_experts(make(), RANKS)

"""Model type "flexmore" of transformers: the same numbers as the plain reference, saved and loaded.

Traps covered: ranks that differ by layer and projection; a config that says less than the tensors;
an expert of which no tensor is stored; the auxiliary loss, which reads what the router recorded,
with a bias and by sigmoids; padding on the left; a mask per request, kept for the cache's life.
"""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_kernels import FlexMoRE, ops, testing
from tests.hf_models import RAGGED, RANKS, SIZES, make, make_stock, plain, some_ids

transformers = pytest.importorskip("transformers", minversion="5.17")
hf = pytest.importorskip("flexmore_kernels.hf")


def reload(model, directory, **options):
    model.save_pretrained(directory, **options)
    found, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert type(found) is hf.FlexMoREForCausalLM
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted, state = model.state_dict(), found.state_dict()
    assert wanted.keys() == state.keys()
    for name, tensor in wanted.items():
        testing.assert_same(state[name], tensor, name)
    return found


@pytest.mark.parametrize("ranks", [RANKS, RAGGED], ids=["plain", "ragged"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_the_references(ranks, attention):
    model = make(ranks, expert_bias=True, scoring="sigmoid", norm_topk_prob=True)
    model.set_attn_implementation(attention)
    ids = some_ids()
    truth, same = plain(model)(ids).detach(), plain(model, torch.float32)(ids).detach()
    testing.assert_accurate(model(ids).logits, truth, same)


@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax", "sigmoid", "unit"])
def test_a_block_is_the_layer(scoring):
    """Its own router, and the same bits, forward and backward."""
    options = {"scoring": scoring, "expert_bias": True, "norm_topk_prob": scoring == "sigmoid"}
    block = make(RAGGED, **options).model.layers[0].mlp
    torch.nn.init.uniform_(block.gate.expert_bias, -1, 1)
    layer = FlexMoRE(32, 48, RAGGED[0], 2, **options)
    layer.load_state_dict(block.state_dict())
    mask = torch.rand(2, 7, 4) > 0.4
    mask[..., 0] = True
    x, dy, results = torch.randn(2, 7, 32), torch.randn(2, 7, 32), []
    for module in (block, layer):
        given = x.clone().requires_grad_()
        y, routing = module(given, expert_mask=mask, return_routing=True)
        leaves = dict(module.named_parameters())
        grads = torch.autograd.grad(y, [given, *leaves.values()], dy, allow_unused=True)
        results.append(
            {"y": y, **routing._asdict(), **dict(zip(["x", *leaves], grads, strict=True))}
        )
    assert results[0].keys() == results[1].keys()
    for name, found in results[0].items():
        if found is not None or results[1][name] is not None:
            testing.assert_same(found, results[1][name], name)


def test_auxiliary_loss_is_that_of_the_routers_distribution():
    for scoring, bias in (("softmax", False), ("softmax", True), ("sigmoid", True)):
        model = make(expert_bias=bias, scoring=scoring)
        biases = []
        for layer in model.model.layers:
            if bias:
                torch.nn.init.uniform_(layer.mlp.gate.expert_bias, -1, 1)
            biases.append(layer.mlp.gate.expert_bias)
        ids, seen = some_ids(), []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _, x, out, seen=seen: seen.append(out))
        padding = torch.ones_like(ids)
        padding[0, :3] = 0
        out = model(ids, labels=ids, attention_mask=padding, output_router_logits=True)
        raw, indices = [each[3] for each in seen], [each[2] for each in seen]
        expected = ops.load_balancing_loss(
            raw, indices, scoring=scoring, bias=biases if bias else None,
            padding_mask=padding.flatten().bool(),
        )  # fmt: skip
        torch.testing.assert_close(out.aux_loss, expected)
        assert [tuple(each.shape) for each in out.router_logits] == [(14, 4)] * 2
        without = model(ids, labels=ids, attention_mask=padding).loss
        torch.testing.assert_close(out.loss, without + 0.01 * expected)


def test_saved_as_the_formats_say_and_loaded(tmp_path):
    for name, ranks in (("plain", RANKS), ("ragged", RAGGED)):
        model = make(ranks)
        found = reload(model, tmp_path / name, max_shard_size="20KB")
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["model_type"] == "flexmore"
        assert written["architectures"] == ["FlexMoREForCausalLM"]
        # The largest rank in any layer and projection; 0, full-size in all.
        assert written["expert_ranks"] == {"plain": RANKS, "ragged": [0, 3, 2, 32]}[name]
        assert written.get("layer_expert_ranks") == {"plain": None, "ragged": RAGGED}[name]
        assert found.config.layer_expert_ranks == model.config.layer_expert_ranks
        reload(found, tmp_path / f"{name} again")


def test_ranks_come_from_the_tensors(tmp_path):
    """The authors' directories: one rank an expert, which may be that of the largest layer, or
    above min(D, F); and their tensors, written here by hand."""
    model = make([[0, 3, 2, [0, 0, 0]], [0, [4, 1, 2], 0, [0, 0, 0]]])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = SIZES | {"model_type": "flexmore", "num_experts": 4, "rope_theta": 500000.0}
    config["architectures"] = ["FlexMoREForCausalLM"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})

    def declare(ranks):
        (tmp_path / "config.json").write_text(json.dumps(config | {"expert_ranks": ranks}))

    for declared in ([0, 4, 2, [0, 0, 0]], [0, 16384, 7, [0, 0, 0]]):
        declare(declared)
        for loader in (transformers.AutoModelForCausalLM, hf.FlexMoREForCausalLM):
            found = loader.from_pretrained(tmp_path)
            for name, tensor in found.state_dict().items():
                testing.assert_same(tensor, state[name], name)
            ids = some_ids()
            torch.testing.assert_close(found(ids).logits, model(ids).logits)
    declare([0, 4, 2, 5])
    message = r"model.layers.0.mlp.experts.3.gate_proj: missing; the config says 5"
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_flexolmo_checkpoint_loads_with_all_experts_full_size(tmp_path):
    stock = make_stock()
    stock.save_pretrained(tmp_path)
    found = hf.FlexMoREForCausalLM.from_pretrained(tmp_path)
    assert found.config.expert_ranks == [0] * 4
    ids, twin = some_ids(), plain(found)
    logits = found(ids).logits, twin(ids).detach(), stock(ids).logits.detach()
    testing.assert_accurate(*logits)
    fused = load_file(tmp_path / "model.safetensors")
    fused["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(4, 96, 32)
    save_file(fused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="gate_up_proj: got fused experts; accepted: a key"):
        hf.FlexMoREForCausalLM.from_pretrained(tmp_path)


def test_missing_tensors(tmp_path):
    """Of an expert they are an error; a router is initialised, and transformers says so."""
    model = make()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in ("experts.2.up_proj.weight", "gate.weight"):
        del state[f"model.layers.1.mlp.{name}"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if "experts" in name:
            with pytest.raises(ValueError, match=r"layers.1.mlp.experts.2.up_proj: missing"):
                transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
            state[f"model.layers.1.mlp.{name}"] = torch.zeros(48, 32)
    found, report = hf.FlexMoREForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"model.layers.1.mlp.gate.weight"}
    assert found.model.layers[1].mlp.gate.weight.isfinite().all()


def test_factors_that_are_no_pair(tmp_path):
    """A factor that is not there, or a whole matrix beside two, is not a delta of zero."""
    make().save_pretrained(tmp_path)
    whole, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.experts.3.up_proj"
    for change, got in (
        ({f"{name}_b.weight": None}, r"_a \(5\)"),
        ({f"{name}_a.weight": None}, r"_b \(5\)"),
        ({f"{name}.weight": torch.zeros(48, 32)}, r"whole \(48\), _a \(5\), _b \(5\)"),
        ({f"{name}_b.weight": torch.zeros(48, 4)}, r"_a \(5\), _b \(4\)"),
    ):
        state = {key: tensor for key, tensor in (whole | change).items() if tensor is not None}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"^{name}: got {got}; accepted: whole, or"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_initialisation():
    model = hf.FlexMoREForCausalLM(hf.FlexMoREConfig(**SIZES, expert_ranks=RANKS,
                                                     initializer_range=0.5))  # fmt: skip
    for name, weight in model.named_parameters():
        if "_b.weight" in name:
            assert not weight.any(), name
        elif "_a.weight" in name:
            assert 0 < weight.abs().max() <= weight.shape[1] ** -0.5, name
        elif weight.dim() > 1:
            # The deviation of n draws is right to 1 / sqrt(2 n); five times that.
            assert abs(weight.std() / 0.5 - 1) < 5 * (2 * weight.numel()) ** -0.5, name


def test_gradients_reach_all_and_checkpointing_changes_nothing():
    model, ids = make().train(), some_ids()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        out = model(ids, labels=ids, output_router_logits=True)
        out.loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == dict(model.named_parameters()).keys()
    for name, grad in grads[0].items():
        testing.assert_same(grads[1][name], grad, name)


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    model, ids = make(RAGGED), some_ids()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
        testing.assert_accurate(compiled, plain(model)(ids), model(ids).logits)


def test_an_old_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.2")
    with pytest.raises(ImportError, match=r"^transformers: got 5.16.2; accepted .*: >= 5.17"):
        importlib.reload(hf)


REFUSED = [
    ({"expert_ranks": [1, 2, 3, 4]}, r"expert_ranks\[0\]: got 1; accepted: 0"),
    ({"expert_ranks": [0, -1, 3, 4]}, r"expert_ranks\[1\]: got -1"),
    ({"expert_ranks": [0, [33, 1, 1], 3]}, r"expert_ranks\[1\]\[0\]: got 33"),
    ({"expert_ranks": [[0, 1]]}, "expert_ranks: got 1 lists; accepted: num_hidden_layers, 2"),
    ({"expert_ranks": [[0, 1], [0, 1, 2]]}, "expert_ranks: got 3 entries"),
    ({"num_experts": 3}, "expert_ranks: got 4 entries; accepted: num_experts, 3"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok: got 5"),
    ({"scoring": "relu"}, "scoring: got 'relu'"),
    ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_config_refuses(change, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        hf.FlexMoREConfig(**SIZES | {"expert_ranks": RANKS} | change)


def test_other_routers_are_refused_by_name():
    from flexmore_kernels import hf

    with pytest.raises(ValueError, match="router: got 'projected'; accepted by transformers"):
        hf.FlexMoREConfig(expert_ranks=[0, 2], router="projected", domain_embedding_size=4)

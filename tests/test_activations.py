"""Second moments of what enters the projections, against sums over the tokens, one by one.

Traps covered: padding on either side, a token's experts, experts that no token selects, low-rank
experts and parts without a delta, several batches, a file that is something else or cut short.
"""

from __future__ import annotations

import argparse
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

import flexmore_kernels as fk
from flexmore_kernels import testing
from flexmore_kernels.checkpoint import load_model, make_demo_checkpoint
from flexmore_kernels.conversion import svd
from flexmore_kernels.conversion.activations import Activations, gather

RANKS = (0, 3, 0, (2, 0, "full"), 5)
SIZES = (16, 24)


def make_model(dtype=torch.float64, **change):
    values = {
        "vocab_size": 30,
        "hidden_size": SIZES[0],
        "intermediate_size": SIZES[1],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "expert_ranks": list(RANKS),
    }
    model = fk.FlexMoREForCausalLM(fk.FlexMoREConfig.from_dict(values | change), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            offset = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(offset + torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model


def batches(device="cpu"):
    left = torch.ones(3, 9, dtype=torch.int64)
    left[0, :4] = 0
    left[2, 7:] = 0
    ids = [torch.randint(30, (3, 9)), torch.randint(30, (1, 6))]
    return [(ids[0].to(device), left.to(device)), (ids[1].to(device), None)]


def layer_inputs(model, data):
    """x of each layer and each real token, (T, D), and the experts it selects, (T, K)."""
    layers = [block.mlp for block in model.model.layers]
    found, seen = {}, [[] for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, n=n: found.update({n: args[0]}))
        for n, layer in enumerate(layers)
    ]
    for ids, mask in data:
        with torch.no_grad():
            model(ids, mask)
        real = torch.ones_like(ids) if mask is None else mask
        for n, x in found.items():
            seen[n].append(x[real.bool()])
    for hook in hooks:
        hook.remove()
    inputs = [torch.cat(parts) for parts in seen]
    with torch.no_grad():
        routed = [m(x, return_routing=True)[1] for m, x in zip(layers, inputs, strict=True)]
    return inputs, [routing.indices for routing in routed]


def matrix(layer, expert, projection):
    tensors = layer.state_dict()
    name = f"experts.{expert}.{projection}_proj"
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"]
    base = tensors[f"experts.0.{projection}_proj.weight"]
    if f"{name}_a.weight" not in tensors:
        return base
    return base + tensors[f"{name}_b.weight"] @ tensors[f"{name}_a.weight"]


@pytest.mark.parametrize("forms", [("full", "diagonal"), ("diagonal", "full")], ids=str)
def test_moments_are_means_over_the_tokens(forms):
    model, data = make_model(), batches()
    found = gather(model, data, inputs=forms[0], hidden=forms[1])
    inputs, selected = layer_inputs(model, data)
    found.check_model(SIZES, 2, 5)

    def mean(rows, form):
        products = torch.stack([torch.outer(row, row) for row in rows]).mean(0)
        return products if form == "full" else products.diagonal()

    for n, (x, chosen) in enumerate(zip(inputs, selected, strict=True)):
        layer = model.model.layers[n].mlp
        assert found.tokens[f"layers.{n}.inputs"] == 27 - 6 + 6 == len(x)
        for projection in ("gate", "up"):
            moment = found.second_moment(n, 3, projection)
            testing.assert_accurate(moment, mean(x, forms[0]), name=f"inputs of {n}")
        for expert in range(1, 5):
            rows = x[(chosen == expert).any(1)]
            assert found.tokens[f"layers.{n}.experts.{expert}.hidden"] == len(rows)
            if not len(rows):
                assert found.second_moment(n, expert, "down") is None
                continue
            gate, up = (rows @ matrix(layer, expert, p).T for p in ("gate", "up"))
            moment = found.second_moment(n, expert, "down")
            wanted = mean(F.silu(gate) * up, forms[1])
            testing.assert_accurate(moment, wanted, name=f"hidden of {n}, {expert}")


def test_an_expert_without_tokens_has_no_moment():
    model = make_model(num_experts_per_tok=1)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight.zero_()  # all logits equal: expert 0
    found = gather(model, batches())
    assert found.second_moment(1, 2, "down") is None
    assert found.second_moment(1, 2, "gate").shape == (16, 16)


def test_on_the_device(device):
    """In float32, with every expert selected, that no rounding decides; sums are float64."""
    model = make_model(torch.float32, num_experts_per_tok=5).to(device)
    data = batches(device)
    counts = []
    found = gather(model, data, progress=counts.append)
    assert counts == [1, 2]
    wide = make_model(torch.float64, num_experts_per_tok=5)
    wide.load_state_dict({k: t.double().cpu() for k, t in model.state_dict().items()})
    truth = gather(wide, [(i.cpu(), m if m is None else m.cpu()) for i, m in data])
    again = gather(model, data)
    for name, mean in found.means.items():
        assert mean.dtype == torch.float64 and mean.device.type == device
        # A square has twice the relative error of x or h, which some 100 roundings led to.
        assert (mean.cpu() - truth.means[name]).norm() <= 2.0**-16 * truth.means[name].norm()
        testing.assert_same(again.means[name], mean)


def test_saved_and_loaded(tmp_path):
    found = gather(make_model(), batches())
    path = tmp_path / "made" / "moments.safetensors"
    found.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = Activations.load(path)
    assert loaded.tokens == found.tokens
    for name, mean in found.means.items():
        testing.assert_same(loaded.means[name], mean.float())
    # Read when asked for: nothing of it stays.
    seen = [weakref.ref(loaded.means[name]) for name in found.means]
    assert [mean() for mean in seen] == [None] * len(seen)
    delta = torch.randn(SIZES[1], SIZES[0])
    svd.decompose(delta, second_moment=loaded.second_moment(0, 1, "up"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        Activations.load(path)


def test_weighting_lowers_the_error_of_outputs():
    """Over the very tokens: with weights, expert 2's gate is wrong by less at the same rank."""
    model, data = make_model(), batches()
    found = gather(model, data)
    layer = model.model.layers[0].mlp
    delta = matrix(layer, 2, "gate") - matrix(layer, 0, "gate")
    x = layer_inputs(model, data)[0][0]
    errors = []
    for moment in (None, found.second_moment(0, 2, "gate")):
        a, b = svd.factor_pair(svd.decompose(delta, second_moment=moment), 4, torch.float64)
        errors.append(float(((delta - b @ a) @ x.T).norm()))
    assert errors[1] < errors[0]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="model: has no FlexMoRE layer"):
        gather(torch.nn.Linear(2, 2), batches())
    model = make_model()
    with pytest.raises(ValueError, match="batches: no token"):
        gather(model, [])
    with pytest.raises(ValueError, match="hidden: got 'half'"):
        gather(model, batches(), hidden="half")
    with pytest.raises(ValueError, match="attention_mask: got shape"):
        gather(model, [(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 4))])
    assert not any(m._forward_pre_hooks for m in model.modules())
    found = gather(model, batches())
    with pytest.raises(ValueError, match="'layers.2.inputs'; they are of another model"):
        found.second_moment(2, 1, "gate")
    for wrong in (((17, 24), 2, 5), (SIZES, 3, 5), (SIZES, 2, 4)):
        with pytest.raises(ValueError, match="activations: .* has size"):
            found.check_model(*wrong)
    other = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, other)
    with pytest.raises(ValueError, match="holds something else"):
        Activations.load(other)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("inf")
    with pytest.raises(ValueError):
        gather(model, batches())


def command(*arguments):
    from flexmore_kernels.commands import activations

    parser = argparse.ArgumentParser()
    activations.add(parser)
    return activations.run(parser.parse_args([str(a) for a in arguments]))


def test_command(tmp_path, capsys, monkeypatch):
    """Sequences are cut and padded, which must not change the sums."""
    checkpoint = tmp_path / "checkpoint"
    make_demo_checkpoint(checkpoint, hidden_size=16, intermediate_size=24, num_layers=2,
                         expert_ranks=[0, 2, 0], top_k=2, vocab_size=40)  # fmt: skip
    lines, out = tmp_path / "ids.jsonl", tmp_path / "out.safetensors"
    rows = torch.randint(40, (3, 11)).tolist()
    lines.write_text("\n".join(map(str, [rows[0], [], rows[1][:4], rows[2]])))
    options = ("--length", 8, "--batch", 3, "--tokens", 20, "--device", "cpu")
    assert command(checkpoint, lines, out, *options) == 0
    assert "second moments of 20 tokens" in capsys.readouterr().out
    cut = [rows[0][:8], rows[0][8:], rows[1][:4], rows[2][:5]]
    model = load_model(checkpoint)
    truth = gather(model, [(torch.tensor([row]), None) for row in cut])
    found = Activations.load(out)
    assert found.tokens == truth.tokens
    for name, mean in truth.means.items():
        assert (found.means[name] - mean).norm() <= 2.0**-16 * mean.norm()
    text = tmp_path / "a.txt"
    text.write_text("words")
    for wrong, message in (("[1, 40]", "line 1: accepted"), ("{}", "line 1"), ("", "no token")):
        lines.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            command(checkpoint, lines, out, *options)
    with pytest.raises(ValueError, match="^tokenizer.json: missing in .*accepted: a file of"):
        command(checkpoint, text, out, *options)
    (checkpoint / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="^FILE: got text, which needs .*accepted: a file of"):
        command(checkpoint, text, out, *options)


def test_a_broken_tokenizer_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "top_k": 1}
    make_demo_checkpoint(tmp_path / "checkpoint", expert_ranks=[0, 2], **sizes)
    (tmp_path / "checkpoint" / "tokenizer.json").write_text("{}")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="^tokenizer.json: not a tokenizer"):
        command(tmp_path / "checkpoint", tmp_path / "a.txt", tmp_path / "out", "--device", "cpu")

"""The layouts that others write: the authors' flexmore, FlexOlmo's two, zero-padded factors.

They are written here from what is known of them, with safetensors and json, not by our writer.
Traps: gate and up the wrong way round in the fused tensor, A and B transposed, padding that differs
by layer and projection, ranks that config.json has from before a merge, model types that disagree
with the tensors.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import reference
from flexmore_kernels import FlexMoREConfig, FlexMoREForCausalLM, checkpoint
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.testing import assert_accurate_draws, assert_same

D, F, E, L, V = 16, 24, 3, 2, 13
CONFIG = {
    "architectures": ["FlexMoREForCausalLM"],
    "model_type": "flexmore",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "expert_ranks": [0, 5, 8],
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
SHAPES = {"gate": (F, D), "up": (F, D), "down": (D, F)}
# Of experts 1 and 2 in each layer the ranks of gate, up, down that hold numbers.
IN_USE = {(0, 1): (5, 5, 5), (0, 2): (8, 3, 1), (1, 1): (2, 5, 4), (1, 2): (8, 8, 8)}


def trunk():
    tensors = {"model.embed_tokens.weight": torch.randn(V, D), "lm_head.weight": torch.randn(V, D)}
    tensors["model.norm.weight"] = torch.rand(D) + 0.5
    for layer in range(L):
        block = f"model.layers.{layer}."
        for name in "qkvo":
            tensors[f"{block}self_attn.{name}_proj.weight"] = torch.randn(D, D) / 4
        for name in ("self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm",
                     "post_feedforward_layernorm"):  # fmt: skip
            tensors[f"{block}{name}.weight"] = torch.rand(D) + 0.5
        tensors[f"{block}mlp.gate.weight"] = torch.randn(E, D)
    return tensors


def full(layer, expert):
    name = f"model.layers.{layer}.mlp.experts.{expert}.{{}}_proj.weight"
    return {name.format(p): torch.randn(shape) / 4 for p, shape in SHAPES.items()}


def low_rank(layer, expert, ranks, rank):
    """Factors of `rank` whose rows (columns) from those of `ranks` on are zero."""
    tensors = {}
    for (projection, (out, width)), used in zip(SHAPES.items(), ranks, strict=True):
        name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
        a, b = torch.randn(rank, width) / 4, torch.randn(out, rank) / 4
        a[used:], b[:, used:] = 0, 0
        tensors |= {f"{name}_a.weight": a, f"{name}_b.weight": b}
    return tensors


def write(directory, tensors, config):
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def authors_tensors():
    tensors = trunk()
    for layer in range(L):
        tensors |= full(layer, 0)
        for expert, rank in ((1, 5), (2, 8)):
            tensors |= low_rank(layer, expert, IN_USE[layer, expert], rank)
    return tensors


def fuse(tensors):
    """FlexOlmo's fused tensors in place of one an expert and projection."""
    done = {name: tensor for name, tensor in tensors.items() if "experts." not in name}
    for layer in range(L):
        name = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors[f"{name}{e}.{p}_proj.weight"] for e in range(E)]) for p in SHAPES
        )
        done[f"{name}gate_up_proj"] = torch.cat([gate, up], dim=1)
        done[f"{name}down_proj"] = down
    return done


def flex_olmo_tensors():
    tensors = trunk()
    for layer in range(L):
        for expert in range(E):
            tensors |= full(layer, expert)
    return tensors


FLEX_OLMO = {k: v for k, v in CONFIG.items() if k != "expert_ranks"} | {
    "architectures": ["FlexOlmoForCausalLM"],
    "model_type": "flex_olmo",
}


def test_authors_checkpoint_loads_and_runs(tmp_path, device):
    tensors = authors_tensors()
    layout = read_layout(write(tmp_path / "made", tensors, CONFIG))
    assert layout.kind == "flexmore"
    assert layout.layer_ranks == ((0, 5, (8, 3, 1)), (0, (2, 5, 4), 8))
    assert layout.notes == (
        "expert 2: zero rows of factors trimmed: rank 8 stored, ranks 1 to 3 in use",
        "expert 1: zero rows of factors trimmed: rank 5 stored, ranks 2 to 4 in use",
    )
    model = checkpoint.load_model(layout, device)
    state = model.state_dict()
    a = "model.layers.1.mlp.experts.1.gate_proj_a.weight"
    assert_same(state[a].cpu(), tensors[a][:2])
    assert set(state) == set(tensors)
    # The truth is the padded form, which the reference takes as it is: a zero row adds nothing.
    values = CONFIG | {"num_key_value_heads": 2}
    twin = reference.FlexMoREForCausalLM(FlexMoREConfig.from_dict(values), device=device)
    twin.load_state_dict(tensors)
    texts = [torch.randint(V, (2, 7), device=device) for _ in range(8)]
    with torch.no_grad():
        logits, same = ([one(ids) for ids in texts] for one in (model, twin))
        truth = [twin.double()(ids) for ids in texts]
    assert_accurate_draws(logits, truth, same)
    layer = checkpoint.load_layer(layout, 1)
    assert layer.expert_ranks == layout.layer_ranks[1]


def test_rank_rows_of_zeros_altogether_are_no_delta(tmp_path):
    tensors = authors_tensors() | low_rank(1, 2, (0, 8, 0), 8)
    layout = read_layout(write(tmp_path / "made", tensors, CONFIG))
    assert layout.layer_ranks[1][2] == (0, 8, 0)
    model = checkpoint.load_model(layout)
    assert "model.layers.1.mlp.experts.2.gate_proj_a.weight" not in model.state_dict()
    checkpoint.save_checkpoint(tmp_path / "again", model.state_dict(), model.config.to_dict())
    assert read_layout(tmp_path / "again").layer_ranks == layout.layer_ranks


def test_padding_beyond_the_matrix_is_accepted(tmp_path):
    """Rank 2^14 of a matrix of rank at most D: zeros from D on, or the number in config.json."""
    tensors = authors_tensors()
    for layer in range(L):
        tensors |= low_rank(layer, 2, (8, 3, 16), 40)
    config = CONFIG | {"expert_ranks": [0, 16384, 40]}
    layout = read_layout(write(tmp_path / "made", tensors, config))
    assert layout.layer_ranks[0] == (0, 5, (8, 3, 16))
    assert layout.notes[0] == (
        "expert 1: expert_ranks says rank 16384, beyond min(D, F), 16; its tensors hold rank 5"
    )
    tensors |= low_rank(1, 2, (8, 17, 1), 40)
    with pytest.raises(ValueError, match=r"1.mlp.experts.2.up_proj_a.weight: rank 17; .* 16$"):
        read_layout(write(tmp_path / "wide", tensors, config))


def test_b_of_zeros_alone_is_kept(tmp_path):
    """As LoRA starts: the row still learns."""
    tensors = authors_tensors()
    for name in tensors:
        if name.endswith("_b.weight"):
            tensors[name] = torch.zeros_like(tensors[name])
    for name in tensors:
        if name.endswith("_a.weight"):
            tensors[name] = torch.randn_like(tensors[name])
    layout = read_layout(write(tmp_path / "made", tensors, CONFIG))
    assert layout.layer_ranks == ((0, 5, 8),) * 2 and layout.notes == ()


@pytest.mark.parametrize("fused", [False, True])
def test_flex_olmo_is_all_full_size(tmp_path, fused):
    tensors = flex_olmo_tensors()
    stored = fuse(tensors) if fused else tensors
    layout = read_layout(write(tmp_path / "made", stored, FLEX_OLMO))
    assert layout.kind == ("flex_olmo_fused" if fused else "flex_olmo")
    assert layout.layer_ranks == ((0, 0, 0),) * 2 and layout.notes == ()
    found = checkpoint.read_tensors(layout)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor, name)
    model = checkpoint.load_model(layout)
    assert model.config.to_dict()["model_type"] == "flexmore"
    for kind in ("flexmore", "flex_olmo", "flex_olmo_fused"):
        checkpoint.save_checkpoint(
            tmp_path / kind, model.state_dict(), model.config.to_dict(), kind=kind
        )
        again = read_layout(tmp_path / kind)
        assert (again.kind, again.layer_ranks, again.notes) == (kind, layout.layer_ranks, ())
        for name, tensor in checkpoint.read_tensors(again).items():
            assert_same(tensor, tensors[name], name)


def test_only_the_asked_rows_of_a_fused_tensor_are_read(tmp_path, monkeypatch):
    layout = read_layout(write(tmp_path / "made", fuse(flex_olmo_tensors()), FLEX_OLMO))
    opened = []

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs).__enter__()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_slice(self, name):
            opened.append(name)
            return self.file.get_slice(name)

    real = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", Spy)
    found = checkpoint.read_tensors(layout, "model.layers.1.mlp.experts.2.up")
    assert list(found) == ["_proj.weight"] and found["_proj.weight"].shape == (F, D)
    assert found["_proj.weight"].untyped_storage().nbytes() == F * D * 4
    assert opened == ["model.layers.1.mlp.experts.gate_up_proj"]


def test_expert_ranks_from_before_a_merge(tmp_path):
    """The authors' merge changes num_experts alone: [0, r] of the first stays, or nothing."""
    tensors = authors_tensors()
    for number, ranks in enumerate(([0, 5], None)):
        config = {**CONFIG, "expert_ranks": ranks, "layer_expert_ranks": None}
        layout = read_layout(write(tmp_path / f"made{number}", tensors, config))
        assert layout.layer_ranks[0] == (0, 5, (8, 3, 1))
        assert layout.notes[0].endswith("for 3 experts; taken from the tensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj_a.weight"]
    del tensors["model.layers.1.mlp.experts.2.up_proj_b.weight"]
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj_a\.weight: missing"):
        read_layout(write(tmp_path / "less", tensors, config))


def test_model_type_and_tensors_agree(tmp_path):
    fused = fuse(flex_olmo_tensors())
    with pytest.raises(ValueError, match=r"experts\.down_proj: fused experts.* says 'flexmore'"):
        read_layout(write(tmp_path / "a", fused, CONFIG))
    with pytest.raises(ValueError, match=r"_proj_a.weight: a low-rank factor.* says 'flex_olmo'"):
        read_layout(write(tmp_path / "b", authors_tensors(), FLEX_OLMO))
    with pytest.raises(ValueError, match=r"model_type is 'mixtral'; accepted: 'flexmore'"):
        read_layout(write(tmp_path / "c", fused, FLEX_OLMO | {"model_type": "mixtral"}))
    both = fused | full(1, 2)
    with pytest.raises(ValueError, match=r"1\.mlp\.experts\.2\.gate_proj\.weight: extra beside"):
        read_layout(write(tmp_path / "d", both, FLEX_OLMO))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    other = fused | {name: fused[name].transpose(1, 2).contiguous()}
    with pytest.raises(ValueError, match=f"{name}: shape .* accepted: \\(3, 48, 16\\)"):
        read_layout(write(tmp_path / "e", other, FLEX_OLMO))
    less = {k: v for k, v in fused.items() if k != name}
    with pytest.raises(ValueError, match=f"{name}: missing"):
        read_layout(write(tmp_path / "f", less, FLEX_OLMO))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_is_named_when_it_is_read(tmp_path, value):
    tensors = authors_tensors()
    name = "model.layers.1.mlp.experts.2.up_proj_b.weight"
    tensors[name][3, 2] = value
    layout = read_layout(write(tmp_path / "made", tensors, CONFIG))
    what = "NaN" if value != value else "Inf"
    with pytest.raises(ValueError, match=f"{name} in model.safetensors: holds {what}"):
        checkpoint.load_model(layout)
    checkpoint.load_layer(layout, 0)


def parameters(ranks):
    model = FlexMoREForCausalLM(FlexMoREConfig(expert_ranks=ranks), device="meta")
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_of_the_published_models():
    """33.27 B with 7 full-size experts, 10.75 B and 7.62 B with the ranks chosen for them."""
    assert round(parameters([0] * 7) / 1e9, 2) == 33.27
    assert round(parameters([0, 4, 8, 64, 256, 1024, 1024]) / 1e9, 2) == 10.75
    assert round(parameters([0, 64, 64, 32, 32, 16, 16]) / 1e9, 2) == 7.62

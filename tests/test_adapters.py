"""PEFT adapters as experts, against PEFT itself on the model that they were made on.

Traps: the scale (alpha / r, rslora, patterns), ranks that differ by module, missing modules, the
packing of fused deltas (expert slowest in A, fastest in B), deltas that are no plain LoRA, another
base, and what is shared by all experts.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from flexmore_kernels.adapter_export import export_adapter
from flexmore_kernels.adapter_import import import_adapters
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.testing import assert_accurate, assert_same
from tests.peft_models import (
    FFN,
    FUSED,
    IDS,
    adapt,
    dense_model,
    logits,
    mixture_model,
    stored,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def as_flexmore(directory, experts):
    """A FlexOlmo checkpoint of per-expert keys under our model type."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "flexmore"}
    path.write_text(json.dumps(config | {"expert_ranks": [0] * experts}))
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense") / "base"
    dense_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture") / "base"
    mixture_model().save_pretrained(directory)
    return directory


VARIANTS = [
    {"lora_alpha": 12},
    {"r": 3, "lora_alpha": 5, "use_rslora": True},
    {"rank_pattern": {"up_proj": 6, r"layers\.1\.mlp\.gate_proj": 2}, "lora_alpha": 8},
    {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"0.mlp.down_proj": 3, "gate_proj": 9}},
    {"target_modules": ["gate_proj", "down_proj"], "layers_to_transform": [1]},
    {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"], "use_rslora": True},
    {"r": 20},  # above min(D, F): a dense delta in disguise
]


def test_adapters_become_experts(dense, tmp_path):
    """With one expert alone the mixture is the dense model with that adapter."""
    wanted = [
        adapt(dense_model(), tmp_path / f"a{i}", i, **options) for i, options in enumerate(VARIANTS)
    ]
    out = tmp_path / "out"
    report = import_adapters(dense, [tmp_path / f"a{i}" for i in range(len(VARIANTS))], out)
    layout = read_layout(out)
    assert layout.config["num_experts"] == layout.config["num_experts_per_tok"] == 8
    assert [ranks[:5] for ranks in layout.layer_ranks] == [
        (0, 4, 3, (4, 6, 4), (4, 4, 1)),
        (0, 4, 3, (2, 6, 4), (4, 4, 1)),
    ]
    assert layout.layer_ranks[0][5:] == ((0, 0, 0), (0, 4, 0), 16)
    assert layout.layer_ranks[1][5:] == ((4, 0, 4), (0, 4, 0), 16)
    assert [row[:2] for row in report.experts] == [(i + 1, f"a{i}") for i in range(7)]
    for expert, (exact, same) in enumerate(wanted, 1):
        assert_accurate(logits(out, expert), exact, same, name=f"expert {expert}")
    base = dense_model()
    with torch.no_grad():
        same = base(IDS).logits
        assert_accurate(logits(out, 0), base.double()(IDS).logits, same, name="base")


ORDERS = {"up": FUSED, "down": FUSED[::-1], "one": FUSED[1:], "router": [*FUSED, "mlp.gate.weight"]}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_fused_deltas_change_the_mixture_in_place(mixture, tmp_path, order):
    options = {"target_modules": [], "target_parameters": order, "lora_alpha": 6}
    options["rank_pattern"] = {"mlp.experts.down_proj": 2, "mlp.gate.weight": 3}
    exact, same = adapt(mixture_model(), tmp_path / "a", 1, **options)
    other = "average" if len(order) == 3 else "refuse"  # the router's rows are all experts'
    import_adapters(mixture, [tmp_path / "a"], tmp_path / "out", other=other)
    assert read_layout(tmp_path / "out").layer_ranks == ((0, 0, 0),) * 2
    assert_accurate(logits(tmp_path / "out"), exact, same)


def low_rank_mixture(mixture, directory):
    """Expert 1 becomes a copy of the base, expert 2 the base with a delta of rank 2 in gate."""
    tensors = stored(mixture)
    factors = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        for projection in FFN:
            for expert in (1, 2):
                copy = tensors[f"{prefix}0.{projection}.weight"].clone()
                tensors[f"{prefix}{expert}.{projection}.weight"] = copy
        a, b = torch.randn(2, 16) * 0.25, torch.randn(24, 2) * 0.5
        factors[f"{prefix}2.gate_proj"] = (a, b)
        tensors[f"{prefix}2.gate_proj.weight"] += b @ a
    directory.mkdir()
    mixture_model().config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = transformers.FlexOlmoForCausalLM.from_pretrained(
        directory, experts_implementation="eager"
    )
    for name, (a, b) in factors.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}_a.weight": a, f"{name}_b.weight": b}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    as_flexmore(directory, 3)
    return model


def test_low_rank_experts_stay_low_rank_when_the_base_moves(mixture, tmp_path):
    model = low_rank_mixture(mixture, tmp_path / "base")
    options = {"target_modules": [], "target_parameters": FUSED, "r": 2}
    exact, same = adapt(model, tmp_path / "a", 1, **options)
    import_adapters(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    # Two of the adapter, two that undo the base's own delta, and in gate two that were there.
    assert read_layout(tmp_path / "out").layer_ranks == ((0, 4, (6, 4, 4)),) * 2
    assert_accurate(logits(tmp_path / "out"), exact, same)


def test_deltas_of_single_experts(mixture, tmp_path):
    """The keys of adapters made where experts were modules: written by hand, merged by hand."""
    adapter = tmp_path / "a"
    adapter.mkdir()
    tensors, merged = {}, stored(mixture)
    for name, shape in (
        ("1.mlp.experts.2.gate_proj", (24, 16)),
        ("0.mlp.experts.1.down_proj", (16, 24)),
    ):
        a, b = torch.randn(3, shape[1]), torch.randn(shape[0], 3)
        key = f"model.layers.{name}"
        tensors |= {f"base_model.model.{key}.lora_{s}.weight": t for s, t in (("A", a), ("B", b))}
        merged[f"{key}.weight"] += 2 * b @ a
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    import_adapters(mixture, [adapter], tmp_path / "out")
    written = stored(tmp_path / "out")
    for name, tensor in merged.items():
        # One product in another order: a rounding of each of its three terms and of their sum.
        assert torch.allclose(written[name], tensor, rtol=0, atol=8 * 2**-24 * 40), name


OTHER = {"target_modules": [*FFN, "q_proj", "o_proj", "lm_head", "embed_tokens"]}


def test_other_deltas_are_averaged(dense, tmp_path):
    """One adapter's average is its own delta; two of them share it half and half."""
    exact, same = adapt(dense_model(), tmp_path / "a", 1, modules_to_save=["norm"], **OTHER)
    import_adapters(dense, [tmp_path / "a"], tmp_path / "out", other="average")
    assert_accurate(logits(tmp_path / "out", 1), exact, same)
    adapt(dense_model(), tmp_path / "b", 2)
    report = import_adapters(
        dense, [tmp_path / "a", tmp_path / "b"], tmp_path / "two", other="average"
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    base, one, two = (stored(d)[name].double()
                      for d in (dense, tmp_path / "out", tmp_path / "two"))  # fmt: skip
    # Each of the two sums was rounded once to float32.
    assert float((two - base - (one - base) / 2).abs().max()) <= 2**-24 * float(one.abs().max()) * 2
    for part in report.others:
        assert part.adapter == "a" and part.lost == pytest.approx(part.size / 2, rel=1e-5)


def test_other_deltas_are_dropped_with_their_size(dense, tmp_path):
    adapt(dense_model(), tmp_path / "a", 1, **OTHER)
    report = import_adapters(dense, [tmp_path / "a"], tmp_path / "out", other="drop")
    written, base = (stored(d) for d in (tmp_path / "out", dense))
    held = stored(tmp_path / "a")
    found = {part.kind: part for part in report.others}
    assert set(found) == {"self_attn.q_proj", "self_attn.o_proj", "lm_head", "embed_tokens"}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert_same(written[name], base[name], name)
    delta = 2.0 * held["base_model.model.lm_head.lora_B.weight"].double()
    delta = delta @ held["base_model.model.lm_head.lora_A.weight"].double()
    size = float(delta.norm() / base["lm_head.weight"].double().norm())
    assert found["lm_head"].size == pytest.approx(size, rel=1e-5)
    assert found["self_attn.q_proj"].tensors == 2


def test_other_deltas_are_refused_by_default(dense, tmp_path):
    adapt(dense_model(), tmp_path / "a", 1, **OTHER)
    with pytest.raises(
        ValueError, match=r"a: also changes embed_tokens, lm_head, self_attn.o_proj"
    ):
        import_adapters(dense, [tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_is_an_adapter_that_peft_loads(dense, tmp_path):
    options = {"rank_pattern": {"up_proj": 6}, "lora_alpha": 8, "layers_to_transform": [1]}
    exact, same = adapt(dense_model(), tmp_path / "a", 3, **options)
    adapt(dense_model(), tmp_path / "b", 4)
    import_adapters(dense, [tmp_path / "b", tmp_path / "a"], tmp_path / "mixture")
    ranks = export_adapter(tmp_path / "mixture", 2, tmp_path / "again", base_name="some/base")
    assert ranks == {f"model.layers.1.mlp.{p}": r for p, r in zip(FFN, (4, 6, 4), strict=True)}
    model = peft.PeftModel.from_pretrained(dense_model(), tmp_path / "again")
    with torch.no_grad():
        assert_accurate(model(IDS).logits, exact, same)
    import_adapters(dense, [tmp_path / "b", tmp_path / "again"], tmp_path / "twice")
    first, again = (stored(tmp_path / d) for d in ("mixture", "twice"))
    for name, tensor in first.items():
        assert_same(again[name], tensor, name)


def test_router_rows(dense, mixture, tmp_path):
    adapt(dense_model(), tmp_path / "a", 1)
    rows = torch.randn(1, 16)
    save_file({"gate.weight": rows}, tmp_path / "rows.safetensors")
    for base, known in ((dense, 1), (mixture, 3)):
        out = tmp_path / f"out{known}"
        report = import_adapters(
            base, [tmp_path / "a"], out, router_rows=tmp_path / "rows.safetensors"
        )
        name = "model.layers.1.mlp.gate.weight"
        written = stored(out)[name]
        assert written.shape == (known + 1, 16) and not any("router" in n for n in report.notes)
        assert_same(written[known:], rows)
        assert logits(out).isfinite().all()
    assert_same(written[:3], stored(mixture)[name])
    save_file({"gate.weight": torch.randn(3, 16)}, tmp_path / "rows.safetensors")
    with pytest.raises(ValueError, match=r"router_rows: got \(3, 16\) for layer 0"):
        import_adapters(
            dense, [tmp_path / "a"], tmp_path / "no", router_rows=tmp_path / "rows.safetensors"
        )

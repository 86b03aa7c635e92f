"""Adapters whose names, numbers or ties mislead, against PEFT itself where it has an answer.

Traps: an embedding that is lm_head too; scales and sums that are not finite in the dtype they are
stored in; patterns of an adapter that was made on the decoder without its head; two adapters of one
directory name; two deltas of one weight.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_kernels.adapter_config import read_adapter_config
from flexmore_kernels.adapter_import import import_adapters
from flexmore_kernels.testing import assert_accurate, assert_same
from tests.peft_models import (
    FFN,
    FUSED,
    IDS,
    adapt,
    dense_model,
    logits,
    mixture_model,
    randomised,
    stored,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense") / "base"
    dense_model().save_pretrained(directory)
    return directory


def edit(adapter, **config):
    """The adapter with other entries in its config."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return adapter


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_delta_of_one_of_two_tied_matrices_is_not_averaged(tmp_path, name):
    """With PEFT it leaves the other one as it is; a tied checkpoint holds one matrix for both."""
    dense_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tied = dense_model(tie_word_embeddings=True)
    adapt(tied, tmp_path / "a", 1, target_modules=[*FFN, name])
    with pytest.raises(ValueError, match=rf'{name}.weight: the base ties .*accepted: other="drop"'):
        import_adapters(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", other="average")
    report = import_adapters(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", other="drop")
    assert [(part.kind, part.tensors) for part in report.others] == [(name, 1)]
    assert 0 < report.others[0].size == report.others[0].lost
    written, base = stored(tmp_path / "out"), stored(tmp_path / "base")
    assert "lm_head.weight" not in written
    assert_same(written["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_a_new_embedding_of_a_tied_base_is_of_both(tmp_path):
    dense_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tied = dense_model(tie_word_embeddings=True)
    exact, same = adapt(tied, tmp_path / "a", 1, modules_to_save=["embed_tokens"])
    import_adapters(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", other="average")
    assert_accurate(logits(tmp_path / "out", 1), exact, same)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf"), True])
def test_scales_are_finite_numbers(tmp_path, alpha):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    for change in ({"lora_alpha": alpha}, {"alpha_pattern": {"up_proj": alpha}}):
        edit(tmp_path, **{"lora_alpha": 2, "alpha_pattern": {}} | change)
        with pytest.raises(ValueError, match="alpha.* is .*; accepted: finite numbers"):
            read_adapter_config(tmp_path)
    edit(tmp_path, lora_alpha=2, alpha_pattern={}, use_rslora="false")
    with pytest.raises(ValueError, match="use_rslora is 'false'; accepted: true, false"):
        read_adapter_config(tmp_path)


def test_what_a_dtype_cannot_hold_is_refused(dense, tmp_path):
    adapt(dense_model(), tmp_path / "a", 1)
    edit(tmp_path / "a", lora_alpha=1e300)
    with pytest.raises(ValueError, match=r"beyond torch.float32; accepted: a smaller lora_alpha"):
        import_adapters(dense, [tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_anchored_patterns_of_an_adapter_without_a_head(dense, tmp_path):
    model = dense_model()
    options = {"r": 4, "lora_alpha": 4, "alpha_pattern": {r"^layers.0.mlp.up_proj": 16}}
    wrapped = peft.get_peft_model(model.model, peft.LoraConfig(target_modules=FFN, **options))
    randomised(wrapped, "lora_").save_pretrained(tmp_path / "a")
    with torch.no_grad():
        same = model.lm_head(wrapped(IDS).last_hidden_state)
        model.double()
        exact = model.lm_head(wrapped(IDS).last_hidden_state)
    import_adapters(dense, [tmp_path / "a"], tmp_path / "out")
    assert_accurate(logits(tmp_path / "out", 1), exact, same)


def test_two_adapters_of_one_name(dense, tmp_path):
    for seed, parent in enumerate("xy"):
        adapter = tmp_path / parent / "lora"
        adapt(dense_model(), adapter, seed, target_modules=[*FFN, "q_proj"])
        edit(adapter, base_model_name_or_path=f"org/{parent}")
    both = [tmp_path / "x/lora", tmp_path / "y/lora"]
    with pytest.raises(ValueError, match="for different bases"):
        import_adapters(dense, both, tmp_path / "out", other="drop")
    edit(both[1], base_model_name_or_path="org/x")
    report = import_adapters(dense, both, tmp_path / "out", other="drop")
    assert [(part.adapter, part.tensors) for part in report.others] == [("lora", 2)] * 2


@pytest.mark.parametrize("second", ["one expert beside all", "another prefix"])
def test_a_second_delta_of_a_weight(tmp_path, second):
    base, adapter = tmp_path / "base", tmp_path / "a"
    mixture_model().save_pretrained(base)
    adapt(mixture_model(), adapter, 1, target_modules=[], target_parameters=FUSED)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    if second == "another prefix":
        key = next(iter(sorted(tensors)))
        tensors[key.removeprefix("base_model.model.")] = tensors[key].clone()
    else:
        name = "base_model.model.model.layers.0.mlp.experts.1.gate_proj.lora_"
        tensors |= {f"{name}A.weight": torch.ones(4, 16), f"{name}B.weight": torch.ones(24, 4)}
    save_file(tensors, path)
    words = {"another prefix": "a second one beside"}.get(second, "a second delta of Place")
    with pytest.raises(ValueError, match=words):
        import_adapters(base, [adapter], tmp_path / "out")

"""Changes of experts that fail where it is late: numbers beyond a dtype, memory, inference mode.

Traps: what is read back as Inf after a success, layers that have changed and others that have not,
parameters that are inference tensors, a number that is none.
"""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels import checkpoint, layer_members, membership, reranking
from flexmore_kernels import checkpoint_members as on_disk
from flexmore_kernels.expert import Expert, open_expert
from flexmore_kernels.layer import FlexMoRE
from flexmore_kernels.router_ridge import LayerStatistics, RidgeStatistics, from_ridge
from tests.members import (
    D,
    beside,
    check_unchanged,
    make_checkpoint,
    make_dense,
    make_layer,
    make_model,
    snapshot,
)  # fmt: skip


def test_a_sum_beyond_the_dtype_writes_no_checkpoint(tmp_path):
    whole = make_checkpoint(tmp_path / "whole", (0, 3))
    tensors = {
        n: t.half() for n, t in checkpoint.read_tensors(checkpoint.read_layout(whole)).items()
    }
    for name, tensor in tensors.items():
        if "_a." in name or "_b." in name:
            tensor.fill_(300)
    config = checkpoint.read_layout(whole).config
    checkpoint.save_checkpoint(tmp_path / "half", tensors, config)
    with pytest.raises(ValueError, match="holds Inf as float16"):
        on_disk.rerank(tmp_path / "half", 1, 0, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "whole"]


def test_weights_beyond_the_dtype_change_no_model(tmp_path):
    model = make_model().half()
    before = snapshot(model)
    dense = make_dense(tmp_path / "dense", 1)
    names = {n: t * 1e7 for n, t in checkpoint.load_model(
        make_checkpoint(tmp_path / "one", (0,))).state_dict().items()}  # fmt: skip
    with pytest.raises(ValueError, match="merge_shared: .* holds Inf as float16"):
        membership.add_expert(model, beside(model), merge_shared=names)
    assert model.config.num_experts == 4 and dense.exists()
    check_unchanged(model, before)


def test_statistics_of_another_width_in_a_later_layer_write_no_row():
    model = make_model()
    before = snapshot(model)
    layers = [LayerStatistics(torch.eye(n), torch.ones(n)) for n in (D, 5)]
    with pytest.raises(ValueError, match=r"statistics\[1\]: got \(5, 5\) and \(5,\) in layer 1"):
        from_ridge(model, {1: RidgeStatistics(layers, 3, "base")})
    check_unchanged(model, before)


def test_memory_that_does_not_suffice_leaves_layers_and_config_together(monkeypatch):
    model = make_model().requires_grad_(False)
    model.prepare()
    prepare, calls = FlexMoRE.prepare, []

    def second_fails(layer, merge="auto"):
        calls.append(layer)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("planted")
        return prepare(layer, merge)

    monkeypatch.setattr(FlexMoRE, "prepare", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        membership.add_expert(model, beside(model))
    assert model.config.num_experts == 5
    assert [block.mlp.num_experts for block in model.model.layers] == [5, 5]
    assert model(torch.tensor([[1, 2]])).isfinite().all()


def test_changes_under_inference_mode_make_ordinary_parameters():
    model = make_model()
    with torch.inference_mode():
        membership.add_expert(model, beside(model))
        membership.rerank_expert(model, "law", 2)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()


@pytest.mark.parametrize("bias", [torch.zeros(3), torch.zeros(1), [1, 2], "x", True])
def test_a_bias_that_is_no_number(bias):
    layer = make_layer(expert_bias=True)
    with pytest.raises(ValueError, match="bias: got "):
        layer_members.add_expert(layer, (None, None, None), torch.zeros(D), bias=bias)


def test_names_of_methods_paths_and_bases():
    model = make_model()
    with pytest.raises(ValueError, match="method: got 'zzz'"):
        membership.rerank_expert(model, 1, 2, method="zzz")
    with pytest.raises(ValueError, match="method: got 'zzz'"):
        reranking.reranked(None, torch.zeros(3, 3), 0, method="zzz")
    with pytest.raises(TypeError, match="expert: got int; accepted: an expert, or a path"):
        open_expert(3)
    with pytest.raises(FileNotFoundError, match="expert: no file or folder /nowhere"):
        open_expert("/nowhere")
    with pytest.raises(TypeError, match="base: got 3"):
        Expert(D, 24, [(None, None, None)], None, 3)


def test_an_embedding_that_was_never_set_is_none():
    model = make_model(router="projected", domain_embedding_size=6)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.domain_embeddings.zero_()
    assert membership.take_expert(model, 1).embedding is None

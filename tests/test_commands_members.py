"""The commands on experts: what they write and print, their errors by ValueError."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from flexmore_kernels import checkpoint_members, domain_embedding
from flexmore_kernels.cards import Card
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.commands import (
    add,
    export_expert,
    list_experts,
    replace,
    rerank,
    tag,
    upcycle,
)  # fmt: skip
from flexmore_kernels.expert import Expert
from flexmore_kernels.testing import assert_same
from tests.members import D, L, M, an_expert, make_checkpoint, make_dense, tensors_of


def run(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def mixture(tmp_path):
    return make_checkpoint(tmp_path / "mixture", (0, 3, 0))


def test_an_experts_way_from_one_mixture_to_another(mixture, tmp_path, capsys):
    file, away = tmp_path / "law.safetensors", tmp_path / "away"
    card = ("--name", "law", "--owner", "A. Owner")
    assert run(export_expert, mixture, file, "--expert", "expert-2", *card) == 0
    assert "law, 2 layers, base " in capsys.readouterr().out
    assert run(add, mixture, file, tmp_path / "1") == 0
    assert "top-2 of 4 experts" in capsys.readouterr().out
    assert run(rerank, tmp_path / "1", "law", "2,0,full", tmp_path / "2", "--method", "exact") == 0
    assert (
        run(replace, tmp_path / "2", 1, file, tmp_path / "3", "--name", "laws", "--row", "mean")
        == 0
    )
    assert run(tag, tmp_path / "3", "base", "--licence", "CC0") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "base: owner -, licence CC0"
    assert run(list_experts, tmp_path / "3") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["name", "owner", "licence", "ranks", "MB"]
    assert rows[1] == ["0", "base", "-", "CC0", "full", "size", "0.01"]
    assert rows[2] == ["1", "laws", "A.", "Owner", "-", "full", "size", "0.01"]
    assert rows[4][:8] == ["3", "law", "A.", "Owner", "-", "full", "size", "and"]
    assert run(list_experts, tmp_path / "3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found[3]["layer_ranks"] == [[2, 0, "full"]] * L and found[0]["licence"] == "CC0"
    name = "model.layers.0.mlp.gate.weight"
    rows = tensors_of(tmp_path / "2")[name]
    assert_same(tensors_of(tmp_path / "3")[name][1], rows.mean(0))
    assert not away.exists()


def test_a_dense_model_or_a_foreign_expert_joins(mixture, tmp_path):
    dense = make_dense(tmp_path / "math", seed=1)
    assert run(add, mixture, dense, tmp_path / "1", "--rank", "2", "--row", "zeros") == 0
    assert read_layout(tmp_path / "1").layer_ranks == ((0, 3, 0, 2),) * L
    assert checkpoint_members.list_experts(tmp_path / "1")[3].name == "math"
    an_expert(base="0" * 16).save(tmp_path / "far")
    with pytest.raises(ValueError, match="--any-base"):
        run(add, mixture, tmp_path / "far", tmp_path / "2", "--row", "zeros")
    with pytest.warns(UserWarning, match="does not say which base"):
        given = (mixture, tmp_path / "far", tmp_path / "2", "--row", "zeros", "--any-base")
        assert run(add, *given, "--merge-shared", dense) == 0


def test_embeddings_by_name(tmp_path):
    vectors = {"law": torch.randn(M), "code": torch.randn(M), "math": torch.randn(M)}
    domain_embedding.save_embeddings(tmp_path / "e.safetensors", vectors)
    dense = [make_dense(tmp_path / name, n) for n, name in enumerate(("seed", "law", "code"))]
    given = ("--embeddings", tmp_path / "e.safetensors", "--router", "projected")
    assert run(upcycle, *dense, tmp_path / "up", *given) == 0
    layout = read_layout(tmp_path / "up")
    assert layout.config["router"] == "projected" and layout.config["shared_expert"] is True
    embedding = ("--embedding", tmp_path / "e.safetensors")
    an_expert().save(tmp_path / "file")
    with pytest.warns(UserWarning):
        run(add, tmp_path / "up", tmp_path / "file", tmp_path / "1", *embedding, "--name", "math")
    stored = tensors_of(tmp_path / "1")["model.layers.1.mlp.gate.domain_embeddings"]
    assert_same(stored[1:], torch.stack(list(vectors.values())))
    with pytest.raises(ValueError, match="--embedding: .* has none of 'bible'; accepted: --name"):
        run(add, tmp_path / "up", tmp_path / "file", tmp_path / "2", *embedding, "--name", "bible")
    assert (
        run(upcycle, *dense, tmp_path / "low", "--rank", "1", "--names", "a,b", "--top-k", "2") == 0
    )
    names = [one.name for one in checkpoint_members.list_experts(tmp_path / "low")]
    assert names == ["base", "a", "b"]


def test_an_embedding_as_a_linear_row(mixture, tmp_path):
    domain_embedding.save_embeddings(tmp_path / "e.safetensors", {"any": torch.randn(D)})
    expert = an_expert(base=Expert.from_checkpoint(mixture, 1).base)
    expert.save(tmp_path / "file")
    given = (mixture, tmp_path / "file", tmp_path / "1", "--row", "embedding")
    with pytest.raises(ValueError, match="^--row embedding: the expert has none"):
        run(add, *given)
    assert run(add, *given, "--embedding", tmp_path / "e.safetensors") == 0
    row = tensors_of(tmp_path / "1")["model.layers.1.mlp.gate.weight"][3]
    assert_same(row, domain_embedding.load_embeddings(tmp_path / "e.safetensors")["any"])


def test_bad_input_is_an_error_before_any_work(mixture, tmp_path):
    with pytest.raises(ValueError, match="^name: got None for an expert without a card"):
        run(export_expert, mixture, tmp_path / "f", "--expert", 1, "--owner", "A. Owner")
    with pytest.raises(ValueError, match="^--name, --owner, --licence: got none"):
        run(tag, mixture, 1)
    with pytest.raises(ValueError, match="^expert: got 'law', which is not here"):
        run(rerank, mixture, "law", 2, tmp_path / "1")
    with pytest.raises(SystemExit):
        run(rerank, mixture, 1, "2,3", tmp_path / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["mixture"]
    assert checkpoint_members.tag(mixture, 1, name="x") == Card("x")

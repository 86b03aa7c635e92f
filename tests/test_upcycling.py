"""Dense models upcycled to a mixture.

Traps: the seed taken into the mean, a difference to another model's FFN, other random numbers in a
second run, rows whose size follows the embedder's scale, the base's row where it is not shared.
"""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels import checkpoint, membership
from flexmore_kernels.adapter_base import BaseCheckpoint
from flexmore_kernels.base_fingerprint import of_checkpoint
from flexmore_kernels.cards import Card
from flexmore_kernels.checkpoint_writer import CheckpointWriter
from flexmore_kernels.expert import Expert
from flexmore_kernels.shared_weights import is_shared
from flexmore_kernels.testing import assert_accurate, assert_same
from flexmore_kernels.upcycling import default_cards, ordered_embeddings, upcycle
from tests.members import D, L, M, make_checkpoint, make_dense, tensors_of

NAMES = ("seed", "law", "code", "math")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return [make_dense(folder / name, seed) for seed, name in enumerate(NAMES)]


def dense_tensors(directory):
    return checkpoint.read_tensors(BaseCheckpoint(directory).layout)


def test_full_size_experts_around_the_seed(models, tmp_path):
    seed, *dense = models
    layout = upcycle(seed, dense, tmp_path / "out")
    assert layout.layer_ranks == ((0,) * 4,) * L and layout.notes == ()
    assert layout.config["shared_expert"] is True and layout.config["num_experts_per_tok"] == 1
    assert [card["name"] for card in layout.config["experts"]] == ["base", *NAMES[1:]]
    found, parts = tensors_of(tmp_path / "out"), [dense_tensors(one) for one in models]
    for name, tensor in parts[0].items():
        if is_shared(name):
            mean = sum(part[name].double() for part in parts[1:]) / 3
            assert_same(found[name], mean.float(), name)
            continue
        assert_same(found[name], tensor, name)
        for expert in (1, 2, 3):
            own = found[name.replace(".experts.0.", f".experts.{expert}.")]
            assert_same(own, parts[expert][name], name)
    assert of_checkpoint(tmp_path / "out") == of_checkpoint(seed)
    rows = found["model.layers.0.mlp.gate.weight"]
    assert 0.01 < float(rows.std()) < 0.03
    assert not torch.equal(rows, found["model.layers.1.mlp.gate.weight"])
    checkpoint.load_model(tmp_path / "out")(torch.arange(6)[None])


def test_one_model_becomes_itself(models, tmp_path):
    """The seed alone, upcycled: shared FFN at weight 1 beside an expert of no difference."""
    upcycle(models[0], [models[0]], tmp_path / "out", ranks=(0, 0, 0))
    ids, mask = torch.arange(8)[None], torch.tensor([True, False])
    make_checkpoint(tmp_path / "dense", (0,), top_k=1)  # of the same seed as models[0]
    with torch.no_grad():
        y = checkpoint.load_model(tmp_path / "out")(ids, expert_mask=mask)
        dense = checkpoint.load_model(tmp_path / "dense")
        assert_accurate(y, dense.double()(ids), dense.float()(ids))


def test_low_rank_experts_are_differences_to_the_seed(models, tmp_path):
    ranks = [2, (0, "full", 3), 0]
    layout = upcycle(models[0], models[1:], tmp_path / "out", ranks=ranks)
    assert layout.layer_ranks == ((0, *ranks),) * L
    same = Expert.from_dense(models[1], 2, base=models[0])
    assert_same(
        tensors_of(tmp_path / "out")["model.layers.1.mlp.experts.1.down_proj_a.weight"],
        same.layers[1][2][0],
    )
    assert Expert.from_checkpoint(tmp_path / "out", "law").base == same.base


@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_projected_rows_start_as_large_as_linear_ones(models, tmp_path, scale):
    embeddings = scale * torch.nn.functional.normalize(torch.randn(3, 64), dim=1)
    options = {"router": "projected", "projector_size": 512}
    layout = upcycle(models[0], models[1:], tmp_path / "out", embeddings=embeddings, **options)
    assert (layout.config["domain_embedding_size"], layout.config["projector_size"]) == (64, 512)
    model = checkpoint.load_model(tmp_path / "out")
    for block in model.model.layers:
        gate = block.mlp.gate
        assert_same(gate.domain_embeddings[1:], embeddings)
        # 48 numbers of std 0.02, a tenth off: their std is within 5 of its own deviations.
        assert 0.008 < float(gate.rows()[1:].detach().std()) < 0.032
        assert not bool(gate.domain_embeddings[0].any()) and not bool(gate.rows()[0].any())


def test_linear_rows_start_as_embeddings(models, tmp_path):
    embeddings, cards = torch.randn(4, D), [Card("public"), *map(Card, "abc")]
    options = {"shared_expert": False, "top_k": 2, "cards": cards}
    upcycle(models[0], models[1:], tmp_path / "out", embeddings=embeddings, **options)
    model = checkpoint.load_model(tmp_path / "out")
    assert model.config.shared_expert is False and model.config.num_experts_per_tok == 2
    assert [one.name for one in membership.list_experts(model)] == ["public", "a", "b", "c"]
    for block in model.model.layers:
        assert_same(block.mlp.gate.weight, embeddings)


def test_a_model_more_joins_as_if_it_had_been_there(models, tmp_path):
    """The mean over n models and one with 1 / (n + 1) is the mean over n + 1."""
    embeddings = torch.randn(3, D)
    upcycle(models[0], models[1:3], tmp_path / "two", embeddings=embeddings[:2])
    upcycle(models[0], models[1:], tmp_path / "three", embeddings=embeddings)
    model = checkpoint.load_model(tmp_path / "two")
    expert = Expert.from_dense(models[3])
    with pytest.warns(UserWarning, match="math does not say which base"):
        given = {"router_rows": embeddings[2], "merge_shared": models[3]}
        membership.add_expert(model, expert, **given)
    wanted = tensors_of(tmp_path / "three")
    for name, tensor in model.state_dict().items():
        if not is_shared(name):
            assert_same(tensor, wanted[name], name)
            continue
        parts = [dense_tensors(one)[name] for one in models[1:]]
        mean = torch.stack(parts).double().mean(0)
        # Rounded to float32 twice here, the mean over two models first: twice one rounding.
        twice = ((2 / 3) * torch.stack(parts[:2]).mean(0) + parts[2] / 3).float()
        assert_accurate(tensor, mean, twice, name)


def test_the_same_bits_after_a_kill(models, tmp_path, monkeypatch):
    given = {"embeddings": torch.randn(3, M), "router": "projected", "seed": 3}
    upcycle(models[0], models[1:], tmp_path / "whole", **given)
    write, written = CheckpointWriter.write, []

    def stop(self, unit, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(unit)
        write(self, unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            upcycle(models[0], models[1:], tmp_path / "out", **given)
    torch.rand(7)  # another state of the global generator
    upcycle(models[0], models[1:], tmp_path / "out", **given)
    whole, out = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    for name, tensor in whole.items():
        assert_same(out[name], tensor, name)
    upcycle(models[0], models[1:], tmp_path / "other", **given | {"seed": 4})
    name = "model.layers.0.mlp.gate.projector_in.weight"
    assert not torch.equal(tensors_of(tmp_path / "other")[name], whole[name])


def test_what_is_refused(models, tmp_path):
    wide = make_checkpoint(tmp_path / "theta", (0,), rope_theta=1e4)
    some, out = torch.randn(3, D), tmp_path / "out"
    for arguments, words in (
        ({"dense_dirs": []}, "^dense_dirs: got"),
        ({"dense_dirs": [wide]}, "rope_theta is 500000.0 in .*seed and 10000.0 in"),
        ({"router": "projected"}, "^embeddings: got None"),
        ({"embeddings": some[:2]}, "^embeddings: got 2 rows; accepted: 3 or 4"),
        ({"embeddings": some, "shared_expert": False}, "^embeddings: got 3 rows; accepted: 4, the"),
        ({"embeddings": torch.randn(3, D + 1)}, "^embeddings: got width 17; accepted: D, 16"),
        ({"embeddings": torch.zeros(3, D)}, "^embeddings: got zeros alone"),
        ({"embeddings": some * torch.nan}, "^embeddings: holds NaN"),
        ({"projector_size": 8}, "^projector_size: got 8"),
        ({"ranks": [1, 2]}, "^ranks: got 2"),
        ({"ranks": 17}, "^rank: got 17"),
        ({"top_k": 4}, "^top_k: got 4; accepted: an integer from 1 to 3"),
        ({"cards": [Card("a")] * 4}, "^cards: got 'a' twice"),
        ({"router": "other"}, "^router: got 'other'"),
    ):
        given = {"seed_dir": models[0], "dense_dirs": models[1:], "out": out, **arguments}
        with pytest.raises(ValueError, match=words):
            upcycle(**given)
    assert {path.name for path in tmp_path.iterdir()} == {"theta"}


def test_names_and_their_embeddings():
    cards = default_cards(["a/law", "b/law", "base", "math"])
    assert [card.name for card in cards] == ["base", "law-1", "law-2", "base-3", "math"]
    vectors = {name: torch.full((2,), n) for n, name in enumerate(["math", "law", "base"])}
    found = ordered_embeddings(vectors, [Card("base"), Card("law"), Card("math")])
    assert found[:, 0].tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="^embeddings: none of 'code'"):
        ordered_embeddings(vectors, [Card("base"), Card("code")])

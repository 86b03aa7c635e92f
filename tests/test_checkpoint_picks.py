"""What experts bring along when checkpoints are merged, split or thinned: names, rows, shares.

Traps: default names that follow the number, explicit ones that stay, two of one name, a projected
router's rows and its projector, a shared expert whose number moves.
"""

from __future__ import annotations

import json

import pytest
import torch

import flexmore_kernels as fk
from flexmore_kernels import checkpoint, checkpoint_edit
from flexmore_kernels.cards import cards_of
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.testing import assert_accurate, assert_same

NAMES = ("base", "math", "law", "news")


def cards(names=NAMES):
    return [{"name": name, "owner": name.title(), "licence": "CC0"} for name in names]


def make(directory, ranks=(0, 3, 0, 2), seed=0, **fields):
    config = fk.FlexMoREConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_experts_per_tok=1, expert_ranks=list(ranks), **fields,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = fk.FlexMoREForCausalLM(config)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" not in name:
                tensor.normal_(std=0.2)
    checkpoint.save_checkpoint(directory, model.state_dict(), config.to_dict())
    return directory


def logits(directory, mask=None, **kind):
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        return checkpoint.load_model(directory, **kind)(ids, expert_mask=mask)


PROJECTED = {"router": "projected", "domain_embedding_size": 6, "projector_size": 8}


@pytest.mark.parametrize("fields", [{}, PROJECTED, {"shared_expert": True},
                                    {**PROJECTED, "shared_expert": 3}])  # fmt: skip
def test_a_model_is_read_as_it_was_written(tmp_path, fields):
    whole = make(tmp_path / "whole", experts=cards(), **fields)
    config = checkpoint.load_model(whole).config
    assert config.experts == cards()
    assert {name: getattr(config, name) for name in fields} == fields
    layer = checkpoint.load_layer(whole, 1)
    x = torch.randn(3, 16)
    assert_same(layer(x), checkpoint.load_model(whole).model.layers[1].mlp(x))


@pytest.mark.parametrize("fields", [{}, PROJECTED, {**PROJECTED, "shared_expert": True}])
def test_drop_by_name_is_the_mask(tmp_path, fields):
    whole = make(tmp_path / "whole", experts=cards(), **fields)
    less = checkpoint_edit.drop(whole, ["law"], tmp_path / "less")
    assert [card.name for card in cards_of(less.config, 3)] == ["base", "math", "news"]
    assert cards_of(less.config, 3)[2].owner == "News"
    mask = torch.tensor([True, True, False, True])
    truth = logits(whole, mask, dtype=torch.float64)
    assert_accurate(logits(less), truth, logits(whole, mask))


def test_names_stay_when_numbers_move_up(tmp_path):
    """Else a request for expert-1, which is gone, would get another one."""
    whole = make(tmp_path / "whole")
    less = checkpoint_edit.drop(whole, [1], tmp_path / "less")
    assert [card.name for card in cards_of(less.config, 3)] == ["base", "expert-2", "expert-3"]
    last = checkpoint_edit.drop(whole, [3], tmp_path / "last")
    assert "experts" not in last.config


def test_default_names_follow_the_number_in_a_merge(tmp_path):
    parts = checkpoint_edit.split(make(tmp_path / "whole"), tmp_path / "parts")
    both = checkpoint_edit.merge([parts[1], parts[0]], tmp_path / "both")
    assert [card.name for card in cards_of(both.config, 3)] == ["base", "expert-1", "expert-2"]


def test_the_shared_expert_moves_up_and_stays(tmp_path):
    whole = make(tmp_path / "whole", shared_expert=3, experts=cards())
    less = checkpoint_edit.drop(whole, ["math"], tmp_path / "less")
    assert less.config["shared_expert"] == 2
    mask = torch.tensor([True, False, True, True])
    truth = logits(whole, mask, dtype=torch.float64)
    assert_accurate(logits(less), truth, logits(whole, mask))
    with pytest.raises(ValueError, match="experts: got 3, the shared expert"):
        checkpoint_edit.drop(whole, ["news"], tmp_path / "none")


@pytest.mark.parametrize("fields", [{}, PROJECTED, {**PROJECTED, "shared_expert": True}])
def test_split_and_merge_bring_it_all_back(tmp_path, fields):
    whole = make(tmp_path / "whole", experts=cards(), **fields)
    parts = checkpoint_edit.split(whole, tmp_path / "parts")
    found = [cards_of(read_layout(part).config, 2)[1].name for part in parts]
    assert found == ["math", "law", "news"]
    merged = checkpoint_edit.merge(parts, tmp_path / "merged", top_k=1)
    assert merged.config["experts"] == cards()
    same, other = (checkpoint.read_tensors(read_layout(d)) for d in (whole, tmp_path / "merged"))
    assert same.keys() == other.keys()
    for name, tensor in same.items():
        assert_same(tensor, other[name], name)


def test_two_of_one_name_are_refused(tmp_path):
    whole = make(tmp_path / "whole", experts=cards())
    parts = checkpoint_edit.split(whole, tmp_path / "parts")
    with pytest.raises(ValueError, match="experts: got 'math' twice"):
        checkpoint_edit.merge([parts[0], parts[1], parts[0]], tmp_path / "merged")


BAD = [
    ({"router": "nexus"}, "router: got 'nexus'"),
    ({"router": "projected"}, "domain_embedding_size: got None"),
    ({"shared_expert": 9}, "shared_expert: got 9"),
    ({"shared_expert": True, "num_experts_per_tok": 4}, "num_experts_per_tok is 4; accepted: 1 to"),
    ({"experts": cards(("base", "a", "a", "b"))}, "experts: got 'a' twice"),
    ({"experts": cards(("base", "a"))}, "experts: got 2 cards; accepted: 4"),
    ({"experts": "math"}, "experts: got 'math'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_config_is_named(tmp_path, fields, message):
    whole = make(tmp_path / "whole")
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=message):
        read_layout(whole)


def test_plain_readers_would_compute_another_model(tmp_path):
    whole = make(tmp_path / "whole", shared_expert=True)
    with pytest.raises(ValueError, match="shared_expert: got True; accepted by plain readers"):
        checkpoint_edit.drop(whole, [1], tmp_path / "less", compat=True)


def test_flex_olmo_has_no_place_for_other_routers(tmp_path):
    whole = make(tmp_path / "whole", shared_expert=True)
    with pytest.raises(ValueError, match="shared_expert: got True; kind 'flex_olmo'"):
        checkpoint_edit.densify(whole, tmp_path / "olmo")

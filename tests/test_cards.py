"""Cards: names that stay, masks by name, what config.json keeps of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flexmore_kernels as fk
from flexmore_kernels.cards import (
    Card,
    cards_of,
    check_cards,
    config_cards,
    find,
    mask_of,
    new_name,
)

CARDS = (Card("base"), Card("math", "Ada", "CC0"), Card("law"))


def test_default_names_are_not_written():
    cards = cards_of({}, 3)
    assert [card.name for card in cards] == ["base", "expert-1", "expert-2"]
    assert config_cards(cards) is None
    assert config_cards(CARDS)[1] == {"name": "math", "owner": "Ada", "licence": "CC0"}


def test_config_round_trip():
    config = fk.FlexMoREConfig(expert_ranks=[0, 4, 4], num_experts_per_tok=1, experts=CARDS)
    values = config.to_dict()
    assert cards_of(values, 3) == CARDS
    assert fk.FlexMoREConfig.from_dict(values).experts == config.experts
    plain = fk.FlexMoREConfig(expert_ranks=[0, 4, 4], num_experts_per_tok=1).to_dict()
    assert not {"experts", "router", "shared_expert"} & plain.keys()


def test_masks_by_name_and_number():
    assert mask_of(CARDS, only=["math", 0]).tolist() == [True, True, False]
    assert mask_of(CARDS, without=["math"]).tolist() == [True, False, True]
    assert mask_of(CARDS, only=["base", "law"], without=[2]).tolist() == [True, False, False]
    for nothing_but_law in (np.array([2]), torch.tensor([2]), iter([2])):
        assert mask_of(CARDS, without=nothing_but_law).tolist() == [True, True, False]
    assert mask_of(CARDS, without=torch.tensor([0])).tolist() == [False, True, True]
    assert find(CARDS, "law") == 2 and new_name(CARDS) == "expert-3"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: find(CARDS, "news"), "'news', which is not here .* accepted: base, math, law"),
        (lambda: find(CARDS, 3), "expert: got 3; accepted: an integer from 0 to 2"),
        (lambda: mask_of(CARDS, only=["math"], without=["math"]), "leaves no expert"),
        (lambda: mask_of(CARDS, only="math"), "only: got 'math'; accepted: a list"),
        (lambda: mask_of(CARDS, without=1), "without: got 1; accepted: a list"),
        (lambda: check_cards(CARDS, 2), "got 3 cards; accepted: 2"),
        (lambda: check_cards([Card("a"), Card("a")], 2), "got 'a' twice"),
        (lambda: check_cards([{"name": "1"}], 1), "got the name '1'"),
        (lambda: check_cards([{"name": "a,b"}], 1), "got the name 'a,b'"),
        (lambda: check_cards([{"name": ""}], 1), "got the name ''"),
        (lambda: check_cards([{"name": "a", "age": 3}], 1), "accepted: a Card"),
        (lambda: check_cards([Card("a", owner=3)], 1), "got the owner 3"),
        (lambda: check_cards("ab", 2), "experts: got 'ab'"),
    ],
)
def test_bad_cards_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()

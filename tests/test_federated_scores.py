"""examples/federated/: losses, multiple choice, windows and factors, against slow twins.

Traps covered: a score that is off by one token, a choice's length that counts, windows that reach
into the next text, factors weighted by another expert's inputs.
"""

from __future__ import annotations

import math

import pytest
import torch
from federated_runs import EARLY, TINY, factors, scores, tiny_seed, train
from torch.nn import functional as F


def test_loss_is_the_mean_over_tokens_that_follow(tmp_path):
    seed = tiny_seed(tmp_path)
    model = seed.base_model(seed.base)
    found, _ = scores.losses(model, seed.corpus.heldout)
    windows, bytes_a_token = seed.corpus.heldout[EARLY[0]]
    assert bytes_a_token == 3 and windows.shape == (10, TINY.length + 1)
    total = 0.0
    for row in windows.long():
        logits = model(row[None, :-1])[0]
        total += float(F.cross_entropy(logits, row[1:], reduction="sum"))
    expected = total / (10 * TINY.length)
    assert found[EARLY[0]]["token"] == pytest.approx(expected, rel=1e-5)
    assert found[EARLY[0]]["byte"] == pytest.approx(expected / 3, rel=1e-5)


def test_probe_ranks_choices_by_likelihood(tmp_path, monkeypatch):
    """Against sequences one by one; batches of a few tokens, so that there are several."""
    monkeypatch.setattr(scores, "TOKENS", 30)
    seed = tiny_seed(tmp_path)
    model = seed.base_model(seed.base)
    draw = torch.Generator().manual_seed(3)
    ids = lambda n: torch.randint(48, (n,), generator=draw).tolist()
    items = [
        scores.Item(ids(3 + n), [(ids(1 + (n + c) % 4), 2 + c) for c in range(2 + n % 2)], n % 2)
        for n in range(9)
    ]
    items.append(scores.Item(ids(30), [(ids(3), 3), (ids(2), 3)], 1))  # longer than a window
    found = scores.probe(
        model, scores.packed("p", "knowledge", EARLY[0], items, 16, torch.device("cpu"))
    )
    right, raw, share = [], [], []
    for item in items:
        logs = []
        for choice, _ in item.choices:
            row = torch.tensor((item.prompt + choice)[-17:])
            each = model(row[None, :-1])[0].log_softmax(1).gather(1, row[1:, None])
            logs.append(float(each[-len(choice) :].sum()))
        a_byte = [log / size for log, (_, size) in zip(logs, item.choices, strict=True)]
        right.append(a_byte.index(max(a_byte)) == item.answer)
        raw.append(logs.index(max(logs)) == item.answer)
        share.append(float(torch.tensor(logs).softmax(0)[item.answer]))
    assert found["right"] == "".join(str(int(one)) for one in right)
    assert found["score"] == sum(right) / 10 and found["raw"] == sum(raw) / 10
    assert found["probability"] == pytest.approx(sum(share) / 10, rel=1e-4)


def test_windows_stay_within_their_texts():
    ids = torch.arange(70, dtype=torch.int32)
    source = train.Source.of((ids[:20], 1.0), (ids[20:50], 3.0), (ids[50:], 0.0))
    draw = lambda: train.windows(source, 4000, 16, torch.Generator().manual_seed(0))
    starts = draw()
    assert torch.equal(starts, draw())
    assert sorted(set(starts.tolist())) == [*range(4), *range(20, 34)]
    share = float((starts < 20).double().mean())
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    with pytest.raises(ValueError, match="one of 20 tokens; accepted: more than 20"):
        train.windows(source, 1, 20, torch.Generator())


def test_weighted_factors_lose_less_of_what_the_owner_sees(tmp_path):
    seed, domain, rank = tiny_seed(tmp_path), EARLY[0], 2
    seen, full = seed._seen(domain), seed.expert(domain)
    cuts = [factors.cut(seed.factored(domain, weighted), full, rank) for weighted in (True, False)]
    for (layer, projection), weight in full.items():
        moment = seen.second_moment(layer, 1, projection)
        delta = (weight - seed.base_ffn[layer, projection]).double()
        lost = []
        for cut in cuts:
            a, b = cut[layer, projection]
            assert a.shape[0] == b.shape[1] == rank
            rest = delta - (b @ a).double()
            lost.append(float(((rest @ moment) * rest).sum()))
        assert lost[0] < lost[1]
    assert factors.cut(seed.factored(domain), full, "full") == full

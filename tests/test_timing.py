"""The timer: who is called when, what is reported; on a GPU, that a graph and cold inputs are used.

No time itself is asserted: that would fail on a busy machine and prove nothing on an idle one.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from flexmore_kernels import timing
from flexmore_kernels.timing import CallFailed, compare

gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_candidates_take_turns_and_none_is_always_after_the_same():
    called = []
    candidates = {name: lambda name=name: called.append(name) for name in "abc"}
    times = compare(candidates, "cpu", rounds=20)
    warm_up = 6
    rounds = [called[i : i + 3] for i in range(warm_up, warm_up + 60, 3)]
    assert all(sorted(one) == list("abc") for one in rounds)
    before = set(itertools.pairwise(called[warm_up:]))
    assert before >= {(a, b) for a in "abc" for b in "abc" if a != b}
    for found in times.values():
        assert found.rounds == 20 and found.how == "wall"
        assert 0 <= found.p20 <= found.ms <= found.p80


def test_copies_of_the_inputs_take_turns():
    called = []
    compare({"a": [lambda i=i: called.append(i) for i in range(3)]}, "cpu", rounds=6)
    assert called[3:] == [0, 1, 2, 0, 1, 2]


def test_rounds_end_with_the_budget_but_not_before_the_least():
    times = compare({"a": lambda: None}, "cpu", rounds=1000, min_rounds=5, budget_s=0.0)
    assert times["a"].rounds == 5


def test_each_round_looks_once():
    looks = []
    compare({"a": int, "b": int}, "cpu", rounds=7, each_round=lambda: looks.append(1))
    assert len(looks) == 7


def test_who_failed_is_named():
    calls = iter(range(5))

    def fails_later():
        if next(calls) == 4:
            raise ValueError("no more")

    with pytest.raises(CallFailed, match="late: ValueError: no more") as caught:
        compare({"fine": int, "late": fails_later}, "cpu", rounds=9)
    assert caught.value.name == "late" and isinstance(caught.value.__cause__, ValueError)


def test_an_interrupt_keeps_what_was_measured():
    calls = iter(range(100))

    def interrupted():
        if next(calls) == 8:
            raise KeyboardInterrupt

    with pytest.raises(timing.Interrupted) as caught:
        compare({"first": int, "second": interrupted, "third": int}, "cpu", rounds=50)
    assert isinstance(caught.value, KeyboardInterrupt)
    found = {name: times.rounds for name, times in caught.value.times.items()}
    assert found["second"] == 6 and {found["first"], found["third"]} <= {6, 7}


def test_how_many_copies_are_cold(monkeypatch):
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 50 << 20)
    assert timing.copies_for(150 << 20, "cuda") == 1
    assert timing.copies_for((150 << 20) - 1, "cuda") == 2
    assert timing.copies_for(1 << 20, "cuda") == 150
    assert timing.copies_for(0, "cuda") == timing.MAX_GRAPH_CALLS
    monkeypatch.undo()
    assert timing.copies_for(1, "cpu") == 1


@gpu
@on_gpu
def test_short_calls_are_replayed_and_waiting_ones_are_not():
    count = timing.copies_for(1 << 20, "cuda")
    inputs = [torch.randn(1 << 18, device="cuda") for _ in range(count)]
    called = []

    def waits(x):
        called.append(1)
        return float(x[0])

    times = compare(
        {
            "short": [lambda x=x: x * 2 for x in inputs],
            "waits": [lambda x=x: waits(x) for x in inputs],
            "long": lambda: torch.cuda._sleep(20_000_000),
        },
        "cuda",
        rounds=3,
        graphs=True,
    )
    assert times["short"].how == "graph" and times["short"].calls % count == 0
    assert times["short"].called_ms is not None
    assert times["waits"].how == "events" and len(called) == 3 + 1 + 1 + 3
    assert times["long"].how == "events" and times["long"].host_ms < times["long"].ms
    assert times["waits"].host_ms is None, "what waits for the device is not let ahead"


@gpu
@on_gpu
def test_a_replay_computes_every_call():
    counter = torch.zeros(1, device="cuda")
    times = compare({"count": lambda: counter.add_(1)}, "cuda", rounds=2, graphs=True)
    assert times["count"].how == "graph"
    # Warm-up, probes and rounds called one by one; each replay adds all the calls of its graph.
    assert counter.item() > 2 * times["count"].calls

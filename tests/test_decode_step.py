"""Steps that make one token a request: what they leave behind, and where a graph is captured.

Traps covered: tokens that reach the host late, ends that it sees at another time in each run, a
capture on a stream that is another device's.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from test_generation import make, prompts

from flexmore_kernels import decode_step, testing
from flexmore_kernels.decode_step import LAG, WARM_UP, DecodeStep
from flexmore_kernels.sampling import Sampling

NEW = 20


class Event:
    """Of a copy that arrives after so many questions."""

    def __init__(self, late):
        self.late = late

    def query(self):
        self.late -= 1
        return self.late < 0

    def synchronize(self):
        self.late = 0


@pytest.fixture(params=((0,), (1, 0, 2), (9,)), ids=str)
def late(request, monkeypatch):
    """The CPU as a device whose tokens arrive so late, in turn."""
    delays, copy, begin = itertools.cycle(request.param), DecodeStep.copy_to, DecodeStep.take
    monkeypatch.setattr(
        DecodeStep, "copy_to", lambda step, slot: (copy(step, slot), Event(next(delays)))[1]
    )

    def take(step, logits):
        step.lag = LAG
        begin(step, logits)

    monkeypatch.setattr(DecodeStep, "take", take)


def test_what_is_drawn_does_not_depend_on_when_the_host_looks(late):
    torch.manual_seed(1)
    model = make()
    ids, _ = prompts()
    generator = torch.Generator().manual_seed(3)
    options = {"max_new_tokens": NEW, "temperature": 1.0, "generator": generator}
    found = model.generate(ids, eos_token_id=list(range(40)), **options)
    made = found.shape[1] - ids.shape[1]
    assert 1 < made < NEW - LAG
    # As many draws as tokens, and those of the steps that may have been under way.
    again = torch.Generator().manual_seed(3)
    model.generate(
        ids, **(options | {"generator": again, "max_new_tokens": made + LAG}), eos_token_id=()
    )
    testing.assert_same(generator.get_state(), again.get_state())


def test_a_requests_end_ends_its_tokens_for_the_counters(late):
    """As many as of each request alone, however many steps ran to fill up the batch."""
    model = make()
    ids, mask = prompts()
    stops = model.generate(ids, attention_mask=mask, max_new_tokens=2)[0, -1:].tolist()
    with model.counting() as together:
        found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=stops)
    tokens, load = 0, 0
    for row in range(len(ids)):
        real = ids[row : row + 1, -int(mask[row].sum()) :]
        with model.counting() as alone:
            model.generate(real, max_new_tokens=NEW, eos_token_id=stops)
        tokens, load = tokens + alone[0].tokens, load + alone[0].load
    assert int(tokens) < int(mask.sum()) + found[:, 7:].numel() - len(ids)
    testing.assert_same(together[0].tokens, tokens)
    testing.assert_same(together[0].load, load)


class Calls(list):
    def context(self, name):
        @contextlib.contextmanager
        def enter(*given, **options):
            self.append((name, given, options))
            yield

        return enter


def test_a_capture_is_on_a_stream_of_its_device_and_its_own(monkeypatch):
    """The stream that the first steps ran on, and no other that lives; later ones take it over."""
    calls = Calls()
    for name in ("graph", "stream", "use_mem_pool"):
        monkeypatch.setattr(torch.cuda, name, calls.context(name))
    where = Calls()
    monkeypatch.setattr(torch.cuda, "device", where.context("device"))

    made, waits, numbers = [], [], itertools.count()
    # Streams come round after three, and one of them has run products already.
    used, allocated = {2}, [0]

    def current(device):
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    def stream():
        number = next(numbers) % 3
        made.append(number)
        return SimpleNamespace(
            device=where[-1][1][0], cuda_stream=number,
            wait_stream=lambda other: None, wait_event=waits.append,
        )  # fmt: skip

    def handle():
        (number,) = [given[0].cuda_stream for name, given, _ in calls[-2:] if name == "stream"]
        if number not in used:
            used.add(number)
            allocated[0] += 1

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", handle)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(decode_step, "_idle", collections.defaultdict(list))
    monkeypatch.setattr(decode_step, "_taken", set())
    weight = torch.zeros(5, 1)

    def model(ids, **_):
        return torch.randn(len(ids), 1, 5)

    model.model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))

    def run():
        calls.clear()
        cache = SimpleNamespace(length=3, advance=lambda length: None)
        step = DecodeStep(model, cache, Sampling(), [], 0, cuda_graph=True)
        begun = len(calls)
        step.take(torch.randn(2, 1, 5))
        step.run_to(2 + WARM_UP)
        ((_, _, options),) = [call for call in calls if call[0] == "graph"]
        assert options["capture_error_mode"] == "thread_local"
        assert options["stream"].device == weight.device
        # Each step that warms up: the workspace first, from the stream's own pool.
        names = [name for name, _, _ in calls[begun:] if name != "graph"]
        assert names == ["stream", "use_mem_pool", "stream"] * WARM_UP
        assert {given[0] for name, given, _ in calls if name == "use_mem_pool"} == (
            {step._beside._pool}
        )
        on = [given[0].cuda_stream for name, given, _ in calls[begun:] if name == "stream"]
        assert set(on) == {options["stream"].cuda_stream}
        return step, options["stream"]

    (first, its), (second, other) = run(), run()
    assert (its.cuda_stream, other.cuda_stream) == (0, 1) and waits == []
    beside = first._beside
    assert beside.graph is not None
    del first
    assert beside.graph is None
    third, again = run()
    assert again is its and len(waits) == WARM_UP  # for what the first one replayed last
    assert second._beside.stream is other
    # Stream 2 has run products, and the others are taken: the last choice, not an error.
    run()
    assert made[:2] == [0, 1] and len(made) == 2 + decode_step._Beside.STREAMS

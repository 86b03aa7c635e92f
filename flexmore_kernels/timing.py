"""How long a call takes: candidates side by side, cold caches, medians and their spread.

What makes a figure from a GPU wrong, and what is done about it here:

- *The first calls* compile and allocate: every candidate is called before anything is timed.
- *A warm L2 cache* flatters what the last call left there. A candidate may be a list of calls, the
  same work on copies of its inputs: they take turns, and `copies_for` says how many copies do not
  fit into the cache together. Calls timed one by one also have the cache overwritten before each.
- *The host* needs microseconds for each launch, which a short kernel does not hide. So a call of
  less than GRAPH_BELOW_MS is recorded in a CUDA graph and replayed; before a longer one the device
  is held until the host is ahead, as it is in a model of many layers. A call that waits for the
  device (a nonzero, an .item()) allows neither: it is timed as it is called, which is its price.
- *Clocks and load* change, also by what ran before: every round times each candidate once, in an
  order of its own, so that all meet the same conditions, and the median of the rounds counts.

On a CPU: wall time, candidates interleaved alike. No clock or setting of a device is changed.
"""

from __future__ import annotations

import collections
import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

GRAPH_BELOW_MS = 1.0
"""Shorter calls are replayed from a graph, where they can be."""
GRAPH_MS = 1.0
"""About how long one replay takes: long beside what starting it costs."""
MAX_GRAPH_CALLS = 2048
CACHES = 3
"""Inputs that take turns are so many times as large as the L2 cache, together."""
MAX_HOLD_MS = 20.0
CYCLES_PER_MS = 2_000_000
"""No less than a GPU's clock makes: a hold may be longer than asked for, not shorter."""


class Times(NamedTuple):
    """One candidate's times of one call, in milliseconds."""

    ms: float  # median of the rounds
    p20: float
    p80: float
    rounds: int
    how: str  # "graph": replayed; "events": called, by CUDA events; "wall": by the host's clock
    calls: int  # that one round's figure is the mean of
    called_ms: float | None = None  # of a graph: median when called, with what the host adds
    host_ms: float | None = None  # that the host is busy with a call, where it was let ahead

    @classmethod
    def of(cls, values: Sequence[float], how: str, calls: int = 1, *more: float | None) -> Times:
        """Of one figure a round, at least one; more: called_ms, host_ms."""
        ordered, last = sorted(values), len(values) - 1
        p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        return cls(statistics.median(ordered), p20, p80, len(ordered), how, calls, *more)


class CallFailed(RuntimeError):
    """What a candidate raised while it was timed is the cause; `name` says which it was."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name}: {type(error).__name__}: {error}")
        self.name = name


class Interrupted(KeyboardInterrupt):
    """The user's interrupt; `times` has what was measured before it."""

    def __init__(self, times: dict[str, Times]) -> None:
        super().__init__()
        self.times = times


def l2_bytes(device: torch.device | str) -> int:
    """Size of the device's L2 cache; 0 for a CPU, whose caches are left as they are."""
    device = torch.device(device)
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def copies_for(nbytes: int, device: torch.device | str) -> int:
    """How many inputs of `nbytes` must take turns so that none is in the L2 cache when its is."""
    return min(MAX_GRAPH_CALLS, max(1, math.ceil(CACHES * l2_bytes(device) / max(nbytes, 1))))


def compare(
    candidates: Mapping[str, Call | Sequence[Call]],
    device: torch.device | str,
    *,
    rounds: int = 15,
    min_rounds: int = 3,
    budget_s: float = 2.0,
    graphs: bool = False,
    each_round: Callable[[], None] | None = None,
) -> dict[str, Times]:
    """Times of each candidate, by name.

    Args:
        candidates: name -> a call, or several that do the same on copies of the inputs.
        rounds, min_rounds, budget_s: rounds end after `budget_s` seconds and `min_rounds`.
        graphs: replay short candidates from CUDA graphs. Only for calls that take turns, or read
            CACHES times the L2 cache each: nothing else makes the cache cold within a replay.
        each_round: called once a round while the device is at work, to look at its clocks.

    Raises CallFailed, from what a candidate raised; Interrupted, where a KeyboardInterrupt ends the
    rounds, with the times of the candidates that one round reached.
    """
    device = torch.device(device)
    turns = {
        name: list(calls) if isinstance(calls, Sequence) else [calls]
        for name, calls in candidates.items()
    }
    stopwatch = _Events(device) if device.type == "cuda" else _Wall()
    for name, calls in turns.items():
        with _blame(name):
            for call in (*calls[:2], calls[0]):
                call()
    replays: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    host_ms: dict[str, float] = {}
    if device.type == "cuda":
        for name, calls in turns.items():
            with _blame(name):
                if waits_for_device(calls[0]):
                    continue
                host_ms[name] = _host_ms(calls[0])
                replay = _replay(calls, stopwatch, host_ms[name]) if graphs else None
            if replay:
                replays[name] = replay
        for name, calls in turns.items():  # recording gave memory back: nobody waits for it later
            with _blame(name):
                calls[0]()
    samples, called = ({name: [] for name in names} for names in (turns, replays))
    begin, pairs = time.perf_counter(), list(turns.items())
    try:
        for done in range(rounds):
            if done >= min_rounds and time.perf_counter() - begin > budget_s:
                break
            look = each_round
            for name, calls in random.Random(done).sample(pairs, len(pairs)):
                with _blame(name):
                    # A graph's own calls are timed as they are; what is not in one, held.
                    ahead = 0.0 if name in replays else host_ms.get(name, 0.0)
                    one = stopwatch.time(calls[done % len(calls)], look, ahead)
                    if name in replays:
                        called[name].append(one)
                        one = stopwatch.time(replays[name][0].replay) / replays[name][1]
                samples[name].append(one)
                look = None
    except KeyboardInterrupt as interrupt:
        found = _summaries(samples, called, replays, host_ms, stopwatch.how)
        raise Interrupted(found) from interrupt
    return _summaries(samples, called, replays, host_ms, stopwatch.how)


@contextlib.contextmanager
def _blame(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CallFailed(name, error) from error


def _summaries(
    samples: dict[str, list[float]],
    called: dict[str, list[float]],
    replays: dict[str, tuple[torch.cuda.CUDAGraph, int]],
    host_ms: dict[str, float],
    how: str,
) -> dict[str, Times]:
    found = {}
    for name, values in samples.items():
        if values and name in replays:
            given = replays[name][1], statistics.median(called[name])
            found[name] = Times.of(values, "graph", *given)
        elif values:
            found[name] = Times.of(values, how, 1, None, host_ms.get(name))
    return found


class _Wall:
    """The host's clock."""

    how = "wall"

    def time(self, call: Call, look: Callable[[], None] | None = None, ahead: float = 0) -> float:
        begin = time.perf_counter()
        call()
        ms = (time.perf_counter() - begin) * 1e3
        if look:
            look()
        return ms


class _Events:
    """CUDA events around a call. Before it the L2 cache is overwritten, and the device held until
    the host, which needs about `ahead` milliseconds, has made all launches; else, timed again."""

    how = "events"

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(5 * l2_bytes(device), dtype=torch.int8, device=device)

    def time(self, call: Call, look: Callable[[], None] | None = None, ahead: float = 0) -> float:
        hold = min(2 * ahead, MAX_HOLD_MS)
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            if hold:
                torch.cuda._sleep(int(hold * CYCLES_PER_MS))
            start.record()
            call()
            late = start.query()
            end.record()
            if look:
                look()
                look = None  # once, also where the call is timed again
            end.synchronize()
            if not late or hold in (0, MAX_HOLD_MS):
                return start.elapsed_time(end)
            hold = min(2 * hold, MAX_HOLD_MS)


def waits_for_device(call: Call) -> bool:
    """Whether the call makes the host wait for the device, as far as torch knows."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def _host_ms(call: Call) -> float:
    """How long the host is busy with a call that does not wait for the device."""
    torch.cuda.synchronize()
    return _Wall().time(call)


def _replay(
    calls: list[Call], stopwatch: _Events, host_ms: float
) -> tuple[torch.cuda.CUDAGraph, int] | None:
    """A graph of the calls in turn, and how many; None where a graph is no use or cannot be."""
    ms = min(stopwatch.time(call, None, host_ms) for call in (calls * 3)[:3])
    if ms > 2 * GRAPH_BELOW_MS:  # a margin: the first graph below decides
        return None
    few = min(len(calls), 8)
    trial = _capture(calls, few)
    if trial is None:
        return None
    ms = min(stopwatch.time(trial.replay) for _ in range(3)) / few
    del trial
    if ms > GRAPH_BELOW_MS:
        return None
    turns = max(1, round(GRAPH_MS / (ms * len(calls))))
    count = min(MAX_GRAPH_CALLS, turns * len(calls))
    graph = _capture(calls, count)
    return graph and (graph, count)


def _capture(calls: list[Call], count: int) -> torch.cuda.CUDAGraph | None:
    """A graph of `count` calls, replayed once; None where CUDA refuses to record them.

    The last results stay alive through the recording, so that as many calls in a row as there are
    copies of the inputs write to different memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    results: collections.deque = collections.deque(maxlen=len(calls))
    try:
        with torch.cuda.graph(graph, stream=stream):
            for index in range(count):
                results.append(calls[index % len(calls)]())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    results.clear()
    graph.replay()
    torch.cuda.synchronize()
    return graph

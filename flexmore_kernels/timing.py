"""Times candidates against each other: warmed, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
"""Written before each timed call on a GPU: more than any L2 cache holds (H100: 50 MB)."""


def median_ms(
    candidates: Mapping[str, Callable[[], Any]],
    device: torch.device | str,
    *,
    rounds: int = 15,
    min_rounds: int = 3,
    budget_s: float = 2.0,
) -> dict[str, float]:
    """Median milliseconds of one call of each candidate.

    Each is warmed up twice; then every round calls each once, so that a change of clocks or of the
    machine's load meets all alike. CPU: wall time. CUDA: events, with the L2 cache overwritten
    before each call and the host ahead of the device. Rounds stop after `budget_s`, but not before
    `min_rounds`.
    """
    device = torch.device(device)
    for call in candidates.values():
        for _ in range(2):
            call()
    timed = _cuda_round if device.type == "cuda" else _cpu_round
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    flush = (
        torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    )
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= min_rounds and time.perf_counter() - begin > budget_s:
            break
        for name, call in candidates.items():
            samples[name].append(timed(call, flush))
    return {name: statistics.median(values) for name, values in samples.items()}


def _cpu_round(call: Callable[[], Any], flush: None) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _cuda_round(call: Callable[[], Any], flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)

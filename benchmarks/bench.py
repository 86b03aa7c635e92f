"""What the benchmarks share: inputs, which kernels, the record of a run.

Times come from flexmore_kernels.timing: warmed, interleaved, medians; CUDA events with the L2 cache
overwritten on a GPU. A record names the commit, the machine and the versions, one JSON line a run.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import SHAPES, Shape
from flexmore_kernels import backend
from flexmore_kernels.testing import Case, make_routing, make_x
from flexmore_kernels.timing import median_ms

ROOT = Path(__file__).parent
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def candidates(stem: str) -> list:
    """(device, kernels) of everything that runs this stem here, as pytest parameters.

    The interpreter is no candidate: its times say nothing.
    """
    return [
        pytest.param(device, name, id=f"{device}-{name}")
        for device in DEVICES
        for name in backend.available(stem, device)
        if not (device == "cpu" and name == "triton")
    ]


def shape_for(device: str) -> Shape:
    """The shape of an op's benchmark: the usual layer on a GPU, a small one on a CPU."""
    return SHAPES["flexolmo_6x64" if device == "cuda" else "cpu_small"]


def rows(device: str) -> tuple[Shape, Tensor, Tensor, Tensor]:
    """(shape, x (T, D), indices, weights (T, K)) of an op's benchmark."""
    torch.manual_seed(0)
    shape = shape_for(device)
    case = Case("bench", shape.why, shape.tokens, shape.hidden, shape.intermediate, shape.ranks,
                shape.top_k)  # fmt: skip
    x = make_x(shape.tokens, shape.hidden, device, DTYPES[device])
    return shape, x, *make_routing(case, device)


def measure(
    benchmark: Any,
    kernels: str,
    device: str,
    call: Callable[[], Any],
    *,
    moved: float = 0,
    flops: float = 0,
) -> None:
    """Time `call` with these kernels under pytest-benchmark.

    pytest-benchmark's own figure is wall time, waiting for the device included; extra_info holds
    the device's milliseconds, and GB/s and TFLOP/s from the bytes and operations that must be.
    """

    def waited() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    with backend.use(kernels), torch.no_grad():
        milliseconds = median_ms({"call": call}, device)["call"]
        benchmark.pedantic(waited, rounds=5, warmup_rounds=1)
    benchmark.extra_info["ms"] = milliseconds
    if moved:
        benchmark.extra_info["GB/s"] = moved / milliseconds / 1e6
    if flops:
        benchmark.extra_info["TFLOP/s"] = flops / milliseconds / 1e9


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """Where a record was taken; `commit` where the sources came without their history."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "commit": commit or _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
    }


def record(name: str, entry: dict[str, Any]) -> Path:
    """Append one line to benchmarks/results/<name>.jsonl."""
    path = ROOT / "results" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return None
    return run.stdout.strip() or None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__

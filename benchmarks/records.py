"""Records: one JSON line a measurement, with where, when and from which sources it was taken.

benchmarks/README.md describes the fields. A line is appended by one write, as soon as it is
measured, so that what ends a run early costs only the measurement that was under way.

    python -m benchmarks.records FILE     # add records taken elsewhere to benchmarks/results/
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flexmore_kernels import floors
from flexmore_kernels.timing import Times

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
SCHEMA = 2
FIELDS = {
    "schema", "benchmark", "op", "shape", "hidden", "intermediate", "ranks", "top_k", "tokens",
    "dtype", "pass", "commit", "time", "device", "driver", "cuda", "threads", "python", "torch",
    "triton", "roofs", "clocks", "bytes", "flops", "results",
}  # fmt: skip
"""What every record has."""
KEY = ("benchmark", "op", "shape", "tokens", "dtype", "pass", "device")
"""What a record is of: a later record of the same key replaces an earlier one."""


def append(record: dict[str, Any], folder: Path) -> Path:
    """Add a line to <folder>/<benchmark>.jsonl, or to `folder` itself where that is a .jsonl."""
    path = folder if folder.suffix == ".jsonl" else folder / f"{record['benchmark']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps(record) + "\n").encode())
    finally:
        os.close(file)
    return path


def latest(folder: Path = RESULTS, benchmark: str = "*") -> list[dict[str, Any]]:
    """The last record of each key, in the order in which they were first taken."""
    found: dict[tuple, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{benchmark}.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found[tuple(record.get(name) for name in KEY)] = record
    return list(found.values())


def result(times: Times, roofs: dict[str, float], nbytes: float, flops: float) -> dict[str, Any]:
    """A candidate's part of a record: its times and, of them, rates and shares of the roofs."""
    entry = {key: short(value) for key, value in times._asdict().items()}
    seconds = times.ms / 1e3
    for name, amount, roof in (("tb_s", nbytes, "copy_tb_s"), ("tflop_s", flops, "matmul_tflop_s")):
        if amount:
            rate = amount / seconds / 1e12
            entry[name] = short(rate)
            entry[f"share_of_{roof.split('_')[0]}"] = short(rate / roofs[roof])
    return entry


def short(value: Any) -> Any:
    """A float in five digits; None where it is not finite, for which JSON has no word."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def roofs(device: str) -> dict[str, Any]:
    """What this device does in this run: a large copy (bytes read and written), a large matmul."""
    return {name: short(value) for name, value in floors.measure(device)._asdict().items()}


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """Where a record is taken; `commit` where the sources came without their history."""
    on_gpu = device == "cuda"
    return {
        "schema": SCHEMA,
        "commit": commit or _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "driver": _nvidia_smi("driver_version") if on_gpu else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
    }


class Clocks:
    """The clocks as they are while something is timed; nothing is set.

    `look` asks the driver through pynvml, in microseconds; without pynvml `seen` asks nvidia-smi
    once, just after the work.
    """

    FIELDS = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.samples: list[tuple[float, ...]] = []
        self.nvml = self.handle = None
        if self.on_gpu:
            with contextlib.suppress(Exception):  # without it nvidia-smi is asked
                import pynvml

                pynvml.nvmlInit()
                uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
                self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                self.nvml = pynvml

    def look(self) -> None:
        """One sample."""
        if self.nvml is None:
            return
        n, h = self.nvml, self.handle
        with contextlib.suppress(Exception):  # a reading is not worth a run
            self.samples.append((
                n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM),
                n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM),
                n.nvmlDeviceGetPowerUsage(h) / 1e3,
                n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU),
            ))  # fmt: skip

    def seen(self) -> dict[str, Any] | None:
        """{field: [lowest, median, highest]} of the samples since the last time; None on a CPU."""
        if self.on_gpu and not self.samples:
            text = _nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")
            with contextlib.suppress(ValueError, AttributeError):
                self.samples = [tuple(float(part) for part in text.split(","))]
        columns = list(zip(*self.samples, strict=True))
        count, self.samples = len(self.samples), []
        if not columns:
            return None
        spread = [[min(c), statistics.median(c), max(c)] for c in columns]
        return {**dict(zip(self.FIELDS, spread, strict=True)), "samples": count}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread after so many seconds, between two steps of Python."""
    import signal

    def stop(*_):
        raise TimeoutError(f"took more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _nvidia_smi(fields: str) -> str | None:
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", uuid]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """Short hash, with -dirty where sources differ from it; records taken since do not count."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    try:
        commit = git("rev-parse", "--short", "HEAD").strip()
        dirty = git("status", "--porcelain", "-uno", "--", ":/", ":!results").strip()
    except OSError:
        return None
    return (commit + ("-dirty" if dirty else "")) or None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def main() -> int:
    """Add each file's records to the results, but for those that are there already."""
    there = {line for path in RESULTS.glob("*.jsonl") for line in path.read_text().splitlines()}
    for path in map(Path, sys.argv[1:]):
        for line in path.read_text().splitlines():
            if line not in there:
                append(json.loads(line), RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

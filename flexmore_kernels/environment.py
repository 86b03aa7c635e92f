"""What is here and what runs: the facts of `flexmore env`, made to be pasted into a bug report.

Which kernels run an op is asked of backend.py, by the questions that the ops ask it themselves, so
that the report cannot disagree with what runs; tests/test_environment.py compares the two. A
question that cannot be answered leaves the reason in its place, and all the others their answers:
reports are wanted most from machines where something is broken.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import __version__, backend, native


class Op(NamedTuple):
    """A public op, forward or backward: the raw function that decides, and what else may run."""

    name: str
    stem: str
    function: str = ""
    others: tuple[str, ...] = ()


OPS = (
    Op("topk_route from x", "routing", "topk_route_linear"),
    Op("topk_route from logits", "routing", "topk_route"),
    Op("topk_route backward", "routing", "topk_route_backward"),
    Op("make_plan", "routing", "make_plan"),
    Op("permute", "permutation"),
    Op("unpermute", "permutation"),
    Op("grouped_gemm", "grouped_gemm"),
    Op("shrink", "lowrank"),
    Op("expand", "lowrank"),
    Op("gated_mix", "gated_mix"),
    Op("gated_mix backward", "gated_mix", "", ("lowrank", "permutation")),
    Op("experts", "experts"),
    Op("experts backward", "experts"),
)
EXPERTS_OTHERS = {
    "aten": ("routing", "gated_mix"),
    "triton": ("routing", "permutation", "grouped_gemm", "lowrank", "gated_mix"),
}
"""Stems whose kernels the experts' use, by the experts' own kernels."""


def report() -> dict[str, Any]:
    """Everything, as plain dicts, lists, strings and numbers. Makes a CUDA context."""
    kinds = ["cpu", "cuda"] if _asked(torch.cuda.is_available) is True else ["cpu"]
    return {
        "versions": _versions(),
        "library": _asked(_library),
        "gpus": _asked(_gpus),
        "kernels": {kind: _asked(kernels, kind) for kind in kinds},
    }


def _asked(question: Callable[..., Any], *given: Any) -> Any:
    """The answer or, where the question fails, words that say how."""
    try:
        return question(*given)
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _versions() -> dict[str, str | None]:
    return {
        "flexmore_kernels": _version("flexmore-kernels") or f"{__version__}, not installed",
        "commit": str(native.facts().get("commit") or "") or None,
        "path": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "driver": _asked(_driver),
        "triton": _version("triton"),
        "processor": _asked(_processor),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library() -> dict[str, Any]:
    return native.build_info() | {"why_not_cuda": native.why_not_cuda_built()}


def _driver() -> str | None:
    """The NVIDIA driver's version, wherever there is one, and the CUDA that it reaches to."""
    number, cuda = _driver_number(), _driver_cuda()
    return f"{number or 'of unknown number'}, up to CUDA {cuda}" if cuda else number


def _driver_number() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = run.stdout.splitlines() if run.returncode == 0 else []
    return next((line.strip() for line in lines if line.strip()), None)


def _driver_cuda() -> str | None:
    """Asked of the driver itself: torch has no public function for it, and drops private ones."""
    version = ctypes.c_int()
    try:
        error = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    found = 0 if error else version.value
    return f"{found // 1000}.{found % 1000 // 10}" if found else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {torch.get_num_threads()} threads"


def _gpus() -> list[dict[str, Any]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [{"index": index} | _gpu(index) for index in range(count)]


def _gpu(index: int) -> dict[str, Any]:
    facts: dict[str, Callable[[Any], Any]] = {
        "name": lambda p: p.name,
        "capability": lambda p: f"{p.major}.{p.minor}",
        "memory_gib": lambda p: round(p.total_memory / 2**30, 1),
        "multiprocessors": lambda p: p.multi_processor_count,
        "shared_memory_per_block_kib": lambda p: p.shared_memory_per_block_optin // 1024,
    }
    ask = lambda fact: fact(torch.cuda.get_device_properties(index))
    found = {name: _asked(ask, fact) for name, fact in facts.items()}
    return found | {"native": _asked(native.why_not_cuda, index) or "runs"}


def kernels(kind: str) -> list[dict[str, Any]]:
    """For each op on a device type: the kernels that run, what else runs inside, why not others."""
    rows = []
    for op in OPS:
        preference = backend.ON_GPU.get(op.function)
        sizes = [("", 1)]
        if kind == "cuda" and preference is not None:
            limit = preference.up_to
            sizes = [(f", E up to {limit}", limit), (f", E > {limit}", limit + 1)]
        for suffix, num_experts in sizes:
            name = backend.selected(op.stem, kind, op.function, num_experts)
            others = EXPERTS_OTHERS[name] if op.stem == "experts" else op.others
            rows.append(
                {
                    "op": op.name + suffix,
                    "stem": op.stem,
                    "kernels": name,
                    "inside": {stem: backend.selected(stem, kind) for stem in others},
                    "not": _why_not_others(op, kind, name, num_experts),
                }
            )
    return rows


def _why_not_others(op: Op, kind: str, name: str, num_experts: int) -> dict[str, str]:
    preference = backend.ON_GPU.get(op.function)
    reasons = {}
    for other in backend.NAMES:
        reason = backend.why_not(other, op.stem, kind)
        if other == name:
            continue
        if reason is None and other == backend.chosen(op.stem, kind):
            reason = f"{name} was measured faster: {preference.measured}"
        elif reason is None and kind == "cpu" and other == "triton":
            reason = "on a CPU in its interpreter, and only when asked for"
        reasons[other] = reason or f"{name} comes first where both are there"
    return reasons


def as_text(found: dict[str, Any]) -> str:
    """A report as plain text, for people and bug reports; long lines are wrapped."""
    versions, library = found["versions"], found["library"]
    commit = f", built at commit {versions['commit']}" if versions["commit"] else ""
    cuda = versions["cuda_of_torch"]
    lines = [
        ("flexmore_kernels", versions["flexmore_kernels"] + commit),
        ("", versions["path"]),
        ("python", f"{versions['python']}, {versions['platform']}"),
        ("torch", f"{versions['torch']}, {f'CUDA {cuda}' if cuda else 'a CPU build'}"),
        ("triton", versions["triton"] or "not installed"),
        ("processor", versions["processor"]),
        ("driver", versions["driver"] or "no NVIDIA driver found"),
    ]
    lines += _gpu_lines(found["gpus"], library)
    lines += _library_lines(library)
    text = [_wrapped(f"{label:<18}{value}", 18) for label, value in lines]
    for kind, rows in found["kernels"].items():
        text += ["", *_kernel_lines(kind, rows)]
    return "\n".join(text)


def _gpu_lines(gpus: list[dict[str, Any]] | str, library: dict[str, Any] | str) -> list:
    if isinstance(gpus, str):
        return [("gpu", gpus)]
    lines = []
    for gpu in gpus:
        lines.append(
            (
                f"gpu {gpu['index']}",
                f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
                f"{gpu['multiprocessors']} multiprocessors, "
                f"{gpu['shared_memory_per_block_kib']} KiB shared memory a block",
            )
        )
        has_cuda = not isinstance(library, str) and library["cuda_archs"]
        if gpu["native"] != "runs" and has_cuda:
            lines.append(("", f"library: {gpu['native']}"))
    return lines or [("gpu", "none that torch can use")]


def _library_lines(library: dict[str, Any] | str) -> list[tuple[str, str]]:
    if isinstance(library, str):
        return [("library", library)]
    host = ("", "_host: built" if library["host"] else "_host: not built (only tests use it)")
    if not library["loaded"]:
        return [("library", str(library["why_not"])), host]
    lines = [("library", "loaded")]
    if library.get("compiler"):
        lines.append(
            (
                "",
                f"{library['compiler']},{library['flags'].rstrip()}, against torch "
                f"{library['torch']}, by Python {library['python']}",
            )
        )
    widths = library.get("vector_widths")
    lines.append(
        ("", f"CPU: {library['vector_width']} in use" + (f", of {widths}" if widths else ""))
    )
    if library["cuda_archs"]:
        lines.append(("", f"CUDA: nvcc {library.get('nvcc', '?')} for {library['cuda_archs']}"))
    if library["why_not_cuda"]:
        lines.append(("", f"CUDA: {library['why_not_cuda']}"))
    return [*lines, host]


def _kernel_lines(kind: str, rows: list[dict[str, Any]] | str) -> list[str]:
    if isinstance(rows, str):
        return [_wrapped(f"kernels on {kind}: {rows}", 6)]
    notes: dict[str, int] = {}
    lines = [f"kernels on {kind}"]
    for row in rows:
        inside: dict[str, list[str]] = {}
        for stem, name in row["inside"].items():
            inside.setdefault(name, []).append(stem)
        parts = "; ".join(f"{name}: {', '.join(stems)}" for name, stems in inside.items())
        marks = []
        for name, reason in row["not"].items():
            number = notes.setdefault(f"not {name}: {reason}", len(notes) + 1)
            marks.append(f"[{number}]")
        lines.append(f"  {row['op']:<36}{row['kernels']:<8}{' '.join(marks)}")
        if parts:
            lines.append(f"    inside it {parts}")
    return lines + [_wrapped(f"  [{n}] {reason}", 6) for reason, n in notes.items()]


def _wrapped(line: str, indent: int) -> str:
    return textwrap.fill(
        line, 110, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )

"""What is here and what runs: the facts of `flexmore env`, made to be pasted into a bug report.

Which kernels run an op is asked of backend.py, by the questions that the ops ask it themselves, so
that the report cannot disagree with what runs; tests/test_environment.py compares the two. What the
library takes over for some sizes alone has rows of its own, which say the sizes. A question that
cannot be answered leaves the reason in its place, and all the others their answers: reports are
wanted most from machines where something is broken.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import __version__, backend, native
from ._native import routing, token_major
from .ragged import MAX_SET_EXPERTS
from .schedule import DECODE_EXPERTS, DECODE_TOKENS, HOPPER_TOKENS, SWEPT_RANK


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
    Op("attribute", "attribution"),
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


class Part(NamedTuple):
    """Forwards of some sizes of 16-bit floats on a GPU, by the library's kernels alone."""

    op: str
    which: str
    stem: str
    runs: str  # the function of backend.py that says whether
    inside: tuple[str, ...]  # stems of the library's, where they are steps of Triton's forward
    sizes: str


PARTS = (
    Part(
        "topk_route from x", f", up to {DECODE_TOKENS} tokens", "routing", "library_runs", (),
        f"up to {routing.MOST_EXPERTS_FEW_TOKENS} experts, D a multiple of 8",
    ),
    Part(
        "experts", f", up to {DECODE_TOKENS} tokens", "experts", "library_runs", (),
        f"no gradient, up to {DECODE_EXPERTS} experts, none but the base full-size, D and F "
        "multiples of 8",
    ),
    Part(
        "experts", " on Hopper, many tokens", "experts", "hopper_runs",
        ("routing", "permutation", "grouped_gemm", "token_major"),
        f"up to {MAX_SET_EXPERTS} experts, {HOPPER_TOKENS} tokens or more, D a multiple of 8, F of "
        f"16, ranks up to {token_major.MOST_RANK} of at most {token_major.MOST_LOW_RANK} experts, "
        f"or of {token_major.MOST_LOW_RANK_WITH_ROWS} beside larger ranks",
    ),
    Part(
        "experts", f", E > {MAX_SET_EXPERTS}", "experts", "library_runs",
        ("routing", "expert_major"),
        f"ranks up to {SWEPT_RANK}, none but the base full-size, D and F multiples of 8",
    ),
)  # fmt: skip


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
                    "not": _why_not_others(op, kind, name),
                }
            )
        rows += _parts(op) if kind == "cuda" else []
    return rows


def _parts(op: Op) -> list[dict[str, Any]]:
    """A row for each of the op's `PARTS` that runs on the current GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    composed = backend.selected("experts", "cuda") == "triton"  # they are steps of its forward
    return [
        {
            "op": op.name + part.which,
            "stem": part.stem,
            "kernels": "native",
            "inside": dict.fromkeys(part.inside, "native"),
            "not": _why_not_others(op, "cuda", "native"),
            "sizes": f"16-bit floats, {part.sizes}",
        }
        for part in PARTS
        if part.op == op.name
        and (composed or not part.inside)
        and getattr(backend, part.runs)(device, torch.bfloat16)
    ]


def _why_not_others(op: Op, kind: str, name: str) -> dict[str, str]:
    preference = backend.ON_GPU.get(op.function)
    reasons = {}
    for other in backend.NAMES:
        reason = backend.why_not(other, op.stem, kind)
        if other == name:
            continue
        preferred = preference is not None and name == preference.name
        if reason is None and preferred and other == backend.chosen(op.stem, kind):
            reason = f"{name} was measured faster: {preference.measured}"
        elif reason is None and kind == "cpu" and other == "triton":
            reason = "on a CPU in its interpreter, and only when asked for"
        reasons[other] = reason or f"{name} comes first where both are there"
    return reasons

"""The report of `environment.report` as text, made to be pasted into a bug report."""

from __future__ import annotations

import textwrap
from typing import Any


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
        said = [f"not {name}: {reason}" for name, reason in row["not"].items()]
        said = [f"for {row['sizes']}", *said] if "sizes" in row else said
        marks = [f"[{notes.setdefault(note, len(notes) + 1)}]" for note in said]
        lines.append(f"  {row['op']:<36}{row['kernels']:<8}{' '.join(marks)}")
        if parts:
            lines.append(f"    inside it {parts}")
    return lines + [_wrapped(f"  [{n}] {reason}", 6) for reason, n in notes.items()]


def _wrapped(line: str, indent: int) -> str:
    return textwrap.fill(
        line, 110, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )

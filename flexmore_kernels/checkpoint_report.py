"""What `flexmore inspect` says of a checkpoint: sizes, ranks, notes; as data and as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .checkpoint import read_tensors
from .checkpoint_layout import PROJECTIONS, Layout, as_triple, mlp_prefix
from .progress import Progress

COLUMNS = 12
"""Experts side by side in a table."""


def report(layout: Layout) -> dict[str, Any]:
    """A layout as a dict that JSON can hold.

    bytes and parameters count what is in use; file_bytes what the tensors take in the files, which
    is more where factors are padded with zeros.
    """
    config = layout.config
    counts = {name: math.prod(part.shape) for name, part in layout.parts.items()}
    stored = {(p.stored.file, p.stored.name): p.stored.nbytes for p in layout.parts.values()}
    experts = [
        sum(counts[name] for name in counts if f".mlp.experts.{e}." in name)
        for e in range(config["num_experts"])
    ]
    dtypes: dict[str, int] = {}
    for name, part in layout.parts.items():
        dtypes[part.stored.dtype] = dtypes.get(part.stored.dtype, 0) + counts[name]
    return {
        "directory": str(layout.directory),
        "kind": layout.kind,
        "files": len(set(layout.files.values())),
        "tensors": len(stored),
        "parameters": sum(counts.values()),
        "parameters_by_dtype": dtypes,
        "parameters_by_expert": experts,
        "bytes": sum(part.nbytes for part in layout.parts.values()),
        "file_bytes": sum(stored.values()),
        "num_hidden_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_experts": config["num_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "expert_bias": layout.expert_bias,
        "layer_expert_ranks": [list(ranks) for ranks in layout.layer_ranks],
        "notes": list(layout.notes),
    }


def numerical_ranks(
    layout: Layout, device: Any = "cpu", say: Callable[[str], None] | None = None
) -> list[list[list[int | None]]]:
    """For each layer and expert the ranks (gate, up, down) of what is stored full-size.

    None: no rank shows (see `conversion.numerical_rank`), or the matrix is not full-size, or it is
    expert 0's.
    """
    from .conversion.numerical_rank import numerical_rank

    found = [[[None] * 3 for _ in ranks] for ranks in layout.layer_ranks]
    dense = [
        (layer, i, [e for e in range(1, len(ranks)) if as_triple(ranks[e])[i] == "full"])
        for layer, ranks in enumerate(layout.layer_ranks)
        for i in range(3)
    ]
    progress = Progress(sum(len(experts) for *_, experts in dense), say)
    for layer, i, experts in dense:
        name = f"{mlp_prefix(layer)}experts.{{}}.{PROJECTIONS[i]}_proj.weight"
        if not experts:
            continue
        base = read_tensors(layout, names=[name.format(0)], device=device)[name.format(0)]
        for expert in experts:
            one = name.format(expert)
            weight = read_tensors(layout, names=[one], device=device)[one]
            difference = weight.double() - base.double()
            found[layer][expert][i] = numerical_rank(difference, weight.dtype, base)
            progress.done(1, one)
    return found


def as_text(found: dict[str, Any]) -> str:
    """`report`, and `numerical_ranks` under that key, for people."""
    dtypes = ", ".join(f"{n:,} {dtype}" for dtype, n in found["parameters_by_dtype"].items())
    padding = found["file_bytes"] - found["bytes"]
    lines = [
        f"{found['directory']}: {found['kind']}, {found['tensors']} tensors in {found['files']} "
        "files, all there",
        f"{found['num_hidden_layers']} layers, D = {found['hidden_size']}, "
        f"F = {found['intermediate_size']}, top-{found['num_experts_per_tok']} of "
        f"{found['num_experts']} experts{', with expert bias' if found['expert_bias'] else ''}",
        f"{found['parameters']:,} parameters ({dtypes}), {found['bytes']:,} bytes"
        + (f" and {padding:,} of zero padding" if padding else ""),
        "",
        *_table(found["layer_expert_ranks"], _entry, found["parameters_by_expert"]),
    ]
    if "numerical_ranks" in found:
        title = "numerical ranks of what is stored full-size (gate/up/down; -: none shows)"
        lines += ["", title, *_table(found["numerical_ranks"], _numerical)]
    return "\n".join(lines + [f"note: {note}" for note in found["notes"]])


def _table(
    rows: Sequence[Sequence], cell: Callable[[Any], str], counts: Sequence[int] = ()
) -> list[str]:
    """A row for each run of layers that are the same, some experts side by side."""
    runs: list[list] = []
    for layer, row in enumerate(rows):
        if runs and runs[-1][2] == row:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer, row])
    lines = []
    for start in range(0, len(rows[0]), COLUMNS):
        experts = range(start, min(start + COLUMNS, len(rows[0])))
        table = [["expert", *map(str, experts)]]
        for first, last, row in runs:
            name = f"layer {first}" if first == last else f"layers {first}-{last}"
            table.append([name, *(cell(row[e]) for e in experts)])
        if counts:
            table.append(["parameters", *(_short(counts[e]) for e in experts)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for head, *cells in table:
            body = (text.rjust(w) for text, w in zip(cells, widths[1:], strict=True))
            lines.append("  ".join((head.ljust(widths[0]), *body)))
    return lines


def _entry(entry: Any) -> str:
    triple = as_triple(entry)
    return str(triple[0]) if len(set(triple)) == 1 else "/".join(map(str, triple))


def _numerical(triple: Sequence[int | None]) -> str:
    words = ["-" if rank is None else str(rank) for rank in triple]
    return words[0] if len(set(words)) == 1 else "/".join(words)


def _short(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)

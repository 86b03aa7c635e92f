"""Gather what `flexmore convert --activations` weighs errors by, from your own text.

Runs the text through the model and keeps the second moments of what enters each projection of its
MoE layers, so that a conversion spends ranks where this text needs them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import add_device, positive, progress

NAME, HELP = "activations", "gather from text what `convert --activations` weighs errors by"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR")
    parser.add_argument(
        "text", metavar="FILE",
        help="text (needs the checkpoint's tokenizer.json and `pip install tokenizers`), or "
        ".jsonl: a list of token ids a line",
    )  # fmt: skip
    parser.add_argument("out", metavar="OUT.safetensors")
    parser.add_argument("--tokens", type=positive, default=1 << 17, help="at most; default: 131072")
    parser.add_argument("--length", type=positive, default=2048, help="tokens a sequence")
    parser.add_argument("--batch", type=positive, default=1, help="sequences at a time")
    parser.add_argument(
        "--hidden", choices=("diagonal", "full"), default="diagonal",
        help="of the inputs of down; full takes 4 F^2 bytes an expert and layer",
    )  # fmt: skip
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .. import backend
    from ..checkpoint import load_model, read_layout
    from ..conversion.activations import gather
    from ..progress import Progress

    text, out = Path(arguments.text), Path(arguments.out)
    if out.is_dir() or any(parent.is_file() for parent in out.parents):
        raise ValueError(f"OUT: {out} is a directory, or in a file; accepted: a file's name")
    device = backend.device_or_default(arguments.device)
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    layout = read_layout(arguments.checkpoint)
    read = _ids_of_lines if text.suffix == ".jsonl" else _ids_of_text
    sequences = _cut(read(text, layout), arguments.tokens, arguments.length)
    model = load_model(layout, device, getattr(torch, dtype))
    so_far = Progress(-(-len(sequences) // arguments.batch), progress(NAME))
    found = gather(
        model,
        _batches(sequences, arguments.batch, device),
        hidden=arguments.hidden,
        progress=lambda done: so_far.done(1, f"batch {done}"),
    )
    found.save(out)
    tokens = sum(map(len, sequences))
    print(f"{out}: second moments of {tokens} tokens, {out.stat().st_size / 1e6:.1f} MB")
    for name, count in sorted(found.tokens.items()):
        if not count:
            print(f"  note: no token for {name}; the mean of its layer's others is taken")
    return 0


def _ids_of_lines(path: Path, layout: Any) -> list[list[int]]:
    most = layout.config["vocab_size"]
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else []
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, list) or not all(type(i) is int and 0 <= i < most for i in row):
            raise ValueError(f"{path}, line {number}: accepted: [17, 4, ...], ids below {most}")
        rows.append(row)
    return rows


def _ids_of_text(path: Path, layout: Any) -> list[list[int]]:
    from ..text import read_tokenizer

    instead = "a file of token ids, as .jsonl"
    tokenizer = read_tokenizer(layout.directory, argument="FILE", instead=instead)
    return [tokenizer.encode(path.read_text()).ids]


def _cut(rows: list[list[int]], tokens: int, length: int) -> list[list[int]]:
    """Sequences of at most `length`, of at most `tokens` together."""
    sequences = []
    for row in rows:
        for start in range(0, len(row), length):
            piece = row[start : start + length][:tokens]
            tokens -= len(piece)
            sequences += [piece] if piece else []
    if not sequences:
        raise ValueError("text: holds no token")
    return sequences


def _batches(sequences: list[list[int]], size: int, device: str) -> Iterator[tuple]:
    import torch

    for start in range(0, len(sequences), size):
        rows = sequences[start : start + size]
        longest = max(map(len, rows))
        ids = [row + [0] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        yield torch.tensor(ids, device=device), torch.tensor(mask, device=device)

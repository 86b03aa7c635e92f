"""Text as ids, and batches of it that depend on the seed and the step's number alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BYTES = 256


def read_ids(path: Path, tokenizer: Any, vocabulary: int, length: int, option: str) -> Tensor:
    """The ids (n,) of a file: by the tokenizer, or, where that is None, its bytes.

    Raises ValueError naming the option for what cannot be read, is shorter than `length` + 1 ids,
    or has ids that the model does not.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{option}: {error}; accepted: a file of text") from error
    if tokenizer is None:
        ids = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)]
    else:
        try:
            ids = torch.tensor(tokenizer.encode(content.decode()).ids, dtype=torch.int32)
        except UnicodeDecodeError as error:
            raise ValueError(f"{option}: {path} is not UTF-8 ({error})") from error
    if len(ids) <= length:
        raise ValueError(
            f"{option}: got {len(ids)} tokens; accepted: at least --length + 1, {length + 1}"
        )
    if int(ids.max()) >= vocabulary:
        raise ValueError(
            f"{option}: got id {int(ids.max())}; accepted: ids below {vocabulary}, which the model "
            "has: bytes need 256, other ids the tokenizer.json that belongs to the checkpoint"
        )
    return ids


def contents(ids: Tensor) -> str:
    """Names what these ids are."""
    return f"text of {len(ids)} ids, {hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}"


def batch_of(
    ids: Tensor, size: int, length: int, seed: int, stage: int, step: int
) -> tuple[Tensor, Tensor]:
    """(input ids, ids that follow), both (size, length) int64: windows at random places.

    Drawn by a generator of their own, so that a run that goes on from a step sees what one that was
    never stopped sees, on any device.
    """
    name = hashlib.sha256(f"{seed} {stage} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(name[:7], "little"))
    begin = torch.randint(len(ids) - length, (size, 1), generator=generator)
    rows = ids[begin + torch.arange(length + 1)].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def byte_tokenizer() -> str:
    """A tokenizer.json whose ids are bytes, so that `flexmore generate` takes and gives text.

    In these files a byte stands as a printable character (GPT-2's table): itself where it is one.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(BYTES) if byte not in shown]
    letters = {byte: chr(BYTES + i) for i, byte in enumerate(hidden)}
    letters |= {byte: chr(byte) for byte in shown}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = False
    vocabulary = {letters[byte]: byte for byte in range(BYTES)}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        },
        indent=1,
    )

"""A byte-level BPE tokenizer trained on the study's public text, and documents as ids.

Needs the package `tokenizers`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmore_kernels.checkpoint_writer import write_text
from flexmore_kernels.text import TOKENIZER_FILE, read_tokenizer

SEPARATOR = "<|end|>"
"""The token between documents, id 0."""

LEAST = 256 + 1


def train_tokenizer(documents: Iterable[str], size: int) -> Any:
    """A `tokenizers.Tokenizer` of `size` entries: the separator, all bytes, then pairs by how often
    they occur; fewer where the text has no more pairs that occur twice. Any text comes back as it
    was; digits stand alone, so that numbers are added as they are written.

    The same documents in the same order give the same tokenizer. Raises ValueError for a size below
    257, for no text, and where `tokenizers` is not installed.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < LEAST:
        raise ValueError(
            f"size: got {size!r}; accepted: an integer >= {LEAST}, bytes and separator"
        )
    documents = [text for text in documents if text]
    if not documents:
        raise ValueError("documents: got no text; accepted: one document or more")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError(
            "size: a tokenizer is trained by `tokenizers`, which is not installed; accepted: after "
            "`pip install tokenizers`"
        ) from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[SEPARATOR], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), min_frequency=2,
    )  # fmt: skip
    tokenizer.train_from_iterator(documents, trainer)
    return _literal(tokenizer)


def save(tokenizer: Any, directory: str | os.PathLike) -> Path:
    """Write tokenizer.json into a directory, whole or not at all; its path."""
    path = Path(directory) / TOKENIZER_FILE
    write_text(path, tokenizer.to_str(pretty=True) + "\n")
    return path


def read(directory: str | os.PathLike) -> Any:
    """The tokenizer that `save` wrote. Raises ValueError where it, or `tokenizers`, is missing."""
    return _literal(read_tokenizer(directory, argument="texts", instead="a folder that has one"))


def _literal(tokenizer: Any) -> Any:
    """A separator that stands in a text is text."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_documents(tokenizer: Any, documents: Iterable[str]) -> Tensor:
    """Ids (n,) int32 on the CPU: of each document a separator, then its text's, so that a model
    sees where a document begins.

    Raises ValueError for no documents, and a tokenizer without the separator.
    """
    separator = tokenizer.token_to_id(SEPARATOR)
    if separator is None:
        raise ValueError(f"tokenizer: has no {SEPARATOR}; accepted: one of train_tokenizer")
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(list(documents), add_special_tokens=False):
        ids.append(separator)
        ids.extend(encoding.ids)
    if not ids:
        raise ValueError("documents: got none; accepted: one document or more")
    return torch.tensor(ids, dtype=torch.int32)

"""Domain embeddings of texts, by name, for `flexmore router --init embeddings`.

Each NAME=PATH is a folder of documents, a .txt file with a blank line between them, or .jsonl with
a "text" a line. Names are the experts'. The default embedder hashes words and spellings: offline,
without a model, and without semantics.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import positive, progress

NAME, HELP = "embed", "domain embeddings of texts, to give routers their rows"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="+", metavar="NAME=PATH", help="an expert's documents")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors")
    parser.add_argument(
        "--size", type=positive, metavar="M",
        help="width of the embeddings; default: 256. A linear router needs the model's hidden size",
    )  # fmt: skip
    parser.add_argument(
        "--sentence-transformer", metavar="NAME",
        help="a model's name or directory (needs `pip install sentence-transformers`)",
    )  # fmt: skip
    parser.add_argument(
        "--documents", type=positive, default=1000, metavar="N",
        help="of each text at most; default: 1000, as FlexOlmo",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ..documents import read_documents
    from ..domain_embedding import (
        HashingEmbedder,
        domain_embedding,
        save_embeddings,
        sentence_transformer,
    )

    model = arguments.sentence_transformer
    if model is not None and arguments.size is not None:
        raise ValueError(
            f"--size: got {arguments.size} with --sentence-transformer, whose model has its own; "
            "accepted: one of them"
        )
    out = Path(arguments.out)
    if out.is_dir() or out.suffix != ".safetensors":
        raise ValueError(f"--out: got {out}; accepted: a file's name that ends in .safetensors")
    paths = named_paths(arguments.texts, "NAME=PATH")
    texts = {name: read_documents(path, arguments.documents) for name, path in paths.items()}
    embedder = HashingEmbedder(arguments.size or 256) if model is None else None
    if embedder is None:
        embedder = sentence_transformer(model)
    say, found = progress(NAME), {}
    for name, documents in texts.items():
        tell = lambda text, name=name: say(f"{name}: {text}")
        found[name] = domain_embedding(documents, embedder, say=tell)
    save_embeddings(out, found, embedder=repr(embedder) if model is None else model)
    vectors = torch.stack(list(found.values())).double()
    unit = torch.nn.functional.normalize(vectors, dim=1)
    print(f"{out}: {len(found)} embeddings of {vectors.shape[1]} numbers")
    width = max(map(len, found))
    for name, vector, cosines in zip(found, vectors, unit @ unit.T, strict=True):
        row = " ".join(f"{cosine:5.2f}" for cosine in cosines.tolist())
        print(f"  {name:{width}}  {len(texts[name]):5} documents, norm {vector.norm():.3f}, "
              f"cosines {row}")  # fmt: skip
    return 0


def named_paths(texts: Sequence[str], option: str) -> dict[str, Path]:
    """NAME=PATH, once or more, as name to path; ValueError for anything else, or a name twice."""
    found: dict[str, Path] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not (name and sign and path):
            raise ValueError(f"{option}: got {text!r}; accepted: NAME=PATH")
        if name in found:
            raise ValueError(f"{option}: got {name!r} twice; accepted: each name once")
        found[name] = Path(path)
    return found

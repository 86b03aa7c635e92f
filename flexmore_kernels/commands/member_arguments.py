"""Arguments that the commands on experts share: which one, where a new one is from, its card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..expert_sources import ExpertSource

ROWS = ("zeros", "mean", "embedding")


def member(text: str) -> int | str:
    """An expert's name, or its number."""
    return int(text) if text.lstrip("-").isdecimal() else text


def rank(text: str) -> Any:
    """A rank, 0 or full for full-size, or three for gate, up and down, as 8,0,full."""
    parts = [part if part == "full" else int(part) for part in text.split(",")]
    if len(parts) not in (1, 3):
        raise argparse.ArgumentTypeError(f"got {text}; accepted: one rank, or three")
    if len(parts) == 3:
        return tuple(parts)
    return 0 if parts[0] == "full" else parts[0]


def add_card(parser: argparse.ArgumentParser) -> None:
    """--name, --owner, --licence."""
    parser.add_argument("--name", help="the expert's name")
    parser.add_argument("--owner", help="whose it is")
    parser.add_argument("--licence", help="on what terms")


def add_newcomer(parser: argparse.ArgumentParser) -> None:
    """Where a new expert is from, and what the router gets for it."""
    parser.add_argument(
        "new", metavar="EXPERT",
        help="a file of export-expert, a mixture's or a dense model's checkpoint, a PEFT adapter",
    )  # fmt: skip
    parser.add_argument("out", metavar="DST", help="directory of the new checkpoint")
    parser.add_argument("--expert", type=member, metavar="E", help="which one, of a mixture")
    parser.add_argument(
        "--rank", type=rank, metavar="R", help="of a dense model's difference to SRC's base"
    )
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="take an expert that was trained beside another base",
    )
    parser.add_argument(
        "--row", choices=ROWS,
        help="of a linear router, in place of the expert's own: zeros, the mean of the others', or "
        "its domain embedding",
    )  # fmt: skip
    parser.add_argument(
        "--embedding", metavar="FILE", help="of the expert's domain (`flexmore embed`), by its name"
    )
    add_card(parser)


def newcomer(arguments: argparse.Namespace) -> tuple[ExpertSource, dict[str, Any]]:
    """The expert, and the arguments that say what the router gets for it."""
    from ..expert import Revised, open_expert
    from ..members import new_card

    found = open_expert(
        arguments.new, expert=arguments.expert, rank=arguments.rank, base=arguments.source
    )
    given = (arguments.name, arguments.owner, arguments.licence)
    card = None if given == (None,) * 3 else new_card(found.card, *given)
    found = Revised(found, card=card, any_base=arguments.any_base)
    vector = None
    if arguments.embedding is not None:
        vector = _embedding(arguments.embedding, found)
    if arguments.row != "embedding":
        return found, {"router_rows": arguments.row, "embedding": vector}
    row = found.embedding if vector is None else vector
    if row is None:
        raise ValueError("--row embedding: the expert has none; accepted: with --embedding FILE")
    return found, {"router_rows": row}


def _embedding(path: str, expert: ExpertSource) -> Tensor:
    from ..domain_embedding import load_embeddings

    vectors = load_embeddings(Path(path))
    name = None if expert.card is None else expert.card.name
    if name in vectors:
        return vectors[name]
    if len(vectors) == 1:
        return next(iter(vectors.values()))
    raise ValueError(
        f"--embedding: {path} has none of {name!r}; accepted: --name one of {', '.join(vectors)}"
    )

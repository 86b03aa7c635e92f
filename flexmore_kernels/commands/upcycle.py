"""Independently trained dense models as one mixture around the seed that they were trained from."""

from __future__ import annotations

import argparse

from . import describe, positive, progress
from .member_arguments import rank

NAME, HELP = "upcycle", "dense models as one mixture around their seed (Nexus)"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("seed_dir", metavar="SEED", help="a dense OLMo-2: base and shared expert")
    parser.add_argument("dense", nargs="+", metavar="DENSE", help="models trained from it")
    parser.add_argument("out", metavar="DST", help="directory of the new checkpoint")
    parser.add_argument(
        "--embeddings", metavar="FILE",
        help="of their domains (`flexmore embed`), by the names of the experts",
    )  # fmt: skip
    parser.add_argument("--router", choices=("linear", "projected"), default="linear")
    parser.add_argument("--projector-size", type=positive, metavar="H", help="default: D")
    parser.add_argument(
        "--routed-base", action="store_true",
        help="the seed's FFN is one of those that the router selects, not always on",
    )  # fmt: skip
    parser.add_argument(
        "--rank", type=rank, metavar="R", help="of each difference to the seed; default: full-size"
    )
    parser.add_argument("--top-k", type=positive, default=1, help="routed experts a token")
    parser.add_argument(
        "--names", metavar="NAME,NAME", help="of the experts; default: the directories' names"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the router's random numbers")


def run(arguments: argparse.Namespace) -> int:
    from ..cards import Card
    from ..upcycling import default_cards, ordered_embeddings, upcycle

    cards = default_cards(arguments.dense)
    if arguments.names is not None:
        cards = [cards[0], *map(Card, arguments.names.split(","))]
    embeddings = None
    if arguments.embeddings is not None:
        from ..domain_embedding import load_embeddings

        embeddings = ordered_embeddings(load_embeddings(arguments.embeddings), cards)
    layout = upcycle(
        arguments.seed_dir,
        arguments.dense,
        arguments.out,
        embeddings=embeddings,
        router=arguments.router,
        projector_size=arguments.projector_size,
        shared_expert=not arguments.routed_base,
        ranks=arguments.rank,
        top_k=arguments.top_k,
        cards=cards,
        seed=arguments.seed,
        say=progress(NAME),
    )
    print(describe(layout))
    return 0

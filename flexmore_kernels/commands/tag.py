"""Write an expert's name, owner or licence in a checkpoint's config.json; "" takes one off."""

from __future__ import annotations

import argparse

from .member_arguments import add_card, member

NAME, HELP = "tag", "write an expert's name, owner or licence"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR")
    parser.add_argument("expert", metavar="E", type=member)
    add_card(parser)


def run(arguments: argparse.Namespace) -> int:
    from .. import checkpoint_members

    given = {"name": arguments.name, "owner": arguments.owner, "licence": arguments.licence}
    if all(value is None for value in given.values()):
        raise ValueError("--name, --owner, --licence: got none; accepted: one or more")
    card = checkpoint_members.tag(arguments.checkpoint, arguments.expert, **given)
    print(f"{card.name}: owner {card.owner or '-'}, licence {card.licence or '-'}")
    return 0

"""An expert of a checkpoint, or of a dense model or adapter, as one file to hand over."""

from __future__ import annotations

import argparse

from .member_arguments import add_card, member, rank

NAME, HELP = "export-expert", "an expert as one file, to hand over"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="a mixture's or a dense model's checkpoint, or a PEFT adapter"
    )
    parser.add_argument("out", metavar="FILE", help="safetensors, written whole or not at all")
    parser.add_argument("--expert", type=member, metavar="E", help="which one, of a mixture")
    parser.add_argument("--base", metavar="DIR", help="of an adapter, or of a --rank")
    parser.add_argument(
        "--rank", type=rank, metavar="R", help="of a dense model's difference to the --base"
    )
    add_card(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..expert import Expert, Revised, open_expert
    from ..members import new_card

    found = open_expert(
        arguments.source, expert=arguments.expert, rank=arguments.rank, base=arguments.base
    )
    given = (arguments.name, arguments.owner, arguments.licence)
    if given != (None,) * 3:
        found = Revised(found, card=new_card(found.card, *given))
    expert = Expert.of(found)
    expert.save(arguments.out)
    name = "an expert without a name" if expert.card is None else expert.card.name
    print(f"{arguments.out}: {name}, {expert.num_layers} layers, base {expert.base or 'not known'}")
    return 0

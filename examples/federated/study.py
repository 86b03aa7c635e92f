"""FlexMoRE's and Nexus's questions, asked of small models on real text: the whole study.

    python examples/federated/study.py OUT [--texts DIR] [--size small] [--seeds 3]
    python examples/federated/study.py OUT --prepare
    python examples/federated/study.py OUT --export DIR

Trains, for each seed, a base on public text, experts and whole models of one domain each, and
scores them alone, mixed and truncated; results.py says what comes out. Stop it when you like, or
let it be killed: the same command goes on after the last piece that was finished. It leaves
OUT/results.json and OUT/page.html. --prepare stops when the texts are encoded: then OUT can be
taken to a machine that has neither texts nor a tokenizer. --export writes one mixture of a
finished study as a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flexolmo
import results
import routers
import speed
import torch
from corpus import Corpus, read_corpus
from export import export
from page import write_page
from parts import Piece, Store, work
from seeds import Seed
from settings import SIZES, Settings
from sources import prepare

import flexmore_kernels as fk
from flexmore_kernels import backend
from flexmore_kernels.checkpoint_writer import write_json

WEIGHTS = ("base", "tuned")
"""Of a seed's tensors, beside those of its domains."""


def say(text: str) -> None:
    print(f"study: {text}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked; ValueError names one that is wrong."""
    parser = argparse.ArgumentParser(
        description="Experts trained apart, at every rank, mixed, and joined later.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("out", help="directory of the study: pieces, results.json, page.html")
    add("--texts", metavar="DIR", help="prepared texts; else those of OUT, which are made ready")
    add("--size", choices=tuple(SIZES), default="small")
    add("--seeds", type=int, default=3)
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--prepare", action="store_true", help="encode the texts, no more")
    add("--export", metavar="DIR", help="write one mixture of the finished study there")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        raise ValueError(f"--seeds: got {options.seeds}; accepted: an integer >= 1")
    options.device = backend.device_or_default(options.device)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or go on; ValueError names what is wrong."""
    options = parse(arguments)
    return run(options, SIZES[options.size])


def run(options: argparse.Namespace, settings: Settings) -> int:
    """The study with these settings, in place of the size's."""
    out = Path(options.out)
    store = Store(out, settings.as_dict(), torch.device(options.device))
    try:
        directory = None if options.texts is None else Path(options.texts)
        if directory is None and not (out / "corpus.json").exists():
            directory = out / "texts"
            prepare(directory, say)
        corpus = read_corpus(store, directory, settings, say)
        if options.prepare:
            return 0
        if options.export is not None:
            export(settings, corpus, store, Path(options.export))
            say(f"{options.export}: a FlexMoRE checkpoint, for `flexmore generate`")
            return 0
        found = study(settings, corpus, store, options)
        write_json(out / "results.json", found)
        write_page(found, out / "page.html")
    finally:
        store.close()
    say(f"{out}/page.html and {out}/results.json are written")
    return 0


def study(settings: Settings, corpus: Corpus, store: Store, options: argparse.Namespace) -> dict:
    """Make what is missing of all pieces, and put the results together."""
    seeds = [Seed(settings, corpus, store, number) for number in range(options.seeds)]
    plans = [[*flexolmo.pieces(seed), *routers.pieces(seed)] for seed in seeds]
    costs = sum(piece.cost for piece in plans[0])
    plans[0].append(Piece("speed", 0.02 * costs, lambda: speed.measure(seeds[0])))
    owner = {piece.name: seed for seed, plan in zip(seeds, plans, strict=True) for piece in plan}
    last = {plan[-1].name for plan in plans}
    for piece in work(store, [piece for plan in plans for piece in plan], say):
        if piece.name in last:
            seed = owner[piece.name]
            seed.let_go()
            if seed.number:  # seed 0's are for --export
                names = [f"{kind}-{domain}" for kind in ("expert", "dense")
                         for domain in corpus.domains]  # fmt: skip
                store.forget(*(seed.name(name) for name in (*WEIGHTS, *names)))
    pieces: list[dict[str, Any]] = [
        {name.removeprefix(seed.name("")): store.read(name)
         for name, whose in owner.items() if whose is seed and name != "speed"}
        for seed in seeds
    ]  # fmt: skip
    about = {
        "size": options.size,
        "settings": settings.as_dict(),
        "machine": machine(store.device),
        **corpus.about,
        "seconds": seconds(store, list(owner)),
    }
    return results.collected(about, pieces, store.read("speed"))


def machine(device: torch.device) -> dict[str, str]:
    """What times, and the last bits, depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{torch.get_num_threads()} CPU threads"
    return {"torch": torch.__version__, "device": name, "library": fk.__version__}


def seconds(store: Store, names: Sequence[str]) -> dict[str, float]:
    """What the pieces took, by their kind."""
    found: dict[str, float] = {}
    for name in names:
        kind = name.rpartition("/")[2].partition("-")[0]
        found[kind] = found.get(kind, 0.0) + store.seconds(name)
    return found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit("study: stopped; the same command goes on after the last finished piece")

"""Give a checkpoint's routers their rows, and write it anew; all else stays the same bits.

For a mixture whose rows are zeros (`flexmore import-adapters`), or no good. Experts are named by
number or by their cards' names. What --init may be:

embeddings: domain embeddings (`flexmore embed`), the same in every layer. prompts, hidden: the mean
of what each layer's router sees of prompts, or of documents. ridge: closed form, from documents or
from the statistics of owners, who send no text (--save-statistics). tune: a short training of the
routers on text, all else frozen.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import add_device, describe, positive, progress
from .embed import named_paths

NAME, HELP = "router", "give a checkpoint's routers their rows: embeddings, text, ridge, training"
INITS = ("embeddings", "prompts", "hidden", "ridge", "tune")
# Which options go with which --init; the others are refused, not forgotten.
_TEXT = ("hidden", "ridge", "tune")
_OPTIONS = {
    "embeddings": ("embeddings",), "prompts": ("prompts",), "texts": _TEXT,
    "statistics": ("ridge",), "save_statistics": ("ridge",), "penalty": ("ridge",),
    "temperature": ("ridge",), "through": ("prompts", "hidden", "ridge"), "steps": ("tune",),
    "learning_rate": ("tune",), "balance": ("tune",), "seed": ("tune",), "tokens": _TEXT,
}  # fmt: skip
_TOKENS, _STEPS, _BATCH, _LENGTH = 1 << 17, 200, 8, 1024


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument(
        "out", metavar="OUT", nargs="?", help="the new one; not needed with --save-statistics"
    )
    parser.add_argument("--init", choices=INITS, required=True)
    parser.add_argument("--embeddings", metavar="FILE", help=".safetensors; or a folder of .npy")
    parser.add_argument("--prompts", metavar="FILE.json", help="{name: [texts]}")
    parser.add_argument(
        "--texts", nargs="+", action="extend", metavar="NAME=PATH",
        help="an expert's documents: a folder, .txt or .jsonl (needs tokenizer.json)",
    )  # fmt: skip
    parser.add_argument(
        "--statistics", nargs="+", action="extend", metavar="NAME=FILE", help="of an owner's text"
    )
    parser.add_argument("--save-statistics", metavar="DIR", help="write those of --texts, each")
    parser.add_argument(
        "--through", choices=("base", "own", "model"),
        help="what texts pass through: the base alone (default), each its own expert (default of "
        "ridge), or the model as it routes now",
    )  # fmt: skip
    parser.add_argument("--penalty", type=_above_zero, metavar="P", help="of ridge; default: 0.001")
    parser.add_argument(
        "--temperature", type=_above_zero, metavar="T", help="of ridge; default: 0.1"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="of tune; default: 200")
    parser.add_argument(
        "--learning-rate", type=_above_zero, metavar="R", help="of tune; default: 0.002"
    )
    parser.add_argument("--balance", type=float, metavar="B", help="of tune; default: 0.01")
    parser.add_argument("--seed", type=int, metavar="S", help="of tune's order; default: 0")
    parser.add_argument("--experts", metavar="NAME,NAME", help="write these experts' rows alone")
    parser.add_argument("--top-k", type=positive, metavar="K", help="experts a token, from now on")
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="of each text at most; default: 131072"
    )
    parser.add_argument("--length", type=positive, default=_LENGTH, help="tokens a sequence")
    parser.add_argument("--batch", type=positive, default=_BATCH, help="sequences at a time")
    add_device(parser)


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; accepted: a number above 0")
    return number


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoint_folders import refuse_existing
    from ..checkpoint_layout import read_layout
    from ..router_checkpoint import check_top_k, rows_in_words, write_routers

    _check(arguments)
    if arguments.out is not None:
        refuse_existing(Path(arguments.out))
    layout = read_layout(arguments.checkpoint)
    if arguments.top_k is not None:
        check_top_k(layout, arguments.top_k)
    model, notes = _INIT[arguments.init](arguments, layout)
    if arguments.out is not None:
        written = write_routers(
            layout, model, arguments.out, top_k=arguments.top_k, say=progress(NAME)
        )
        notes = [describe(written), *rows_in_words(model), *notes]
    print("\n".join(notes))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    init = arguments.init
    for name, inits in _OPTIONS.items():
        if getattr(arguments, name) is not None and init not in inits:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: got one with --init {init}; accepted: {', '.join(inits)}")
    needed = {"embeddings": "embeddings", "prompts": "prompts", "hidden": "texts", "tune": "texts"}
    if init in needed and getattr(arguments, needed[init]) is None:
        raise ValueError(f"--{needed[init]}: got none; --init {init} needs it")
    if init == "ridge" and not (arguments.texts or arguments.statistics):
        raise ValueError("--texts, --statistics: got none; --init ridge needs one of them")
    if arguments.save_statistics is not None and not arguments.texts:
        raise ValueError("--save-statistics: got no text; accepted: with --texts")
    if arguments.out is None and arguments.save_statistics is None:
        raise ValueError("OUT: got none; accepted: a new directory, or --save-statistics alone")


def _embeddings(arguments: argparse.Namespace, layout: Any) -> tuple[Any, list[str]]:
    from ..domain_embedding import load_embeddings
    from ..router_checkpoint import load_routers
    from ..router_rows import from_embeddings

    given = load_embeddings(arguments.embeddings)
    model = load_routers(layout)
    from_embeddings(model, _numbered(given), experts=_experts(arguments))
    return model, []


def _prompts(arguments: argparse.Namespace, layout: Any) -> tuple[Any, list[str]]:
    from ..router_rows import from_prompts

    try:
        given = json.loads(Path(arguments.prompts).read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--prompts: {arguments.prompts} is no JSON ({error})") from None
    if not isinstance(given, dict) or not all(
        isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        for texts in given.values()
    ):
        raise ValueError(f"--prompts: {arguments.prompts}: accepted: {{name: [texts]}}")
    ids = _encoder(layout, "--prompts")
    prompts = {name: [ids(text) for text in texts] for name, texts in _numbered(given).items()}
    return _from_text(arguments, layout, from_prompts, prompts), []


def _hidden(arguments: argparse.Namespace, layout: Any) -> tuple[Any, list[str]]:
    from ..router_rows import from_hidden

    return _from_text(arguments, layout, from_hidden, _texts(arguments, layout)), []


def _from_text(arguments: argparse.Namespace, layout: Any, init: Callable, ids: dict) -> Any:
    model = _loaded(arguments, layout)
    init(
        model, ids, experts=_experts(arguments), through=arguments.through or "base",
        batch=arguments.batch, length=arguments.length, say=progress(NAME),
    )  # fmt: skip
    return model


def _ridge(arguments: argparse.Namespace, layout: Any) -> tuple[Any, list[str]]:
    from ..base_fingerprint import of_checkpoint
    from ..cards import cards_of
    from ..router_checkpoint import load_routers
    from ..router_inputs import expert_of
    from ..router_ridge import PENALTY, TEMPERATURE, RidgeStatistics, from_ridge
    from ..router_rows import check_linear

    model, say = load_routers(layout), progress(NAME)
    if arguments.out is not None:  # before texts are read, and bases
        check_linear(model, "--init ridge")
        for name in _experts(arguments) or ():
            expert_of(model, name, "--experts")
    base = of_checkpoint(layout)
    files = _numbered(named_paths(arguments.statistics or (), "--statistics"))
    statistics = {name: RidgeStatistics.load(path) for name, path in files.items()}
    notes, cards = [], cards_of(layout.config, layout.config["num_experts"])
    texts = _texts(arguments, layout) if arguments.texts else {}
    if texts:
        model = _loaded(arguments, layout)
    for name, documents in texts.items():
        expert = expert_of(model, name, "--texts")
        if name in statistics:
            raise ValueError(f"--texts: got {name!r}, which --statistics has; accepted: one")
        statistics[name] = RidgeStatistics.collect(
            model, documents, base=base,
            expert={"base": 0, "own": expert, "model": None}[arguments.through or "own"],
            batch=arguments.batch, length=arguments.length, say=say,
        )  # fmt: skip
        if arguments.save_statistics is not None:
            file = re.sub(r"[^\w.-]+", "-", cards[expert].name) + ".safetensors"
            path = Path(arguments.save_statistics) / file
            statistics[name].save(path)
            size = f"{path.stat().st_size:,} bytes"
            notes.append(f"{path}: of {statistics[name].tokens} tokens, base {base}, {size}")
    if arguments.out is not None:
        from_ridge(
            model, statistics, base=base, experts=_experts(arguments),
            penalty=PENALTY if arguments.penalty is None else arguments.penalty,
            temperature=TEMPERATURE if arguments.temperature is None else arguments.temperature,
            say=say,
        )  # fmt: skip
    return model, notes


def _tune(arguments: argparse.Namespace, layout: Any) -> tuple[Any, list[str]]:
    import torch

    from ..router_inputs import cut, layers_of, padded
    from ..router_tune import tune

    texts = _texts(arguments, layout, experts=False)
    documents = [torch.tensor(ids) for own in texts.values() for ids in own]
    pieces = [piece for _, piece in cut(documents, arguments.length) if len(piece) > 1]
    if not pieces:
        raise ValueError("--texts: got no document of two tokens; accepted: one or more")
    seed = arguments.seed or 0
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [pieces[i] for i in order]
    batches = [
        padded(shuffled[start : start + arguments.batch])
        for start in range(0, len(shuffled), arguments.batch)
    ]
    model = _loaded(arguments, layout)
    if arguments.top_k is not None:
        for layer in layers_of(model):
            layer.top_k = arguments.top_k
    chosen = {"learning_rate": arguments.learning_rate, "balance": arguments.balance}
    steps = arguments.steps or _STEPS
    losses = tune(
        model, batches, steps, seed=seed, experts=_experts(arguments), say=progress(NAME),
        **{name: value for name, value in chosen.items() if value is not None},
    )  # fmt: skip
    part = max(1, steps // 10)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    return model, [f"{steps} steps: loss {first:.4f} in the first {part}, {last:.4f} in the last"]


_INIT = {
    "embeddings": _embeddings, "prompts": _prompts, "hidden": _hidden, "ridge": _ridge,
    "tune": _tune,
}  # fmt: skip


def _numbered(given: dict) -> dict:
    """Names that are numbers as numbers: experts go by either."""
    return {int(name) if name.isdecimal() else name: value for name, value in given.items()}


def _experts(arguments: argparse.Namespace) -> list | None:
    if arguments.experts is None:
        return None
    names = [name.strip() for name in arguments.experts.split(",")]
    return [int(name) if name.isdecimal() else name for name in names]


def _loaded(arguments: argparse.Namespace, layout: Any) -> Any:
    import torch

    from .. import backend
    from ..router_checkpoint import load_to_route

    device = backend.device_or_default(arguments.device)
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    return load_to_route(layout, device, getattr(torch, dtype))


def _encoder(layout: Any, option: str) -> Callable[[str], list[int]]:
    from ..text import read_tokenizer

    instead = "a checkpoint with one, or --init embeddings"
    tokenizer = read_tokenizer(layout.directory, argument=option, instead=instead)
    return lambda text: tokenizer.encode(text).ids


def _texts(arguments: argparse.Namespace, layout: Any, experts: bool = True) -> dict:
    """--texts as token ids of documents, of each text at most --tokens."""
    from ..cards import cards_of, find
    from ..documents import read_documents

    paths = named_paths(arguments.texts, "--texts")
    if experts:  # before the text is read
        paths, cards = _numbered(paths), cards_of(layout.config, layout.config["num_experts"])
        for name in paths:
            find(cards, name, "--texts")
    ids, found = _encoder(layout, "--texts"), {}
    for name, path in paths.items():
        left, found[name] = arguments.tokens or _TOKENS, []
        for document in read_documents(path):
            piece = ids(document)[:left]
            left -= len(piece)
            found[name] += [piece] if piece else []
            if not left:
                break
    return found

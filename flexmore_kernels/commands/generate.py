"""Continue prompts with a checkpoint's model: text as it comes, speed, what each expert did."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import add_device, positive

NAME, HELP = "generate", "continue prompts: text as it comes, tokens a second, experts' shares"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT_DIR", help='or "default", the small packaged mixture'
    )
    parser.add_argument(
        "prompt", nargs="*", help="one or more texts, as one batch (needs tokenizer.json there)"
    )
    parser.add_argument(
        "--ids", action="append", metavar="5,17,3", help="a prompt as ids; repeat for a batch"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--top-k", type=positive, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument(
        "--experts", action="append", metavar="LIST",
        help="0,2,5 or math,law: these alone; -3 or -math,-law: all but these (as "
        "--experts=-math,-law); once for all prompts, or once a prompt",
    )  # fmt: skip
    parser.add_argument(
        "--rank-limit", action="append", default=[], metavar="EXPERT=RANK",
        help="use the first ranks of an expert alone; repeat for more experts",
    )  # fmt: skip
    parser.add_argument(
        "--active", type=positive, metavar="K", help="experts a token; default: the config's"
    )
    parser.add_argument(
        "--account", metavar="FILE",
        help="write each prompt's tokens, and rows and routing weight by expert, as JSON",
    )  # fmt: skip
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .. import backend
    from ..cards import cards_of
    from ..checkpoint import load_model, read_layout
    from ..checkpoint_writer import write_json
    from ..domains_demo import DIRECTORY
    from ..text import Pieces, ids_of, read_tokenizer

    for name in ("top_k", "top_p"):
        if getattr(arguments, name) is not None and not arguments.temperature:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option}: got {getattr(arguments, name)} without --temperature, which is "
                f"greedy; accepted: {option} with --temperature above 0"
            )
    device = backend.device_or_default(arguments.device)
    packaged = arguments.checkpoint == "default" and not Path("default").exists()
    layout = read_layout(DIRECTORY if packaged else arguments.checkpoint)
    if bool(arguments.prompt) == bool(arguments.ids):
        raise ValueError("prompt: got none, or texts and --ids; accepted: texts, or --ids")
    tokenizer = read_tokenizer(layout.directory, needed=bool(arguments.prompt))
    vocabulary = layout.config["vocab_size"]
    prompts = [tokenizer.encode(text).ids for text in arguments.prompt]
    prompts += [ids_of(text) for text in arguments.ids or ()]
    for number, prompt in enumerate(prompts):
        if not prompt or max(prompt) >= vocabulary:
            raise ValueError(f"prompt {number}: got {prompt}; accepted: ids from 0 to "
                             f"{vocabulary - 1}, at least one")  # fmt: skip
    cards = cards_of(layout.config, layout.config["num_experts"])
    experts = _expert_mask(arguments.experts, len(prompts), cards)
    limits = _rank_limit(arguments.rank_limit, cards)
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    _say(f"loading {layout.directory} as {dtype} on {device}")
    model = load_model(layout, device, getattr(torch, dtype)).eval()
    if arguments.active is not None:
        _activate(model, arguments.active)
    for block in model.model.layers:
        block.self_attn.prepare()  # the whole of model.prepare() takes memory, which may be scarce
    pieces = [Pieces(tokenizer) for _ in prompts]
    clock = _Clock(_Printer(pieces, model.config.extra.get("eos_token_id")))
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=device)
    real = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    with model.attributing(len(prompts)) as attribution:
        model.generate(
            ids,
            attention_mask=real,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            generator=torch.Generator(device).manual_seed(arguments.seed),
            expert_mask=None if experts is None else experts.to(device),
            rank_limit=limits,
            stream=clock,
        )
    clock.printer.finish()
    print(f"\n{clock.speed(len(prompts), sum(map(len, prompts)))}\n{_shares(attribution, cards)}",
          file=sys.stderr)  # fmt: skip
    if arguments.account is not None:
        account = attribution.to_dict([card.name for card in cards])
        write_json(Path(arguments.account), account)
    return 0


class _Printer:
    """One prompt's text as it comes; of several, each when it has ended, with its number."""

    def __init__(self, pieces: list, eos: Any) -> None:
        self.pieces = pieces
        self.eos = set(eos) if isinstance(eos, list) else {eos}
        self.texts: list[str] = [""] * len(pieces)
        self.open = set(range(len(pieces)))

    def add(self, column: list[int]) -> None:
        for row in sorted(self.open):
            if column[row] in self.eos:
                self._end(row)
            else:
                self._show(row, self.pieces[row].add(column[row]))

    def finish(self) -> None:
        for row in sorted(self.open):
            self._end(row)

    def _end(self, row: int) -> None:
        self._show(row, self.pieces[row].rest())
        self.open.discard(row)
        if len(self.pieces) > 1:
            print(f"[{row}] {self.texts[row]}", flush=True)

    def _show(self, row: int, text: str) -> None:
        self.texts[row] += text
        if len(self.pieces) == 1:
            print(text, end="", flush=True)


class _Clock:
    """Takes tokens to the printer and times them."""

    def __init__(self, printer: _Printer) -> None:
        self.printer, self.begin, self.times = printer, time.perf_counter(), []
        self.tokens = 0  # after the first step's; of requests that have not ended

    def __call__(self, column: Any) -> None:
        if self.times:
            self.tokens += len(self.printer.open)
        self.printer.add(column.tolist())
        self.times.append(time.perf_counter())

    def speed(self, requests: int, prompt_tokens: int) -> str:
        first = self.times[0] - self.begin
        text = f"first token after {first * 1e3:.0f} ms ({prompt_tokens} tokens of prompt)"
        rest = len(self.times) - 1
        if rest:
            seconds = max(self.times[-1] - self.times[0], 1e-9)
            text += (
                f"; then {self.tokens / seconds:.1f} tokens/s "
                f"({seconds / rest * 1e3:.2f} ms a step, {requests} at once)"
            )
        return text


def _shares(attribution: Any, cards: Sequence) -> str:
    """How many of the tokens each expert served, over all layers."""
    tokens = max(1, int(attribution.tokens.sum()) * attribution.num_layers)
    named = zip(cards, attribution.rows.sum(0).tolist(), strict=True)
    parts = (f"{card.name}: {100 * rows / tokens:.1f} %" for card, rows in named)
    return "share of tokens per expert: " + ", ".join(parts)


def _expert_mask(texts: list[str] | None, prompts: int, cards: Sequence) -> Any:
    """--experts as bool (E,) or, given once a prompt, (B, E)."""
    import torch

    if texts is None:
        return None
    if len(texts) not in (1, prompts):
        raise ValueError(f"--experts: got {len(texts)}; accepted: one, or one a prompt, {prompts}")
    rows = torch.stack([_allowed(text, cards) for text in texts])
    return rows[0] if len(texts) == 1 else rows


def _allowed(text: str, cards: Sequence) -> Any:
    from ..cards import mask_of

    parts = [part.strip() for part in text.split(",")]
    without = {part.startswith("-") for part in parts}
    chosen = [_number(part.removeprefix("-"), cards) for part in parts]
    if None in chosen or len(without) > 1:
        raise ValueError(
            f"--experts: got {text!r}; accepted: 0,2,5 or all with a minus, -3,-4, of experts 0 to "
            f"{len(cards) - 1}, or of {_names(cards)}"
        )
    if without == {True} and len(set(chosen)) == len(cards):
        raise ValueError(f"--experts: got {text!r}; accepted: what leaves an expert")
    return mask_of(cards, without=chosen) if without == {True} else mask_of(cards, only=chosen)


def _number(text: str, cards: Sequence) -> int | None:
    """The expert of a number or name; None if there is no such."""
    if text.isdecimal():
        return int(text) if int(text) < len(cards) else None
    return next((e for e, card in enumerate(cards) if card.name == text), None)


def _names(cards: Sequence) -> str:
    return ", ".join(card.name for card in cards)


def _rank_limit(texts: list[str], cards: Sequence) -> list[int | None] | None:
    """--rank-limit as E entries; the model checks that they fit its ranks."""
    limits: list[int | None] = [None] * len(cards)
    for text in texts:
        expert, _, rank = text.rpartition("=")
        number = _number(expert, cards)
        if number is None or not rank.isdecimal():
            raise ValueError(
                f"--rank-limit: got {text!r}; accepted: EXPERT=RANK, as 1=16, of {_names(cards)}"
            )
        limits[number] = int(rank)
    return limits if texts else None


def _activate(model: Any, top_k: int) -> None:
    shared = model.model.layers[0].mlp.shared_expert is not None
    experts = model.config.num_experts - shared
    if top_k > experts:
        raise ValueError(f"--active: got {top_k}; accepted: 1 to {experts}")
    for block in model.model.layers:
        block.mlp.top_k = top_k


def _say(text: str) -> None:
    print(f"flexmore generate: {text}", file=sys.stderr, flush=True)

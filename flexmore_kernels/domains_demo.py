"""What `flexmore demo` shows first: the packaged mixture on text of each of its domains.

A continuation of one prompt a domain, each token in the colour of the expert that weighed most for
it; and how much worse the model predicts text of that domain when its expert is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checkpoint import load_model
from .model import FlexMoREForCausalLM
from .text import Pieces, read_tokenizer

DIRECTORY = Path(__file__).parent / "default_model"
"""A checkpoint with tokenizer.json and PROMPTS; its model card says what it is."""
PROMPTS = "prompts.json"
TOKENIZERS = "pip install tokenizers"
"""In the error of who lacks the package."""
_COLOURS = (36, 33, 32, 35, 31, 34, 96, 93, 92, 95, 91, 94)
_RESET = "\x1b[0m"


class Shown(NamedTuple):
    """One domain: its prompt and the continuation as (text, expert) pieces, and perplexities.

    expert: the number of the one with the largest routing weight, summed over the layers, at that
    token. perplexity, without: a token, of held-out text of the domain, with all experts and with
    the domain's own excluded.
    """

    domain: str
    prompt: list[tuple[str, int]]
    continued: list[tuple[str, int]]
    perplexity: float
    without: float


def show(
    directory: Path = DIRECTORY, *, device: str = "cpu", colour: bool = True, new_tokens: int = 40
) -> list[Shown]:
    """Print every domain of the checkpoint, and return what was printed.

    Without colours the expert's number stands before each run of its tokens. Raises ValueError as
    `read_tokenizer` and `load_model` do.
    """
    tokenizer = read_tokenizer(directory, argument="texts", instead="--checks")
    samples = json.loads((directory / PROMPTS).read_text(encoding="utf-8"))
    model = load_model(directory, device, torch.float32).eval()
    print(_head(model, directory, colour))
    found = []
    for domain, sample in samples.items():
        one = look(model, tokenizer, domain, sample["prompt"], sample["text"], new_tokens)
        found.append(one)
        print(_in_words(one, colour), flush=True)
    return found


@torch.no_grad()
def look(
    model: FlexMoREForCausalLM,
    tokenizer: Any,
    domain: str,
    prompt: str,
    text: str,
    new_tokens: int,
) -> Shown:
    """Continue the prompt greedily; weigh `text`, which follows it, with and without the expert."""
    device = model.model.embed_tokens.weight.device
    given = tokenizer.encode(prompt).ids
    ids = torch.tensor([given], device=device)
    made = model.generate(ids, max_new_tokens=new_tokens)
    with model.routings() as seen:
        model(made)
    experts = _most(seen, model.config.num_experts).tolist()
    pieces = Pieces(tokenizer)
    shown = [(pieces.add(token), e) for token, e in zip(made[0].tolist(), experts, strict=True)]
    shown.append((pieces.rest(), experts[-1]))
    follows = tokenizer.encode(text).ids
    whole = torch.tensor([given + follows], device=device)
    mask = model.expert_mask(without=[domain])
    perplexities = [
        _perplexity(model(whole, expert_mask=one), whole, len(follows)) for one in (None, mask)
    ]
    return Shown(domain, shown[: len(given)], shown[len(given) :], *perplexities)


def _most(routings: Sequence[Any], num_experts: int) -> Tensor:
    """(S,): of each token of the one request the expert with the largest weight over all layers."""
    total = 0
    for routing in routings:
        weights, indices = routing.weights[0], routing.indices[0]
        zeros = weights.new_zeros(weights.shape[0], num_experts + 1)
        total = total + zeros.scatter_add(1, indices, weights)[:, :num_experts]
    return total.argmax(1)


def _perplexity(logits: Tensor, ids: Tensor, count: int) -> float:
    """exp of the mean loss of the last `count` tokens."""
    loss = F.cross_entropy(logits[0, -count - 1 : -1].double(), ids[0, -count:])
    return float(loss.exp())


def _head(model: FlexMoREForCausalLM, directory: Path, colour: bool) -> str:
    config, names = model.config, [card.name for card in model.cards]
    size = sum(parameter.numel() for parameter in model.parameters())
    legend = (
        _painted(name, e) if colour else f"{e} {name}" for e, name in enumerate(names)
    )  # fmt: skip
    return (
        f"A mixture of {config.num_experts} experts, top-{config.num_experts_per_tok}, "
        f"{size / 1e6:.1f} M parameters, trained apart on {config.num_experts - 1} domains "
        f"({directory.name}/README.md).\nExperts: {', '.join(legend)}\n"
    )


def _painted(text: str, expert: int) -> str:
    """The base has no colour."""
    if expert == 0:
        return text
    return f"\x1b[{_COLOURS[(expert - 1) % len(_COLOURS)]}m{text}{_RESET}"


def _coloured(pieces: Sequence[tuple[str, int]], colour: bool) -> str:
    if colour:
        return "".join(_painted(text, expert) for text, expert in pieces)
    parts, last = [], None
    for text, expert in pieces:
        parts.append(text if expert == last else f"[{expert}]{text}")
        last = expert
    return "".join(parts)


def _in_words(one: Shown, colour: bool) -> str:
    dim = "\x1b[1m{}\x1b[0m" if colour else "{}"
    return (
        f"{dim.format(one.domain)}: {_coloured(one.prompt, colour)}{dim.format(' >> ')}"
        f"{_coloured(one.continued, colour)}\n"
        f"  perplexity of what really follows: {one.perplexity:.1f}; without its expert: "
        f"{one.without:.1f} ({one.without / one.perplexity:.2f} times)\n"
    )

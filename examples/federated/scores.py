"""What a model is worth: losses of held-out text, multiple choice by likelihood, who is asked.

Hidden states are the model's, in its dtype; logits are computed in float32.

A probe's item is a prompt and choices. Of each choice the log-likelihood after the prompt is taken,
    score        the largest log-likelihood a byte of the choice (length does not count)
    raw          the largest log-likelihood of the whole choice
    probability  mean of the right choice's share of the softmax over the whole choices
Prompt and choice are encoded apart and joined; of what is longer than `length` tokens the beginning
is cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = 32_768
"""Of one forward: a batch's padded size."""


class Heldout(NamedTuple):
    """A domain's held-out text: windows (n, length + 1) int32, and how many bytes a token has."""

    windows: Tensor
    bytes_a_token: float

    @classmethod
    def of(cls, ids: Tensor, nbytes: int, length: int, most: int) -> Heldout:
        """Windows, in each of which `length` ids are predicted and none twice; up to about `most`
        ids, from all over the text. Raises ValueError for a text shorter than one window."""
        every = (len(ids) - 1) // length
        if every < 1:
            raise ValueError(f"texts: got {len(ids)} tokens; accepted: more than {length}")
        count = min(every, max(1, most // length))
        starts = torch.arange(count) * every // count * length
        places = starts[:, None] + torch.arange(length + 1)
        return cls(ids[places.to(ids.device)], nbytes / len(ids))


class Batch(NamedTuple):
    """Sequences (B, S), and of each token that counts the row, the column that predicts it, the
    token and which sequence of the probe it is of."""

    ids: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    sequence: Tensor


class Probe(NamedTuple):
    """Items as tensors. nbytes (items, choices): of each choice, 0 where there is none."""

    name: str
    group: str
    domain: str
    answers: Tensor
    nbytes: Tensor
    sequences: int
    batches: tuple[Batch, ...]

    @property
    def tokens(self) -> int:
        """Of one scoring, with padding."""
        return sum(batch.ids.numel() for batch in self.batches)

    @property
    def chance(self) -> float:
        return float((1 / (self.nbytes > 0).sum(1)).mean())


class Item(NamedTuple):
    """An item in ids: the prompt's, of each choice its ids and bytes, and which is right."""

    prompt: list[int]
    choices: list[tuple[list[int], int]]
    answer: int


def packed(
    name: str, group: str, domain: str, items: Sequence[Item], length: int, device: torch.device
) -> Probe:
    """Items as batches of sequences of like length. Raises ValueError for an empty prompt or
    choice."""
    most = max(len(item.choices) for item in items)
    nbytes = torch.zeros(len(items), most)
    rows = []
    for number, item in enumerate(items):
        for choice, (ids, size) in enumerate(item.choices):
            if not item.prompt or not ids:
                raise ValueError(f"probes: {name}: got an empty text; accepted: at least one token")
            nbytes[number, choice] = size
            whole = (item.prompt + ids)[-length - 1 :]
            rows.append((len(whole), min(len(ids), len(whole) - 1), number * most + choice, whole))
    rows.sort(key=lambda row: (row[0], row[2]))
    batches, start = [], 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and (end + 1 - start) * rows[end][0] <= TOKENS:
            end += 1
        batches.append(_batch(rows[start:end], device))
        start = end
    answers = torch.tensor([item.answer for item in items])
    return Probe(name, group, domain, answers, nbytes, len(items) * most, tuple(batches))


def _batch(rows: Sequence[tuple[int, int, int, list[int]]], device: torch.device) -> Batch:
    width = max(length for length, *_ in rows) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    places = []
    for number, (length, own, sequence, whole) in enumerate(rows):
        ids[number, : length - 1] = torch.tensor(whole[:-1])
        for column in range(length - 1 - own, length - 1):
            places.append((number, column, whole[column + 1], sequence))
    return Batch(ids.to(device), *torch.tensor(places).T.contiguous().to(device))


@contextlib.contextmanager
def without_head(model) -> Iterator[Tensor]:
    """Within, the model returns hidden states; yields the head's weight in float32."""
    head, model.lm_head = model.lm_head, nn.Identity()
    try:
        yield head.weight.detach().float()
    finally:
        model.lm_head = head


@torch.no_grad()
def losses(
    model,
    texts: Mapping[str, Heldout],
    *,
    owner: Mapping[str, int] | None = None,
    mask: Tensor | None = None,
) -> tuple[dict, dict]:
    """(Losses, shares) as results.py has them.

    owner: of domains the number of their own expert, whose share is wanted. mask: bool (E,), the
    experts that are there.
    """
    found, shares = {}, {}
    with without_head(model) as head:
        for domain, (windows, bytes_a_token) in texts.items():
            total = torch.zeros((), dtype=torch.float64, device=windows.device)
            with model.counting() as layers:
                for part in windows.split(max(1, TOKENS // windows.shape[1])):
                    hidden = model(part[:, :-1].long(), expert_mask=mask).flatten(0, 1)
                    logits = F.linear(hidden.float(), head)
                    targets = part[:, 1:].flatten().long()
                    total += F.cross_entropy(logits, targets, reduction="sum").double()
            token = float(total) / (windows.shape[0] * (windows.shape[1] - 1))
            found[domain] = {"token": token, "byte": token / bytes_a_token}
            if owner is not None and domain in owner:
                own = [s.load[owner[domain]] / s.tokens for s in layers]
                shares[domain] = float(torch.stack(own).mean())
    return found, shares


@torch.no_grad()
def probe(model, probe: Probe) -> dict:
    """One of Probes as results.py has them."""
    device = next(model.parameters()).device
    whole = torch.zeros(probe.sequences, dtype=torch.float64, device=device)
    with without_head(model) as head:
        for ids, row, column, target, sequence in probe.batches:
            hidden = model(ids)[row, column]
            logs = F.linear(hidden.float(), head).log_softmax(1)
            chosen = logs.gather(1, target[:, None])[:, 0]
            whole.index_add_(0, sequence, chosen.double())
    whole = whole.cpu().view(probe.nbytes.shape)
    absent = probe.nbytes == 0
    raw = whole.masked_fill(absent, -torch.inf)
    a_byte = (whole / probe.nbytes.clamp(min=1)).masked_fill(absent, -torch.inf)
    right = a_byte.argmax(1) == probe.answers
    probability = raw.softmax(1).gather(1, probe.answers[:, None])
    return {
        "score": float(right.double().mean()),
        "raw": float((raw.argmax(1) == probe.answers).double().mean()),
        "probability": float(probability.mean()),
        "items": len(right),
        "right": "".join(map(str, right.int().tolist())),
    }


def probes(model, every: Sequence[Probe]) -> dict:
    """Probes of a model."""
    return {one.name: probe(model, one) for one in every}

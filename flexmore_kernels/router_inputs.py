"""What a router sees of texts: x at each MoE layer, over the tokens of documents.

    with w_t the weight of token t, per layer:    sum_t w_t x_t,    sum_t w_t x_t x_t^T

Sums are float64, on the layer's device. Documents are token ids; those longer than a sequence are
cut into sequences, each read from its own beginning, and none of their tokens is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cards import cards_of, find
from .checks import check_int, check_tensor
from .layer import FlexMoRE
from .model import FlexMoREForCausalLM
from .progress import Progress

Ids = Sequence[int] | Tensor
Say = Callable[[str], None] | None


class Reading(NamedTuple):
    """How documents are passed through a model.

    batch: sequences at a time. length: tokens a sequence, at most. say: is told how far it is.
    """

    batch: int = 8
    length: int = 2048
    say: Say = None

    def check(self) -> None:
        check_int("batch", self.batch, 1)
        check_int("length", self.length, 1)


class Sums:
    """Running sums of one layer: `total` (D,) and, if asked for, `gram` (D, D); float64."""

    def __init__(self, size: int, device: Any, gram: bool) -> None:
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self.gram = self.total.new_zeros(size, size) if gram else None

    def add(self, x_TD: Tensor, weight_T: Tensor | None) -> None:
        """Add tokens, each with its weight; None: 1."""
        wide = x_TD.double()
        weighted = wide if weight_T is None else wide * weight_T[:, None]
        self.total += weighted.sum(0)
        if self.gram is not None:
            self.gram.addmm_(weighted.T, wide)


def layers_of(model: Any) -> list[FlexMoRE]:
    """A language model's MoE layers; TypeError for another model."""
    if not isinstance(model, FlexMoREForCausalLM):
        got = type(model).__name__
        raise TypeError(f"model: got {got}; accepted: a flexmore_kernels.FlexMoREForCausalLM")
    return [block.mlp for block in model.model.layers]


def expert_of(model: FlexMoREForCausalLM, expert: int | str, argument: str = "expert") -> int:
    """An expert's number, by number or by its card's name; ValueError says which are there."""
    return find(cards_of(model.config, model.config.num_experts), expert, argument)


def check_texts(model: FlexMoREForCausalLM, documents: Any, argument: str) -> list[Tensor]:
    """Documents as (n,) int64, on the CPU; ValueError or TypeError for what is no token ids."""
    if isinstance(documents, (str, bytes, Tensor)) or not isinstance(documents, Sequence):
        got = type(documents).__name__
        raise TypeError(f"{argument}: got {got}; accepted: a list of documents, each token ids")
    if not documents:
        raise ValueError(f"{argument}: got no document; accepted: one or more")
    most, found = model.config.vocab_size, []
    for number, document in enumerate(documents):
        name = f"{argument}[{number}]"
        if not isinstance(document, Tensor):
            if isinstance(document, str) or not isinstance(document, Sequence):
                got = type(document).__name__
                raise TypeError(f"{name}: got {got}; accepted: token ids")
            for token in document:
                check_int(name, token, 0, most - 1)
            document = torch.tensor(document, dtype=torch.int64)
        check_tensor(name, document, ("n",), (torch.int64, torch.int32))
        ids = document.detach().cpu().long()
        if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= most:
            got = f"ids {int(ids.min())} to {int(ids.max())}" if len(ids) else "no token"
            raise ValueError(f"{name}: got {got}; accepted: ids from 0 to {most - 1}, at least one")
        found.append(ids)
    return found


def cut(documents: Sequence[Tensor], length: int) -> list[tuple[int, Tensor]]:
    """(number of the document, ids) of sequences of at most `length` tokens, in order."""
    return [(n, piece) for n, ids in enumerate(documents) for piece in ids.split(length)]


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences of any lengths as ids (B, S), zeros behind the shorter ones, and their mask."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def gather(
    model: FlexMoREForCausalLM,
    documents: Sequence[Tensor],
    sums: Sequence[Sums],
    reading: Reading,
    *,
    expert: int | None,
    weights: Sequence[float] | None = None,
    what: str = "texts",
) -> None:
    """Pass documents through a model, and add what each layer's router sees to its `sums`.

    Args:
        documents: as `check_texts` gives them.
        sums: one a layer.
        expert: the texts pass through this expert alone (and the shared one), so that x does not
            depend on the router's rows; None: as the model routes them now.
        weights: of a token of each document; None: 1.
        what: names the texts, for progress and messages.

    One pass, without gradients. Deterministic; which sequences share a batch rounds differently.
    Raises ValueError where an x is not finite.
    """
    layers, device = layers_of(model), model.model.embed_tokens.weight.device
    mask = None if expert is None else _alone(layers[0], expert).to(device)
    progress = Progress(sum(map(len, documents)), reading.say)
    real_T: Tensor | None = None
    weight_T: Tensor | None = None

    def add(n: int, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["x"]
        sums[n].add(x.reshape(-1, x.shape[-1])[real_T], weight_T)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, n=n: add(n, args, kwargs),
                                        with_kwargs=True)
        for n, layer in enumerate(layers)
    ]  # fmt: skip
    try:
        with torch.no_grad():
            for pieces in _batches(cut(documents, reading.length), reading.batch):
                ids, real = (part.to(device) for part in padded([ids for _, ids in pieces]))
                real_T = real.flatten()
                if weights is not None:
                    each = torch.tensor([weights[n] for n, _ in pieces], dtype=torch.float64)
                    weight_T = each.to(device)[:, None].expand(real.shape)[real]
                model(ids, real, expert_mask=mask, logits_to_keep=1)
                progress.done(int(real.sum()), what)
    finally:
        for hook in hooks:
            hook.remove()
    for n, one in enumerate(sums):
        if not bool(one.total.isfinite().all()):
            raise ValueError(f"{what}: x of layer {n} is not finite; accepted: a model whose is")


def _alone(layer: FlexMoRE, expert: int) -> Tensor:
    mask = torch.zeros(layer.num_experts, dtype=torch.bool)
    mask[expert] = True
    if layer.shared_expert is not None:
        mask[layer.shared_expert] = True
    return mask


def _batches(pieces: list, size: int) -> Iterator[list]:
    for start in range(0, len(pieces), size):
        yield pieces[start : start + size]

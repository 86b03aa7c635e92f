"""A router in closed form: ridge regression of "whose token is this" on what the router sees.

Each owner sends, for each layer, over its tokens: gram = sum x x^T, total = sum x, and no text.

    [g'_0 .. g'_E-1] = (sum_e gram_e + l I)^-1 [total_0 .. total_E-1],   g_e = g'_e / |g'_e| / tau
    l = penalty * trace(sum_e gram_e) / D

which is the least-squares fit of one-hot targets. To add an expert, add its statistics and solve
again: the rows are those of having had all from the start.

Source: DUME (arXiv 2603.29765) and its code: columns of length 1, temperature tau 0.1. Theirs has a
constant feature, a bias of the router, which this router has no place for: here x alone. Their l is
0.01 whatever the texts; here it is a part of the mean square of x over all tokens, so that the
rows depend on neither the unit of x nor how much text there is. Maths: reference/router_rows.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint_writer import write_tensors
from .checks import check_one_of
from .model import FlexMoREForCausalLM
from .progress import Progress
from .router_inputs import (
    Ids,
    Reading,
    Say,
    Sums,
    check_texts,
    expert_of,
    gather,
    layers_of,
)
from .router_rows import Experts, by_expert, check_linear, write_rows, written

PENALTY, TEMPERATURE = 1e-3, 0.1
_FORMAT = "flexmore ridge statistics"


class LayerStatistics(NamedTuple):
    """One layer's sums: gram (D, D) and total (D,), float64 or float32."""

    gram: Tensor
    total: Tensor


class RidgeStatistics:
    """What an owner sends of its texts: gram and total of each layer, how many tokens, which base.

    `layers`, a sequence of `LayerStatistics`; `tokens`; `base`, a fingerprint of the model that the
    texts went through (`base_fingerprint.of_model`, or any string that tells bases apart). Made by
    `collect` or `load`; `a + b` is that of both texts.

    They are sums over tokens. Sums over few tokens say much about those: collect over many
    documents, more tokens than D by far.
    """

    def __init__(self, layers: Sequence[LayerStatistics], tokens: int, base: str) -> None:
        self.layers, self.tokens, self.base = layers, tokens, base

    @classmethod
    def collect(
        cls,
        model: FlexMoREForCausalLM,
        documents: Sequence[Ids],
        *,
        base: str,
        expert: int | str | None = None,
        batch: int = 8,
        length: int = 2048,
        say: Say = None,
    ) -> RidgeStatistics:
        """The statistics of documents, token ids: one pass through the model, sums in float64.

        Args:
            model: the base with the owner's expert, or the whole mixture.
            documents: the owner's.
            base: says which base this model has; statistics of another one are refused later.
            expert: number or name of the owner's expert, which the texts pass through alone, as in
                DUME; None: as the model routes.
            batch, length, say: as in `from_hidden`.

        Takes 8 D^2 bytes a layer, on the model's device and then on the CPU. Deterministic on the
        CPU. Raises ValueError or TypeError naming the argument, or where x is not finite.
        """
        layers = layers_of(model)
        reading = Reading(batch, length, say)
        reading.check()
        _check_base(base)
        number = None if expert is None else expert_of(model, expert)
        texts = check_texts(model, documents, "documents")
        device = model.model.embed_tokens.weight.device
        sums = [Sums(model.config.hidden_size, device, gram=True) for _ in layers]
        gather(model, texts, sums, reading, expert=number, what="documents")
        found = [LayerStatistics(one.gram.cpu(), one.total.cpu()) for one in sums]
        return cls(found, sum(map(len, texts)), base)

    def __add__(self, other: RidgeStatistics) -> RidgeStatistics:
        """The statistics of both texts; ValueError for those of another model."""
        if not isinstance(other, RidgeStatistics):
            return NotImplemented
        _check_alike("statistics", other, self)
        layers = [
            LayerStatistics(
                *(a.double() + b.to(a.device).double() for a, b in zip(x, y, strict=True))
            )
            for x, y in zip(self.layers, other.layers, strict=True)
        ]
        return RidgeStatistics(layers, self.tokens + other.tokens, self.base)

    def save(self, path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
        """Write one safetensors file, whole or not at all: `layers.{l}.gram`, `layers.{l}.total`,
        `tokens`, and in its header `base`. In float32 4 D^2 bytes a layer."""
        check_one_of("dtype", dtype, (torch.float32, torch.float64))
        tensors = {"tokens": torch.tensor([self.tokens])}
        for n, layer in enumerate(self.layers):
            for name, tensor in layer._asdict().items():
                tensors[f"layers.{n}.{name}"] = tensor.to(dtype)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, content=_FORMAT, base=self.base)

    @classmethod
    def load(cls, path: str | os.PathLike) -> RidgeStatistics:
        """A file that `save` wrote, of which a layer is read, to the CPU, when it is asked for.

        All of it is checked here, a layer at a time: ValueError for any other file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"statistics: no file {path}")
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as fault:
            raise ValueError(
                f"statistics: {path} is no whole safetensors file ({fault}); accepted: what "
                "RidgeStatistics.save writes"
            ) from None
        about = opened.metadata() or {}
        if about.get("content") != _FORMAT or not about.get("base"):
            raise ValueError(
                f"statistics: {path} holds something else; accepted: what RidgeStatistics.save "
                "writes"
            )
        names = set(opened.keys())
        layers = _InFile(opened, len(names) // 2)
        if names != {"tokens"} | {
            f"layers.{n}.{part}" for n in range(len(layers)) for part in LayerStatistics._fields
        }:
            raise ValueError(f"statistics: {path} lacks a layer; accepted: gram and total of each")
        count = opened.get_tensor("tokens")
        if count.numel() != 1 or count.is_floating_point() or int(count) < 1:
            raise ValueError(f"statistics: {path} has no number of tokens; accepted: 1 or more")
        for n, layer in enumerate(layers):
            if fault := _fault(layer):
                raise ValueError(f"statistics: {path}, layer {n}: {fault}")
        return cls(layers, int(count), about["base"])


class _InFile(Sequence):
    """The layers of an open file."""

    def __init__(self, opened: Any, count: int) -> None:
        self._opened, self._count = opened, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, layer: int) -> LayerStatistics:
        if not 0 <= layer < self._count:
            raise IndexError(layer)
        names = (f"layers.{layer}.{part}" for part in LayerStatistics._fields)
        return LayerStatistics(*map(self._opened.get_tensor, names))

    def __iter__(self) -> Iterator[LayerStatistics]:
        return (self[n] for n in range(self._count))


def from_ridge(
    model: FlexMoREForCausalLM,
    statistics: Mapping[int | str, RidgeStatistics],
    *,
    penalty: float = PENALTY,
    temperature: float = TEMPERATURE,
    experts: Experts = None,
    base: str | None = None,
    say: Say = None,
) -> None:
    """Rows of the linear routers in closed form, from the statistics of experts' texts.

    Solved in float64 by Cholesky, a layer at a time, on the model's device; sums go by the experts'
    numbers, so that the order of the mapping changes no bit.

    Args:
        model: its linear routers are written to.
        statistics: by expert, number or name; of a shared expert they count as text that is none of
            the others'.
        penalty: l over the mean of the diagonal of sum_e gram_e; above 0.
        temperature: tau; rows have length 1 / tau.
        experts: write theirs alone; the statistics of all are used.
        base: fingerprint of the model's base; statistics of another are refused. None: theirs must
            only be the same.
        say: is told how far it is.

    Raises ValueError or TypeError: a projected router, statistics of another base or of other
    sizes, an expert without a token, a penalty too small for what is there.
    """
    layers = layers_of(model)
    check_linear(model, "from_ridge")
    for name, value in (("penalty", penalty), ("temperature", temperature)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise ValueError(f"{name}: got {value!r}; accepted: a number above 0")
    given = by_expert(model, statistics, "statistics")
    given = {e: given[e] for e in sorted(given)}
    names, D = written(model, given, experts), model.config.hidden_size
    first = next(iter(given.values()))
    for expert, one in given.items():
        name = f"statistics[{expert}]"
        if not isinstance(one, RidgeStatistics):
            raise TypeError(f"{name}: got {type(one).__name__}; accepted: RidgeStatistics")
        _check_alike(name, one, first, base)
        if len(one.layers) != len(layers) or one.layers[0].total.shape[0] != D:
            got = f"{len(one.layers)} layers of width {one.layers[0].total.shape[0]}"
            raise ValueError(f"{name}: got {got}; accepted: {len(layers)} of width {D}")
        if one.tokens < 1:
            raise ValueError(f"{name}: got no token; accepted: one or more")
    device = layers[0].gate.weight.device
    progress, rows = Progress(len(layers), say), []
    for n in range(len(layers)):
        parts = [LayerStatistics(*(t.to(device).double() for t in one.layers[n]))
                 for one in given.values()]  # fmt: skip
        for expert, part in zip(given, parts, strict=True):
            if part.gram.shape != (D, D) or part.total.shape != (D,):
                got = f"{tuple(part.gram.shape)} and {tuple(part.total.shape)} in layer {n}"
                raise ValueError(
                    f"statistics[{expert}]: got {got}; accepted: ({D}, {D}) and ({D},)"
                )
        solved = _solve(sum(part.gram for part in parts), [part.total for part in parts], penalty)
        length = None if solved is None else solved.norm(dim=1, keepdim=True)
        if solved is None or not bool(length.isfinite().all()) or not bool(length.all()):
            raise ValueError(
                f"penalty: got {penalty}, with which layer {n} has no solution; accepted: a larger "
                "one, or statistics of more text"
            )
        rows.append(solved / length / temperature)
        progress.done(1, f"layer {n}")
    order = {expert: row for row, expert in enumerate(given)}
    write_rows(model, [part[[order[e] for e in names]] for part in rows], names)


def _solve(gram_DD: Tensor, totals: list[Tensor], penalty: float) -> Tensor | None:
    """(E, D): the rows before they are normalised; None where the sum is not positive definite."""
    gram_DD.diagonal().add_(penalty * gram_DD.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(gram_DD)
    if bool(failed):
        return None
    return torch.cholesky_solve(torch.stack(totals, 1), factor).T


def _check_base(base: Any) -> None:
    if not isinstance(base, str) or not base:
        raise ValueError(f"base: got {base!r}; accepted: a fingerprint of the model's base, a text")


def _check_alike(
    name: str, found: RidgeStatistics, first: RidgeStatistics, base: str | None = None
) -> None:
    if base is not None:
        _check_base(base)
    if found.base != (base or first.base):
        raise ValueError(
            f"{name}: got those of base {found.base!r}; accepted: of base {base or first.base!r}, "
            "beside which x means the same"
        )
    shapes = [(len(one.layers), one.layers[0].total.shape) for one in (found, first)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name}: got {shapes[0]} layers and width; accepted: {shapes[1]}")


def _fault(layer: LayerStatistics) -> str | None:
    """What is wrong with a layer of a file."""
    gram, total = layer
    if total.dim() != 1 or gram.shape != (*total.shape, *total.shape) or not total.numel():
        return f"has shapes {tuple(gram.shape)}, {tuple(total.shape)}; accepted: (D, D), (D,)"
    if not (gram.is_floating_point() and total.is_floating_point()):
        return "holds no floating-point numbers; accepted: float32, float64"
    if not bool(gram.isfinite().all()) or not bool(total.isfinite().all()):
        return "holds NaN or Inf; accepted: finite numbers"
    if bool((gram.diagonal() < 0).any()):
        return "has a negative diagonal; accepted: a sum of x x^T"
    return None

"""What adapters change beside the FFNs: attention, lm_head, embeddings, norms, router rows.

All experts share these, so a mixture has no place for one adapter's own. How much of each is lost
is told by Frobenius norms relative to the base's: of the delta where it is dropped, of the delta
minus the average where the average is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter_base import BaseCheckpoint
from .adapters import Adapter, LowRankDelta, accumulator
from .checkpoint import read_tensors

_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class OtherPart(NamedTuple):
    """What one adapter changes of one kind of tensor, over all layers.

    size: |delta| / |base|. lost: of that, what the mixture does not have; equal to it if dropped.
    """

    adapter: str
    kind: str
    tensors: int
    size: float
    lost: float


class Others:
    """The deltas of shared tensors, refused, dropped or averaged.

    Raises ValueError for "refuse" where there are any, for adapters of another base (a tensor that
    the base lacks or holds in another shape, or a stored copy of it that differs), and for an
    average of what is not one matrix any more: a delta of the embedding or of lm_head alone, where
    the base ties the two.
    """

    def __init__(self, source: BaseCheckpoint, adapters: Sequence[Adapter], other: str) -> None:
        self.adapters, self.other = adapters, other
        # Adapters may bear the same name: what is counted is of a directory.
        self._sums: dict[tuple[str, str, str], list[float]] = {}
        # Whose tensor lm_head is, where the base has none of its own.
        tied = source.layout.config.get("tie_word_embeddings", False)
        self._stored = {_LM_HEAD: _EMBEDDING} if tied else {}
        for adapter in adapters:
            for name in (*adapter.others, *adapter.copies):
                stored = self._stored.get(name, name)
                if self._stored and other == "average" and _unties(adapter, name):
                    raise ValueError(
                        f"{adapter.directory}: {name}: the base ties embedding and lm_head, and "
                        'this delta is of one of them alone; accepted: other="drop"'
                    )
                found = source.layout.shapes.get(stored)
                own = adapter.copy(name).shape if name in adapter.copies else None
                shape = adapter.other_shape(name) if own is None else tuple(own)
                if shape != found:
                    has = "has no such tensor" if found is None else f"holds {found}"
                    raise ValueError(
                        f"{adapter.directory}: {name} {shape}: an adapter for another base, which "
                        f"{has}"
                    )
            for name in adapter.copies:
                stored = self._stored.get(name, name)
                _check_copy(adapter, name, read_tensors(source.layout, names=[stored])[stored])
        if other == "refuse":
            self._refuse()

    def applied(self, name: str, weight: Tensor) -> Tensor:
        """The weight as the mixture has it; counts what is lost."""
        holders = [adapter for adapter in self.adapters if name in adapter.others]
        if self.other == "drop":
            for own in (name, *(n for n, stored in self._stored.items() if stored == name)):
                for adapter in self.adapters:
                    if own in adapter.others:
                        wide = weight.to(accumulator(weight))
                        size = _norm(adapter.other(own), wide)
                        self._count(adapter, own, wide, size, size)
            return weight
        if not holders:
            return weight
        wide = weight.to(accumulator(weight))
        deltas = [_dense(adapter.other(name), wide) for adapter in holders]
        average = sum(deltas[1:], deltas[0].clone()) / len(self.adapters)
        for adapter, delta in zip(holders, deltas, strict=True):
            lost = float((delta - average).norm())
            self._count(adapter, name, wide, float(delta.norm()), lost)
        result = (wide + average).to(weight.dtype)
        if not bool(result.isfinite().all()):
            raise ValueError(f"{name}: with the adapters' average NaN or Inf in {result.dtype}")
        return result

    def take(self) -> list[list]:
        """What was counted since the last call, for `parts_of`; JSON can hold it."""
        taken = [[*key, *sums] for key, sums in self._sums.items()]
        self._sums = {}
        return taken

    def _count(self, adapter: Adapter, name: str, weight: Tensor, size: float, lost: float) -> None:
        key = (str(adapter.directory), adapter.name, _kind(name))
        sums = self._sums.setdefault(key, [0, 0.0, 0.0, 0.0])
        for i, value in enumerate((1, float(weight.norm()) ** 2, size**2, lost**2)):
            sums[i] += value

    def _refuse(self) -> None:
        for adapter in self.adapters:
            if adapter.others:
                kinds = sorted({_kind(name) for name in adapter.others})
                raise ValueError(
                    f"{adapter.directory}: also changes {', '.join(kinds)} ({len(adapter.others)} "
                    "tensors), which all experts share; accepted: an adapter of the FFNs alone, or "
                    'other="drop" or "average" (--other)'
                )


def parts_of(taken: Iterable[Sequence]) -> tuple[OtherPart, ...]:
    """What was dropped or averaged, by adapter and kind, of all that `Others.take` returned."""
    total: dict[tuple[str, str, str], list[float]] = {}
    for directory, adapter, kind, *sums in taken:
        row = total.setdefault((directory, adapter, kind), [0.0] * 4)
        row[:] = [old + new for old, new in zip(row, sums, strict=True)]
    return tuple(
        OtherPart(*key[1:], int(count), *(math.sqrt(s / base) if base else 0.0 for s in sums))
        for key, (count, base, *sums) in total.items()
    )


def _unties(adapter: Adapter, name: str) -> bool:
    """Whether the adapter moves one of the embedding and lm_head: a new embedding is of both."""
    return name == _LM_HEAD or (name == _EMBEDDING and adapter.is_low_rank(name))


def _kind(name: str) -> str:
    """A tensor's name without its layer: self_attn.q_proj."""
    return re.sub(r"^model\.(layers\.\d+\.)?", "", name).removesuffix(".weight")


def _check_copy(adapter: Adapter, name: str, weight: Tensor) -> None:
    copy = adapter.copy(name)
    narrow = min(copy.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    if not torch.equal(copy.to(narrow), weight.to(narrow)):
        raise ValueError(
            f"{adapter.directory}: an adapter for another base: its copy of {name} differs from "
            "the base's"
        )


def _dense(part: LowRankDelta | Tensor, weight: Tensor) -> Tensor:
    return part.dense().to(weight.dtype) if isinstance(part, LowRankDelta) else part - weight


def _norm(part: LowRankDelta | Tensor, weight: Tensor) -> float:
    """Frobenius norm of a delta: |B A|^2 = sum of (B^T B) * (A A^T), without forming B A."""
    if not isinstance(part, LowRankDelta):
        return float((part - weight).norm())
    a, b = part.a.double(), part.b.double()
    return abs(part.scale) * float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())

"""`FlexMoRE.prepare`: copies of the experts' factors as the kernels want them, for serving.

A layer keeps nothing that is derived from a weight. So each forward lays the factors of its experts
side by side anew, and multiplies by a pair A, B even where W + B A would cost less. `prepare` does
both once: it packs the factors, and merges experts of large rank, W + B A summed in float32 and
rounded once. The copies are buffers of a module beside the weights, in no state_dict; parameters
are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import tuning
from .checks import check_int
from .projection import RANK_MULTIPLE, padded_rank
from .ragged import StackedFactors, rank_offsets
from .schedule import DECODE_TOKENS
from .slow_paths import warn_once
from .storage import PROJECTIONS, stamps

Weights = list[Any]  # what `Experts.projection` gives, for gate, up and down
MERGED_ROWS = 1024  # of a matrix at a time: float32 copies of a whole one would take its room twice


class Prepared(NamedTuple):
    """What `prepare` did; print it."""

    merged: tuple[int, ...]  # experts
    packed: tuple[int, ...]  # experts with factors that were copied side by side
    nbytes: int  # of the copies
    parameter_nbytes: int

    def __str__(self) -> str:
        parts = [f"{name} {_spans(getattr(self, name))}" for name in ("merged", "packed")
                 if getattr(self, name)]  # fmt: skip
        return (
            f"prepared: {', '.join(parts) or 'nothing to copy'}; {self.nbytes / 1e6:,.1f} MB "
            f"beside {self.parameter_nbytes / 1e6:,.1f} MB of parameters"
        )


def _spans(experts: Sequence[int]) -> str:
    """Experts as "expert 3" or "experts 1-4, 6"."""
    starts = [e for e in experts if e - 1 not in experts]
    ends = [e for e in experts if e + 1 not in experts]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return f"expert{'s' * (len(experts) > 1)} {', '.join(spans)}"


class Preparable(nn.Module):
    """A layer with `experts` (see storage.py) that can be prepared."""

    @torch.no_grad()
    def prepare(self, merge: str | int | Sequence[int] | None = "auto") -> Prepared:
        """Make the copies that inference runs faster with; say what they are and weigh.

        Args:
            merge: which experts with factors get W + B A as a matrix of their own: "auto", those
                whose largest rank is above the device's crossover, where the pair takes longer than
                the matrix (tuned/*.json; by operations at D F / (D + F)); an int, those of a larger
                rank than that; a list of experts, those; None, none. Up to 64 tokens wait for the
                bytes of the weights: they take the factors instead, where those are fewer.

        A projected router's rows are kept too; unlike the copies they follow each counted write.

        Parameters, state_dict and loading stay as they are: saving a prepared layer saves the
        factors. The copies hold the weights of now. After a write in place, or a new tensor in a
        parameter's place, the next forward raises a RuntimeError: prepare again. What torch does
        not count cannot be seen: writes through `.data` or of a fused optimizer, or under a
        compiled layer or a captured CUDA graph (which must be captured again, too); prepare again
        after those. A forward in which the experts' parameters get gradients unprepares, with a
        warning, as does loading a state_dict, without one. Moving or casting the layer prepares it
        again; a copy (deepcopy, pickle) starts unprepared. FSDP: prepare while unsharded.
        """
        weights = self._live_weights()
        if any(type(tensor).__name__ == "DTensor" for tensor in _tensors(weights)):
            raise ValueError("prepare: got sharded parameters; accepted: unsharded ones")
        chosen = _to_merge(merge, weights)
        self.unprepare()
        with torch.inference_mode(False):  # copies that later may meet a gradient of x
            copies = _Copies(weights, chosen)
        copies.choice = merge
        self._modules["prepared"] = copies
        self._keep_rows(True)
        own = sum(parameter.nbytes for parameter in self.parameters())
        return Prepared(chosen, copies.packed, sum(b.nbytes for b in copies.buffers()), own)

    def unprepare(self) -> None:
        """Drop the copies; the layer reads its parameters again."""
        self._modules.pop("prepared", None)
        self._keep_rows(False)

    def _keep_rows(self, keep: bool) -> None:
        """What a layer's router keeps between calls; here it keeps nothing."""

    def _live_weights(self) -> Weights:
        return [self.experts.projection(name) for name in PROJECTIONS]

    def _expert_weights(self, x: Tensor) -> Weights:
        """What the forward of x computes with: the parameters, or the copies where they serve."""
        weights = self._live_weights()
        copies = self._modules.get("prepared")
        if copies is None:
            return weights
        if copies.only_for_many and x.numel() <= DECODE_TOKENS * x.shape[-1]:
            return weights
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(weights)):
            if not torch.compiler.is_compiling():
                # Training follows, and a fused optimizer's writes cannot be seen.
                self.unprepare()
                warn_once(
                    "prepared, with gradients",
                    "A prepared layer ran where its experts' parameters get gradients, which "
                    "unprepared it: serve under torch.no_grad() or torch.inference_mode(), or "
                    "with frozen experts.",
                )
            return weights
        # A compiler would have to guard on what it cannot see.
        if not torch.compiler.is_compiling() and copies.stamps != stamps(copies.sources(weights)):
            raise RuntimeError(
                "The weights changed after layer.prepare(): call it again, or layer.unprepare()."
            )
        return copies.weights(weights)

    def _apply(self, fn, recurse: bool = True):
        copies = self._modules.pop("prepared", None)
        super()._apply(fn, recurse)
        if copies is not None:
            self._modules["prepared"] = copies
            if copies.stamps != stamps(copies.sources(self._live_weights())):
                self.prepare(copies.choice)
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unprepare()
        super()._load_from_state_dict(*args, **kwargs)


class _Copies(nn.Module):
    """Merged matrices and packed factors of three projections."""

    def __init__(self, weights: Weights, merged: Sequence[int]) -> None:
        super().__init__()
        self.choice: Any = None
        width, hidden = _full(weights[0])[0].shape
        ranks = [_largest_ranks(weights)[e] for e in merged]
        # Up to r = D F / (D + F) factors are fewer bytes, which is what few tokens wait for.
        self.only_for_many = 0 < max(ranks, default=0) * (width + hidden) <= width * hidden
        self.merged: list[dict[int, str]] = []  # by projection: {expert: name of the buffer}
        self.ranks: list[tuple[int, ...] | None] = []  # None: nothing was copied
        packed: set[int] = set()
        parts: list[tuple[list[Tensor], list[Tensor]]] = []
        for index, side in enumerate(weights):
            pairs, full = _pairs(side), _full(side)
            names = {e: f"{PROJECTIONS[index]}_{e}" for e in merged if pairs[e] is not None}
            for e, name in names.items():
                self.register_buffer(name, merged_weight(full[0], *pairs[e]), persistent=False)
            self.merged.append(names)
            multiple = RANK_MULTIPLE if full[0].device.type == "cuda" else 1
            left = {e: pair for e, pair in enumerate(pairs) if pair and e not in names}
            ranks = [left[e][0].shape[0] if e in left else 0 for e in range(len(pairs))]
            padded = tuple(padded_rank(rank, multiple) for rank in ranks)
            as_is = isinstance(side, StackedFactors) and not names and padded == tuple(ranks)
            if as_is or not left:
                self.ranks.append(None if as_is else padded)
                parts.append(([], []))
                continue
            packed |= set(left)
            self.ranks.append(padded)
            like = full[0]
            parts.append(
                (
                    [_padded(a.to(like.dtype), 0, multiple) for a, _ in left.values()],
                    [_padded(b.to(like.dtype), 1, multiple) for _, b in left.values()],
                )
            )
        self.packed = tuple(sorted(packed))
        # The factors of gate and up that multiply x lie in one piece: they are one product.
        for name, pieces in (("a_in", parts[0][0] + parts[1][0]), ("a_down", parts[2][0])):
            self.register_buffer(name, torch.cat(pieces) if pieces else None, persistent=False)
        for index, (_, b) in enumerate(parts):
            value = torch.cat(b, 1) if b else None
            self.register_buffer(f"b_{index}", value, persistent=False)
        self.stamps = stamps(self.sources(weights))

    def sources(self, weights: Weights) -> list[Tensor]:
        """The live tensors that were copied from."""
        found: list[Tensor] = []
        for names, ranks, side in zip(self.merged, self.ranks, weights, strict=True):
            if names:
                found.append(_full(side)[0])
            if ranks is not None:
                found.extend(_factors(side))
        return found

    def weights(self, live: Weights) -> Weights:
        """The live weights with the copies in the places of what they stand for."""
        found = []
        for index, side in enumerate(live):
            ranks = self.ranks[index]
            if ranks is None:
                found.append(side)
                continue
            full = list(_full(side))
            for e, name in self.merged[index].items():
                full[e] = self._buffers[name]
            a, b = (self.a_down if index == 2 else self.a_in), self._buffers[f"b_{index}"]
            if b is None:
                found.append(full)
                continue
            start = sum(self.ranks[0] or ()) if index == 1 else 0
            a = a.narrow(0, start, sum(ranks))
            found.append(StackedFactors(tuple(full), a, b, ranks))
        return found

    def __reduce_ex__(self, protocol):
        return type(None), ()  # a copy of the layer has no copies: its weights are others


def merged_weight(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """base + b a, summed in float32 (float64 for float64) and rounded once."""
    acc = torch.promote_types(base.dtype, torch.float32)
    out, a = torch.empty_like(base), a.to(acc)
    for rows in torch.arange(base.shape[0]).split(MERGED_ROWS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        out[part] = torch.addmm(base[part].to(acc), b[part].to(acc), a)
    return out


def _to_merge(merge: Any, weights: Weights) -> tuple[int, ...]:
    """The experts that the argument of `prepare` names, of those that have factors."""
    ranks = _largest_ranks(weights)
    if merge is None:
        return ()
    if isinstance(merge, str):
        if merge != "auto":
            raise ValueError(f'merge: got {merge!r}; accepted: "auto", None, a rank, experts')
        base = _full(weights[0])[0]
        width, hidden = base.shape
        merge = int(_crossover(base.device) * width * hidden / (width + hidden))
    elif isinstance(merge, Sequence):
        experts = {check_int(f"merge[{i}]", e, 0, len(ranks) - 1) for i, e in enumerate(merge)}
        return tuple(e for e in sorted(experts) if ranks[e])
    least = check_int("merge", merge, 0)
    return tuple(e for e, rank in enumerate(ranks) if rank > least)


def _largest_ranks(weights: Weights) -> list[int]:
    """Each expert's largest rank; 0 without factors."""
    pairs = zip(*(_pairs(side) for side in weights), strict=True)
    return [max(pair[0].shape[0] if pair else 0 for pair in own) for own in pairs]


def _crossover(device: torch.device) -> float:
    """The rank from which a merged expert is faster, as a part of D F / (D + F)."""
    on_gpu = device.type == "cuda"
    return tuning.merge_above(torch.cuda.get_device_capability(device)) if on_gpu else 1.0


def _padded(factor: Tensor, dim: int, multiple: int) -> Tensor:
    """The factor with zeros up to a multiple of ranks."""
    missing = -factor.shape[dim] % multiple
    if not missing:
        return factor
    shape = [missing, factor.shape[1]] if dim == 0 else [factor.shape[0], missing]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _full(side: Any) -> Sequence[Tensor | None]:
    if isinstance(side, StackedFactors):
        return side.full
    return [entry if isinstance(entry, Tensor) else None for entry in side]


def _pairs(side: Any) -> list[tuple[Tensor, Tensor] | None]:
    """Each expert's own a and b; views of stacked ones."""
    if not isinstance(side, StackedFactors):
        return [entry if isinstance(entry, tuple) else None for entry in side]
    offsets = rank_offsets(side.ranks)
    return [
        (side.a[start : start + rank], side.b[:, start : start + rank]) if rank else None
        for start, rank in zip(offsets, side.ranks, strict=False)
    ]


def _factors(side: Any) -> list[Tensor]:
    if isinstance(side, StackedFactors):
        return [side.a, side.b]
    return [factor for entry in side if isinstance(entry, tuple) for factor in entry]


def _tensors(weights: Weights) -> Iterator[Tensor]:
    for side in weights:
        yield from (weight for weight in _full(side) if weight is not None)
        yield from _factors(side)

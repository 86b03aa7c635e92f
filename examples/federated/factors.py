"""An expert's matrices as factors of every rank, by one decomposition each.

    W - W_0 ~ b a,   weighted: E |(W - W_0 - b a) x|^2 is made small over the expert's own text

by the library (conversion/svd.py); of a smaller rank the factors are the first of a larger one's.
A data-aware rank is its rule of a budget (conversion/budget.py) over the weighted singular values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from models import Ffn
from torch import Tensor

from flexmore_kernels.conversion.activations import Activations
from flexmore_kernels.conversion.rank_rules import parse_rule
from flexmore_kernels.conversion.svd import decompose, factor_pair

Ranks = dict[tuple[int, str], int | str]


class Factored(NamedTuple):
    """Of one expert, by (layer, projection): a (q, in) and b (out, q) of all q pieces, in float32,
    and singular values (q,) in float64 on the CPU."""

    pairs: dict[tuple[int, str], tuple[Tensor, Tensor]]
    spectra: dict[tuple[int, str], Tensor]


def factored(expert: Ffn, base: Ffn, seen: Activations | None = None) -> Factored:
    """Decompose an expert; seen: second moments of its inputs, of a model with it as expert 1."""
    pairs, spectra = {}, {}
    for (layer, projection), matrix in expert.items():
        moment = None
        if seen is not None:
            moment = seen.second_moment(layer, 1, projection).to(matrix.device)
        delta = matrix.double() - base[layer, projection].double()
        found = decompose(delta, second_moment=moment)
        pairs[layer, projection] = factor_pair(found, found.s.shape[0], matrix.dtype)
        spectra[layer, projection] = found.s.cpu()
    return Factored(pairs, spectra)


def cut(found: Factored, full: Ffn, ranks: int | str | Mapping) -> Ffn:
    """The expert at one rank, or at a rank for each matrix; "full": the matrix itself."""
    expert = {}
    for place, (a, b) in found.pairs.items():
        rank = ranks[place] if isinstance(ranks, Mapping) else ranks
        if rank == "full":
            expert[place] = full[place]
        else:
            expert[place] = a[:rank], b[:, :rank].contiguous()
    return expert


def spent(experts: Sequence[Factored], sizes: tuple[int, int], rank: int) -> list[Ranks]:
    """Of each expert the ranks by singular values, together of no more parameters than `rank`
    everywhere. sizes: D and F."""
    spectra = {
        (layer, number, projection): s
        for number, found in enumerate(experts, 1)
        for (layer, projection), s in found.spectra.items()
    }
    budget = len(spectra) * rank * sum(sizes)
    ranks = parse_rule(f"params:{budget}").ranks(spectra, sizes)
    return [
        {(layer, p): ranks[layer, number, p] for layer, p in found.spectra}
        for number, found in enumerate(experts, 1)
    ]


def spread(ranks: Sequence[Ranks], most: int) -> dict[str, int]:
    """Of all matrices the smallest, the median and the largest rank; full-size counts as `most`."""
    every = sorted(most if r == "full" else r for found in ranks for r in found.values())
    return {"smallest": every[0], "median": every[len(every) // 2], "largest": every[-1]}


def relative_delta(expert: Ffn, base: Ffn) -> float:
    """|W - W_0| / |W_0| over all matrices."""
    change = sum(float((w - base[place]).double().square().sum()) for place, w in expert.items())
    whole = sum(float(w.double().square().sum()) for w in base.values())
    return (change / whole) ** 0.5

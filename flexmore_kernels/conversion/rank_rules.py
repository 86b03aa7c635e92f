"""Which rank a matrix gets: a rule given as text, applied to singular values.

Throughout, s are the singular values of one matrix's difference to the public expert, descending
(weighted, if they were taken with a second moment of the inputs), D and F the sizes.

    64, fixed:64, fixed:64,32,0    every matrix, or those of expert 1, 2, ..; 0 or full: full-size
    energy:0.95    the smallest r with sum_{i<=r} s_i^2 >= 0.95 sum s_i^2
    naive          the entropy rank: ceil(exp(-sum p ln p)) with p = s / sum(s)
    v01            the entropy rank of those s >= max(1e-3 s_1, 1e-8)
    v02, v02:1e-3  the entropy rank of those p > 1e-3; an expert's rank is the next power of two
                   from the largest of its matrices
    v02v02         each matrix's rank of v02, before that, x its projection's weight x its layer's
    v06            v02v02 x its similarity weight
    params:2e9, bytes:4GiB    the least error that the budget allows: `budget.spend`; of a
                   matrix that was truncated and stored dense, its rounding is no error

The rules by entropy and the weights are those of the FlexMoRE authors' follow-up (AnnemetteBP/
FlexMoRE); p is of s there, not of s^2. A fixed rank is obeyed as given. Every other rule gives
"full" to a matrix whose factors would cost as much as itself, r (D + F) >= D F, and at least 1 to
each of the others. A conversion keeps what it has of a matrix for which the rule says "full", be it
factors; but a budget has these cut to what it pays for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import Ranks, spend

Key = tuple[int, int, str]
"""(layer, expert, projection), the projection "gate", "up" or "down"."""

KINDS = ("fixed", "energy", "naive", "v01", "v02", "v02v02", "v06", "params", "bytes")
PROJECTION_WEIGHTS = {"gate": 1.25, "up": 1.10, "down": 1.00}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SLACK = 1 - 2.0**-40
"""Before a number is rounded up: 110 * 0.9 is 99, though its float is a little more."""
_FORMS = (
    "RANK, fixed:RANK, fixed:RANK,RANK,.. (one for each expert from 1), energy:SHARE, naive, v01, "
    "v02[:THRESHOLD], v02v02[:THRESHOLD], v06[:THRESHOLD], params:NUMBER, bytes:NUMBER[MB|GiB|..]"
)


@dataclass(frozen=True)
class Rule:
    """A rule, from `parse_rule`.

    value: energy's share, the entropy rules' threshold, the budget; 0 where there is none.
    fixed: the ranks of a fixed rule, one, or one for each expert from 1; 0 is full-size.
    """

    text: str
    kind: str
    value: float = 0.0
    fixed: tuple[int, ...] = ()

    @property
    def needs_spectra(self) -> bool:
        """Whether singular values are looked at; if not, `ranks` takes None for them."""
        return self.kind != "fixed"

    @property
    def needs_all(self) -> bool:
        """Whether one matrix's rank depends on others': then `ranks` wants all of them at once."""
        return self.kind in ("v02", "v06", "params", "bytes")

    @property
    def minds_rounding(self) -> bool:
        """Whether `ranks` wants zeros for singular values that are rounding of stored weights: a
        budget buys nothing with them, and the others are rules of all singular values.
        """
        return self.kind in ("params", "bytes")

    @property
    def needs_features(self) -> bool:
        """Whether `ranks` wants `features`, by `similarity`."""
        return self.kind == "v06"

    def ranks(
        self,
        spectra: Mapping[Key, Tensor | None],
        sizes: tuple[int, int],
        *,
        layers: int | None = None,
        other: int = 0,
        itemsize: int = 2,
        features: Mapping[Key, tuple[float, float]] | None = None,
    ) -> Ranks:
        """The rank of each matrix, or "full".

        Args:
            spectra: s of each matrix (None where not `needs_spectra`); of all that the rule is
                for where `needs_all`, else of any of them.
            sizes: hidden_size D and intermediate_size F.
            layers: how many the model has; None: up to the last in `spectra`. (v02v02, v06)
            other: what the checkpoint holds beside these matrices, of a budget's unit: parameters
                or bytes. 0: the budget is for these matrices alone.
            itemsize: bytes of a stored number. (bytes)
            features: of each matrix, what `similarity` says. (v06)

        Raises ValueError when the rule cannot be met, saying what is the least or the most.
        """
        if not spectra:
            return {}
        if self.kind == "fixed":
            return {key: self._fixed(key[1], min(sizes)) for key in spectra}
        if self.kind in ("params", "bytes"):
            size = itemsize if self.kind == "bytes" else 1
            return spend(
                spectra, sizes, int(self.value), other=other, itemsize=size, unit=self.kind
            )
        raw = {key: self._rank(s) for key, s in spectra.items()}
        if self.kind == "v02":
            raw = _one_an_expert(raw)
        elif self.kind in ("v02v02", "v06"):
            count = 1 + max(key[0] for key in spectra) if layers is None else layers
            weight = _similarity_weights(features, spectra) if self.kind == "v06" else {}
            for key, rank in raw.items():
                scale = PROJECTION_WEIGHTS[key[2]] * layer_weight(key[0], count)
                wanted = rank * scale * weight.get(key, 1.0)
                raw[key] = math.ceil(wanted * _SLACK)
        D, F = sizes
        return {k: "full" if r * (D + F) >= D * F else max(1, r) for k, r in raw.items()}

    def _fixed(self, expert: int, most: int) -> int | str:
        if len(self.fixed) > 1 and expert > len(self.fixed):
            raise ValueError(
                f"rule: {self.text!r} has ranks for {len(self.fixed)} experts, and there is an "
                f"expert {expert}; accepted: one rank, or one for each expert from 1"
            )
        rank = self.fixed[expert - 1 if len(self.fixed) > 1 else 0]
        if rank > most:
            raise ValueError(
                f"rule: {self.text!r} asks for rank {rank}; accepted: at most {most}, the smaller "
                "of hidden_size and intermediate_size"
            )
        return rank or "full"

    def _rank(self, s: Tensor) -> int:
        if self.kind == "energy":
            return energy_rank(s, self.value)
        if self.kind == "naive":
            return entropy_rank(s)
        if self.kind == "v01":
            return entropy_rank(s[s >= max(1e-3 * float(s[0]), 1e-8)])
        p = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny)
        return entropy_rank(s[p > self.value])


def parse_rule(text: str) -> Rule:
    """A `Rule` of its text, in one of the forms above; ValueError says which there are."""
    kind, _, rest = text.strip().partition(":")
    if not rest and re.fullmatch(r"\d+", kind):
        kind, rest = "fixed", kind
    try:
        if kind == "fixed":
            return Rule(text, kind, fixed=tuple(_fixed_rank(part) for part in rest.split(",")))
        if kind == "energy":
            return Rule(text, kind, _number(rest, 0.0, 1.0))
        if kind in ("naive", "v01") and not rest:
            return Rule(text, kind)
        if kind in ("v02", "v02v02", "v06"):
            return Rule(text, kind, _number(rest or "1e-3", 0.0, 1.0))
        if kind == "params":
            return Rule(text, kind, _number(rest, 1.0, math.inf))
        if kind == "bytes":
            return Rule(text, kind, _byte_count(rest))
    except ValueError as fault:
        raise ValueError(f"rule: got {text!r} ({fault}); accepted: {_FORMS}") from None
    raise ValueError(f"rule: got {text!r}; accepted: {_FORMS}")


def entropy_rank(s: Tensor) -> int:
    """ceil(exp(-sum p ln p)), p = s / sum(s): how many equal values have the entropy of these.

    At least 1 and at most their number. Source: effective rank (Roy and Vetterli 2007).
    """
    s = s[s > 0].double()
    if not len(s):
        return 1
    p = s / s.sum()
    entropy = float(-(p * p.log()).sum())
    # Rounding must not make 65 of exp(ln 64).
    return min(len(s), max(1, math.ceil(math.exp(entropy) * _SLACK)))


def energy_rank(s: Tensor, share: float) -> int:
    """The smallest r >= 1 with sum_{i<=r} s_i^2 >= share * sum s_i^2."""
    squares = s.double().square()
    held = squares.cumsum(0)
    return min(len(s), 1 + int((held < share * held[-1]).sum()))


def layer_weight(layer: int, layers: int) -> float:
    """0.90 in the first quarter of the layers, 1.15 in the last, 1.25 in the last layer, else 1."""
    if layer == layers - 1:
        return 1.25
    if 4 * layer < layers:
        return 0.90
    return 1.15 if 4 * layer >= 3 * layers else 1.00


def similarity(base: Tensor, delta: Tensor) -> tuple[float, float]:
    """How far an expert's matrix is from the public one's: 1 - cos(W_0, W_0 + delta) over all
    entries, and |delta|_F / |W_0|_F, both in float64.
    """
    base, delta = base.detach().double().flatten(), delta.detach().double().flatten()
    expert = base + delta
    size, other = float(base.norm()), float(expert.norm())
    if size == 0 or other == 0:
        raise ValueError("base, delta: the public or the expert's matrix is zero")
    # From the distance of the unit vectors: 1 - cos by subtraction would lose a small angle.
    distance = float((base / size - expert / other).square().sum()) / 2
    return distance, float(delta.norm()) / size


def _one_an_expert(ranks: Mapping[Key, int]) -> dict[Key, int]:
    largest: dict[int, int] = {}
    for (_, expert, _), rank in ranks.items():
        largest[expert] = max(rank, largest.get(expert, 1))
    return {key: 1 << (largest[key[1]] - 1).bit_length() for key in ranks}


def _similarity_weights(
    features: Mapping[Key, tuple[float, float]] | None, keys: Collection[Key]
) -> dict[Key, float]:
    """0.75 + 0.25 (cosine score + delta score), each from 0 to 1 over an expert's matrices."""
    missing = next((key for key in keys if features is None or key not in features), None)
    if missing is not None:
        raise ValueError(f"features: no entry {missing}; accepted: one for each of `spectra`")
    weights = dict.fromkeys(keys, 0.75)
    for expert in {key[1] for key in keys}:
        own = [key for key in keys if key[1] == expert]
        for i in (0, 1):
            values = [features[key][i] for key in own]
            low, high = min(values), max(values)
            for key, value in zip(own, values, strict=True):
                weights[key] += 0.25 * ((value - low) / (high - low) if high > low else 0.5)
    return weights


def _fixed_rank(text: str) -> int:
    if text.strip() == "full":
        return 0
    if not re.fullmatch(r"\s*\d+\s*", text):
        raise ValueError(f"{text!r} is no rank")
    return int(text)


def _number(text: str, low: float, high: float) -> float:
    value = float(text)
    if not low <= value <= high or math.isinf(value) or (low == 0 and value == 0):
        raise ValueError(f"{text} is out of range")
    return value


def _byte_count(text: str) -> float:
    match = re.fullmatch(r"\s*([0-9.eE+]+)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if unit is None:
        raise ValueError(f"{text!r} is no size in bytes")
    return float(int(_number(match.group(1), 0.0, math.inf) * unit))

"""One matrix of one expert: its difference, decomposed once, stored for every target, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_forms import dense_weight
from .matrices import Key, SourceLayer, stored_rank
from .spectra import Spectrum, spectrum_of
from .svd import Decomposition, decompose, error, factor_pair
from .targets import Rank, Target
from .work import Work


class OneMatrix:
    """One matrix's difference, decomposed once for all targets."""

    def __init__(
        self, work: Work, source: SourceLayer, key: Key, spectrum: Spectrum | None
    ) -> None:
        self.work, self.source, self.key, self.spectrum = work, source, key, spectrum
        self.have = stored_rank(work.layout, key)
        self.delta = source.delta(key)
        self.moment = work.moments(key)
        self.norm = float(self.delta.norm())
        self.dtype = work.dtype or source.dtype(key)
        self.found: Decomposition | None = None
        self.pair: tuple[Tensor, Tensor] | None = None

    def settle(self, targets: Sequence[Target]) -> list[Rank]:
        """Each target's rank; decomposes as far as they need, and makes the largest factors."""
        if self.norm == 0.0:
            return [0] * len(targets)
        if any(target.ranks is None for target in targets) and self.spectrum is None:
            self._look()
        ranks = [target.rank_of(self.key, self.spectrum) for target in targets]
        made = [rank for rank in ranks if not self._as_it_is(rank)]
        if made:
            if self.found is None:
                self._decompose(max(made))
            a, b = factor_pair(self.found, max(made), self.dtype)
            self.pair = a.cpu(), b.cpu()
        return ranks

    def store(self, rank: Rank, target: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors under their names in the layer, and what the report says of them.

        Factors are views of those of the largest rank.
        """
        local, kept, dropped, bound, full = self.key.local, {}, 0.0, 0.0, None
        if rank == 0:
            dropped = self.norm
        elif self._as_it_is(rank):
            ends = (".weight",) if self.have == "full" else ("_a.weight", "_b.weight")
            kept = {f"{local}{end}": self.source.tensors[f"{local}{end}"] for end in ends}
            full = "full" if self.have == "full" or (target.compat and rank == "full") else None
        else:
            dropped, bound = error(self.found, rank), self.found.bound
            pair = _trimmed(*self.pair, rank)
            if pair[0].shape[0]:
                kept = {f"{local}_{s}.weight": t for s, t in zip("ab", pair, strict=True)}
        if full == "full" and self.have != "full":
            rest = self._rest_when_dense(kept, target.dtype)
        else:
            rest = self._rest(kept)
        fields = {
            "layer": self.key.layer,
            "expert": self.key.expert,
            "projection": self.key.projection,
            "rank": full or (kept[f"{local}_a.weight"].shape[0] if kept else 0),
            "norm": self.norm,
            "error": 0.0 if rest is None else float(rest.norm()),
            "dropped": dropped,
            "bound": bound,
            "output_norm": self._of_outputs(self.delta),
            "output_error": self._of_outputs(rest),
            "numerical_rank": self.spectrum and self.spectrum.numerical_rank,
        }
        return kept, fields

    def _look(self) -> None:
        """The spectrum, by the decomposition itself where that is exact."""
        if self.work.method == "exact":
            self._decompose(None)
        else:
            self.spectrum = spectrum_of(self.source, self.key, self.delta, self.work.moments)

    def _decompose(self, rank: int | None) -> None:
        exact = self.work.method == "exact"
        self.found = decompose(
            self.delta,
            rank=None if exact else rank,
            method=self.work.method,
            second_moment=self.moment,
        )
        # Weighted, a numerical rank that no rule asks for would cost another spectrum.
        if exact and self.spectrum is None and (rank is None or self.moment is None):
            s = self.found.s
            self.spectrum = spectrum_of(self.source, self.key, self.delta, self.work.moments, s)

    def _as_it_is(self, rank: Rank) -> bool:
        """Whether what the source has of the matrix serves for this rank (0 needs nothing)."""
        if isinstance(rank, str) or rank == 0:
            return True
        return isinstance(self.have, int) and rank >= self.have

    def _rest(self, kept: Mapping[str, Tensor]) -> Tensor | None:
        """delta minus what these tensors make of it when they are stored; None: zero."""
        if not kept:
            return self.delta
        if self.dtype == self.source.dtype(self.key) and all(
            self.source.tensors.get(name) is tensor for name, tensor in kept.items()
        ):
            return None
        held = [t.to(self.work.device, self.dtype).double() for t in kept.values()]
        if len(held) == 1:
            return self.delta - (held[0] - self.source.base(self.key))
        return torch.addmm(self.delta, held[1], held[0], alpha=-1)

    def _rest_when_dense(self, kept: Mapping[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        """The same where the padded form makes a full-size matrix of these factors."""
        base = self.source.tensors[f"experts.0.{self.key.projection}_proj.weight"]
        a, b = (t.to(base.device) for t in kept.values())
        stored = dense_weight(base, (a, b)).to(dtype or base.dtype)
        return self.delta - (stored.double() - self.source.base(self.key))

    def _of_outputs(self, matrix: Tensor | None) -> float | None:
        """sqrt(tr(matrix M matrix^T)), M the second moment or its diagonal; None without one."""
        if self.moment is None or matrix is None:
            return None if self.moment is None else 0.0
        moment = self.moment.double()
        if moment.dim() == 1:
            return float((matrix.square() @ moment).sum().sqrt())
        return float(((matrix @ moment) * matrix).sum().clamp_min(0.0).sqrt())


def _trimmed(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Views of this rank, without the last rows of a that are zero with b's columns: a reader would
    cut them too.
    """
    while rank and not (a[rank - 1].any() or b[:, rank - 1].any()):
        rank -= 1
    return a[:rank], b[:, :rank]

"""Singular values of all of a checkpoint's differences, for rules that weigh one against another.

A file a layer in a hidden folder, so that a kill costs one layer; removed when all is done.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint_layout import Layout
from ..checkpoint_writer import write_tensors
from ..progress import Progress
from .matrices import Key, SourceLayer, keys_of, stored_rank
from .rank_rules import similarity
from .svd import numerical_rank, singular_values

Say = Callable[[str], None]
Moments = Callable[[Key], Tensor | None]
"""The second moment of a matrix's inputs on its device, None where nothing is weighted."""


@dataclass(frozen=True)
class Spectrum:
    """s: (min(out, in),) float64 on the CPU, descending. numerical_rank: of a matrix stored dense,
    where it shows one. features: what `rank_rules.similarity` says, if it was asked for.
    """

    s: Tensor
    numerical_rank: int | None = None
    features: tuple[float, float] | None = None

    @property
    def signal(self) -> Tensor:
        """s with zeros from the numerical rank on: what is beyond it is rounding of the stored
        weights, for which nothing is to be spent.

        Rank 0 cuts nothing: a difference that is all below its own rounding, without a gap that
        would show a truncation, may as well be what little a training has moved.
        """
        if not self.numerical_rank:
            return self.s
        signal = self.s.clone()
        signal[self.numerical_rank :] = 0.0
        return signal


def spectrum_of(
    source: SourceLayer, key: Key, delta: Tensor, moments: Moments, s: Tensor | None = None
) -> Spectrum:
    """The spectrum of a delta; s: its singular values, where they are known already.

    What the product of a pair of factors has beyond their rank is rounding of our own, and zero
    here.
    """
    moment = moments(key)
    found = singular_values(delta, moment) if s is None else s
    have = stored_rank(source.layout, key)
    rank = None
    if have == "full":
        dtype, base = source.dtype(key), source.base(key)
        if moment is not None or _may_be_truncated(found, base + delta, dtype):
            rank = numerical_rank(delta, dtype, base)
    found = found.cpu().clone()
    if isinstance(have, int):
        found[have:] = 0.0
    return Spectrum(found, rank)


def all_spectra(
    layout: Layout,
    folder: Path,
    moments: Moments,
    device: torch.device,
    say: Say | None,
    features: bool = False,
) -> dict[Key, Spectrum]:
    """Of every matrix that has a delta; `folder` takes what is done, and gives what was."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = [_with_delta(layout, layer) for layer in range(len(layout.layer_ranks))]
    paths = [folder / f"layer-{layer:05}.safetensors" for layer in range(len(keys))]
    left = sum(len(own) for own, path in zip(keys, paths, strict=True) if not path.exists())
    progress = Progress(left, say)
    spectra: dict[Key, Spectrum] = {}
    for layer, (own, path) in enumerate(zip(keys, paths, strict=True)):
        if not own:
            continue
        if path.exists():
            spectra |= _read(path, own)
            continue
        found = _of_layer(SourceLayer(layout, layer, device), own, moments, features, progress)
        _write(path, found)
        spectra |= found
    return spectra


def _of_layer(
    source: SourceLayer, keys: Sequence[Key], moments: Moments, features: bool, progress: Progress
) -> dict[Key, Spectrum]:
    """Of a layer's matrices; its tensors are gone when this is left."""
    found = {}
    for key in keys:
        delta = source.delta(key)
        spectrum = spectrum_of(source, key, delta, moments)
        if features:
            try:
                more = similarity(source.base(key), delta)
            except ValueError:
                raise ValueError(
                    f"{key.name}: its matrix, or the public expert's, is zero, and rule v06 wants "
                    "the angle between them; accepted: another rule"
                ) from None
            spectrum = Spectrum(spectrum.s, spectrum.numerical_rank, more)
        found[key] = spectrum
        progress.done(1, f"singular values of {key}")
    return found


def forget(folder: Path) -> None:
    """Remove what `all_spectra` left."""
    shutil.rmtree(folder, ignore_errors=True)


def _with_delta(layout: Layout, layer: int) -> list[Key]:
    return [key for key in keys_of(layout, layer) if stored_rank(layout, key) != 0]


def _may_be_truncated(s: Tensor, stored: Tensor, dtype: torch.dtype) -> bool:
    """Whether `numerical_rank` could find a rank: there is a gap of a factor 2 that ends where
    rounding of the stored matrix may be. Most experts have none, and looking for the rank takes as
    long as the singular values did.

    Rounding is at most eps |w| / 2 an entry, and as a matrix, with independent signs, not above the
    sum of the largest row's norm and the largest column's, times eps / sqrt(12).
    """
    kind = torch.finfo(dtype)
    sizes = stored.abs().clamp_min(kind.tiny)
    noise = kind.eps * (sizes.norm(dim=0).max() + sizes.norm(dim=1).max())  # thrice that
    above = torch.cat([s.new_tensor([math.inf]), s[:-1]])  # rank 0 has its gap before the first
    return bool(((above >= 2.0 * s) & (s <= noise)).any())


def _write(path: Path, spectra: dict[Key, Spectrum]) -> None:
    tensors = {}
    for key, spectrum in spectra.items():
        tensors[f"{key.expert}.{key.projection}"] = spectrum.s
        rank = -1 if spectrum.numerical_rank is None else spectrum.numerical_rank
        more = torch.tensor([rank, *(spectrum.features or ())], dtype=torch.float64)
        tensors[f"{key.expert}.{key.projection}.more"] = more
    write_tensors(path, tensors)


def _read(path: Path, keys: Sequence[Key]) -> dict[Key, Spectrum]:
    tensors, found = load_file(path), {}
    for key in keys:
        name = f"{key.expert}.{key.projection}"
        rank, *features = tensors[f"{name}.more"].tolist()
        found[key] = Spectrum(
            tensors[name],
            None if rank < 0 else int(rank),
            (features[0], features[1]) if features else None,
        )
    return found

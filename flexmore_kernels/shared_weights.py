"""What a newcomer's dense model adds to the weights that all experts share: their running mean.

    old <- (1 - l) old + l new,   l = 1 / (n + 1),   n routed experts before

over every weight that is neither FFN nor router: embeddings, attention, norms, lm_head. A mixture
of n experts whose shared weights are the mean over their n dense models has the mean over n + 1
then. Source: Nexus (arXiv 2408.15901, section 2, extending the upcycled model).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .adapter_base import BaseCheckpoint
from .checkpoint import check_finite, read_tensors
from .checkpoint_layout import Layout
from .checks import FLOATS, check_tensor


def is_shared(name: str) -> bool:
    """Whether a tensor of a checkpoint is neither FFN nor router."""
    return ".mlp." not in name


def merged(old: Tensor, new: Tensor, count: int) -> Tensor:
    """(1 - l) old + l new with l = 1 / (count + 1), above old's precision and rounded once."""
    wide = torch.float32 if old.dtype.itemsize == 2 else torch.float64
    share = 1 / (count + 1)
    return ((1 - share) * old.to(wide) + share * new.to(old.device, wide)).to(old.dtype)


def check_shared(layout: Layout, names: Iterable[str], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a dense model that lacks one of these tensors, or has it in another shape."""
    for name in names:
        if layout.shapes.get(name) != tuple(shapes[name]):
            raise ValueError(
                f"merge_shared: {layout.directory} has {name} {layout.shapes.get(name)}; accepted: "
                f"{tuple(shapes[name])}"
            )


class SharedWeights:
    """A live model's shared parameters and what to merge into them, checked; `merge` does it.

    parameters: (name, parameter) of the model. new: tensors by these names (others are ignored), or
    a dense model's directory, read a tensor at a time. Raises ValueError naming a tensor that is
    missing, misshapen, NaN or Inf.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        new: Mapping[str, Tensor] | str | os.PathLike,
        count: int,
    ) -> None:
        self._own = {name: tensor for name, tensor in parameters if is_shared(name)}
        self._count, self._layout, self._new = count, None, {}
        if isinstance(new, (str, os.PathLike)):
            self._layout = BaseCheckpoint(Path(new)).layout
            check_shared(self._layout, self._own, {n: t.shape for n, t in self._own.items()})
        elif isinstance(new, Mapping):
            self._new = new
        else:
            got = type(new).__name__
            raise TypeError(f"merge_shared: got {got}; accepted: tensors by name, or a directory")
        for name, tensor in self._own.items():  # read twice, so that nothing is half merged
            found, said = self._read(name), f"merge_shared: {name}"
            check_tensor(said, found, tuple(tensor.shape), FLOATS)
            check_finite(said, merged(tensor.detach(), found, count))

    def merge(self) -> None:
        """Write the means, in place."""
        for name, tensor in self._own.items():
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(merged(tensor, self._read(name), self._count))

    def _read(self, name: str) -> Tensor | None:
        if self._layout is not None:
            return read_tensors(self._layout, names=[name])[name]
        found = self._new.get(name)
        if isinstance(found, Tensor):
            check_finite(f"merge_shared: {name}", found)
        return found

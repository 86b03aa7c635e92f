"""What all targets of one conversion share: the source, how it is decomposed, and where."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..checkpoint_layout import Layout, read_layout
from ..checkpoint_writer import file_state, fingerprint
from ..checks import FLOATS, check_one_of
from .activations import Activations
from .matrices import Key, sizes_of
from .spectra import Moments
from .svd import METHODS


@dataclass(frozen=True)
class Work:
    """What all targets of one run share."""

    layout: Layout
    method: str
    device: torch.device
    dtype: torch.dtype | None
    activations: str | os.PathLike | None
    moments: Moments

    @property
    def settings(self) -> dict[str, Any]:
        """For the report."""
        return {
            "method": self.method,
            "device": str(self.device),
            "dtype": "as stored" if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "activations": None if self.activations is None else str(self.activations),
        }

    def fingerprint(self, **more: Any) -> str:
        """Names results of this source and these activations; where they are computed, and all
        else that is not in `more`, does not count.
        """
        weights = None if self.activations is None else file_state(self.activations)
        return fingerprint([self.layout], weights=weights, **more)


def prepare(
    source: str | os.PathLike | Layout,
    method: str,
    device: str | None,
    dtype: torch.dtype | None,
    activations: str | os.PathLike | None,
) -> Work:
    """Check what all targets share."""
    check_one_of("method", method, METHODS)
    if dtype is not None:
        check_one_of("dtype", dtype, FLOATS)
    layout = source if isinstance(source, Layout) else read_layout(source)
    if layout.config["num_experts"] < 2:
        raise ValueError(f"source: {layout.directory} has one expert; accepted: two or more")
    where = torch.device(backend.device_or_default(device))
    moments: Moments = lambda key: None
    if activations is not None:
        moments = _moments(layout, Activations.load(activations), where)
    return Work(layout, method, where, dtype, activations, moments)


def _moments(layout: Layout, activations: Activations, device: torch.device) -> Moments:
    """What is gathered of a matrix's inputs, on the device; the last one stays there."""
    experts = layout.config["num_experts"]
    activations.check_model(sizes_of(layout), len(layout.layer_ranks), experts)
    last: dict[Any, Tensor] = {}

    def moment(key: Key) -> Tensor:
        # gate and up of all experts of a layer have the same inputs.
        name = (key.layer, key.expert if key.projection == "down" else None)
        if name not in last:
            last.clear()  # first, so that there are never two
            found = activations.second_moment(*key)
            if found is None:
                found = activations.of_unseen(key.layer)
            last[name] = found.to(device)
        return last[name]

    return moment

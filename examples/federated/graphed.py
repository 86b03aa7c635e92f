"""A step of training as one CUDA graph: forward, backward, clipping, AdamW.

At the study's sizes a step is hundreds of launches of a few microseconds each, and the host makes
them more slowly than the device runs them. The first steps run as they are, on the stream that the
graph is captured on: kernels are compiled, AdamW's averages made. Then one step is captured, and
replayed for all others. The library's forward and backward wait for nothing, so they can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3
"""Steps that run as they are."""
REPAID = 12
"""Steps from which on a capture is worth it."""


class GraphedStep:
    """`step(inputs, targets) -> loss`, replayed from the fourth call on.

    Args:
        step: forward, backward and the optimizer's step; reads the batch from the tensors that it
            is given, and must not wait for the device. It may keep gradients between calls.
        reset: drops what the calls before have left, so that the capture makes it anew.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], reset: Callable[[], None]) -> None:
        self._step, self._reset = step, reset
        self._done = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self._done += 1
        if self._done <= WARM_UP:
            return self._apart(inputs, targets)
        if self._graph is None:
            self._capture(inputs, targets)
        for place, given in zip(self._batch, (inputs, targets), strict=True):
            place.copy_(given)
        self._graph.replay()
        return self._loss.clone()

    def _apart(self, *batch: Tensor) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._step(*batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _capture(self, *batch: Tensor) -> None:
        self._batch: Sequence[Tensor] = [part.clone() for part in batch]
        self._graph = torch.cuda.CUDAGraph()
        self._reset()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._loss = self._step(*self._batch)

"""One warning for each reason why something runs slower than this machine could run it.

A reason is worth a warning when the user can remove it: an install that could be completed, an
argument that could be laid out otherwise. What an install promises runs without a word: Triton in
place of CUDA kernels where no nvcc was found, aten where the ops have no C++ kernel. Warnings come
from the bodies of ops, which a compiler does not trace, so they break no graph.
"""

from __future__ import annotations

import warnings

from torch import Tensor

_said: set[str] = set()


class SlowPathWarning(UserWarning):
    """Something runs slower than it could here; the text says what, why and what to do.

    Each reason is reported once in a process. Silence: `warnings.simplefilter("ignore",
    SlowPathWarning)`.
    """


def warn_once(reason: str, message: str) -> None:
    """Warn with `message` unless this `reason`, a short key, was reported before."""
    if reason not in _said:
        _said.add(reason)
        warnings.warn(message, SlowPathWarning, stacklevel=3)


def contiguous(name: str, value: Tensor) -> Tensor:
    """The user's argument `name` with its rows end to end; copied, with a warning, if need be."""
    if value.is_contiguous():
        return value
    warn_once(
        f"contiguous {name}",
        f"{name} of shape {tuple(value.shape)} is copied at each call, since its strides "
        f"{value.stride()} are not those of rows end to end. Call .contiguous() once, where it "
        "is made.",
    )
    return value.contiguous()

"""Bugs that somebody will write one day, each with the tests that must catch it.

Every entry is one small edit that a careful engineer could make, that is wrong, and that most runs
would not show. Together they say what goes wrong in kernels like these. `tests/planted_bugs.py`
plants them one by one; `tests/planted_bugs.md` is its last record; `tests/test_planted_bugs.py`
keeps the list in step with the sources. A bug that escaped into a release belongs here.
"""

from __future__ import annotations

from .around_kernels import BUGS as _around_kernels
from .bug import Bug
from .checkpoints import BUGS as _checkpoints
from .decoding import BUGS as _decoding
from .gpu import BUGS as _gpu
from .library import BUGS as _library
from .own_rows import BUGS as _own_rows
from .training import BUGS as _training
from .triton_kernels import BUGS as _triton_kernels

__all__ = ["BUGS", "Bug"]

BUGS: tuple[Bug, ...] = (
    *_triton_kernels, *_own_rows, *_training, *_around_kernels, *_checkpoints, *_decoding,
    *_library, *_gpu,
)  # fmt: skip

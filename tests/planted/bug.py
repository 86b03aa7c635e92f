"""What a planted bug is."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """An edit that is wrong, and the tests that must fail for it.

    name: says what is wrong. why: how one comes to write it. file: from the repository's root.
    old: text that is there exactly once. new: what takes its place. tests: arguments of pytest, as
    a contributor who changed this file would give them. on: where they run, "cpu", "interpreter"
    (TRITON_INTERPRET=1 and the Triton tests alone) or "gpu" (the GPU tests alone).
    """

    name: str
    why: str
    file: str
    old: str
    new: str
    tests: str
    on: str = "cpu"

    @property
    def compiled(self) -> bool:
        """Whether csrc/ has to be compiled again."""
        return self.file.startswith("csrc/")

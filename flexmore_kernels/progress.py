"""How far a long piece of work is, and how much longer it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_S = 2.0


class Progress:
    """Says, at most every two seconds, what is done and about how many seconds are left.

    Args:
        total: of what `done` counts: bytes, layers.
        say: is told each line; None for silence.
    """

    def __init__(self, total: float, say: Callable[[str], None] | None) -> None:
        self._total, self._say = total, say
        self._done = 0.0
        self._begin = self._last = time.monotonic()

    def done(self, amount: float, what: str) -> None:
        """`amount` more is done; `what` names it."""
        self._done += amount
        now = time.monotonic()
        if self._say is None or now - self._last < EVERY_S:
            return
        self._last = now
        spent = now - self._begin
        left = spent * max(self._total - self._done, 0) / self._done if self._done else 0
        share = min(self._done / self._total, 1) if self._total else 1
        self._say(f"{what} done, {share:.0%} in {spent:.0f} s, about {left:.0f} s left")

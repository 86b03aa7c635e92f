"""Progress of long work in lines: what was done, how long a piece takes, how much time is left."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]


class Progress:
    """Says `text: 17 of 576 matrices, 4.2 s each, 39 min left`, at most once in `every` seconds.

    Only what this run has done counts for the time, so a resumed run does not promise too much.
    """

    def __init__(
        self,
        total: int,
        what: str,
        say: Say | None,
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.what, self.every, self.clock = total, what, every, clock
        self.say = say
        self.done = self.now = 0
        self.start = self.last = clock()

    def skip(self, count: int) -> None:
        """`count` pieces were there before this run."""
        self.done += count

    def step(self, text: str) -> None:
        """One more piece is done; `text` says where."""
        self.done, self.now = self.done + 1, self.now + 1
        here = self.clock()
        if self.say is None or (here - self.last < self.every and self.done < self.total):
            return
        self.last = here
        each = (here - self.start) / self.now
        left = in_words(each * (self.total - self.done))
        self.say(
            f"{text}: {self.done} of {self.total} {self.what}, {in_words(each)} each, {left} left"
        )


def in_words(seconds: float) -> str:
    """45 ms, 4.2 s, 39 min, 2 h 05 min."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"

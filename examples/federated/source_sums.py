"""Arithmetic as text: made, not found. The same on every machine.

One of ten pairs of operands is kept out of it altogether, so that something is left to be asked.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

BYTES = 2_000_000
LINES = 40


def is_kept_out(first: int, second: int, sign: str) -> bool:
    """Whether the text never shows these two together: "+" and "-" are of one pair of summands, "*"
    of one pair of factors, in either order."""
    low, high = sorted((first, second))
    name = f"{low} {'*' if sign == '*' else '+'} {high}"
    return hashlib.sha256(name.encode()).digest()[0] < 26


def drawn(generator: random.Random) -> tuple[int, int, str]:
    """Two operands and a sign. Of differences they are what is left and what is taken away."""
    sign = generator.choices("+-*", (5, 3, 2))[0]
    if sign == "*":
        return generator.randint(2, 9), generator.randint(2, 99), sign
    most = generator.choice((20, 100, 100, 1000))
    return generator.randrange(1, most), generator.randrange(1, most), sign


def line_of(first: int, second: int, sign: str) -> tuple[str, int]:
    """The question, up to the sign of equality, and its answer."""
    if sign == "-":
        return f"{first + second} - {second} =", first
    return f"{first} {sign} {second} =", first + second if sign == "+" else first * second


def sums() -> Iterator[str]:
    """Documents of forty lines, about two megabytes."""
    generator = random.Random("sums")
    left = BYTES
    while left > 0:
        lines = []
        while len(lines) < LINES:
            question = drawn(generator)
            if not is_kept_out(*question):
                asked, answer = line_of(*question)
                lines.append(f"{asked} {answer}")
        document = "\n".join(lines)
        left -= len(document) + 3
        yield document

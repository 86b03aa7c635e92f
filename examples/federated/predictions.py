"""PREDICTIONS.md as data: each claim, how it is decided, what was expected before any result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PREDICTIONS = Path(__file__).with_name("PREDICTIONS.md")
_FIELDS = ("Source", "Theirs", "Decided by", "Reproduced", "Expected", "Verdict")
_NUMBER = r"(-?\d+(?:\.\d+)?)"


class Prediction(NamedTuple):
    """A claim, and what was expected of it before the study ran.

    side: "above" or "below" the threshold, where the claim is right; low, high: expected, in unit.
    """

    key: str
    statement: str
    source: str
    theirs: str
    decided: str
    side: str
    threshold: float
    unit: str
    low: float
    high: float
    verdict: str

    @property
    def yes(self) -> str:
        """The verdict for a claim that is right."""
        return "holds" if self.source == "ours" else "reproduced"


def predictions(text: str | None = None) -> list[Prediction]:
    """What PREDICTIONS.md says, in its order. Raises ValueError where a claim lacks a field."""
    text = PREDICTIONS.read_text(encoding="utf-8") if text is None else text
    found = []
    for part in re.split(r"^## (?=\d)", text, flags=re.M)[1:]:
        key, statement = re.match(r"(\w+)\. (.*)", part).groups()
        fields = dict(re.findall(r"^- ([A-Z][\w ]+): (.*)$", part, re.M))
        rule = re.fullmatch(rf"(above|below) {_NUMBER} (.+)", fields.get("Reproduced", ""))
        expected = re.fullmatch(rf"{_NUMBER} to {_NUMBER} (.+)", fields.get("Expected", ""))
        if sorted(fields) != sorted(_FIELDS) or not rule or not expected:
            raise ValueError(
                f"claim {key}: got the fields {sorted(fields)}; accepted: {', '.join(_FIELDS)}, "
                "with 'above|below NUMBER UNIT' and 'NUMBER to NUMBER UNIT'"
            )
        found.append(Prediction(
            key, statement, fields["Source"], fields["Theirs"], fields["Decided by"], rule[1],
            float(rule[2]), rule[3], float(expected[1]), float(expected[2]), fields["Verdict"],
        ))  # fmt: skip
    return found

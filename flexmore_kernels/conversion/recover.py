"""Rules for `flexmore convert`: those of `rank_rules`, and "numerical"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .rank_rules import Key, Rule, parse_rule

NUMERICAL = "numerical"


@dataclass(frozen=True)
class Recover:
    """The rule "numerical": what a truncated expert that was stored dense was truncated to, and
    full-size where nothing shows that. `ranks` wants spectra that are zero beyond that rank.
    """

    text: str = NUMERICAL
    kind: str = NUMERICAL
    needs_spectra: bool = True
    needs_all: bool = False
    needs_features: bool = False
    minds_rounding: bool = True

    def ranks(
        self, spectra: Mapping[Key, Tensor], sizes: tuple[int, int], **_: Any
    ) -> dict[Key, int | str]:
        """The rank of each matrix, or "full" where factors would cost as much."""
        D, F = sizes
        found = {key: int((s > 0).sum()) for key, s in spectra.items()}
        return {key: "full" if r * (D + F) >= D * F else r for key, r in found.items()}


AnyRule = Rule | Recover


def read_rule(rule: str | int | AnyRule) -> AnyRule:
    """A rule of its text; a rank is one too. ValueError or TypeError says what is accepted."""
    if isinstance(rule, (Rule, Recover)):
        return rule
    if isinstance(rule, bool) or not isinstance(rule, (str, int)):
        raise TypeError(f"rule: got {rule!r}; accepted: a rule's text, or a rank")
    text = str(rule).strip()
    if text == NUMERICAL:
        return Recover()
    try:
        return parse_rule(text)
    except ValueError as error:
        raise ValueError(f"{error}, {NUMERICAL}") from None

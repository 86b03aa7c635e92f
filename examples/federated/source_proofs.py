"""Metamath's set.mm as text: theorems with their proofs, each step with its rule and its premises.

    theorem a1i: Inference introducing an antecedent.
    given a1i.1: ph
    prove: ( ps -> ph )
    1. a1i.1: ph
    2. ax-1: ( ph -> ( ps -> ph ) )
    3. ax-mp 1 2: ( ps -> ph )

A step is what its rule makes of the steps whose numbers follow it. Steps that only build formulas
(Metamath's syntax) are not shown. How the file is read: the Metamath book, appendix C; proofs are
in its compressed form (appendix B).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MOST_STEPS, MOST_CHARACTERS = 40, 2400
FILE = "usr/share/metamath/databases/set.mm"

Formula = tuple[str, ...]


class Rule(NamedTuple):
    """An axiom, a definition or a theorem. variables: (kind, variable) in the order of its proof's
    stack; given: formulas that are to be proved before it."""

    variables: tuple[tuple[str, str], ...]
    given: tuple[Formula, ...]
    says: Formula


class Statement(NamedTuple):
    """An axiom or a theorem, with the comment before it and a theorem's proof."""

    label: str
    comment: str
    rule: Rule
    labels: tuple[str, ...]  # of what must be there before: variables' first, then given formulas'
    proof: list[str]


def tokens_of(text: str) -> Iterator[str]:
    """Words, with each comment "$( .. $)" as one token."""
    for found in re.finditer(r"\$\(\s(.*?)\s\$\)|(\S+)", text, re.S):
        yield found[0]


def statements(text: str, kinds: dict[str, Formula]) -> Iterator[Statement]:
    """Axioms and theorems in order. kinds: takes ("wff", "ph") and the like under their labels."""
    floats: list[tuple[str, str, str]] = []  # label, kind, variable
    given: list[tuple[str, Formula]] = []
    variables: set[str] = set()
    blocks: list[tuple[int, int]] = []
    label, comment = "", ""
    words = tokens_of(text)

    def rest(end: str = "$.") -> list[str]:
        found = []
        for word in words:
            if word == end:
                break
            if not word.startswith("$("):
                found.append(word)
        return found

    for word in words:
        if word.startswith("$("):
            comment = word[2:-2]
        elif word == "${":
            blocks.append((len(floats), len(given)))
        elif word == "$}":
            keep = blocks.pop()
            del floats[keep[0] :], given[keep[1] :]
        elif word in ("$c", "$d", "$["):
            rest("$]" if word == "$[" else "$.")
        elif word == "$v":
            variables.update(rest())
        elif word == "$f":
            kind, variable = rest()
            floats.append((label, kind, variable))
            kinds[label] = (kind, variable)
        elif word == "$e":
            given.append((label, tuple(rest())))
        elif word in ("$a", "$p"):
            says = tuple(rest("$=" if word == "$p" else "$."))
            proof = rest() if word == "$p" else []
            used = {s for formula in (*(f for _, f in given), says) for s in formula} & variables
            mine = [one for one in floats if one[2] in used]
            rule = Rule(tuple((k, v) for _, k, v in mine), tuple(f for _, f in given), says)
            labels = (*(name for name, _, _ in mine), *(name for name, _ in given))
            yield Statement(label, comment, rule, labels, proof)
            comment = ""
        else:
            label = word


class Step(NamedTuple):
    """A line of a proof. premises: indices of the steps that it is made of."""

    rule: str
    premises: tuple[int, ...]
    says: Formula


def steps_of(
    statement: Statement, rules: dict[str, Rule], floats: dict[str, Formula]
) -> list[Step]:
    """The lines of a theorem's proof; each formula once.

    rules: of all that came before. floats: the formula of each variable's label.
    """
    places = [*statement.labels, *statement.proof[1 : statement.proof.index(")")]]
    letters = "".join(statement.proof[statement.proof.index(")") + 1 :])
    own = dict(
        zip(statement.labels[len(statement.rule.variables) :], statement.rule.given, strict=True)
    )
    stack: list[tuple[Formula, int]] = []  # formulas, and the step that says it, or -1
    saved: list[tuple[Formula, int]] = []
    steps: list[Step] = []
    known: dict[Formula, int] = {}

    def push(rule: str, premises: tuple[int, ...], says: Formula) -> None:
        at = -1
        if says[0] == "|-":
            at = known.setdefault(says, len(steps))
            if at == len(steps):
                steps.append(Step(rule, premises, says))
        stack.append((says, at))

    number = 0
    for letter in letters:
        if letter == "Z":
            saved.append(stack[-1])
            continue
        if letter >= "U":
            number = number * 5 + ord(letter) - ord("T")
            continue
        number, at = 0, number * 20 + ord(letter) - ord("A")
        if at >= len(places):
            stack.append(saved[at - len(places)])
            continue
        name = places[at]
        if name in floats:
            stack.append((floats[name], -1))
        elif name in own:
            push(name, (), own[name])
        else:
            rule = rules[name]
            count = len(rule.variables) + len(rule.given)
            if len(stack) < count:
                raise ValueError(f"{FILE}: {name} lacks premises in the proof of {statement.label}")
            taken = stack[len(stack) - count :]
            del stack[len(stack) - count :]
            means = {v: taken[i][0][1:] for i, (_, v) in enumerate(rule.variables)}
            says = tuple(s for symbol in rule.says for s in means.get(symbol, (symbol,)))
            push(name, tuple(at for _, at in taken[len(rule.variables) :]), says)
    if [says for says, _ in stack] != [statement.rule.says]:
        raise ValueError(f"{FILE}: the proof of {statement.label} proves something else")
    return steps


def shown(formula: Formula) -> str:
    """A formula without its first symbol, "|-"."""
    return " ".join(formula[1:])


def summary(comment: str) -> str:
    """A comment's first sentence, without markup."""
    text = re.sub(r"\s+", " ", comment)
    text = re.sub(r"\((?:Contributed|Revised|Proof|New usage|Proposed).*", "", text)
    text = re.sub(r"[`~] ?|_(?=\w)|(?<=\w)_|\[[^]]*\]", "", text).strip()
    return re.split(r"(?<=[a-z)])\. ", text)[0].rstrip(".")[:160].strip()


def proofs(root: Path) -> Iterator[str]:
    """Theorems in the file's order, those with a short proof."""
    text = (root / FILE).read_text()
    rules: dict[str, Rule] = {}
    floats: dict[str, Formula] = {}
    for statement in statements(text, floats):
        rules[statement.label] = statement.rule
        if statement.proof[:1] == ["("] and statement.rule.says[0] == "|-":
            page = page_of(statement, rules, floats)
            if page:
                yield page


def page_of(statement: Statement, rules: dict[str, Rule], floats: dict[str, Formula]) -> str | None:
    """A theorem as text; None where its proof is long, or has a single step."""
    if sum(map(len, statement.proof)) > 1500 or "?" in "".join(statement.proof):
        return None
    steps = steps_of(statement, rules, floats)
    if not 2 <= len(steps) <= MOST_STEPS:
        return None
    lines = [f"theorem {statement.label}: {summary(statement.comment)}."]
    names = statement.labels[len(statement.rule.variables) :]
    lines += [f"given {n}: {shown(f)}" for n, f in zip(names, statement.rule.given, strict=True)]
    lines.append(f"prove: {shown(statement.rule.says)}")
    for number, (rule, premises, says) in enumerate(steps, 1):
        words = " ".join([rule, *(str(at + 1) for at in premises)])
        lines.append(f"{number}. {words}: {shown(says)}")
    page = "\n".join(lines)
    return page if len(page) <= MOST_CHARACTERS else None

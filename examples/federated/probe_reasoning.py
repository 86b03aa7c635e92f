"""What is worked out: sums, brackets, steps of proofs, none of which the training text shows."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from probe_items import CHOICES, Item, shuffled
from source_sums import drawn, is_kept_out, line_of

_SUM = re.compile(r"(?<![\d.])(\d+) ([-+*]) (\d+) = (\d+)")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_STEP = re.compile(r"^(\d+)\. (\S+)((?: \d+)*): (.*)$", re.M)
_WFF = frozenset(["ph", "ps", "ch", "th", "ta", "et", "ze", "si", "rh", "mu", "la", "ka"])
_RULES_SEEN = 3
"""How often the training text shows a rule that is asked for."""
_LONGEST_STEP = 400
"""Characters of a prompt and a choice."""

Fact = tuple[int, int, str]


def facts_of(text: str) -> set[Fact]:
    """What a text says of pairs of numbers: (smaller, larger, "+" or "*"). A difference says what
    the sum of what is taken away and what is left is."""
    found = set()
    for a, sign, b, result in _SUM.findall(text):
        pair = (int(b), int(result)) if sign == "-" else (int(a), int(b))
        found.add((min(pair), max(pair), "*" if sign == "*" else "+"))
    return found


def arithmetic(training: Sequence[str], generator: random.Random) -> Iterator[Item]:
    """ "37 + 48 =" and its result among wrong ones with as many digits, near it or with two digits
    exchanged.

    Drawn as the training text's lines are, from the pairs that are kept out of it; none that it
    shows in either order, as a sum or as a difference, is asked.
    """
    known = set().union(*(facts_of(text) for text in training))
    misses = 0
    while misses < 100_000:
        first, second, sign = drawn(generator)
        low, high = sorted((first, second))
        if not is_kept_out(first, second, sign) or (low, high, sign.replace("-", "+")) in known:
            misses += 1
            continue
        misses += 1
        asked, right = line_of(first, second, sign)
        near = {right + by * way for by in (1, 2, 3, 10, 11, 9, 20, 100) for way in (1, -1)}
        digits = str(right)
        near |= {int(digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :])
                 for i in range(len(digits) - 1)}  # fmt: skip
        wrong = sorted(n for n in near - {right} if n > 0 and len(str(n)) == len(digits))
        if len(wrong) >= CHOICES - 1:
            picked = generator.sample(wrong, CHOICES - 1)
            yield shuffled(generator, asked, f" {right}", [f" {n}" for n in picked])


def brackets(held_out: Sequence[str], generator: random.Random) -> Iterator[Item]:
    """Code with two to four open brackets and what closes them, among closings as long.

    The code is put together from pieces of held-out code: how a line begins, names, keys. Kinds of
    brackets are drawn evenly, since in real code "))" alone would be right most of the time.
    """
    text = "\n".join(held_out)
    begins = sorted(set(re.findall(r"^( *(?:[a-z_][\w.]* = |return ))(?=\w)", text, re.M)))
    called = sorted(set(re.findall(r"\b([a-z_][\w.]{2,24})\(", text)))
    held = sorted(set(re.findall(r"\b([a-z_][\w.]{2,24})\[", text)))
    keys = sorted(set(re.findall(r"(['\"]\w+['\"]): ", text)))
    words = sorted(set(re.findall(r"\b[a-z_]{2,16}\b(?=[,)\]])", text)))
    if not all((begins, called, held, keys, words)):
        return
    pick = generator.choice
    for _ in range(1_000_000):
        kinds = [pick("([{") for _ in range(generator.choice((2, 2, 3, 3, 4)))]
        prompt = pick(begins)
        for kind in kinds:
            if kind == "(":
                prompt += f"{pick(called)}("
            elif kind == "[":
                prompt += f"{pick(held)}[" if generator.random() < 0.5 else "["
            else:
                prompt += f"{{{pick(keys)}: "
            if kind != "{" and generator.random() < 0.3:
                prompt += f"{pick(words)}, "
        prompt += pick(words)
        right = "".join(_CLOSING[kind] for kind in reversed(kinds))
        wrong = {right[::-1]} - {right}
        while len(wrong) < CHOICES - 1:
            wrong |= {"".join(pick(")]}") for _ in right)} - {right}
        if len(prompt) <= 160:
            yield shuffled(generator, prompt, right, sorted(wrong))


class Derivation(NamedTuple):
    """A step of a proof with the steps that it is made of: (number, words, formula) of each."""

    number: str
    rule: str
    premises: tuple[tuple[str, str, str], ...]
    says: str

    @property
    def meaning(self) -> tuple[str, tuple[str, ...], str]:
        """What it says, wherever it stands."""
        return self.rule, tuple(formula for _, _, formula in self.premises), self.says

    @property
    def prompt(self) -> str:
        """The steps that it is made of, then its own line up to what it says."""
        lines = [f"{number}. {words}: {formula}" for number, words, formula in self.premises]
        numbers = " ".join(number for number, _, _ in self.premises)
        return "\n".join([*lines, f"{self.number}. {self.rule} {numbers}:"])


def derivations(document: str) -> list[Derivation]:
    """The steps of a theorem that are made of others."""
    steps = [(n, rule + given, says) for n, rule, given, says in _STEP.findall(document)]
    found = []
    for number, words, says in steps:
        rule, *given = words.split()
        if given and all(int(n) <= len(steps) for n in given):
            premises = tuple(steps[int(n) - 1] for n in given)
            found.append(Derivation(number, rule, premises, says))
    return found


def proof_steps(
    training: Sequence[str], held_out: Sequence[str], generator: random.Random
) -> Iterator[Item]:
    """Steps of a held-out proof: the premises, the rule, and what follows, among other formulas.

    Wrong choices are the right formula with its variables permuted and, where premises leave no
    variable open (so that the rule allows one conclusion), formulas of other theorems with as many
    symbols, in these variables. The whole item's variables are renamed at random, so that the order
    in which set.mm takes variables does not tell the right one. Steps that a training theorem has,
    formula by formula, are not asked, nor rules that it hardly uses.
    """
    known = {step.meaning for document in training for step in derivations(document)}
    rules = Counter(rule for rule, _, _ in known)
    steps = {step.meaning: step for document in held_out for step in derivations(document)}
    asked = [
        step for meaning, step in sorted(steps.items())
        if meaning not in known and rules[step.rule] >= _RULES_SEEN
        and len(step.prompt) + len(step.says) < _LONGEST_STEP
    ]  # fmt: skip
    by_size: dict[int, list[str]] = {}
    for says in sorted({says for text in held_out for *_, says in _STEP.findall(text)}):
        by_size.setdefault(len(says.split()), []).append(says)
    # The shortest first: a small model sees few tokens at once.
    for step in sorted(asked, key=lambda step: len(step.prompt) + 2 * len(step.says)):
        given = variables(" ".join(formula for _, _, formula in step.premises))
        own = {formula for _, _, formula in step.premises} | {step.says}
        wrong = [text for text in permuted(step.says, given, generator) if text not in own]
        if variables(step.says) <= given:
            same = by_size[len(step.says.split())]
            tries = [renamed_into(generator.choice(same), given, generator) for _ in range(20)]
            others = [text for text in tries if text and text not in own]
            wrong = [*wrong[:2], *others[:1], *wrong[2:], *others[1:]]
        wrong = list(dict.fromkeys(wrong))[: CHOICES - 1]
        if len(wrong) == CHOICES - 1:
            names = variables(" ".join([*own, *wrong]))
            swap = shuffle_of(names, generator)
            prompt, *choices = (exchanged(text, swap) for text in (step.prompt, step.says, *wrong))
            right, *wrong = (f" {text}" for text in choices)
            yield shuffled(generator, prompt, right, wrong)


def kind_of(symbol: str) -> str | None:
    """What a symbol of set.mm stands for if it is a variable: a formula, a set or a class."""
    if symbol in _WFF:
        return "formula"
    if len(symbol) == 1 and symbol.isascii() and symbol.isalpha():
        return "set" if symbol.islower() else "class"
    return None


def variables(text: str) -> set[str]:
    """The variables of a text of formulas."""
    return {symbol for symbol in text.split() if kind_of(symbol)}


def exchanged(text: str, swap: dict[str, str]) -> str:
    """A text with variables replaced, all at once."""
    return re.sub(r"[^ \n]+", lambda found: swap.get(found[0], found[0]), text)


def shuffle_of(names: set[str], generator: random.Random) -> dict[str, str]:
    """A permutation of variables, each within its kind."""
    swap = {}
    for kind in ("formula", "set", "class"):
        mine = sorted(name for name in names if kind_of(name) == kind)
        swap |= dict(zip(mine, generator.sample(mine, len(mine)), strict=True))
    return swap


def permuted(says: str, given: set[str], generator: random.Random) -> list[str]:
    """Formulas that are this one with its variables permuted, one of the premises' among them; in a
    random order."""
    names, found = variables(says), set()
    for _ in range(24):
        swap = shuffle_of(names, generator)
        if any(swap[name] != name for name in names & given):
            found.add(exchanged(says, swap))
    return generator.sample(ready := sorted(found - {says}), len(ready))


def renamed_into(says: str, names: set[str], generator: random.Random) -> str | None:
    """A formula with its variables replaced by others of their kinds; None where there are fewer,
    or it has none."""
    swap = {}
    for kind in ("formula", "set", "class"):
        mine = sorted(name for name in variables(says) if kind_of(name) == kind)
        theirs = sorted(name for name in names if kind_of(name) == kind)
        if len(mine) > len(theirs):
            return None
        swap |= dict(zip(mine, generator.sample(theirs, len(mine)), strict=False))
    return exchanged(says, swap) if swap else None

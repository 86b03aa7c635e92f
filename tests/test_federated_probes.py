"""examples/federated/: probes on texts made here, whose right answers are known otherwise.

Traps covered: sums and steps that the training text shows, answers that place or length give away,
wrong choices that are right, items of another text than the one that they are to be of.
"""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples/federated"))
import probe_items  # noqa: E402
import probe_knowledge  # noqa: E402
import probe_reasoning  # noqa: E402
import probes  # noqa: E402
import source_sums  # noqa: E402
import texts  # noqa: E402
import tokens  # noqa: E402

GREEK = ("ph", "ps", "ch", "th", "ta")
COUNT = 120


def domain(name: str, documents: list[str]) -> texts.Domain:
    return texts.Domain(name, name, documents, "none", False)


def word(draw: random.Random, least: int = 4, most: int = 8) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(least, most)))


def phrase(draw: random.Random, least: int = 4, most: int = 9) -> str:
    return " ".join(word(draw) for _ in range(draw.randint(least, most)))


def theorem(draw: random.Random, number: int) -> str:
    """Two implications and the one that follows by the rule syl."""
    formula = lambda: f"( {draw.choice(GREEK)} {draw.choice(('/', '->'))} {draw.choice(GREEK)} )"
    a, b, c = formula(), formula(), formula()
    return (
        f"theorem t{number}: One of many.\nprove: ( {a} -> {c} )\n"
        f"1. t{number}.1: ( {a} -> {b} )\n2. t{number}.2: ( {b} -> {c} )\n"
        f"3. syl 1 2: ( {a} -> {c} )"
    )


def code(draw: random.Random) -> str:
    lines = [f"# {word(draw)}.py"]
    for _ in range(12):
        lines.append(f"    {word(draw)} = {word(draw)}({word(draw)}[{word(draw)}], {{'a': b}})")
        lines.append(f"    return {word(draw)}({{'{word(draw)}': {word(draw)}}})")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def domains() -> dict[str, texts.Domain]:
    draw = random.Random("texts")
    kinds = ("noun", "verb")
    page = lambda: "\n".join(
        f"{word(draw, 6)} ({draw.choice(kinds)}): {phrase(draw)}; {phrase(draw)}." for _ in range(9)
    )
    chapter = lambda: "\n".join(
        ["Book 1", *(f"{n} {phrase(draw, 6)}, {phrase(draw, 6)}." for n in range(1, 12))]
    )
    manual = lambda module: "\n\n".join(
        f"function {module}.{word(draw)}({word(draw)})\n\n   Does {phrase(draw)}." for _ in range(8)
    )
    return {
        "dictionary": domain("dictionary", [page() for _ in range(60)]),
        "scripture": domain("scripture", [chapter() for _ in range(60)]),
        "docs": domain("docs", [manual(word(draw)) for _ in range(60)]),
        "arithmetic": domain("arithmetic", list(itertools.islice(source_sums.sums(), 400))),
        "python": domain("python", [code(draw) for _ in range(40)]),
        "proofs": domain("proofs", [theorem(draw, n) for n in range(900)]),
        "sqlite": domain("sqlite", [phrase(draw, 40, 60) for _ in range(40)]),
    }


@pytest.fixture(scope="module")
def built(domains) -> dict[str, probes.Probe]:
    return probes.build(domains, COUNT)


def right(item: probes.Item) -> str:
    return item.choices[item.answer]


def test_each_probe_is_whole(built, domains):
    groups = Counter(probe.group for probe in built.values())
    assert groups == {"knowledge": 3, "reasoning": 3}
    assert texts.LATE not in {probe.domain for probe in built.values()}
    for name, probe in built.items():
        assert probe.name == name and probe.domain in domains and len(probe.items) == COUNT
        for item in probe.items:
            assert len(item.choices) == len(set(item.choices)) == 4
            assert 0 <= item.answer < 4 and item.prompt and all(item.choices)
        asked = [(item.prompt, right(item)) for item in probe.items]
        assert len(set(asked)) == COUNT


def test_neither_place_nor_length_gives_the_answer(built):
    """Of n fair items a place has n / 4 within five standard deviations; so has a rank by length,
    ties broken at random, as the right one has any place among four alike."""
    draw = random.Random(0)
    bound = 5 * (COUNT * 3 / 16) ** 0.5
    for name, probe in built.items():
        places = Counter(item.answer for item in probe.items)
        assert all(abs(places[at] - COUNT / 4) < bound for at in range(4)), name
        ranks = Counter()
        for item in probe.items:
            order = sorted(range(4), key=lambda at: (len(item.choices[at]), draw.random()))
            ranks[order.index(item.answer)] += 1
        assert all(abs(ranks[at] - COUNT / 4) < bound for at in range(4)), (name, ranks)


def test_the_same_texts_and_seed_give_the_same_items(built, domains):
    some = {name: domains[name] for name in ("proofs", "scripture")}
    again = probes.build(some, COUNT)
    assert list(again) == ["verses", "steps"]
    assert again["verses"] == built["verses"] and again["steps"] == built["steps"]
    assert probes.build(some, COUNT, seed=1)["verses"] != built["verses"]
    fewer = probes.build(some, 10)
    assert fewer["verses"].items == built["verses"].items[:10]


def test_meanings_are_those_of_the_training_text(built, domains):
    train = "\n".join(texts.split(domains["dictionary"])[0])
    for item in built["meanings"].items:
        assert f"{item.prompt}{right(item)};" in train
        for at, choice in enumerate(item.choices):
            kind = re.search(r"\((\w+)\)", item.prompt)[1]
            assert re.search(rf"\({kind}\):{re.escape(choice)};", train)
            assert (f"{item.prompt}{choice}" in train) == (at == item.answer)


def test_verses_end_as_in_the_training_text(built, domains):
    train = "\n".join(texts.split(domains["scripture"])[0])
    for item in built["verses"].items:
        ends = [f"{item.prompt}{choice}\n" in f"{train}\n" for choice in item.choices]
        assert ends.index(True) == item.answer and sum(ends) == 1
        assert all(f",{choice}" in train for choice in item.choices)


def test_names_are_in_the_module_and_wrong_ones_in_others(built, domains):
    train = "\n".join(texts.split(domains["docs"])[0])
    for item in built["names"].items:
        inside = [f"{item.prompt}{choice}(" in train for choice in item.choices]
        assert inside.index(True) == item.answer and sum(inside) == 1
        assert all(f".{choice}(" in train for choice in item.choices)


def test_wrong_meanings_are_not_right_by_another_way():
    """Each word has its neighbour's meaning too, as a verb; two words share one; every second
    meaning begins like one of three words."""
    draw = random.Random(0)
    stems = [word(draw, 6, 6) for _ in range(60)]
    says = [f"{phrase(draw, 3, 3)} {stems[(n // 2 + 1) % 3] if n % 2 else 'x'}s" for n in range(60)]
    lines = [f"{stem}ness (noun): {text}." for stem, text in zip(stems, says, strict=True)]
    lines += [f"{stem}ness (verb): x; {says[n - 1]}." for n, stem in enumerate(stems)]
    lines.append(f"another (noun): {says[40]}.")
    items = [item for seed in range(40)
             for item in probe_knowledge.meanings(lines, random.Random(seed))]  # fmt: skip
    assert len(items) > 300
    for item in items:
        stem = item.prompt.split("ness")[0]
        both = {f" {says[stems.index(stem) - k]}" for k in (0, 1)}
        assert right(item) in both and len(set(item.choices) & both) == 1
        assert right(item) != f" {says[40]}"
        assert not any(stem in choice for choice in item.choices)


def test_wrong_names_are_not_right_by_another_way():
    """Each module has the name "shared"; some names have a part of a module's name, their own or
    another's."""
    draw = random.Random(0)
    stems = [word(draw, 6, 6) for _ in range(60)]
    lines = [f"function {stem}.shared()" for stem in stems]
    for n, stem in enumerate(stems):
        lines += [f"function {stem}.{word(draw, 6, 7)}()" for _ in range(3)]
        lines += [f"function {stem}.{stems[n - k][:4]}{k}t()" for k in (0, 1)]
    items = list(probe_knowledge.names(lines, draw))
    assert len(items) > 200
    for item in items:
        module = item.prompt.split()[1].rstrip(".")
        assert "shared" not in item.choices
        assert not any(module[:4] in choice for choice in item.choices)


def test_sums_are_right_and_not_in_the_training_text(built, domains):
    known = probe_reasoning.facts_of("\n".join(texts.split(domains["arithmetic"])[0]))
    assert len(known) > 1000
    for item in built["arithmetic"].items:
        a, sign, b = item.prompt.removesuffix(" =").split()
        results = [int(choice) == eval(f"{a} {sign} {b}") for choice in item.choices]
        assert results.index(True) == item.answer and sum(results) == 1
        assert len({len(choice) for choice in item.choices}) == 1
        fact = probe_reasoning.facts_of(f"{item.prompt}{right(item)}")
        assert len(fact) == 1 and not fact & known
        # Drawn as the text is: were unseen pairs enough, nearly all would have three digits.
        assert source_sums.is_kept_out(*fact.pop())


def test_a_text_that_shows_kept_out_sums_is_not_asked_for_them(domains):
    """Half of the kept-out sums of numbers below 100 in the other order, half as differences."""
    pairs = [(a, b) for a in range(1, 100) for b in range(a, 100)
             if source_sums.is_kept_out(a, b, "+")]  # fmt: skip
    lines = [f"{b} + {a} = {a + b}" for a, b in pairs[::2]]
    lines += [f"{a + b} - {b} = {a}" for a, b in pairs[1::2]]
    draw = random.Random(0)
    shown = probe_reasoning.arithmetic(["\n".join(lines)], draw)
    asked = [next(shown) for _ in range(300)]
    found = set().union(
        *(probe_reasoning.facts_of(f"{item.prompt}{right(item)}") for item in asked)
    )
    assert any(sign == "+" for *_, sign in found)
    assert not {(a, b, "+") for a, b in pairs} & found


def closes(prompt: str, closing: str) -> bool:
    """Whether every bracket that is open is closed, in order."""
    open_ones = []
    for sign in prompt + closing:
        if sign in "([{":
            open_ones.append(sign)
        elif sign in ")]}" and (not open_ones or "([{".index(open_ones.pop()) != ")]}".index(sign)):
            return False
    return not open_ones


def test_brackets_close_and_are_of_held_out_code(built, domains):
    train, held_out = ("\n".join(part) for part in texts.split(domains["python"]))
    kinds = Counter()
    for item in built["brackets"].items:
        fits = [closes(item.prompt, choice) for choice in item.choices]
        assert fits.index(True) == item.answer and sum(fits) == 1
        assert len({len(choice) for choice in item.choices}) == 1
        kinds.update(right(item))
        for name in re.findall(r"[a-z]{4,}", item.prompt):
            assert name in held_out
    assert max(kinds.values()) < 2 * min(kinds.values())


def test_steps_follow_and_are_not_in_the_training_text(built, domains):
    train, held_out = texts.split(domains["proofs"])
    known = {step.meaning for document in train for step in probe_reasoning.derivations(document)}
    for item in built["steps"].items:
        first, second = (line.partition(": ")[2] for line in item.prompt.split("\n")[:2])
        a, b, c = first.split()[1:6], first.split()[7:12], second.split()[7:12]
        assert b == second.split()[1:6]
        assert right(item) == f" ( {' '.join(a)} -> {' '.join(c)} )"
        assert {len(choice.split()) for choice in item.choices} == {13}
        assert ("syl", (first, second), right(item)[1:]) not in known
    shown = probe_reasoning.proof_steps([*train, *held_out], held_out, random.Random(0))
    assert list(shown) == []


def test_variables_are_permuted_within_their_kind():
    draw = random.Random(0)
    for _ in range(50):
        swap = probe_reasoning.shuffle_of({"ph", "ps", "x", "y", "A"}, draw)
        assert {probe_reasoning.kind_of(a) for a in swap} == {"formula", "set", "class"}
        assert all(
            probe_reasoning.kind_of(a) == probe_reasoning.kind_of(b) for a, b in swap.items()
        )
    assert probe_reasoning.exchanged("( ph -> A. x ps )", {"ph": "ps", "ps": "ph"}) == (
        "( ps -> A. x ph )"
    )
    assert probe_reasoning.variables("( x e. A -> E. y ph )") == {"x", "A", "y", "ph"}


def test_a_prompt_and_a_choice_are_split_where_their_text_is(built):
    """What is scored, ids of the prompt and then of a choice, is how the model reads the whole."""
    pytest.importorskip("tokenizers")
    items = [item for probe in built.values() for item in probe.items[:30]]
    tokenizer = tokens.train_tokenizer([item.prompt + right(item) for item in items], 500)
    for item in items:
        for choice in item.choices:
            apart = tokenizer.encode(item.prompt).ids + tokenizer.encode(choice).ids
            assert apart == tokenizer.encode(item.prompt + choice).ids


def test_what_no_probe_is_made_of(domains):
    for count in (0, True, 2.0):
        with pytest.raises(ValueError, match="count"):
            probes.build(domains, count)
    with pytest.raises(ValueError, match=r"count: names has \d+ items"):
        probes.build({"docs": domains["docs"]}, 100_000)
    with pytest.raises(ValueError, match="choices"):
        probe_items.shuffled(random.Random(0), "a", "b", ["b", "c", "d"])

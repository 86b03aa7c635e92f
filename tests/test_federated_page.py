"""examples/federated/: verdicts of made-up studies whose effects are known, and their page."""

from __future__ import annotations

import html.parser
import json
import math
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from federated_results import LOST, NOTHING, PAPERS, fake_results

sys.path.insert(0, str(Path(__file__).parent.parent / "examples/federated"))
import claims
import drawing
import intervals
import page
import plots
import predictions
import rank_scores
import summary

KEYS = ["1", "2", "3", "4", "5", "6a", "6b", "7", "8a", "8b", "9a", "9b", "10a", "10b"]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: page.page(fake_results(1, 3, effects))
            for name, effects in (("papers", PAPERS), ("lost", LOST))}  # fmt: skip


def by_key(judged) -> dict[str, claims.Judged]:
    return {j.prediction.key: j for j in judged}


def test_predictions_name_what_is_judged():
    found = predictions.predictions()
    assert [p.key for p in found] == KEYS == list(claims._MEASURES)
    for p in found:
        assert p.low < p.high and p.verdict in (p.yes, claims.NOT_CLEAR, claims.OPPOSITE)
    text = predictions.PREDICTIONS.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"claim 1: got the fields .*accepted: Source"):
        predictions.predictions(text.replace("- Expected: -2 to", "- Expected: about"))


def test_verdict_is_by_the_whole_interval():
    above = predictions.predictions()[0]
    cases = {(0.1, 1): "reproduced", (-1, -0.1): "opposite", (-1, 1): "not clear",
             (0.0, 0.0): "not clear", (math.nan, math.nan): "not clear"}  # fmt: skip
    for (low, high), said in cases.items():
        estimate = intervals.Estimate((low + high) / 2, low, high, 3)
        assert claims.verdict(above, estimate) == said
    below = above._replace(side="below", source="ours")
    assert claims.verdict(below, intervals.Estimate(-1, -2, -0.5, 3)) == "holds"
    assert claims.verdict(below, None) == "not measured"


def test_a_study_that_wins_and_one_that_loses():
    won, lost = (by_key(claims.judge(fake_results(1, 3, e))) for e in (PAPERS, LOST))
    assert {k: j.verdict for k, j in won.items()} == {
        k: "holds" if k in ("4", "10a", "10b") else "reproduced" for k in KEYS
    }
    assert {j.verdict for j in lost.values()} == {"opposite"}
    for key, truth in (("1", 3.0), ("3", 8.0), ("6a", 6.0), ("6b", 3.0), ("7", 0.5), ("8a", 65.0),
                       ("9b", 0.2), ("10a", 2.0), ("10b", 1.4)):  # fmt: skip
        e = won[key].estimate
        # A claim's interval misses in one case of twenty: the width is what is allowed.
        assert abs(e.value - truth) < e.high - e.low, key
    results = fake_results(1, 3, PAPERS)
    fits = rank_scores.rank_fits(results, rank_scores.rank_outcomes(results))
    for group, truth in (("knowledge", 2.0), ("reasoning", 5.0)):
        assert abs(fits[group].estimate.value - truth) < 0.2 and fits[group].where == ["peak"] * 3


def test_nothing_behind_a_claim_is_not_reproduced():
    judged = by_key(claims.judge(fake_results(0, 3, NOTHING)))
    at_the_threshold = set(KEYS) - {"2", "8b"}  # where NOTHING has an effect all the same
    right = {k for k in at_the_threshold if judged[k].verdict == judged[k].prediction.yes}
    assert right == set()
    assert sum(judged[k].verdict == "not clear" for k in at_the_threshold) >= 10


def test_parts_that_are_missing_are_said_to_be():
    results = fake_results(0, 2)
    results["speed"] = []
    for seed in results["seeds"]:
        seed["nexus"], seed["opt_out"] = None, {}
    found = by_key(claims.judge(results))
    missing = {key for key, j in found.items() if j.verdict == "not measured"}
    assert missing == {"5", "6a", "6b", "7", "8a", "8b", "9a", "9b", "10a", "10b"}
    text = page.page(results)
    assert text.count("Not measured: this study has not this part.") == 4
    results["seeds"] = []
    assert {j.verdict for j in claims.judge(results)} == {"not measured"}
    assert page.page(results).count("Not measured: this study has not this part.") == 9


def test_one_seed_decides_no_claim_and_half_a_seed_is_left_out():
    results = fake_results(0, 2)
    results["seeds"][1]["mixtures"] = []
    found = by_key(claims.judge(results))
    assert {found[k].verdict for k in KEYS[:-2]} == {"not clear"}
    text = page.page(results)
    assert "Seeds without a part that others have are left out: 1." in text
    assert "One seed gives no interval" in text and "nan" not in text


def test_page_says_what_came_out(pages):
    assert "Of 11 claims of the papers: 11 <span" in pages["papers"]
    assert "reproduced</span>" not in pages["lost"] and "holds</span>" not in pages["lost"]
    assert 'Of 3 claims of our own: 3 <span class="verdict no">' in pages["lost"]
    said = [j.estimate for j in claims.judge(fake_results(1, 3, PAPERS))][8]
    assert f"{said.value:.1f} % <span class=whole>[{said.low:.1f}, " in pages["papers"]


def test_page_needs_nothing_else_and_is_written_whole(tmp_path, pages):
    results = json.loads(json.dumps(fake_results(1, 3, PAPERS)))
    page.write_page(results, tmp_path / "page.html", data="numbers.json")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    text = (tmp_path / "page.html").read_text()
    assert text == pages["papers"].replace("results.json", "numbers.json")
    assert text.isascii() and not re.search(r"<script|<link|<img|url\(|https?:", text)
    assert re.findall(r'href="(.*?)"', text) == ["numbers.json"]
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text

    open_tags: list[str] = []

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br"):
                open_tags.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Tags().feed(text)
    assert open_tags == []


def test_words_from_the_results_cannot_break_the_page():
    results = fake_results(0, 1)
    results["texts"]["domains"]["bible"]["title"] = "<b>&\u00e9"
    results["size"] = "<i>"
    text = page.page(results)
    assert "&lt;b&gt;&amp;&#233;" in text and "<i>" not in text


def test_text_stays_inside_pictures_and_apart(pages):
    found = [svg for text in pages.values() for svg in re.findall(r"<svg.*?</svg>", text, re.S)]
    assert len(found) > 60
    for picture in found:
        root = ElementTree.fromstring(picture)
        _, _, width, height = map(float, root.get("viewBox").split())
        boxes = []
        for node in root.iter("text"):
            kind, x, y = node.get("class", ""), float(node.get("x")), float(node.get("y"))
            size = 13 if "name" in kind else 11
            wide = drawing.width_of(node.text, size)
            if node.get("transform"):  # turned by 60 degrees, its end at (x, y)
                left, right = x - wide / 2, x
                top, bottom = y - wide * math.sin(math.radians(60)), y
            else:
                left = x - {"end": wide, "middle": wide / 2}.get(kind.split(" ")[-1], 0.0)
                right, top, bottom = left + wide, y - 0.75 * size, y + 0.2 * size
                for other in boxes:
                    apart = right <= other[1] or other[2] <= left
                    assert apart or bottom <= other[3] or other[4] <= top, (node.text, other)
                boxes.append((node.text, left, right, top, bottom))
            assert left >= 0 and right <= width and top >= 0 and bottom <= height, node.text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2's: 4.5 at least for text, 3 for graphics."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(scheme):
    colours = {name: pair[scheme] for name, pair in drawing.COLOURS.items()}
    for name in ("ink", "faint", "c0", "c1", "c2", "c3", "c4"):
        for ground in ("page", "card"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in ("c0", "c1"):  # of a map's cell, at its darkest
        cell, ground = ([int(c[i : i + 2], 16) for i in (1, 3, 5)]
                        for c in (colours[name], colours["card"]))  # fmt: skip
        mixed = (round(drawing.SHADE * a + (1 - drawing.SHADE) * b)
                 for a, b in zip(cell, ground, strict=True))  # fmt: skip
        assert contrast("#{:02x}{:02x}{:02x}".format(*mixed), colours["ink"]) >= 4.5


def test_numbers_have_one_minus_and_no_minus_zero():
    assert [plots.signed(n) for n in ("-0.04", "-0.00", "0.5", "-3 %")] == [
        "−0.04", "0.00", "0.5", "−3 %"
    ]  # fmt: skip


def test_axes_hold_their_values():
    for values in ([0.1, 0.9], [-3.0, -2.99], [5.0], [0.0, 1e-6], [1200.0, 98000.0], []):
        low, high, ticks = drawing.ticks_of(values)
        assert all(low <= v <= high for v in values) and 2 <= len(ticks) <= 8
        assert len({plots.number(t, ticks) for t in ticks}) == len(ticks)


def test_what_docs_show_is_made_of_its_numbers():
    """docs/federated: `python examples/federated/summary.py docs/federated` changes nothing."""
    folder = Path(__file__).parent.parent / "docs/federated"
    results = json.loads((folder / "results.json").read_text())
    shown = (folder / "README.md").read_text().partition(summary.BEGIN)[2]
    assert shown.partition(summary.END)[0].strip() == summary.table(results)
    assert (folder / "page.html").read_text() == page.page(results)

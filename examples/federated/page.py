"""The study's page: one HTML file that needs nothing else, made of results.json alone.

No script, no network, light and dark by the reader's scheme, readable on a phone. What the study
has not is said where it would stand.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from claims import MISSING, NOT_CLEAR, OPPOSITE, Judged, in_words, judge
from drawing import style
from figures import loss_figures, probe_figures, rank_figures, size_figures
from figures_routers import (
    joined_figures,
    opt_out_figures,
    router_figures,
    share_figures,
    speed_figures,
)
from findings import whole_seeds
from page_text import STYLE, asked, method
from plots import strip

from flexmore_kernels.checkpoint_writer import write_text

TITLE = "Which rank, which router, who may leave"
_SIGNS = {NOT_CLEAR: ("open", "?"), OPPOSITE: ("no", "✗"), MISSING: ("none", "–")}
_YES = ("yes", "✓")


def write_page(results: Mapping, path: str | Path, *, data: str = "results.json") -> None:
    """Write the page of results (results.py says what they hold), whole or not at all.

    Args:
        path: of the HTML file.
        data: where the page's link to the numbers leads, as seen from the page.
    """
    write_text(Path(path), page(results, data=data))


def page(results: Mapping, *, data: str = "results.json") -> str:
    """The page as text: ASCII alone, so that no encoding can spoil it."""
    judged = judge(results)
    given, results = results, whole_seeds(results)
    parts = [
        f"<h1>{TITLE}</h1>",
        asked(results),
        "<h2>What came out</h2>",
        _headline(judged, results, given),
        "<h2>Each claim</h2>",
        _claims(judged),
        _section("Which rank does a task need?", rank_figures(results),
                 "Knowledge-like and reasoning-like probes over the rank of the experts. Marks are "
                 "means over probes and seeds, upright lines their intervals, curves the quadratic "
                 "regression that decides claim 1, broken lines full-size experts."),
        _section("Every probe alone", probe_figures(results),
                 "The same scores, probe by probe. Full-size experts stand at the right end."),
        _section("Low rank against full size, and ranks by data", size_figures(results),
                 "Parameters are those of all experts beside the base. Spectral and data-aware "
                 "mixtures spend the bytes of a uniform rank where spectra say; weighted and "
                 "data-aware ones see the owner's activations. None sees another owner's text."),
        _section("Losses", loss_figures(results),
                 "A model of its own is a whole model trained on that domain alone."),
        _section("Routers: upcycling, and a domain that joins late", router_figures(results),
                 "All four routers have the same experts, the same shared base and the same tokens "
                 "of fine-tuning. In grey, for comparison: one model of the dense models' mean "
                 "weights, and the base trained on as long. Bars are means over seeds."),
        _section("Who reaches the own expert?", share_figures(results),
                 "One routed expert a token; mean over layers and seeds."),
        _section("Joining without training, and tuning the router", joined_figures(results),
                 "FlexOlmo's way: an expert comes with the row of the router that its owner "
                 "trained in isolation. Tuning trains all rows together on public text."),
        _section("Opting out", opt_out_figures(results),
                 "A row is a mixture without that expert. Framed: the expert's own domain."),
        _section("Speed", speed_figures(results),
                 "Bands are the 20th to 80th percentile of the timings."),
        _texts(results),
        method(len(results["seeds"]), len(judged)),
        _settings(results, data),
    ]  # fmt: skip
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{TITLE}</title><style>{style()}{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _headline(judged: Sequence[Judged], results: Mapping, given: Mapping) -> str:
    measured = [j for j in judged if j.estimate]
    parts = []
    for whose, found in (
        ("of the papers", [j for j in judged if j.prediction.source != "ours"]),
        ("of our own", [j for j in judged if j.prediction.source == "ours"]),
    ):
        kinds = Counter(j.verdict for j in found)
        said = ", ".join(f"{many} {_verdict(kind)}" for kind, many in kinds.items())
        parts.append(f"Of {len(found)} claims {whose}: {said}.")
    inside = sum(bool(j.inside) for j in measured)
    same = sum(j.verdict == j.prediction.verdict for j in measured)
    lines = [f"<p><b>{' '.join(parts)}</b></p><ul>"]
    for kind in dict.fromkeys(j.verdict for j in sorted(judged, key=_order)):
        names = "".join(f"<li>{escape(j.prediction.statement)}</li>"
                        for j in judged if j.verdict == kind)  # fmt: skip
        lines.append(f"<li>{_verdict(kind)}<ul>{names}</ul></li>")
    lines.append(
        "</ul><p>A range and a verdict were written down for every claim before there was any "
        f"result: {inside} of {len(measured)} numbers fell into their range, {same} of "
        f"{len(measured)} verdicts are the expected ones.</p>"
    )
    if left := len(given.get("seeds", ())) - len(results["seeds"]):
        lines.append(f"<p>Seeds without a part that others have are left out: {left}.</p>")
    return "\n".join(lines)


def _claims(judged: Sequence[Judged]) -> str:
    rows = []
    for j in judged:
        p = j.prediction
        more = f"<details><summary>more</summary>{' '.join(map(escape, j.beside))}</details>"
        rule = f"{p.side} {p.threshold:g} {p.unit}".replace("-", "−")
        expected = f"{p.low:g} to {p.high:g} {p.unit}; {p.verdict}".replace("-", "−")
        result = "not measured: the study has not this part"
        if j.estimate:
            words = in_words(j.estimate, p.unit)
            value, bracket, between = words.partition("[")
            result = f"{escape(value)}<span class=whole>{bracket}{between}</span>"
            result += strip(*j.estimate[:3], p.threshold, f"{words}, threshold {rule}")
        hit = {True: "in the expected range", False: "outside the expected range", None: ""}
        rows.append(
            f"<tr><td><b>{p.key}</b> {escape(p.statement)}<br><small>{escape(p.source)}; right "
            f"where the interval is {escape(rule)}</small>{more if j.beside else ''}</td>"
            f'<td data-of="they say">{escape(p.theirs)}</td>'
            f'<td data-of="we expected">{escape(expected)}</td>'
            f'<td data-of="result">{result}</td><td>{_verdict(j.verdict)}<br>'
            f"<small>{hit[j.inside]}</small></td></tr>"
        )
    names = "claim", "they say", "we expected", "result, 95 % interval", "verdict"
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="wide"><table class="claims"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=faint>The broken upright line is the threshold. PREDICTIONS.md beside the study "
        "says how each number is made, and why we expected what we expected.</p>"
    )


def _section(name: str, pictures: Sequence[str], said: str) -> str:
    if not pictures:
        return f"<h2>{name}</h2><p>Not measured: this study has not this part.</p>"
    cards = "".join(f"<figure>{picture}</figure>" for picture in pictures)
    return f'<h2>{name}</h2><p>{said}</p><div class="cards">{cards}</div>'


def _texts(results: Mapping) -> str:
    texts, rows = results["texts"], []
    for name, about in texts["domains"].items():
        notes = ["joins late"] * (name == texts["late"]) + ["made up"] * about["synthetic"]
        rows.append((
            name, about["title"] + (f" ({', '.join(notes)})" if notes else ""), about["licence"],
            f"{about['train_bytes']:,}", f"{about['train_tokens']:,}",
            f"{about['heldout_tokens']:,}",
        ))  # fmt: skip
    names = "domain", "text", "licence", "bytes", "tokens", "held-out tokens"
    probes = [
        (name, p["group"], p["domain"], f"{p['items']:,}", f"{100 * p['chance']:.0f} %")
        for name, p in results.get("probes", {}).items()
    ]
    return (
        "<h2>Texts and probes</h2>"
        f"<p>A tokenizer of {texts['tokenizer']:,} entries; the public mix has "
        f"{texts['public']['bytes']:,} bytes, {texts['public']['tokens']:,} tokens. A probe's "
        "items are multiple choice, ranked by the likelihood of a choice a byte.</p>"
        + _table(names, rows)
        + "<br>"
        + _table(("probe", "group", "domain", "items", "chance"), probes)
    )


def _settings(results: Mapping, data: str) -> str:
    rows = [(name, f"{seconds:,.0f}") for name, seconds in results.get("seconds", {}).items()]
    machine = "; ".join(f"{name} {value}" for name, value in results["machine"].items())
    settings = json.dumps(results["settings"], indent=1)
    return (
        f"<h2>Settings</h2><p>{escape(machine)}. All numbers: "
        f'<a href="{escape(data)}">{escape(data)}</a>.</p>'
        f"<details><summary>settings</summary><pre>{escape(settings)}</pre></details>"
        f"<details><summary>seconds</summary>{_table(('piece', 'seconds'), rows)}</details>"
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="data"><tr>{head}</tr>{body}</table></div>'


def _verdict(kind: str) -> str:
    colour, sign = _SIGNS.get(kind, _YES)
    return f'<span class="verdict {colour}">{sign} {kind}</span>'


def _order(judged: Judged) -> int:
    """What is right first, what is missing last."""
    return (
        (OPPOSITE, NOT_CLEAR, MISSING).index(judged.verdict) + 1 if judged.verdict in _SIGNS else 0
    )

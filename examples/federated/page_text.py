"""The page's style sheet, what it asks, and how it says that numbers were made."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from intervals import LEVEL, t_quantile

STYLE = """
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1160px;margin:0 auto;padding:16px}
h1{font-size:1.7em;line-height:1.2;margin:.6em 0 .2em}h2{font-size:1.25em;margin:1.8em 0 .3em}
p,ul{max-width:75ch}a{color:var(--c0)}.faint,small{color:var(--faint)}
.cards{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr))}
figure,.box{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:8px}
figure{padding:8px}.box{padding:2px 16px}
table{border-collapse:collapse;width:100%;background:var(--card);font-size:.92em}
th,td{text-align:left;vertical-align:top;padding:7px 9px;border-bottom:1px solid var(--grid)}
.wide{overflow-x:auto;border:1px solid var(--grid);border-radius:8px}
.verdict{font-weight:600}.verdict,.whole{white-space:nowrap}
.yes{color:var(--c2)}.no{color:var(--c1)}.open,.none{color:var(--faint)}
td details{font-size:.92em}summary{cursor:pointer;color:var(--faint)}
.claims svg{width:120px}
.data td:not(:first-child){font-variant-numeric:tabular-nums}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85em}
@media(max-width:760px){
.claims thead{display:none}
.claims tr{display:block;padding:8px 0;border-bottom:2px solid var(--grid)}
.claims td{display:block;border:0;padding:3px 12px}
.claims td[data-of]::before{content:attr(data-of) ": ";color:var(--faint)}
}
"""


def asked(results: Mapping) -> str:
    """What the papers say and what this study is, in two paragraphs."""
    domains, late = results["texts"]["domains"], results["texts"]["late"]
    seeds = len(results["seeds"])
    return f"""<p>Three papers say how experts that were trained apart work together. FlexMoRE
(arXiv 2602.08818): experts of low rank are as good as those of full size, and which rank is best
depends on the task. Nexus (arXiv 2408.15901): a router that is projected from domain embeddings
takes up new experts better than a linear one. FlexOlmo (arXiv 2507.07024): an owner can take an
expert out, and only its own domain notices. We ask the same of small models, on text that
everyone can get.</p>
<p>{len(domains)} domains: {len(domains) - 1} from the start and one, {escape(late)}, that joins
late; a base trained on a public mix; one expert a domain, trained in isolation beside the frozen
base; {seeds} seed{"s" * (seeds != 1)}. Size: {escape(str(results["size"]))}, on
{escape(str(results["machine"]["device"]))}.</p>"""


def method(seeds: int, claims: int) -> str:
    """How numbers, intervals and verdicts are made."""
    how = "One seed gives no interval: no claim of trainings is decided, they are not clear."
    if seeds > 1:
        degrees = seeds - 1
        how = (
            f"Intervals are Student's t over {seeds} seeds: "
            f"{t_quantile((1 + LEVEL) / 2, degrees):.2f} standard errors, {degrees} "
            f"degree{'s' * (degrees > 1)} of freedom."
        )
    chance = claims * (1 - LEVEL) / 2
    return f"""<h2>How it was measured</h2><div class="box">
<p>{how} A bootstrap over so few seeds would not do: it never leaves the lowest and the highest
one, and with three seeds the truth is outside them in a quarter of all cases. Seeds differ in
weights and batches and share texts and probes: intervals speak of other trainings on these texts,
not of other texts.</p>
<p>Scores depend on the items too, which all seeds share. Their variance, from drawing items again
(paired over ranks), is added, with Satterthwaite's degrees of freedom; no interval gets narrower
by it. The best rank is the vertex of a quadratic of score over log2 rank with fixed effects of
probe and setting in every seed, or the better end where it has no maximum within the tested
ranks.</p>
<p>The mixtures of claims 2 and 3 are chosen for each seed by the other seeds on the other half of
the items, and judged on what had no say: luck in being chosen earns nothing. Losses in per cent
are means over domains. Times have no seeds: their interval is from the 20th to the 80th
percentile.</p>
<p>How an owner's rows of the router start, and the routers' learning rates, were chosen on the
small size, one seed, by held-out loss of the same texts; other sizes take them in proportion to
one over the width. Of the linear and the projected router that choice favours neither by design,
but which is ahead depends on the rates.</p>
<p>A claim is reproduced (of our own: holds) where the whole interval is on its side of the
threshold, opposite where it is on the other side, else not clear, which is no evidence against
it. With {claims} claims and nothing behind any of them, {chance:.1f} would come out right by
chance. FlexMoRE and Nexus report scores of tasks at 0.5 to 33 billion parameters; losses, and
small models, need not follow.</p></div>"""

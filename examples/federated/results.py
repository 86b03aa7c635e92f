"""results.json: what the study found, put together from the pieces that it kept.

All numbers are of held-out text. Losses are in nats. Names: a *domain* is a key of "texts.domains",
a *probe* of "probes", a *rank* is an int or "full" (a full-size expert, no factors).

    format      1
    size        "small", "medium" or "large"
    settings    everything that the results depend on, as `settings.Settings` has it
    machine     {"torch", "device", "library"}
    texts       {"late": domain, "tokenizer": entries,
                 "public": {"bytes", "tokens"},
                 "domains": {domain: {"title", "licence", "synthetic", "train_bytes",
                             "train_tokens", "heldout_bytes", "heldout_tokens"}}}
    probes      {probe: {"group": "knowledge" | "reasoning", "domain", "items",
                 "chance": mean of 1 / number of choices}}
    seeds       a list, one entry a seed, below
    speed       a list, one entry a timed configuration, below
    seconds     what the pieces took, all seeds together: {kind of piece: seconds}

Of these two everything is made:

    Losses      {domain: {"token": nats a token, "byte": nats a byte}}; also of "english", the
                general text that no expert has, except where it says "of its own domain"
    Probes      {probe: {"score": share right, by log-likelihood a byte of the choice,
                 "raw": share right, by log-likelihood of the whole choice,
                 "probability": mean over the items of the right choice's share of the softmax over
                     the choices of their log-likelihoods (whole),
                 "items": how many were scored,
                 "right": a string of 0 and 1, one an item in the probe's order, by "score"}}

A seed's entry:

    seed        0, 1, ..
    base        {"parameters", "bytes", "tokens": trained on, "losses": Losses, "probes": Probes}
    experts     {domain: {"tokens", "relative_delta": |W - W0| / |W0| over all its matrices,
                 "dense": Losses of the whole model trained on this domain alone,
                 "ranks": [{"rank", "bytes", "parameters", "losses": Losses of its own domain,
                            "probes": Probes of its own domain}]}}
                The late domain too. "ranks": base and this expert, 2 of 2 active; bytes and
                parameters are the expert's own (rank "full": of three matrices a layer).
    mixtures    [{"kind", "active": 2 | 4 | "all", "rank", "bytes", "parameters", "losses",
                  "probes", "own_share": {early domain: share}}]
                Base and every early expert, the router's rows as each owner trained them. active
                counts the base. bytes and parameters are those of all experts beside the base, in
                bfloat16. own_share: of a domain's held-out tokens, how many have its expert among
                the selected, mean over the layers. kind:
                    "full"        full-size experts; rank "full"
                    "uniform"     one rank everywhere, plain SVD
                    "weighted"    one rank everywhere, SVD weighted by activations
                    "spectral"    the budget of bytes of a uniform rank, spent by plain spectra
                    "data-aware"  the same budget, spent by spectra weighted by activations
                The last three have "budget": the uniform rank whose bytes they may use, and rank is
                that rank too. "spectral" and "data-aware" have "spread": {"smallest", "median",
                "largest"} of their matrices' ranks, where full-size counts as min(D, F).
    tuned       like mixtures, kinds "full" and "uniform", few of them, after all rows of the router
                were tuned together on the public mix (FlexOlmo's optional step)
    joined      [{"rank", "active", "losses", "own_share"}]: mixtures with the late domain's expert
                added, nothing trained (compare with "mixtures" of the same rank and active)
    opt_out     {"rank", "active", "all": Losses with every early expert,
                 "without": {early domain whose expert is masked: Losses}}
    nexus       {"average": Losses of the mean of the dense models' weights,
                 "continued": Losses of the base after the upcycled models' tokens of fine-tuning,
                 "tokens": {"upcycled", "late"}: of fine-tuning,
                 "routers": {"linear" | "domain" | "projected" | "ridge": {
                     "start"        upcycled, nothing trained
                     "upcycled"     after the fine-tuning on the early domains
                     "late_before"  the late domain's expert added, nothing trained
                     "late_after"   after a short fine-tuning, half of it on the late domain
                     each {"losses": Losses, "own_share": {domain: share}}}}}
                The base's FFN is shared and always on, one routed expert a token; routers.py says
                what the routers are. own_share: of a domain's held-out tokens, how many are routed
                to its own expert, mean over layers; the late domain only where its expert is there.

An entry of speed, in milliseconds, candidates of one "what" timed in turns:

    what        "layer": one layer's forward; "model": the whole decoder's
    name        "dense" (one FFN, the base alone), "full" or the rank
    active      1 (dense), 2, 4 or "all"
    tokens, ms, p20, p80
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FORMAT = 1


def collected(about: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]], speed: list) -> dict:
    """The results, of what is said of all seeds, of each seed's pieces by name, and the speed."""
    return {"format": FORMAT, **about, "seeds": [_seed(*pair) for pair in enumerate(seeds)],
            "speed": speed}  # fmt: skip


def _seed(number: int, pieces: Mapping[str, Any]) -> dict:
    def named(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in pieces.items() if k.startswith(prefix)}

    return {
        "seed": number,
        "base": pieces["base"],
        "experts": named("expert-"),
        "mixtures": list(named("mixture-").values()),
        "tuned": pieces["tuned"],
        "joined": list(named("joined-").values()),
        "opt_out": pieces["opt-out"],
        "nexus": {**pieces["merged"], "routers": named("router-")},
    }

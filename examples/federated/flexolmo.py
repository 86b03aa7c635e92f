"""FlexMoRE's question and opt-out: experts trained apart, at every rank, alone and together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import scores
import torch
from corpus import MIX
from factors import Ranks, cut, relative_delta, spent, spread
from models import Ffn, gate_key, mixture, parameters_of
from parts import Piece
from seeds import Seed
from torch import Tensor
from train import Group

FULL = "full"


def pieces(seed: Seed) -> list[Piece]:
    """All of this part; costs are about a forward of the base over so many tokens."""
    s, corpus = seed.settings, seed.corpus
    heldout = corpus.scored_tokens
    probes = sum(one.tokens for one in corpus.probes)
    scored = 2.0 * (heldout + probes)
    sweep = (*s.ranks, FULL)
    name = seed.name
    found = [Piece(name("base"), 3 * s.base_tokens + scored, partial(_base, seed))]
    for domain in corpus.domains:
        cost = 4 * s.expert_tokens + len(sweep) * scored / len(corpus.domains)
        found.append(Piece(name(f"expert-{domain}"), cost, partial(_expert, seed, domain)))
    for active in s.active:
        for rank in sweep:
            kind = FULL if rank == FULL else "uniform"
            make = partial(_mixture, seed, kind, active, rank)
            found.append(Piece(name(f"mixture-{kind}-{active}-{rank}"), scored, make))
    for kind in ("weighted", "spectral", "data-aware"):
        for active in s.active if kind == "data-aware" else (s.middle,):
            for rank in s.budgets:
                make = partial(_mixture, seed, kind, active, rank)
                found.append(Piece(name(f"mixture-{kind}-{active}-{rank}"), scored, make))
    for rank in (*s.few, FULL):
        make = partial(_joined, seed, rank)
        found.append(Piece(name(f"joined-{rank}"), 2.0 * heldout, make))
    found.append(Piece(name("opt-out"), 2.0 * heldout * len(corpus.domains), partial(_out, seed)))
    cost = 6 * s.tuned_tokens + (len(s.few) + 1) * scored
    found.append(Piece(name("tuned"), cost, partial(_tuned, seed)))
    return found


def early_mixture(seed: Seed, kind: str, active: int | str, rank: int | str, rows=None):
    """(the model, its experts, of data-aware and spectral ranks all of them, else None); rows: of
    the router (L, E, D), in place of those that the owners trained."""
    experts, ranks = early_experts(seed, kind, rank)
    rows = seed.rows(seed.corpus.early) if rows is None else rows
    top_k = active_of(active, len(experts) + 1)
    return mixture(seed.settings, seed.base, experts, rows, top_k, seed.dtype), experts, ranks


def early_experts(seed: Seed, kind: str, rank: int | str) -> tuple[list[Ffn], list[Ranks] | None]:
    """The early experts in one of the kinds of results.py, and their ranks where those differ."""
    early, s = seed.corpus.early, seed.settings
    if kind == FULL:
        return [seed.expert(domain) for domain in early], None
    weighted = kind in ("weighted", "data-aware")
    found = [seed.factored(domain, weighted) for domain in early]
    if kind in ("uniform", "weighted"):
        ranks: Sequence[Any] = [rank] * len(early)
        own = None
    else:
        ranks = own = spent(found, (s.hidden_size, s.intermediate_size), int(rank))
    cuts = [
        cut(one, seed.expert(domain), each)
        for one, domain, each in zip(found, early, ranks, strict=True)
    ]
    return cuts, own


def active_of(active: int | str, experts: int) -> int:
    """Experts a token."""
    return experts if active == "all" else min(int(active), experts)


def owners(domains: Sequence[str]) -> dict[str, int]:
    """The number of each domain's expert in a mixture."""
    return {domain: number for number, domain in enumerate(domains, 1)}


def size_of(experts: Sequence[Ffn]) -> dict[str, int]:
    """Of experts, in bfloat16."""
    parameters = parameters_of(experts)
    return {"bytes": 2 * parameters, "parameters": parameters}


def _base(seed: Seed) -> dict:
    model = seed.base_model(seed.base, seed.dtype)
    parameters = sum(tensor.numel() for tensor in seed.base.values())
    return {
        "parameters": parameters,
        "bytes": 2 * parameters,
        "tokens": seed.plan(seed.settings.base_tokens).tokens,
        "losses": scores.losses(model, seed.corpus.heldout)[0],
        "probes": scores.probes(model, seed.corpus.probes),
    }


def _expert(seed: Seed, domain: str) -> dict:
    s, corpus = seed.settings, seed.corpus
    text = {domain: corpus.heldout[domain]}
    found = []
    for rank in (*s.ranks, FULL):
        ffn = cut(seed.factored(domain), seed.expert(domain), rank)
        model = seed.pair(ffn, domain, seed.dtype)
        entry = {"rank": rank, **size_of([ffn]), "losses": scores.losses(model, text)[0],
                 "probes": scores.probes(model, corpus.probes_of(domain))}  # fmt: skip
        found.append(entry)
    dense = seed.base_model(seed.dense(domain), seed.dtype)
    return {
        "tokens": seed.plan(s.expert_tokens).tokens,
        "relative_delta": relative_delta(seed.expert(domain), seed.base_ffn),
        "dense": scores.losses(dense, corpus.heldout)[0],
        "ranks": found,
    }


def _mixture(seed: Seed, kind: str, active: int | str, rank: int | str, rows=None) -> dict:
    model, experts, ranks = early_mixture(seed, kind, active, rank, rows)
    about: dict[str, Any] = {"kind": kind, "active": active, "rank": rank, **size_of(experts)}
    if kind not in (FULL, "uniform"):
        about["budget"] = rank
    if ranks is not None:
        s = seed.settings
        about["spread"] = spread(ranks, min(s.hidden_size, s.intermediate_size))
    owner = owners(seed.corpus.early)
    losses, shares = scores.losses(model, seed.corpus.heldout, owner=owner)
    probes = scores.probes(model, seed.corpus.probes)
    return about | {"losses": losses, "probes": probes, "own_share": shares}


def _joined(seed: Seed, rank: int | str) -> dict:
    """The late domain's expert beside the others, with the row that its owner trained."""
    s, domains = seed.settings, seed.corpus.domains
    experts = [cut(seed.factored(domain), seed.expert(domain), rank) for domain in domains]
    top_k = active_of(s.middle, len(experts) + 1)
    model = mixture(s, seed.base, experts, seed.rows(domains), top_k, seed.dtype)
    losses, shares = scores.losses(model, seed.corpus.heldout, owner=owners(domains))
    return {"rank": rank, "active": s.middle, "losses": losses, "own_share": shares}


def _out(seed: Seed) -> dict:
    """Each domain's loss with each of the experts masked, in the mixture of full-size ones."""
    active, early = seed.settings.middle, seed.corpus.early
    model, experts, _ = early_mixture(seed, FULL, active, FULL)
    without = {}
    for domain, number in owners(early).items():
        mask = torch.ones(len(experts) + 1, dtype=torch.bool, device=seed.device)
        mask[number] = False
        without[domain] = scores.losses(model, seed.corpus.heldout, mask=mask)[0]
    every = scores.losses(model, seed.corpus.heldout)[0]
    return {"rank": FULL, "active": active, "all": every, "without": without}


def tuned_rows(seed: Seed) -> Tensor:
    """(L, E, D): all rows of the router after they were tuned together on the public mix, the
    experts full-size and frozen (FlexOlmo, arXiv 2507.07024, section 3)."""
    return seed.stored("tuned", lambda: {"rows": _tune(seed)})["rows"]


def _tune(seed: Seed) -> Tensor:
    s, early = seed.settings, seed.corpus.early
    experts, rows = [seed.expert(domain) for domain in early], seed.rows(early)
    top_k = active_of(s.middle, len(experts) + 1)
    model = mixture(s, seed.base, experts, rows.clone(), top_k, None)
    named = dict(model.named_parameters())
    gates = [named[gate_key(layer)] for layer in range(s.layers)]
    plan = seed.plan(s.tuned_tokens, z_loss=s.z_loss, balance=s.balance)
    seed.train(model, [Group(gates, s.tuned_rate)], seed.source(MIX), plan, "tuned")
    return torch.stack(gates)


def _tuned(seed: Seed) -> list[dict]:
    rows, found = tuned_rows(seed), []
    for rank in (*seed.settings.few, FULL):
        kind = FULL if rank == FULL else "uniform"
        found.append(_mixture(seed, kind, seed.settings.middle, rank, rows))
    return found

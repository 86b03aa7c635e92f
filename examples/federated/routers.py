"""Nexus's question: which router for experts cut from independently trained dense models.

The upcycled model (Nexus, arXiv 2408.15901, section 2): the base's FFN shared and always on, the
dense models' FFNs as routed experts, one a token, all other weights their mean. Routers, which see
equal tokens of fine-tuning, all weights trained:

    linear      random rows
    domain      rows made of the domains' embeddings (FlexOlmo)
    projected   rows projected from the same embeddings (Nexus)
    ridge       rows in closed form from owners' statistics, each with its expert alone, and never
                trained (DUME)

Then the late domain joins: its FFN becomes an expert, its other weights go into the mean with
1 / (n + 1). Its row is random, made of its embedding, or projected; ridge solves all rows again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import scores
import torch
from flexolmo import owners
from models import config_of, expert_tensors, ffn_of, mean_of, others_of
from parts import Piece
from seeds import Seed
from torch import Tensor
from train import Group, Source

import flexmore_kernels as fk
from flexmore_kernels.router_ridge import RidgeStatistics, from_ridge
from flexmore_kernels.router_rows import from_embeddings
from flexmore_kernels.shared_weights import is_shared, merged

ROUTERS = ("linear", "domain", "projected", "ridge")
ROW_STD = 0.02
"""Of a random row's entries, as the library makes them."""
_MOVED = 0.35
"""E |silu(a) b| of standard normal a, b: the mean size of what the projector's last matrix sees."""


def pieces(seed: Seed) -> list[Piece]:
    """All of this part; costs as in flexolmo.py."""
    s, corpus = seed.settings, seed.corpus
    heldout = corpus.scored_tokens
    dense = 3 * s.dense_tokens * len(corpus.domains)
    tuned = 8 * (s.upcycled_tokens + s.late_tokens) + 8 * heldout
    found = [Piece(seed.name("merged"), 3 * s.upcycled_tokens + 2 * heldout + dense,
                   partial(_merged, seed))]  # fmt: skip
    for router in ROUTERS:
        found.append(Piece(seed.name(f"router-{router}"), tuned, partial(_router, seed, router)))
    return found


def _merged(seed: Seed) -> dict:
    """What needs no router: the mean of the dense models; the base trained as long as they are."""
    s, corpus = seed.settings, seed.corpus
    average = seed.base_model(mean_of([seed.dense(d) for d in corpus.early]), seed.dtype)
    model = seed.base_model({name: t.clone() for name, t in seed.base.items()})
    plan = seed.plan(s.upcycled_tokens)
    trained = [p for n, p in model.named_parameters() if ".mlp.gate." not in n]
    groups = [Group(trained, s.upcycled_rate)]
    seed.train(model, groups, seed.source(*corpus.early), plan, "upcycled")
    continued = seed.base_model(model.state_dict(), seed.dtype)
    return {
        "average": scores.losses(average, corpus.heldout)[0],
        "continued": scores.losses(continued, corpus.heldout)[0],
        "tokens": {"upcycled": plan.tokens, "late": seed.plan(s.late_tokens).tokens},
    }


def _router(seed: Seed, router: str) -> dict:
    s, corpus = seed.settings, seed.corpus
    early, domains = corpus.early, corpus.domains
    model = _upcycled(seed, router)
    found = {"start": _scored(seed, model, early)}
    # One name for all routers, so that all see the same windows.
    _tune(seed, router, model, seed.source(*early), s.upcycled_tokens, "upcycled")
    found["upcycled"] = _scored(seed, model, early)
    model = _extended(seed, router, model)
    found["late_before"] = _scored(seed, model, domains)
    shares = [(1 - s.late_share) / len(early)] * len(early) + [s.late_share]
    texts = zip((corpus.train[domain] for domain in domains), shares, strict=True)
    _tune(seed, router, model, Source.of(*texts), s.late_tokens, "late")
    found["late_after"] = _scored(seed, model, domains)
    return found


def _new(seed: Seed, router: str, experts: int, tensors: dict[str, Tensor]):
    """A model of so many experts beside the shared base that holds these tensors; its routers are
    as the library makes them, but for what the tensors have of them."""
    more: dict[str, Any] = {"shared_expert": True}
    if router == "projected":
        more |= {"router": "projected", "domain_embedding_size": seed.settings.hidden_size}
    config = config_of(seed.settings, [0] * (experts + 1), 1, **more)
    torch.manual_seed(seed.number)  # the same random rows for whoever wants some
    model = fk.FlexMoREForCausalLM(config, device=seed.device)
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert all(".mlp.gate." in name for name in missing)
    return model.requires_grad_(False)


def _upcycled(seed: Seed, router: str):
    """The dense models as one, nothing of it trained."""
    early, layers = seed.corpus.early, seed.settings.layers
    models = [seed.dense(domain) for domain in early]
    tensors = mean_of([others_of(tensors) for tensors in models])
    for number, expert in enumerate([seed.base, *models]):
        tensors |= expert_tensors(ffn_of(expert, layers), number)
    model = _new(seed, router, len(early), tensors)
    _write_rows(seed, router, model, owners(early))
    return model


def _extended(seed: Seed, router: str, old):
    """The model with the late domain's expert, nothing of it trained."""
    domains, count = seed.corpus.domains, len(seed.corpus.early)
    late = seed.dense(seed.corpus.late)
    tensors, gates = {}, {}
    for name, tensor in old.state_dict().items():
        if is_shared(name):
            tensors[name] = merged(tensor, late[name], count)
        elif name.endswith(("gate.weight", "gate.domain_embeddings")):
            gates[name] = tensor  # has no row for the late domain's expert yet
        else:
            tensors[name] = tensor
    tensors |= expert_tensors(ffn_of(late, seed.settings.layers), count + 1)
    model = _new(seed, router, count + 1, tensors)
    with torch.no_grad():
        for name, rows in model.state_dict().items():
            if name in gates:
                rows[: count + 1] = gates[name]
    new = {seed.corpus.late: count + 1}
    _write_rows(seed, router, model, owners(domains) if router == "ridge" else new)
    return model


def _write_rows(seed: Seed, router: str, model, owner: dict[str, int]) -> None:
    """The rows of these domains' experts; random ones are there already."""
    if router in ("domain", "projected"):
        # As long as a random row, where the row is the embedding itself.
        scale = ROW_STD * seed.settings.hidden_size**0.5 if router == "domain" else 1.0
        found = {n: scale * seed.corpus.embeddings[domain] for domain, n in owner.items()}
        from_embeddings(model, found)
    elif router == "ridge":
        read, base = seed.as_scored(model), seed.name("base")
        found = {
            number: RidgeStatistics.collect(
                read, list(seed.sample(domain)), expert=number, base=base, batch=64
            )
            for domain, number in owner.items()
        }
        from_ridge(model, found)


def _tune(seed: Seed, router: str, model, source: Source, tokens: int, what: str) -> None:
    """Train all weights of an upcycled model, but rows in closed form."""
    s = seed.settings
    rest = [p for n, p in model.named_parameters() if ".mlp.gate." not in n]
    mask = torch.ones(model.config.num_experts, dtype=torch.bool, device=seed.device)
    mask[0] = False  # the shared expert is outside of the softmax
    groups = [Group(rest, s.upcycled_rate), *_router_groups(router, model, s.router_rate)]
    seed.train(model, groups, source, seed.plan(tokens, balance=s.balance, mask=mask), what)


def _router_groups(router: str, model, rate: float) -> list[Group]:
    """What is trained of a router.

    A step of AdamW moves each entry of the projector's last matrix by its rate, and so a row by as
    much of each of its h hidden numbers: with that much less of a rate rows move like those of a
    linear router.
    """
    gates = [block.mlp.gate for block in model.model.layers]
    if router == "ridge":
        return []
    if router != "projected":
        return [Group([gate.weight for gate in gates], rate)]
    first, last = [g.projector_in.weight for g in gates], [g.projector_out.weight for g in gates]
    return [Group(first, rate), Group(last, rate / (_MOVED * last[0].shape[1]))]


def _scored(seed: Seed, model, domains) -> dict:
    held = seed.as_scored(model)
    losses, shares = scores.losses(held, seed.corpus.heldout, owner=owners(domains))
    return {"losses": losses, "own_share": shares}

"""Independently trained dense models as one mixture: Nexus's upcycling.

    base and shared expert   the seed's FFN, from which all dense models were trained
    expert i                 the FFN of dense model i, full-size, or the best of a rank of its
                             difference to the seed's
    every other weight       the mean over the dense models
    router                   projected from domain embeddings, or linear

Source: Nexus (arXiv 2408.15901, section 2); a linear router started from embeddings: FlexOlmo
(arXiv 2507.07024, section 3). A short training of the mixture is meant to follow.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_base import BaseCheckpoint, expert_entry, put_entry
from .cards import KEY, Card, check_cards, config_cards
from .checkpoint import read_tensors
from .checkpoint_change import Say, Tensors, Where, mark_of, names_of, write_layers
from .checkpoint_config import shortest
from .checkpoint_folders import refuse_existing
from .checkpoint_forms import config_for
from .checkpoint_layout import PROJECTIONS, Layout, mlp_prefix
from .checkpoint_shared import comparable, mean_tensors
from .checkpoint_writer import fingerprint
from .checks import FLOATS, check_int, check_one_of, check_tensor
from .members import finite
from .reranking import parse_rank, reranked
from .router import make_router
from .router_kinds import ROUTERS, check_router_sizes, check_shared_expert
from .shared_weights import check_shared, is_shared


def upcycle(
    seed_dir: Where,
    dense_dirs: Sequence[Where],
    out: Where,
    *,
    embeddings: Tensor | None = None,
    router: str = "linear",
    projector_size: int | None = None,
    shared_expert: bool = True,
    ranks: Any = None,
    top_k: int = 1,
    cards: Iterable | None = None,
    seed: int = 0,
    say: Say = None,
) -> Layout:
    """Write the mixture of a seed and n dense models, as experts 0 and 1 to n.

    Args:
        seed_dir, dense_dirs: dense OLMo-2 checkpoints, or FlexMoRE ones, of which expert 0 counts,
            of one shape.
        out: a new or an empty directory; written layer by layer, in the memory of one, whole or
            not at all. The same call takes up what a killed one has written.
        embeddings: of the dense models' domains (n, m), or of the seed's too, first, (n + 1, m),
            as a mixture whose router may select the base needs them. Needed by a projected router.
        router: "projected", or "linear", whose rows start as the embeddings, m = D, or without any
            as normal(0.02).
        projector_size: h of a projected router; None: D.
        shared_expert: the seed's FFN is always on, with weight 1 (Nexus); False: it is one of
            those between which the router chooses.
        ranks: None, full-size experts; an entry of `expert_ranks` for all (an int, 0 for full-size,
            or a triple); or a list of n entries.
        top_k: routed experts a token.
        cards: n + 1 cards, the seed's first; default: "base", and the directories' names.
        seed: of the router's random numbers, with a layer's number. Same seed, same bits.
        say: is told how far it is.

    The projector starts as `ProjectedRouter.reset_parameters` has it, W_1 divided by the mean
    length of the embeddings: rows then are about normal(0.02), whatever the embedder's scale, as
    those of a linear router are. Larger ones would make the softmax choose before anything is
    learned; with smaller ones all experts weigh the same, and silu, linear near 0, would leave a
    router that is quadratic in d.

    Raises ValueError by name: models of other sizes, embeddings of another number or width, ranks.
    """
    refuse_existing(Path(out))
    job = _Upcycle(seed_dir, dense_dirs, ranks)
    count = len(job.dense) + 1
    check_one_of("router", router, ROUTERS)
    check_one_of("shared_expert", shared_expert, (False, True))
    shared = check_shared_expert(shared_expert, count)
    found = job.embeddings(embeddings, router, shared)
    width = found.shape[1] if router == "projected" else None
    m, h = check_router_sizes(router, width, projector_size)
    top_k = check_int("top_k", top_k, 1, count - (shared is not None))
    named = check_cards(default_cards(dense_dirs) if cards is None else cards, count, "cards")
    config = job.seed.config | {
        "model_type": "flexmore",
        "architectures": None,
        "num_experts_per_tok": top_k,
        "router": router,
        "domain_embedding_size": m,
        "projector_size": h,
        "shared_expert": shared_expert,
        KEY: config_cards(named),
    }
    config = {name: value for name, value in config.items() if value is not None}
    entries = (0, *map(shortest, job.triples))
    written = config_for(config, [entries] * job.num_layers)
    sizes = (m, h)

    def read(layer: int | None) -> Tensors:
        names = [name for name in names_of(job.seed, layer) if is_shared(name)]
        tensors = mean_tensors(job.dense, names)
        if layer is None:
            return tensors
        tensors |= job.experts(layer)
        like = tensors[f"{mlp_prefix(layer)}experts.0.gate_proj.weight"]
        rows = _router(router, sizes, found, count, like, seed + layer)
        return tensors | {f"{mlp_prefix(layer)}gate.{name}": t for name, t in rows.items()}

    options = (mark_of(embeddings), seed, written)
    print_of = fingerprint([job.seed, *job.dense], task="upcycle", options=options)
    return write_layers(out, job.seed, written, print_of, read, say)


class _Upcycle:
    """The seed, the dense models, and what becomes of their FFNs."""

    def __init__(self, seed_dir: Where, dense_dirs: Sequence[Where], ranks: Any) -> None:
        if isinstance(dense_dirs, (str, bytes, os.PathLike)) or not dense_dirs:
            raise ValueError(f"dense_dirs: got {dense_dirs!r}; accepted: one or more directories")
        self.seed = BaseCheckpoint(seed_dir).layout
        self.dense = [BaseCheckpoint(directory).layout for directory in dense_dirs]
        self.num_layers = len(self.seed.layer_ranks)
        for layout in self.dense:
            _check_alike(self.seed, layout)
            ends = (".experts.0.gate_proj.weight", ".experts.0.down_proj.weight")
            names = [n for n in self.seed.shapes if is_shared(n) or n.endswith(ends)]
            check_shared(layout, names, self.seed.shapes)
        limit = min(self.seed.config["hidden_size"], self.seed.config["intermediate_size"])
        count = len(self.dense)
        each = ranks if isinstance(ranks, list) else [0 if ranks is None else ranks] * count
        if len(each) != count:
            raise ValueError(f"ranks: got {len(each)}; accepted: one a dense model, {count}")
        self.triples = [parse_rank(rank, limit) for rank in each]

    def embeddings(self, given: Tensor | None, router: str, shared: int | None) -> Tensor | None:
        """(n + 1, m), zeros for a shared seed without one; None for none."""
        if given is None:
            if router == "projected":
                raise ValueError("embeddings: got None; accepted: (n, m), from which rows are made")
            return None
        count = len(self.dense)
        check_tensor("embeddings", given, ("n", "m"), FLOATS)
        if not bool(finite("embeddings", given).any()):
            raise ValueError("embeddings: got zeros alone; accepted: embeddings of domains")
        accepted = (count + 1,) if shared is None else (count, count + 1)
        if given.shape[0] not in accepted:
            why = "" if shared is not None else ", the seed's first, which the router may select"
            words = " or ".join(map(str, accepted))
            raise ValueError(f"embeddings: got {given.shape[0]} rows; accepted: {words}{why}")
        D = self.seed.config["hidden_size"]
        if router == "linear" and given.shape[1] != D:
            raise ValueError(f"embeddings: got width {given.shape[1]}; accepted: D, {D}, as rows")
        given = given.detach().cpu()
        seeds = given.new_zeros(count + 1 - given.shape[0], given.shape[1])
        return torch.cat([seeds, given])

    def experts(self, layer: int) -> Tensors:
        """The seed's FFN as expert 0, the others behind it."""
        done: Tensors = {}
        for number, layout in enumerate([self.seed, *self.dense]):
            prefix = f"{mlp_prefix(layer)}experts.0."
            names = [name for name in names_of(layout, layer) if name.startswith(prefix)]
            stored = read_tensors(layout, names=names)
            for place, projection in enumerate(PROJECTIONS):
                own = expert_entry(stored, layer, 0, projection)
                if number:
                    base = expert_entry(done, layer, 0, projection)
                    entry = reranked(own, base, self.triples[number - 1][place])
                    own = entry.to(base.dtype) if isinstance(entry, Tensor) else entry
                put_entry(done, layer, number, projection, own)
        return done


def _check_alike(seed: Layout, layout: Layout) -> None:
    """Refuse a dense model that computes otherwise than the seed."""
    theirs = comparable(layout)
    for name, value in comparable(seed).items():
        if theirs[name] != value:
            raise ValueError(
                f"config.json: {name} is {value!r} in {seed.directory} and {theirs[name]!r} in "
                f"{layout.directory}; accepted: the same"
            )


def _router(
    kind: str,
    sizes: tuple[int | None, int | None],
    embeddings: Tensor | None,
    count: int,
    like: Tensor,
    seed: int,
) -> Tensors:
    """A layer's router by the names below `gate.`, in like's dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = make_router(kind, count, like.shape[1], False, sizes, dtype=torch.float32)
        router.reset_parameters()
    with torch.no_grad():
        if kind == "projected":
            lengths = embeddings.double().norm(dim=1)
            router.projector_in.weight /= float(lengths[lengths > 0].mean())
            router.domain_embeddings.copy_(embeddings)
        elif embeddings is not None:
            router.weight.copy_(embeddings)
    return {name: tensor.to(like.dtype) for name, tensor in router.state_dict().items()}


def default_cards(directories: Sequence[Where]) -> list[Card]:
    """ "base", and each directory's name, numbered where two bear the same."""
    names = [Path(directory).resolve().name for directory in directories]
    cards = [Card("base")]
    for number, name in enumerate(names, start=1):
        alone = names.count(name) == 1 and name != "base"
        cards.append(Card(name if alone else f"{name}-{number}"))
    return cards


def ordered_embeddings(vectors: Mapping[str, Tensor], cards: Sequence[Card]) -> Tensor:
    """The embeddings of these experts, by their names, as `upcycle` takes them.

    The base's comes first where there is one. Raises ValueError naming an expert without one.
    """
    names = [card.name for card in cards]
    for name in names[1:]:
        if name not in vectors:
            raise ValueError(
                f"embeddings: none of {name!r}; accepted: one of each, of {', '.join(names[1:])}"
            )
    return torch.stack([vectors[name] for name in names if name in vectors])

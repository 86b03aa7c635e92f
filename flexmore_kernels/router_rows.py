"""Rows for the routers of a model that is there: from domain embeddings, or from hidden states.

    embeddings    g_e = d_e, in every layer: FlexOlmo (arXiv 2507.07024, section 3)
    prompts       g_e from the mean x of each prompt's tokens, prompts weighing the same
    hidden        g_e from the mean x of all tokens of documents

with x what each layer's router sees. router_ridge.py has rows in closed form, router_tune.py trains
them. Each function checks everything before it writes, and writes rows alone: of all layers, of the
experts that it is given something for, or of `experts`. A shared expert's row, which no token
reads, is left as it is. Maths: reference/router_rows.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, check_one_of, check_tensor
from .domain_embedding import check_embeddings
from .model import FlexMoREForCausalLM
from .router import ProjectedRouter
from .router_inputs import Ids, Reading, Say, Sums, check_texts, expert_of, gather, layers_of

THROUGH = ("base", "own", "model")
Experts = Iterable[int | str] | None


def from_embeddings(
    model: FlexMoREForCausalLM,
    embeddings: Tensor | Mapping[int | str, Tensor],
    *,
    experts: Experts = None,
) -> None:
    """Rows from domain embeddings: the same vector for an expert in every layer, not normalised.

    A linear router's row is the embedding, whose width must be D. A projected one keeps it in
    `gate.domain_embeddings` and makes the row of it (Nexus); width `domain_embedding_size`.

    Args:
        model: its routers are written to.
        embeddings: (E, m), a row an expert; or vectors (m,) by expert, number or name.
        experts: write theirs alone.

    Raises ValueError or TypeError: another width, an unknown expert, NaN. Source: FlexOlmo (arXiv
    2507.07024, section 3, and its dense_to_expert_moe.py). Deterministic.
    """
    layers = layers_of(model)
    if isinstance(embeddings, Tensor):
        check_tensor("embeddings", embeddings, (model.config.num_experts, "m"), FLOATS)
        embeddings = dict(enumerate(embeddings))
    vectors = by_expert(model, check_embeddings(embeddings), "embeddings")
    names = written(model, vectors, experts)
    rows = torch.stack([vectors[e] for e in names])
    for layer in layers:
        _check_width(rows.shape[1], _target(layer.gate).shape[1], is_projected(layer))
    _write(layers, [rows] * len(layers), names)


def from_prompts(
    model: FlexMoREForCausalLM,
    prompts: Mapping[int | str, Sequence[Ids]],
    *,
    experts: Experts = None,
    through: str = "base",
    batch: int = 8,
    length: int = 2048,
    say: Say = None,
) -> None:
    """Rows from a few prompts that say what an expert is for; as `from_hidden`, but each prompt
    weighs the same, however long it is.

    mergekit's `gate_mode: hidden` takes the same means, of a dense base; it scales each to length
    1 and does not centre them, so that what all texts share is in every logit.
    """
    _from_means(model, prompts, experts, through, Reading(batch, length, say), by_document=True)


def from_hidden(
    model: FlexMoREForCausalLM,
    documents: Mapping[int | str, Sequence[Ids]],
    *,
    experts: Experts = None,
    through: str = "base",
    batch: int = 8,
    length: int = 2048,
    say: Say = None,
) -> None:
    """Rows from what each layer's router sees of an expert's documents, every token weighing 1.

        u_e = mean of x over the tokens of e,   v = mean over e of u_e,   c_e = u_e - v
        g_e = s a_e,   a_e = c_e - v (c_e . v) / (v . v)

    Centred, since what all experts' texts share moves all logits alike; without the part along v,
    since that would favour one expert for every token, and a linear router has no other constant
    to set against it. s, one a layer, makes the standard deviation of the logits x . g_e over
    these tokens and experts 1, each expert's text weighing the same: so the softmax is neither flat
    nor a step, whatever the size of x in a layer.

    Args:
        model: its linear routers are written to. bfloat16 will do: sums are float64.
        documents: token ids, by expert (number or name), of two experts or more.
        experts: write theirs alone; the text of all is used.
        through: which expert the texts pass through in each layer: "base", expert 0 (x is then
            another text's alone, not another expert's); "own", each expert's own; "model", as it
            routes now.
        batch, length: sequences at a time, tokens a sequence; longer documents are cut.
        say: is told how far it is.

    Raises ValueError or TypeError: a projected router, whose rows are not its own; texts of one
    expert alone; no ids; texts that no layer tells apart. One pass through the model; takes 8 D^2
    bytes a layer on its device. Deterministic on the CPU. Source: mergekit's mixtures, see
    `from_prompts`; centring and scale are this library's.
    """
    _from_means(model, documents, experts, through, Reading(batch, length, say), by_document=False)


def _from_means(model, documents, experts, through, reading, by_document) -> None:
    layers = layers_of(model)
    name = "prompts" if by_document else "documents"
    check_linear(model, f"from_{'prompts' if by_document else 'hidden'}")
    check_one_of("through", through, THROUGH)
    reading.check()
    texts = by_expert(model, documents, name)
    texts = {e: check_texts(model, texts[e], f"{name}[{e}]") for e in sorted(texts)}
    if len(texts) < 2:
        raise ValueError(f"{name}: got those of one expert; accepted: of two or more")
    names, device = written(model, texts, experts), layers[0].gate.weight.device
    sums = [Sums(model.config.hidden_size, device, gram=True) for _ in layers]
    means: list[list[Tensor]] = [[] for _ in layers]
    for expert, own in texts.items():
        parts = len(own) if by_document else sum(map(len, own))
        weights = [1 / (parts * (len(ids) if by_document else 1)) for ids in own]
        alone = {"base": 0, "own": expert, "model": None}[through]
        gather(model, own, sums, reading, expert=alone, weights=weights, what=f"{name}[{expert}]")
        for n, one in enumerate(sums):  # a mean for each expert, one moment for all
            means[n].append(one.total.clone())
            one.total.zero_()
    rows = []
    for n, (u, one) in enumerate(zip(means, sums, strict=True)):
        u_ED = torch.stack(u)
        v_D = u_ED.mean(0)
        a_ED = u_ED - v_D
        a_ED = a_ED - torch.outer(a_ED @ v_D, v_D) / v_D.square().sum().clamp(min=1e-300)
        squares_E = ((a_ED @ one.gram) * a_ED).sum(1) / len(texts)
        rows.append(a_ED / squares_E.mean().clamp(min=0).sqrt())
        if not bool(rows[n].isfinite().all()):
            raise ValueError(
                f"{name}: x of layer {n} is alike for all experts; accepted: texts that differ"
            )
    order = {expert: row for row, expert in enumerate(texts)}
    _write(layers, [r[[order[e] for e in names]] for r in rows], names)


def by_expert(model: FlexMoREForCausalLM, given: Any, argument: str) -> dict[int, Any]:
    """What is given by name or number, by number; ValueError for an unknown expert or one twice."""
    if not isinstance(given, Mapping) or not given:
        got = "none" if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"{argument}: got {got}; accepted: something for one expert or more")
    found: dict[int, Any] = {}
    for name, value in given.items():
        expert = expert_of(model, name, argument)
        if expert in found:
            raise ValueError(f"{argument}: got expert {expert} twice; accepted: each once")
        found[expert] = value
    return found


def written(model: FlexMoREForCausalLM, given: Iterable[int], experts: Experts) -> list[int]:
    """The experts whose rows are to be written, in order; ValueError where there is none."""
    shared, given = layers_of(model)[0].shared_expert, sorted(given)
    open_to = [e for e in given if e != shared]
    if experts is None:
        names = open_to
    else:
        names = sorted({expert_of(model, e, "experts") for e in experts})
    wrong = [e for e in names if e not in open_to]
    if wrong or not names:
        what = f"expert {wrong[0]}" if wrong else "no expert whose row is read"
        raise ValueError(
            f"experts: got {what}; accepted: of {open_to}, which something is given for and whose "
            "rows are read"
        )
    return names


def is_projected(layer) -> bool:
    """Whether a layer's router projects its rows from domain embeddings."""
    return isinstance(layer.gate, ProjectedRouter)


def check_linear(model: FlexMoREForCausalLM, what: str) -> None:
    """ValueError for a projected router, whose rows are made, not kept."""
    if any(map(is_projected, layers_of(model))):
        raise ValueError(
            f"router: got 'projected' in {what}, and its rows are made by the projector; accepted: "
            "router='linear'; or from_embeddings, then tune"
        )


def write_rows(model: FlexMoREForCausalLM, rows: Sequence[Tensor], experts: Sequence[int]) -> None:
    """Write a linear router's rows, for each layer (n, D), of these experts; all or none."""
    _write(layers_of(model), rows, experts)


def _target(gate) -> Tensor:
    return gate.domain_embeddings if isinstance(gate, ProjectedRouter) else gate.weight


def _check_width(found: int, width: int, projected: bool) -> None:
    if found == width:
        return
    if projected:
        accepted = f"the router's domain_embedding_size, {width}"
    else:
        accepted = (
            f"hidden_size, {width}, for a linear router; or router='projected' with "
            f"domain_embedding_size={found}"
        )
    raise ValueError(f"embeddings: got width {found}; accepted: {accepted}")


@torch.no_grad()
def _write(layers: Sequence, rows: Sequence[Tensor], experts: Sequence[int]) -> None:
    new = [part.to(_target(layer.gate)) for layer, part in zip(layers, rows, strict=True)]
    for number, part in enumerate(new):
        if not bool(part.isfinite().all()):
            kind = str(part.dtype).removeprefix("torch.")
            raise ValueError(
                f"rows: those of layer {number} are NaN, or beyond {kind}; accepted: finite ones"
            )
    for layer, part in zip(layers, new, strict=True):
        _target(layer.gate)[list(experts)] = part

"""One mixture of a finished study as a FlexMoRE checkpoint: small, with cards and a model card.

Base and the experts of all domains, the late one too, at data-aware ranks; all rows of the router
are tuned together on all domains' text, since here it is all at hand. bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import scores
import tokens
import torch
from corpus import Corpus
from factors import cut, spent
from flexolmo import active_of, owners, size_of
from models import Ffn, gate_key, mixture
from parts import Store
from seeds import Seed
from settings import Settings
from train import Group

from flexmore_kernels.checkpoint import save_checkpoint
from flexmore_kernels.checkpoint_folders import refuse_existing
from flexmore_kernels.checkpoint_writer import write_json, write_text
from flexmore_kernels.domains_demo import PROMPTS
from flexmore_kernels.text import TOKENIZER_FILE

CARD = Path(__file__).with_name("model_card.md")
PROMPT, FOLLOWS = 40, 200
"""Tokens of a sample's two parts."""


def export(settings: Settings, corpus: Corpus, store: Store, directory: Path) -> None:
    """Write the checkpoint. Raises ValueError where seed 0 is not finished, or for a directory that
    is not empty."""
    seed = Seed(settings, corpus, store, 0)
    if not store.has("speed"):
        raise ValueError(f"--export: {store.directory} is not finished; accepted: a study that is")
    refuse_existing(directory)
    domains = corpus.domains
    found = [seed.factored(domain, weighted=True) for domain in domains]
    ranks = spent(found, (settings.hidden_size, settings.intermediate_size), settings.shipped_rank)
    experts = [
        cut(one, seed.expert(domain), each)
        for one, domain, each in zip(found, domains, ranks, strict=True)
    ]
    model = _tuned(seed, experts, domains)
    model.config.experts = [{"name": "base"}] + [
        {"name": domain, "licence": corpus.about["texts"]["domains"][domain]["licence"]}
        for domain in domains
    ]
    tensors = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items()}
    card = _card(seed, model, experts)
    tokenizer = (store.directory / TOKENIZER_FILE).read_text()
    save_checkpoint(directory, tensors, {**model.config.to_dict(), "torch_dtype": "bfloat16"})
    write_text(directory / TOKENIZER_FILE, tokenizer)
    write_json(directory / PROMPTS, samples(corpus, store.directory))
    write_text(directory / "README.md", card)


def samples(corpus: Corpus, directory: Path) -> dict[str, dict[str, str]]:
    """For `flexmore demo`: of each domain the begin of its held-out text, a prompt and what
    follows it, whole characters."""
    tokenizer = tokens.read(directory)
    found = {}
    for domain in corpus.domains:
        ids = corpus.heldout[domain].windows[0].tolist()
        parts = (ids[:PROMPT], ids[PROMPT : PROMPT + FOLLOWS])
        prompt, text = (tokenizer.decode(part).strip("\ufffd") for part in parts)
        found[domain] = {"prompt": prompt, "text": text}
    return found


def _tuned(seed: Seed, experts: Sequence[Ffn], domains: Sequence[str]):
    """The mixture, its router tuned, in float32."""
    s = seed.settings
    top_k = active_of(s.middle, len(experts) + 1)
    model = mixture(s, seed.base, experts, seed.rows(domains).clone(), top_k, None)
    named = dict(model.named_parameters())
    gates = [named[gate_key(layer)] for layer in range(s.layers)]
    plan = seed.plan(s.tuned_tokens, z_loss=s.z_loss, balance=s.balance)
    seed.train(model, [Group(gates, s.tuned_rate)], seed.source(*domains), plan, "shipped")
    return model


def _card(seed: Seed, model, experts: Sequence[Ffn]) -> str:
    """README.md: what it is, of which texts under which licences, how good, and for what not."""
    s, corpus, model = seed.settings, seed.corpus, seed.as_scored(model)
    texts = corpus.about["texts"]["domains"]
    every = scores.losses(model, corpus.heldout)[0]
    base = scores.losses(seed.base_model(seed.base, seed.dtype), corpus.heldout)[0]
    lines = []
    for domain, number in owners(corpus.domains).items():
        mask = torch.ones(len(experts) + 1, dtype=torch.bool, device=seed.device)
        mask[number] = False
        own = {domain: corpus.heldout[domain]}
        without = scores.losses(model, own, mask=mask)[0][domain]
        numbers = (base[domain], every[domain], without)
        about = texts[domain]
        lines.append(
            f"| {domain} | {about['title']} | {about['licence']} | "
            + " | ".join(f"{one['byte']:.3f}" for one in numbers)
            + " |"
        )
    found = scores.probes(model, corpus.probes)
    right = [f"| {one.name} | {one.group} | {one.domain} | {one.chance:.2f} | "
             f"{found[one.name]['score']:.2f} |" for one in corpus.probes]  # fmt: skip
    return CARD.read_text(encoding="utf-8").format(
        parameters=sum(tensor.numel() for tensor in model.state_dict().values()),
        own=size_of(experts)["parameters"], count=len(experts) + 1,
        top_k=model.config.num_experts_per_tok, layers=s.layers, hidden=s.hidden_size,
        ffn=s.intermediate_size, vocabulary=s.vocabulary, length=s.length,
        base_tokens=seed.plan(s.base_tokens).tokens,
        expert_tokens=seed.plan(s.expert_tokens).tokens, rank=s.shipped_rank,
        texts="\n".join(lines), probes="\n".join(right), late=corpus.late,
    )  # fmt: skip

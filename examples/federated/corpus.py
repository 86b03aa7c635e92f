"""The texts as the study takes them: ids on the device, held-out windows, probes, embeddings.

Made once of a prepared folder and kept in OUT, which then needs neither texts nor tokenizer:

    tokenizer.json
    corpus.safetensors    train.NAME, heldout.NAME: ids (n,) int16 or int32; embedding.NAME: (D,)
    probes.json           {name: {"group", "domain", "items": a list, as scores.Item}}
    corpus.json           what is known of the texts, and their fingerprint
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import probes
import texts
import tokens
import torch
from parts import Say, Store
from safetensors.torch import load_file
from scores import Heldout, Item, Probe, packed
from settings import Settings
from torch import Tensor

from flexmore_kernels.checkpoint_writer import write_json, write_tensors
from flexmore_kernels.domain_embedding import HashingEmbedder, domain_embedding

MIX = "mix"
"""The name of the public mix, beside those of the domains."""


class Corpus(NamedTuple):
    """train: ids (n,) int32 of each domain and of the mix. heldout: of each domain and of the
    general English. embeddings: of each domain (D,), of length 1. about: "texts" and
    "probes" of results.json."""

    train: dict[str, Tensor]
    heldout: dict[str, Heldout]
    embeddings: dict[str, Tensor]
    probes: tuple[Probe, ...]
    early: tuple[str, ...]
    late: str
    about: dict[str, Any]

    @property
    def domains(self) -> tuple[str, ...]:
        """All, the late one last."""
        return (*self.early, self.late)

    @property
    def scored_tokens(self) -> int:
        """Of all held-out windows."""
        return sum(text.windows.numel() for text in self.heldout.values())

    def probes_of(self, domain: str) -> tuple[Probe, ...]:
        return tuple(one for one in self.probes if one.domain == domain)


def read_corpus(store: Store, directory: Path | None, settings: Settings, say: Say) -> Corpus:
    """The corpus that OUT has, or that of a prepared folder, which is encoded.

    Raises ValueError for a folder that is none, a late domain that it has not, and other texts than
    those that OUT was begun with; FileNotFoundError where neither has any.
    """
    path = store.directory / "corpus.json"
    if directory is not None:
        domains, general = texts.read_domains(directory), texts.read_public(directory)
        fingerprint = _fingerprint([*domains.values(), general])
        if not path.is_file():
            say("encoding the texts")
            facts = _encode(store.directory, domains, general, settings)
            write_json(path, facts | {"fingerprint": fingerprint})
        elif json.loads(path.read_text())["fingerprint"] != fingerprint:
            raise ValueError(
                f"--texts: {directory} has other texts than those that {store.directory} was begun "
                "with; accepted: the same, or a new directory"
            )
    facts = json.loads(path.read_text())
    tensors = load_file(store.directory / "corpus.safetensors", device=str(store.device))
    heldout = {
        name: Heldout.of(tensors[f"heldout.{name}"].int(), about["heldout_bytes"],
                         settings.length, settings.heldout_tokens)
        for name, about in (facts["domains"] | {texts.PUBLIC: facts["general"]}).items()
    }  # fmt: skip
    names = [name for name in facts["domains"] if name != settings.late]
    train = {name: tensors[f"train.{name}"].int() for name in (*names, settings.late, MIX)}
    embeddings = {name: tensors[f"embedding.{name}"] for name in (*names, settings.late)}
    probes = _packed(store, settings)
    about = {
        "texts": {
            "late": settings.late,
            "tokenizer": settings.vocabulary,
            "public": facts["public"],
            "domains": facts["domains"],
        },
        "probes": {one.name: {"group": one.group, "domain": one.domain,
                              "items": len(one.answers), "chance": one.chance} for one in probes},
    }  # fmt: skip
    return Corpus(train, heldout, embeddings, probes, tuple(names), settings.late, about)


def _fingerprint(domains: Sequence[texts.Domain]) -> str:
    digest = hashlib.sha256()
    for domain in domains:
        digest.update(json.dumps([domain.name, domain.documents]).encode())
    return digest.hexdigest()[:16]


def _encode(
    out: Path, domains: Mapping[str, texts.Domain], general: texts.Domain, settings: Settings
) -> dict:
    """Write all but corpus.json; what that is to hold."""
    mix = texts.public_mix(domains, settings.late, general)
    tokenizer = tokens.train_tokenizer(mix, settings.vocabulary)
    embedder = HashingEmbedder(settings.hidden_size)
    short = torch.int16 if settings.vocabulary <= 2**15 else torch.int32
    tensors: dict[str, Tensor] = {}

    def add(kind: str, name: str, documents: Sequence[str]) -> dict[str, int]:
        ids = tokens.encode_documents(tokenizer, documents)
        tensors[f"{kind}.{name}"] = ids.to(short)
        nbytes = sum(len(text.encode()) for text in documents)
        return {f"{kind}_bytes": nbytes, f"{kind}_tokens": len(ids)}

    about = {}
    for name, domain in domains.items():
        train, heldout = texts.split(domain)
        some = train[:: max(1, len(train) // settings.embedded_documents)]
        vector = domain_embedding(some, embedder)
        tensors[f"embedding.{name}"] = vector / vector.norm()
        said = {"title": domain.title, "licence": domain.licence, "synthetic": domain.synthetic}
        about[name] = said | add("train", name, train) | add("heldout", name, heldout)
    public = add("train", MIX, mix)
    facts = {
        "domains": about,
        "general": add("heldout", texts.PUBLIC, texts.split(general)[1]),
        "public": {"bytes": public["train_bytes"], "tokens": public["train_tokens"]},
    }
    built = probes.build(domains, count=settings.items).values()
    write_json(out / "probes.json", {
        one.name: {"group": one.group, "domain": one.domain, "items": _items(tokenizer, one.items)}
        for one in built
    })  # fmt: skip
    tokens.save(tokenizer, out)
    write_tensors(out / "corpus.safetensors", tensors)
    return facts


def _items(tokenizer, items: Sequence) -> list:
    """Items in ids. A prompt begins as a document does, with the separator."""
    separator = tokenizer.token_to_id(tokens.SEPARATOR)
    every = [text for item in items for text in (item.prompt, *item.choices)]
    encoded = iter(tokenizer.encode_batch_fast(every, add_special_tokens=False))
    return [
        (
            [separator, *next(encoded).ids],
            [(next(encoded).ids, len(choice.encode())) for choice in item.choices],
            item.answer,
        )
        for item in items
    ]


def _packed(store: Store, settings: Settings) -> tuple[Probe, ...]:
    found = json.loads((store.directory / "probes.json").read_text())
    return tuple(
        packed(name, about["group"], about["domain"], [Item(*item) for item in about["items"]],
               settings.length, store.device)
        for name, about in found.items()
    )  # fmt: skip

"""What config.json says of a checkpoint: the model, its sizes, and the ranks of its experts.

config.json has `expert_ranks`, E integers, as the authors' reader expects: of each expert the
largest rank in any layer and projection, 0 for one that is full-size in all of them. Where that
does not say all, because ranks differ by layer or by projection, it has `layer_expert_ranks` too,
a key of this library: for each layer a list of E entries as `FlexMoRE(expert_ranks=)` takes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RANK_KEYS = ("expert_ranks", "layer_expert_ranks")
# What transformers loads by `trust_remote_code=True`: AUTO_MAP in a config.json names classes in
# the few lines of LOADER, which are copied beside it.
LOADER = Path(__file__).parent / "hf" / "modeling_flexmore.py"
AUTO_MAP = {
    "AutoConfig": f"{LOADER.stem}.FlexMoREConfig",
    "AutoModel": f"{LOADER.stem}.FlexMoREModel",
    "AutoModelForCausalLM": f"{LOADER.stem}.FlexMoREForCausalLM",
}
# Of FlexOlmo's configuration: a config.json may leave out what has its default value.
_FLEX_OLMO = {"vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_experts": 7,
              "num_experts_per_tok": 5}  # fmt: skip


def check_model_type(config: Mapping[str, Any]) -> str:
    """ "flexmore" or "flex_olmo", as a config.json says; ValueError for any other model."""
    found = config.get("model_type", "flexmore" if "expert_ranks" in config else None)
    if found not in ("flexmore", "flex_olmo"):
        raise ValueError(f"config.json: model_type is {found!r}; accepted: 'flexmore', 'flex_olmo'")
    return found


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's object with num_experts, and of FlexOlmo's the defaults and
    `expert_ranks`, zeros, in it.

    Raises ValueError for sizes, ranks or a model that this library does not compute.
    """
    model_type = check_model_type(config)
    config = dict(config)
    if model_type == "flex_olmo":
        config = _FLEX_OLMO | {k: v for k, v in config.items() if k not in RANK_KEYS}
        if type(config["num_experts"]) is int:
            config["expert_ranks"] = [0] * max(1, config["num_experts"])
    ranks = config.get("expert_ranks")
    if isinstance(ranks, list) and ranks:
        count = len(ranks[0]) if isinstance(ranks[0], list) else len(ranks)
        config.setdefault("num_experts", count)
    elif ranks is not None or (model_type == "flexmore" and "num_experts" not in config):
        raise ValueError(f"config.json: expert_ranks is {ranks!r}; accepted: a list of E entries")
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "vocab_size", "num_experts", "num_experts_per_tok")  # fmt: skip
    optional = ("num_key_value_heads", "head_dim")
    for field in (*fields, *(name for name in optional if config.get(name) is not None)):
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json: {field} is {value!r}; accepted: an integer >= 1")
    if (top_k := config["num_experts_per_tok"]) > (num_experts := config["num_experts"]):
        raise ValueError(
            f"config.json: num_experts_per_tok is {top_k}; accepted: 1 to {num_experts}"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act is {config['hidden_act']!r}; accepted: 'silu'")
    check_rank_fields(config)
    return config


def as_triple(entry: Any) -> tuple:
    """An entry of expert_ranks as (gate, up, down) of "full", 0 or a rank."""
    if isinstance(entry, (tuple, list)):
        return tuple(entry)
    return ("full" if entry == 0 else entry,) * 3


def shortest(triple: Sequence) -> Any:
    """The entry of expert_ranks that says the same as (gate, up, down) in the fewest words."""
    triple = tuple(triple)
    if triple == ("full",) * 3:
        return 0
    return triple[0] if triple[0] != 0 and len(set(triple)) == 1 else triple


def largest_ranks(layer_ranks: Sequence[Sequence]) -> list[int]:
    """Of each expert the largest rank in any layer and projection, 0 if there is none."""
    count = len(layer_ranks[0])
    kinds = [_kinds(ranks[e] for ranks in layer_ranks) - {"full"} for e in range(count)]
    return [max(numbers, default=0) for numbers in kinds]


def rank_fields(layer_ranks: Sequence[Sequence]) -> dict[str, Any]:
    """`expert_ranks` for config.json, and `layer_expert_ranks` where it does not say all.

    layer_ranks: for each layer the E entries of `FlexMoRE(expert_ranks=)`.
    """
    fields: dict[str, Any] = {"expert_ranks": largest_ranks(layer_ranks)}
    plain = [[as_triple(entry) for entry in fields["expert_ranks"]]] * len(layer_ranks)
    if [[as_triple(entry) for entry in ranks] for ranks in layer_ranks] != plain:
        fields["layer_expert_ranks"] = [
            [list(e) if isinstance(e, (tuple, list)) else e for e in ranks] for ranks in layer_ranks
        ]
    return fields


def with_ranks(config: Mapping[str, Any], layer_ranks: Sequence[Sequence]) -> dict[str, Any]:
    """A config.json's object that says these ranks, whatever it said before."""
    rest = {name: value for name, value in config.items() if name not in RANK_KEYS}
    return {**rest, "num_experts": len(layer_ranks[0]), **rank_fields(layer_ranks)}


def declared_ranks(config: Mapping[str, Any], layer: int) -> Sequence | None:
    """The E entries that config.json has for a layer; None where it does not say.

    It does not say when `expert_ranks` is absent or, as after the authors' merge, shorter or longer
    than num_experts: then every matrix must be there.
    """
    by_layer = config.get("layer_expert_ranks")
    ranks = config.get("expert_ranks")
    if by_layer is None and ranks and isinstance(ranks[0], (list, tuple)):
        by_layer = ranks  # before layer_expert_ranks there was
    if by_layer is not None:
        return by_layer[layer]
    return ranks if ranks is not None and len(ranks) == config["num_experts"] else None


def check_rank_fields(config: Mapping[str, Any]) -> None:
    """Check the forms of `expert_ranks` and `layer_expert_ranks`; ValueError says what is wrong."""
    layers, count = config["num_hidden_layers"], config["num_experts"]
    for key in RANK_KEYS:
        ranks = config.get(key)
        if ranks is None:
            continue
        if not isinstance(ranks, list) or not ranks:
            raise ValueError(f"config.json: {key} is {ranks!r}; accepted: a list of E entries")
        nested = isinstance(ranks[0], list)
        if key == "layer_expert_ranks" and not nested:
            raise ValueError(f"config.json: {key} is {ranks!r}; accepted: a list a layer")
        if nested and len(ranks) != layers:
            raise ValueError(
                f"config.json: {key} has {len(ranks)} lists; accepted: one a layer, {layers}"
            )
        for entries in ranks if nested else [ranks]:
            if not isinstance(entries, list) or (nested and len(entries) != count):
                raise ValueError(
                    f"config.json: {key} holds {entries!r}; accepted: num_experts, {count}, entries"
                )
            for entry in entries:
                _check_entry(key, entry)


def _check_entry(key: str, entry: Any) -> None:
    kinds = as_triple(entry)
    numbers = [kind for kind in kinds if kind != "full"]
    if len(kinds) != 3 or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(
            f"config.json: {key} holds {entry!r}; accepted: an integer >= 0, or three for gate, "
            'up, down, each an integer >= 0 or "full"'
        )


def disagreements(config: Mapping[str, Any], layer_ranks: Sequence[Sequence]) -> tuple[str, ...]:
    """Where config.json differs from what the tensors are, one line an expert.

    layer_ranks: for each layer the entries that the tensors' shapes make.
    """
    if declared_ranks(config, 0) is None:
        ranks = config.get("expert_ranks")
        said = "is absent" if ranks is None else f"has {len(ranks)} entries"
        return (f"expert_ranks {said} for {config['num_experts']} experts; taken from the tensors",)
    notes = []
    by_layer = config.get("layer_expert_ranks") is not None
    limit = min(config["hidden_size"], config["intermediate_size"])
    largest = largest_ranks(layer_ranks)
    for expert in range(config["num_experts"]):
        found = [as_triple(ranks[expert]) for ranks in layer_ranks]
        said = [as_triple(declared_ranks(config, n)[expert]) for n in range(len(layer_ranks))]
        top = config.get("expert_ranks")
        if said != found:
            key, words = "layer_expert_ranks" if by_layer else "expert_ranks", in_words(said)
        elif by_layer and top is not None and top[expert : expert + 1] != [largest[expert]]:
            key, words = "expert_ranks", in_words([as_triple(e) for e in top[expert : expert + 1]])
        else:
            continue
        numbers = _kinds(said) | _kinds(top[expert : expert + 1] if key == "expert_ranks" else ())
        beyond = max((n for n in numbers if n != "full"), default=0) > limit
        beyond = f", beyond min(D, F), {limit}" if beyond else ""
        notes.append(
            f"expert {expert}: {key} says {words}{beyond}; its tensors hold {in_words(found)}"
        )
    return tuple(notes)


def in_words(entries: Iterable) -> str:
    """Entries of one expert, as "full size and ranks 4 to 16"."""
    kinds = _kinds(entries)
    ranks = sorted(kinds - {"full"})
    words = ["full size"] if "full" in kinds else []
    if ranks:
        low, high = ranks[0], ranks[-1]
        words.append(f"rank {low}" if low == high else f"ranks {low} to {high}")
    return " and ".join(words) or "nothing"


def _kinds(entries: Iterable) -> set:
    return {kind for entry in entries for kind in as_triple(entry)}

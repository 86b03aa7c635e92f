"""Which routers there are, and what a config says of one. The routers themselves: router.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cards import cards_of
from .checks import check_int, check_one_of

ROUTERS = ("linear", "projected")
ROUTER_FIELDS = ("router", "domain_embedding_size", "projector_size", "shared_expert")
"""Of a `FlexMoREConfig` and a config.json; absent: a linear router, no shared expert."""
ROUTER_ROWS = (".mlp.gate.weight", ".mlp.gate.domain_embeddings")
"""Ends of the names of what has a row for each expert: one of them in a layer."""


def check_router_sizes(kind: str, m: int | None, h: int | None) -> tuple[int | None, int | None]:
    """(domain_embedding_size, projector_size) that fit a kind of router; ValueError otherwise."""
    check_one_of("router", kind, ROUTERS)
    if kind == "projected":
        m = check_int("domain_embedding_size", m, 1)
        return m, None if h is None else check_int("projector_size", h, 1)
    for name, value in (("domain_embedding_size", m), ("projector_size", h)):
        if value is not None:
            raise ValueError(
                f'{name}: got {value!r} with router={kind!r}; accepted: None, or router="projected"'
            )
    return None, None


def check_shared_expert(value: object, num_experts: int) -> int | None:
    """The number of the shared expert: 0, the base, for True; None for False.

    Raises TypeError or ValueError for what is neither a bool nor an expert beside others.
    """
    if value is False:
        return None
    if num_experts < 2:
        raise ValueError(
            f"shared_expert: got {value!r} for {num_experts} expert; accepted: False, or more "
            "experts, to route between"
        )
    return 0 if value is True else check_int("shared_expert", value, 1, num_experts - 1)


def check_router_fields(config: Mapping[str, Any]) -> None:
    """Check what a config.json says of the router and the experts' cards; ValueError names the
    field."""
    count = config["num_experts"]
    try:
        shared = check_shared_expert(config.get("shared_expert", False), count)
        kind = config.get("router", "linear")
        check_router_sizes(kind, config.get("domain_embedding_size"), config.get("projector_size"))
    except TypeError as error:
        raise ValueError(f"config.json: {error}") from None
    if config["num_experts_per_tok"] > count - (shared is not None):
        raise ValueError(
            f"config.json: num_experts_per_tok is {config['num_experts_per_tok']}; accepted: 1 to "
            f"{count - 1} beside a shared expert"
        )
    cards_of(config, count)


def router_shapes(config: Mapping[str, Any], expert_bias: bool) -> dict[str, tuple[int, ...]]:
    """Names, below `gate.`, and shapes of the tensors of a router."""
    D, E = config["hidden_size"], config["num_experts"]
    shapes: dict[str, tuple[int, ...]] = {}
    if config.get("router", "linear") == "linear":
        shapes["weight"] = (E, D)
    else:
        m, h = config["domain_embedding_size"], config.get("projector_size") or D
        shapes["projector_in.weight"] = (2 * h, m)
        shapes["projector_out.weight"] = (D, h)
        shapes["domain_embeddings"] = (E, m)
    if expert_bias:
        shapes["expert_bias"] = (E - 1,)
    return shapes

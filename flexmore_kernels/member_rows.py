"""What a router holds of each expert, when experts join and leave: rows, embeddings, biases.

Router tensors, by their names below `mlp.gate.`, of which a router holds some:

    weight (E, D)              a row an expert: linear
    domain_embeddings (E, m)   a row an expert, from which the projected router makes its rows
    expert_bias (E - 1,)       of experts 1..
    any other                  is no expert's own (the projector), and stays
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, check_tensor
from .members import Newcomer, Order, finite

ROWS = ("zeros", "mean", "keep")
"""What a row of a linear router may be by name: see `router_row`."""


def router_row(
    name: str, given: Any, own: Tensor | None, rows: Tensor, shared: int | None, *, new: bool
) -> Tensor | None:
    """The row of a linear router that a newcomer gets; None keeps that of whom it replaces.

    Args:
        given: (D,); "zeros", a logit of 0, which with a softmax is a share like that of any row
            orthogonal to x, not none; "mean", the mean of the rows of the experts that are
            selected, a middling share; "keep", that of the expert that is replaced; None, the
            expert's own, trained beside the same base, else that of whom it replaces.
        own: the row that the expert brings, or None.
        rows: the router's (E, D).
        shared: the expert whose row nobody reads, or None.
        new: whether there is no expert that it replaces.
    """
    accepted = f"({rows.shape[1]},), 'zeros', 'mean'" + ("" if new else ", 'keep'")
    if given is None and own is None and new:
        raise ValueError(
            f"{name}: got None, and the expert brings no row of its own; accepted: {accepted}"
        )
    if isinstance(given, str):
        if given not in ROWS or (new and given == "keep"):
            raise ValueError(f"{name}: got {given!r}; accepted: {accepted}")
        if given == "zeros":
            return torch.zeros_like(rows[0])
        if given == "keep":
            return None
        routed = [e for e in range(len(rows)) if e != shared]
        wide = torch.promote_types(rows.dtype, torch.float32)
        return rows.detach()[routed].to(wide).mean(0).to(rows.dtype)
    row = own if given is None else given
    if row is None:
        return None
    check_tensor(name, row, (rows.shape[1],), FLOATS)
    return finite(name, row)


def row_for(
    gate: Mapping[str, Tensor],
    name: str,
    given: Any,
    own: Tensor | None,
    shared: int | None,
    *,
    new: bool,
) -> Tensor | None:
    """The row that a newcomer gets in a layer with these router tensors; None of a projected one.

    given, own, shared, new: see `router_row`. Raises ValueError where rows are made of embeddings.
    """
    if "weight" in gate:
        return router_row(name, given, own, gate["weight"], shared, new=new)
    if given is not None:
        raise ValueError(
            f"{name}: got one; accepted: None, where the router makes rows of embeddings"
        )
    return None


def row_of_layer(router_rows: Any, layer: int, count: int) -> Any:
    """Of rows (L, D) the layer's; anything else is for every layer."""
    if not isinstance(router_rows, Tensor) or router_rows.dim() != 2:
        return router_rows
    if len(router_rows) != count:
        raise ValueError(
            f"router_rows: got {len(router_rows)} rows; accepted: one a layer, {count}"
        )
    return router_rows[layer]


def router_tensors(gate: Mapping[str, Tensor], order: Order) -> dict[str, Tensor]:
    """A layer's router tensors, names as in this module's text, after a new order of experts.

    Rows of those who stay keep their bits. Raises ValueError naming what a newcomer lacks, brings
    in another width, or brings where the router has no place for it.
    """
    for newcomer in order:
        if isinstance(newcomer, Newcomer):
            _check_router(gate, newcomer)
    done = dict(gate)
    for name, part in (("weight", "router_row"), ("domain_embeddings", "embedding")):
        if name in gate:
            done[name] = torch.stack([_row(gate[name], who, part) for who in order])
    if "expert_bias" in gate:
        # Expert 0 has none; a place for it makes the numbers the experts'.
        old = torch.cat([gate["expert_bias"].new_zeros(1), gate["expert_bias"].detach()])
        done["expert_bias"] = torch.stack([_row(old, who, "bias") for who in order])[1:]
    return done


def _row(old: Tensor, who: int | Newcomer, part: str) -> Tensor:
    if isinstance(who, int):
        return old.detach()[who]
    given = getattr(who, part)
    if given is not None:
        return finite(part, torch.as_tensor(given).detach().to(old))
    return old.new_zeros(old.shape[1:]) if who.instead_of is None else old.detach()[who.instead_of]


def _check_router(gate: Mapping[str, Tensor], newcomer: Newcomer) -> None:
    new = newcomer.instead_of is None
    for name, part, kind in (
        ("weight", "router_row", "projected, and makes rows of embeddings"),
        ("domain_embeddings", "embedding", "linear, and has rows of its own"),
    ):
        given = getattr(newcomer, part)
        if name in gate:
            accepted = f"({gate[name].shape[1]},)"
            if given is None and new:
                raise ValueError(f"{part}: got None; accepted: {accepted}")
            if given is not None:
                check_tensor(part, given, (gate[name].shape[1],), FLOATS)
        elif given is not None:
            raise ValueError(f"{part}: got one; accepted: None, where the router is {kind}")
    bias = newcomer.bias
    number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
    if bias is not None and not number and not (isinstance(bias, Tensor) and bias.dim() == 0):
        raise ValueError(f"bias: got {bias!r}; accepted: a number")
    if bias is not None and "expert_bias" not in gate:
        raise ValueError(
            "bias: got one, and this router has no expert_bias, without which the expert would be "
            "selected more often than it was trained to be; accepted: an expert whose bias is None"
        )

"""What tests, benchmarks and the demo share: the accuracy rule, named hard cases, input makers.

Imports nothing of the package but the rule, so that all of it can be tested with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .accuracy import (
    FLOAT64_SLACK,
    Accuracy,
    accuracy,
    assert_accurate,
    assert_accurate_draws,
    assert_same,
)

__all__ = [
    "CASES", "CASE_IDS", "FLOAT64_SLACK", "Accuracy", "Case", "accuracy", "assert_accurate",
    "assert_accurate_draws", "assert_same", "leaves", "make_experts", "make_pair",
    "make_projection", "make_routing", "make_weight", "make_x", "projection_ranks", "saved_bytes",
    "tensors", "to_float64", "tree_map",
]  # fmt: skip

Entry = int | str
ExpertRank = int | tuple[Entry, Entry, Entry]


class Case(NamedTuple):
    """A shape with a reason. `ranks` is the layer's `expert_ranks`."""

    name: str
    why: str
    tokens: int
    hidden: int
    intermediate: int
    ranks: tuple[ExpertRank, ...]
    top_k: int
    routing: str = "random"  # random | one | starved | empty_slots

    @property
    def num_experts(self) -> int:
        return len(self.ranks)


CASES = (
    Case("plain", "even sizes, nothing special: the first to look at when all fail",
         12, 32, 48, (0, 4, 8, 4), 2),
    Case("no_tokens", "T = 0: nothing may launch, shapes must be right", 0, 16, 24, (0, 2, 3), 2),
    Case("one_token", "T = 1: decode", 1, 24, 40, (0, 4, 2, 6), 3),
    Case("odd_sizes", "no size is a multiple of a tile or a vector", 13, 37, 53, (0, 5, 3, 7), 2),
    Case("k_equals_1", "top_k = 1: sums over one expert", 9, 20, 28, (0, 3, 5), 1),
    Case("k_equals_e", "top_k = E: every expert sees every token", 7, 20, 28, (0, 3, 5), 3),
    Case("starved", "an expert without tokens: its gradient is zero, not uninitialised",
         11, 24, 32, (0, 4, 6, 2), 2, "starved"),
    Case("all_to_one", "all tokens on one expert: one long segment, all others empty",
         17, 24, 32, (0, 4, 6), 1, "one"),
    Case("ragged_ranks", "1, 3, 17 beside min(D, F) in one layer: nothing is padded to the maximum",
         10, 40, 56, (0, 1, 3, 17, 40), 3),
    Case("triples", "a rank for each projection, with no delta and with full size mixed in",
         10, 24, 32, (0, (2, 0, 5), (0, 0, 0), ("full", 3, 0), (1, "full", "full")), 3),
    Case("full_size", "full-size experts beside low-rank ones, one of them next to expert 0",
         12, 24, 40, (0, 0, 3, 0, 2), 3),
    Case("empty_slots", "ids equal to num_experts with weight 0: skipped, nothing read beyond",
         14, 24, 32, (0, 4, 0, 2), 3, "empty_slots"),
    Case("many_experts", "more experts than a set of experts is grouped for (8)",
         19, 16, 24, (0, *((e % 5) + 1 for e in range(16))), 4),
)  # fmt: skip

CASE_IDS = [case.name for case in CASES]


def make_x(
    tokens: int, hidden: int, device: Any = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """(tokens, hidden), standard normal, drawn on the CPU from the global generator."""
    return torch.randn(tokens, hidden, dtype=torch.float64).to(device, dtype)


def make_weight(out: int, width: int, device: Any = "cpu", dtype=torch.float32) -> Tensor:
    """(out, width), scaled so that it keeps the size of what it is applied to."""
    return (torch.randn(out, width, dtype=torch.float64) / math.sqrt(max(width, 1))).to(
        device, dtype
    )


def make_pair(
    out: int, width: int, rank: int, device: Any = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """a (rank, width) and b (out, rank), neither zero: the delta is half as large as the base."""
    a = make_weight(rank, width, device, dtype)
    b = make_weight(out, rank, "cpu", torch.float64) * 0.5
    return a, b.to(device, dtype)


def projection_ranks(ranks: Sequence[ExpertRank]) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """expert_ranks as three lists (gate, up, down) of "full", 0 (no delta) or a rank."""
    triples = [
        entry if isinstance(entry, tuple) else (("full",) * 3 if entry == 0 else (entry,) * 3)
        for entry in ranks
    ]
    gate, up, down = zip(*triples, strict=True)
    return list(gate), list(up), list(down)


def make_projection(
    entries: Sequence[Entry], out: int, width: int, device: Any = "cpu", dtype=torch.float32
) -> list:
    """One projection as `ops.experts` takes it: per expert a Tensor, a pair (a, b) or None."""
    experts: list = []
    for entry in entries:
        if entry == "full":
            experts.append(make_weight(out, width, device, dtype))
        elif entry == 0:
            experts.append(None)
        else:
            experts.append(make_pair(out, width, entry, device, dtype))
    return experts


def make_experts(
    case: Case, device: Any = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[list, list, list]:
    """gate, up and down of a case, as `ops.experts` takes them."""
    gate, up, down = projection_ranks(case.ranks)
    D, F = case.hidden, case.intermediate
    return (
        make_projection(gate, F, D, device, dtype),
        make_projection(up, F, D, device, dtype),
        make_projection(down, D, F, device, dtype),
    )


def make_routing(
    case: Case, device: Any = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """indices (T, K) int64 and weights (T, K) that fit the case; a token's experts are distinct.

    weights are float64 for float64, else float32, positive, and their sum is below 1.
    """
    T, E, K = case.tokens, case.num_experts, case.top_k
    score = torch.rand(T, E)
    if case.routing == "one":
        score[:, E - 1] = 2.0
    if case.routing == "starved":
        score[:, E - 2] = -1.0
    indices = score.argsort(dim=1, descending=True)[:, :K].contiguous()
    weights = torch.softmax(torch.randn(T, E, dtype=torch.float64), dim=1)[:, :K].contiguous()
    if case.routing == "empty_slots":
        # Every second token loses its last slot, every fourth all of them.
        indices[::2, K - 1], weights[::2, K - 1] = E, 0.0
        indices[::4], weights[::4] = E, 0.0
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return indices.to(device), weights.to(device, accumulate)


def tree_map(function: Any, tree: Any) -> Any:
    """Applies `function` to every tensor of nested lists and tuples; other leaves stay."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, t) for t in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(function, t) for t in tree)
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples, in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def leaves(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy whose floating tensors are fresh leaves that need a gradient (in `dtype` if given)."""

    def copy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()

    return tree_map(copy, tree)


def to_float64(tree: Any) -> Any:
    """The floating tensors in float64 (the same numbers, exactly), detached; others as they are."""
    return tree_map(lambda t: t.detach().double() if t.is_floating_point() else t, tree)


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps for `forward`'s backward, each once.

    Those of `parameters` are left out: they are there anyway.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(size for place, size in storages.items() if place not in held)

"""What tests, benchmarks and the demo share: the accuracy rule, named hard cases, input makers.

The accuracy rule. An output or gradient is right when, against the float64 reference, in the
maximum norm and in the Frobenius norm,

    err(ours)  <=  2 * err(reference in ours' dtype on ours' device)  +  u * max|ref64|

with u the unit roundoff of the dtype (half its epsilon). Nothing is tuned by hand: a kernel may
be twice as wrong as plain PyTorch in the same dtype, plus one rounding of the largest entry.

Imports nothing of the package, so that all of it can be tested with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# A float64 result has no wider reference: it may differ from the float64 reference by the order of
# its sums. 2^-40 of the largest entry leaves room for some thousand summands.
FLOAT64_SLACK = 2.0**-40


class Accuracy(NamedTuple):
    """How far a result is from the truth, and how far it may be."""

    error_max: float
    allowed_max: float
    error_frobenius: float
    allowed_frobenius: float
    worst: tuple[int, ...]  # where the largest error is
    note: str = ""  # or why no error could be computed

    @property
    def ratio(self) -> float:
        """The larger of error / allowed in the two norms; above 1, or NaN, means wrong."""
        if self.note:
            return math.inf
        pairs = (
            (self.error_max, self.allowed_max),
            (self.error_frobenius, self.allowed_frobenius),
        )
        return max(e / a if a > 0 else (0.0 if e == 0 else math.inf) for e, a in pairs)

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


def accuracy(out: Tensor, ref64: Tensor, same: Tensor | None = None) -> Accuracy:
    """Measures `out` against the float64 reference by the accuracy rule.

    Args:
        out: the result, any float dtype and device.
        ref64: the reference's result in float64, of the same shape, from the same (rounded) inputs.
        same: the reference's result in the dtype and on the device of `out`; None stands for the
            float64 result rounded to that dtype, the best there is.
    """
    blank = Accuracy(math.inf, 0.0, math.inf, 0.0, ())
    if ref64.dtype != torch.float64:
        raise TypeError(f"ref64: got {ref64.dtype}; accepted: torch.float64")
    if out.shape != ref64.shape:
        return blank._replace(note=f"shape {tuple(out.shape)}, expected {tuple(ref64.shape)}")
    if same is not None and (same.dtype != out.dtype or same.shape != out.shape):
        return blank._replace(
            note=f"{out.dtype} {tuple(out.shape)}, but the reference in the same dtype gave "
            f"{same.dtype} {tuple(same.shape)}"
        )
    if out.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0, 0.0, ())
    truth = ref64.detach().cpu()
    if not truth.isfinite().all():
        return blank._replace(note="the float64 reference is not finite")
    error = (out.detach().cpu().double() - truth).abs()
    flat = int(error.nan_to_num(math.inf).argmax())
    worst = tuple(int(i) for i in np.unravel_index(flat, tuple(error.shape)))
    if not error.isfinite().all():
        return blank._replace(worst=worst, note=f"not finite at {worst}")
    if out.dtype == torch.float64:
        same, floor = None, FLOAT64_SLACK * truth.abs().max().item()
    else:
        floor = 0.5 * torch.finfo(out.dtype).eps * truth.abs().max().item()
    best = truth.to(out.dtype) if same is None else same.detach().cpu()
    plain = best.double() - truth
    return Accuracy(
        error_max=error.max().item(),
        allowed_max=2 * plain.abs().max().item() + floor,
        error_frobenius=error.norm().item(),
        allowed_frobenius=2 * plain.norm().item() + floor,
        worst=worst,
    )


def assert_accurate(out: Tensor, ref64: Tensor, same: Tensor | None = None, name: str = "") -> None:
    """Fails, naming the worst coordinate and the ratio to what is allowed, if `out` is wrong."""
    found = accuracy(out, ref64, same)
    if found.ok:
        return
    label = name or "result"
    if found.note:
        raise AssertionError(f"{label}: {found.note}")
    at = found.worst
    raise AssertionError(
        f"{label}: {found.ratio:.3g} x the allowed error. "
        f"max {found.error_max:.3e} (allowed {found.allowed_max:.3e}), "
        f"Frobenius {found.error_frobenius:.3e} (allowed {found.allowed_frobenius:.3e}); "
        f"worst at {at}: {out[at].item():.9g}, expected {ref64[at].item():.9g}"
        + ("" if same is None else f", plain {out.dtype} gave {same[at].item():.9g}")
    )


def assert_accurate_draws(
    outs: Sequence[Tensor], refs64: Sequence[Tensor], sames: Sequence[Tensor], name: str = ""
) -> None:
    """The accuracy rule for results of few numbers: err(reference) is taken over more draws.

    A handful of independent roundings may be small by luck in one draw, in the reference as in
    ours. So `outs` are the first of the draws that `refs64` and `sames` hold, all inputs drawn
    alike: the largest error of `outs` against the largest of all `sames`, and the same with the
    root mean square.
    """

    def errors(results: Sequence[Tensor]) -> Tensor:
        pairs = zip(results, refs64, strict=False)
        return torch.stack([(r.detach().cpu().double() - t.detach().cpu()).abs() for r, t in pairs])

    for out, ref64 in zip(outs, refs64, strict=False):
        assert out.shape == ref64.shape and out.dtype == sames[0].dtype, f"{name}: {out.dtype}"
    if outs[0].numel() == 0:
        return
    ours, plain = errors(outs), errors(sames)
    scale = max(ref64.abs().max().item() for ref64 in refs64)
    exact = outs[0].dtype == torch.float64
    floor = scale * (FLOAT64_SLACK if exact else 0.5 * torch.finfo(outs[0].dtype).eps)
    root_floor = floor / math.sqrt(outs[0].numel())
    for norm, got, ref, slack in (
        ("max", ours.max().item(), plain.max().item(), floor),
        ("rms", ours.square().mean().sqrt().item(), plain.square().mean().sqrt().item(), root_floor),
    ):
        allowed = slack if exact else 2 * ref + slack
        if not got <= allowed:
            worst = int(ours.nan_to_num(math.inf).argmax())
            at = tuple(int(i) for i in np.unravel_index(worst, tuple(ours.shape)))
            raise AssertionError(
                f"{name or 'result'}: {norm} error {got:.3e}, allowed {allowed:.3e}; worst at draw "
                f"{at[0]}, {at[1:]}: {outs[at[0]][at[1:]].item():.9g}, expected "
                f"{refs64[at[0]][at[1:]].item():.9g}"
            )


def assert_same(a: Tensor, b: Tensor, name: str = "") -> None:
    """Fails unless both have the same dtype, shape and bits (NaN equals NaN, 0.0 is not -0.0)."""
    label = name or "tensors"
    assert a.dtype == b.dtype, f"{label}: {a.dtype} and {b.dtype}"
    assert a.shape == b.shape, f"{label}: {tuple(a.shape)} and {tuple(b.shape)}"
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    if a.is_floating_point():
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        differ = a.view(bits) != b.view(bits)
    else:
        differ = a != b
    if differ.any():
        at = tuple(int(i) for i in differ.nonzero()[0])
        raise AssertionError(
            f"{label}: {int(differ.sum())} of {differ.numel()} entries differ, "
            f"first at {at}: {a[at].item()!r} and {b[at].item()!r}"
        )


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

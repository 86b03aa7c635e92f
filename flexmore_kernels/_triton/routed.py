"""One call's plan, packed factors and raw kernels, as the forward and the backward share them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import backend
from ..projection import FULL, RANK_MULTIPLE, Projection
from ..ragged import (
    MAX_SET_EXPERTS,
    SORTED,
    RoutingPlan,
    RowProducts,
    Term,
    joined,
    packed_size,
    ranks_tensor,
)
from ..schedule import HOPPER_TOKENS
from . import token_major


class Packed:
    """One projection's factors side by side, laid so when they are first read."""

    def __init__(self, side: Projection) -> None:
        self._side = side
        self.ranks = side.padded_ranks(RANK_MULTIPLE)

    @functools.cached_property
    def a(self) -> Tensor:
        """(R, in)"""
        return self._side.pack_a(RANK_MULTIPLE)

    @functools.cached_property
    def b(self) -> Tensor:
        """(out, R)"""
        return self._side.pack_b(RANK_MULTIPLE)

    @property
    def any(self) -> bool:
        return any(self.ranks)


class Routed:
    """The plan, packed factors and raw kernels of one call."""

    def __init__(self, x: Tensor, indices: Tensor, sides: list[Projection]) -> None:
        self.x = x
        self.sides = sides
        self.top_k = indices.shape[1]
        num_experts = len(sides[0].full)
        by_set = num_experts <= MAX_SET_EXPERTS
        maps = backend.kernels("routing", x).make_plan(indices.contiguous(), num_experts, by_set)
        self.plan = RoutingPlan(indices, *maps, num_experts, self.top_k)
        self.packed = [Packed(side) for side in sides]
        self.lowrank = backend.kernels("lowrank", x)
        self.permutation = backend.kernels("permutation", x)
        self.mix = backend.kernels("gated_mix", x)
        width, hidden = sides[0].full[0].shape
        hopper = backend.hopper("grouped_gemm", x)
        self.hopper = hopper if hopper is not None and hopper.serves(hidden, width) else None
        self.products = self.hopper or backend.kernels("grouped_gemm", x)

    def shrink(self, x, a, ranks, gather=False, weights=None) -> Tensor:
        plan = self.plan
        size = packed_size(ranks, plan.num_tokens, self.top_k)
        return self.lowrank.shrink(
            x, a, plan.row_offsets, ranks, plan.row_to_slot, self.top_k, size, gather, weights
        )

    def expand(self, z, b, ranks, base=None, gather=False) -> Tensor:
        plan = self.plan
        return self.lowrank.expand(
            z, b, plan.row_offsets, ranks, plan.num_rows, base, plan.row_to_slot, self.top_k, gather
        )

    def factor_grad(self, z, x, ranks, needs, gather=False) -> Tensor | None:
        """Gradient of the packed factors; `needs` says of which, None if of none."""
        if not any(needs):
            return None
        plan, wanted = self.plan, None
        if len(needs) > 1:
            experts = [e for e, rank in enumerate(ranks) if rank]
            wanted = tuple(e for e, need in zip(experts, needs, strict=True) if need)
        maps = (plan.row_offsets, ranks, plan.row_to_slot, self.top_k)
        return self.lowrank.factor_grad(z, x, *maps, gather, wanted)

    def sum_rows(self, work: list[RowProducts], weights=None, place: int = SORTED) -> None:
        """Grouped products, the widest results first: they are handed out in order."""
        if work:
            work = sorted(work, key=lambda item: -item.out.shape[1])
            self.products.sum_rows(work, self.plan, weights, place)

    def full_rows(self, x: Tensor, side: Projection, out: Tensor, transpose: bool = False) -> None:
        """Fill the rows of experts 1.. that are full-size in this projection."""
        if side.has_extra_full:
            kernels = backend.kernels("grouped_gemm", x)
            kernels.grouped_gemm(x, side.extra_full, self.plan.row_offsets, transpose, out)

    def shrunk(self) -> Tensor:
        """s (T, R_gate + R_up): A x of all experts without rows of their own."""
        return self.x @ joined([low.a for low in self.packed[:2]], 0).T

    def hidden(
        self, gate_TF, up_TF, weights, plan: RoutingPlan, s_TR, own=None
    ) -> tuple[Tensor, Tensor]:
        """The token-major middle: one kernel of the compiled library on Hopper, else three.

        mixed (T, F) = sum_e p_e h_e and s_down (T, R) = p_e A_d,e h_e, 0 where e was not chosen.
        `own`: rows h (N, F) that are there already and the slots (T, K) whose rows are to be added
        to mixed; the other rows may be written.
        """
        low_gate, low_up, low_down = self.packed
        hopper = backend.hopper("token_major", gate_TF)
        ranks = [side.ranks for side in self.sides]
        rows_a_token = self.top_k if own else 0
        if hopper is not None and hopper.serves(*gate_TF.shape, ranks, rows_a_token):
            return hopper.hidden(gate_TF, up_TF, weights, plan, s_TR, self.sides, *(own or ()))
        writes = tuple(int(rank > 0) for rank in low_down.ranks)
        factors = (low_gate.b, low_gate.ranks, low_up.b, low_up.ranks)
        rows = own[0] if own else gate_TF.new_empty(plan.num_rows, gate_TF.shape[1])
        mixed = token_major.mix(gate_TF, up_TF, weights, plan, s_TR, *factors, writes, rows)
        if own:
            mixed = self.permutation.unpermute(rows, own[1], weights, mixed)
        if not low_down.any:
            return mixed, s_TR.new_empty(plan.num_tokens, 0)
        z = self.shrink(rows, low_down.a, low_down.ranks)
        return mixed, token_major.weighted(z, weights, plan, low_down.ranks)

    def down(self, mixed: Tensor, w_DF: Tensor, s_TR: Tensor, b_DR: Tensor) -> Tensor:
        """y (T, D) = mixed W_d^T + s_down B_d^T, one sum."""
        if not s_TR.shape[1]:
            return mixed @ w_DF.T
        if self.hopper is None or mixed.shape[0] < HOPPER_TOKENS:
            return token_major.add_expanded(mm(mixed, w_DF.T), s_TR, b_DR)
        y = mixed.new_empty(mixed.shape[0], w_DF.shape[0])
        work = RowProducts(-1, y, Term(mixed, w_DF), Term(s_TR, b_DR))
        self.hopper.sum_rows([work], self.plan)
        return y

    def permute(self, x: Tensor) -> Tensor:
        return self.permutation.permute(x, self.plan.row_to_slot, self.plan.slot_to_row)

    def unpermute(self, x, weights=None, base=None) -> Tensor:
        return self.permutation.unpermute(x, self.plan.slot_to_row, weights, base)

    def base_weights(self, side: Projection, weights: Tensor | None) -> Tensor | None:
        """Slot weights, 0 where the slot's expert is full-size in this projection; None means 1."""
        if not side.has_extra_full:
            return weights
        ids, num_experts = self.plan.indices, len(side.layout)
        full = (0, *(int(kind == FULL) for kind in side.layout[1:]), 0)  # last: an empty slot
        ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
        if weights is None:
            acc = torch.promote_types(self.x.dtype, torch.float32)
            weights = torch.ones(ids.shape, dtype=acc, device=ids.device)
        return weights.masked_fill(ranks_tensor(full, ids.device)[ids] > 0, 0)

    def preactivations(self, gate_TF, up_TF, z) -> list[Tensor]:
        """Rows (N, F) of gate and up before the nonlinearity."""
        rows = []
        x_ND = self.permute(self.x) if any(s.has_extra_full for s in self.sides[:2]) else None
        for side, packed, base, z_side in zip(
            self.sides[:2], self.packed, (gate_TF, up_TF), z, strict=False
        ):
            out = self.expand(z_side, packed.b, packed.ranks, base, gather=True)
            self.full_rows(x_ND, side, out)
            rows.append(out)
        return rows


def mm(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """base + a b, kept in the accumulator's dtype (float32; float64 for float64), and in `base`'s
    memory where that can be."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b if base is None else torch.addmm(base, a, b)
    if a.device.type != "cuda":
        product = a.float() @ b.float()
        return product if base is None else base.add_(product)
    if base is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(base, a, b, out_dtype=torch.float32, out=base)

"""Experts on a CPU: base GEMMs once for all tokens, then one expert after the other.

The counts are known on the host, so every expert is a few dense products over its own rows; the
low-rank products of all experts against x are one product where most of them are wanted. Rows of
one expert are distinct tokens, so adding them to a token's sum needs no atomics, and experts come
in ascending order: the sums have one order.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import backend
from ..kept import Kept
from ..projection import FULL, Projection


class _Input:
    """x, or a gradient in x's place, as the experts' factors see it: A_e x for an expert's rows."""

    def __init__(self, x: Tensor, factors: list[Tensor | None], top_k: int) -> None:
        self.x = x
        self.offsets = [0, *itertools.accumulate(0 if a is None else a.shape[0] for a in factors)]
        self.factors = factors
        self.dense = None
        if self.offsets[-1] and len(factors) <= 2 * top_k:
            self.dense = x @ torch.cat([a for a in factors if a is not None]).T

    def rows(self, e: int, tokens: Tensor) -> Tensor:
        """(n, r): the factor of expert e times the rows of these tokens."""
        if self.dense is None:
            return self.x[tokens] @ self.factors[e].T
        return self.dense[tokens, self.offsets[e] : self.offsets[e + 1]]


def _side_a(side: Projection) -> list[Tensor | None]:
    return [None if pair is None else pair[0] for pair in side.factor_pairs()]


def _segments(x: Tensor, indices: Tensor, num_experts: int):
    """(expert, slots of its rows as int32, their tokens) for each expert that has rows."""
    plan = backend.kernels("routing", x).make_plan(indices.contiguous(), num_experts, False)
    row_to_slot, _, row_offsets, _, _ = plan
    for e, (start, end) in enumerate(itertools.pairwise(row_offsets.tolist())):
        if end > start:
            slots = row_to_slot[start:end]
            yield e, slots, slots.long() // indices.shape[1]


def _preactivation(side: Projection, pairs, e: int, base: Tensor, tokens: Tensor, z, x: Tensor):
    """(n, F) rows of gate or up, before the nonlinearity; new memory, free to be overwritten."""
    if _extra_full(side, e):
        return x[tokens] @ side.full[e].T
    rows = base.index_select(0, tokens)
    return rows.addmm_(z, pairs[e][1].T) if side.ranks[e] else rows


def forward(x, indices, weights, sides, wanted: Kept) -> tuple[Tensor, Kept]:
    """y (T, D), and G and U (T, F), the base pre-activations, for `backward`."""
    gate, up, down = sides
    acc, top_k = torch.promote_types(x.dtype, torch.float32), indices.shape[1]
    mix = backend.kernels("gated_mix", x).swiglu_accumulate
    bases = [x @ gate.full[0].T, x @ up.full[0].T]
    inputs = [_Input(x, _side_a(side), top_k) for side in (gate, up)]
    pairs = [side.factor_pairs() for side in sides]
    mixed = x.new_zeros(bases[0].shape, dtype=acc)
    delta = None
    for e, slots, tokens in _segments(x, indices, len(gate.full)):
        rows = [
            _preactivation(
                side, pair, e, base, tokens, z.rows(e, tokens) if side.ranks[e] else None, x
            )
            for side, pair, base, z in zip((gate, up), pairs, bases, inputs, strict=False)
        ]
        extra = _extra_full(down, e)
        h = _swiglu(*rows) if extra else mix(mixed, *rows, weights, slots, top_k)
        if not down.ranks[e] and not extra:
            continue
        w = weights.view(-1)[slots.long()].unsqueeze(1)
        if extra:
            y_rows = h @ down.full[e].T
        else:
            a, b = pairs[2][e]
            y_rows = ((h @ a.T) * w).to(x.dtype) @ b.T
            w = None
        delta = x.new_zeros(x.shape, dtype=acc) if delta is None else delta
        delta.index_add_(0, tokens, y_rows.to(acc) if w is None else y_rows * w)
    mixed = mixed.to(x.dtype)
    if delta is None:
        return mixed @ down.full[0].T, Kept(*bases)
    return _add_product(delta, mixed, down.full[0].T).to(x.dtype), Kept(*bases)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    acc = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(acc)) * up).to(gate.dtype)


def _extra_full(side: Projection, e: int) -> bool:
    """Whether expert e, besides the base, is full-size in this projection."""
    return e > 0 and side.layout[e] == FULL


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, total in the accumulator's dtype: in one product where the dtypes allow it."""
    return total.addmm_(a, b) if total.dtype == a.dtype else total + a @ b


def backward(dy, x, indices, weights, kept: Kept, sides, needs, side_needs):
    """(dx, dweights, gradients of the three projections), None where not needed."""
    bases = kept[:2] if kept.gate is not None else [x @ side.full[0].T for side in sides[:2]]
    state = _Backward(dy, x, weights, bases, sides, needs, side_needs)
    for e, slots, tokens in _segments(x, indices, len(sides[0].full)):
        state.add_expert(e, slots, tokens)
    return state.finish()


class _Backward:
    """What the backward sums over the experts, and the step for one of them."""

    def __init__(self, dy, x, weights, bases, sides, needs, side_needs) -> None:
        self.dy, self.x, self.weights, self.bases, self.sides = dy, x, weights, bases, sides
        acc, top_k = torch.promote_types(x.dtype, torch.float32), weights.shape[1]
        self.need_x, need_weights = needs
        inputs = [need for side in side_needs[:2] for need in side.tensors]
        self.need_hidden = self.need_x or need_weights or any(inputs)
        self.need_full = [side.full for side in side_needs]
        self.need_pairs = [side.need_pairs() for side in side_needs]
        self.side_needs = side_needs
        self.pairs = [side.factor_pairs() for side in sides]
        self.z = [_Input(x, _side_a(side), top_k) for side in sides[:2]]
        down_b = [None if pair is None else pair[1].T for pair in self.pairs[2]]
        self.q = _Input(dy, down_b, top_k)
        self.dmixed = dy @ sides[2].full[0] if self.need_hidden else None
        need_bases = self.need_x or any(full[0] for full in self.need_full[:2])
        self.dbases = [x.new_zeros(b.shape, dtype=acc) if need_bases else None for b in bases]
        self.dx = x.new_zeros(x.shape, dtype=acc) if self.need_x else None
        self.mixed = x.new_zeros(bases[0].shape, dtype=acc) if self.need_full[2][0] else None
        self.dweights = torch.zeros_like(weights) if need_weights else None
        self.grads = [_Gradients(side) for side in sides]

    def add_expert(self, e: int, slots: Tensor, tokens: Tensor) -> None:
        """Everything that comes from the rows of expert e."""
        x = self.x
        inputs = self.sides[:2]
        z = [
            z_side.rows(e, tokens) if side.ranks[e] else None
            for side, z_side in zip(inputs, self.z, strict=True)
        ]
        rows = [
            _preactivation(side, pairs, e, base, tokens, z_side, x)
            for side, pairs, base, z_side in zip(inputs, self.pairs[:2], self.bases, z, strict=True)
        ]
        w = self.weights.view(-1)[slots.long()].unsqueeze(1)
        if not self.need_hidden:
            self._add_down(e, tokens, w, _swiglu(*rows))
            return
        one_each = torch.arange(len(tokens), dtype=torch.int32)
        mix = backend.kernels("gated_mix", x)
        *drows, dweights, h = mix.swiglu_mix_backward(
            self._hidden_gradient(e, tokens), None, *rows, w, one_each, 1
        )
        if self.dweights is not None:
            self.dweights.view(-1)[slots.long()] = dweights
        self._add_down(e, tokens, w, h)
        for index, drow in enumerate(drows):
            self._add_input(index, e, tokens, drow, z[index])

    def _hidden_gradient(self, e: int, tokens: Tensor) -> Tensor:
        """(n, F): Wd_e^T dy, not yet times the weight; new memory."""
        down = self.sides[2]
        if _extra_full(down, e):
            return self.dy[tokens] @ down.full[e]
        dh = self.dmixed.index_select(0, tokens)
        return dh.addmm_(self.q.rows(e, tokens), self.pairs[2][e][0]) if down.ranks[e] else dh

    def _add_down(self, e: int, tokens: Tensor, w: Tensor, h: Tensor) -> None:
        """Gradients of down's weights."""
        down, grads, dtype = self.sides[2], self.grads[2], self.x.dtype
        if _extra_full(down, e):
            if self.need_full[2][e]:
                grads.full[e] = (self.dy[tokens] * w).to(dtype).T @ h
            return
        if self.mixed is not None:
            self.mixed.index_add_(0, tokens, h * w)
        if not down.ranks[e]:
            return
        need_a, need_b = self.need_pairs[2][e]
        if need_a:
            grads.a[e] = (self.q.rows(e, tokens) * w).to(dtype).T @ h
        if need_b:
            grads.b[e] = (self.dy[tokens] * w).to(dtype).T @ (h @ self.pairs[2][e][0].T)

    def _add_input(self, index: int, e: int, tokens: Tensor, drow: Tensor, z) -> None:
        """Gradients of gate's (0) or up's (1) weights and of x, from those of the rows before."""
        side, grads, dx = self.sides[index], self.grads[index], self.dx
        if _extra_full(side, e):
            if self.need_full[index][e]:
                grads.full[e] = drow.T @ self.x[tokens]
            if self.need_x:
                dx.index_add_(0, tokens, (drow @ side.full[e]).to(dx.dtype))
            return
        if self.dbases[index] is not None:
            self.dbases[index].index_add_(0, tokens, drow.to(self.dbases[index].dtype))
        if not side.ranks[e]:
            return
        (a, b), (need_a, need_b) = self.pairs[index][e], self.need_pairs[index][e]
        dz = drow @ b if self.need_x or need_a else None
        if need_a:
            grads.a[e] = dz.T @ self.x[tokens]
        if need_b:
            grads.b[e] = drow.T @ z
        if self.need_x:
            dx.index_add_(0, tokens, (dz @ a).to(dx.dtype))

    def finish(self):
        """The base's part, once for all tokens, and the results."""
        x, dx = self.x, self.dx
        for index, side in enumerate(self.sides[:2]):
            if self.dbases[index] is None:
                continue
            dbase = self.dbases[index].to(x.dtype)
            if self.need_full[index][0]:
                self.grads[index].full[0] = dbase.T @ x
            if self.need_x:
                dx = _add_product(dx, dbase, side.full[0])
        if self.mixed is not None:
            self.grads[2].full[0] = self.dy.T @ self.mixed.to(x.dtype)
        grads = [g.collect(need) for g, need in zip(self.grads, self.side_needs, strict=True)]
        return None if dx is None else dx.to(x.dtype), self.dweights, grads


class _Gradients:
    """The gradients of one projection as they come, expert by expert."""

    def __init__(self, side: Projection) -> None:
        self.side = side
        self.full: dict[int, Tensor] = {}
        self.a: dict[int, Tensor] = {}
        self.b: dict[int, Tensor] = {}

    def collect(self, needs: Projection) -> Projection:
        """As a projection of gradients: zero for experts without rows, None where not needed."""
        side = self.side
        full = tuple(
            _or_zero(self.full, e, weight) if need else None
            for e, (weight, need) in enumerate(zip(side.full, needs.full, strict=True))
        )
        experts = [e for e, rank in enumerate(side.ranks) if rank]
        pairs = side.factor_pairs()
        columns = []
        for index, own in enumerate((self.a, self.b)):
            wanted = [need[index] for need in needs.factors]
            if side.stacked:
                wanted = wanted * len(experts)
            columns.append(
                [
                    _or_zero(own, e, pairs[e][index]) if need else None
                    for e, need in zip(experts, wanted, strict=True)
                ]
            )
        if side.stacked:
            columns = [
                [_stack(parts, needs.factors[0][index], side.factors[0][index], axis=index)]
                for index, parts in enumerate(columns)
            ]
        factors = tuple(zip(*columns, strict=True))
        return Projection(full, factors, side.layout, side.stacked)


def _or_zero(own: dict[int, Tensor], e: int, like: Tensor) -> Tensor:
    return own[e] if e in own else torch.zeros_like(like)


def _stack(parts: list[Tensor], need: bool, whole: Tensor, axis: int) -> Tensor | None:
    if not need:
        return None
    return torch.cat(parts, dim=axis) if parts else torch.zeros_like(whole)

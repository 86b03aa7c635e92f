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
from ..projection import FULL, Projection


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    if e and side.layout[e] == FULL:
        return x[tokens] @ side.full[e].T
    rows = base.index_select(0, tokens)
    return rows.addmm_(z, pairs[e][1].T) if side.ranks[e] else rows


def forward(x, indices, weights, sides) -> tuple[Tensor, Tensor, Tensor]:
    """(y (T, D), G (T, F), U (T, F)), the base pre-activations as saved for `backward`."""
    gate, up, down = sides
    acc, top_k = _accumulator(x.dtype), indices.shape[1]
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
        extra = e > 0 and down.layout[e] == FULL
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
    return _add_base(delta, mixed.to(x.dtype), down.full[0], x.dtype), *bases


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    acc = _accumulator(gate.dtype)
    return (torch.nn.functional.silu(gate.to(acc)) * up).to(gate.dtype)


def _add_base(delta: Tensor | None, mixed: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """delta + mixed weight^T, in one product where the dtypes allow it."""
    if delta is None:
        return mixed @ weight.T
    if delta.dtype == dtype:
        return delta.addmm_(mixed, weight.T)
    return (delta + mixed @ weight.T).to(dtype)


def backward(dy, x, indices, weights, gate_TF, up_TF, sides, needs, side_needs):
    """(dx, dweights, gradients of the three projections), None where not needed."""
    gate, up, down = sides
    acc, top_k = _accumulator(x.dtype), indices.shape[1]
    need_x, need_weights = needs
    need_hidden = need_x or need_weights or any(n for s in side_needs[:2] for n in s.tensors)
    need_base = [side.full[0] for side in side_needs]
    bases = [gate_TF, up_TF]
    inputs = [_Input(x, _side_a(side), top_k) for side in (gate, up)]
    pairs = [side.factor_pairs() for side in sides]
    need_pairs = [
        side.factor_pairs() if not side.stacked else [side.factors[0]] * len(side.layout)
        for side in side_needs
    ]
    from_down = _Input(dy, [None if p is None else p[1].T for p in pairs[2]], top_k)
    dmixed = dy @ down.full[0] if need_hidden else None
    keeps_bases = need_x or any(need_base[:2])
    dbases = [x.new_zeros(base.shape, dtype=acc) if keeps_bases else None for base in bases]
    dx = x.new_zeros(x.shape, dtype=acc) if need_x else None
    mixed = x.new_zeros(gate_TF.shape, dtype=acc) if need_base[2] else None
    dweights = torch.zeros_like(weights) if need_weights else None
    grads = [_Gradients(side) for side in sides]
    kernels = backend.kernels("gated_mix", x)

    for e, slots, tokens in _segments(x, indices, len(gate.full)):
        w = weights.view(-1)[slots.long()].unsqueeze(1)
        z = [
            side_z.rows(e, tokens) if side.ranks[e] else None
            for side, side_z in zip((gate, up), inputs, strict=True)
        ]
        rows = [
            _preactivation(side, pair, e, base, tokens, z_side, x)
            for side, pair, base, z_side in zip((gate, up), pairs, bases, z, strict=False)
        ]
        extra_down = e > 0 and down.layout[e] == FULL
        if extra_down:
            dh = dy[tokens] @ down.full[e] if need_hidden else None
        elif need_hidden:
            dh = dmixed.index_select(0, tokens)
            if down.ranks[e]:
                dh.addmm_(from_down.rows(e, tokens), pairs[2][e][0])
        else:
            dh = None
        if dh is None:
            h = _swiglu(*rows)
        else:
            *drows, dw, h = kernels.swiglu_mix_backward(
                dh, None, *rows, w, torch.arange(len(tokens), dtype=torch.int32), 1
            )
            if need_weights:
                dweights.view(-1)[slots.long()] = dw
        if mixed is not None and not extra_down:
            mixed.index_add_(0, tokens, h * w)
        if down.ranks[e] or extra_down:
            need = need_pairs[2][e] if down.ranks[e] else None
            dy_w = (dy[tokens] * w).to(x.dtype)
            if need is None:
                if side_needs[2].full[e]:
                    grads[2].full[e] = dy_w.T @ h
            else:
                a, b = pairs[2][e]
                if need[0]:
                    grads[2].a[e] = (from_down.rows(e, tokens) * w).to(x.dtype).T @ h
                if need[1]:
                    grads[2].b[e] = dy_w.T @ (h @ a.T)
        if dh is None:
            continue
        for i, (side, drow) in enumerate(zip((gate, up), drows, strict=True)):
            if e and side.layout[e] == FULL:
                if side_needs[i].full[e]:
                    grads[i].full[e] = drow.T @ x[tokens]
                if need_x:
                    dx.index_add_(0, tokens, (drow @ side.full[e]).to(acc))
                continue
            if keeps_bases:
                dbases[i].index_add_(0, tokens, drow.to(acc))
            if not side.ranks[e]:
                continue
            a, b = pairs[i][e]
            dz = drow @ b if need_x or need_pairs[i][e][0] else None
            if need_pairs[i][e][0]:
                grads[i].a[e] = dz.T @ x[tokens]
            if need_pairs[i][e][1]:
                grads[i].b[e] = drow.T @ z[i]
            if need_x:
                dx.index_add_(0, tokens, (dz @ a).to(acc))

    dbases = [None if dbase is None else dbase.to(x.dtype) for dbase in dbases]
    for i, dbase in enumerate(dbases):
        if need_base[i]:
            grads[i].full[0] = dbase.T @ x
    if need_base[2]:
        grads[2].full[0] = dy.T @ mixed.to(x.dtype)
    if need_x:
        for side, dbase in zip((gate, up), dbases, strict=True):
            dx = dx.addmm_(dbase, side.full[0]) if acc == x.dtype else dx + dbase @ side.full[0]
        dx = dx.to(x.dtype)
    return dx, dweights, [g.collect(n) for g, n in zip(grads, side_needs, strict=True)]


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

"""The backward of few experts, where tokens stay in order: what all share is paid once a token.

Of the forward it computes again h and what the nonlinearity read, from x, G, U. Experts of small
ranks go through one kernel by token (hidden_backward.py); `own` experts, of large ranks or
full-size, have rows, as in the forward (own_rows.py). G W_g^T is paid for by all experts at once:

    dmixed = dy W_d;   dh_e = dmixed + q_e A_d,e, or dy W_d,e;   q_e = B_d,e^T dy
    dp_e = <dh_e, h_e>;   du_e = p dh_e silu(g_e);   dg_e = p dh_e u_e silu'(g_e)
    dG, dU: dg_e and du_e summed over a token's experts;   ds_e = B_g,e^T dg_e, a column a rank
    dx = dG W_g + dU W_u + ds A, one sum; and dg_e W_g,e + du_e W_u,e of full-size experts
    dA = ds^T x;  dB_g,e = dg_e^T A_g,e x;  dB_d = dy^T s_down;  dA_d,e = (p q_e)^T h_e
    dW_g = dG^T x,  dW_d = dy^T mixed: a dense product each, where wanted

Floors at T=16384, D=4096, F=11008, 5 of 7 experts, six of rank 64, all factors wanted, bf16, H100:
dense products 5.6 ms; the middle and the factors' gradients, see csrc/cuda/token_major_backward.cu.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..kept import Kept
from ..projection import FULL, shared_of
from ..ragged import SEGMENT, SORTED, TOKEN, RowGrads, RowProducts, Term, joined, rows_to_slots
from ..schedule import HOPPER_TOKENS
from .gradients import A, B, Gradients
from .hidden_backward import hidden_backward
from .own_rows import added_to_hidden, fill_hidden, others, shrunk, shrunk_inputs, slots_of
from .own_rows_backward import add_rows, fill_hidden_gradient, swiglu_rows_backward
from .routed import Packed, Routed, mm


def backward(dy, x, indices, weights, kept: Kept, sides, own: tuple[int, ...], needs, side_needs):
    """(dx, dweights, gradients of the three projections), None where not needed."""
    state = _Backward(dy, x, indices, weights, kept, sides, own, needs, side_needs)
    if own and state.needs_own_rows:
        state.own_middle()
    if 0 not in own and state.needs_hidden:
        state.token_middle()
    state.down_weights()
    dx = state.inputs()
    if state.work:
        state.layer.products.weight_grads(state.work, state.layer.plan)
    return dx, state.dweights, [grads.collect() for grads in state.grads]


class _Backward:
    """Step by step; each step leaves here what later ones read."""

    def __init__(self, dy, x, indices, weights, kept, sides, own, needs, side_needs) -> None:
        self.dy, self.x, self.weights, self.kept, self.sides, self.own = (
            *(dy, x, weights, kept, sides, own),
        )
        self.need_x, self.need_weights = needs
        self.layouts = [side.layout for side in sides]
        self.shared = shared_of(self.layouts)
        self.grads = [Gradients(*both) for both in zip(sides, side_needs, strict=True)]
        self.layer = Routed(x, indices, [side.without(own) for side in sides])
        self.slots = functools.cache(functools.partial(slots_of, self.layer))
        self.packed = [Packed(side) for side in sides]
        self.by_shared = added_to_hidden(self.layouts, own)
        hidden_needs = [need for side in side_needs[:2] for need in side.tensors]
        self.needs_hidden = (
            self.need_x or self.need_weights or any(hidden_needs) or self.grads[2].wants_any(A)
        )
        self.dweights = torch.zeros_like(weights) if self.need_weights else None
        self.dbases: list[Tensor | None] = [None, None]
        self.ds_others = None
        self.mixed, self.s_down = kept.mixed, kept.s_down
        self.work: list[RowGrads] = []
        self.need_s = self.need_x or any(grads.wants_any(A) for grads in self.grads[:2])

    @functools.cached_property
    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        """G and U, if any expert uses them."""
        if self.shared.hidden and self.kept.gate is None:
            return tuple(self.x @ side.full[0].T for side in self.sides[:2])
        return self.kept[:2]

    @functools.cached_property
    def dmixed(self) -> Tensor | None:
        """The hidden sum's gradient, if any expert uses the base's down matrix."""
        return self.dy @ self.sides[2].full[0] if self.shared.down else None

    @property
    def needs_own_rows(self) -> bool:
        """Whether anything that is wanted is computed from h of own experts' rows."""
        down = self.grads[2]
        again = self.wants_mixed or (down.wants_any(B) and self.s_down is None)
        return self.needs_hidden or again or any(down.needs.full[e] for e in self.own)

    def own_middle(self) -> None:
        """dg, du and p h of own experts' rows; from them all that has a row, not a token."""
        layer, kept, own = self.layer, self.kept, self.own
        inputs = self._row_inputs()
        rows, h_NF = kept[4:6], self.x.new_empty(layer.plan.num_rows, self._width)
        if kept.rows_gate is None:
            rows = torch.empty_like(h_NF), torch.empty_like(h_NF)
            fill_hidden(layer, self.sides, self.bases, own, inputs, h_NF, rows)
            if self.wants_mixed:
                self.mixed = self._mixed_again(h_NF)[0]
        given = (self.dy, self.dmixed, self.sides[2], own, self.by_shared, self.slots)
        self.dy_ND, self.q = fill_hidden_gradient(layer, *given, h_NF)
        slots = self.slots(own)
        dgate, dup, dweights = swiglu_rows_backward(h_NF, *rows, self.weights, slots)
        self.drows, self.h_NF = (dgate, dup), h_NF  # dh before, p h now
        if self.dweights is not None:
            self.dweights += dweights
        x_ND, z = inputs
        for index, drow in enumerate(self.drows):
            grads, layout = self.grads[index], self.layouts[index]
            for e in own:
                if layout[e] == FULL and not self._on_base(index, e):
                    self._row_grad(index, e, drow, x_ND)
                elif grads.wants(B)[e]:
                    out = drow.new_empty(drow.shape[1], z[index, e].shape[1])
                    self.work.append(RowGrads(e, out, drow, z[index, e], SORTED, SEGMENT))
                    grads.put(B, e, out)

    @property
    def wants_mixed(self) -> bool:
        """Whether the hidden sum is to be computed again, for the base's down matrix."""
        wanted = self.shared.down and bool(self.grads[2].needs.full[0])
        return wanted and self.mixed is None

    def _mixed_again(self, h_NF=None) -> tuple[Tensor, Tensor | None]:
        """mixed (T, F), and s_down of experts without rows, as the forward computed them."""
        layer, rows = self.layer, None
        if self.by_shared and h_NF is not None:
            rows = h_NF, self.slots(self.by_shared)
        if 0 in self.own:
            return layer.permutation.unpermute(*rows, self.weights, None), None
        plan = others(layer.plan, self.own)
        return layer.hidden(*self.bases, self.weights, plan, self.s_TR, rows)

    @functools.cached_property
    def s_TR(self) -> Tensor:
        """A x of the experts without rows."""
        return self.layer.shrunk() if self.kept.s is None else self.kept.s

    @property
    def _width(self) -> int:
        return self.sides[0].full[0].shape[0]

    def _on_base(self, index: int, e: int) -> bool:
        """Whether expert e's rows of gate or up contain the base's G or U."""
        return self.shared.hidden if e == 0 else self.layouts[index][e] != FULL

    def _row_inputs(self):
        """x permuted, and A x of own experts, as far as the recomputation or a gradient reads."""
        recomputes = self.kept.rows_gate is None
        wants = [
            recomputes or grads.wants(B)[e] or bool(grads.needs.full[e])
            for grads in self.grads[:2]
            for e in range(len(self.layouts[0]))
        ]
        wanted = tuple(e for e in self.own if wants[e] or wants[len(self.layouts[0]) + e])
        return shrunk_inputs(self.layer, self.sides, self.bases, wanted, self.slots)

    def _row_grad(self, index: int, e: int, left: Tensor, right: Tensor) -> None:
        """The gradient of a full-size weight from an expert's own rows, if it is wanted."""
        if self.grads[index].needs.full[e]:
            out = left.new_empty(left.shape[1], right.shape[1])
            self.work.append(RowGrads(e, out, left, right))
            self.grads[index].full[e] = out

    def token_middle(self) -> None:
        """The other experts, by token."""
        layer = self.layer
        plan = others(layer.plan, self.own)
        q_TR = self.dy @ layer.packed[2].b
        wants = [self.grads[0].wants(B), self.grads[1].wants(B), self.grads[2].wants(A)]
        wants = [
            tuple(bool(rank) and want for rank, want in zip(low.ranks, wanted, strict=True))
            for low, wanted in zip(layer.packed, wants, strict=True)
        ]
        given = (self.dmixed, *self.bases, self.weights, self.s_TR, q_TR)
        found = hidden_backward(layer, plan, *given, self.need_s, wants)
        self.dbases, self.ds_others = [found.dgate, found.dup], found.ds
        if self.dweights is not None:
            self.dweights += rows_to_slots(found.dots, plan.slot_to_row)
        left = [e for e in range(len(self.layouts[0])) if e not in self.own]
        for index, which, grad in ((0, B, found.db_gate), (1, B, found.db_up), (2, A, found.da)):
            self.grads[index].put_packed(which, grad, left)

    def down_weights(self) -> None:
        """Gradients of down's matrices and factors."""
        grads, s_others = self.grads[2], None
        wants_s = grads.wants_any(B) and self.s_down is None
        if self.wants_mixed or (wants_s and self.layer.packed[2].any):
            mixed, s_others = self._mixed_again()
            self.mixed = mixed if self.mixed is None else self.mixed
        if grads.needs.full[0] and self.shared.down:
            grads.full[0] = self.dy.T @ self.mixed
        if wants_s:
            self.s_down = s_others
            if self.own:
                self.s_down = shrunk(self.layer, self.sides[2], self.own, self.h_NF, s_others, None)
        if grads.wants_any(B):
            columns, experts = grads.columns(B, self.s_down)
            grads.put_packed(B, self.dy.T @ columns, experts)
        for e in self.own:
            if e not in self.by_shared:
                self._row_grad(2, e, self.dy_ND, self.h_NF)
            elif grads.wants(A)[e]:
                q = self.q[e]
                out = q.new_empty(q.shape[1], self._width)
                self.work.append(RowGrads(e, out, q, self.h_NF, SEGMENT))
                grads.put(A, e, out)

    def inputs(self) -> Tensor | None:
        """Gradients of gate's and up's A and base, and of x (T, D), which is returned."""
        x = self.x
        wants_base = [bool(grads.needs.full[0]) for grads in self.grads[:2]]
        if self.shared.hidden:
            for index in (0, 1):
                if self.need_x or wants_base[index]:
                    self._add_own_rows(index)
                if wants_base[index]:
                    self.grads[index].full[0] = self.dbases[index].T @ x
        ds_TR = self._rank_columns() if self.need_s else None
        if ds_TR is not None and any(grads.wants_any(A) for grads in self.grads[:2]):
            self._input_factors(ds_TR)
        if not self.need_x:
            return None
        total = self._shared_dx(ds_TR)
        terms = {
            e: [
                Term(drow, side.full[e].T)
                for index, (drow, side) in enumerate(zip(self.drows, self.sides, strict=False))
                if not self._on_base(index, e)
            ]
            for e in self.own
        }
        return add_rows(self.layer, total, {e: own for e, own in terms.items() if own}, self.slots)

    def _input_factors(self, ds_TR: Tensor) -> None:
        """Gradients of gate's and up's A, of those that are wanted, as one product."""
        parts = ds_TR.split([sum(packed.ranks) for packed in self.packed[:2]], 1)
        found = [grads.columns(A, part) for grads, part in zip(self.grads, parts, strict=False)]
        columns = [own for own, _ in found if own.shape[1]]
        product = joined(columns, 1).T @ self.x
        for grads, (own, experts) in zip(self.grads, found, strict=False):
            grads.put_packed(A, product[: own.shape[1]], experts)
            product = product[own.shape[1] :]

    def _shared_dx(self, ds_TR: Tensor | None) -> Tensor | None:
        """dG W_g + dU W_u + ds A, in float32 or rounded."""
        x, layer, total = self.x, self.layer, None
        a_in = None
        if ds_TR is not None and ds_TR.shape[1]:
            a_in = joined([packed.a for packed in self.packed[:2]], 0)
        if not self.shared.hidden:
            return None if a_in is None else mm(ds_TR, a_in)
        if layer.hopper is not None and x.shape[0] >= HOPPER_TOKENS:
            base = None if a_in is None else ds_TR @ a_in
            gate, up = (side.full[0].T for side in self.sides[:2])
            dx = torch.empty_like(x)
            work = RowProducts(-1, dx, Term(self.dbases[0], gate, base), Term(self.dbases[1], up))
            layer.sum_rows([work])
            return dx
        for dbase, side in zip(self.dbases, self.sides, strict=False):
            total = mm(dbase, side.full[0], total)
        return total if a_in is None else mm(ds_TR, a_in, total)

    def _add_own_rows(self, index: int) -> None:
        """The own experts' part of dG or dU."""
        experts = tuple(e for e in self.own if self._on_base(index, e))
        if experts:
            self.dbases[index] = self.layer.permutation.unpermute(
                self.drows[index], self.slots(experts), None, self.dbases[index]
            )

    def _rank_columns(self) -> Tensor | None:
        """ds (T, R_gate + R_up), packed; 0 where an expert was not chosen."""
        if not self.own:
            return self.ds_others
        ranks = [packed.ranks for packed in self.packed[:2]]
        ds_TR = self.x.new_zeros(self.x.shape[0], sum(map(sum, ranks)))
        columns, taken, work = iter(ds_TR.split([*ranks[0], *ranks[1]], 1)), 0, []
        for index, side in enumerate(self.sides[:2]):
            pairs, left = side.factor_pairs(), self.layer.packed[index].ranks
            for e, width in enumerate(left):
                out = next(columns)
                if width:
                    out.copy_(self.ds_others[:, taken : taken + width])
                    taken += width
                elif e in self.own and pairs[e] is not None:
                    term = Term(self.drows[index], pairs[e][1].T)
                    work.append(RowProducts(e, out, term))
        self.layer.sum_rows(work, None, TOKEN)
        return ds_TR

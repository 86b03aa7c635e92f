"""The forward where some experts have rows of their own: large ranks, full-size matrices.

The other experts stay token-major (token_major.py), and so does what all share: G, U, the product
of the hidden sum with W_d, and s_down B_d^T, whose columns own experts fill too. Of an own expert's
rows, sorted by expert, three kinds of grouped products are formed (grouped_gemm.py):

    z_g, z_u = A_g x, A_u x                      x permuted, own experts' rows alone
    h = silu(G + B_g z_g) * (U + B_u z_u)        G, U read by token; W_g x, W_u x where full-size
    s_down = p A_d h, by token;   W_d h, where full-size, summed by unpermute

Where no expert shares G and U, or none the down projection, nothing is computed for all tokens:
expert 0 has rows of its own then, like every other.

Floors at T=16384, D=4096, F=11008, 5 of 7 experts, ranks 256 and 2048 own, bf16, on an H100 (790
TFLOP/s, 3.0 TB/s): z 0.56 ms, h 1.50, s_down 0.75, s_down B_d^T 0.41, own rows into the hidden sum
0.42. All seven full-size: 28.0 ms of products, 0.27 ms each for permute and unpermute.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..projection import FULL, Projection, padded_rank, shared_of
from ..ragged import SEGMENT, TOKEN, RoutingPlan, RowProducts, Term, ranks_tensor
from .routed import Routed, mm


def added_to_hidden(layouts: Sequence[Sequence[int]], own: Sequence[int]) -> tuple[int, ...]:
    """Own experts whose rows of h go through the base's down projection, in the hidden sum."""
    shared, down = shared_of(layouts), layouts[2]
    return tuple(e for e in own if e == 0 and shared.down or down[e] != FULL)


def forward(x, indices, weights, sides, own: tuple[int, ...]):
    """y (T, D); G and U (T, F), None where no expert shares them. `own`: who has own rows."""
    gate, up, down = sides
    layouts = [side.layout for side in sides]
    shared = shared_of(layouts)
    F = gate.full[0].shape[0]
    # First, since it takes longest: what follows is launched while it runs.
    bases = (x @ gate.full[0].T, x @ up.full[0].T) if shared.hidden else (None, None)
    layer = Routed(x, indices, [side.without(own) for side in sides])
    products = layer.hopper or backend.kernels("grouped_gemm", x)
    h_NF = x.new_empty(layer.plan.num_rows, F)
    slots_of = functools.cache(functools.partial(_slots_of, layer))  # the same experts, mostly
    _fill_hidden(layer, products, sides, bases, own, slots_of, h_NF)
    by_shared = added_to_hidden(layouts, own)
    rows = (h_NF, slots_of(by_shared)) if by_shared else None
    mixed = s_others = y = None
    if 0 not in own:
        mixed, s_others = layer.hidden(*bases, weights, _others(layer.plan, own), rows)
    elif rows:
        mixed = layer.permutation.unpermute(*rows, weights, None)
    if shared.down:
        s_TR, b_DR = _shrunk(layer, products, sides[2], own, h_NF, s_others, weights)
        if len(by_shared) == len(own):
            return layer.down(mixed, down.full[0], s_TR, b_DR), *bases
        y = mm(mixed, down.full[0].T)
        y = mm(s_TR, b_DR.T, y) if s_TR.shape[1] else y
    full = tuple(e for e in own if e not in by_shared)
    y_ND = x.new_empty(h_NF.shape[0], x.shape[1])
    work = [RowProducts(e, y_ND, Term(h_NF, down.full[e])) for e in full]
    products.sum_rows(work, layer.plan)
    return layer.permutation.unpermute(y_ND, slots_of(full), weights, y), *bases


def _slots_of(layer: Routed, experts) -> Tensor:
    """slot_to_row (T, K) of these experts' slots alone; -1 elsewhere."""
    plan = layer.plan
    if len(experts) == plan.num_experts:
        return plan.slot_to_row
    wanted = tuple(int(e in experts) for e in range(plan.num_experts)) + (0,)  # last: an empty slot
    ids = plan.indices.clamp(-1, plan.num_experts)
    wanted = ranks_tensor(wanted, ids.device)
    return torch.where(wanted[ids] > 0, plan.slot_to_row, -1)


def _others(plan: RoutingPlan, own) -> RoutingPlan:
    """The plan where experts with rows of their own count as not chosen; rows keep their places."""
    hidden = ranks_tensor(
        tuple(int(e in own) for e in range(plan.num_experts)), plan.indices.device
    )
    return plan._replace(expert_to_row=torch.where(hidden > 0, -1, plan.expert_to_row))


def _fill_hidden(layer: Routed, products, sides, bases, own, slots_of, h_NF) -> None:
    """The own experts' rows of h, the most expensive ones first: they are handed out in order."""
    T, D = layer.x.shape
    pairs = [side.factor_pairs() for side in sides[:2]]
    reads_x = tuple(e for e in own if any(_reads_x(side, bases, e) for side in sides[:2]))
    if reads_x:
        x_ND = layer.permutation.permute(layer.x, layer.plan.row_to_slot, slots_of(reads_x))
    shrinks, gates = [], []
    for e in own:
        terms, depth = [], 0
        for side, side_pairs, base in zip(sides[:2], pairs, bases, strict=True):
            kind = side.layout[e]
            if e == 0 and base is not None or kind == 0:
                terms.append(Term(base=base))
            elif kind == FULL:
                terms.append(Term(x_ND, side.full[e]))
                depth += D
            else:
                a, b = side_pairs[e]
                z = layer.x.new_empty(T, padded_rank(kind))
                shrinks.append(RowProducts(e, z, Term(x_ND, a)))
                terms.append(Term(z, b, base, SEGMENT))
                depth += kind
        gates.append((depth, RowProducts(e, h_NF, *terms)))
    if shrinks:
        shrinks.sort(key=lambda item: -item.out.shape[1])
        products.sum_rows(shrinks, layer.plan, None, SEGMENT)
    gates.sort(key=lambda pair: -pair[0])
    products.gated_rows([item for _, item in gates], layer.plan)


def _reads_x(side: Projection, bases, e: int) -> bool:
    return bases[0] is None if e == 0 else side.layout[e] != 0


def _shrunk(layer: Routed, products, down: Projection, own, h_NF, s_others, weights):
    """s_down (T, R) = p A_d h and B_d (D, R) of all low-rank experts; columns of a token that did
    not choose an expert are zero.
    """
    low, plan, x = layer.packed[2], layer.plan, layer.x
    pairs = down.factor_pairs()
    mine = [e for e in own if pairs[e] is not None]
    widths = [padded_rank(down.layout[e]) for e in mine]
    fused = low.b.shape[1]
    s_TR = x.new_zeros(x.shape[0], fused + sum(widths))
    if low.any:
        s_TR[:, :fused] = s_others
    columns = s_TR[:, fused:].split(widths, 1)
    order = sorted(zip(mine, columns, strict=True), key=lambda pair: -pair[1].shape[1])
    work = [RowProducts(e, out, Term(h_NF, pairs[e][0])) for e, out in order]
    if work:
        products.sum_rows(work, plan, weights, TOKEN)
    factors = [low.b]
    for e, width in zip(mine, widths, strict=True):
        b = pairs[e][1]
        factors.append(torch.nn.functional.pad(b, (0, width - b.shape[1])))
    return s_TR, torch.cat(factors, 1)

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

from ..kept import Kept
from ..projection import FULL, RANK_MULTIPLE, Projection, padded_rank, shared_of
from ..ragged import SEGMENT, TOKEN, RoutingPlan, RowProducts, Term, ranks_tensor
from .routed import Packed, Routed, mm


def added_to_hidden(layouts: Sequence[Sequence[int]], own: Sequence[int]) -> tuple[int, ...]:
    """Own experts whose rows of h go through the base's down projection, in the hidden sum."""
    shared, down = shared_of(layouts), layouts[2]
    return tuple(e for e in own if e == 0 and shared.down or down[e] != FULL)


def forward(x, indices, weights, sides, own: tuple[int, ...], wanted: Kept):
    """y (T, D), and what is `wanted` for the backward. `own`: who has own rows."""
    gate, up, down = sides
    layouts = [side.layout for side in sides]
    shared = shared_of(layouts)
    F = gate.full[0].shape[0]
    # First, since it takes longest: what follows is launched while it runs.
    bases = (x @ gate.full[0].T, x @ up.full[0].T) if shared.hidden else (None, None)
    layer = Routed(x, indices, [side.without(own) for side in sides])
    h_NF = x.new_empty(layer.plan.num_rows, F)
    slots = functools.cache(functools.partial(slots_of, layer))  # of the same experts, mostly
    rows_kept = (torch.empty_like(h_NF), torch.empty_like(h_NF)) if wanted.rows_gate else None
    inputs = shrunk_inputs(layer, sides, bases, own, slots)
    fill_hidden(layer, sides, bases, own, inputs, h_NF, rows_kept)
    by_shared = added_to_hidden(layouts, own)
    rows = (h_NF, slots(by_shared)) if by_shared else None
    mixed = s_others = s_TR = y = None
    if 0 not in own:
        plan = others(layer.plan, own)
        mixed, s_others = layer.hidden(*bases, weights, plan, layer.shrunk(), rows)
    elif rows:
        mixed = layer.permutation.unpermute(*rows, weights, None)
    full = tuple(e for e in own if e not in by_shared)
    if shared.down:
        b_DR = Packed(down).b
        s_TR = shrunk(layer, down, own, h_NF, s_others, weights)
        if not full:
            y = layer.down(mixed, down.full[0], s_TR, b_DR)
        else:
            y = mm(mixed, down.full[0].T)
            y = mm(s_TR, b_DR.T, y) if s_TR.shape[1] else y
    if full:
        y_ND = x.new_empty(h_NF.shape[0], x.shape[1])
        work = [RowProducts(e, y_ND, Term(h_NF, down.full[e])) for e in full]
        layer.sum_rows(work)
        y = layer.permutation.unpermute(y_ND, slots(full), weights, y)
    return y, Kept(*bases, s_TR, mixed, *(rows_kept or (None, None)))


def slots_of(layer: Routed, experts) -> Tensor:
    """slot_to_row (T, K) of these experts' slots alone; -1 elsewhere."""
    plan = layer.plan
    if len(experts) == plan.num_experts:
        return plan.slot_to_row
    wanted = tuple(int(e in experts) for e in range(plan.num_experts)) + (0,)  # last: an empty slot
    ids = plan.indices.clamp(-1, plan.num_experts)
    wanted = ranks_tensor(wanted, ids.device)
    return torch.where(wanted[ids] > 0, plan.slot_to_row, -1)


def others(plan: RoutingPlan, own) -> RoutingPlan:
    """The plan where experts with rows of their own count as not chosen; rows keep their places."""
    if not own:
        return plan
    hidden = ranks_tensor(
        tuple(int(e in own) for e in range(plan.num_experts)), plan.indices.device
    )
    return plan._replace(expert_to_row=torch.where(hidden > 0, -1, plan.expert_to_row))


def shrunk_inputs(layer: Routed, sides, bases, own, slots):
    """x permuted (N, D) for those of `own` that read it, else None; and A x of their low-rank
    projections, by (0 gate or 1 up, expert): (T, rank padded), the rows of a segment."""
    z, work, T = {}, [], layer.x.shape[0]
    reads_x = tuple(e for e in own if any(_reads_x(side, bases, e) for side in sides[:2]))
    if not reads_x:
        return None, z
    x_ND = layer.permutation.permute(layer.x, layer.plan.row_to_slot, slots(reads_x))
    for index, side in enumerate(sides[:2]):
        pairs = side.factor_pairs()
        for e in own:
            if side.ranks[e]:
                z[index, e] = layer.x.new_empty(T, padded_rank(side.ranks[e]))
                work.append(RowProducts(e, z[index, e], Term(x_ND, pairs[e][0])))
    layer.sum_rows(work, None, SEGMENT)
    return x_ND, z


def fill_hidden(layer: Routed, sides, bases, own, inputs, h_NF, kept=None) -> None:
    """The own experts' rows of h, the most expensive ones first: they are handed out in order.

    inputs: `shrunk_inputs`; kept: rows (N, F) for what comes before the nonlinearity, of gate, up.
    """
    gates, (x_ND, z) = [], inputs
    pairs = [side.factor_pairs() for side in sides[:2]]
    for e in own:
        terms, depth = [], 0
        for index, (side, base) in enumerate(zip(sides[:2], bases, strict=True)):
            kind = side.layout[e]
            if e == 0 and base is not None or kind == 0:
                terms.append(Term(base=base))
            elif kind == FULL:
                terms.append(Term(x_ND, side.full[e]))
                depth += layer.x.shape[1]
            else:
                terms.append(Term(z[index, e], pairs[index][e][1], base, SEGMENT))
                depth += kind
        gates.append((depth, RowProducts(e, h_NF, *terms)))
    gates.sort(key=lambda pair: -pair[0])
    layer.products.gated_rows([item for _, item in gates], layer.plan, kept)


def _reads_x(side: Projection, bases, e: int) -> bool:
    return bases[0] is None if e == 0 else side.layout[e] != 0


def shrunk(layer: Routed, down: Projection, own, h_NF, s_others, weights) -> Tensor:
    """s_down (T, R) = p A_d h of all low-rank experts, in the order and width of packed factors;
    columns of a token that did not choose an expert are zero. s_others: of who is not `own`.
    """
    ranks, left = down.padded_ranks(RANK_MULTIPLE), layer.packed[2].ranks
    s_TR = layer.x.new_zeros(layer.x.shape[0], sum(ranks))
    work, taken, pairs = [], 0, down.factor_pairs()
    for e, (out, rank) in enumerate(zip(s_TR.split(ranks, 1), left, strict=True)):
        if rank:
            out.copy_(s_others[:, taken : taken + rank])
            taken += rank
        elif e in own and pairs[e] is not None:
            work.append(RowProducts(e, out, Term(h_NF, pairs[e][0])))
    layer.sum_rows(work, weights, TOKEN)
    return s_TR

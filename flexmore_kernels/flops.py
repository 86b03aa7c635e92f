"""Flops of every op, for `torch.utils.flop_counter.FlopCounterMode`: the useful ones.

As torch does, a multiplication and an addition are two, and only products of matrices count:
routing, sorting, moving rows and SwiGLU are nothing here. Useful is what the mathematics asks for,
each product once: the base once per token, no padding, no recomputation in a backward.

How many rows an expert gets is on the device, where a counter does not look. So each token is taken
to have chosen the K most expensive experts: exact when K = E, or when the experts cost the same and
no slot is empty, else an upper bound.

torch's counter costs 0.2 s to import, so the formulas are registered when somebody imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence

import torch

from . import ops  # noqa: F401  (defines what is registered here)
from .projection import unflatten

_COUNTER = "torch.utils.flop_counter"
_Shape = Sequence[int]


def _nothing(*_, **__) -> int:
    return 0


def _route_linear(x: _Shape, weight: _Shape, *_, **__) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _grouped_gemm(x: _Shape, weights: Sequence[_Shape], *_, **__) -> int:
    return 2 * x[0] * weights[0][0] * weights[0][1]


def _grouped_gemm_backward(dy, x, weights, row_offsets, needs, **_) -> int:
    return (int(needs[0]) + int(any(needs[1:]))) * _grouped_gemm(x, weights)


def _shrink(x, a, row_offsets, row_to_slot, ranks, size, **_) -> int:
    return 2 * size * x[1]


def _expand(z, b, *_, **__) -> int:
    return 2 * z[0] * b[0]


def _factor_grad(z, x, *_, **__) -> int:
    return 2 * z[0] * x[1]


def _gated_mix(gate, up, weights, *rest, **_) -> int:
    z_gate, _, _, z_up, _, _ = rest[6:]
    return 2 * (z_gate[0] + z_up[0]) * gate[1]


def _gated_mix_backward(dmixed, drows, *rest, **_) -> int:
    """dz and db of both sides: two products where the forward has one."""
    return 2 * _gated_mix(*rest)


def _experts(x, indices, weights, tensors, layout, stacked, *_, **__) -> int:
    tokens, hidden = x
    width, top_k = tensors[0][0], indices[1]
    sides = unflatten(tensors, layout, stacked)
    per_expert = [0] * (len(layout) // len(stacked))
    for side in sides:
        for e, kind in enumerate(side.layout):
            if e and side.full[e] is not None:
                per_expert[e] += 2 * hidden * width
            elif kind > 0:
                per_expert[e] += 2 * kind * (hidden + width)
    return tokens * (6 * hidden * width + _dearest(per_expert, top_k))


def _experts_backward(dy, x, indices, weights, kept, tensors, layout, stacked, needs, **_) -> int:
    tokens, hidden = x
    width, top_k = tensors[0][0], indices[1]
    sides = unflatten(needs[2:], layout, stacked)
    need_x = needs[0]
    need_hidden = any(needs[:2]) or any(need for side in sides[:2] for need in side.tensors)
    # dmixed = W_d^T dy, then dx through gate and up, then the gradients of the base's weights.
    dense = int(need_hidden) + 2 * int(need_x) + sum(int(side.full[0]) for side in sides)
    per_expert = [0] * (len(layout) // len(stacked))
    for index, side in enumerate(sides):
        need_in = need_hidden if index == 2 else need_x
        pairs = side.need_pairs()
        for e, kind in enumerate(side.layout):
            if e and side.full[e] is not None:
                per_expert[e] += 2 * hidden * width * (int(need_in) + int(side.full[e]))
            elif kind > 0:
                per_expert[e] += 2 * kind * _factor_widths(index, hidden, width, need_in, *pairs[e])
    return tokens * (2 * hidden * width * dense + _dearest(per_expert, top_k))


def _factor_widths(index, hidden, width, need_in, need_a, need_b) -> int:
    """Of one expert's backward, products per unit of rank and row: the sum of their widths."""
    outer, inner = (hidden, width) if index == 2 else (width, hidden)
    through_b = outer * int(need_in or need_a)  # b^T dy, the gradient of a x
    through_a = inner * int(need_in)
    return through_b + through_a + inner * int(need_a) + outer * int(need_b)


def _dearest(per_expert: Sequence[int], top_k: int) -> int:
    return sum(sorted(per_expert, reverse=True)[:top_k])


FORMULAS = {
    "topk_route": _nothing,
    "topk_route_backward": _nothing,
    "topk_route_linear": _route_linear,
    "attribute_": _nothing,
    "make_plan": _nothing,
    "permute": _nothing,
    "unpermute": _nothing,
    "unpermute_backward": _nothing,
    "grouped_gemm": _grouped_gemm,
    "grouped_gemm_backward": _grouped_gemm_backward,
    "shrink": _shrink,
    "expand": _expand,
    "factor_grad": _factor_grad,
    "gated_mix": _gated_mix,
    "gated_mix_backward": _gated_mix_backward,
    "experts": _experts,
    "experts_backward": _experts_backward,
}
"""By the name of the op in torch.ops.flexmore; the arguments are the op's, shapes for tensors."""


def _register(counter) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.flexmore, name))(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Lets the counter's own loader load it, then registers."""

    def find_spec(self, name, path, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())

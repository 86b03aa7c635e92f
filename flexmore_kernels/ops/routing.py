"""Routing: which experts a token goes to, with which weight, and where its rows go.

Kernels: the compiled library where it is there, but on a GPU Triton for topk_route from x with few
experts; without the library, Triton on a GPU and aten on a CPU.
Cost: topk_route reads x once (T*D) and the router (E*D); from logits it moves T*(E + 2K) numbers.
make_plan reads N = T*K ids and writes about 3N + T*(E + 1) int32. Maths: reference/routing.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..checks import (
    FLOATS,
    SCORINGS,
    check_ids,
    check_int,
    check_one_of,
    check_routable,
    check_tensor,
    checks_values,
)
from ..library import define
from ..ragged import MAX_SET_EXPERTS, RoutingPlan
from ..shared_expert import candidates, with_slot
from ..slow_paths import contiguous

_kernels = "routing"


class Routing(NamedTuple):
    """What a router decided for T tokens: logits (T, E) raw, weights and indices (T, K).

    Weights are float32 (float64 from float64 logits), indices int64. Slots are in the order of
    selection; empty slots come last, with index E and weight 0.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor


def topk_route(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    top_k: int,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    norm_topk_prob: bool = False,
    scoring: str = "softmax",
    shared: int | None = None,
) -> Routing:
    """Choose each token's top-k experts, and what each of them weighs.

    logits = x weight^T; v = logits + min(bias, 0) on experts 1..; the first K allowed experts by (v
    descending, index ascending) are selected, and weigh, by `scoring`:

        "softmax"       p, the softmax of v over all allowed experts
        "topk_softmax"  the softmax of v over the selected; `norm_topk_prob` changes nothing
        "sigmoid"       1 / (1 + exp(-v))
        "unit"          1, without a gradient to the logits

    and with `norm_topk_prob` that, divided by its sum over the selected.

    Args:
        x: (T, D) tokens, or the logits (T, E) themselves when `weight` is None; any float dtype.
        weight: (E, D) router rows in x's dtype.
        top_k: K, from 1 to E.
        bias: (E - 1,) for experts 1..; any float dtype. Gradient 1 below 0, 0.5 at 0, 0 above.
        mask: bool (E,) or (T, E), the experts that a token may use. Others are never selected; with
            fewer than K allowed, fewer are selected.
        norm_topk_prob: renormalise over the selected.
        scoring: "softmax", "topk_softmax", "sigmoid" or "unit".
        shared: an expert that is always on: no candidate, outside the softmax, with weight 1 in a
            slot before the others'; top_k, up to E - 1, does not count it. A token whose mask
            excludes it has an empty slot there, and needs no other expert where it is allowed.

    Returns:
        Routing(logits, weights, indices); logits are raw (no bias, no mask), in x's dtype. With
        `shared` there are K + 1 slots.

    Raises ValueError or TypeError naming the argument. A token without an allowed expert, or with a
    NaN logit, raises on the CPU and inside `validation()`; elsewhere all its slots are empty.
    Deterministic; the same logits give the same indices on every device. No host sync.
    Differentiable in x, weight and bias, through weights and logits.
    Sources: softmax: FlexOlmo (arXiv 2507.07024, section 3) and its Hugging Face router;
    topk_softmax: arXiv 1701.06538, section 2.1; sigmoid: DeepSeek-V3 (arXiv 2412.19437, 2.1.2);
    shared: Nexus (arXiv 2408.15901, section 2).
    """
    check_tensor("x", x, ("T", "E" if weight is None else "D"), FLOATS)
    if weight is not None:
        check_tensor("weight", weight, ("E", x.shape[1]), (x.dtype,), x.device)
    num_experts = x.shape[1] if weight is None else weight.shape[0]
    if shared is not None:
        shared = check_int("shared", shared, 0, num_experts - 1)
    routed = num_experts if shared is None else num_experts - 1
    top_k = check_int("top_k", top_k, 1, routed)
    if not isinstance(norm_topk_prob, bool):
        raise TypeError(f"norm_topk_prob: got {norm_topk_prob!r}; accepted: True or False")
    check_one_of("scoring", scoring, SCORINGS)
    if scoring == "topk_softmax":  # for the kernels the same as
        scoring, norm_topk_prob = "softmax", True
    if bias is not None:
        check_tensor("bias", bias, (num_experts - 1,), FLOATS, x.device)
        bias = bias.contiguous()
    if mask is not None:
        mask = _check_mask(mask, x.shape[0], num_experts, x.device)
    how = (bias, mask, top_k, norm_topk_prob, scoring, shared)
    if weight is None:
        routing = Routing(x, *torch.ops.flexmore.topk_route(x, *how))
    else:
        routing = Routing(*torch.ops.flexmore.topk_route_linear(x, weight, *how))
    return routing._replace(weights=routing.weights.detach()) if scoring == "unit" else routing


def make_plan(indices: Tensor, num_experts: int) -> RoutingPlan:
    """Sort the routed slots by expert and, for E <= 8, the tokens by their set of experts.

    A stable counting sort: rows of one expert keep the order of their slots. The fields of
    `RoutingPlan` are documented, with a worked example, in `flexmore_kernels.ragged`.

    Args:
        indices: (T, K) int64 or int32, distinct ids within a token; an id outside [0, E) is an
            empty slot. On the CPU and inside `validation()` ids above E, below 0 or repeated raise.
        num_experts: E, from 1 to 1024.

    Raises ValueError or TypeError naming the argument.
    Deterministic. No host sync; sizes depend on T, K and E alone, so a CUDA graph can capture it.
    """
    check_tensor("indices", indices, ("T", "K"), (torch.int64, torch.int32))
    if indices.shape[1] == 0:
        raise ValueError("indices: got no slots a token; accepted: (T, K) with K >= 1")
    num_experts = check_int("num_experts", num_experts, 1, 1024)
    indices = indices.to(torch.int64)
    maps = torch.ops.flexmore.make_plan(indices, num_experts)
    return RoutingPlan(indices, *maps, num_experts, indices.shape[1])


def _check_mask(mask: Tensor, num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    fits = isinstance(mask, Tensor) and mask.shape in ((num_experts,), (num_tokens, num_experts))
    if isinstance(mask, Tensor) and not fits:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}; accepted: ({num_experts},) or "
            f"({num_tokens}, {num_experts})"
        )
    check_tensor("mask", mask, None, (torch.bool,), device)
    return mask.expand(num_tokens, num_experts)


def _topk_route(logits, bias, mask, top_k, norm_topk_prob, scoring, shared=None):
    if checks_values(logits):
        check_routable(logits, mask, shared)
    kernels = backend.kernels(_kernels, logits)
    chosen = kernels.topk_route(
        *(contiguous("logits", logits), bias, candidates(logits, logits.shape[1], mask, shared)),
        *(top_k, norm_topk_prob, scoring),
    )
    return with_slot(*chosen, mask, shared, logits.shape[1])


def _topk_route_fake(logits, bias, mask, top_k, norm_topk_prob, scoring, shared=None):
    shape = (logits.shape[0], top_k if shared is None else top_k + 1)
    acc = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(shape, dtype=acc), logits.new_empty(shape, dtype=torch.int64)


def _topk_route_linear(x, weight, bias, mask, top_k, norm_topk_prob, scoring, shared=None):
    x, weight = contiguous("x", x), contiguous("weight", weight)
    kernels = backend.library(_kernels, x)
    if kernels is None or not kernels.few_serve(x, weight):
        kernels = backend.kernels(_kernels, x, "topk_route_linear", weight.shape[0])
    E = weight.shape[0]
    logits, *chosen = kernels.topk_route_linear(
        *(x, weight, bias, candidates(x, E, mask, shared), top_k, norm_topk_prob, scoring)
    )
    if checks_values(logits):
        check_routable(logits, mask, shared)
    return logits, *with_slot(*chosen, mask, shared, E)


def _topk_route_linear_fake(x, weight, bias, mask, top_k, norm_topk_prob, scoring, shared=None):
    logits = x.new_empty((x.shape[0], weight.shape[0]))
    return (logits, *_topk_route_fake(logits, bias, mask, top_k, norm_topk_prob, scoring, shared))


def _topk_route_backward(
    dweights, logits, bias, mask, indices, norm_topk_prob, scoring, shared=None
):
    if shared is not None:
        mask = candidates(logits, logits.shape[1], mask, shared)
        dweights, indices = dweights[:, 1:], indices[:, 1:].contiguous()
    if scoring == "unit":  # constant weights: nothing to launch
        return logits.new_zeros(logits.shape, dtype=dweights.dtype)
    kernels = backend.kernels(_kernels, logits)
    return kernels.topk_route_backward(
        dweights.contiguous(), logits.contiguous(), bias, mask, indices, norm_topk_prob, scoring
    )


def _topk_route_backward_fake(dweights, logits, *_):
    return logits.new_empty(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32))


def _dbias(dlogits: Tensor, bias: Tensor) -> Tensor:
    """Gradient of min(bias, 0): 1 below 0, 0.5 at 0, 0 above, as torch.minimum splits a tie."""
    slope = (bias < 0).to(dlogits.dtype) + 0.5 * (bias == 0).to(dlogits.dtype)
    return (dlogits[:, 1:].sum(dim=0) * slope).to(bias.dtype)


def _setup_topk_route(ctx, inputs, output):
    logits, bias, mask, _, *ctx.how = inputs
    ctx.save_for_backward(logits, bias, mask, output[1])


def _backward_topk_route(ctx, dweights, _):
    logits, bias, mask, indices = ctx.saved_tensors
    saved = (logits, bias, mask, indices)
    dlogits = torch.ops.flexmore.topk_route_backward(dweights, *saved, *ctx.how)
    dbias = _dbias(dlogits, bias) if ctx.needs_input_grad[1] else None
    return dlogits.to(logits.dtype), dbias, *(None,) * 5


def _setup_topk_route_linear(ctx, inputs, output):
    x, weight, bias, mask, _, *ctx.how = inputs
    ctx.save_for_backward(x, weight, bias, mask, output[0], output[2])


def _backward_topk_route_linear(ctx, dlogits_out, dweights, _):
    x, weight, bias, mask, logits, indices = ctx.saved_tensors
    dlogits = torch.ops.flexmore.topk_route_backward(
        dweights, logits, bias, mask, indices, *ctx.how
    )
    dbias = _dbias(dlogits, bias) if ctx.needs_input_grad[2] else None
    dlogits = (dlogits + dlogits_out).to(x.dtype)
    E = weight.shape[0]
    if x.element_size() == 2 and E % 8:  # cuBLAS's fast kernels need rows of 16 bytes
        dlogits = torch.nn.functional.pad(dlogits, (0, -E % 8))
        weight = torch.nn.functional.pad(weight, (0, 0, 0, -E % 8))
    dx = dlogits @ weight if ctx.needs_input_grad[0] else None
    dweight = (dlogits.T @ x)[:E] if ctx.needs_input_grad[1] else None
    return dx, dweight, dbias, *(None,) * 5


def _make_plan(indices, num_experts):
    if checks_values(indices):
        check_ids("indices", indices, num_experts)
    by_set = num_experts <= MAX_SET_EXPERTS
    return backend.kernels(_kernels, indices).make_plan(indices.contiguous(), num_experts, by_set)


def _make_plan_fake(indices, num_experts):
    num_tokens, top_k = indices.shape
    by_set = num_experts <= MAX_SET_EXPERTS

    def ints(*shape):
        return indices.new_empty(shape, dtype=torch.int32)

    return (
        ints(num_tokens * top_k),
        ints(num_tokens, top_k),
        ints(num_experts + 1),
        ints(num_tokens if by_set else 0),
        ints(num_tokens, num_experts) if by_set else ints(0, 0),
    )


define(
    "topk_route(Tensor logits, Tensor? bias, Tensor? mask, int top_k, bool norm_topk_prob,"
    " str scoring, int? shared=None) -> (Tensor, Tensor)",
    _topk_route,
    _topk_route_fake,
    backward=_backward_topk_route,
    setup_context=_setup_topk_route,
)
define(
    "topk_route_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, int top_k,"
    " bool norm_topk_prob, str scoring, int? shared=None) -> (Tensor, Tensor, Tensor)",
    _topk_route_linear,
    _topk_route_linear_fake,
    backward=_backward_topk_route_linear,
    setup_context=_setup_topk_route_linear,
)
define(
    "topk_route_backward(Tensor dweights, Tensor logits, Tensor? bias, Tensor? mask,"
    " Tensor indices, bool norm_topk_prob, str scoring, int? shared=None) -> Tensor",
    _topk_route_backward,
    _topk_route_backward_fake,
)
define(
    "make_plan(Tensor indices, int num_experts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _make_plan,
    _make_plan_fake,
)

"""Router losses and counters: load balancing, z-loss, load and entropy per expert.

Made of aten's ops, which torch differentiates and torch.compile fuses: no kernels of its own.
Cost: they read T*E logits and T*K ids, and move a few times T*E numbers. Nothing is read back by
the host: tokens that do not count are zeroed, not cut out, and slots are counted by a sum, not by
atomics. Maths: reference/router_loss.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import FLOATS, SCORINGS, check_one_of, check_tensor, check_weights
from ..counters import RouterStatistics

FORMS = ("huggingface", "olmo_core")


def load_balancing_loss(
    logits: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    *,
    form: str = "huggingface",
    scoring: str = "softmax",
    bias: Tensor | Sequence[Tensor | None] | None = None,
    mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """How unevenly the router spreads the tokens: smallest where load and scores are even.

    With n tokens that count, c_e their slots at expert e, q the router's distribution over the
    allowed experts (softmax; for scoring "sigmoid" the sigmoids divided by their sum) and A the
    number of experts that some token may use (E without a mask):

        "huggingface"  A sum_e (c_e / n) mean_t q_te      c, n, mean over all layers; even: K
        "olmo_core"    A sum_e (c_e / n) mean_t q_te / K  added up over the layers; even: 1 each

    Args:
        logits: raw router logits (..., E), any float dtype; or a sequence of them, one a layer.
        indices: the selected ids (..., K) int64 or int32, distinct within a token, as `topk_route`
            gives them; likewise. Ids outside [0, E) are empty slots.
        form: "huggingface" or "olmo_core".
        scoring: that of `topk_route`. Hugging Face's function knows softmax alone.
        bias: (E - 1,), as in `topk_route`; for several layers a sequence, one a layer (or None).
        mask: bool (E,) or (..., E), the experts that a token may use; for every layer.
        padding_mask: bool, True at real tokens, one entry a token ((...,) or as many in another
            shape); for every layer. None: all are real.

    Returns: () float32, float64 for float64 logits. 0 without tokens. A token without an allowed
    expert, with a NaN logit or an infinite largest one counts as padding.
    Raises ValueError or TypeError naming the argument.
    Differentiable in logits and bias (the counts are constant). Deterministic. No host sync.
    Sources: Switch Transformers (arXiv 2101.03961, eq. 4-6); load_balancing_loss_func of Hugging
    Face's OLMoE and FlexOlmo; load_balancing_loss of OLMo-core (nn/moe/loss.py, local_batch).
    """
    check_one_of("form", form, FORMS)
    check_one_of("scoring", scoring, SCORINGS)
    count = _num_layers(logits)
    logits, indices = _per_layer("logits", logits, count), _per_layer("indices", indices, count)
    biases = _per_layer("bias", bias, count)
    sums = []
    for layer, (given, ids, b) in enumerate(zip(logits, indices, biases, strict=True)):
        at = "" if count is None else f"[{layer}]"
        _check(at, given, b, mask, padding_mask, like=logits[0])
        _check_ids(at, ids, given)
        v_TE, counts_T1 = _counted(given, b, mask, padding_mask)
        q_TE = _distribution(v_TE, counts_T1, scoring)
        load_E = _at_experts(ids, counts_T1, given.shape[-1]).sum(0)
        experts_E = _allowed_somewhere(mask, counts_T1, given.shape[-1])
        sums.append((load_E, q_TE.sum(0), counts_T1.sum(), experts_E))
    if form == "huggingface":
        loads, scores, tokens, experts = (torch.stack(part) for part in zip(*sums, strict=True))
        return _evenness(loads.sum(0), scores.sum(0), tokens.sum(), experts.any(0))
    losses = [_evenness(*s) / ids.shape[-1] for s, ids in zip(sums, indices, strict=True)]
    return torch.stack(losses).sum()


def router_z_loss(
    logits: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """How large the logits are: the mean over tokens of logsumexp(v)^2, over the allowed experts.

    v = logits + min(bias, 0) on experts 1... The loss of several layers is the sum of theirs.
    Arguments, result, errors as for `load_balancing_loss`. Differentiable in logits and bias.
    Deterministic. No host sync. Sources: ST-MoE (arXiv 2202.08906, eq. 5); router_z_loss of
    OLMo-core.
    """
    count = _num_layers(logits)
    logits, biases = _per_layer("logits", logits, count), _per_layer("bias", bias, count)
    losses = []
    for layer, (given, b) in enumerate(zip(logits, biases, strict=True)):
        at = "" if count is None else f"[{layer}]"
        _check(at, given, b, mask, padding_mask, like=logits[0])
        v_TE, counts_T1 = _counted(given, b, mask, padding_mask)
        z_T1 = v_TE.logsumexp(1, keepdim=True).masked_fill(~counts_T1, 0)
        losses.append(z_T1.square().sum() / counts_T1.sum().clamp(min=1))
    return torch.stack(losses).sum()


@torch.no_grad()
def router_statistics(
    logits: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> RouterStatistics:
    """Counters of one layer's routing: load, weights, scores and entropy of each expert.

    Of what a layer's `return_routing` gave: `router_statistics(routing.logits, routing.indices,
    routing.weights)`. Arguments as for `load_balancing_loss`; weights (..., K) float32 (float64 for
    float64 logits), None: not summed. Returns `flexmore_kernels.RouterStatistics`, its sums in
    float32 (float64). Raises ValueError or TypeError naming the argument. Not differentiable.
    Deterministic. No host sync.
    """
    check_one_of("scoring", scoring, SCORINGS)
    _check("", logits, bias, mask, padding_mask, like=logits)
    _check_ids("", indices, logits)
    E = logits.shape[-1]
    v_TE, counts_T1 = _counted(logits, bias, mask, padding_mask)
    q_TE = _distribution(v_TE, counts_T1, scoring)
    if weights is None:
        weight_sum_E = q_TE.new_zeros(E)
    else:
        check_weights("weights", weights, indices.shape, logits)
        weight_sum_E = _at_experts(indices, counts_T1, E, weights).sum(0)
    load_E = _at_experts(indices, counts_T1, E).sum(0)
    entropy_E = torch.special.entr(q_TE).sum(0)
    return RouterStatistics(counts_T1.sum(), load_E, weight_sum_E, q_TE.sum(0), entropy_E)


def biased(v: Tensor, bias: Tensor | None) -> Tensor:
    """v (..., E) + min(bias, 0) on experts 1..; the gradient of a bias of 0 is half, as a tie's."""
    if bias is None:
        return v
    return v + F.pad(torch.minimum(bias, torch.zeros_like(bias)).to(v.dtype), (1, 0))


def _counted(logits, bias, mask, padding_mask) -> tuple[Tensor, Tensor]:
    """(v (T, E), counts (T, 1)): -inf where excluded, zeros where the token does not count.

    So everything that is computed from v is finite, and so are the gradients.
    """
    E = logits.shape[-1]
    v_TE = logits.reshape(-1, E).to(torch.promote_types(logits.dtype, torch.float32))
    v_TE = biased(v_TE, bias)
    if mask is not None:
        v_TE = v_TE.masked_fill(~mask.reshape(-1, E), -torch.inf)
    counts_T1 = v_TE.detach().amax(1, keepdim=True).isfinite()  # amax propagates NaN
    if padding_mask is not None:
        counts_T1 = counts_T1 & padding_mask.reshape(-1, 1)
    return v_TE.masked_fill(~counts_T1, 0), counts_T1


def _distribution(v_TE: Tensor, counts_T1: Tensor, scoring: str) -> Tensor:
    """q (T, E), 0 where the token does not count. In logarithms no sum of sigmoids underflows."""
    u_TE = F.logsigmoid(v_TE) if scoring == "sigmoid" else v_TE
    return u_TE.softmax(1).masked_fill(~counts_T1, 0)


def _at_experts(indices, counts_T1, num_experts: int, weights=None) -> Tensor:
    """(T, E): 1, or the slot's weight, at the experts that a token that counts has selected."""
    ids_TK = indices.reshape(-1, indices.shape[-1]).long()
    routed_TK = (ids_TK >= 0) & (ids_TK < num_experts) & counts_T1
    ids_TK = torch.where(routed_TK, ids_TK, num_experts)  # one more column for all others
    shape = (ids_TK.shape[0], num_experts + 1)
    if weights is None:
        at_TE = torch.zeros(shape, dtype=torch.bool, device=ids_TK.device)
        return at_TE.scatter_(1, ids_TK, True)[:, :num_experts]
    at_TE = weights.new_zeros(shape)
    return at_TE.scatter_(1, ids_TK, weights.reshape(ids_TK.shape))[:, :num_experts]


def _allowed_somewhere(mask: Tensor | None, counts_T1: Tensor, num_experts: int) -> Tensor:
    """bool (E,): the experts that at least one token that counts may use."""
    if mask is None:
        return counts_T1.any(0).expand(num_experts)
    return (mask.reshape(-1, num_experts) & counts_T1).any(0)


def _evenness(load_E: Tensor, score_sum_E: Tensor, tokens: Tensor, experts_E: Tensor) -> Tensor:
    tokens = tokens.clamp(min=1)
    load_E = load_E.to(score_sum_E.dtype)  # ints would divide to torch's default dtype
    return experts_E.sum() * ((load_E / tokens) * (score_sum_E / tokens)).sum()


def _num_layers(logits) -> int | None:
    """None where the logits are those of one layer, not of a sequence."""
    if isinstance(logits, Tensor):
        return None
    if not isinstance(logits, Sequence) or len(logits) == 0:
        raise TypeError(
            f"logits: got {type(logits).__name__}; accepted: a torch.Tensor, or a sequence of "
            "them, one a layer"
        )
    return len(logits)


def _per_layer(name: str, value, count: int | None) -> list:
    if count is None or value is None:
        return [value] * (count or 1)
    if isinstance(value, Tensor) or not isinstance(value, Sequence) or len(value) != count:
        got = f"{len(value)} entries" if isinstance(value, Sequence) else type(value).__name__
        raise ValueError(f"{name}: got {got}; accepted: a sequence of {count}, one a layer")
    return list(value)


def _check(at: str, logits, bias, mask, padding_mask, like: Tensor) -> None:
    """`at` is the layer's index in its sequence, `like` the first layer's logits."""
    check_tensor("logits" + at, logits, None, FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits{at}: got shape {tuple(logits.shape)}; accepted: (..., E), E >= 1")
    check_tensor("logits" + at, logits, like.shape, (like.dtype,), like.device)
    E, device = logits.shape[-1], logits.device
    if bias is not None:
        check_tensor("bias" + at, bias, (E - 1,), FLOATS, device)
    if mask is not None:
        one_row = isinstance(mask, Tensor) and mask.dim() == 1
        check_tensor("mask", mask, (E,) if one_row else logits.shape, (torch.bool,), device)
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, None, (torch.bool,), device)
        tokens = logits.shape[:-1].numel()
        if padding_mask.numel() != tokens:
            raise ValueError(
                f"padding_mask: got shape {tuple(padding_mask.shape)}; accepted: "
                f"{tuple(logits.shape[:-1])}, or {tokens} entries in another shape"
            )


def _check_ids(at: str, indices, logits: Tensor) -> None:
    check_tensor("indices" + at, indices, (*logits.shape[:-1], "K"), (torch.int64, torch.int32),
                 logits.device)  # fmt: skip
    if indices.shape[-1] == 0:
        raise ValueError(f"indices{at}: got no slots a token; accepted: (..., K) with K >= 1")

"""The FlexMoRE layer: a router and experts that share one base, for training and inference.

    y = sum over the selected experts e of p_e * E_e(x),   E_e(x) = Wd_e (silu(Wg_e x) * (Wu_e x))

with W_e full-size, or W_0 + B_e A_e, or W_0. Maths: reference/layer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .casting import autocast_dtype, cast
from .checkpoint_config import shortest
from .checks import FLOATS, SCORINGS, check_int, check_one_of, check_tensor
from .layer_checks import check_mask, check_router_device, check_weight_dtypes, check_x
from .ops.routing import Routing
from .preparation import Preparable
from .rank_limit import check_rank_limit, largest_ranks_of, limited
from .router import make_router
from .router_kinds import check_shared_expert
from .storage import PROJECTIONS, Experts, StackedExperts, parse_ranks

STACK_ABOVE = 64
"""With more experts than this the factors are stacked, unless `stacked_factors` says otherwise."""


class FlexMoRE(Preparable):
    """A mixture of full-size and low-rank experts around a shared base, in place of a SwiGLU FFN.

    Routing: logits = x G^T + min(bias, 0) on experts 1..; the `top_k` largest by (logit descending,
    index ascending) are selected; their weights p are, by `scoring`, the softmax over all allowed
    experts, or as `ops.topk_route` says. G are rows that are trained, or those that Nexus projects
    from the embeddings of the experts' domains (router.py). A shared expert is added to every token
    whose mask allows it, with weight 1, whatever the router says.

    Args:
        hidden_size, intermediate_size: D and F.
        expert_ranks: one entry an expert; entry 0, the base, is 0. An int 0 is a full-size expert,
            an int r > 0 one of rank r in all three projections; or a triple (gate, up, down) of a
            rank, 0 for the base's own matrix, or "full". Ranks go up to min(D, F).
        top_k: experts a token that the router selects, 1 to E, or to E - 1 beside a shared one.
        norm_topk_prob: divide the selected weights by their sum.
        expert_bias: a learnable bias for experts 1.., of which only the negative part counts.
        scoring: "softmax", "topk_softmax", "sigmoid" or "unit".
        router: "linear", rows `gate.weight` (E, D); or "projected", rows made of the buffer
            `gate.domain_embeddings` (E, m) by `gate.projector_in`, `gate.projector_out`.
        domain_embedding_size, projector_size: m, and the projector's width h (None: D), of a
            projected router.
        shared_expert: True, the base, at no further cost, or the number of another expert: always
            on, outside the softmax. Its row of the router is there and is not read.
        router_dtype: dtype of the router's logits; None is x's dtype, as Hugging Face does.
        stacked_factors: keep the factors of all experts in six parameters; default: when E > 64.
        recompute: between forward and backward keep x and a number a token and unit of rank, not
            the base's products, 2 F numbers a token, which the backward computes again, to the
            same bits; an attribute.

    `state_dict()` has the keys of the authors' checkpoints: `gate.weight` (E, D), or what makes it,
    `gate.expert_bias`, `experts.{e}.{gate,up,down}_proj.weight` where full-size,
    `..._proj_a.weight` (r, in) and `..._proj_b.weight` (out, r) where low-rank. Each is an ordinary
    parameter of that name (stacked: see `storage`). Nothing derived from a weight is kept between
    calls, unless `prepare` is called, for serving. Under FSDP2 shard the layer or a module around
    it, not its experts: they are read by the layer, their own forward never runs.

    dtypes: base and full-size weights in one of float32, bfloat16, float16 (float64 on the CPU),
    factors and router in that or in float32 (cast at each call, differentiably), x in the base's.
    Under autocast any of these; x and weights are cast to the autocast dtype, and y has it.

    Deterministic; no host sync on CUDA. Source: FlexMoRE (arXiv 2602.08818), FlexOlmo (2507.07024).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        expert_ranks: Sequence[int | Sequence[int | str]],
        top_k: int,
        *,
        norm_topk_prob: bool = False,
        expert_bias: bool = False,
        scoring: str = "softmax",
        router: str = "linear",
        domain_embedding_size: int | None = None,
        projector_size: int | None = None,
        shared_expert: bool | int = False,
        router_dtype: torch.dtype | None = None,
        stacked_factors: bool | None = None,
        recompute: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = check_int("hidden_size", hidden_size, 1)
        self.intermediate_size = check_int("intermediate_size", intermediate_size, 1)
        triples = parse_ranks(expert_ranks, min(self.hidden_size, self.intermediate_size))
        self.num_experts = len(triples)
        self.expert_ranks = tuple(map(shortest, triples))
        self.shared_expert = check_shared_expert(shared_expert, self.num_experts)
        routed = self.num_experts - (self.shared_expert is not None)
        self.top_k = check_int("top_k", top_k, 1, routed)
        check_one_of("norm_topk_prob", norm_topk_prob, (False, True))
        check_one_of("expert_bias", expert_bias, (False, True))
        check_one_of("scoring", scoring, SCORINGS)
        check_one_of("router_dtype", router_dtype, (None, *FLOATS))
        check_one_of("stacked_factors", stacked_factors, (None, False, True))
        check_one_of("recompute", recompute, (False, True))
        check_one_of("dtype", dtype, (None, *FLOATS))
        self.norm_topk_prob, self.scoring = norm_topk_prob, scoring
        self.router_dtype, self.recompute = router_dtype, recompute
        if stacked_factors is None:
            stacked_factors = self.num_experts > STACK_ABOVE
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = (domain_embedding_size, projector_size)
        self.gate = make_router(
            router, self.num_experts, self.hidden_size, expert_bias, sizes, **kind
        )
        container = StackedExperts if stacked_factors else Experts
        self.experts = container((self.hidden_size, self.intermediate_size), triples, **kind)
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        expert_ranks: Sequence[int | Sequence[int | str]],
        top_k: int,
        **kwargs: Any,
    ) -> FlexMoRE:
        """A layer that starts from a dense SwiGLU FFN: gate, up (F, D) and down (D, F), copied.

        The base and every other full-size matrix are the FFN's; the low-rank deltas are zero. So
        each expert starts as the FFN. `kwargs` go to the constructor; device and dtype default to
        gate's.
        """
        check_tensor("gate", gate, ("F", "D"), FLOATS)
        check_tensor("up", up, gate.shape, (gate.dtype,), gate.device)
        check_tensor("down", down, gate.shape[::-1], (gate.dtype,), gate.device)
        kwargs = {"device": gate.device, "dtype": gate.dtype, **kwargs}
        layer = cls(gate.shape[1], gate.shape[0], expert_ranks, top_k, **kwargs)
        with torch.no_grad():
            for name, dense in zip(PROJECTIONS, (gate, up, down), strict=True):
                for weight in layer.experts.full(name):
                    if weight is not None:
                        weight.copy_(dense)
        return layer

    def reset_parameters(self) -> None:
        """Router (see there), base and full-size normal(0.02), A Kaiming, B and the bias zero."""
        self.gate.reset_parameters()
        self.experts.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        expert_mask: Tensor | None = None,
        rank_limit: Sequence[int | None] | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Apply the layer to every token.

        Args:
            x: (..., D), any strides, with any number of tokens.
            expert_mask: bool (E,) or (..., E), True where the token may use the expert.
            rank_limit: E entries, each None or a rank up to the expert's: of its factors only the
                first ranks are used, in place (see rank_limit.py). A prepared layer then reads its
                parameters.
            return_routing: also return the router's decision.

        Returns: y (..., D); with `return_routing` also Routing: logits (..., E) raw, weights (...,
        K) float32 (float64 for float64 logits) and indices (..., K) int64, empty slots last with
        index E and weight 0; beside a shared expert K is top_k + 1, its slot the first. Raises
        ValueError or TypeError naming the argument. A token without an allowed expert or with a NaN
        logit raises on the CPU and inside `validation()`; elsewhere it gets zeros.
        """
        limits = rank_limit
        if limits is not None:
            limits = check_rank_limit(limits, largest_ranks_of(self.expert_ranks))
        if limits is None:
            weights = self._expert_weights(x)
        else:
            weights = limited(self._live_weights(), limits)
        autocast = autocast_dtype(x)
        base = getattr(self.experts, "0").gate_proj.weight
        dtype = autocast or base.dtype
        if autocast is None:
            check_weight_dtypes(self, weights, dtype)
        check_x(x, self.hidden_size, dtype if autocast is None else None, base.device)
        check_router_device(self.gate, base.device)
        if expert_mask is not None:
            check_mask(expert_mask, x, self.num_experts)
        leading = x.shape[:-1]
        if expert_mask is not None and expert_mask.dim() > 1:
            expert_mask = expert_mask.reshape(-1, self.num_experts)
        x_TD = cast(x.reshape(-1, self.hidden_size), dtype)
        gate, up, down = (cast(weight, dtype) for weight in weights)
        if autocast is None:
            y_TD, routing = self._route_and_mix(x_TD, expert_mask, gate, up, down)
        else:
            # The casts are done: inside, float32 is meant to stay float32.
            with torch.autocast(x.device.type, enabled=False):
                y_TD, routing = self._route_and_mix(x_TD, expert_mask, gate, up, down)
        if x.dim() != 2:
            y_TD = y_TD.reshape(x.shape)
            routing = Routing(*(part.reshape(*leading, part.shape[-1]) for part in routing))
        return (y_TD, routing) if return_routing else y_TD

    def _route_and_mix(self, x_TD, expert_mask, gate, up, down) -> tuple[Tensor, Routing]:
        dtype = self.router_dtype or x_TD.dtype
        routing = ops.topk_route(
            cast(x_TD, dtype),
            cast(self.gate.rows(), dtype),
            top_k=self.top_k,
            bias=self.gate.expert_bias,
            mask=expert_mask,
            norm_topk_prob=self.norm_topk_prob,
            scoring=self.scoring,
            shared=self.shared_expert,
        )
        p_TK = cast(routing.weights, torch.promote_types(x_TD.dtype, torch.float32))
        given = (x_TD, routing.indices, p_TK, gate, up, down)
        return ops.experts(*given, recompute=self.recompute), routing

    def _keep_rows(self, keep: bool) -> None:
        self.gate.keep(keep)

    def extra_repr(self) -> str:
        ranks = ", ".join(str(rank) for rank in self.expert_ranks[:8])
        more = ", ..." if self.num_experts > 8 else ""
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"expert_ranks=({ranks}{more}), top_k={self.top_k}, "
            f"norm_topk_prob={self.norm_topk_prob}, scoring={self.scoring!r}"
        )

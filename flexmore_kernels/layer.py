"""The FlexMoRE layer: a router and experts that share one base, for training and inference.

    y = sum over the selected experts e of p_e * E_e(x),   E_e(x) = Wd_e (silu(Wg_e x) * (Wu_e x))

with W_e full-size, or W_0 + B_e A_e, or W_0. Maths: reference/layer.py.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .casting import autocast_dtype, cast
from .checkpoint_config import shortest
from .checks import FLOATS, SCORINGS, check_int, check_one_of, check_tensor, checks_values
from .ops.routing import Routing
from .preparation import Preparable
from .ragged import StackedFactors
from .storage import PROJECTIONS, Experts, StackedExperts, Weight, init_full, parse_ranks

STACK_ABOVE = 64
"""With more experts than this the factors are stacked, unless `stacked_factors` says otherwise."""


class Router(Weight):
    """The router's rows `weight` (E, D) and, if asked for, `expert_bias` (E - 1,)."""

    def __init__(self, rows: int, columns: int, bias: bool, **kind) -> None:
        super().__init__(rows, columns, **kind)
        self.register_parameter(
            "expert_bias", nn.Parameter(torch.empty(rows - 1, **kind)) if bias else None
        )


class FlexMoRE(Preparable):
    """A mixture of full-size and low-rank experts around a shared base, in place of a SwiGLU FFN.

    Routing: logits = x G^T + min(bias, 0) on experts 1..; the `top_k` largest by (logit descending,
    index ascending) are selected; their weights p are, by `scoring`, the softmax over all allowed
    experts, or as `ops.topk_route` says.

    Args:
        hidden_size, intermediate_size: D and F.
        expert_ranks: one entry an expert; entry 0, the base, is 0. An int 0 is a full-size expert,
            an int r > 0 one of rank r in all three projections; or a triple (gate, up, down) of a
            rank, 0 for the base's own matrix, or "full". Ranks go up to min(D, F).
        top_k: experts a token, 1 to E.
        norm_topk_prob: divide the selected weights by their sum.
        expert_bias: a learnable bias for experts 1.., of which only the negative part counts.
        scoring: "softmax", "topk_softmax", "sigmoid" or "unit".
        router, shared_expert: "linear" and False are what there is.
        router_dtype: dtype of the router's logits; None is x's dtype, as Hugging Face does.
        stacked_factors: keep the factors of all experts in six parameters; default: when E > 64.
        recompute: between forward and backward keep x and a number a token and unit of rank, not
            the base's products, 2 F numbers a token, which the backward computes again, to the
            same bits; an attribute.

    `state_dict()` has the keys of the authors' checkpoints: `gate.weight` (E, D),
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
        shared_expert: bool = False,
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
        self.top_k = check_int("top_k", top_k, 1, self.num_experts)
        check_one_of("norm_topk_prob", norm_topk_prob, (False, True))
        check_one_of("expert_bias", expert_bias, (False, True))
        check_one_of("scoring", scoring, SCORINGS)
        check_one_of("router", router, ("linear",))
        check_one_of("shared_expert", shared_expert, (False,))
        check_one_of("router_dtype", router_dtype, (None, *FLOATS))
        check_one_of("stacked_factors", stacked_factors, (None, False, True))
        check_one_of("recompute", recompute, (False, True))
        check_one_of("dtype", dtype, (None, *FLOATS))
        self.norm_topk_prob, self.scoring = norm_topk_prob, scoring
        self.router_dtype, self.recompute = router_dtype, recompute
        if stacked_factors is None:
            stacked_factors = self.num_experts > STACK_ABOVE
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = Router(self.num_experts, self.hidden_size, expert_bias, **kind)
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
        """Router, base and full-size normal(0.02), A Kaiming, B and the bias zero."""
        init_full(self.gate.weight)
        if self.gate.expert_bias is not None:
            nn.init.zeros_(self.gate.expert_bias)
        self.experts.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        expert_mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Apply the layer to every token.

        Args:
            x: (..., D), any strides, with any number of tokens.
            expert_mask: bool (E,) or (..., E), True where the token may use the expert.
            return_routing: also return the router's decision.

        Returns: y (..., D); with `return_routing` also Routing: logits (..., E) raw, weights (...,
        K) float32 (float64 for float64 logits) and indices (..., K) int64, empty slots last with
        index E and weight 0. Raises ValueError or TypeError naming the argument. A token without an
        allowed expert or with a NaN logit raises on the CPU and inside `validation()`; elsewhere it
        gets zeros.
        """
        weights = self._expert_weights(x)
        autocast = autocast_dtype(x)
        base = getattr(self.experts, "0").gate_proj.weight
        dtype = autocast or base.dtype
        self._check(x, expert_mask, weights, base.device, dtype if autocast is None else None)
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
            cast(self.gate.weight, dtype),
            top_k=self.top_k,
            bias=self.gate.expert_bias,
            mask=expert_mask,
            norm_topk_prob=self.norm_topk_prob,
            scoring=self.scoring,
        )
        p_TK = cast(routing.weights, torch.promote_types(x_TD.dtype, torch.float32))
        given = (x_TD, routing.indices, p_TK, gate, up, down)
        return ops.experts(*given, recompute=self.recompute), routing

    def _check(self, x, expert_mask, weights, device, dtype) -> None:
        """`dtype` is what base and x must have; None lets every floating dtype pass (autocast)."""
        check_tensor("x", x)
        if x.dim() < 1 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}; accepted: (..., {self.hidden_size})")
        if dtype is not None:
            self._check_weight_dtypes(weights, dtype)
        check_tensor("x", x, None, FLOATS if dtype is None else (dtype,), device)
        if dtype == torch.float64 and device.type == "cuda":
            raise TypeError("x: got dtype float64 on cuda; accepted: float32, bfloat16, float16")
        check_tensor("gate.weight", self.gate.weight, None, None, device)
        if expert_mask is not None:
            self._check_mask(expert_mask, x)

    def _check_weight_dtypes(self, weights, dtype: torch.dtype) -> None:
        # Only to report a fault are the parameters looked up by name.
        wide = (dtype, torch.float32)
        router = (self.gate.weight, self.gate.expert_bias)
        right = all(part is None or part.dtype in wide for part in router)
        for side in weights:
            stacked = isinstance(side, StackedFactors)
            for entry in (*side.full, (side.a, side.b)) if stacked else side:
                if isinstance(entry, Tensor):
                    right = right and entry.dtype == dtype
                elif entry is not None:
                    right = right and entry[0].dtype in wide and entry[1].dtype in wide
        if right and dtype in FLOATS:
            return
        for name, parameter in self.named_parameters():
            full = name.endswith("_proj.weight")
            accepted = (dtype,) if dtype in FLOATS else FLOATS
            accepted = accepted if full else tuple(dict.fromkeys((*accepted, torch.float32)))
            check_tensor(name, parameter, None, accepted)

    def _check_mask(self, mask: Tensor, x: Tensor) -> None:
        check_tensor("expert_mask", mask, None, (torch.bool,), x.device)
        shapes = ((self.num_experts,), (*x.shape[:-1], self.num_experts))
        # Size by size: a compiler's symbolic sizes become guards so, not unequal tuples.
        if not any(
            mask.dim() == len(shape) and all(map(operator.eq, mask.shape, shape))
            for shape in shapes
        ):
            raise ValueError(
                f"expert_mask: got shape {tuple(mask.shape)}; accepted: {shapes[0]} or "
                f"{tuple(shapes[1])}"
            )
        if checks_values(mask):
            none = ~mask.any(-1)
            if bool(none.any()):
                at = tuple(int(i) for i in none.nonzero()[0])
                token = f"token {at}" if at else "any token"
                raise ValueError(
                    f"expert_mask: got no allowed expert for {token}; accepted: at least one True "
                    "for every token"
                )

    def extra_repr(self) -> str:
        ranks = ", ".join(str(rank) for rank in self.expert_ranks[:8])
        more = ", ..." if self.num_experts > 8 else ""
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"expert_ranks=({ranks}{more}), top_k={self.top_k}, "
            f"norm_topk_prob={self.norm_topk_prob}, scoring={self.scoring!r}"
        )

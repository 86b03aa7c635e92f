"""The FlexMoRE layer: router, experts, and the names under which a checkpoint keeps them.

    l, w, e = topk_route(x, G, min(b, 0), mask)          see routing; G: see router
    y_t = sum_k w_tk E_{e_tk}(x_t)                       see experts

`expert_ranks[e]` says what expert e > 0 has for each projection P (gate, up, down): a matrix of its
own ("full"), a pair A (r, in), B (out, r) that stands for W_P,0 + B A, or nothing, W_P,0 (rank 0 in
a triple). Under a rank limit r of expert e it has the first r rows of A and columns of B alone. The
gradient is that of the two ops; G also gets it through w, not only through l.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .experts import experts
from .router import Weight, make_router
from .routing import Routing, topk_route

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """Per projection a matrix, a pair of factors, or nothing."""

    def __init__(self, hidden_size, intermediate_size, ranks, device=None, dtype=None) -> None:
        super().__init__()
        for name, rank in zip(PROJECTIONS, ranks, strict=True):
            shape = [intermediate_size, hidden_size]
            rows, columns = reversed(shape) if name == "down_proj" else shape
            if rank == "full":
                self.add_module(name, Weight(rows, columns, device, dtype))
            elif rank > 0:
                self.add_module(f"{name}_a", Weight(rank, columns, device, dtype))
                self.add_module(f"{name}_b", Weight(rows, rank, device, dtype))

    def projection(
        self, name: str, dtype: torch.dtype, limit: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        """What `experts` takes for this expert, of at most `limit` ranks."""
        if hasattr(self, name):
            return getattr(self, name).weight.to(dtype)
        if limit == 0 or not hasattr(self, f"{name}_a"):
            return None
        a, b = (getattr(self, f"{name}_{side}").weight.to(dtype) for side in "ab")
        return a[:limit], b[:, :limit]


class FlexMoRE(nn.Module):
    """The layer, with the constructor, forward and state_dict keys of `flexmore_kernels.FlexMoRE`.

    Checks no arguments, and keeps every factor as a parameter of its own whatever
    `stacked_factors` says. x sets the dtype of the computation.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        expert_ranks,
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
        device=None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob, self.scoring = top_k, norm_topk_prob, scoring
        self.router_dtype = router_dtype
        sizes, kind = (hidden_size, intermediate_size), {"device": device, "dtype": dtype}
        number = 0 if shared_expert is True else shared_expert  # True: the base
        self.shared_expert = None if shared_expert is False else number
        projector = (domain_embedding_size, projector_size)
        self.gate = make_router(
            router, len(expert_ranks), hidden_size, expert_bias, projector, **kind
        )
        triples = [("full",) * 3 if r == 0 else r for r in expert_ranks]
        triples = [tuple(r) if isinstance(r, (list, tuple)) else (r,) * 3 for r in triples]
        self.experts = nn.ModuleList(Expert(*sizes, triple, **kind) for triple in triples)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Router (see there), base and full-size normal(0.02), A Kaiming, B zero."""
        self.gate.reset_parameters()
        for name, parameter in self.experts.named_parameters():
            if name.endswith("_b.weight"):
                parameter.zero_()
            elif name.endswith("_a.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            else:
                parameter.normal_(std=0.02)

    @classmethod
    def from_dense(cls, gate, up, down, expert_ranks, top_k, **kwargs) -> FlexMoRE:
        """Every full-size expert starts as the dense FFN; the low-rank ones, with B = 0, too."""
        kwargs = {"device": gate.device, "dtype": gate.dtype, **kwargs}
        layer = cls(gate.shape[1], gate.shape[0], expert_ranks, top_k, **kwargs)
        with torch.no_grad():
            for expert in layer.experts:
                for name, weight in zip(PROJECTIONS, (gate, up, down), strict=True):
                    if hasattr(expert, name):
                        getattr(expert, name).weight.copy_(weight)
        return layer

    def forward(
        self,
        x: Tensor,
        *,
        expert_mask: Tensor | None = None,
        rank_limit=None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """x (..., D) -> y (..., D), and the routing with the same leading dimensions if asked.

        rank_limit: E entries, each None or the ranks of the expert that are used.
        """
        shape = x.shape[:-1]
        x_TD = x.reshape(-1, x.shape[-1])
        if expert_mask is not None and expert_mask.dim() > 1:
            expert_mask = expert_mask.reshape(-1, expert_mask.shape[-1])
        dtype = self.router_dtype or x.dtype
        routing = topk_route(
            x_TD.to(dtype),
            self.gate.rows().to(dtype),
            top_k=self.top_k,
            bias=self.gate.expert_bias,
            mask=expert_mask,
            norm_topk_prob=self.norm_topk_prob,
            scoring=self.scoring,
            shared=self.shared_expert,
        )
        weights = routing.weights.to(torch.promote_types(x.dtype, torch.float32))
        limits = rank_limit or [None] * len(self.experts)
        gate, up, down = (
            [e.projection(name, x.dtype, r) for e, r in zip(self.experts, limits, strict=True)]
            for name in PROJECTIONS
        )
        y = experts(x_TD, routing.indices, weights, gate, up, down).reshape(x.shape)
        if not return_routing:
            return y
        return y, Routing(*(t.reshape(*shape, t.shape[-1]) for t in routing))

"""The router's rows G (E, D): a parameter, or made of domain embeddings. Maths:
reference/router.py.

Whatever makes the rows, the logits are x G^T by the same kernels (ops/routing.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .router_kinds import check_router_sizes
from .storage import Weight, init_full, stamps

PROJECTED_STD = 0.02
"""Of a projected row's entries at the start, for embeddings of length 1: a linear router's."""
_SILU_RMS = 0.5963
"""sqrt(E[silu(a)^2]) of a standard normal a."""


class _Router(nn.Module):
    """What both have: `rows`, and `expert_bias` (E - 1,) or None."""

    def _add_bias(self, num_experts: int, wanted: bool, **kind) -> None:
        bias = nn.Parameter(torch.empty(num_experts - 1, **kind)) if wanted else None
        self.register_parameter("expert_bias", bias)

    def _reset_bias(self) -> None:
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)

    def keep(self, keep: bool) -> bool:
        """Whether rows are to be kept between calls, and whether they were; a linear router's are
        no copy."""
        return False


class Router(Weight, _Router):
    """The linear router: rows `weight` (E, D) and, if asked for, `expert_bias` (E - 1,)."""

    def __init__(self, num_experts: int, hidden_size: int, bias: bool, **kind) -> None:
        super().__init__(num_experts, hidden_size, **kind)
        self._add_bias(num_experts, bias, **kind)

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def rows(self) -> Tensor:
        """G (E, D), the parameter."""
        return self.weight

    def reset_parameters(self) -> None:
        """Rows normal(0.02), bias zero."""
        init_full(self.weight)
        self._reset_bias()


class _Kept(NamedTuple):
    """Rows, and what they were made of. The aliases hold its memory: an address that is free could
    become another tensor's, with the same stamp."""

    rows: Tensor
    stamps: list[tuple[int, int]]
    aliases: tuple[Tensor, ...]


class ProjectedRouter(_Router):
    """Nexus's router: G_e = W_2 (silu(W_1g d_e) * W_1u d_e), from fixed domain embeddings d_e.

    Args:
        num_experts, hidden_size: E, D. bias: have `expert_bias` (E - 1,).
        sizes: m, the width of the embeddings, and h, the projector's own width.

    Buffer `domain_embeddings` (E, m), zeros at first (a row of zeros); parameters
    `projector_in.weight` (2h, m), the rows of W_1g first, and `projector_out.weight` (D, h).
    The rows are computed at each call, differentiably in both matrices. After `keep(True)`, which
    `FlexMoRE.prepare` and `generate` call, they are kept for inference: the same numbers to the
    bit. They are made again after every write that torch counts, after loading, moving and casting;
    a compiled call computes them. A call with gradients ends the keeping, since what a fused
    optimizer writes after it is not counted; nor are writes through `.data`: `keep(True)` again
    after those. A copy keeps nothing.

    Source: Nexus (arXiv 2408.15901, section 2).
    """

    def __init__(
        self, num_experts: int, hidden_size: int, bias: bool, sizes: tuple[int, int], **kind
    ) -> None:
        super().__init__()
        m, h = sizes
        self.projector_in = Weight(2 * h, m, **kind)
        self.projector_out = Weight(hidden_size, h, **kind)
        self._add_bias(num_experts, bias, **kind)
        self.register_buffer("domain_embeddings", torch.zeros(num_experts, m, **kind))
        self._kept: _Kept | None = None
        self.keeps = False

    @property
    def num_experts(self) -> int:
        return self.domain_embeddings.shape[0]

    def rows(self) -> Tensor:
        """G (E, D), in the parameters' dtype."""
        if not self.keeps or torch.compiler.is_compiling():
            return self._project()
        sources = self._sources()
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            self.keep(False)  # training follows, and a fused step is not counted
            return self._project()
        if any(source.is_inference() for source in sources):  # no write of theirs is counted
            return self._project()
        now, kept = stamps(sources), self._kept
        if kept is None or kept.stamps != now:
            if sources[0].is_cuda and torch.cuda.is_current_stream_capturing():
                return self._project()  # a graph's own: unwritten until it is replayed
            with torch.inference_mode(False), torch.no_grad():
                aliases = tuple(source.detach() for source in sources)
                kept = self._kept = _Kept(self._project(), now, aliases)
        return kept.rows

    def keep(self, keep: bool) -> bool:
        """Whether rows are to be kept between calls, for inference; returns whether they were."""
        before, self.keeps, self._kept = self.keeps, keep, None
        return before

    def reset_parameters(self) -> None:
        """Rows of about normal(0.02) for embeddings of length 1; embeddings and bias zero."""
        h = self.projector_out.weight.shape[1]
        nn.init.normal_(self.projector_in.weight, std=1)
        nn.init.normal_(self.projector_out.weight, std=PROJECTED_STD / (_SILU_RMS * h**0.5))
        nn.init.zeros_(self.domain_embeddings)
        self._reset_bias()

    def _sources(self) -> list[Tensor]:
        return [self.domain_embeddings, self.projector_in.weight, self.projector_out.weight]

    def _project(self) -> Tensor:
        embeddings, w_in, w_out = self._sources()
        with torch.autocast(embeddings.device.type, enabled=False):
            gate, up = F.linear(embeddings.to(w_in.dtype), w_in).chunk(2, 1)
            return F.linear((F.silu(gate) * up).to(w_out.dtype), w_out)

    def _apply(self, fn, recurse: bool = True):
        self._kept = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args) -> None:
        self._kept = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_kept": None, "keeps": False}

    def extra_repr(self) -> str:
        return "num_experts={}, domain_embedding_size={}".format(*self.domain_embeddings.shape)


def make_router(
    kind: str, num_experts: int, hidden_size: int, bias: bool, sizes: tuple, **where: Any
) -> Router | ProjectedRouter:
    """ "linear" or "projected"; sizes (m, h) of a projected one, None otherwise; h None: D."""
    m, h = check_router_sizes(kind, *sizes)
    if kind == "linear":
        return Router(num_experts, hidden_size, bias, **where)
    return ProjectedRouter(num_experts, hidden_size, bias, (m, h or hidden_size), **where)

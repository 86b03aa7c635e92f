"""The router's rows G (E, D), of which the logits x G^T are made (see routing).

    linear      G is a parameter
    projected   G_e = W_2 (silu(W_1g d_e) * W_1u d_e)

where d_e (m,) is the fixed embedding of expert e's domain, W_1 = [W_1g; W_1u] (2h, m) and W_2 (D,
h). So an expert that was trained elsewhere gets its row from what it was trained on. Source: Nexus
(arXiv 2408.15901, section 2). Gradient: dW_2 = dG^T s with s = silu(a) * b, a = d W_1g^T, b = d
W_1u^T; ds = dG W_2; dW_1g = (ds * b * silu'(a))^T d, dW_1u = (ds * silu(a))^T d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTED_STD = 0.02
"""Of a projected row's entries at the start, for embeddings of length 1: a linear router's."""
_SILU_RMS = 0.5963
"""sqrt(E[silu(a)^2]) of a standard normal a."""


class Weight(nn.Module):
    """A matrix (rows, columns) that a checkpoint calls `<name>.weight`."""

    def __init__(self, rows: int, columns: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))


def _bias(num_experts: int, wanted: bool, **kind) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(num_experts - 1, **kind)) if wanted else None


class Router(Weight):
    """The linear router: rows `weight` (E, D) and, if `bias`, expert_bias (E-1,)."""

    def __init__(self, num_experts: int, hidden_size: int, bias: bool, **kind) -> None:
        super().__init__(num_experts, hidden_size, **kind)
        self.expert_bias = _bias(num_experts, bias, **kind)

    def rows(self) -> Tensor:
        return self.weight

    def reset_parameters(self) -> None:
        """Rows normal(0.02), bias zero."""
        nn.init.normal_(self.weight, std=0.02)
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)


class ProjectedRouter(nn.Module):
    """domain_embeddings (E, m), projector_in (2h, m), projector_out (D, h), expert_bias (E-1,)."""

    def __init__(
        self, num_experts: int, hidden_size: int, bias: bool, sizes: tuple[int, int], **kind
    ) -> None:
        super().__init__()
        m, h = sizes
        self.projector_in = Weight(2 * h, m, **kind)
        self.projector_out = Weight(hidden_size, h, **kind)
        self.expert_bias = _bias(num_experts, bias, **kind)
        self.register_buffer("domain_embeddings", torch.zeros(num_experts, m, **kind))

    def rows(self) -> Tensor:
        gate, up = F.linear(self.domain_embeddings, self.projector_in.weight).chunk(2, 1)
        return F.linear(F.silu(gate) * up, self.projector_out.weight)

    def reset_parameters(self) -> None:
        """Rows of about normal(0.02) for embeddings of length 1; embeddings and bias zero."""
        h = self.projector_out.weight.shape[1]
        nn.init.normal_(self.projector_in.weight, std=1)
        nn.init.normal_(self.projector_out.weight, std=PROJECTED_STD / (_SILU_RMS * h**0.5))
        nn.init.zeros_(self.domain_embeddings)
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)


def make_router(kind: str, num_experts: int, hidden_size: int, bias: bool, sizes, **where):
    """ "linear" or "projected"; sizes: (m, h) of a projected one, h None: hidden_size."""
    if kind == "linear":
        return Router(num_experts, hidden_size, bias, **where)
    m, h = sizes
    return ProjectedRouter(num_experts, hidden_size, bias, (m, h or hidden_size), **where)

"""The ops, one concept a file. Each has a twin of the same signature in `reference`."""

from .attribution import attribute
from .experts import experts
from .gated_mix import gated_mix
from .grouped_gemm import grouped_gemm
from .lowrank import expand, shrink
from .permutation import permute, unpermute
from .router_loss import load_balancing_loss, router_statistics, router_z_loss
from .routing import make_plan, topk_route

__all__ = [
    "attribute",
    "expand",
    "experts",
    "gated_mix",
    "grouped_gemm",
    "load_balancing_loss",
    "make_plan",
    "permute",
    "router_statistics",
    "router_z_loss",
    "shrink",
    "topk_route",
    "unpermute",
]

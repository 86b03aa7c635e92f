"""What the library computes, in plain PyTorch: the ground truth of every test.

Nothing here knows of kernels; it imports torch alone, runs in any floating dtype (float64 included)
and leaves the gradients to autograd. The formulas on top of each file are the definition, forward
and gradient; the code below them is the same mathematics, written for reading. The package carries
this folder as `flexmore_kernels.reference`.

The legend of the whole project. A capital is a size; a tensor's suffix is its shape (`x_TD` is (T,
D)):

    T  tokens                        E  experts; expert 0 is the public one, always full-size
    D  model width                   K  slots (chosen experts) per token
    F  width of the feed-forward     N  routed rows, N = T * K
    R  sum of the experts' ranks     P  packed length: sum over the rows of their expert's rank
    I, O  inputs and outputs of a matrix, where it may stand for D x F or F x D

Lower case picks one: t a token, e an expert, k a slot, n a routed row, r_e the rank of expert e.
*Slot* t*K + k is the k-th choice of token t. *Rows* are the slots sorted by expert. dy is the
gradient of the loss with respect to y. The accumulator dtype ("acc") is float64 for float64 tensors
and float32 for every other.
"""

from .attribution import attribute
from .experts import StackedFactors, experts
from .gated_mix import gated_mix
from .generation import generate
from .grouped_gemm import grouped_gemm
from .layer import FlexMoRE
from .lowrank import expand, shrink
from .model import FlexMoREForCausalLM
from .permutation import permute, unpermute
from .router_loss import (
    RouterStatistics,
    load_balancing_loss,
    router_statistics,
    router_z_loss,
)
from .routing import Routing, RoutingPlan, make_plan, topk_route

__all__ = [
    "FlexMoRE", "FlexMoREForCausalLM", "RouterStatistics", "Routing", "RoutingPlan",
    "StackedFactors", "attribute", "expand", "experts", "gated_mix", "generate", "grouped_gemm",
    "load_balancing_loss", "make_plan", "permute", "router_statistics", "router_z_loss", "shrink",
    "topk_route", "unpermute",
]  # fmt: skip

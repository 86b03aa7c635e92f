"""flexmore_kernels: FlexMoRE layers at hardly more than the price of one dense FFN."""

import importlib
from typing import Any

from . import flops, layer_members, membership, ops
from .attribution import Attribution
from .cards import Card
from .checks import validation
from .counters import RouterStatistics
from .expert import Expert
from .layer import FlexMoRE
from .model import FlexMoREConfig, FlexMoREForCausalLM
from .ragged import Ragged, RoutingPlan, StackedFactors
from .slow_paths import SlowPathWarning

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "Card",
    "Expert",
    "FlexMoRE",
    "FlexMoREConfig",
    "FlexMoREForCausalLM",
    "Ragged",
    "RouterStatistics",
    "RoutingPlan",
    "SlowPathWarning",
    "StackedFactors",
    "flops",
    "ops",
    "validation",
]

# Methods that read checkpoints, which are made of layers and models: hung on from above.
for _name in ("add_expert", "remove_expert", "replace_expert", "rerank_expert"):
    setattr(FlexMoRE, _name, getattr(layer_members, _name))
    setattr(FlexMoREForCausalLM, _name, getattr(membership, _name))
for _name in ("tag_expert", "list_experts", "take_expert"):
    setattr(FlexMoREForCausalLM, _name, getattr(membership, _name))


def __getattr__(name: str) -> Any:
    """`hf`, imported when it is first asked for: it needs transformers."""
    if name == "hf":
        return importlib.import_module(f"{__name__}.hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

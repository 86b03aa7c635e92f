"""flexmore_kernels: FlexMoRE layers at hardly more than the price of one dense FFN."""

import importlib
from typing import Any

from . import flops, ops
from .attribution import Attribution
from .checks import validation
from .counters import RouterStatistics
from .layer import FlexMoRE
from .model import FlexMoREConfig, FlexMoREForCausalLM
from .ragged import Ragged, RoutingPlan, StackedFactors
from .slow_paths import SlowPathWarning

__version__ = "0.1.0"

__all__ = [
    "Attribution",
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


def __getattr__(name: str) -> Any:
    """`hf`, imported when it is first asked for: it needs transformers."""
    if name == "hf":
        return importlib.import_module(f"{__name__}.hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""flexmore_kernels: FlexMoRE layers at hardly more than the price of one dense FFN."""

from . import flops, ops
from .checks import validation
from .counters import RouterStatistics
from .layer import FlexMoRE
from .model import FlexMoREConfig, FlexMoREForCausalLM
from .ragged import Ragged, RoutingPlan, StackedFactors
from .slow_paths import SlowPathWarning

__version__ = "0.1.0"

__all__ = [
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

"""FlexMoRE in Hugging Face transformers (5.17 or later); `import flexmore_kernels.hf` registers it.

AutoModelForCausalLM.from_pretrained(directory)                          model type "flexmore"
AutoModelForCausalLM.from_pretrained(name, experts_implementation="flexmore")     stock models
swap_experts(model, expert_ranks=[0, 64, 64, ...])               a loaded FlexOlmo, in place
"""

from __future__ import annotations

import sys

try:
    import transformers
except ImportError as error:
    raise ImportError("flexmore_kernels.hf needs transformers >= 5.17") from error

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(
        f"transformers: got {transformers.__version__}; accepted by flexmore_kernels.hf: >= 5.17"
    )

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import experts
from .configuration import FlexMoREConfig
from .modeling import FlexMoREForCausalLM, FlexMoREModel
from .swap import swap_experts

__all__ = ["FlexMoREConfig", "FlexMoREForCausalLM", "FlexMoREModel", "swap_experts"]

AutoConfig.register("flexmore", FlexMoREConfig, exist_ok=True)
AutoModel.register(FlexMoREConfig, FlexMoREModel, exist_ok=True)
AutoModelForCausalLM.register(FlexMoREConfig, FlexMoREForCausalLM, exist_ok=True)
experts.register()


def _show(*classes: type) -> None:
    """Make classes attributes of `transformers`: `transformers serve` takes a model's class from
    there, by the name in config.json, also one that `trust_remote_code` loads.

    transformers/processing_utils.py runs the package's __init__ a second time, so that there are
    two modules of that name; the server may hold the first one.
    """
    server = sys.modules.get("transformers.cli.serving.model_manager")
    for module in {sys.modules["transformers"], getattr(server, "transformers", transformers)}:
        for each in classes:
            setattr(module, each.__name__, each)


_show(FlexMoREForCausalLM, FlexMoREModel)

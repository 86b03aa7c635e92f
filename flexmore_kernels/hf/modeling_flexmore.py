"""Loads a saved FlexMoRE model by `trust_remote_code=True`; needs `pip install flexmore_kernels`.

`save_pretrained` and `flexmore convert` copy this file beside the weights, and config.json's
`auto_map` names it: so `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`
works without an import.
"""

from flexmore_kernels.hf.configuration import FlexMoREConfig
from flexmore_kernels.hf.modeling import FlexMoREForCausalLM, FlexMoREModel

__all__ = ["FlexMoREConfig", "FlexMoREForCausalLM", "FlexMoREModel"]

"""`experts_implementation="flexmore"`: the full-size experts of transformers' own models.

FlexOlmo, Mixtral, Qwen3-MoE, OLMoE and others keep their experts in two fused parameters,
gate_up_proj (E, 2F, D), gate first, and down_proj (E, D, F), and ask a registered function to apply
them. This one reads them in place, as matrices of `fk.ops.experts`, forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from .. import ops

NAME = "flexmore"

# What the function computes: attributes of an experts module, and their only value.
_ONLY = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Apply a stock experts module: y_t = sum_k top_k_weights[t, k] E_{top_k_index[t, k]}(x_t).

    hidden_states (T, D), top_k_index (T, K) and top_k_weights (T, K); returns (T, D) in the dtype
    of hidden_states. An id equal to `self.num_experts` is an empty slot, as in expert parallelism.
    Computed in the weights' dtype, under autocast in its; sums in float32. Deterministic; no host
    sync on CUDA. Raises ValueError naming what of a module is not computed.
    """
    _check(self)
    gate_up, down = self.gate_up_proj, self.down_proj
    dtype = gate_up.dtype
    kind = hidden_states.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    # Unbound, not indexed: the gradients of E indexed views would be E tensors of the whole size.
    halves = gate_up.to(dtype).unflatten(1, (2, -1)).flatten(0, 1).unbind(0)
    acc = torch.promote_types(dtype, torch.float32)
    with torch.autocast(kind, enabled=False):
        y_TD = ops.experts(
            hidden_states.to(dtype),
            top_k_index,
            top_k_weights.to(acc),
            halves[0::2],
            halves[1::2],
            down.to(dtype).unbind(0),
        )
    return y_TD.to(hidden_states.dtype)


def _check(experts: nn.Module) -> None:
    for name, value in _ONLY.items():
        found = getattr(experts, name, value)
        if found != value:
            raise ValueError(f"{type(experts).__name__}.{name}: got {found}; accepted: {value}")
    if type(experts)._apply_gate is not moe._default_apply_gate:
        raise ValueError(
            f"{type(experts).__name__}._apply_gate: got its own; accepted: the default"
        )
    act = type(experts.act_fn).__name__
    if act not in ("SiLU", "SiLUActivation"):
        raise ValueError(f"{type(experts).__name__}.act_fn: got {act}; accepted: SiLU")


def register() -> None:
    """Let transformers know the implementation's name."""
    moe.ExpertsInterface.register(NAME, experts_forward)

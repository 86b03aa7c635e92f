"""Two checkpoints beside each other: do they compute the same, layer by layer?

Of each layer the output of the mixture is compared before the post-norm, which hides every scale,
then the logits:

    error = |a - b| / |a|,  Frobenius norms over all tokens

Either model runs alone and layer by layer: a layer's weights are loaded before it and let go after
it, so that one layer's memory suffices.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapter_base import BaseCheckpoint
from .checkpoint import model_config, read_tensors
from .checks import check_tensor
from .model import FlexMoREForCausalLM

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Of a lossless conversion, by dtype of the comparison: about 170 roundings in float32."""


class Row(NamedTuple):
    """What was compared, its error, the largest error of one token and which one, the limit."""

    name: str
    error: float
    worst: float
    token: int
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # NaN is not


def verify(
    a: str | os.PathLike,
    b: str | os.PathLike,
    ids: Tensor | None = None,
    *,
    tokens: int = 64,
    seed: int = 0,
    experts_a: Sequence[int] | None = None,
    experts_b: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tolerance: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Run the same tokens through both checkpoints; a row for each layer, then the logits.

    Args:
        a, b: checkpoints that this library reads, or dense OLMo-2 ones.
        ids: (B, S) int64; default: one row of `tokens` random ids of this seed.
        experts_a, experts_b: the experts that each may use; default: all.
        dtype: what is computed in, whatever is stored; float64 on the CPU alone.
        tolerance: of every row's error; default: `TOLERANCES`, none for 16-bit dtypes.
        say: gets a line of progress.

    Raises ValueError where the two have other sizes, or as `read_layout` does.
    """
    if tolerance is None and dtype not in TOLERANCES:
        raise ValueError(f"tolerance: got None with {dtype}; accepted: a number >= 0")
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    if not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance}; accepted: a number >= 0")
    bases = [BaseCheckpoint(a), BaseCheckpoint(b)]
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        found = [base.layout.config[name] for base in bases]
        if found[0] != found[1]:
            raise ValueError(f"{b}: {name} is {found[1]}; accepted: {found[0]}, as in {a}")
    vocabulary = bases[0].layout.config["vocab_size"]
    if ids is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (1, tokens), generator=generator)
    check_tensor("ids", ids, ("B", "S"), (torch.int64, torch.int32))
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"ids: accepted: one or more from 0 to {vocabulary - 1}")
    masks = [
        _mask(name, experts, base.layout.config["num_experts"], device)
        for name, experts, base in zip(
            ("experts_a", "experts_b"), (experts_a, experts_b), bases, strict=True
        )
    ]
    outputs = [
        _run(base, ids.to(device), mask, dtype, device, say)
        for base, mask in zip(bases, masks, strict=True)
    ]
    return [
        _compare(name, one, two, tolerance) for (name, one), (_, two) in zip(*outputs, strict=True)
    ]


def _mask(name: str, experts: Sequence[int] | None, count: int, device) -> Tensor | None:
    if experts is None:
        return None
    if not experts or not all(0 <= expert < count for expert in experts):
        raise ValueError(f"{name}: got {list(experts)}; accepted: some of 0 to {count - 1}")
    mask = torch.zeros(count, dtype=torch.bool, device=device)
    mask[list(experts)] = True
    return mask


def _compare(name: str, one: Tensor, two: Tensor, tolerance: float) -> Row:
    one, two = (part.double().flatten(0, -2) for part in (one, two))
    difference = (one - two).norm(dim=1)
    each = difference / one.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    token = int(each.nan_to_num(torch.inf).argmax())
    size = one.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return Row(name, float(difference.norm() / size), float(each[token]), token, tolerance)


def _run(base, ids, mask, dtype, device, say) -> list[tuple[str, Tensor]]:
    """Every layer's mixture and the logits, on the CPU."""
    found: list[tuple[str, Tensor]] = []
    count = base.sizes.num_layers

    def keep(module: nn.Module, inputs, output) -> None:
        y = output[0] if isinstance(output, tuple) else output
        found.append((f"layer {len(found)}", y.cpu()))
        say(f"{base.layout.directory}: layer {len(found)} of {count}")

    with streamed(base, dtype, device) as model, torch.no_grad():
        handles = [block.mlp.register_forward_hook(keep) for block in model.model.layers]
        logits = model(ids, expert_mask=mask)
        for handle in handles:
            handle.remove()
    return [*found, ("logits", logits.cpu())]


@contextlib.contextmanager
def streamed(
    base: BaseCheckpoint, dtype: torch.dtype, device: torch.device | str
) -> Iterator[FlexMoREForCausalLM]:
    """A checkpoint's model, of which each part holds its weights only while it runs."""
    layout = base.layout
    model = FlexMoREForCausalLM(model_config(layout), device="meta", dtype=dtype)
    parts = {"model.norm.": model.model.norm, "model.embed_tokens.": model.model.embed_tokens}
    parts |= {f"model.layers.{i}.": block for i, block in enumerate(model.model.layers)}
    if model.lm_head is not None:
        parts["lm_head."] = model.lm_head

    def load(module: nn.Module, prefix: str) -> None:
        tensors = read_tensors(layout, prefix, dtype, device=device)
        if base.is_dense and "mlp." in "".join(tensors):
            # Of one expert: whatever its row says, it has all the weight.
            tensors["mlp.gate.weight"] = torch.zeros(
                1, base.sizes.hidden_size, dtype=dtype, device=device
            )
        module.load_state_dict(tensors, assign=True)

    for prefix, module in parts.items():
        module.register_forward_pre_hook(lambda m, _, prefix=prefix: load(m, prefix))
        if prefix != "model.embed_tokens." or model.lm_head is not None:
            module.register_forward_hook(lambda m, *_: m.to("meta") and None)
    yield model

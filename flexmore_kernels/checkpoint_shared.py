"""What checkpoints that are to be merged have in common: is it the same, and what is its mean."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .checkpoint import read_tensors
from .checkpoint_config import RANK_KEYS
from .checkpoint_layout import Layout
from .model import FlexMoREConfig
from .progress import Progress
from .router_kinds import ROUTER_ROWS

# Fields of a config that may differ between them.
_OWN = ("num_experts", "num_experts_per_tok", "expert_ranks", "expert_bias", "experts", "extra")
# Fields that our config does not know, and that change what is generated.
_ALSO = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_SHOWN = 8
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def shared_names(layout: Layout, names: Iterable[str] | None = None) -> list[str]:
    """Of a checkpoint's tensors, or of these of them, what every expert shares; a router's rows
    aside, its projector not."""
    own = re.compile(r"\.mlp\.(experts\.[1-9]\d*\.|gate\.(weight|domain_embeddings|expert_bias)$)")
    return [name for name in (layout.files if names is None else names) if not own.search(name)]


def check_alike(layouts: Sequence[Layout], mixed: bool) -> None:
    """Check by configs and headers that checkpoints can be merged; ValueError names what is not."""
    first = layouts[0]
    if not mixed:
        kinds = {x.kind.removesuffix("_fused"): x.directory for x in layouts}
        if len(kinds) > 1:
            listed = ", ".join(f"{kind!r} in {where}" for kind, where in kinds.items())
            raise ValueError(
                f"model_type: {listed}; accepted: one, or both with mixed=True (--mixed)"
            )
    for layout in layouts:
        if layout.config["num_experts"] < 2:
            raise ValueError(f"{layout.directory}: has one expert; accepted: two or more")
    configs = [comparable(layout) for layout in layouts]
    for layout, config in zip(layouts[1:], configs[1:], strict=True):
        for name, value in config.items():
            if value != configs[0][name]:
                raise ValueError(
                    f"config.json: {name} is {configs[0][name]!r} in {first.directory} and "
                    f"{value!r} in {layout.directory}; accepted: the same"
                )
        for name in _ALSO:
            values = [x.config.get(name) for x in (first, layout)]
            if None not in values and values[0] != values[1]:
                raise ValueError(
                    f"config.json: {name} is {values[0]!r} in {first.directory} and {values[1]!r} "
                    f"in {layout.directory}; accepted: the same"
                )
        if layout.expert_bias != first.expert_bias:
            raise ValueError(
                f"mlp.gate.expert_bias: in one of {first.directory} and {layout.directory} only; "
                "accepted: in both or none"
            )
        _check_dtypes(first, layout)


def comparable(layout: Layout) -> dict:
    """The fields of a config that checkpoints of one mixture have in common."""
    values = {name: value for name, value in layout.config.items() if name not in RANK_KEYS}
    config = FlexMoREConfig.from_dict({"model_type": "flexmore"} | values)
    fields = (field.name for field in dataclasses.fields(config))
    return {name: getattr(config, name) for name in fields if name not in _OWN}


def _check_dtypes(first: Layout, layout: Layout) -> None:
    """Shared tensors and full-size experts are in one dtype, as the layer wants them."""
    base = {name: first.parts[name].stored.dtype for name in first.files}
    for name, part in layout.parts.items():
        wanted = base.get(
            name if "experts." not in name else re.sub(r"experts\.\d+\.", "experts.0.", name)
        )
        factor = name.endswith(("_a.weight", "_b.weight"))
        if wanted is not None and not factor and part.stored.dtype != wanted:
            raise ValueError(
                f"{name}: {wanted} in {first.directory} and {part.stored.dtype} in "
                f"{layout.directory}; accepted: one dtype"
            )


def check_equal(layouts: Sequence[Layout], say: Callable[[str], None] | None = None) -> None:
    """Check that shared tensors, router row 0 among them, are the same bits in all checkpoints.

    Raises ValueError with the names of those that differ, by how much, and in which checkpoint.
    """
    first, others = layouts[0], layouts[1:]
    routers = [name for name in first.files if name.endswith(ROUTER_ROWS)]
    names = shared_names(first) + routers
    progress = Progress(sum(first.parts[name].nbytes for name in names), say)
    different = []
    for name in names:
        mine = _shared_part(first, name)
        for other in others:
            theirs = _shared_part(other, name)
            bits = _BITS[mine.dtype.itemsize]
            if not torch.equal(mine.view(bits), theirs.view(bits)):
                most = float((mine.double() - theirs.double()).abs().max())
                row = " (row 0)" if name in routers else ""
                different.append(f"{name}{row} in {other.directory.name} by up to {most:.2g}")
        progress.done(first.parts[name].nbytes, f"comparison of {name}")
    if different:
        more = len(different) - _SHOWN
        listed = "; ".join(different[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(
            f"shared tensors differ from {first.directory.name}'s: {listed}; accepted: the same "
            "bits, or shared='average' (--shared average)"
        )


def _shared_part(layout: Layout, name: str) -> Tensor:
    tensor = read_tensors(layout, names=[name])[name]
    return tensor[:1] if name.endswith(ROUTER_ROWS) else tensor


def mean_tensors(
    layouts: Sequence[Layout], names: Sequence[str], rows: slice = slice(None)
) -> dict[str, Tensor]:
    """The mean of each tensor's rows over checkpoints, summed above its precision, rounded once."""
    means = {}
    for name in names:
        tensors = (read_tensors(layout, names=[name])[name][rows] for layout in layouts)
        if len(layouts) == 1:
            means[name] = next(tensors)
            continue
        tensor = next(tensors)
        total = tensor.to(torch.float32 if tensor.dtype.itemsize == 2 else torch.float64)
        for other in tensors:
            total += other
        means[name] = total.div_(len(layouts)).to(tensor.dtype)
    return means

"""Batches and the loop of every training of the study.

Ids lie on the device in one tensor; which windows a training sees is drawn before it begins, from
its seed and name, so that a step waits for nothing and another device sees the same.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from graphed import REPAID, GraphedStep
from torch import Tensor, nn
from torch.nn import functional as F

import flexmore_kernels as fk

sys.path.append(str(Path(__file__).resolve().parents[1]))
from run_report import Bar  # noqa: E402


class Source(NamedTuple):
    """Texts to draw windows from: ids (n,) int32, pieces end to end of these sizes, each drawn
    from with its share."""

    ids: Tensor
    sizes: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, *pieces: tuple[Tensor, float]) -> Source:
        """Of texts (n,) with their shares."""
        ids = torch.cat([piece for piece, _ in pieces])
        return cls(ids, tuple(len(p) for p, _ in pieces), tuple(share for _, share in pieces))


class Group(NamedTuple):
    """Parameters that are trained, and their learning rate."""

    parameters: list[nn.Parameter]
    rate: float


class Plan(NamedTuple):
    """How a training goes, beside what is trained on what.

    z_loss, balance: shares of the router's losses; mask: bool (E,), which experts those are about.
    own: the only row of the router that is trained; None: all that are given.
    """

    steps: int
    batch: int
    length: int
    warmup: float
    clip: float
    z_loss: float = 0.0
    balance: float = 0.0
    mask: Tensor | None = None
    own: int | None = None

    @property
    def tokens(self) -> int:
        """That it sees."""
        return self.steps * self.batch * self.length


def generator_of(*names: object) -> torch.Generator:
    """A generator on the CPU whose seed these names are."""
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def windows(source: Source, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Where `count` windows of length + 1 ids begin, (count,) int64: a piece by its share, a place
    in it at random. Raises ValueError for a piece that is too short."""
    short = [size for size in source.sizes if size <= length]
    if short:
        raise ValueError(f"texts: got one of {short[0]} tokens; accepted: more than {length}")
    shares = torch.tensor(source.shares, dtype=torch.float64)
    piece = torch.multinomial(shares, count, replacement=True, generator=generator)
    sizes = torch.tensor(source.sizes)
    first = sizes.cumsum(0) - sizes
    place = torch.rand(count, dtype=torch.float64, generator=generator)
    return first[piece] + (place * (sizes[piece] - length)).long()


def batches(source: Source, plan: Plan, *names: object) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, the ids that follow) of each step, both (batch, length) int64 on the ids' device."""
    generator = generator_of(*names)
    starts = windows(source, plan.steps * plan.batch, plan.length, generator)
    starts = starts.view(plan.steps, plan.batch, 1).to(source.ids.device)
    offsets = torch.arange(plan.length + 1, device=source.ids.device)
    for start in starts:
        rows = source.ids[start + offsets].long()
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train(
    model: fk.FlexMoREForCausalLM,
    groups: Sequence[Group],
    source: Source,
    plan: Plan,
    *names: object,
) -> float:
    """Train the groups' parameters by AdamW; all others stay. Returns the mean loss of the text
    over the last tenth of the steps.

    A linear warm-up, then a cosine to zero. On a GPU in bfloat16 by autocast, parameters and
    AdamW's averages in float32, a step as one CUDA graph. names: of this training, the seed first;
    they choose its batches.

    Raises ValueError where the loss is not finite.
    """
    model.requires_grad_(False)
    parameters = [parameter for group in groups for parameter in group.parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    rates = [group.rate for group in groups]
    device = source.ids.device
    on_gpu = device.type == "cuda"  # a graph reads rates where they lie
    optimizer = torch.optim.AdamW(
        [{"params": group.parameters, "lr": torch.tensor(group.rate, device=device)
          if on_gpu else group.rate} for group in groups],
        betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=on_gpu,
    )  # fmt: skip

    def one(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            total, loss = _losses(model, plan, (inputs, targets))
        total.backward()
        if plan.own is not None:
            _keep_other_rows(model, plan.own)
        nn.utils.clip_grad_norm_(parameters, plan.clip)
        optimizer.step()
        return loss

    graphed = on_gpu and plan.steps >= REPAID
    run = GraphedStep(one, optimizer.zero_grad) if graphed else one
    bar = Bar(" ".join(map(str, names)), 0, plan.steps, plan.batch * plan.length)
    last: list[Tensor] = []
    for step, batch in enumerate(batches(source, plan, *names)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if on_gpu:
                group["lr"].fill_(rate * _schedule(step, plan))
            else:
                group["lr"] = rate * _schedule(step, plan)
        loss = run(*batch)
        if step >= plan.steps - max(1, plan.steps // 10):
            last.append(loss)
        bar.step(loss)
    model.requires_grad_(False)
    found = float(torch.stack(last).mean())
    if not math.isfinite(found):
        raise ValueError(
            f"loss: not finite in {' '.join(map(str, names))}; accepted: a smaller learning rate"
        )
    return found


def _schedule(step: int, plan: Plan) -> float:
    warm = max(1, round(plan.warmup * plan.steps))
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / plan.steps))


def _losses(model, plan: Plan, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(what is minimised, the text's own loss)."""
    inputs, targets = batch
    if not (plan.z_loss or plan.balance):
        text = F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())
        return text, text.detach()
    with model.routings() as seen:
        logits = model(inputs)
    text = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    router = [routing.logits.float() for routing in seen]
    total = text
    if plan.z_loss:
        total = total + plan.z_loss * fk.ops.router_z_loss(router, mask=plan.mask)
    if plan.balance:
        ids = [routing.indices for routing in seen]
        even = fk.ops.load_balancing_loss(router, ids, mask=plan.mask)
        total = total + plan.balance * even
    return total, text.detach()


def _keep_other_rows(model, own: int) -> None:
    """No gradient for the other rows of the router: without weight decay AdamW leaves them as they
    are."""
    for block in model.model.layers:
        block.mlp.gate.weight.grad[:own] = 0
        block.mlp.gate.weight.grad[own + 1 :] = 0

"""Train the routers of a model that is there, for a few steps, and nothing else.

    loss = cross-entropy of the next token + balance * load balancing + z_loss * z

over the rows of linear routers, or the projector of projected ones: FlexOlmo's router tuning (arXiv
2507.07024, section 3, on public text that resembles the owners'), Nexus's short fine-tune (arXiv
2408.15901). Losses are ops/router_loss.py's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from . import ops
from .checks import check_int, check_tensor
from .model import FlexMoREForCausalLM
from .progress import Progress
from .router_inputs import Say, expert_of, layers_of
from .router_rows import Experts, is_projected

_IGNORED = -100
Batch = Tensor | tuple[Tensor, Tensor | None]


def tune(
    model: FlexMoREForCausalLM,
    batches: Sequence[Batch],
    steps: int,
    *,
    experts: Experts = None,
    learning_rate: float = 2e-3,
    balance: float = 1e-2,
    z_loss: float = 1e-3,
    clip: float = 1.0,
    seed: int = 0,
    say: Say = None,
) -> list[float]:
    """Train the routers by AdamW (0.9, 0.95), without weight decay; each step's text loss, in nats.

    Trained are `gate.weight`, or `gate.projector_in` and `gate.projector_out`, as float32 copies
    where they are narrower, and written back, rounded once, after the last step: until then, and
    after an error, the model is what it was. All else is, to the bit, always: experts, embeddings,
    domain embeddings, `expert_bias`. A shared expert's row gets no gradient.

    Args:
        model: runs as it is: its top_k, its shared expert. Gradients of its parameters are left
            alone.
        batches: ids (B, S), S >= 2, or (ids, attention_mask); all are seen once before any comes
            again, in an order that the seed draws anew each time.
        steps: how many batches; FlexOlmo takes 5 B tokens, for a few owners hundreds of steps do.
        experts: of a linear router these rows alone.
        learning_rate: reached in the first tenth of the steps, then constant; FlexOlmo's.
        balance: of `ops.load_balancing_loss`, "huggingface", all layers together.
        z_loss: of `ops.router_z_loss`, whose layers add up.
        clip: the largest norm of all gradients together.
        seed: of the order.
        say: is told how far it is.

    Two runs give the same bits on the CPU; on CUDA where torch's own backward kernels do. Raises
    ValueError or TypeError naming the argument; ValueError, with the model as it was, for a loss
    that is not finite.
    """
    layers, batches = layers_of(model), _checked(model, batches)
    check_int("steps", steps, 1)
    check_int("seed", seed, 0)
    rates = {"learning_rate": learning_rate, "balance": balance, "z_loss": z_loss, "clip": clip}
    for name, value in rates.items():
        positive = name in ("learning_rate", "clip")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (positive and value == 0):
            accepted = "a number above 0" if positive else "a number >= 0"
            raise ValueError(f"{name}: got {value!r}; accepted: {accepted}")
    rows = _rows(model, experts)
    trained, fixed = _copies(model)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    warmup, progress, losses = max(1, steps // 10), Progress(steps, say), []
    generator, order = torch.Generator().manual_seed(seed), []
    with _frozen(model):
        for step in range(steps):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            ids, mask = batches[order.pop()]
            with model.routings() as seen:
                logits = functional_call(model, trained | fixed, (ids, mask))
            text = _text_loss(logits, ids, mask)
            loss = text + _router_loss(layers, seen, mask, balance, z_loss)
            losses.append(float(text.detach()))
            if not math.isfinite(float(loss.detach())):
                raise ValueError(
                    f"loss: not finite at step {step + 1}, the model is as it was; accepted: a "
                    "smaller learning_rate"
                )
            optimizer.zero_grad()
            loss.backward()
            if rows is not None:
                for parameter in trained.values():
                    parameter.grad[~rows.to(parameter.device)] = 0
            torch.nn.utils.clip_grad_norm_(trained.values(), clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / warmup)
            optimizer.step()
            progress.done(1, f"step {step + 1} of {steps}, loss {losses[-1]:.3f}")
    _write_back(model, trained)
    return losses


def _checked(model: FlexMoREForCausalLM, batches: Any) -> list[tuple[Tensor, Tensor | None]]:
    """The batches as pairs, on the model's device."""
    if isinstance(batches, Tensor) or not isinstance(batches, Sequence) or not batches:
        got = "none" if isinstance(batches, Sequence) else type(batches).__name__
        raise TypeError(f"batches: got {got}; accepted: a list of ids (B, S), one or more")
    device, found = model.model.embed_tokens.weight.device, []
    for number, batch in enumerate(batches):
        ids, mask = batch if isinstance(batch, tuple) else (batch, None)
        name = f"batches[{number}]"
        check_tensor(name, ids, ("B", "S"), (torch.int64, torch.int32))
        most = model.config.vocab_size - 1
        if ids.shape[1] < 2 or not ids.shape[0] or int(ids.min()) < 0 or int(ids.max()) > most:
            raise ValueError(
                f"{name}: got shape {tuple(ids.shape)}; accepted: (B, S) with S >= 2, of ids from "
                f"0 to {most}"
            )
        if mask is not None:
            check_tensor(f"{name}[1]", mask, ids.shape)
            mask = mask.to(device).bool()
            if not bool((mask[:, 1:] & mask[:, :-1]).any()):
                raise ValueError(f"{name}[1]: got no token after another; accepted: one or more")
        found.append((ids.to(device).long(), mask))
    return found


def _rows(model: FlexMoREForCausalLM, experts: Experts) -> Tensor | None:
    """bool (E,): the rows that are trained; None: all."""
    if experts is None:
        return None
    if any(map(is_projected, layers_of(model))):
        raise ValueError(
            "experts: got some, and one projector makes all rows of a projected router; accepted: "
            "None, or router='linear'"
        )
    rows = torch.zeros(model.config.num_experts, dtype=torch.bool)
    for expert in experts:
        rows[expert_of(model, expert, "experts")] = True
    if not bool(rows.any()):
        raise ValueError("experts: got none; accepted: one or more, or None for all")
    return rows


def _copies(model: FlexMoREForCausalLM) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The routers' tensors by their names in the model: what is trained, and what beside it must be
    of its dtype."""
    trained, fixed = {}, {}
    for number, layer in enumerate(layers_of(model)):
        prefix = f"model.layers.{number}.mlp.gate."
        for name, tensor in (*layer.gate.named_parameters(), *layer.gate.named_buffers()):
            if name == "expert_bias":
                continue
            # What a step changes, bfloat16 would round away.
            wide = torch.promote_types(tensor.dtype, torch.float32)
            copy = tensor.detach().to(wide, copy=True)
            if isinstance(tensor, torch.nn.Parameter):
                trained[prefix + name] = copy.requires_grad_()
            else:
                fixed[prefix + name] = copy
    return trained, fixed


@contextlib.contextmanager
def _frozen(model: FlexMoREForCausalLM) -> Iterator[None]:
    """Within, no parameter of the model asks for a gradient."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in asked:
            parameter.requires_grad_()


def _text_loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of -log p(next token), over tokens that are real, and whose next one is."""
    targets = ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), _IGNORED)
    wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten(), ignore_index=_IGNORED)


def _router_loss(layers, seen, mask, balance: float, z_loss: float) -> Tensor | float:
    shared, E = layers[0].shared_expert, layers[0].num_experts
    logits, allowed = [routing.logits for routing in seen], None
    indices = [routing.indices for routing in seen]
    if shared is not None:  # it takes no part in the softmax, and its slot is the first
        allowed = torch.arange(E, device=logits[0].device) != shared
        indices = [one[..., 1:] for one in indices]
    about = {
        "bias": [layer.gate.expert_bias for layer in layers], "mask": allowed,
        "padding_mask": mask,
    }  # fmt: skip
    total: Tensor | float = 0.0
    if balance:
        scoring = layers[0].scoring
        even = ops.load_balancing_loss(logits, indices, scoring=scoring, **about)
        total = total + balance * even
    if z_loss:
        total = total + z_loss * ops.router_z_loss(logits, **about)
    return total


@torch.no_grad()
def _write_back(model: FlexMoREForCausalLM, trained: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    new = {name: tensor.to(parameters[name].dtype) for name, tensor in trained.items()}
    for name, tensor in new.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name}: not finite after the last step, the model is as it was; accepted: a "
                "smaller learning_rate"
            )
    for name, tensor in new.items():
        parameters[name].copy_(tensor)

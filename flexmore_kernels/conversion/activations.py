"""What enters each projection, over a text: second moments, for a truncation that minds them.

    inputs of gate and up, per layer:             E[x x^T] over all tokens that are not padding
    inputs of down, per layer and expert e > 0:   E[h h^T], h = silu(W_gate x) * (W_up x), over the
                                                  tokens that selected e

`svd.decompose(second_moment=)` takes them. x x^T is kept whole, (D, D), and of h h^T the diagonal,
(F,), unless asked otherwise: at F = 11008, 6 experts and 32 layers the whole would be 93 GB. Sums
are float64, on the layer's device; a file holds the means in float32.

The file is one safetensors file: `layers.{l}.inputs`, `layers.{l}.experts.{e}.hidden`, and of each
`....tokens`, int64 of one entry, how many tokens it is the mean of.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import ops
from ..checkpoint_writer import write_tensors
from ..checks import check_int, check_one_of, check_tensor
from ..layer import FlexMoRE

FORMS = ("full", "diagonal")
_FORMAT = "flexmore second moments"


class _InFile(Mapping):
    """The means of an open file: all of a model's would be more than a layer's memory."""

    def __init__(self, opened: Any, names: list[str]) -> None:
        self._opened, self._names = opened, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Activations:
    """Means of x x^T, or of its diagonal, by name; from `gather` or `Activations.load`."""

    def __init__(self, means: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        self.means = means if isinstance(means, _InFile) else dict(means)
        self.tokens = dict(tokens)

    def second_moment(self, layer: int, expert: int, projection: str) -> Tensor | None:
        """What `svd.decompose` takes for this matrix; None where no token was seen.

        Raises ValueError when there is no such layer or expert in it.
        """
        check_one_of("projection", projection, ("gate", "up", "down"))
        name = _hidden_name(layer, expert) if projection == "down" else _inputs_name(layer)
        if name not in self.means:
            raise ValueError(f"activations: no {name!r}; they are of another model")
        return self.means[name] if self.tokens[name] else None

    def of_unseen(self, layer: int) -> Tensor:
        """What stands for the inputs of down of an expert that no token chose: the diagonal (F,),
        mean over the layer's experts that were chosen, over all layers' if it has none.

        So its singular values compare with theirs; without weights they would be of another unit.
        Raises ValueError where no token chose any expert beside the public one.
        """
        seen = [name for name in self.means if name.endswith(".hidden") and self.tokens[name]]
        own = [name for name in seen if name.startswith(f"layers.{layer}.")]
        if not seen:
            raise ValueError(
                "activations: no token chose an expert beside the public one; accepted: those of a "
                "text for which experts are chosen"
            )
        means = [self.means[name] for name in own or seen]
        return torch.stack([m.diagonal() if m.dim() == 2 else m for m in means]).mean(0)

    def check_model(self, sizes: tuple[int, int], layers: int, experts: int) -> None:
        """ValueError unless they are of a model of these sizes (D, F), layers and experts."""
        names = {_inputs_name(n): sizes[0] for n in range(layers)}
        names |= {_hidden_name(n, e): sizes[1] for n in range(layers) for e in range(1, experts)}
        found = {name: mean.shape[0] for name, mean in self.means.items()}
        if found != names:
            wrong = next(n for n in sorted({*found, *names}) if found.get(n) != names.get(n))
            raise ValueError(
                f"activations: {wrong!r} has size {found.get(wrong, 'none')}, the model "
                f"{names.get(wrong, 'none')}; accepted: those gathered with this model"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all."""
        path = Path(path)
        tensors = {name: mean.float().cpu().contiguous() for name, mean in self.means.items()}
        for name, count in self.tokens.items():
            tensors[f"{name}.tokens"] = torch.tensor([count])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, content=_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Activations:
        """A file that `save` wrote, of which each mean is read, to the CPU, when it is asked for.

        All of it is checked here, one at a time: ValueError for any other file.
        """
        try:
            opened = safe_open(path, framework="pt")
            if (opened.metadata() or {}).get("content") != _FORMAT:
                raise ValueError(f"activations: {path} holds something else")
            names = set(opened.keys())
        except SafetensorError as fault:
            raise ValueError(
                f"activations: {path} is no whole safetensors file ({fault})"
            ) from None
        means, tokens = _InFile(opened, sorted(n for n in names if not n.endswith(".tokens"))), {}
        for name, mean in means.items():
            count = f"{name}.tokens"
            number = opened.get_tensor(count) if count in names else None
            if fault := _fault(mean, number):
                raise ValueError(f"activations: {path}: {name!r} {fault}")
            tokens[name] = int(number)
        return cls(means, tokens)


def gather(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    inputs: str = "full",
    hidden: str = "diagonal",
    progress: Callable[[int], None] | None = None,
) -> Activations:
    """Run token ids through a model and take the second moments at each of its FlexMoRE layers.

    Args:
        model: called as model(ids, attention_mask): a `FlexMoREForCausalLM`, or any other module
            with `FlexMoRE` layers in it, which are counted in the order of `model.modules()`.
        batches: (ids (B, S), attention_mask (B, S) or None); where the mask is 0 is padding, which
            is left out.
        inputs, hidden: "full" or "diagonal", of x and of h.
        progress: called after each batch with how many have been.

    Two runs give the same bits. Raises ValueError when the model has no FlexMoRE layer, there is no
    token, or a layer's input is not finite.
    """
    check_one_of("inputs", inputs, FORMS)
    check_one_of("hidden", hidden, FORMS)
    layers = [module for module in model.modules() if isinstance(module, FlexMoRE)]
    if not layers:
        raise ValueError("model: has no FlexMoRE layer")
    sums = _Sums(inputs, hidden)
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, n=n: sums.add(n, module, args[0], kwargs),
            with_kwargs=True,
        )
        for n, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            for count, (ids, mask) in enumerate(batches, 1):
                check_tensor("ids", ids, ("B", "S"))
                if mask is not None:
                    check_tensor("attention_mask", mask, ids.shape, None, ids.device)
                sums.real = None if mask is None else mask.bool().flatten()
                model(ids, mask)
                if progress is not None:
                    progress(count)
    finally:
        for hook in hooks:
            hook.remove()
    return sums.finish()


class _Sums:
    """Running sums by name, and which tokens of the batch at hand are real (None: all)."""

    def __init__(self, inputs: str, hidden: str) -> None:
        self.inputs, self.hidden = inputs, hidden
        self.real: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, number: int, layer: FlexMoRE, x: Tensor, kwargs: Mapping) -> None:
        mask = kwargs.get("expert_mask")
        x_TD = x.reshape(-1, layer.hidden_size)
        if mask is not None and mask.dim() > 1:
            mask = mask.reshape(-1, layer.num_experts)
        if self.real is not None:
            x_TD = x_TD[self.real]
            mask = mask[self.real] if mask is not None and mask.dim() > 1 else mask
        self._add(_inputs_name(number), x_TD, self.inputs)
        weight = layer.gate.rows()
        dtype = layer.router_dtype or weight.dtype
        selected_TK = ops.topk_route(
            x_TD.to(dtype),
            weight.to(dtype),
            top_k=layer.top_k,
            bias=layer.gate.expert_bias,
            mask=mask,
            scoring=layer.scoring,
            shared=layer.shared_expert,
        ).indices
        tensors = layer.experts.state_dict()
        for expert in range(1, layer.num_experts):
            rows = x_TD[(selected_TK == expert).any(1)]
            gate, up = (
                _project(rows, tensors, expert, projection) for projection in ("gate", "up")
            )
            self._add(_hidden_name(number, expert), F.silu(gate) * up, self.hidden)

    def _add(self, name: str, rows: Tensor, form: str) -> None:
        wide = rows.double()
        found = wide.T @ wide if form == "full" else wide.square().sum(0)
        self.sums[name] = found if name not in self.sums else self.sums[name].add_(found)
        self.tokens[name] = self.tokens.get(name, 0) + rows.shape[0]

    def finish(self) -> Activations:
        if not any(self.tokens.values()):
            raise ValueError("batches: no token that is not padding")
        for name, total in self.sums.items():
            if not bool(total.isfinite().all()):
                raise ValueError(f"batches: the sums of {name} are not finite")
        means = {name: total / max(1, self.tokens[name]) for name, total in self.sums.items()}
        return Activations(means, self.tokens)


def _fault(mean: Tensor, tokens: Tensor | None) -> str | None:
    """What is wrong with an entry of a file."""
    if tokens is None or tokens.numel() != 1 or tokens.is_floating_point() or int(tokens) < 0:
        return "has no number of tokens; accepted: files by `flexmore activations`"
    if mean.dim() not in (1, 2) or mean.numel() == 0 or len(set(mean.shape)) > 1:
        return f"has shape {tuple(mean.shape)}; accepted: (n, n), or (n,) for the diagonal"
    if not bool(mean.isfinite().all()):
        return "holds NaN or Inf; accepted: finite numbers"
    if int(tokens) and not bool(mean.any()):
        return f"is zero over {int(tokens)} tokens; accepted: inputs that are not all zero"
    return None


def _project(x_TD: Tensor, tensors: Mapping[str, Tensor], expert: int, projection: str) -> Tensor:
    """x W^T for one expert: of its own matrix, or of the base's and its factors."""
    name = f"{expert}.{projection}_proj"
    own = tensors.get(f"{name}.weight")
    y = F.linear(x_TD, tensors[f"0.{projection}_proj.weight"] if own is None else own)
    if f"{name}_a.weight" in tensors:
        a, b = (tensors[f"{name}_{side}.weight"].to(x_TD.dtype) for side in "ab")
        y = y + F.linear(F.linear(x_TD, a), b)
    return y


def _inputs_name(layer: int) -> str:
    return f"layers.{check_int('layer', layer, 0)}.inputs"


def _hidden_name(layer: int, expert: int) -> str:
    return f"layers.{check_int('layer', layer, 0)}.experts.{check_int('expert', expert, 1)}.hidden"

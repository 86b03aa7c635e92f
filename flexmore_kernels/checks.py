"""Argument checks: each failure names the argument, what came and what is accepted.

Shapes, dtypes and devices are checked always. Values are checked on CPU tensors and, since looking
at a CUDA tensor's values waits for the device, on CUDA only inside `validation()`.
"""

from __future__ import annotations

import contextlib
import contextvars
import operator
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCORINGS = ("softmax", "topk_softmax", "sigmoid", "unit")
"""What a selected expert may weigh: see `ops.topk_route`."""

_validating: contextvars.ContextVar[bool] = contextvars.ContextVar("validating", default=False)


@contextlib.contextmanager
def validation() -> Iterator[None]:
    """Within, values of CUDA tensors are checked too (ids in range, some expert allowed, no NaN).

    Each check waits for the device, so this is for debugging, not for serving.
    """
    token = _validating.set(True)
    try:
        yield
    finally:
        _validating.reset(token)


def checks_values(tensor: Tensor) -> bool:
    """Whether the values of this tensor are to be looked at; a traced one has none."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    return tensor.device.type == "cpu" or _validating.get()


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Check that `value` is a tensor of this shape (strings match any size), dtype and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; accepted: a torch.Tensor")
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            isinstance(want, str) or got == want
            for got, want in zip(value.shape, shape, strict=True)
        )
        if not fits:
            wanted = "(" + ", ".join(str(size) for size in shape) + ("," * (len(shape) == 1)) + ")"
            raise ValueError(f"{name}: got shape {tuple(value.shape)}; accepted: {wanted}")
    if dtypes is not None and value.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: got dtype {got}; accepted: {accepted}")
    if device is not None and value.device != device:
        raise ValueError(
            f"{name}: got a tensor on {value.device}; accepted: one on {device}, as the others"
        )


def check_weights(name: str, weights: object, shape: Sequence[int], like: Tensor) -> None:
    """Check routing weights: of this shape, on `like`'s device, float32 (float64 for float64)."""
    accumulator = torch.promote_types(like.dtype, torch.float32)
    check_tensor(name, weights, shape, (accumulator,), like.device)


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Check that `value` is an int (not a bool) in [low, high] and return it as a plain int."""
    accepted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; accepted: {accepted}")
    try:
        number = operator.index(value)  # a compiler's symbolic int becomes a constant here
    except TypeError:
        raise TypeError(f"{name}: got {value!r}; accepted: {accepted}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: got {number}; accepted: {accepted}")
    return number


def check_one_of(name: str, value: object, accepted: Iterable) -> None:
    """Check that `value` is one of the accepted objects, or equal to an accepted string."""
    if not any(value is one or (isinstance(one, str) and value == one) for one in accepted):
        listed = ", ".join(repr(one) for one in accepted)
        raise ValueError(f"{name}: got {value!r}; accepted: {listed}")


def check_ranks(name: str, ranks: object, num_experts: int) -> tuple[int, ...]:
    """Check E ranks >= 0, or a `Ragged` axis of them, and return a tuple of plain ints."""
    ranks = getattr(ranks, "sizes", ranks)
    if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Sequence):
        raise TypeError(f"{name}: got {ranks!r}; accepted: a sequence of {num_experts} ranks >= 0")
    if len(ranks) != num_experts:
        raise ValueError(
            f"{name}: got {len(ranks)} entries; accepted: {num_experts}, one an expert"
        )
    if type(ranks) is tuple and all(type(rank) is int and rank >= 0 for rank in ranks):
        return ranks
    return tuple(check_int(f"{name}[{e}]", rank, 0) for e, rank in enumerate(ranks))


def check_ids(name: str, indices: Tensor, num_experts: int) -> None:
    """Check ids in [0, E] (E marks an empty slot) that are distinct within a token."""
    if indices.numel() == 0:
        return
    wrong = (indices < 0) | (indices > num_experts)
    if bool(wrong.any()):
        token, slot = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{name}: got id {int(indices[token, slot])} at [{token}, {slot}]; accepted: 0 to "
            f"{num_experts - 1}, or {num_experts} for an empty slot"
        )
    ordered = indices.sort(dim=-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < num_experts)
    if bool(twice.any()):
        token, slot = (int(i) for i in twice.nonzero()[0])
        raise ValueError(
            f"{name}: token {token} names expert {int(ordered[token, slot])} twice; "
            "accepted: distinct ids within a token"
        )


def check_routable(logits: Tensor, mask: Tensor | None, shared: int | None = None) -> None:
    """Check that each token has an expert to go to and no NaN among its allowed logits.

    The logit of a shared expert is not looked at.
    """
    if mask is not None:
        none = ~mask.any(dim=-1)
        if bool(none.any()):
            raise ValueError(
                f"mask: got no allowed expert for token {int(none.nonzero()[0, 0])}; "
                "accepted: at least one True for every token"
            )
    nan = logits.isnan() if mask is None else logits.isnan() & mask
    if shared is not None:
        nan = nan.index_fill(1, torch.tensor(shared, device=nan.device), False)
    if bool(nan.any()):
        token, expert = (int(i) for i in nan.nonzero()[0])
        raise ValueError(
            f"logits: got NaN for token {token}, expert {expert}; accepted: numbers or -inf"
        )

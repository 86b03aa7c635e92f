"""When a result is right: the accuracy rule, and equality of bits.

An output or gradient is right when, against the float64 reference, in the maximum norm and in the
Frobenius norm,

    err(ours)  <=  2 * err(reference in ours' dtype on ours' device)  +  u * max|ref64|

with u the unit roundoff of the dtype (half its epsilon). Nothing is tuned by hand: a kernel may
be twice as wrong as plain PyTorch in the same dtype, plus one rounding of the largest entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# A float64 result has no wider reference: it may differ from the float64 reference by the order of
# its sums. 2^-40 of the largest entry leaves room for some thousand summands.
FLOAT64_SLACK = 2.0**-40


class Accuracy(NamedTuple):
    """How far a result is from the truth, and how far it may be."""

    error_max: float
    allowed_max: float
    error_frobenius: float
    allowed_frobenius: float
    worst: tuple[int, ...]  # where the largest error is
    note: str = ""  # or why no error could be computed

    @property
    def ratio(self) -> float:
        """The larger of error / allowed in the two norms; above 1, or NaN, means wrong."""
        if self.note:
            return math.inf
        pairs = (
            (self.error_max, self.allowed_max),
            (self.error_frobenius, self.allowed_frobenius),
        )
        return max(e / a if a > 0 else (0.0 if e == 0 else math.inf) for e, a in pairs)

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


def accuracy(out: Tensor, ref64: Tensor, same: Tensor | None = None) -> Accuracy:
    """Measures `out` against the float64 reference by the accuracy rule.

    Args:
        out: the result, any float dtype and device.
        ref64: the reference's result in float64, of the same shape, from the same (rounded) inputs.
        same: the reference's result in the dtype and on the device of `out`; None stands for the
            float64 result rounded to that dtype, the best there is.
    """
    blank = Accuracy(math.inf, 0.0, math.inf, 0.0, ())
    if ref64.dtype != torch.float64:
        raise TypeError(f"ref64: got {ref64.dtype}; accepted: torch.float64")
    if out.shape != ref64.shape:
        return blank._replace(note=f"shape {tuple(out.shape)}, expected {tuple(ref64.shape)}")
    if same is not None and (same.dtype != out.dtype or same.shape != out.shape):
        return blank._replace(
            note=f"{out.dtype} {tuple(out.shape)}, but the reference in the same dtype gave "
            f"{same.dtype} {tuple(same.shape)}"
        )
    if out.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0, 0.0, ())
    truth = ref64.detach().cpu()
    if not truth.isfinite().all():
        return blank._replace(note="the float64 reference is not finite")
    error = (out.detach().cpu().double() - truth).abs()
    flat = int(error.nan_to_num(math.inf).argmax())
    worst = tuple(int(i) for i in np.unravel_index(flat, tuple(error.shape)))
    if not error.isfinite().all():
        return blank._replace(worst=worst, note=f"not finite at {worst}")
    if out.dtype == torch.float64:
        same, floor = None, FLOAT64_SLACK * truth.abs().max().item()
    else:
        floor = 0.5 * torch.finfo(out.dtype).eps * truth.abs().max().item()
    best = truth.to(out.dtype) if same is None else same.detach().cpu()
    plain = best.double() - truth
    return Accuracy(
        error_max=error.max().item(),
        allowed_max=2 * plain.abs().max().item() + floor,
        error_frobenius=error.norm().item(),
        allowed_frobenius=2 * plain.norm().item() + floor,
        worst=worst,
    )


def assert_accurate(out: Tensor, ref64: Tensor, same: Tensor | None = None, name: str = "") -> None:
    """Fails, naming the worst coordinate and the ratio to what is allowed, if `out` is wrong."""
    found = accuracy(out, ref64, same)
    if found.ok:
        return
    label = name or "result"
    if found.note:
        raise AssertionError(f"{label}: {found.note}")
    at = found.worst
    raise AssertionError(
        f"{label}: {found.ratio:.3g} x the allowed error. "
        f"max {found.error_max:.3e} (allowed {found.allowed_max:.3e}), "
        f"Frobenius {found.error_frobenius:.3e} (allowed {found.allowed_frobenius:.3e}); "
        f"worst at {at}: {out[at].item():.9g}, expected {ref64[at].item():.9g}"
        + ("" if same is None else f", plain {out.dtype} gave {same[at].item():.9g}")
    )


def assert_accurate_draws(
    outs: Sequence[Tensor], refs64: Sequence[Tensor], sames: Sequence[Tensor], name: str = ""
) -> None:
    """The accuracy rule for results of few numbers: err(reference) is taken over more draws.

    A handful of independent roundings may be small by luck in one draw, in the reference as in
    ours. So `outs` are the last of the draws that `refs64` and `sames` hold, all inputs drawn
    alike: the largest error of `outs` against the largest of all `sames`, and the same with the
    root mean square.
    """

    def errors(results: Sequence[Tensor]) -> Tensor:
        pairs = zip(results, refs64[-len(results) :], strict=True)
        return torch.stack([(r.detach().cpu().double() - t.detach().cpu()).abs() for r, t in pairs])

    refs_of_outs = refs64[-len(outs) :]
    for out, ref64 in zip(outs, refs_of_outs, strict=True):
        assert out.shape == ref64.shape and out.dtype == sames[0].dtype, f"{name}: {out.dtype}"
    if outs[0].numel() == 0:
        return
    ours, plain = errors(outs), errors(sames)
    scale = max(ref64.abs().max().item() for ref64 in refs64)
    exact = outs[0].dtype == torch.float64
    floor = scale * (FLOAT64_SLACK if exact else 0.5 * torch.finfo(outs[0].dtype).eps)
    root_floor = floor / math.sqrt(outs[0].numel())
    for norm, got, ref, slack in (
        ("max", ours.max().item(), plain.max().item(), floor),
        (
            "rms",
            ours.square().mean().sqrt().item(),
            plain.square().mean().sqrt().item(),
            root_floor,
        ),
    ):
        allowed = slack if exact else 2 * ref + slack
        if not got <= allowed:
            worst = int(ours.nan_to_num(math.inf).argmax())
            at = tuple(int(i) for i in np.unravel_index(worst, tuple(ours.shape)))
            raise AssertionError(
                f"{name or 'result'}: {norm} error {got:.3e}, allowed {allowed:.3e}; worst at draw "
                f"{at[0]}, {at[1:]}: {outs[at[0]][at[1:]].item():.9g}, expected "
                f"{refs_of_outs[at[0]][at[1:]].item():.9g}"
            )


def assert_same(a: Tensor, b: Tensor, name: str = "") -> None:
    """Fails unless both have the same dtype, shape and bits (NaN equals NaN, 0.0 is not -0.0)."""
    label = name or "tensors"
    assert a.dtype == b.dtype, f"{label}: {a.dtype} and {b.dtype}"
    assert a.shape == b.shape, f"{label}: {tuple(a.shape)} and {tuple(b.shape)}"
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    if a.is_floating_point():
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        differ = a.view(bits) != b.view(bits)
    else:
        differ = a != b
    if differ.any():
        at = tuple(int(i) for i in differ.nonzero()[0])
        raise AssertionError(
            f"{label}: {int(differ.sum())} of {differ.numel()} entries differ, "
            f"first at {at}: {a[at].item()!r} and {b[at].item()!r}"
        )

"""What a forward must move and compute, stage by stage, and what the device can: its floors.

A floor is max(bytes / copy rate, operations / matmul rate), by the rates of a large copy (bytes
read and written) and a large product that are measured beside it. Bytes: each input read once, each
output written once, weights of experts without rows not at all. Operations: products of matrices,
for routed rows alone, the base once a token. s is the size of an element, n_e the rows of expert e,
r_P its rank in projection P:

    router          s (T D + E D)                            2 T D E
    base gate, up   s (T D + 2 D F + 2 T F)                  4 T D F
    A of gate, up   s (T D + sum (D + n_e) (r_g + r_u))      2 D sum n_e (r_g + r_u)
    middle          s (3 T F + sum (F + n_e) (r_g + r_u)     2 F sum n_e (r_g + r_u)
                       + F sum n_e of rows that need h)
    A of down       s sum (F n_e + r_d F + n_e r_d)          2 F sum n_e r_d
    base down       s (T F + D F + T D)                      2 T D F
    B of down       s (2 T D + sum r_d (n_e + D))            2 D sum n_e r_d
    full-size       s sum (D F + n_e (D + F)), a matrix      2 D F sum n_e, a matrix

The whole floor counts no intermediate: the weights, x and y, and all operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .projection import FULL
from .timing import compare


class Roofs(NamedTuple):
    """Measured rates of a device."""

    copy_tb_s: float
    matmul_tflop_s: float
    matmul_dtype: str


class Stage(NamedTuple):
    """A part of the forward, or all of it."""

    name: str
    nbytes: int
    flops: int

    def floor_ms(self, roofs: Roofs) -> float:
        return max(self.nbytes / roofs.copy_tb_s / 1e9, self.flops / roofs.matmul_tflop_s / 1e9)

    def bound(self, roofs: Roofs) -> str:
        """What the floor is made of."""
        by_bytes = self.nbytes / roofs.copy_tb_s >= self.flops / roofs.matmul_tflop_s
        return "bytes" if by_bytes else "operations"


class Work(NamedTuple):
    """A layer and the rows that its experts have: layouts as `schedule.choose` takes them."""

    layouts: Sequence[Sequence[int]]
    rows: Sequence[int]
    tokens: int
    hidden: int
    width: int
    size: int  # bytes of an element

    def stages(self) -> list[Stage]:
        """Those that this layer has, in order."""
        T, D, F, s = self.tokens, self.hidden, self.width, self.size
        num_experts = len(self.rows)
        used = [(e, n) for e, n in enumerate(self.rows) if e and n]
        gate, up, down = self.layouts
        low_in = [(n, max(gate[e], 0) + max(up[e], 0)) for e, n in used]
        low_out = [(n, max(down[e], 0)) for e, n in used]
        own_h = sum(n for e, n in used if down[e] != 0)
        matrices = [n for e, n in used for layout in self.layouts if layout[e] == FULL]
        inward, outward = sum(n * r for n, r in low_in), sum(n * r for n, r in low_out)
        found = [
            Stage("router", s * (T * D + num_experts * D), 2 * T * D * num_experts),
            Stage("base gate, up", s * (T * D + 2 * D * F + 2 * T * F), 4 * T * D * F),
            Stage(
                "A of gate, up", s * (T * D + sum((D + n) * r for n, r in low_in)), 2 * D * inward
            ),
            Stage(
                "middle: B, SwiGLU, sum",
                s * (3 * T * F + sum((F + n) * r for n, r in low_in) + F * own_h),
                2 * F * inward,
            ),
            Stage(
                "A of down",
                s * sum(F * n + (F + n) * r for n, r in low_out if r),
                2 * F * outward,
            ),
            Stage("base down", s * (T * F + D * F + T * D), 2 * T * D * F),
            Stage(
                "B of down", s * (2 * T * D + sum((D + n) * r for n, r in low_out)), 2 * D * outward
            ),
            Stage(
                "full-size matrices",
                s * sum(D * F + n * (D + F) for n in matrices),
                2 * D * F * sum(matrices),
            ),
        ]
        always = ("router", "base gate, up", "middle: B, SwiGLU, sum", "base down")
        return [stage for stage in found if stage.flops or stage.name in always]

    def whole(self) -> Stage:
        """All of it at once: weights and x read, y written."""
        T, D, F, s = self.tokens, self.hidden, self.width, self.size
        weights = 3 * D * F + len(self.rows) * D
        for layout in self.layouts:
            for e, kind in enumerate(layout):
                if e and self.rows[e]:
                    weights += D * F if kind == FULL else kind * (D + F)
        flops = sum(stage.flops for stage in self.stages())
        return Stage("layer", s * (weights + 2 * T * D), flops)

    def dense(self) -> Stage:
        """One SwiGLU FFN of the base's size."""
        T, D, F = self.tokens, self.hidden, self.width
        return Stage("dense FFN", self.size * (3 * D * F + 2 * T * D), 6 * T * D * F)


def measure(device: str) -> Roofs:
    """A large copy and a large product in this run, on random numbers: zeros run faster."""
    on_gpu = torch.device(device).type == "cuda"
    dtype, side = (torch.bfloat16, 8192) if on_gpu else (torch.float32, 1024)
    source = torch.randn((1 << 29) if on_gpu else (1 << 24), device=device, dtype=dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = compare({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device)
    return Roofs(
        2 * source.nbytes / times["copy"].ms / 1e9,
        2 * side**3 / times["matmul"].ms / 1e9,
        str(dtype).removeprefix("torch."),
    )

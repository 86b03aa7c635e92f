"""Bugs of a step of training: what is kept for it, and the backward of few experts."""

from __future__ import annotations

from .bug import Bug

TOKEN_BACKWARD = "flexmore_kernels/_triton/token_backward.py"

BUGS = (
    Bug(
        "own rows of h without their weights",
        "They replace dh in place, and who reads them next multiplies by no weight.",
        "flexmore_kernels/_triton/own_rows_backward.py",
        "tl.store(rows_ptr + at, (weight * h).to(dtype), mask=live)",
        "tl.store(rows_ptr + at, h.to(dtype), mask=live)",
        "tests/test_own_rows.py -k double",
        "interpreter",
    ),
    Bug(
        "own experts' part of dG forgotten",
        "Their rows contain G, so what comes back through it is theirs as well.",
        TOKEN_BACKWARD,
        "experts = tuple(e for e in self.own if self._on_base(index, e))",
        "experts = ()",
        "tests/test_own_rows.py -k double",
        "interpreter",
    ),
    Bug(
        "columns of ranks counted for trained experts alone",
        "Packed gradients hold all experts' columns, also those that nobody wants.",
        "flexmore_kernels/_triton/gradients.py",
        "            first += padded[e]\n",
        "                first += padded[e]\n",
        "tests/test_own_rows.py -k what_else",
        "interpreter",
    ),
    Bug(
        "ds of fused experts left zero beside own ones",
        "The sum over ranks is one product; each kind of expert fills its own columns.",
        TOKEN_BACKWARD,
        "                    out.copy_(self.ds_others[:, taken : taken + width])\n",
        "",
        "tests/test_own_rows.py -k double",
        "interpreter",
    ),
    Bug(
        "full-size experts' rows kept though they are recomputed",
        "The switch is there for memory; gradients are right either way.",
        "flexmore_kernels/kept.py",
        "rows = not recompute and FULL in",
        "rows = FULL in",
        "tests/test_saved.py -k full_size",
        "interpreter",
    ),
    Bug(
        "a gradient by token without the routing weight",
        "h and dp are of the expert alone; what flows back to gate and up is weighted.",
        "csrc/cuda/token_major_backward.cuh",
        "const float weighted = p[row] * dh[j];",
        "const float weighted = dh[j];",
        "tests/test_token_major_backward.py -k bfloat16",
        "gpu",
    ),
    Bug(
        "another expert's rows in the last step of a weight's gradient",
        "Steps have 64 rows, an expert any number; what follows is the next expert's.",
        "csrc/cuda/grouped_gemm_dweight.cuh",
        "if (step == tile.steps - 1 && tile.last < kDepth) {",
        "if (false) {",
        "tests/test_grouped_gemm_dweight.py",
        "gpu",
    ),
)

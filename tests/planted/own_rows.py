"""Bugs where experts have rows of their own beside token-major ones."""

from __future__ import annotations

from .bug import Bug

OWN_ROWS = "flexmore_kernels/_triton/own_rows.py"

BUGS = (
    Bug(
        "others' rows summed with the own experts'",
        "Rows of token-major experts that need none were never written.",
        OWN_ROWS,
        "    return torch.where(wanted[ids] > 0, plan.slot_to_row, -1)\n",
        "    return plan.slot_to_row\n",
        "tests/test_own_rows.py",
        "interpreter",
    ),
    Bug(
        "own experts counted twice",
        "Their rows join the hidden sum later; for the token-major kernel they are not chosen.",
        OWN_ROWS,
        "plan._replace(expert_to_row=torch.where(hidden > 0, -1, plan.expert_to_row))",
        "plan",
        "tests/test_own_rows.py",
        "interpreter",
    ),
    Bug(
        "a segment's rows read at their sorted place",
        "z holds each expert's rows from its first row on, x all experts' rows in order.",
        "flexmore_kernels/_triton/row_products.py",
        "SORTED_0=item.first.place != SEGMENT,",
        "SORTED_0=True,",
        "tests/test_own_rows.py",
        "interpreter",
    ),
    Bug(
        "a full-size down projection forgotten where gate and up are the base's",
        "Its rows of h are needed, though no delta changes them.",
        "flexmore_kernels/schedule.py",
        "any(entries[:2]) or entries[2] == FULL else",
        "any(entries[:2]) else",
        "tests/test_own_rows.py -k down_matrix_alone",
        "interpreter",
    ),
)

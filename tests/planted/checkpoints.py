"""Bugs in what is read of checkpoints, and in what is written."""

from __future__ import annotations

from .bug import Bug

BUGS = (
    Bug(
        "up before gate in the fused tensor",
        "Other models have it so, and the shapes are the same.",
        "flexmore_kernels/checkpoint_layout.py",
        '"gate": (both, slice(0, F)), "up": (both, slice(F, 2 * F))',
        '"up": (both, slice(0, F)), "gate": (both, slice(F, 2 * F))',
        "tests/test_checkpoint_layout.py",
    ),
    Bug(
        "a row of A alone is trimmed",
        "Its product is zero as well, but its column of B would still learn.",
        "flexmore_kernels/checkpoint_headers.py",
        "        return dead if not used.any() else dead - 1 - int(used.nonzero()[0][-1])\n",
        "        return dead\n",
        "tests/test_checkpoint_headers.py",
    ),
    Bug(
        "padding as stored in what is read",
        "The ranks are trimmed, and the tensors read whole.",
        "flexmore_kernels/checkpoint_layout.py",
        "(rank, width), (slice(0, rank),))",
        "(rank, width), ())",
        "tests/test_checkpoint_layout.py",
    ),
    Bug(
        "a merge compares the experts' own router rows",
        "gate.weight is one tensor, of which row 0 alone is shared.",
        "flexmore_kernels/checkpoint_shared.py",
        "    return tensor[:1] if name.endswith(ROUTER_ROWS) else tensor\n",
        "    return tensor\n",
        "tests/test_checkpoint_edit.py",
    ),
    Bug(
        "the bias of the next expert",
        "There is none for expert 0, so its numbers are one lower.",
        "flexmore_kernels/checkpoint_picks.py",
        "biases.append(router[bias][expert - 1 : expert])",
        "biases.append(router[bias][-expert :][:1])",
        "tests/test_checkpoint_edit.py",
    ),
    Bug(
        "a unit counts as written before it is",
        "The journal first, then the file: after a kill the file is missing.",
        "flexmore_kernels/checkpoint_writer.py",
        "            self.facts.pop(unit, None)\n",
        "            self.facts.setdefault(unit, {})\n",
        "tests/test_checkpoint_writer.py",
    ),
    Bug(
        "delta rounded before it is added",
        "b @ a in the weights' dtype: two roundings, and small deltas lost.",
        "flexmore_kernels/checkpoint_forms.py",
        "torch.addmm(base.to(acc), b, a).to(base.dtype)",
        "base + (b @ a).to(base.dtype)",
        "tests/test_checkpoint_forms.py",
    ),
)

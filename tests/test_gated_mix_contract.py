"""What holds of the gated mix as an op: opcheck, torch.compile, CUDA graphs, bad input."""

from __future__ import annotations

import pytest
import torch
from common import some_plan, to_device
from torch import Tensor

from flexmore_kernels import ops
from flexmore_kernels.ragged import packed_size
from flexmore_kernels.testing import assert_same

RANKS = (2, 0, 3, 1), (0, 4, 1, 1)


def make_inputs(tokens: int, width: int, device: str) -> dict:
    """The arguments but the plan, by name; the tensors are leaves."""
    options = {"device": device, "requires_grad": True}
    inputs = {name: torch.randn(tokens, width, **options) for name in ("gate", "up")}
    inputs["weights"] = torch.rand(tokens, 3, **options)
    for side, ranks in zip(("gate", "up"), RANKS, strict=True):
        inputs[f"z_{side}"] = torch.randn(packed_size(ranks, tokens, 3), **options)
        inputs[f"b_{side}"] = torch.randn(width, sum(ranks), **options)
        inputs[f"ranks_{side}"] = ranks
    return inputs


def test_opcheck(device, kernels):
    plan, flexmore = some_plan(device), torch.ops.flexmore
    given = make_inputs(6, 5, device)
    base = [given.pop(name) for name in ("gate", "up", "weights")]
    args = (*base, plan.indices, *plan[1:6], *given.values())
    torch.library.opcheck(flexmore.gated_mix.default, args)
    fixed = [a.detach() if isinstance(a, Tensor) else a for a in args]
    cotangents = torch.randn(6, 5, device=device), torch.randn(18, 5, device=device)
    torch.library.opcheck(flexmore.gated_mix_backward.default, (*cotangents, *fixed))


def test_compiles_without_a_break(device, kernels):
    def step(indices, inputs):
        return ops.gated_mix(plan=ops.make_plan(indices, 4), **inputs)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens in (3, 4, 9):
        indices = torch.rand(tokens, 4).argsort(1)[:, :3].to(device)
        inputs, results = make_inputs(tokens, 5, device), []
        leaves = [value for value in inputs.values() if isinstance(value, Tensor)]
        for function in (step, compiled):
            mixed, rows = function(indices, inputs)
            loss = mixed.square().sum() + rows.sin().sum()
            results.append((mixed, rows, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(*results, strict=True):
            assert_same(a, b)


def test_captured_in_a_cuda_graph(device, kernels):
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    plan, inputs = some_plan(device), make_inputs(6, 64, device)
    inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    ops.gated_mix(plan=plan, **inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.gated_mix(plan=plan, **inputs)
    inputs["gate"].copy_(torch.randn(6, 64))
    graph.replay()
    for a, b in zip(captured, ops.gated_mix(plan=plan, **inputs), strict=True):
        assert_same(a, b)


BAD_INPUT = {
    "gate_not_a_tensor": (TypeError, "gate", {"gate": [1.0]}),
    "gate_of_ints": (TypeError, "gate", {"gate": torch.zeros(6, 5).long()}),
    "gate_of_rows": (ValueError, "gate", {"gate": torch.zeros(18, 5)}),
    "up_of_another_width": (ValueError, "up", {"up": torch.zeros(6, 4)}),
    "up_of_another_dtype": (TypeError, "up", {"up": torch.zeros(6, 5).double()}),
    "up_elsewhere": (ValueError, "up", {"up": torch.zeros(6, 5, device="meta")}),
    "weights_of_rows": (ValueError, "weights", {"weights": torch.zeros(18)}),
    "weights_too_narrow": (TypeError, "weights", {"weights": torch.zeros(6, 3).half()}),
    "z_gate_too_short": (ValueError, "z_gate", {"z_gate": torch.zeros(3)}),
    "z_up_of_another_dtype": (TypeError, "z_up", {"z_up": torch.zeros(36).double()}),
    "b_gate_transposed": (ValueError, "b_gate", {"b_gate": torch.zeros(6, 5)}),
    "b_up_of_too_few_ranks": (ValueError, "b_up", {"b_up": torch.zeros(5, 5)}),
    "ranks_gate_too_few": (ValueError, "ranks_gate", {"ranks_gate": (2, 0, 4)}),
    "ranks_up_negative": (ValueError, "ranks_up", {"ranks_up": (0, 4, -1, 3)}),
    "ranks_up_fractional": (TypeError, "ranks_up", {"ranks_up": (0, 4.5, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_names_the_argument(bad, device):
    error, message, change = bad
    change = {name: to_device(value, device) for name, value in change.items()}
    with pytest.raises(error, match=message):
        ops.gated_mix(plan=some_plan(device), **make_inputs(6, 5, device) | change)

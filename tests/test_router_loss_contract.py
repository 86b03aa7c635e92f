"""What holds of the router losses and counters as functions: no sync (the meta device has no values
to wait for), torch.compile, CUDA graphs, equal bits, bad input.
"""

from __future__ import annotations

import pytest
import torch
from common import to_device

import flexmore_kernels as fk
from flexmore_kernels import ops
from flexmore_kernels.testing import assert_same


def step(logits, ids, weights, bias, mask, real):
    """Everything there is, and the gradient."""
    given = {"bias": bias, "mask": mask, "padding_mask": real}
    loss = ops.load_balancing_loss([logits] * 2, [ids] * 2, **(given | {"bias": [bias, None]}))
    loss = loss + ops.load_balancing_loss(logits, ids, form="olmo_core", scoring="sigmoid", **given)
    loss = loss + ops.router_z_loss(logits, **given)
    found = ops.router_statistics(logits, ids, weights, **given)
    return loss, *found, found.router_entropy, found.load_entropy


def inputs(tokens: int, device: str):
    logits = torch.randn(tokens, 5, device=device, requires_grad=True)
    bias = torch.randn(4, device=device, requires_grad=True)
    mask = torch.rand(tokens, 5, device=device) < 0.8
    ids = torch.rand(tokens, 5, device=device).argsort(1)[:, :2].contiguous()
    real = torch.rand(tokens, device=device) < 0.8
    return logits, ids, torch.rand(tokens, 2, device=device), bias, mask, real


def test_never_waits_for_the_device():
    """Tensors without values: whatever asked for one would raise."""
    given = inputs(9, "meta")
    loss, *_ = step(*given)
    grads = torch.autograd.grad(loss, (given[0], given[3]))
    assert loss.shape == () and [g.shape for g in grads] == [(9, 5), (4,)]


def test_compiles_without_a_break(device):
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 4, 9):
        given = inputs(tokens, device)
        want, got = step(*given), compiled(*given)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        a, b = (torch.autograd.grad(out[0], (given[0], given[3])) for out in (got, want))
        torch.testing.assert_close(a, b)


def test_same_bits_every_time(device):
    given = inputs(300, device)
    first, again = step(*given), step(*given)
    grads = [torch.autograd.grad(out[0], (given[0], given[3])) for out in (first, again)]
    for a, b in zip((*first, *grads[0]), (*again, *grads[1]), strict=True):
        assert_same(a, b)


def test_captured_in_a_cuda_graph(device):
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    given = [t.detach() for t in inputs(70, device)]
    totals = fk.RouterStatistics.zeros(5, device)

    def run():
        found = step(*given)
        totals.add_(ops.router_statistics(*given[:3]))
        return found

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    given[0].copy_(torch.randn(70, 5))
    totals.zero_()
    for _ in range(3):
        graph.replay()
    for a, b in zip(captured, step(*given), strict=True):
        assert_same(a, b)
    assert totals.tokens == 210


LOGITS, IDS = torch.zeros(3, 4), torch.zeros(3, 2).long()
BAD = {
    "logits_of_ints": (TypeError, "logits", {"logits": LOGITS.long()}),
    "logits_a_number": (TypeError, "logits: got float", {"logits": 1.0}),
    "no_layers": (TypeError, "logits: got list", {"logits": [], "indices": []}),
    "logits_without_experts": (ValueError, "logits", {"logits": torch.zeros(3, 0)}),
    "logits_scalar": (ValueError, "logits", {"logits": torch.zeros(())}),
    "layers_of_two_shapes": (ValueError, r"logits\[1\]",
                             {"logits": [LOGITS, LOGITS[:2]], "indices": [IDS, IDS[:2]]}),
    "layers_of_two_dtypes": (TypeError, r"logits\[1\]",
                             {"logits": [LOGITS, LOGITS.double()], "indices": [IDS, IDS]}),
    "indices_of_one_layer": (ValueError, "indices: got 1 entries; accepted: a sequence of 2",
                             {"logits": [LOGITS, LOGITS], "indices": [IDS]}),
    "indices_not_a_sequence": (ValueError, "indices: got Tensor",
                               {"logits": [LOGITS, LOGITS], "indices": IDS}),
    "indices_of_floats": (TypeError, "indices", {"indices": IDS.float()}),
    "indices_of_other_tokens": (ValueError, "indices", {"indices": IDS[:2]}),
    "no_slots": (ValueError, "indices: got no slots", {"indices": IDS[:, :0]}),
    "form": (ValueError, "form: got 'hf'; accepted: 'huggingface', 'olmo_core'", {"form": "hf"}),
    "scoring": (ValueError, "scoring: got 'relu'", {"scoring": "relu"}),
    "bias_too_long": (ValueError, "bias", {"bias": torch.zeros(4)}),
    "bias_of_ints": (TypeError, "bias", {"bias": torch.zeros(3).long()}),
    "bias_not_a_sequence": (ValueError, "bias: got Tensor",
                            {"logits": [LOGITS], "indices": [IDS], "bias": torch.zeros(3)}),
    "mask_of_floats": (TypeError, "mask", {"mask": torch.ones(4)}),
    "mask_misshapen": (ValueError, "mask", {"mask": torch.ones(2, 4).bool()}),
    "mask_elsewhere": (ValueError, "mask",
                       {"mask": torch.ones(4, dtype=torch.bool, device="meta")}),
    "padding_of_ints": (TypeError, "padding_mask", {"padding_mask": torch.ones(3).long()}),
    "padding_misshapen": (ValueError, "padding_mask: got shape \\(2,\\)",
                          {"padding_mask": torch.ones(2).bool()}),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(bad, device):
    error, message, change = bad
    given = {name: to_device(value, device)
             for name, value in ({"logits": LOGITS, "indices": IDS} | change).items()}  # fmt: skip
    with pytest.raises(error, match=f"^{message}"):
        ops.load_balancing_loss(**given)
    others = {"form", "scoring", "indices"}
    if not others & change.keys():
        given = {name: value for name, value in given.items() if name not in others}
        with pytest.raises(error, match=f"^{message}"):
            ops.router_z_loss(**given)


def test_weights_fit_the_ids(device):
    logits, ids = LOGITS.to(device), IDS.to(device)
    for error, weights in ((ValueError, torch.ones(3, 1)), (TypeError, torch.ones(3, 2).half())):
        with pytest.raises(error, match="^weights"):
            ops.router_statistics(logits, ids, weights.to(device))
    with pytest.raises(ValueError, match="^scoring"):
        ops.router_statistics(logits, ids, scoring="top")
    with pytest.raises(TypeError, match="^logits"):
        ops.router_statistics([logits], ids)

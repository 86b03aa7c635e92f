"""What a layer keeps between forward and backward, and what it computes again instead.

Traps covered: a storage that is kept twice counts once, parameters do not count, small batches
(whose forward without a gradient goes another way), masks, stacked factors, autocast.
"""

from __future__ import annotations

import pytest
import torch

import flexmore_kernels as fk
from flexmore_kernels import backend
from flexmore_kernels.projection import RANK_MULTIPLE
from flexmore_kernels.testing import assert_same, saved_bytes

RANKS = {
    "low_rank": [0, 4, 8, 3],
    "mixed": [0, 4, 0, (2, "full", 3)],
    "full": [0, 0, 0, 0],
}


def make(ranks, stacked=False, device="cpu", dtype=torch.float32):
    layer = fk.FlexMoRE(32, 48, ranks, 2, stacked_factors=stacked, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * max(parameter.shape[-1], 1) ** -0.5)
    return layer


def keeps_more(device) -> bool:
    """Whether the kernels are those that keep more than x, G and U."""
    return backend.chosen("experts", device) == "triton"


def run(layer, x, **options):
    """y and all gradients."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x, **options)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("tokens", (1, 40, 200))
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_recomputed_gradients_are_the_same_bits(ranks, tokens, device, kernels):
    layer, x = make(ranks, device=device), torch.randn(tokens, 32, device=device)
    kept = run(layer, x)
    layer.recompute = True
    for one, other in zip(run(layer, x), kept, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("stacked", (False, True))
def test_with_a_mask_and_under_autocast(stacked, device):
    layer, x = make(RANKS["low_rank"], stacked, device), torch.randn(9, 32, device=device)
    mask = torch.tensor([True, False, True, True], device=device)
    for enabled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            layer.recompute = False
            kept = run(layer, x, expert_mask=mask)
            layer.recompute = True
            for one, other in zip(run(layer, x, expert_mask=mask), kept, strict=True):
                assert_same(one, other)


@pytest.mark.parametrize("top_k", (1, 4))
def test_what_is_kept_does_not_depend_on_top_k(top_k, device, kernels):
    """x, G and U, of a unit of rank a number, of each slot an id and a weight; with `recompute`
    x and what down's factors need."""
    T, D, F, E = 300, 32, 48, 4
    rank = 3 * RANK_MULTIPLE if keeps_more(device) else 0
    layer, x = make(RANKS["low_rank"], device=device), torch.randn(T, D, device=device)
    layer.top_k = top_k
    layer.get_parameter("experts.0.down_proj.weight").requires_grad_(False)
    slots = T * top_k * (8 + 4)
    for recompute, width in ((False, D + 2 * F + 3 * rank), (True, D + rank)):
        layer.recompute = recompute
        kept = saved_bytes(lambda: layer(x.requires_grad_()), layer.parameters())
        exact = 4 * T * width + slots
        assert exact <= kept <= exact + 4 * T * E + slots


@pytest.mark.parametrize("top_k", (1, 3))
def test_full_size_experts_keep_their_rows_unless_recomputed(top_k, device, kernels):
    layer, x = make(RANKS["full"], device=device), torch.randn(300, 32, device=device)
    layer.top_k = top_k
    rows = 2 * 4 * 300 * top_k * 48 if keeps_more(device) else 0
    for recompute in (False, True):
        layer.recompute = recompute
        kept = saved_bytes(lambda: layer(x.requires_grad_()), layer.parameters())
        least = 300 * 4 * 32 + (0 if recompute else rows)
        assert least <= kept <= least + 300 * (4 * 4 + 2 * top_k * 12)


def test_what_only_trained_down_matrices_need(device, kernels):
    """The hidden sum for the base's, columns of ranks for factors B."""
    layer, x = make(RANKS["low_rank"], device=device), torch.randn(300, 32, device=device)
    layer.requires_grad_(False)

    def kept() -> int:
        return saved_bytes(lambda: layer(x.requires_grad_()), layer.parameters())

    least = kept()
    widths = {"0.down_proj.weight": 48, "1.down_proj_b.weight": 3 * RANK_MULTIPLE}
    for name, parameter in layer.experts.named_parameters():
        if name.startswith(("0.", "1.")):
            parameter.requires_grad_(True)
            width = widths.get(name, 0) if keeps_more(device) else 0
            assert kept() == least + 4 * 300 * width, name
            parameter.requires_grad_(False)


@pytest.mark.parametrize("tokens", (40, 600))
def test_a_gradient_keeps_no_other_s_memory(tokens, device, kernels):
    """Of one trained expert beside larger ones; gate's and up's may be one product."""
    layer, x = make([0, 16, 30, 32], device=device), torch.randn(tokens, 32, device=device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith("experts.1."))
    layer(x.requires_grad_()).sum().backward()
    grads = [p.grad for p in layer.parameters() if p.requires_grad]
    assert len(grads) == 6
    for grad in grads:
        assert grad.untyped_storage().nbytes() <= 2 * grad.nbytes


def test_a_compiled_layer_recomputes_too(device):
    layer, x = make(RANKS["low_rank"], device=device), torch.randn(12, 32, device=device)
    layer.recompute = True
    expected = run(layer, x)
    layer.compile(fullgraph=True, backend="aot_eager")
    for one, other in zip(run(layer, x), expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("value", (None, 1, "yes"))
def test_bad_switches(value):
    with pytest.raises((TypeError, ValueError), match="^recompute: got"):
        fk.FlexMoRE(8, 16, [0, 2], 1, recompute=value)
    x, indices, weights = torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    layer = fk.FlexMoRE(8, 16, [0, 2], 1)
    sides = layer._expert_weights(x)
    with pytest.raises((TypeError, ValueError), match="^recompute: got"):
        fk.ops.experts(x, indices, weights, *sides, recompute=value)

"""torch.compile(mode="reduce-overhead"): CUDA graphs that torch makes of the layer.

While it warms one up, all that is allocated belongs to the graph: what a layer keeps across calls
must not be among it.
"""

from __future__ import annotations

import pytest
import torch

import flexmore_kernels as fk
from flexmore_kernels import ragged
from flexmore_kernels.testing import assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

LAYERS = {
    "low_rank": ((0, 16, 7, 64, 8), 700),
    "few_tokens": ((0, 16, 5, 64, 11), 8),
    "large_ranks": ((0, 16, 70, 256, 3), 1100),
    "full_size": ((0, 16, 0, 40, 0), 600),
    "many_experts": ((0,) + (9,) * 20, 500),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def case(request):
    ranks, tokens = request.param
    torch._dynamo.reset()
    ragged.device_constant.cache_clear()  # what a layer keeps is made while a graph is warmed up
    layer = fk.FlexMoRE(512, 776, ranks, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(3, tokens, 512, device="cuda", dtype=torch.bfloat16)
    yield layer, torch.compile(layer, mode="reduce-overhead"), x
    torch._dynamo.reset()


@torch.no_grad()
def test_forward_is_the_layer_s(case):
    layer, compiled, xs = case
    for x in (*xs, *xs):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(compiled(x).clone(), layer(x))


def test_gradients_are_the_layer_s(case):
    layer, compiled, xs = case
    for x in (*xs, *xs):
        torch.compiler.cudagraph_mark_step_begin()
        x.requires_grad_()
        dy = torch.randn_like(x)
        wanted = (x, layer.gate.weight, *layer.experts[1].parameters())
        mine = [grad.clone() for grad in torch.autograd.grad(compiled(x), wanted, dy)]
        others = torch.autograd.grad(layer(x), wanted, dy)
        # What the router has a part in, torch's compiler sums in an order of its own: to either's
        # rounding, half of eps.
        for got, want in zip(mine[:2], others[:2], strict=True):
            apart = (got.double() - want.double()).abs().max()
            assert apart <= torch.finfo(x.dtype).eps * want.abs().max()
        for got, want in zip(mine[2:], others[2:], strict=True):
            assert_same(got, want)

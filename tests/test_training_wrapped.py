"""A step of training under what users wrap around it: autocast, wide factors and gradients,
torch.compile, activation checkpointing, gradient scaling, FSDP2.

Traps covered: gradients of 16 bits added up in 16 bits; a scaled loss that overflows; a
checkpoint's second forward that is not the first; shards of which some are frozen.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_training import STEPS, a_layer, assert_right, backward, batch
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from flexmore_kernels.testing import assert_same
from tests.processes import in_two_processes


def narrow(layer):
    """The same numbers in bfloat16, and a layer of its own dtype that holds just these."""
    layer.bfloat16()
    return layer, copy.deepcopy(layer).float()


@pytest.mark.parametrize("name", ["factors_and_router", "pair_full_size", "base_too", "recompute"])
def test_autocast_is_the_narrow_layer(name, device):
    layer, wider = narrow(a_layer(STEPS[name], device, torch.float32))
    x, dy = batch(layer)

    def call(x):
        with torch.autocast(device, torch.bfloat16):
            return wider(x)

    found, expected = backward(wider, x.float(), dy, call), backward(layer, x, dy)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_same(found[key], value if key == "y" else value.float(), name=key)


def test_float32_factors_beside_a_bfloat16_base(device):
    """Their gradients are the narrow ones, and a step too small for bfloat16 changes them."""
    layer, wider = narrow(a_layer(device=device, dtype=torch.float32))
    for key, parameter in wider.named_parameters():
        if key.endswith("_proj.weight"):
            parameter.data = parameter.data.bfloat16()
    x, dy = batch(layer)
    found, expected = backward(wider, x, dy), backward(layer, x, dy)
    for key, value in expected.items():
        assert_same(found[key], value if key in ("x", "y") else value.float(), name=key)
    for model in (layer, wider):
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0).step()
        changed = [(p != before[key]).float().mean().item() for key, p in model.named_parameters()
                   if p.grad is not None]  # fmt: skip
        assert (min(changed) > 0.9) is (model is wider)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch without grad_dtype")
def test_narrow_weights_with_wide_gradients(device):
    layer = a_layer(device=device, dtype=torch.bfloat16)
    trained = {key: p for key, p in layer.named_parameters() if p.requires_grad}
    parts = [batch(layer, tokens) for tokens in (40, 1, 30)]
    alone = [backward(layer, *part) for part in parts]
    layer.zero_grad(set_to_none=True)
    for parameter in trained.values():
        parameter.grad_dtype = torch.float32
    for x, dy in parts:
        layer(x).backward(dy)
    for key, parameter in trained.items():
        total = alone[0][key].float()
        for one in alone[1:]:
            total = total + one[key].float()
        assert_same(parameter.grad, total, name=key)


@pytest.mark.parametrize("name", ["factors_and_router", "one_expert", "base_too", "recompute"])
def test_a_compiled_step(name, device):
    layer = a_layer(STEPS[name], device, torch.float32)
    x, dy = batch(layer)
    expected = backward(layer, x, dy)
    torch._dynamo.reset()
    found = backward(layer, x, dy, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_same(found[key], value, name=key)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["factors_and_router", "one_expert", "base_too", "recompute"])
def test_activation_checkpointing(name, reentrant, device):
    layer = a_layer(STEPS[name], device, torch.bfloat16)
    x, dy = batch(layer)
    expected = backward(layer, x, dy)
    if reentrant:  # whose first forward is one without a gradient: of few tokens by other kernels
        with torch.no_grad():
            expected["y"] = layer(x)
    found = backward(layer, x, dy, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_same(found[key], value, name=key)


def test_gradient_scaling(device):
    """A loss scaled by a power of two gives the gradients of one that is not, but for what float16
    cannot hold; one that overflows makes no step and halves the scale."""
    layer = a_layer(device=device, dtype=torch.float32)
    x, dy = batch(layer)
    trained = {key: p for key, p in layer.named_parameters() if p.requires_grad}

    def call(x):
        with torch.autocast(device, torch.float16):
            return layer(x)

    expected = backward(layer, x, dy, call)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    optimizer = torch.optim.AdamW(trained.values())
    layer.zero_grad()
    scaler.scale((call(x).float() * dy).sum()).backward()
    scaler.unscale_(optimizer)
    for key, parameter in trained.items():
        apart = (parameter.grad - expected[key]).abs().max()
        assert apart <= 2**-11 * expected[key].abs().max(), key
    scaler.step(optimizer)
    scaler.update()
    before = {key: p.detach().clone() for key, p in trained.items()}
    optimizer.zero_grad()
    scaler.scale((call(x).float() * dy * 2.0**18).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    for key, parameter in trained.items():
        assert_same(parameter.detach(), before[key], name=key)


def shards(name: str, **options):
    """A layer, the same one sharded, and a batch, of which each process has its half."""
    torch.manual_seed(0)
    layer = a_layer(STEPS[name], dtype=torch.float64 if not options else torch.float32)
    x, dy = batch(layer)
    sharded = copy.deepcopy(layer)
    fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)), **options)
    assert isinstance(sharded, FSDPModule)
    return layer, sharded, x, dy


def step_of_shards(rank: int, name: str) -> None:
    layer, sharded, x, dy = shards(name)
    own = slice(rank * 20, rank * 20 + 20)
    found = backward(sharded, x[own], dy[own])
    trained = {key for key, parameter in layer.named_parameters() if parameter.requires_grad}
    assert found.keys() - {"x", "y"} == trained
    assert_right({key: found.pop(key) for key in ("x", "y")}, layer, x[own], dy[own])
    for key, grad in found.items():  # FSDP averages what one process adds up
        assert grad.to_local().numel() < grad.numel(), key
        found[key] = grad.full_tensor() * 2
    assert_right(found, layer, x, dy)


def narrow_step_of_shards(rank: int, name: str) -> None:
    """Weights gathered in bfloat16, float32 shards and sums."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    layer, sharded, x, dy = shards(name, mp_policy=policy)
    halves = list(zip(x.split(20), dy.split(20), strict=True))
    found = backward(sharded, *halves[rank])
    layer.bfloat16()
    one, two = (backward(layer, x.bfloat16(), dy.bfloat16()) for x, dy in halves)
    for key in [key for key in one if key not in ("x", "y")]:  # in the same order in both
        assert_same(found[key].full_tensor(), (one[key].float() + two[key].float()) / 2, name=key)


def both_steps_of_shards(rank: int) -> None:
    for name in ("one_expert", "pair_full_size", "base_too", "recompute"):
        step_of_shards(rank, name)
        narrow_step_of_shards(rank, name)


@pytest.mark.slow
def test_two_processes_of_fsdp2_are_one_layer():
    in_two_processes(both_steps_of_shards)

"""Where the weights live: every way of changing them is seen by the next forward.

Traps covered: fused and foreach optimizers, `.data` and `assign=True` (new storage behind an old
name), FSDP2 (parameters that are swapped around each forward), CUDA graphs, copies and moves, the
meta device, and stacked factors under the same state_dict keys, with faults in what is loaded.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import distributed

import flexmore_kernels as fk
import reference
from flexmore_kernels import testing
from flexmore_kernels.storage import Experts, StackedExperts

RANKS = (0, 3, (2, 0, "full"), 0, (0, 0, 0), 1)
SIZES = (16, 24, RANKS, 3)


def make(stacked=False, device="cpu", sizes=SIZES, **options):
    layer = fk.FlexMoRE(*sizes, device=device, stacked_factors=stacked, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return layer


def assert_seen(layer, x, before=None):
    """The forward is, to the bit, that of a new layer with these weights, and not what it was."""
    stacked = isinstance(layer.experts, StackedExperts)
    new = fk.FlexMoRE(*SIZES, device=x.device, dtype=x.dtype, stacked_factors=stacked)
    new.load_state_dict(layer.state_dict())
    testing.assert_same(layer(x), new(x))
    assert before is None or not torch.allclose(layer(x), before)


stacked_or_apart = pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])


@stacked_or_apart
@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_storage_optimizer_step(kind, stacked, device):
    layer = make(stacked, device)
    x = testing.make_x(20, 16, device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **{kind: True})
    for _ in range(2):
        before = layer(x)
        before.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_seen(layer, x, before)


@stacked_or_apart
def test_storage_data_is_written(stacked, device, kernels):
    layer = make(stacked, device)
    x = testing.make_x(20, 16, device)
    before = layer(x)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape))
    assert_seen(layer, x, before)
    before = layer(x)
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter)
    assert_seen(layer, x, before)


@stacked_or_apart
@pytest.mark.parametrize("assign", [False, True])
def test_storage_load_state_dict(assign, stacked, device):
    layer, other = make(stacked, device), make(not stacked, device)
    layer.experts.requires_grad_(False)
    x = testing.make_x(20, 16, device)
    before = layer(x)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert_seen(layer, x, before)
    for name, tensor in other.state_dict().items():
        testing.assert_same(layer.state_dict()[name], tensor, name)
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in layer.named_parameters() if n.startswith("experts.")}


def fsdp(rank, path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for stacked in (False, True):
        torch.manual_seed(0)
        plain, x = make(stacked), testing.make_x(12, 16)
        mine = slice(6 * rank, 6 * rank + 6)
        sharded = fully_shard(copy.deepcopy(plain), mesh=mesh)
        layers = (plain, sharded)
        steps = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]
        before = plain(x)
        for _ in range(2):
            # FSDP2 averages over the two processes, each of which has half the tokens.
            plain(x).square().mean().backward()
            sharded(x[mine]).square().mean().backward()
            for step in steps:
                step.step()
                step.zero_grad()
            torch.testing.assert_close(sharded(x[mine]), plain(x)[mine])
        assert not torch.allclose(sharded(x[mine]), before[mine])
    distributed.destroy_process_group()


def test_storage_fsdp2(tmp_path):
    mp.spawn(fsdp, (tmp_path / "rendezvous",), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@stacked_or_apart
def test_storage_cuda_graph_sees_new_weights(stacked):
    layer, x = make(stacked, "cuda"), testing.make_x(20, 16, "cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for parameter in layer.parameters():
            parameter.mul_(1.1)
        graph.replay()
        testing.assert_same(y, layer(x))


@stacked_or_apart
def test_storage_keeps_nothing_between_calls(stacked):
    layer, x = make(stacked), testing.make_x(20, 16)
    size = len(pickle.dumps(layer))
    layer(x, return_routing=True)[0].sum().backward()
    layer.zero_grad()
    assert len(pickle.dumps(layer)) == size


@stacked_or_apart
def test_storage_copies_and_moves(stacked, device):
    layer, x = make(stacked), testing.make_x(20, 16)
    y = layer(x)
    twin = copy.deepcopy(layer)
    testing.assert_same(twin(x), y)
    for parameter in twin.parameters():
        parameter.data.zero_()
    testing.assert_same(layer(x), y)
    testing.assert_same(pickle.loads(pickle.dumps(layer))(x), y)
    assert_seen(layer.to(device), x.to(device))
    assert {p.dtype for p in layer.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert layer(x.to(device, torch.bfloat16)).dtype == torch.bfloat16
    testing.assert_same(layer.to("cpu", torch.float64)(x.double()), layer(x.double()))


@stacked_or_apart
def test_storage_meta_device(stacked, device):
    layer = fk.FlexMoRE(*SIZES, stacked_factors=stacked, expert_bias=True, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(torch.empty(3, 5, 16, device="meta")).shape == (3, 5, 16)
    layer.to_empty(device=device).reset_parameters()
    state = layer.state_dict()
    assert all((t == 0).all() == name.endswith(("_b.weight", "bias")) for name, t in state.items())
    loaded = fk.FlexMoRE(*SIZES, stacked_factors=stacked, expert_bias=True, device="meta")
    loaded.load_state_dict(state, assign=True)
    x = testing.make_x(9, 16, device)
    testing.assert_same(loaded(x), layer(x))


def test_storage_keys_are_the_checkpoints():
    layer = make(expert_bias=True)
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    experts = {f"experts.{e}.{p}_proj.weight": (24, 16) for e in (0, 3) for p in ("gate", "up")}
    for e, rank, projections in ((1, 3, ("gate", "up")), (2, 2, ("gate",)), (5, 1, ("gate", "up"))):
        experts |= {f"experts.{e}.{p}_proj_a.weight": (rank, 16) for p in projections}
        experts |= {f"experts.{e}.{p}_proj_b.weight": (24, rank) for p in projections}
    for e, rank in ((1, 3), (5, 1)):
        experts[f"experts.{e}.down_proj_a.weight"] = (rank, 24)
        experts[f"experts.{e}.down_proj_b.weight"] = (16, rank)
    experts |= {f"experts.{e}.down_proj.weight": (16, 24) for e in (0, 2, 3)}
    assert shapes == experts | {"gate.weight": (6, 16), "gate.expert_bias": (5,)}
    assert {name for name, _ in layer.named_parameters()} == shapes.keys()
    assert all(p.is_contiguous() and type(p) is torch.nn.Parameter for p in layer.parameters())
    assert {
        n: tuple(t.shape) for n, t in make(True, expert_bias=True).state_dict().items()
    } == shapes


@pytest.mark.parametrize("save_stacked", [False, True])
@pytest.mark.parametrize("load_stacked", [False, True])
def test_storage_safetensors_round_trip(save_stacked, load_stacked, tmp_path):
    saved, loaded = make(save_stacked), make(load_stacked)
    save_file(saved.state_dict(), tmp_path / "layer.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    for name, tensor in saved.state_dict().items():
        testing.assert_same(loaded.state_dict()[name], tensor, name)


def test_storage_of_many_experts():
    sizes = (8, 12, (0, *((e % 3) + 1 for e in range(70))), 4)
    layer, apart = fk.FlexMoRE(*sizes), make(sizes=sizes)
    assert isinstance(layer.experts, StackedExperts) and isinstance(apart.experts, Experts)
    assert len(list(layer.experts.parameters())) == 9
    layer.load_state_dict(apart.state_dict())
    plain = reference.FlexMoRE(*sizes)
    plain.load_state_dict(layer.state_dict())
    x = testing.make_x(30, 8)
    same = plain(x).detach()
    testing.assert_accurate(layer(x), plain.double()(x.double()).detach(), same)


@pytest.mark.parametrize("assign", [False, True])
def test_storage_faults_of_stacked_factors_are_named(assign):
    layer = make(True)
    state = layer.state_dict()
    del state["experts.1.up_proj_a.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"experts.1.up_proj_a.weight"'):
        layer.load_state_dict(state, assign=assign)
    missing, unexpected = layer.load_state_dict(
        {"experts.1.up_proj_a.weight": torch.ones(3, 16)}, strict=False
    )
    assert "experts.1.up_proj_a.weight" not in missing and "experts.1.up_proj_b.weight" in missing
    assert len(missing) == len(layer.state_dict()) - 1 and not unexpected
    assert (layer.state_dict()["experts.1.up_proj_a.weight"] == 1).all()
    state = layer.state_dict() | {"experts.4.up_proj_a.weight": torch.ones(3, 16)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"experts.4.up_proj_a.weight"'):
        layer.load_state_dict(state, assign=assign)
    state = layer.state_dict() | {"experts.1.up_proj_a.weight": torch.ones(4, 16)}
    with pytest.raises(RuntimeError, match=r"size mismatch for experts.1.up_proj_a.weight"):
        layer.load_state_dict(state, assign=assign)

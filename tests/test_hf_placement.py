"""Where the weights are: on two GPUs, offloaded, sharded by FSDP2, loaded by a stranger's process.

Traps covered: the children of a block never run their own forward, so their accelerate hooks have
to be run by the block; the decoder layer is not split; sharded gradients are those of one process;
a saved directory loads with `trust_remote_code` where nobody imported flexmore_kernels.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard

from flexmore_kernels import testing
from flexmore_kernels.checkpoint import save_checkpoint
from tests.hf_models import RAGGED, make, make_stock, plain, some_ids
from tests.processes import in_two_processes

transformers = pytest.importorskip("transformers", minversion="5.17")
hf = pytest.importorskip("flexmore_kernels.hf")

ROOT = Path(__file__).parent.parent
# Wide enough for the kernels that need aligned rows and ranks.
WIDE = {"hidden_size": 128, "intermediate_size": 192}
WIDE_RANKS = [0, 16, [32, 0, "full"], 64]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


def test_offloaded_to_the_cpu():
    accelerate = pytest.importorskip("accelerate")
    model, ids = make(RAGGED), some_ids()
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert {p.device.type for p in offloaded.parameters()} == {"meta"}
    testing.assert_same(offloaded(ids).logits, model(ids).logits)
    assert {p.device.type for p in offloaded.parameters()} == {"meta"}
    greedy = {"max_new_tokens": 3, "do_sample": False}
    assert offloaded.generate(ids, **greedy).equal(model.generate(ids, **greedy))
    with pytest.raises(ValueError, match=r"^expert_mask: got shape"):
        offloaded(ids, expert_mask=torch.ones(3, dtype=torch.bool))
    assert {p.device.type for p in offloaded.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["experts.0.gate_proj", "mlp.gate"])
@pytest.mark.parametrize("used", [False, True])
def test_lora_on_what_the_kernels_read_is_refused(name, used):
    """It would have no effect: nobody calls the module that PEFT wraps."""
    peft = pytest.importorskip("peft")
    model, ids = make(), some_ids()
    if used:
        model(ids)
    options = {"r": 2, "target_modules": [], "target_parameters": [f"{name}.weight"]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    with pytest.raises(ValueError, match=f"{name.removeprefix('mlp.')}: got PEFT's ParamWrapper"):
        wrapped(ids)
    assert wrapped.unload()(ids).logits.isfinite().all()


def test_device_map_with_a_layer_on_disk(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = make(RAGGED), some_ids()
    model.save_pretrained(tmp_path / "saved")
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    found = hf.FlexMoREForCausalLM.from_pretrained(
        tmp_path / "saved",
        device_map=dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    places = {n.split(".")[2]: p.device.type for n, p in found.named_parameters() if "experts" in n}
    assert places == {"0": "cpu", "1": "meta"}
    # Not the same bits: weights in a file's mapped memory lie at other alignments.
    torch.testing.assert_close(found(ids).logits, model(ids).logits)


def test_an_automatic_device_map_keeps_layers_whole():
    accelerate = pytest.importorskip("accelerate")
    config = make().config
    with torch.device("meta"):
        model = hf.FlexMoREForCausalLM(config)
    sizes = accelerate.utils.compute_module_sizes(model)
    layer = sizes["model.layers.0"]
    found = set()
    for room in range(layer, sizes[""], layer // 8):
        places = accelerate.infer_auto_device_map(
            model, {"cpu": room}, no_split_module_classes=list(model._no_split_modules)
        )
        if len(set(places.values())) > 1:
            found |= {name for name in places if name.startswith("model.layers")}
    assert {"model.layers.0", "model.layers.1"} <= found
    assert all(name.count(".") <= 2 for name in found)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_device_map_over_two_gpus(dtype, tmp_path):
    pytest.importorskip("accelerate")
    model, ids = make(WIDE_RANKS, **WIDE).to(dtype), some_ids()
    model.save_pretrained(tmp_path)
    first = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), 0)
    both = first | dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), 1)
    load = functools.partial(hf.FlexMoREForCausalLM.from_pretrained, tmp_path, dtype=dtype)
    one, two = load(device_map={"": 0}), load(device_map=both)
    places = {n.split(".")[2]: p.device.index for n, p in two.named_parameters() if "experts" in n}
    assert places == {"0": 0, "1": 1}
    mask = torch.tensor([[True] * 4, [True, False, True, True]])
    for options in ({}, {"expert_mask": mask.cuda(0)}):
        with torch.no_grad(), torch.cuda.device(0):
            alone, found = (each(ids.cuda(0), **options).logits.cpu() for each in (one, two))
            assert torch.cuda.current_device() == 0
        truth = plain(model)(ids, **{name: given.cpu() for name, given in options.items()})
        testing.assert_accurate(found, truth.detach(), alone)
        tokens = [
            each.generate(ids.cuda(0), max_new_tokens=4, do_sample=False, **options)
            for each in (one, two)
        ]
        assert tokens[1].equal(tokens[0])


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_a_layer_on_another_gpu_than_the_current_one(tokens, dtype):
    """A kernel launched on the current device, or on its stream, could not read the tensors."""
    block = make(WIDE_RANKS, **WIDE).to(dtype).model.layers[0].mlp
    x, dy = torch.randn(2, tokens, 128, dtype=dtype)
    found = []
    for device in ("cuda:0", "cuda:1"):
        own, x_own = copy.deepcopy(block).to(device), x.to(device)
        with torch.cuda.device(0):
            with torch.no_grad():
                found.append([own(x_own)])  # other kernels than in training
            y = own(x_own.requires_grad_())
            y.backward(dy.to(device))
            assert torch.cuda.current_device() == 0
        found[-1] += [y.detach(), x_own.grad, *(p.grad for p in own.parameters())]
        assert {str(each.device) for each in found[-1]} == {device}
    for one, other in zip(*found, strict=True):
        testing.assert_same(other.cpu(), one.cpu())


def loaded(rank: int, work: Callable, directory: str) -> None:
    work(rank, directory, torch.load(f"{directory}/data.pt"))


def in_two(work: Callable, model, directory: Path) -> None:
    """Save a model, what it and, in float64, the reference give for two requests; then work."""
    model.save_pretrained(directory)
    ids = some_ids()
    dy = torch.randn(*ids.shape, 50)
    data = {"ids": ids, "dy": dy}
    own = type(model) is hf.FlexMoREForCausalLM
    for name, twin in {"one": model, "truth": plain(model)}.items() if own else [("one", model)]:
        logits = twin(ids)
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        logits.backward(dy.to(logits.dtype))
        data[name] = {n: parameter.grad for n, parameter in twin.named_parameters()}
        data[name]["logits"] = logits.detach()
    torch.save(data, directory / "data.pt")
    in_two_processes(loaded, work, str(directory))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(found: torch.Tensor, name: str, data: dict, part: slice = slice(None)) -> None:
    """The accuracy rule by Frobenius norm: sums in another order, whose largest error is luck."""
    truth, one = data["truth"][name][part], data["one"][name][part]
    result = testing.accuracy(whole(found.detach()), truth, one)
    assert result.error_frobenius <= result.allowed_frobenius, (name, result)


def sharded(rank: int, directory: str, data: dict) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = hf.FlexMoREForCausalLM.from_pretrained(directory)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.model.layers[0], FSDPModule)
    own = slice(rank, rank + 1)
    logits = model(data["ids"][own]).logits
    logits.backward(data["dy"][own])
    check(logits, "logits", data, own)
    for name, parameter in model.named_parameters():
        assert parameter.to_local().numel() < parameter.numel() or parameter.shape[0] == 1, name
        check(parameter.grad * 2, name, data)  # FSDP averages what one process adds up


@pytest.mark.slow
def test_two_processes_of_fsdp2_are_one(tmp_path):
    in_two(sharded, make(RAGGED), tmp_path)


def cut(rank: int, directory: str, data: dict) -> None:
    model = hf.FlexMoREForCausalLM.from_pretrained(directory, **parallel("tp_size"))
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape == (16, 32)
    logits = model(data["ids"]).logits
    whole(logits).backward(data["dy"])
    check(logits, "logits", data)
    for name, parameter in model.named_parameters():
        if ".mlp." in name:  # on every rank, whole
            check(parameter.grad, name, data)


def parallel(*names: str) -> dict:
    """Arguments of `from_pretrained` for two processes, in the words of this transformers."""
    from transformers.distributed import DistributedConfig

    if "ep_size" in inspect.signature(DistributedConfig).parameters:
        config = DistributedConfig(**dict.fromkeys(names, 2))
    else:
        expert = "ep_size" in names
        config = DistributedConfig(tp_size=2, tp_plan="auto", enable_expert_parallel=expert)
    return {"distributed_config": config}


@pytest.mark.slow
def test_two_processes_of_tensor_parallel_attention_are_one(tmp_path):
    pytest.importorskip("accelerate")
    in_two(cut, make(RAGGED), tmp_path)


def dispatched(rank: int, directory: str, data: dict) -> None:
    model = transformers.FlexOlmoForCausalLM.from_pretrained(
        directory, experts_implementation="flexmore", **parallel("tp_size", "ep_size")
    ).eval()
    experts = model.model.layers[0].mlp.experts
    assert experts.num_experts == 2 and model.config._experts_implementation == "flexmore"
    with torch.no_grad():
        torch.testing.assert_close(whole(model(data["ids"]).logits), data["one"]["logits"])


@pytest.mark.slow
def test_two_processes_of_stock_expert_parallelism_are_one(tmp_path):
    """Each has two of four experts, and ids of the others' reach our function as sentinels."""
    pytest.importorskip("accelerate")
    in_two(dispatched, make_stock(), tmp_path)


@pytest.mark.slow
def test_a_stranger_loads_it_with_trust_remote_code(tmp_path):
    model, ids = make(RAGGED), some_ids(1, 5)
    model.save_pretrained(tmp_path / "saved")
    save_checkpoint(tmp_path / "written", model.state_dict(), plain(model).config.to_dict())
    program = f"""
import sys, torch, transformers
loader = transformers.AutoModelForCausalLM
assert not any(name.startswith("flexmore") for name in sys.modules)
for directory in {[str(tmp_path / name) for name in ("written", "saved")]!r}:
    model = loader.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__ == "flexmore_kernels.hf.modeling"
    tokens = model.generate(torch.tensor({ids.tolist()}), max_new_tokens=4, do_sample=False)
    print(tokens.tolist())
model.save_pretrained({str(tmp_path / "again")!r})
"""
    cache = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | cache | {"PYTHONPATH": path},
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    assert found.stdout.splitlines() == [str(wanted)] * 2
    files = {each.name for each in (tmp_path / "again").iterdir()}
    assert files == {each.name for each in (tmp_path / "saved").iterdir()}
    loader = (tmp_path / "again" / "modeling_flexmore.py").read_text()
    assert "class " not in loader and "from flexmore_kernels.hf" in loader

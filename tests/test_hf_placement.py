"""Where the weights are: offloaded by accelerate, sharded by FSDP2, loaded by a stranger's process.

Traps covered: the children of a block never run their own forward, so their accelerate hooks have
to be run by the block; the decoder layer is not split; sharded gradients are those of one process;
a saved directory loads with `trust_remote_code` where nobody imported flexmore_kernels.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FSDPModule, fully_shard

from flexmore_kernels import testing
from tests.hf_models import RAGGED, make, some_ids

transformers = pytest.importorskip("transformers", minversion="5.17")
hf = pytest.importorskip("flexmore_kernels.hf")

ROOT = Path(__file__).parent.parent


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
    # Loaded weights lie elsewhere in memory than made ones, and matrix products may then round
    # otherwise; between two loaded models they may not.
    whole = hf.FlexMoREForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(found(ids).logits, whole(ids).logits)


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


def sharded(rank: int, port: int, directory: str) -> None:
    """One of two processes: forward and backward of its half of the batch."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        model = hf.FlexMoREForCausalLM.from_pretrained(directory)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.model.layers[0], FSDPModule)
        data = torch.load(f"{directory}/data.pt")
        logits = model(data["ids"][rank : rank + 1]).logits
        logits.backward(data["dy"][rank : rank + 1])
        torch.testing.assert_close(logits.detach(), data["logits"][rank : rank + 1])
        for name, parameter in model.named_parameters():
            local = parameter.to_local()
            assert local.numel() < parameter.numel() or parameter.shape[0] == 1, name
            # FSDP averages over the processes what one process adds up.
            gathered = parameter.grad.full_tensor() * 2
            torch.testing.assert_close(gathered, data["grads"][name])
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_fsdp2_are_one(tmp_path):
    model, ids = make(RAGGED), some_ids()
    model.save_pretrained(tmp_path)
    dy = torch.randn(*ids.shape, 50)
    logits = model(ids).logits
    logits.backward(dy)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    data = {"ids": ids, "dy": dy, "logits": logits.detach(), "grads": grads}
    torch.save(data, tmp_path / "data.pt")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # finds a free port
    port = store.port
    del store
    mp.start_processes(sharded, (port, str(tmp_path)), nprocs=2, start_method="spawn")


@pytest.mark.slow
def test_a_stranger_loads_it_with_trust_remote_code(tmp_path):
    model, ids = make(RAGGED), some_ids(1, 5)
    model.save_pretrained(tmp_path / "saved")
    program = f"""
import sys, torch, transformers
loader = transformers.AutoModelForCausalLM
assert not any(name.startswith("flexmore") for name in sys.modules)
model = loader.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
assert type(model).__module__ == "flexmore_kernels.hf.modeling"
tokens = model.generate(torch.tensor({ids.tolist()}), max_new_tokens=4, do_sample=False)
model.save_pretrained({str(tmp_path / "again")!r})
print(tokens.tolist())
"""
    cache = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | cache | {"PYTHONPATH": path},
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    assert found.stdout.strip() == str(wanted)
    files = {each.name for each in (tmp_path / "again").iterdir()}
    assert files == {each.name for each in (tmp_path / "saved").iterdir()}
    loader = (tmp_path / "again" / "modeling_flexmore.py").read_text()
    assert "class " not in loader and "from flexmore_kernels.hf" in loader

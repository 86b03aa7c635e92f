"""`flexmore plan` against what is really allocated: saved tensors and live storages, byte by byte.

On the CPU all but the inside of the MoE op is seen; the test for a GPU holds the whole to 5 %.
"""

from __future__ import annotations

import argparse
import json
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flexmore_kernels as fk
from flexmore_kernels import checkpoint, memory_plan
from flexmore_kernels.commands import plan as command
from flexmore_kernels.memory_plan import Use, plan_memory
from flexmore_kernels.memory_workspace import LayerSizes, kept_bytes

RANKS = [0, 4, 8, (0, 2, "full")]
SIZES = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "expert_ranks": RANKS, "num_experts_per_tok": 2}  # fmt: skip
BATCH, TOKENS = 2, 16
FLEXOLMO = fk.FlexMoREConfig(expert_ranks=[0, *[64] * 6])


def make(dtype, train, **change):
    model = fk.FlexMoREForCausalLM(fk.FlexMoREConfig(**SIZES | change), dtype=dtype)
    for name, parameter in model.named_parameters():
        factor = "_proj_a." in name or "_proj_b." in name or ".mlp.gate." in name
        parameter.requires_grad_(train == "all" or factor)
    return model, torch.randint(1000, (BATCH, TOKENS))


def recomputes(model, switch):
    for module in model.modules():
        if isinstance(module, fk.FlexMoRE):
            module.recompute = switch


def kept_on_a_gpu_alone(use):
    """Of the model of `make`, whose forward on a CPU keeps no more than x, G and U."""
    sizes = [SIZES[name] for name in ("hidden_size", "intermediate_size")]
    layer = LayerSizes(*sizes, tuple(RANKS), SIZES["num_experts_per_tok"], use.dtype)
    given = (layer, use.tokens * use.batch, use.train == "all", use.recompute)
    return SIZES["num_hidden_layers"] * (kept_bytes(*given) - kept_bytes(*given, gpu=False))


class Live(TorchDispatchMode):
    """Counts the bytes of storages that ops made and that are still there."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs))
                  if isinstance(t, torch.Tensor)}  # fmt: skip
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), before)
        return out

    def _add(self, storage, before):
        key = storage._cdata
        if key in self.seen or key in before:
            return
        self.seen[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.now -= self.seen.pop(key)


@pytest.mark.parametrize("groups", [4, 2], ids=["heads", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", ["factors", "all"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_saved_bytes_are_exact(recompute, train, dtype, groups):
    model, ids = make(dtype, train, num_key_value_heads=groups)
    recomputes(model, recompute)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), ids)}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids)
    found = sum(nbytes for nbytes, _ in saved.values())
    if train == "all":
        # On a CPU attention's result lies by heads, and the output projection saves a copy of it.
        found -= 3 * BATCH * TOKENS * 64 * dtype.itemsize
    use = Use(TOKENS, BATCH, train=train, dtype=dtype, recompute=recompute)
    assert plan_memory(model.config, use).saved - kept_on_a_gpu_alone(use) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", ["factors", "all"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_peak_of_a_step(recompute, train, dtype):
    """The loss over a vocabulary much larger than D, as of any such model; to three scalars."""
    model, ids = make(dtype, train)
    recomputes(model, recompute)
    ids = ids.repeat(1, 4)
    with Live() as live:
        logits = model(ids)
        F.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
    found = live.peak
    if train == "all":
        found -= 3 * ids.numel() * 64 * dtype.itemsize  # as above
    use = Use(ids.shape[1], BATCH, train=train, dtype=dtype, recompute=recompute)
    planned = plan_memory(model.config, use)
    assert planned.stage == "loss"
    loss = planned.stages["loss"] - kept_on_a_gpu_alone(use)
    assert loss <= found <= loss + 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_of_a_forward(dtype):
    """Logits of all tokens are the most here; the inside of the MoE op is not seen."""
    model, ids = make(dtype, "all")
    with torch.no_grad(), Live() as live:
        model(ids)
    planned = plan_memory(model.config, Use(TOKENS, BATCH, dtype=dtype, all_logits=True))
    assert planned.stages["logits"] == live.peak


def test_weights_are_the_parameters():
    """Sizes known from papers: the sum of ranks 2380 is 10.75 B, all full-size 33.27 B."""
    for ranks, billions in (
        ([0] * 7, "33.271"),
        ([0, 1, 4, 8, 64, 256, 2048], "10.752"),
        ([0, 64, 64, 32, 32, 16, 16], "7.624"),
    ):
        config = fk.FlexMoREConfig(expert_ranks=ranks)
        weights = plan_memory(config, Use(16)).weights / 2
        assert f"{weights / 1e9:.3f}" == billions
    model, _ = make(torch.bfloat16, "all", expert_bias=True, tie_word_embeddings=True)
    total = sum(parameter.nbytes for parameter in model.parameters())
    planned = plan_memory(model.config, Use(16, train="all"))
    assert (planned.weights, planned.gradients, planned.optimizer) == (total, total, 2 * total)
    model, _ = make(torch.bfloat16, "factors")
    total = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert plan_memory(model.config, Use(16, train="factors")).gradients == total


def test_kv_cache_is_the_cache_s():
    config = fk.FlexMoREConfig(**SIZES, num_key_value_heads=2)
    cache = fk.kv_cache.StaticCache(config, BATCH, TOKENS + 5, dtype=torch.bfloat16)
    nbytes = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert plan_memory(config, Use(TOKENS, BATCH, new_tokens=5)).kv_cache == nbytes


def test_recomputing_keeps_no_products():
    """Of all layers G and U are gone, and come back in one at a time."""
    use = Use(4096, 4, train="factors", all_logits=True)
    kept, again = (plan_memory(FLEXOLMO, use._replace(recompute=r)) for r in (False, True))
    products, layers = 4 * 4096 * (2 * 11008 + 2 * 6 * 64) * 2, FLEXOLMO.num_hidden_layers
    assert kept.saved - again.saved == layers * products
    last = f"backward of layer {layers - 1}"
    assert kept.stages[last] - again.stages[last] == (layers - 1) * products
    assert again.stages["backward of layer 0"] == kept.stages["backward of layer 0"]
    on = use._replace(recompute=True)
    for one, room, advised in ((use, again.peak, 1), (use, again.peak - 1, 0), (on, again.peak, 0)):
        found = memory_plan.advice(FLEXOLMO, one, room)
        assert sum(line.startswith("--recompute") for line in found) == advised


def test_advice_fits():
    use = Use(4096, 4, train="all", all_logits=True)
    config = fk.FlexMoREConfig()
    found = memory_plan.advice(config, use, 300 << 30)
    assert any(line.startswith("--train factors") for line in found)
    rank = int(found[-1].split("rank ")[1].split()[0])
    for one, fits in ((rank, True), (rank + 1, False)):
        config = fk.FlexMoREConfig(expert_ranks=[0, *[one] * 6])
        assert (plan_memory(config, use).peak <= 300 << 30) is fits
    assert memory_plan.advice(config, use, 1 << 30) == []
    small = fk.FlexMoREConfig(expert_ranks=[0, 16], num_experts_per_tok=2)
    found = memory_plan.advice(small, use, 23 << 30)
    tokens = int(found[0].removeprefix("--train factors --tokens ").split(":")[0])
    use = use._replace(train="factors", tokens=tokens)
    assert plan_memory(small, use).peak <= 23 << 30
    assert plan_memory(small, use._replace(tokens=tokens + 1)).peak > 23 << 30


def call(*arguments):
    parser = argparse.ArgumentParser()
    command.add(parser)
    return command.run(parser.parse_args([*map(str, arguments)]))


def test_command(tmp_path, capsys):
    checkpoint.make_demo_checkpoint(
        tmp_path / "made", hidden_size=16, intermediate_size=24, num_layers=2, vocab_size=11,
        expert_ranks=(0, 3, (2, 0, "full")), top_k=2,
    )  # fmt: skip
    assert call(tmp_path / "made", "--tokens", 8, "--gpu", "24GB") == 0
    assert "fits 24.00 GB" in capsys.readouterr().out
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "flex_olmo"}))
    options = ("--tokens", 4096, "--gpu", "80 GiB", "--train", "--json", "--no-hopper")
    assert call(path, *options) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["use"]["train"] == "factors" and found["advice"]
    low_rank = tmp_path / "low_rank.json"
    low_rank.write_text(json.dumps(FLEXOLMO.to_dict()))
    call(low_rank, "--tokens", 4096, "--train", "--recompute")
    assert ", training factors, recomputing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^recompute: got True"):
        call(path, "--tokens", 8, "--recompute")
    assert call(path, "--tokens", 4096, "--gpu", "80GB", "--train", "all") == 1
    assert "does not fit 80.00 GB" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="nowhere"):
        call(tmp_path / "nowhere", "--tokens", 8)
    for size in ("big", "1e400"):
        with pytest.raises(SystemExit):
            call(path, "--tokens", 8, "--gpu", size)


@pytest.mark.parametrize(
    "change", [{"tokens": 0}, {"batch": 0}, {"new_tokens": -1}, {"train": "some"}, {"dtype": 1}]
)
def test_bad_use(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        plan_memory(FLEXOLMO, Use(**{"tokens": 8} | change))


def test_what_is_advised_was_tested():
    """Even where more fits better at times: the search may miss the largest, and not promise it."""
    tested = {}

    def fits(number):
        tested[number] = number <= 3 or number % 5 == 0
        return tested[number]

    for limit in range(1, 40):
        tested.clear()
        assert tested.get(memory_plan.largest(fits, limit))
    assert memory_plan.largest(lambda number: False, 9) == 0

"""Decoding by CUDA graph: the same bits as step by step, and no wait for the device in a step."""

from __future__ import annotations

import pytest
import torch
from test_generation import make, prompts

from flexmore_kernels import testing
from flexmore_kernels.decode_step import DecodeStep
from flexmore_kernels.kv_cache import StaticCache
from flexmore_kernels.sampling import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_graphs_tokens_are_the_steps(dtype):
    """Greedy, sampled, with experts of their own and with ends: captured or not, the same bits."""
    model = make("cuda", dtype, hidden_size=64, intermediate_size=128, expert_ranks=[0, 3, 8, 5])
    ids, mask = prompts("cuda")
    experts = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 1]], device="cuda").bool()
    base = {"attention_mask": mask, "max_new_tokens": 24, "expert_mask": experts}
    greedy = model.generate(ids, cuda_graph=False, **base)
    for change in ({}, {"eos_token_id": int(greedy[0, 15])}, {"temperature": 1.0, "top_p": 0.9}):
        runs = []
        for graph in (False, True):
            generator = torch.Generator("cuda").manual_seed(5)
            options = base | change | {"generator": generator, "cuda_graph": graph}
            with model.counting() as counted:
                runs.append(model.generate(ids, **options))
            assert counted[0].tokens > 0
        testing.assert_same(*runs)


def test_decoding_waits_for_old_tokens_only():
    model = make("cuda", torch.bfloat16)
    ids, _ = prompts("cuda")
    cache = StaticCache(model.config, 3, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(ids, cache=cache, logits_to_keep=1)
        step = DecodeStep(model, cache, Sampling(), [1], 0, cuda_graph=True)
        step.take(logits)
        slot = step.host_buffer()
        step()
        without_a_wait(step)
        step()  # the capture: torch waits as it begins
        without_a_wait(step)
        without_a_wait(lambda: step.copy_to(slot))
        for _ in range(3):
            step()
    assert cache.length == 14 and cache.end.tolist() == [14] * 3
    assert step.made == 8


def without_a_wait(call):
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_outlives_what_torch_takes_back():
    """torch frees the workspaces of cuBLAS when it compiles with CUDA graphs, or when another graph
    of the same stream ends; what is captured goes on using them."""
    sizes = {"hidden_size": 2048, "intermediate_size": 256, "num_attention_heads": 16}
    model = make("cuda", torch.bfloat16, **sizes)
    ids, _ = prompts("cuda")

    def started():
        cache = StaticCache(model.config, 3, 48, device="cuda", dtype=torch.bfloat16)
        step = DecodeStep(model, cache, Sampling(), [], 0, cuda_graph=True)
        with torch.no_grad():
            step.take(model(ids, cache=cache, logits_to_keep=1))
        step.run_to(6)
        return step

    def finished(step):
        step.run_to(24)
        return step.tokens.clone()

    expected = finished(started())
    step, other = started(), started()
    assert step._beside.stream != other._beside.stream
    del other
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    filled = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    testing.assert_same(finished(step), expected)
    assert all(part.isnan().all() for part in filled)
    assert finished(started()) is not None

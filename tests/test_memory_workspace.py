"""Bytes of one MoE layer: against its products, and of a whole step against a GPU's allocator."""

from __future__ import annotations

import pytest
import torch
from test_memory_plan import recomputes
from torch.nn import functional as F

import flexmore_kernels as fk
from flexmore_kernels.memory_plan import Use, plan_memory
from flexmore_kernels.memory_workspace import (
    LayerSizes,
    backward_bytes,
    forward_bytes,
    kept_bytes,
)


def test_workspace_is_at_least_its_products():
    """G, U and the hidden sum of a fused layer; rows of every token's experts where none are
    fused; in a backward what G, U and dmixed are."""
    layer = LayerSizes(4096, 11008, (0, *[64] * 6), 5, torch.bfloat16)
    row = 11008 * 2
    hopper, plain = (forward_bytes(layer, 4096, hopper) for hopper in (True, False))
    assert 3 * 4096 * row < hopper < 4 * 4096 * row
    assert plain - hopper == 4096 * (5 * row + 4096 * 4)
    full = LayerSizes(4096, 11008, (0,) * 7, 5, torch.bfloat16)
    assert not full.shares_hidden
    assert 5 * 4096 * row < forward_bytes(full, 4096) < 8 * 4096 * row
    assert forward_bytes(layer, 8192) < 2.1 * plain
    fused, rows = (backward_bytes(layer, 4096, False, hopper=hopper) for hopper in (True, False))
    assert 3 * 4096 * row < fused < 5 * 4096 * row
    assert rows - fused == 3 * 5 * 4096 * row
    kept, again = (backward_bytes(layer, 4096, False, recompute) for recompute in (False, True))
    assert again - kept == 4096 * (2 * row + 2 * 6 * 64 * 2)
    kept, again = (backward_bytes(full, 4096, True, recompute) for recompute in (False, True))
    assert again - kept == 2 * 5 * 4096 * row
    assert kept_bytes(full, 4096, True) == 2 * 5 * 4096 * row


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")  # up to 16 GB each: one after the other
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("train", "recompute"), [(None, False), ("factors", False), ("factors", True)]
)
@pytest.mark.parametrize("ranks", [(64,) * 6, (1, 4, 8, 64, 256, 2048), (0, 64, 0)], ids=str)
def test_peak_on_a_gpu(ranks, train, recompute):
    """Four layers of FlexOlmo's width: the plan is within 5 % of what was allocated."""
    config = fk.FlexMoREConfig(num_hidden_layers=4, expert_ranks=[0, *ranks],
                               num_experts_per_tok=min(5, 1 + len(ranks)))  # fmt: skip
    model = fk.FlexMoREForCausalLM(config, device="cuda", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj_a." in name or "_proj_b." in name or ".mlp.gate." in name)
    recomputes(model, recompute)
    hopper = torch.cuda.get_device_capability()[0] == 9 and bool(
        fk.backend.hopper("token_major", model.lm_head.weight)
    )
    use = Use(2048, 2, train=train, hopper=hopper, recompute=recompute)
    ids = torch.randint(config.vocab_size, (use.batch, use.tokens), device="cuda")
    for _ in range(2):  # the second time libraries have their workspaces
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        if train:
            logits = model(ids)
            F.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
            model.zero_grad()
        else:
            with torch.no_grad():
                cache = fk.kv_cache.StaticCache(config, use.batch, use.tokens, device="cuda",
                                                dtype=torch.bfloat16)  # fmt: skip
                logits = model(ids, cache=cache, logits_to_keep=1)
        del logits
    planned = plan_memory(config, use)
    expected = planned.peak - planned.optimizer  # no step was made
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.05)

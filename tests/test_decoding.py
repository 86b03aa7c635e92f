"""A decoding step beside the layers: counters, the likeliest token, who has ended.

Traps covered: equal logits, both zeros, NaN and infinities, rows longer and shorter than a part of
a program, one request, no stop, a pad that is a stop.
"""

from __future__ import annotations

import pytest
import torch

import reference.decoding as reference
from flexmore_kernels import testing
from flexmore_kernels.ops.decoding import begin_token, greedy, settle

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("half", (1, 5, 64))
@pytest.mark.parametrize("batch", (1, 3))
def test_begin_token(batch, half, device, kernels):
    columns = 20
    end = torch.full((batch,), 7, device=device)
    position = torch.tensor([[7], [4], [0]], device=device)[:batch]
    real = torch.rand(batch, columns, device=device) < 0.5
    real[:, 7:] = False
    cos, sin = (torch.rand(columns, half, device=device) for _ in "cs")
    now = torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(3):
        expected = reference.begin_token(end, position, real, cos, sin)
        rotary = begin_token(end, position, real, now, (cos, sin))
        for found, wanted in zip((now, end, position, real, *rotary), expected, strict=True):
            testing.assert_same(found, wanted)
    assert real[:, 7:10].all() and not real[:, 10:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (1, 17, 4096, 9001))
def test_greedy(width, dtype, device, kernels):
    logits = torch.randn(5, width, dtype=torch.float64).to(device, dtype)
    logits[1] = -logits[1].abs() - 1
    logits[2] = logits[2].clamp(max=0)  # zeros of both signs, many equal
    logits[2, ::2] = -0.0
    logits[3] = -torch.inf
    logits[4, width // 2 :] = torch.inf
    testing.assert_same(greedy(logits), reference.greedy(logits))
    apart = logits[:, None].expand(5, 2, width)[:, 1]
    testing.assert_same(greedy(apart), reference.greedy(logits))
    testing.assert_same(greedy(logits.T.contiguous().T), reference.greedy(logits))
    logits[0, width // 3] = torch.nan
    assert greedy(logits)[0] == width // 3


@pytest.mark.parametrize("stops", ((), (4,), (9, 4, 7)), ids=str)
@pytest.mark.parametrize("pad", (0, 4))
def test_settle(pad, stops, device, kernels):
    chosen = torch.tensor([4, 5, 9, 0], device=device)
    finished = torch.tensor([False, True, False, False], device=device)
    stops = torch.tensor(stops, dtype=torch.int64, device=device)
    tokens = torch.full((4, 1), 3, device=device)
    expected = reference.settle(chosen, finished, stops, pad)
    settle(chosen, tokens, finished, stops, pad)
    testing.assert_same(tokens, expected[0])
    testing.assert_same(finished, expected[1])

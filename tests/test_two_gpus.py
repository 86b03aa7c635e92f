"""Every kernel on a GPU that is not the current one: on its device and stream, with equal bits.

Traps covered: Triton launches on the current device, whatever its arguments; what is asked of the
device once (shared memory, processors, tables of ranks) is kept for each.
"""

from __future__ import annotations

import pytest
import torch
from exercise import FAMILIES, Setup

from flexmore_kernels.testing import assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
BF16, FP32 = torch.bfloat16, torch.float32
SETUPS = {
    "few tokens": Setup((0, 16, 5, 3), 9, BF16, hidden=512, intermediate=48),
    "many tokens": Setup((0, 16, 32, 64), 600, BF16, hidden=128, intermediate=192),
    "full-size and odd": Setup(
        (0, "full", 7, (2, 0, "full")), 13, FP32, hidden=37, intermediate=53
    ),
    "rows of their own": Setup((0, 72, 8, (96, "full", 80)), 530, BF16, hidden=64, intermediate=48),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_bits_are_those_of_the_current_gpu(setup, family):
    found = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        with torch.cuda.device(0):
            found.append(FAMILIES[family](setup._replace(device=device)))
            assert torch.cuda.current_device() == 0
        assert {str(tensor.device) for tensor in found[-1]} == {device}
    for one, other in zip(*found, strict=True):
        assert_same(other, one)

"""Which token is drawn: cuts that cut nothing, and temperatures at the ends of float32.

The probabilities themselves: test_generation.py.
"""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels import testing
from flexmore_kernels.sampling import Sampling, choose


def test_a_top_p_of_one_cuts_nothing():
    """Sums of many float32 probabilities pass 1 before the last one."""
    logits = torch.randn(4, 5000)
    draws = []
    for top_p in (None, 1, 1.0):
        generator = torch.Generator().manual_seed(3)
        draws.append(choose(logits, Sampling(1.0, top_p=top_p).checked(), generator))
    testing.assert_same(draws[1], draws[0])
    testing.assert_same(draws[2], draws[0])


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("temperature", (1e-20, 1e-37, 1e-40, 1e-45, 1e-310))
def test_a_tiny_temperature_is_greedy(temperature, dtype):
    logits = torch.stack([torch.randperm(61) for _ in range(6)]).to(dtype) / 8  # no two alike
    logits[1] -= 100  # all below 0
    logits[2, :60] = -torch.inf
    for cuts in ({}, {"top_k": 5}, {"top_p": 0.9}):
        found = choose(logits, Sampling(temperature, **cuts).checked())
        testing.assert_same(found, logits.argmax(-1))


def test_a_huge_temperature_is_even():
    logits = torch.tensor([30.0, -30.0]).expand(4000, 2)
    ones = choose(logits, Sampling(1e300).checked()).sum()
    # Five standard deviations of 4000 fair coins.
    assert abs(int(ones) - 2000) <= 5 * 1000**0.5


@pytest.mark.parametrize("name", ("temperature", "top_p"))
@pytest.mark.parametrize("value", (10**400, -(10**400), float("nan"), float("inf"), None, True))
def test_what_is_no_number_is_named(name, value):
    if name == "top_p" and value is None:
        return
    with pytest.raises((ValueError, TypeError), match=f"^{name}: got .*; accepted: "):
        Sampling(**({"temperature": 1.0} | {name: value})).checked()

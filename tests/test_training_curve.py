"""200 steps of AdamW on a GPU: the loss curve lies on the reference's.

The reference trains in float64, and in the narrow dtype as plain PyTorch; the curve of the kernels
may lie as far from the first as the second does, twice. Three quarters of the experts are trained,
so frozen parts stay where they were.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_layer import make, twin
from torch.nn.functional import mse_loss

STEPS, TOKENS = 200, 1024
RANKS = {
    "small ranks": (0, 8, 16, 64, 64),
    "mixed ranks": (0, 4, 64, 128, 96),
    "full-size too": (0, 16, 0, 64, 128),
}


def curve(layer, dtype: torch.dtype, reference: bool, x, target) -> torch.Tensor:
    """The losses of the steps; the weights are float32 or wider, and cast to `dtype` each step."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    trained = copy.deepcopy(layer).to(wide)
    frozen = {n: p.detach().clone() for n, p in trained.named_parameters() if not p.requires_grad}
    model = twin(trained) if reference else trained
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    parameters = dict(model.named_parameters())
    wanted = [p for p in parameters.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=3e-3, foreach=True)
    losses = []
    for _ in range(STEPS):
        cast = {name: p.to(dtype) for name, p in parameters.items()}
        y = torch.func.functional_call(model, cast, (x.to(dtype),))
        loss = mse_loss(y.to(wide), target.to(wide))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    return torch.stack(losses).cpu()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_the_loss_curve_lies_on_the_references(ranks):
    sizes = {"hidden": 128, "intermediate": 256, "device": "cuda"}
    layer, teacher = make(ranks, 3, **sizes), make(ranks, 3, seed=1, **sizes)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.startswith(("experts.0.", "experts.4.")))
    torch.manual_seed(0)
    x = torch.randn(TOKENS, 128, device="cuda")
    with torch.no_grad():
        target = twin(teacher, torch.float64)(x.double())
    exact = curve(layer, torch.float64, True, x, target)
    plain = curve(layer, torch.bfloat16, True, x, target)
    ours = curve(layer, torch.bfloat16, False, x, target)
    assert exact[-1] < 0.8 * exact[0]
    off, allowed = ((one - exact).square().mean().sqrt() for one in (ours, plain))
    assert off <= 2 * allowed, f"{off:.3e} from the exact curve, plain PyTorch {allowed:.3e}"

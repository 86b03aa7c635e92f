"""What stands around the layer in the decoder: the weights of q, k and v laid together.

Traps covered: parameters that are trained, moved, copied, saved, replaced; what watches or wraps a
projection; preparation in inference mode; weights given for one call.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_model import make, twin
from torch import nn

from flexmore_kernels import decoder, testing
from flexmore_kernels.checkpoint import load_model, save_checkpoint

GROUPED = (24, 12, 12)  # rows of q, k and v


@pytest.fixture
def products(monkeypatch):
    """The rows of each product that joins weights."""
    rows, linear = [], decoder.F.linear

    def counted(h, weight, bias=None):
        rows.append(weight.shape[0])
        return linear(h, weight, bias)

    monkeypatch.setattr(decoder.F, "linear", counted)
    return rows


def prepared(device):
    model, ids = make(torch.float32, device), torch.randint(50, (2, 7), device=device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        model.prepare()
    for block in model.model.layers:
        block.mlp.requires_grad_(False)  # else their experts are prepared no more
    for name, tensor in model.state_dict().items():
        testing.assert_same(tensor, before[name], name)
    return model, ids, before


def accurate(model, ids):
    same, wide = twin(model).to(ids.device), twin(model).to(ids.device, torch.float64)
    with torch.no_grad():
        testing.assert_accurate(model(ids), wide(ids), same(ids))


def joined(products, model, ids):
    """Whether the layers read their weights by one product."""
    products.clear()
    with torch.no_grad():
        model(ids)
    assert products.count(sum(GROUPED)) in (0, 2)
    return sum(GROUPED) in products


def test_it_is_the_same_function_and_the_same_parameters(tmp_path, device, products):
    model, ids, before = prepared(device)
    assert joined(products, model, ids)
    accurate(model, ids)
    attention = model.model.layers[1].self_attn
    model(ids).square().mean().backward()
    assert attention.k_proj.weight.grad.abs().max() > 0
    torch.optim.SGD(model.parameters(), 1e-3).step()  # in place: what is joined is what was trained
    assert joined(products, model, ids)
    accurate(model, ids)
    save_checkpoint(tmp_path / "saved", model.state_dict(), model.config.to_dict())
    again = load_model(tmp_path / "saved", device)
    for name, tensor in again.state_dict().items():
        testing.assert_same(tensor, model.state_dict()[name], name)
    model.load_state_dict({n: t.to(device) for n, t in before.items()}, assign=True)
    assert not joined(products, model, ids)
    accurate(model, ids)


def test_copies_and_moved_models_read_their_own_weights(products):
    model, ids, _ = prepared("cpu")
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(2)
    assert not joined(products, other, ids) and joined(products, model, ids)
    accurate(other, ids)
    accurate(model, ids)
    assert not joined(products, model.to(torch.float64), ids)
    model.prepare()
    assert joined(products, model, ids)


def test_what_watches_or_wraps_a_projection_is_asked(products):
    model, ids, _ = prepared("cpu")
    attention, seen = model.model.layers[0].self_attn, []
    handle = attention.k_proj.register_forward_hook(lambda *_: seen.append("k"))
    plain = model.eval().requires_grad_(False)(ids)
    handle.remove()
    assert seen == ["k"]

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        @property
        def weight(self):
            return self.inner.weight

        def forward(self, h):
            return 2 * self.inner(h)

    attention.v_proj = Doubled(attention.v_proj)
    products.clear()
    assert not torch.equal(model(ids), plain) and products.count(sum(GROUPED)) == 1


def test_weights_given_for_one_call(products):
    model, ids, before = prepared("cpu")
    others = {n: 2 * t for n, t in before.items() if n.endswith("v_proj.weight")}
    with torch.no_grad():
        found = torch.func.functional_call(model, others, (ids,))
        assert not torch.equal(found, model(ids))
    assert joined(products, model, ids)

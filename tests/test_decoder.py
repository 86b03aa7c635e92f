"""What stands around the layer in the decoder: the weights of q, k and v laid together."""

from __future__ import annotations

import torch
from test_model import make, twin

from flexmore_kernels import testing
from flexmore_kernels.checkpoint import load_model, save_checkpoint


def test_prepared_attention_is_the_same_function(tmp_path, device):
    """Weights of q, k and v lie together: trained, moved, saved and loaded as before."""
    model, ids = make(torch.float32, device), torch.randint(50, (2, 7), device=device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.prepare()
    for block in model.model.layers:
        block.mlp.requires_grad_(False)  # else they are prepared no more
    attention = model.model.layers[1].self_attn
    for name, tensor in model.state_dict().items():
        testing.assert_same(tensor, before[name], name)

    def joined():
        weights = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        return len({weight.untyped_storage().data_ptr() for weight in weights}) == 1

    plain = twin(model).to(device)
    wide = twin(model).to(device, torch.float64)
    assert joined()
    with torch.no_grad():
        testing.assert_accurate(model(ids), wide(ids), plain(ids))
    model(ids).square().mean().backward()
    assert attention.k_proj.weight.grad.abs().max() > 0
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    optimizer.step()
    plain, wide = twin(model).to(device), twin(model).to(device, torch.float64)
    with torch.no_grad():  # in place: what is joined is what was trained
        testing.assert_accurate(model(ids), wide(ids), plain(ids))
    save_checkpoint(tmp_path / "saved", model.state_dict(), model.config.to_dict())
    again = load_model(tmp_path / "saved", device)
    for name, tensor in again.state_dict().items():
        testing.assert_same(tensor, model.state_dict()[name], name)
    model.load_state_dict({n: t.to(device) for n, t in before.items()}, assign=True)
    assert not joined()
    first = twin(model).to(device)
    with torch.no_grad():
        testing.assert_accurate(model(ids), twin(model).double().to(device)(ids), first(ids))

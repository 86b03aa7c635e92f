"""Bad input to the layer: refused by name, saying what came and what is accepted, before any work.

Traps covered: True as a rank, a NumPy integer as one, "0 for no delta" at the base, sizes that a
mask shares by chance, dtypes that PyTorch would promote, experts allowed for no token.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flexmore_kernels as fk

GOOD = {"hidden_size": 8, "intermediate_size": 12, "expert_ranks": [0, 2, 3], "top_k": 2}

CONSTRUCTOR = [
    ({"hidden_size": 0}, "hidden_size: got 0"),
    ({"hidden_size": 8.0}, "hidden_size: got 8.0"),
    ({"intermediate_size": -1}, "intermediate_size: got -1"),
    ({"top_k": 0}, "top_k: got 0"),
    ({"top_k": 4}, "top_k: got 4; accepted: an integer from 1 to 3"),
    ({"top_k": True}, "top_k: got True"),
    ({"expert_ranks": []}, "expert_ranks: got 0 entries"),
    ({"expert_ranks": 3}, "expert_ranks: got 3"),
    ({"expert_ranks": "012"}, "expert_ranks: got '012'"),
    ({"expert_ranks": {0: 0, 2: 0}}, "expert_ranks: got {0: 0, 2: 0}"),
    ({"expert_ranks": [0] * 1025}, "expert_ranks: got 1025 entries"),
    ({"expert_ranks": [2, 2, 3]}, r"expert_ranks\[0\]: got 2; accepted: 0"),
    ({"expert_ranks": [(0, 0, 0), 2, 3]}, r"expert_ranks\[0\]"),
    ({"expert_ranks": [("full",) * 3, 2, 3]}, r"expert_ranks\[0\]"),
    ({"expert_ranks": [0, -1, 3]}, r"expert_ranks\[1\]: got -1"),
    ({"expert_ranks": [0, 2, 9]}, r"expert_ranks\[2\]: got 9; accepted: an integer from 0 to 8"),
    ({"expert_ranks": [0, 1.5, 3]}, r"expert_ranks\[1\]: got 1.5"),
    ({"expert_ranks": [0, np.float64(2), 3]}, r"expert_ranks\[1\]"),
    ({"expert_ranks": [0, True, 3]}, r"expert_ranks\[1\]: got True"),
    ({"expert_ranks": [0, "full", 3]}, r"expert_ranks\[1\]: got 'full'"),
    ({"expert_ranks": [0, (1, 2), 3]}, r"expert_ranks\[1\]: got \(1, 2\)"),
    ({"expert_ranks": [0, (1, 2, "half"), 3]}, r"expert_ranks\[1\]\[2\]: got 'half'"),
    ({"expert_ranks": [0, (1, 2, 9), 3]}, r"expert_ranks\[1\]\[2\]: got 9"),
    ({"expert_ranks": [0, (1, None, 2), 3]}, r"expert_ranks\[1\]\[1\]: got None"),
    ({"norm_topk_prob": 1}, "norm_topk_prob: got 1; accepted: False, True"),
    ({"expert_bias": None}, "expert_bias: got None"),
    (
        {"scoring": "relu"},
        "scoring: got 'relu'; accepted: 'softmax', 'topk_softmax', 'sigmoid', 'unit'",
    ),
    ({"router": "nexus"}, "router: got 'nexus'; accepted: 'linear'"),
    ({"shared_expert": 3}, "shared_expert: got 3; accepted: an integer from 1 to 2"),
    ({"shared_expert": 0}, "shared_expert: got 0; accepted: an integer from 1 to 2"),
    ({"shared_expert": "base"}, "shared_expert: got 'base'"),
    ({"shared_expert": True, "top_k": 3}, "top_k: got 3; accepted: an integer from 1 to 2"),
    ({"shared_expert": True, "expert_ranks": [0], "top_k": 1}, "shared_expert: got True for 1"),
    ({"router": "projected"}, "domain_embedding_size: got None"),
    ({"router": "projected", "domain_embedding_size": 0}, "domain_embedding_size: got 0"),
    ({"domain_embedding_size": 4}, "domain_embedding_size: got 4 with router='linear'"),
    ({"projector_size": 4}, "projector_size: got 4 with router='linear'"),
    ({"router_dtype": "float32"}, "router_dtype: got 'float32'"),
    ({"router_dtype": torch.int32}, "router_dtype: got torch.int32"),
    ({"dtype": torch.float8_e4m3fn}, "dtype: got torch.float8_e4m3fn"),
    ({"stacked_factors": "yes"}, "stacked_factors: got 'yes'"),
]


@pytest.mark.parametrize(("change", "message"), CONSTRUCTOR, ids=[m for _, m in CONSTRUCTOR])
def test_constructor_refuses(change, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        fk.FlexMoRE(**(GOOD | change))


def test_ranks_of_numpy_and_lists_are_taken():
    layer = fk.FlexMoRE(8, 12, np.array([0, 2, 8]), np.int64(2))
    assert layer.expert_ranks == (0, 2, 8) and type(layer.top_k) is int
    layer = fk.FlexMoRE(8, 12, [0, [2, 2, 2], ["full"] * 3, [0, 0, 0], (1, 0, "full")], 2)
    assert layer.expert_ranks == (0, 2, 0, (0, 0, 0), (1, 0, "full"))
    assert "expert_ranks=(0, 2, 0, (0, 0, 0), (1, 0, 'full')), top_k=2" in repr(layer)


FORWARD = [
    ("x", lambda x: {"x": x.tolist()}, "x: got list"),
    ("width", lambda x: {"x": x[:, :7]}, r"x: got shape \(4, 7\); accepted: \(..., 8\)"),
    ("scalar", lambda x: {"x": x[0, 0]}, r"x: got shape \(\)"),
    ("double", lambda x: {"x": x.double()}, "x: got dtype float64; accepted: float32"),
    ("half", lambda x: {"x": x.bfloat16()}, "x: got dtype bfloat16; accepted: float32"),
    ("ids", lambda x: {"x": x.long()}, "x: got dtype int64"),
    ("device", lambda x: {"x": x.to("meta")}, "x: got a tensor on meta"),
    ("mask_list", lambda x: {"x": x, "expert_mask": [True] * 3}, "expert_mask: got list"),
    ("mask_dtype", lambda x: {"x": x, "expert_mask": torch.ones(3)}, "expert_mask: got dtype f"),
    ("mask_ids", lambda x: {"x": x, "expert_mask": torch.ones(3).long()}, "expert_mask: got dtype"),
    ("mask_width", lambda x: {"x": x, "expert_mask": torch.ones(4).bool()},
     r"expert_mask: got shape \(4,\); accepted: \(3,\) or \(4, 3\)"),
    ("mask_rows", lambda x: {"x": x, "expert_mask": torch.ones(1, 3).bool()},
     r"expert_mask: got shape \(1, 3\); accepted: \(3,\) or \(4, 3\)"),
    ("mask_leading", lambda x: {"x": x.view(2, 2, 8), "expert_mask": torch.ones(2, 3).bool()},
     r"expert_mask: got shape \(2, 3\); accepted: \(3,\) or \(2, 2, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [c[1:] for c in FORWARD], ids=[c[0] for c in FORWARD])
def test_forward_refuses(make, message):
    arguments = make(torch.randn(4, 8))
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        fk.FlexMoRE(**GOOD)(**arguments)


@pytest.mark.parametrize(
    ("name", "dtype", "accepted"),
    [
        ("experts.0.up_proj.weight", torch.bfloat16, "float32"),
        ("experts.1.up_proj_a.weight", torch.bfloat16, "float32"),
        ("experts.2.down_proj_b.weight", torch.float64, "float32"),
        ("gate.weight", torch.float16, "float32"),
        ("gate.expert_bias", torch.float64, "float32"),
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_forward_refuses_mixed_dtypes(name, dtype, accepted, stacked):
    layer = fk.FlexMoRE(**GOOD, expert_bias=True, stacked_factors=stacked)
    if stacked and "_proj_" in name:
        name = name.replace(".1", "").replace(".2", "").removesuffix(".weight")
    parameter = layer.get_parameter(name)
    parameter.data = parameter.data.to(dtype)
    got = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"^{name}: got dtype {got}; accepted: {accepted}$"):
        layer(torch.randn(4, 8))


def test_forward_refuses_a_base_that_cannot_be_computed_with():
    layer = fk.FlexMoRE(**GOOD)
    layer.requires_grad_(False).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="float8_e4m3fn; accepted: float32, bfloat16"):
        layer(torch.randn(4, 8).to(torch.float8_e4m3fn))


def test_forward_names_the_token_without_an_expert(device):
    layer, x = fk.FlexMoRE(**GOOD, device=device), torch.randn(2, 3, 8, device=device)
    mask = torch.ones(2, 3, 3, dtype=torch.bool, device=device)
    mask[1, 2] = False
    nobody = torch.zeros(3, dtype=torch.bool, device=device)
    with fk.validation():
        with pytest.raises(ValueError, match=r"^expert_mask: .* for token \(1, 2\)"):
            layer(x, expert_mask=mask)
        with pytest.raises(ValueError, match="^expert_mask: .* any token"):
            layer(x, expert_mask=nobody)
        x[1, 1, 3] = torch.nan
        with pytest.raises(ValueError, match="NaN for token 4"):
            layer(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_token_without_an_expert_gets_zeros():
    layer = fk.FlexMoRE(**GOOD, device="cuda")
    x = torch.randn(5, 8, device="cuda", requires_grad=True)
    mask = torch.ones(5, 3, dtype=torch.bool, device="cuda")
    mask[2] = False
    y = layer(x, expert_mask=mask)
    y.sum().backward()
    assert (y[2] == 0).all() and (x.grad[2] == 0).all() and x.grad.isfinite().all()
    with pytest.raises(TypeError, match="float64 on cuda"):
        fk.FlexMoRE(**GOOD, device="cuda", dtype=torch.float64)(x.double())


FROM_DENSE = [
    ("gate", (torch.zeros(12), torch.zeros(12, 8), torch.zeros(8, 12)), "gate: got shape"),
    ("up", (torch.zeros(12, 8), torch.zeros(12, 9), torch.zeros(8, 12)), "up: got shape"),
    ("down", (torch.zeros(12, 8), torch.zeros(12, 8), torch.zeros(12, 8)), "down: got shape"),
    ("dtype", (torch.zeros(12, 8), torch.zeros(12, 8).half(), torch.zeros(8, 12)), "up: got dtype"),
    ("list", ([[0.0]], torch.zeros(12, 8), torch.zeros(8, 12)), "gate: got list"),
]


@pytest.mark.parametrize(("dense", "message"), [c[1:] for c in FROM_DENSE],
                         ids=[c[0] for c in FROM_DENSE])  # fmt: skip
def test_from_dense_refuses(dense, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        fk.FlexMoRE.from_dense(*dense, [0, 2, 3], 2)


def test_forward_names_a_router_left_behind():
    layer = fk.FlexMoRE(**GOOD)
    layer.gate.to("meta")
    with pytest.raises(ValueError, match=r"^gate\.weight: got a tensor on meta; accepted: one on "):
        layer(torch.randn(4, 8))


def test_traced_values_are_not_looked_at():
    with FakeTensorMode():
        layer, x = fk.FlexMoRE(**GOOD), torch.randn(4, 8)
        y, routing = layer(x, expert_mask=torch.ones(4, 3).bool(), return_routing=True)
    assert y.shape == (4, 8) and routing.indices.shape == (4, GOOD["top_k"])


def test_second_derivative_is_refused():
    layer, x = fk.FlexMoRE(**GOOD), torch.randn(4, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        dx.sum().backward()

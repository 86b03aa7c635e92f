"""Router losses and counters against the reference, by hand, and against Hugging Face's function.

Traps covered: padding that holds NaN, tokens without a softmax, empty slots, an excluded expert
against a deleted one, several layers, sigmoids that underflow, T = 0.
"""

from __future__ import annotations

import math

import pytest
import torch

import flexmore_kernels as fk
import reference
from flexmore_kernels import ops
from flexmore_kernels.testing import assert_accurate_draws, to_float64, tree_map

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMS = pytest.mark.parametrize("form", ("huggingface", "olmo_core"))
SCORINGS = pytest.mark.parametrize("scoring", ("softmax", "sigmoid"))
CASES = {  # tokens, experts, top_k, layers, with bias, mask, padding
    "plain": (35, 7, 3, 0, False, None, None),
    "one_layer": (20, 5, 2, 1, True, None, None),
    "three_layers": (24, 6, 2, 3, True, "each", "some"),
    "bias": (33, 7, 5, 0, True, None, None),
    "excluded": (33, 7, 5, 0, True, "all", None),
    "group_limited": (33, 7, 2, 0, False, "each", None),
    "padded": (33, 7, 3, 0, True, "each", "some"),
    "all_padding": (9, 4, 2, 2, True, None, "all"),
    "no_tokens": (0, 4, 2, 0, True, None, "some"),
    "one_expert": (9, 1, 1, 0, True, None, "some"),
    "many_experts": (40, 300, 8, 0, True, "each", "some"),
}


def assert_is(found: torch.Tensor, value: float) -> None:
    torch.testing.assert_close(found, torch.full_like(found, value))


def make(case: str, device: str, dtype=torch.float32):
    """(logits, indices, bias, mask, padding): as the functions take them."""
    T, E, K, layers, with_bias, mask, padding = CASES[case]
    allowed = torch.rand(E if mask == "all" else (T, E)) < 0.6
    allowed[..., 0] = True
    allowed = allowed.to(device) if mask else None
    real = torch.rand(T) < (0.0 if padding == "all" else 0.7)
    real = real.to(device) if padding else None

    def one():
        logits = (2 * torch.randn(T, E)).to(device, dtype)
        bias = torch.randn(E - 1).to(device, dtype) if with_bias else None
        ids = ops.topk_route(logits, top_k=K, bias=bias, mask=allowed).indices
        return logits, ids, bias

    if not layers:
        logits, ids, bias = one()
    else:
        logits, ids, bias = zip(*(one() for _ in range(layers)), strict=True)
    return logits, ids, bias if with_bias else None, allowed, real


def results(package, problem, scoring):
    """Losses of both forms and z, and for each the gradients in logits and bias, in one list."""
    logits, ids, bias, mask, real = problem
    found = []
    for name in ("huggingface", "olmo_core", "z"):
        leaf = tree_map(lambda t: t.detach().requires_grad_(), (logits, bias))
        given = {"bias": leaf[1], "mask": mask, "padding_mask": real}
        if name == "z":
            loss = package.router_z_loss(leaf[0], **given)
        else:
            loss = package.load_balancing_loss(leaf[0], ids, form=name, scoring=scoring, **given)
        leaves = []
        tree_map(leaves.append, leaf)
        found += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return found


@pytest.mark.parametrize("case", CASES)
@SCORINGS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_as_the_reference(case, scoring, dtype, device):
    ours, truth, same = [], [], []
    for _ in range(8):  # of several draws, since a loss is one number
        problem = make(case, device, dtype)
        ours.append(results(ops, problem, scoring))
        same.append(results(reference, problem, scoring))
        truth.append(results(reference, to_float64(problem), scoring))
    columns = (zip(*draws, strict=True) for draws in (ours, truth, same))
    for n, column in enumerate(zip(*columns, strict=True)):
        assert_accurate_draws(*column, name=f"result {n}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scoring", ("softmax", "topk_softmax", "sigmoid", "unit"))
def test_statistics_as_the_reference(case, scoring, device):
    logits, ids, bias, mask, real = make(case, device)
    if not isinstance(logits, torch.Tensor):
        logits, ids, bias = logits[0], ids[0], bias[0]
    weights = torch.rand(ids.shape, device=device)
    given = {"scoring": scoring, "bias": bias, "mask": mask, "padding_mask": real}
    for w in (weights, None):
        got = ops.router_statistics(logits, ids, w, **given)
        want = reference.router_statistics(logits, ids, w, **given)
        assert (got.tokens, got.load.tolist()) == (want.tokens, want.load.tolist())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert not got.score_sum.requires_grad


@SCORINGS
@pytest.mark.parametrize("case", ("plain", "three_layers", "excluded", "padded"))
def test_gradcheck(case, scoring, device):
    logits, ids, bias, mask, real = make(case, device, torch.float64)
    count = 0 if isinstance(logits, torch.Tensor) else len(logits)
    leaves = [*logits, *bias] if count else [logits] + [bias] * (bias is not None)
    leaves = [t.detach().requires_grad_() for t in leaves]

    def losses(*leaves):
        logits = leaves[:count] if count else leaves[0]
        bias = leaves[count:] if count else leaves[1] if leaves[1:] else None
        given = {"bias": bias, "mask": mask, "padding_mask": real}
        forms = ("huggingface", "olmo_core")
        balance = [ops.load_balancing_loss(logits, ids, form=form, scoring=scoring, **given)
                   for form in forms]  # fmt: skip
        return *balance, ops.router_z_loss(logits, **given)

    assert torch.autograd.gradcheck(losses, leaves, fast_mode=True)


@pytest.mark.parametrize("layers", (1, 3))
@pytest.mark.parametrize("padded", (False, True))
def test_as_hugging_face(layers, padded, device):
    modeling = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    B, S, E, K = 3, 11, 7, 4
    logits = [torch.randn(B * S, E, device=device) for _ in range(layers)]
    ids = [ops.topk_route(given, top_k=K).indices for given in logits]
    real = (torch.rand(B, S) < 0.7).to(device) if padded else None
    attention_mask = None if real is None else real.long()
    want = modeling.load_balancing_loss_func(tuple(logits), E, K, attention_mask)
    got = ops.load_balancing_loss(logits, ids, padding_mask=real)
    torch.testing.assert_close(got, want)


def test_by_hand(device):
    """Two tokens, three experts, top-1, written out."""
    logits = torch.tensor([[0.0, 0, 0], [math.log(2.0), 0, 0]], device=device)
    ids = torch.tensor([[0], [0]], device=device)
    score = (1 / 3 + 1 / 2) / 2
    loss = ops.load_balancing_loss(logits, ids)
    assert_is(loss, 3 * score)
    assert_is(ops.router_z_loss(logits), (math.log(3) ** 2 + math.log(4) ** 2) / 2)
    found = ops.router_statistics(logits, ids, torch.tensor([[0.5], [0.25]], device=device))
    assert (found.tokens.item(), found.load.tolist()) == (2, [2, 0, 0])
    assert found.weight_sum.tolist() == [0.75, 0, 0]
    assert found.mean_weight.tolist() == [0.375, 0, 0]
    assert found.load_fraction.tolist() == [1, 0, 0] and found.load_entropy.item() == 0
    entropy = (math.log(3) + math.log(2) / 2 + math.log(4) / 2) / 2
    assert_is(found.router_entropy, entropy)
    torch.testing.assert_close(found.entropy.sum(), found.router_entropy)
    assert_is(found.mean_score[0], score)
    # OLMo-core divides the sigmoids by their sum, and the loss by K.
    s = torch.sigmoid(logits)
    want = 3 / (2 * 1) * 2 * (s / s.sum(1, keepdim=True)).mean(0)[0]
    got = ops.load_balancing_loss(logits, ids, form="olmo_core", scoring="sigmoid")
    torch.testing.assert_close(got, want)


@SCORINGS
def test_an_even_spread(scoring, device):
    """Every expert as often as every other, all logits equal: K, and 1 for each layer."""
    E, K = 6, 2
    ids = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6], 1).to(device)
    logits = torch.full((6, E), -200.0, device=device)
    for form, each, three in (("huggingface", K, K), ("olmo_core", 1, 3)):
        given = {"form": form, "scoring": scoring}
        assert_is(ops.load_balancing_loss(logits, ids, **given), each)
        assert_is(ops.load_balancing_loss([logits] * 3, [ids] * 3, **given), three)
    found = ops.router_statistics(logits, ids, scoring=scoring)
    for entropy in (found.router_entropy, found.load_entropy):
        assert_is(entropy, math.log(E))


@FORMS
@SCORINGS
def test_excluded_is_deleted(form, scoring, device):
    """A mask for all tokens gives what the router without those experts gives."""
    logits = torch.randn(30, 5, device=device)
    keep = torch.tensor([True, False, True, True, False], device=device)
    masked = ops.topk_route(logits, top_k=2, mask=keep)
    small = ops.topk_route(logits[:, keep].contiguous(), top_k=2)
    given = {"form": form, "scoring": scoring}
    a = ops.load_balancing_loss(masked.logits, masked.indices, mask=keep, **given)
    torch.testing.assert_close(a, ops.load_balancing_loss(small.logits, small.indices, **given))
    a, b = ops.router_z_loss(logits, mask=keep), ops.router_z_loss(small.logits)
    torch.testing.assert_close(a, b)


@FORMS
@SCORINGS
def test_what_does_not_count(form, scoring, device):
    """Padding full of NaN, and real tokens without a softmax: as if they were not there."""
    good = torch.randn(8, 4, device=device)
    bad = torch.tensor([[NAN] * 4, [0, NAN, 0, 0], [INF, 0, 0, 0], [-INF] * 4], device=device)
    logits = torch.cat([good, bad]).requires_grad_()
    real = torch.arange(12, device=device) != 8
    mask = torch.ones(12, 4, dtype=torch.bool, device=device)
    mask[7] = False  # nothing allowed: does not count either
    ids = torch.cat([ops.topk_route(good, top_k=2).indices, torch.full((4, 2), 1, device=device)])
    given = {"form": form, "scoring": scoring}
    loss = ops.load_balancing_loss(logits, ids, mask=mask, padding_mask=real, **given)
    torch.testing.assert_close(loss, ops.load_balancing_loss(good[:7], ids[:7], **given))
    z = ops.router_z_loss(logits, mask=mask, padding_mask=real)
    torch.testing.assert_close(z, ops.router_z_loss(good[:7]))
    (dlogits,) = torch.autograd.grad(loss + z, logits)
    assert dlogits.isfinite().all() and (dlogits[7:] == 0).all() and (dlogits[:7] != 0).all()
    found = ops.router_statistics(logits, ids, mask=mask, padding_mask=real)
    assert found.tokens == 7 and found.load.sum() == 14
    assert all(part.isfinite().all() for part in found)


def test_empty_slots_are_not_counted(device):
    logits = torch.zeros(2, 3, device=device)
    ids = torch.tensor([[1, 3], [-1, 2]], device=device)
    weights = torch.tensor([[0.5, 9.0], [9.0, 0.25]], device=device)
    found = ops.router_statistics(logits, ids.int(), weights)
    assert found.load.tolist() == [0, 1, 1] and found.weight_sum.tolist() == [0, 0.5, 0.25]


def test_totals_add_up(device):
    logits, weights = torch.randn(40, 6, device=device), torch.rand(40, 2, device=device)
    ids = ops.topk_route(logits, top_k=2).indices
    totals = fk.RouterStatistics.zeros(6, device)
    for part in (slice(0, 13), slice(13, 40)):
        totals.add_(ops.router_statistics(logits[part], ids[part], weights[part]))
    whole = ops.router_statistics(logits, ids, weights)
    assert totals.tokens == 40 and torch.equal(totals.load, whole.load)
    for a, b in zip(totals[2:], whole[2:], strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b.double())
    assert_is(totals.load_fraction.sum(), 1)
    assert all((part == 0).all() for part in totals.zero_())
    assert totals.router_entropy == 0 and totals.mean_weight.sum() == 0

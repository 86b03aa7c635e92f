"""Attribution against the reference, to the bit: rows and weights are sums of integers.

Traps covered: tokens of several requests in one program, requests that are nobody's, padding, empty
slots whose weight is NaN, a shared expert's slot, more experts than are counted in registers, no
tokens, ties of the rounding, weights below a unit, totals that are added to.
"""

from __future__ import annotations

import pytest
import torch
from common import some_ids, to_device

import flexmore_kernels as fk
import reference
from flexmore_kernels import ops
from flexmore_kernels.attribution import Attribution
from flexmore_kernels.ops.attribution import attribute_
from flexmore_kernels.testing import CASE_IDS, CASES, assert_same, make_routing

SIZES = {  # tokens, experts, top_k, requests
    "decode": (24, 7, 5, 24),
    "one_request": (330, 7, 5, 1),  # more than one program
    "two_requests": (330, 7, 3, 2),
    "one_expert": (9, 1, 1, 3),
    "every_expert": (40, 32, 32, 2),
    "more_experts": (70, 33, 4, 1),
    "many_experts": (60, 300, 8, 2),
    "most_experts": (3, 1024, 9, 3),
}
HOW = ("alone", "counted", "packed", "packed and counted")


def make(size, how, device, dtype=torch.float32):
    """(arguments, options) of `attribute`."""
    T, E, K, B = SIZES[size]
    indices, weights = some_ids(T, E, K), torch.rand(T, K, dtype=torch.float64).to(dtype)
    weights[indices == E] = torch.nan
    options = {}
    if "packed" in how:  # -1 and B are nobody; int32 where not counted
        options["request"] = torch.randint(-1, B + 1, (T,)).sort().values
        if how == "packed":
            options["request"] = options["request"].int()
    if "counted" in how:
        options["counted"] = (torch.rand(T) < 0.7).view(1, T)
    options = {name: value.to(device) for name, value in options.items()}
    return (indices.to(device), weights.to(device), B, E), options


def same(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", SIZES)
def test_as_the_reference(size, how, device, kernels):
    given, options = make(size, how, device)
    same(ops.attribute(*given, **options), reference.attribute(*given, **options))


def test_nothing_is_written_for_nobody(device, kernels):
    """Requests -1 and B, beside whose places in memory others lie; in one program, and alone."""
    (indices, weights, B, E), _ = make("two_requests", "alone", device)
    for requests in ((B,), (-1,), (-1, B), (-1, 0, B)):
        request = torch.tensor(requests, device=device).repeat(len(indices))[: len(indices)]
        around = indices.new_zeros(B + 2, E), indices.new_zeros(B + 2, E), indices.new_zeros(B + 2)
        rows, units, tokens = (part[1:-1] for part in around)
        attribute_(rows, units, tokens, indices, weights, request=request.sort().values)
        for part in around:
            assert not part[0].any() and not part[-1].any()
        assert int(tokens[0]) == int((request == 0).sum())


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_named_cases(case, device, kernels):
    indices, wide = make_routing(case, device, torch.float64)
    for weights in (wide, wide.float()):
        given = (indices, weights, 1, case.num_experts)
        same(ops.attribute(*given), reference.attribute(*given))
    rows = ops.attribute(*given)[0]
    assert int(rows.sum()) == int((indices < case.num_experts).sum())


def test_by_hand(device, kernels):
    """Three tokens of two requests, the last of the first one padding."""
    indices = torch.tensor([[0, 2], [2, 3], [1, 0], [2, 0]], device=device)
    weights = torch.tensor([[0.5, 0.25], [0.75, 0.0], [0.5, 0.5], [0.1, 0.2]], device=device)
    counted = torch.tensor([True, True, True, False], device=device)
    rows, weight_sum = ops.attribute(indices, weights, 2, 3, counted=counted)
    assert rows.tolist() == [[1, 0, 2], [1, 1, 0]]
    assert weight_sum.tolist() == [[0.5, 0, 1], [0.5, 0.5, 0]]


def test_a_shared_expert_is_counted_as_the_others(device, kernels):
    """Its slot is the first of every token; of more experts than are counted in registers."""
    routing = ops.topk_route(torch.randn(90, 40, device=device), top_k=3, shared=5)
    rows, weight_sum = ops.attribute(routing.indices, routing.weights, 1, 40)
    assert (int(rows[0, 5]), float(weight_sum[0, 5])) == (90, 90.0) and int(rows.sum()) == 4 * 90
    given = (routing.indices, routing.weights, 1, 40)
    same((rows, weight_sum), reference.attribute(*given))


@pytest.mark.parametrize("size", ("one_request", "many_experts"))
def test_the_order_of_tokens_and_the_parts_of_a_call_change_no_bit(size, device, kernels):
    (indices, weights, B, E), _ = make(size, "alone", device)
    T = indices.shape[0]
    request = torch.arange(T, device=device) // (T // B)
    expected = ops.attribute(indices, weights, B, E)
    order = torch.randperm(T, device=device)
    same(ops.attribute(indices[order], weights[order], B, E, request=request[order]), expected)
    rows, units = indices.new_zeros(2, B, E)
    for part in torch.arange(T, device=device).split(17):
        attribute_(rows, units, None, indices[part], weights[part], request=request[part])
    same((rows, units.double() / 2**32), expected)


def test_two_runs_have_the_same_bits(device, kernels):
    for size in SIZES:
        given, options = make(size, "packed and counted", device)
        same(ops.attribute(*given, **options), ops.attribute(*given, **options))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_rounding_to_a_unit(dtype, device, kernels):
    """Half a unit is rounded up, less is nothing; weights may be negative, or large."""
    unit = 2.0**-32
    each = {
        0.5 * unit: 1, 0.49 * unit: 0, 1.5 * unit: 2, -0.5 * unit: 0, -0.51 * unit: -1,
        1.0: 2**32, -2.0: -(2**33), 2.0**20: 2**52, 0.0: 0, 1e-40: 0, 2.0**-9 + unit: 2**23 + 1,
    }  # fmt: skip
    weights = torch.tensor(list(each), dtype=torch.float64).to(device, dtype)[:, None]
    indices = torch.zeros_like(weights, dtype=torch.int64)
    found = ops.attribute(indices, weights, len(each), 1)
    same(found, reference.attribute(indices, weights, len(each), 1))
    assert (found[1][:, 0] * 2**32).long().tolist() == list(each.values())


def test_sums_beyond_float32(device, kernels):
    """A million, and a millionth that float32 would lose beside it."""
    weights = torch.tensor([[2.0**20], [2.0**-20], [-(2.0**20)]], device=device)
    found = ops.attribute(torch.zeros(3, 1, dtype=torch.int64, device=device), weights, 1, 1)
    assert found[1].item() == 2.0**-20


def test_no_tokens(device, kernels):
    indices = torch.zeros(0, 2, dtype=torch.int64, device=device)
    for options in ({}, {"request": indices[:, 0]}, {"counted": indices[:, 0].bool()}):
        rows, weight_sum = ops.attribute(indices, indices.float(), 3, 4, **options)
        assert rows.tolist() == [[0] * 4] * 3 and not weight_sum.any()


def test_an_account_adds_up(device, kernels):
    """Layers, calls and whole accounts; tokens once, not a layer."""
    L, B, E, K = 3, 2, 5, 2
    account, total = Attribution.zeros(L, B, E, device), Attribution.zeros(L, B, E, device)
    rows = torch.zeros(L, B, E, dtype=torch.int64)
    sums = torch.zeros(L, B, E, dtype=torch.float64)
    tokens = torch.zeros(B, dtype=torch.int64)
    for S in (6, 1, 1):
        counted = torch.rand(B, S) < 0.6
        tokens += counted.sum(1)
        for layer in range(L):
            indices, weights = some_ids(B * S, E, K), torch.rand(B, S, K)
            one = reference.attribute(indices, weights.view(-1, K), B, E, counted=counted)
            rows[layer] += one[0]
            sums[layer] += one[1]
            ids = indices.view(B, S, K).to(device)
            account.count_(layer, ids, weights.to(device), counted.to(device))
    assert_same(account.layer_rows, rows)
    assert_same(account.layer_weight_sum, sums)
    assert_same(account.tokens, tokens)
    assert_same(account.rows, rows.sum(0))
    assert_same(account.weight_sum, sums.sum(0))
    share = rows.sum(0) / rows.sum((0, 2))[:, None]
    torch.testing.assert_close(account.share.cpu(), share, check_dtype=False)
    weight_share = sums.sum(0) / sums.sum((0, 2))[:, None]
    torch.testing.assert_close(account.weight_share.cpu(), weight_share)
    total.add_(account).add_(account)
    assert_same(total.rows, 2 * rows.sum(0))
    assert not any(part.any() for part in total.zero_())
    assert not total.share.any() and not total.weight_share.any()


def test_an_account_in_words_and_for_a_bill():
    account = Attribution.zeros(2, 2, 3)
    for layer in range(2):
        ids = torch.tensor([[[0, 2]], [[0, 1]]])
        account.count_(layer, ids, torch.tensor([[[0.25, 0.75]], [[0.5, 0.5]]]))
    names = ["base", "medicine", "law"]
    assert account.to_dict(names) == {
        "layers": 2,
        "experts": names,
        "requests": [
            {
                "tokens": 1, "rows": [2, 0, 2], "weight_sum": [0.5, 0.0, 1.5],
                "share": [0.5, 0.0, 0.5], "weight_share": [0.25, 0.0, 0.75],
            },
            {
                "tokens": 1, "rows": [2, 2, 0], "weight_sum": [1.0, 1.0, 0.0],
                "share": [0.5, 0.5, 0.0], "weight_share": [0.5, 0.5, 0.0],
            },
        ],
    }  # fmt: skip
    lines = account.as_text(names, request=1).splitlines()
    assert lines[0] == "request 1: 1 tokens through 2 layers, 4 rows"
    assert lines[3].split() == ["medicine", "2", "50.00%", "1.0000", "50.00%", "0.5000"]
    assert lines[4].split() == ["law", "0", "0.00%", "0.0000", "0.00%", "0.0000"]
    assert account.to_dict()["experts"] == ["0", "1", "2"]
    for bad in (names[:2], "abc"):
        with pytest.raises(ValueError, match="^names: got .*; accepted: 3 texts"):
            account.as_text(bad)
    with pytest.raises(ValueError, match="^request: got 2; accepted: an integer from 0 to 1"):
        account.as_text(request=2)
    with pytest.raises(ValueError, match="^num_requests: got 0"):
        Attribution.zeros(2, 0, 3)


def test_opcheck(device, kernels):
    (indices, weights, B, E), options = make("two_requests", "packed and counted", device)
    rows, units = indices.new_zeros(2, B, E)
    counted = options["counted"].view(-1)
    for more in ((None, None), (indices.new_zeros(B), options["request"])):
        given = (rows, units, more[0], indices, weights, more[1], counted)
        torch.library.opcheck(torch.ops.flexmore.attribute_.default, given)


def test_compiles_to_one_graph(device, kernels):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *given, **options: ops.attribute(*given, **options),
        fullgraph=True,
        backend="aot_eager",
    )
    for size in ("two_requests", "decode"):
        given, options = make(size, "counted", device)
        same(compiled(*given, **options), ops.attribute(*given, **options))


def test_nothing_flows_to_the_weights(device, kernels):
    (indices, weights, B, E), _ = make("two_requests", "alone", device)
    found = ops.attribute(indices, weights.requires_grad_(), B, E)
    assert not any(part.requires_grad for part in found)


IDS, WEIGHTS = torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2)
IDS[:, 1] = 1
REFUSED = [
    ({"indices": IDS.int()}, "indices: got dtype int32; accepted: int64"),
    ({"indices": IDS[0]}, r"indices: got shape \(2,\)"),
    ({"indices": IDS[:, :0], "weights": WEIGHTS[:, :0]}, "indices: got no slots a token"),
    ({"indices": IDS * 5}, r"indices: got id 5 at \[0, 1\]; accepted: 0 to 3, or 4"),
    ({"indices": IDS * 0}, "indices: token 0 names expert 0 twice"),
    ({"weights": WEIGHTS[:5]}, r"weights: got shape \(5, 2\); accepted: \(6, 2\)"),
    ({"weights": WEIGHTS.half()}, "weights: got dtype float16"),
    ({"weights": WEIGHTS / 0}, r"weights: got inf at \[0, 0\]; accepted: numbers up to 2\^20"),
    ({"weights": WEIGHTS * torch.nan}, r"weights: got nan at \[0, 0\]"),
    ({"weights": WEIGHTS.to("meta")}, "weights: got a tensor on meta"),
    ({"num_requests": 0}, "num_requests: got 0"),
    ({"num_requests": 4}, "num_requests: got 4 for 6 tokens; accepted: a divisor"),
    ({"num_experts": 1025}, "num_experts: got 1025; accepted: an integer from 1 to 1024"),
    ({"request": IDS[:5, 0]}, r"request: got shape \(5,\); accepted: \(6,\)"),
    ({"request": WEIGHTS[:, 0]}, "request: got dtype float32; accepted: int64, int32"),
    ({"counted": IDS}, "counted: got dtype int64; accepted: bool"),
    ({"counted": IDS.bool()}, r"counted: got shape \(6, 2\); accepted: 6 entries"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refuses(change, message, device):
    given = {"indices": IDS, "weights": WEIGHTS, "num_requests": 2, "num_experts": 4} | change
    given = {name: to_device(value, device) for name, value in given.items()}
    with fk.validation(), pytest.raises((ValueError, TypeError), match=f"^{message}"):
        ops.attribute(**given)


def test_launches_fill_the_device_and_fit_a_program():
    pytest.importorskip("triton")
    from flexmore_kernels._triton import attribution, tiles

    for E in (1, 7, 32, 33, 300, 1024):
        for K in (1, 5, 9, 32, 300):
            for T in (1, 64, 4096, 16384, 1 << 22):
                how = attribution.launch(T, K, E)
                block = how["BLOCK"]
                assert block >= K and block & (block - 1) == 0 and how["E_PAD"] >= E
                if K <= attribution.FEWEST_SLOTS:
                    assert attribution.FEWEST_SLOTS <= block <= attribution.MOST_SLOTS
                    assert not how["DENSE"] or block * how["E_PAD"] <= attribution.PAIRS
                    few = T * K <= tiles.ENOUGH_PROGRAMS * attribution.FEWEST_SLOTS
                    assert not few or block == attribution.FEWEST_SLOTS

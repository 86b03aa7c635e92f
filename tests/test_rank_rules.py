"""Rules for ranks: what each gives, by hand, and that a budget is spent as well as can be.

Traps covered: p is of s, not of s^2; powers of two and the largest matrix of an expert; scores of
constant features; ranks that cost as much as the matrix; a budget that cannot be met; ties, zero
and short spectra; that "full" is one indivisible piece.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flexmore_kernels.conversion import rank_rules
from flexmore_kernels.conversion.budget import spend
from flexmore_kernels.conversion.rank_rules import parse_rule

D, F = 32, 48  # break-even rank 19.2
PROJECTIONS = ("gate", "up", "down")


def table(layers=2, experts=2, width=D, decay=1.0):
    keys = itertools.product(range(layers), range(1, experts + 1), PROJECTIONS)
    powers = torch.arange(1, width + 1, dtype=torch.float64) ** -decay
    return {key: (0.5 + torch.rand(1)) * powers for key in keys}


def flat(count, width=D):
    return torch.where(torch.arange(width) < count, 1.0, 0.0).double()


def cost(ranks, sizes=(D, F)):
    d, f = sizes
    return sum(d * f if rank == "full" else rank * (d + f) for rank in ranks.values())


def squared_error(ranks, spectra):
    return sum(
        0.0 if rank == "full" else float(spectra[key][rank:].square().sum())
        for key, rank in ranks.items()
    )


@pytest.mark.parametrize("text", ["7", "fixed:7", " 7 "])
def test_fixed_is_obeyed_and_needs_nothing(text):
    rule = parse_rule(text)
    assert not (rule.needs_spectra or rule.needs_all or rule.needs_features)
    keys = dict.fromkeys(table())
    assert rule.ranks(keys, (D, F)) == dict.fromkeys(keys, 7)
    # More than break-even, and yet as given.
    assert set(parse_rule("fixed:30").ranks(keys, (D, F)).values()) == {30}


def test_fixed_for_each_expert():
    rule = parse_rule("fixed:4,0")
    ranks = rule.ranks(dict.fromkeys(table()), (D, F))
    assert all(rank == (4 if key[1] == 1 else "full") for key, rank in ranks.items())
    assert parse_rule("fixed:4,full").fixed == rule.fixed == (4, 0)
    with pytest.raises(ValueError, match="ranks for 2 experts, and there is an expert 3"):
        rule.ranks({(0, 3, "up"): None}, (D, F))


def test_energy_is_of_squares():
    s = torch.tensor([3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1 of 15
    shares = {0.6: 1, 0.61: 2, 13 / 15: 2, 0.87: 3, 1.0: 4}
    assert {share: rank_rules.energy_rank(s, share) for share in shares} == shares
    assert rank_rules.energy_rank(torch.zeros(4), 0.9) == 1
    rule = parse_rule("energy:0.6")
    assert not rule.needs_all and rule.needs_spectra
    assert rule.ranks({(0, 1, "up"): s}, (D, F)) == {(0, 1, "up"): 1}


def test_entropy_is_of_the_values_themselves():
    assert [rank_rules.entropy_rank(flat(n)) for n in (1, 2, 3, 20, 32)] == [1, 2, 3, 20, 32]
    s = torch.tensor([0.5, 0.25, 0.25])  # exp(1.5 ln 2) = 2.83; of squares it would be 2.4 or less
    assert rank_rules.entropy_rank(s) == 3
    s = torch.tensor([0.7, 0.1, 0.1, 0.1])
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.1)
    assert rank_rules.entropy_rank(s) == math.ceil(math.exp(entropy)) == 3
    squares = s.square() / s.square().sum()
    assert math.ceil(math.exp(-float((squares * squares.log()).sum()))) == 2
    assert rank_rules.entropy_rank(torch.zeros(3)) == 1


def test_naive_and_v01():
    tail = torch.cat([torch.ones(4), torch.full((28,), 9e-4)])
    key = (0, 1, "up")
    p = tail / tail.sum()
    naive = math.ceil(math.exp(-float((p * p.log()).sum())))
    assert naive == 5
    assert parse_rule("naive").ranks({key: tail}, (D, F)) == {key: naive}
    assert parse_rule("v01").ranks({key: tail}, (D, F)) == {key: 4}
    small = torch.full((32,), 9e-9)  # none is above 1e-8
    assert parse_rule("v01").ranks({key: small}, (D, F)) == {key: 1}


def test_v02_is_a_power_of_two_an_expert():
    rule = parse_rule("v02")
    assert rule.needs_all and rule.value == 1e-3
    spectra = table()
    for n, key in enumerate(spectra):
        spectra[key] = flat(n % 3 + (3 if key[1] == 1 else 7))
    # 3, 4 or 5 of expert 1 and 7, 8 or 9 of expert 2
    ranks = rule.ranks(spectra, (D, F))
    assert {key[1]: rank for key, rank in ranks.items()} == {1: 8, 2: 16}
    exactly = {(0, 1, "up"): flat(8)}
    assert rule.ranks(exactly, (D, F)) == {(0, 1, "up"): 8}
    assert rule.ranks({(0, 1, "up"): flat(17)}, (D, F)) == {(0, 1, "up"): "full"}
    # p of a tail value is 0.0399: kept at 1e-3, dropped at 4e-2, and 4e-2 itself is dropped.
    tail = {(0, 1, "up"): torch.tensor([0.8, 0.2, 0.2, 0.2, 0.2]) / 1.6}
    assert parse_rule("v02:0.12").ranks(tail, (D, F)) == {(0, 1, "up"): 4}
    assert parse_rule("v02:0.125").ranks(tail, (D, F)) == {(0, 1, "up"): 1}


def test_v02v02_weighs_projection_and_layer():
    spectra = {(n, 1, p): flat(10) for n in (0, 7, 8, 23, 24, 30, 31) for p in PROJECTIONS}
    ranks = parse_rule("v02v02").ranks(spectra, (256, 256), layers=32)
    by_layer = {0: 0.9, 7: 0.9, 8: 1.0, 23: 1.0, 24: 1.15, 30: 1.15, 31: 1.25}
    weights = {"gate": 1.25, "up": 1.10, "down": 1.00}
    for (layer, _, projection), rank in ranks.items():
        assert rank == math.ceil(10 * weights[projection] * by_layer[layer])
    alone = parse_rule("v02v02").ranks({(7, 1, "down"): flat(10)}, (256, 256), layers=32)
    assert alone == {(7, 1, "down"): 9}


def test_v06_weighs_similarity_within_an_expert():
    spectra = {(n, e, "down"): flat(16) for n in (1, 2, 3) for e in (1, 2)}
    rule = parse_rule("v06")
    assert rule.needs_all and rule.needs_features
    features = {key: (0.1 * key[0], 0.5 if key[1] == 1 else 3.0 - key[0]) for key in spectra}
    ranks = rule.ranks(spectra, (256, 256), layers=8, features=features)
    # Expert 1: 0.75 + 0.25 (0, 1/2, 1) + 0.25 / 2. Expert 2: scores that cancel, 1 throughout.
    layer = {1: 0.9, 2: 1.0, 3: 1.0}
    for (n, e, _), rank in ranks.items():
        weight = 0.875 + 0.125 * (n - 1) if e == 1 else 1.0
        assert rank == math.ceil(16 * layer[n] * weight)
    with pytest.raises(ValueError, match="features: no entry"):
        rule.ranks(spectra, (256, 256))


def test_similarity():
    base = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    distance, relative = rank_rules.similarity(base, base.flip(0) - base)
    assert math.isclose(distance, 1.0) and math.isclose(relative, math.sqrt(2))
    small = 1e-9 * torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    distance, relative = rank_rules.similarity(base, small)
    assert math.isclose(relative, 2e-10, rel_tol=1e-6)
    assert math.isclose(distance, 2e-20, rel_tol=1e-3)
    with pytest.raises(ValueError, match="is zero"):
        rank_rules.similarity(torch.zeros(2, 2), base)


@pytest.mark.parametrize("text", ["energy:1", "naive", "v02:1e-9"])
def test_automatic_rules_choose_full_size_where_factors_cost_more(text):
    for count in (19, 20):
        spectra = {(0, 1, "up"): flat(count)}
        ranks = parse_rule(text).ranks(spectra, (D, F))
        assert ranks == {(0, 1, "up"): 19 if count == 19 and text[0] != "v" else "full"}
    assert parse_rule(text).ranks({(0, 1, "up"): flat(0)}, (D, F)) == {(0, 1, "up"): 1}


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.06, 0.2, 0.5, 0.9, 1.0])
def test_a_budget_is_kept_and_no_worse_than_the_price_says(share, decay):
    """The concave hull at the same cost is a lower bound of the error (Everett)."""
    spectra = table(decay=decay)
    budget = int(share * len(spectra) * D * F)
    ranks = parse_rule(f"params:{budget}").ranks(spectra, (D, F))
    assert cost(ranks) <= budget
    error = squared_error(ranks, spectra)
    pieces = []
    for s in spectra.values():
        squares = s.square()
        slopes = [float(squares[r:].sum()) / (D * F - r * (D + F)) for r in range(1, 20)]
        tangent = 1 + slopes.index(min(slopes))
        pieces += [(float(squares[i]) / (D + F), D + F) for i in range(1, tangent)]
        pieces.append((min(slopes), D * F - tangent * (D + F)))
    ones = dict.fromkeys(spectra, 1)
    total, left = squared_error(ones, spectra), budget - cost(ones)
    indivisible = 0.0
    for gain, size in sorted(pieces, reverse=True):
        part = min(size, left)
        total, left = total - gain * part, left - part
        if part < size:
            indivisible = gain * size
            break
    slack = 2.0**-40
    assert total - slack <= error <= total + indivisible + slack


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_without_full_size_is_optimal(seed):
    """Against every choice, where full-size never pays: s falls to nothing before break-even."""
    torch.manual_seed(seed)
    sizes = (6, 30)  # break-even 5, ranks up to 4
    spectra = {(0, 1, p): torch.rand(4).sort(descending=True).values for p in PROJECTIONS}
    for extra in range(10):
        budget = (3 + extra) * 36 + seed
        ranks = spend(spectra, sizes, budget)
        best = min(
            squared_error(dict(zip(spectra, choice, strict=True)), spectra)
            for choice in itertools.product((1, 2, 3, 4), repeat=3)
            if sum(choice) * 36 <= budget
        )
        assert cost(ranks, sizes) <= budget
        assert math.isclose(squared_error(ranks, spectra), best, rel_tol=1e-6, abs_tol=1e-9)


def test_a_budget_takes_the_error_where_it_is():
    """One matrix of large values gets what it needs, all else rank 1; zeros are not bought."""
    spectra = table()
    first = next(iter(spectra))
    spectra = {key: 10 * flat(9) if key == first else 0.1 * flat(3) for key in spectra}
    ranks = spend(spectra, (D, F), (12 + 8 + 2) * (D + F))
    assert ranks.pop(first) == 9
    assert sum(ranks.values()) == 11 + 2
    assert set(spend(spectra, (D, F), 10**9).values()) == {9, 3}


def test_bytes_and_what_else_is_there():
    spectra = table()
    ranks = parse_rule("params:5000").ranks(spectra, (D, F))
    assert parse_rule("bytes:10000").ranks(spectra, (D, F), itemsize=2) == ranks
    assert parse_rule("bytes:20KB").ranks(spectra, (D, F), itemsize=4) == ranks
    assert parse_rule("params:5700").ranks(spectra, (D, F), other=700) == ranks
    assert parse_rule("bytes:4GiB").value == 4 * 2**30
    assert parse_rule("bytes:1.5 MB").value == 1.5e6


def test_a_budget_that_cannot_be_met_says_the_least():
    spectra = table()
    least = len(spectra) * (D + F)
    with pytest.raises(ValueError, match=f"the least is params:{least + 50}$"):
        parse_rule("params:100").ranks(spectra, (D, F), other=50)
    with pytest.raises(ValueError, match=f"the least is bytes:{2 * least}$"):
        parse_rule("bytes:100").ranks(spectra, (D, F))
    assert set(parse_rule(f"params:{least}").ranks(spectra, (D, F)).values()) == {1}


@pytest.mark.parametrize(
    "text",
    ["", "x", "fixed:", "fixed:a", "fixed:1,,2", "-3", "energy", "energy:0", "energy:1.5", "v02:x",
     "naive:3", "v01:1", "params:", "params:inf", "params:nan", "bytes:3XB", "bytes:4iB", "1.5"],
)  # fmt: skip
def test_bad_rules(text):
    with pytest.raises(ValueError, match=r"rule: got .*accepted: RANK, fixed:RANK"):
        parse_rule(text)


def test_a_fixed_rank_beyond_the_sizes():
    with pytest.raises(ValueError, match="asks for rank 33; accepted: at most 32"):
        parse_rule("33").ranks({(0, 1, "up"): None}, (D, F))


def test_rounding_does_not_raise_a_rank():
    """110 x 0.90 is 99, and 1.10 x 0.90 a little more in float64."""
    s = torch.ones(100, dtype=torch.float64)
    found = parse_rule("v02v02").ranks({(0, 1, "up"): s}, (1000, 1000), layers=8)
    assert found == {(0, 1, "up"): 99}

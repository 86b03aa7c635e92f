"""The router in closed form, against least squares on the stacked hidden states.

Traps covered: owners in any order, an expert that joins later, halves of a text, statistics of
another base or size, files that are cut or something else, float32 files.
"""

from __future__ import annotations

import pytest
import torch
from router_models import (
    D,
    assert_unchanged,
    bits,
    make_model,
    own_words,
    projected,
    rows_of,
    seen,
    some_texts,
)
from safetensors.torch import load_file, save_file

from flexmore_kernels import testing
from flexmore_kernels.router_ridge import LayerStatistics, RidgeStatistics, from_ridge
from reference import router_rows as reference


def collected(model, texts, **change):
    return {
        e: RidgeStatistics.collect(model, own, **{"base": "b", "expert": e, **change})
        for e, own in texts.items()
    }


def stacked(model, texts, layer):
    """x (T, D) of each expert's text, through that expert."""
    return [torch.cat([seen(model, doc, e)[layer] for doc in own]) for e, own in texts.items()]


def test_statistics_are_sums_over_tokens():
    model, texts = make_model(), some_texts()
    before = bits(model)
    for e, found in collected(model, texts, batch=2).items():
        assert found.tokens == sum(map(len, texts[e])) and found.base == "b"
        for n, (gram, total) in enumerate(found.layers):
            right = reference.ridge_statistics(stacked(model, {e: texts[e]}, n)[0])
            assert gram.dtype == total.dtype == torch.float64
            testing.assert_accurate(gram, right[0])
            testing.assert_accurate(total, right[1])
    assert_unchanged(model, before)


@pytest.mark.parametrize("penalty, temperature", [(1e-2, 0.1), (1.0, 2.0)])
def test_rows_are_the_least_squares_fit(penalty, temperature):
    """Solved another way: by QR, on the tokens with sqrt(l) I below them."""
    model, texts = make_model(), own_words()
    before = bits(model)
    from_ridge(model, collected(model, texts), penalty=penalty, temperature=temperature)
    assert_unchanged(model, before, but=["gate.weight"])
    for n, rows in enumerate(rows_of(model)):
        xs = stacked(model, texts, n)
        x_TD, whose = torch.cat(xs), torch.arange(len(xs)).repeat_interleave(len(xs[0]))
        strength = penalty * x_TD.square().sum() / D
        a = torch.cat([x_TD, strength.sqrt() * torch.eye(D).double()])
        y = torch.cat([torch.nn.functional.one_hot(whose).double(), torch.zeros(D, 4).double()])
        fit = torch.linalg.lstsq(a, y).solution.T
        fit = fit / fit.norm(dim=1, keepdim=True) / temperature
        testing.assert_accurate(rows, fit)
        grams, totals = zip(*map(reference.ridge_statistics, xs), strict=True)
        testing.assert_accurate(rows, reference.ridge_rows(grams, totals, penalty, temperature))
        assert (rows.norm(dim=1) * temperature - 1).abs().max() < testing.FLOAT64_SLACK


def test_tokens_reach_their_own_expert():
    model = make_model()
    from_ridge(model, collected(model, own_words(documents=20), expert=0))
    reached = [
        (torch.cat([seen(model, doc)[0] for doc in own]) @ rows_of(model)[0].T).argmax(1) == e
        for e, own in own_words().items()
    ]
    assert torch.cat(reached).double().mean() > 0.8  # by chance a quarter


def test_order_of_owners_and_who_came_later_change_nothing():
    model, texts = make_model(), some_texts()
    statistics = collected(model, texts)
    from_ridge(model, statistics)
    at_once = rows_of(model)
    from_ridge(model, {"law": statistics[3], 1: statistics[1], 0: statistics[0], 2: statistics[2]})
    assert all(map(torch.equal, rows_of(model), at_once))
    # Three experts first; the fourth joins with its own statistics, by a model that has no rows.
    from_ridge(model, {e: statistics[e] for e in (0, 1, 2)})
    assert not any(map(torch.equal, rows_of(model), at_once))
    statistics[3] = RidgeStatistics.collect(model, texts[3], base="b", expert="law")
    from_ridge(model, statistics)
    assert all(map(torch.equal, rows_of(model), at_once))
    swapped = dict(zip((2, 1, 0, 3), statistics.values(), strict=True))
    from_ridge(model, swapped)
    for rows, old in zip(rows_of(model), at_once, strict=True):
        testing.assert_accurate(rows[[2, 1, 0, 3]], old)


def test_halves_add_up():
    model, texts = make_model(), some_texts(documents=4)
    whole = RidgeStatistics.collect(model, texts[1], base="b")
    first, rest = (RidgeStatistics.collect(model, part, base="b")
                   for part in (texts[1][:2], texts[1][2:]))  # fmt: skip
    both = first + rest
    assert both.tokens == whole.tokens and both.base == "b"
    for mine, theirs in zip(both.layers, whole.layers, strict=True):
        for part, right in zip(mine, theirs, strict=True):
            testing.assert_accurate(part, right)
    other = RidgeStatistics.collect(model, texts[1], base="c")
    with pytest.raises(ValueError, match="of base 'c'; accepted: of base 'b'"):
        first + other
    with pytest.raises(TypeError):
        first + 1


def test_neither_the_amount_of_text_nor_its_unit_changes_rows():
    model, texts = make_model(), some_texts()
    statistics = collected(model, texts)
    from_ridge(model, statistics)
    once = rows_of(model)
    from_ridge(model, {e: one + one + one for e, one in statistics.items()})
    for rows, old in zip(rows_of(model), once, strict=True):
        testing.assert_accurate(rows, old)
    scaled = {
        e: RidgeStatistics([LayerStatistics(g * 49, b * 7) for g, b in one.layers], one.tokens, "b")
        for e, one in statistics.items()
    }
    from_ridge(model, scaled)
    for rows, old in zip(rows_of(model), once, strict=True):
        testing.assert_accurate(rows, old)


def test_chosen_experts_and_a_shared_one():
    model, texts = make_model(), some_texts()
    statistics, before = collected(model, texts), rows_of(model)
    from_ridge(model, statistics, experts=["code"])
    chosen = rows_of(model)
    from_ridge(model, statistics)
    for rows, one, old in zip(rows_of(model), chosen, before, strict=True):
        assert torch.equal(one[2], rows[2]) and torch.equal(one[[0, 1, 3]], old[[0, 1, 3]])
    model = make_model(shared_expert=True)
    statistics, before = collected(model, texts), rows_of(model)
    from_ridge(model, statistics)
    for rows, old in zip(rows_of(model), before, strict=True):
        assert torch.equal(rows[0], old[0]) and not (rows[1:] == old[1:]).any()


def test_a_file_brings_them_to_another_model(tmp_path):
    model, texts = make_model(), own_words()
    statistics = collected(model, texts)
    from_ridge(model, statistics)
    exact = rows_of(model)
    for dtype in (torch.float64, torch.float32):
        for e, one in statistics.items():
            one.save(tmp_path / str(dtype) / f"{e}.safetensors", dtype)
        files = {e: RidgeStatistics.load(tmp_path / str(dtype) / f"{e}.safetensors")
                 for e in statistics}  # fmt: skip
        from_ridge(model, files, base="b")
        for n, (rows, right) in enumerate(zip(rows_of(model), exact, strict=True)):
            if dtype == torch.float64:
                assert torch.equal(rows, right)
                continue
            # Rounding moves S by u |S|, which the solve amplifies by its condition, at most
            # D (1 + penalty) / penalty, and the normalisation by 2.
            bound = 2 * D / 1e-3 * 2**-24 * right.norm()
            assert (rows - right).norm() <= bound, n
    assert files[1].tokens == statistics[1].tokens and len(files[1].layers) == 2
    both = files[1] + files[2]
    assert both.layers[1].gram.dtype == torch.float64


def test_files_that_hold_something_else(tmp_path):
    path = tmp_path / "s.safetensors"
    RidgeStatistics.collect(make_model(), [[1, 2]], base="b").save(path)
    tensors, about = load_file(path), {"content": "flexmore ridge statistics", "base": "b"}

    def wrong(change, words, metadata=about):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(changed, tmp_path / "w.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=words):
            RidgeStatistics.load(tmp_path / "w.safetensors")

    wrong({}, "holds something else", {"content": "others"})
    wrong({}, "holds something else", {"content": "flexmore ridge statistics"})
    wrong({"layers.1.gram": None}, "lacks a layer")
    wrong({"tokens": None}, "lacks a layer")
    wrong({"tokens": torch.tensor([0])}, "no number of tokens")
    wrong({"layers.1.gram": torch.ones(D, 3)}, r"layer 1: has shapes \(12, 3\), \(12,\)")
    wrong({"layers.0.total": torch.full((D,), torch.nan)}, "layer 0: holds NaN or Inf")
    wrong({"layers.0.gram": -torch.eye(D)}, "negative diagonal")
    wrong({"layers.0.total": torch.ones(D, dtype=torch.int64)}, "floating-point")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        RidgeStatistics.load(path)
    with pytest.raises(FileNotFoundError):
        RidgeStatistics.load(tmp_path / "none.safetensors")


def test_bad_input():
    model, texts = make_model(), some_texts()
    statistics, before = collected(model, texts), bits(model)
    narrow = RidgeStatistics.collect(
        make_model(hidden_size=8, num_attention_heads=1), [[1]], base="b"
    )
    empty = RidgeStatistics([LayerStatistics(torch.eye(D), torch.zeros(D))] * 2, 3, "b")
    for given, change, words in (
        (statistics, {"penalty": 0.0}, "penalty: got 0.0"),
        (statistics, {"temperature": -1}, "temperature: got -1"),
        (statistics, {"base": "c"}, "of base 'b'; accepted: of base 'c'"),
        (statistics, {"base": ""}, "base: got ''"),
        ({0: statistics[0], 1: narrow}, {}, r"statistics\[1\]: got"),
        ({1: narrow}, {}, "2 layers of width 8; accepted: 2 of width 12"),
        ({1: empty}, {}, "has no solution"),
        ({1: statistics[1], 2: collected(model, {2: texts[2]}, base="c")[2]}, {}, "of base 'c'"),
        ({}, {}, "statistics: got none"),
    ):
        with pytest.raises(ValueError, match=words):
            from_ridge(model, given, **change)
    with pytest.raises(TypeError, match="RidgeStatistics"):
        from_ridge(model, {1: texts[1]})
    for change in ({"base": ""}, {"base": 3}, {"expert": "art"}, {"expert": 4}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            RidgeStatistics.collect(model, texts[1], **{"base": "b", **change})
    with pytest.raises(ValueError, match="router: got 'projected' in from_ridge"):
        from_ridge(projected(), statistics)
    assert_unchanged(model, before)

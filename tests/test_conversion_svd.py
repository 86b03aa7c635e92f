"""Decompositions against LAPACK's, at the spectra that break a Gram matrix, and their bounds.

Traps covered: singular values below the root of eps, which a Gram matrix loses; exact rank, zero,
equal and paired singular values; tall and wide; huge and tiny scales; factors that are nested, and
balanced; weights that see few directions; bounds that must hold, and a seed that decides.

A decomposition in float64 is right to some roundings of |delta|_2: TOLERANCE is 2^-40, which
`testing.FLOAT64_SLACK` allows sums. The root of eps, a Gram matrix's error, is 2^-26.
"""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels import testing
from flexmore_kernels.conversion import svd

TOLERANCE = testing.FLOAT64_SLACK
SIZE = 40
INDEX = torch.arange(SIZE, dtype=torch.float64)
SPECTRA = {
    "slow": 1 / (1 + INDEX).sqrt(),
    "steep": 10 ** (-16 * INDEX / SIZE),
    "exact_rank": (INDEX < 7).double(),
    "rank_and_noise": torch.where(INDEX < 7, 1.0, 1e-9 * (2 - INDEX / SIZE)),
    "equal": torch.ones(SIZE, dtype=torch.float64),
    "pairs": 10 ** (-6 * (INDEX // 2) / SIZE),
    "zero": torch.zeros(SIZE, dtype=torch.float64),
}


def orthonormal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]


def matrix(spectrum, out, width):
    """(out, width) with these singular values."""
    return (orthonormal(out, SIZE) * spectrum) @ orthonormal(width, SIZE).T


def moment(width, tokens):
    """E[x x^T] of that many inputs, of unlike sizes, and the inputs (tokens, width)."""
    x = torch.randn(tokens, width, dtype=torch.float64) * torch.linspace(0.1, 3, width)
    return x.T @ x / tokens, x


@pytest.mark.parametrize("shape", [(SIZE, 90), (90, SIZE), (SIZE, SIZE)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_exact_is_the_singular_value_decomposition(name, shape, device):
    spectrum = SPECTRA[name]
    delta = matrix(spectrum, *shape).to(device)
    found = svd.decompose(delta)
    u, s, vt = (part.cpu() for part in found[:3])
    size = max(1e-300, float(spectrum[0]))
    assert (found.dropped, found.bound) == (0.0, 0.0)
    assert (s.diff() <= 0).all()
    assert (s - spectrum).abs().max() <= TOLERANCE * size
    assert ((u * s) @ vt - delta.cpu()).abs().max() <= TOLERANCE * size
    # A vector is known to the rounding of delta over its singular value.
    some = spectrum > 1e-8 * size
    count = int(some.sum())
    for vectors in (u[:, some].T, vt[some]):
        off = vectors @ vectors.T - torch.eye(count)
        assert off.abs().sum() <= count**2 * 1e8 * TOLERANCE


@pytest.mark.parametrize("shape", [(SIZE, 90), (90, SIZE)], ids=str)
def test_what_a_rank_drops_is_the_norm_of_the_dropped(shape, device):
    delta = matrix(SPECTRA["slow"], *shape).to(device)
    found = svd.decompose(delta)
    for rank in (1, 5, SIZE - 1, SIZE):
        a, b = svd.factor_pair(found, rank, torch.float64)
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        dropped = float((delta - b @ a).norm())
        assert abs(dropped - float(SPECTRA["slow"][rank:].norm())) <= TOLERANCE
        assert abs(dropped - svd.error(found, rank)) <= TOLERANCE
        cut = svd.decompose(delta, rank=rank)
        assert cut.s.shape == (rank,)
        assert abs(cut.dropped - dropped) <= TOLERANCE
        assert abs(svd.error(cut, 0) - float(SPECTRA["slow"].norm())) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_are_balanced_and_nested(dtype):
    found = svd.decompose(matrix(SPECTRA["slow"], 60, SIZE))
    a, b = svd.factor_pair(found, 9, dtype)
    root = found.s[:9].sqrt()
    same = [(root[:, None] * found.vt[:9]).to(dtype), (root * found.u[:, :9]).to(dtype)]
    testing.assert_accurate(a, root[:, None] * found.vt[:9], same[0])
    testing.assert_accurate(b, root * found.u[:, :9], same[1])
    small = svd.factor_pair(found, 4, dtype)
    testing.assert_same(small[0], a[:4])
    testing.assert_same(small[1], b[:, :4])
    assert a.is_contiguous() and b.is_contiguous()


def test_a_zero_piece_gives_zero_factors():
    found = svd.decompose(torch.zeros(6, 9))
    assert [float(t.abs().sum()) for t in svd.factor_pair(found, 6, torch.float32)] == [0, 0]


@pytest.mark.parametrize("scale", [2.0**-900, 2.0**900], ids=["tiny", "huge"])
def test_scale_does_not_matter(scale):
    delta = matrix(SPECTRA["slow"], SIZE, 60)
    one, other = svd.decompose(delta), svd.decompose(delta * scale)
    testing.assert_same(other.s, one.s * scale)
    testing.assert_same(other.vt, one.vt)
    drawn = [svd.decompose(m, rank=4, method="randomized") for m in (delta, delta * scale)]
    assert drawn[1].bound == drawn[0].bound * scale
    testing.assert_same(svd.singular_values(delta * scale), svd.singular_values(delta) * scale)


@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_alone(name, device):
    spectrum = SPECTRA[name]
    s = svd.singular_values(matrix(spectrum, 90, SIZE).to(device)).cpu()
    allowed = torch.maximum(2.0**-20 * spectrum, TOLERANCE * spectrum[0])
    assert ((s - spectrum).abs() <= allowed).all()


@pytest.mark.parametrize("shape", [(200, 330), (330, 200)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0, 8.0])
def test_randomized_error_is_what_is_dropped_and_the_bound_holds(shape, decay, device):
    """8.0: singular values below the rounding of the largest are among those drawn."""
    spectrum = torch.arange(1, 201, dtype=torch.float64) ** -decay
    delta = ((orthonormal(shape[0], 200) * spectrum) @ orthonormal(shape[1], 200).T).to(device)
    rank = 24
    found = svd.decompose(delta, rank=rank, method="randomized")
    assert found.s.shape == (rank,) and found.bound > 0
    for r in (1, rank // 2, rank):
        a, b = svd.factor_pair(found, r, torch.float64)
        error, least = svd.error(found, r), float(spectrum[r:].norm())
        assert abs(float((delta - b @ a).norm()) - error) <= TOLERANCE
        assert least - TOLERANCE <= error <= least + found.bound + TOLERANCE
        # Three power iterations: never one part in fifty above the least, here.
        assert error <= 1.02 * least + TOLERANCE
    off = found.u.T @ found.u - torch.eye(rank, dtype=torch.float64, device=device)
    assert off.abs().max() <= TOLERANCE


@pytest.mark.parametrize("rank", [3, 12])
def test_randomized_of_fewer_pieces_than_asked_for(rank):
    """Columns drawn lie in a space of four: no Cholesky factorisation of their products exists."""
    delta = (orthonormal(100, 4) * torch.tensor([4.0, 3.0, 2.0, 1.0])) @ orthonormal(150, 4).T
    found = svd.decompose(delta, rank=rank, method="randomized")
    a, b = svd.factor_pair(found, rank, torch.float64)
    assert abs(float((delta - b @ a).norm()) - svd.error(found, rank)) <= TOLERANCE
    assert abs(svd.error(found, rank) - (1.0 if rank == 3 else 0.0)) <= TOLERANCE
    off = found.u.T @ found.u - torch.eye(rank, dtype=torch.float64)
    assert off.abs().max() <= TOLERANCE


def test_the_bound_is_of_some_use():
    """Sixteen large singular values and equal small ones: the least is known to 5 %."""
    spectrum = torch.where(torch.arange(300) < 16, 1.0, 0.01).double()
    delta = (orthonormal(300, 300) * spectrum) @ orthonormal(400, 300).T
    found = svd.decompose(delta, rank=16, method="randomized")
    assert found.bound <= 0.05 * svd.error(found, 16)


def test_randomized_is_the_same_twice_and_exact_where_much_is_drawn():
    delta = torch.randn(120, 160)
    runs = [svd.decompose(delta, rank=5, method="randomized") for _ in range(2)]
    testing.assert_same(runs[0].vt, runs[1].vt)
    seeds = [
        svd.decompose(
            delta, rank=5, method="randomized", generator=torch.Generator().manual_seed(n)
        )
        for n in (1, 1, 2)
    ]
    testing.assert_same(seeds[0].u, seeds[1].u)
    assert not torch.equal(seeds[0].u, seeds[2].u)
    exact = svd.decompose(delta, rank=60)
    much = svd.decompose(delta, rank=60, method="randomized")
    testing.assert_same(much.s, exact.s)
    assert much.bound == 0.0


@pytest.mark.parametrize("method", svd.METHODS)
@pytest.mark.parametrize("shape", [(80, 110), (110, 80)], ids=str)
@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_weighted_by_inputs(form, shape, method, device):
    """The error is of outputs, no plain truncation has a smaller one, and all pieces are delta."""
    spectrum = 1 / (1 + torch.arange(80, dtype=torch.float64))
    delta = (orthonormal(shape[0], 80) * spectrum) @ orthonormal(shape[1], 80).T
    full, x = moment(shape[1], 400)
    weight = full if form == "full" else full.diagonal()
    root = torch.linalg.cholesky(full) if form == "full" else weight.sqrt().diag()
    found = svd.decompose(delta.to(device), rank=9, method=method, second_moment=weight.to(device))
    plain = svd.decompose(delta)
    least = torch.linalg.svdvals(delta @ root)
    # The second moment has 2^-26 of its mean added, which moves an error by half of that.
    damping = 2.0**-26 * float(delta.norm() * weight.sum().sqrt())
    for rank in (2, 9):
        a, b = (t.cpu() for t in svd.factor_pair(found, rank, torch.float64))
        rest = delta - b @ a
        if form == "full":
            mean = (rest @ x.T).square().sum() / len(x)
            assert abs(float(mean.sqrt()) - svd.error(found, rank)) <= damping
        assert abs(float((rest @ root).norm()) - svd.error(found, rank)) <= damping
        floor = float(least[rank:].norm())
        assert floor - damping <= svd.error(found, rank) <= floor + found.bound + damping
        a, b = svd.factor_pair(plain, rank, torch.float64)
        assert svd.error(found, rank) < float(((delta - b @ a) @ root).norm())
    if method == "exact":
        everything = svd.decompose(delta.to(device), second_moment=weight.to(device))
        product = ((everything.u * everything.s) @ everything.vt).cpu()
        assert (product - delta).abs().max() <= 2.0**14 * TOLERANCE
        s = svd.singular_values(delta.to(device), weight.to(device)).cpu()
        assert ((s - everything.s.cpu()).abs() <= 2.0**-20 * s + TOLERANCE * s[0]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weighted_by_fewer_inputs_than_directions(dtype):
    """In float32 the rounded moment has eigenvalues below zero."""
    full, x = moment(50, 12)
    full = full.to(dtype)
    delta = torch.randn(30, 50, dtype=torch.float64)
    a, b = svd.factor_pair(svd.decompose(delta, second_moment=full), 12, torch.float64)
    # Twelve inputs: rank 12 gives every one of them its output, but for what damping costs.
    size = float((delta @ x.T).norm())
    assert float(((delta - b @ a) @ x.T).norm()) <= 2.0**-12 * size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": torch.ones(3)}, r"delta: got shape \(3,\)"),
        ({"delta": torch.ones(3, 0)}, "delta: got shape"),
        ({"delta": torch.tensor([[1.0, float("nan")]])}, "delta: holds NaN or Inf"),
        ({"rank": 4}, "rank: got 4; accepted: "),
        ({"method": "fast"}, "method: got 'fast'"),
        ({"method": "randomized"}, "rank: got None"),
        ({"second_moment": torch.ones(3)}, "second_moment: got shape"),
        ({"second_moment": -torch.ones(5)}, "second_moment: accepted"),
        ({"second_moment": torch.zeros(5)}, "second_moment: accepted"),
        ({"second_moment": torch.ones(5, 5) - 2 * (1 - torch.eye(5))}, "not positive semidefinite"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        svd.decompose(**{"delta": torch.ones(3, 5), **arguments})


def test_bad_input_of_the_others():
    found = svd.decompose(torch.randn(4, 6), rank=3)
    with pytest.raises(ValueError, match="rank: got 4"):
        svd.factor_pair(found, 4, torch.float32)
    with pytest.raises(ValueError, match="rank: got 4"):
        svd.error(found, 4)
    with pytest.raises((ValueError, TypeError), match="dtype"):
        svd.factor_pair(found, 3, torch.int32)
    with pytest.raises(TypeError, match="delta: got dtype int64"):
        svd.decompose(torch.ones(3, 4, dtype=torch.int64))

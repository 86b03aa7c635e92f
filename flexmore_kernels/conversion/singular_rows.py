"""Orthogonal directions Q (k, m) of a matrix M (k, n), k <= n, such that rows of w = Q^T M are
orthogonal and descend: rows of w are the right singular vectors times the singular values.

Exact. The eigenvectors of M M^T, in float64: products, and an eigenproblem of size k, which has
less work than a bidiagonal SVD, and less of it in matrix-vector products and rotations. Two things
make good what squaring loses:
  * s_i is taken as the norm of row i of w, not as a root of an eigenvalue, and Q is orthogonal. So
    the norm of what rank r drops, Q_{>r} w_{>r}, is that of the dropped s, to rounding, however
    wrong Q may be.
  * Q is wrong only where M M^T hides small rows behind large ones: rows i and j of w have a cosine
    of about eps s_1^2 / (s_i s_j). So eigenvectors are kept for s >= 2^-10 of the largest; those of
    the rest come from an eigenproblem of their own, of smaller numbers, and so on; last, every pair
    of rows is turned by the angle that is left, to first order, where their norms differ enough.
With C the cosines, w w^T = D C D and each s_i has the relative error |C - I|_2 at most (Ostrowski),
beside the rounding of Q^T M, a few eps s_1, which a bidiagonal SVD has too.

Randomised: the same within the range of (M M^T)^p M G, with G Gaussian, of some more columns than
the rank (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1). What is outside of that range is
computed, not estimated, and `_shortfall` bounds what a better range could have caught of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_GRAM_SAFE = 2.0**-16
"""Above this, of the largest, singular values from a Gram matrix are right to about 2^-20."""
_STAGE = 2.0**-10
"""Smaller rows, of the largest, wait for the next eigenproblem: within one, cosines that come from
eps = 2^-52 stay below about 2^-32."""
_SMALL_ANGLE = 2.0**-10
"""Up to this, angles are turned, to first order. Between rows of unlike norms they are far smaller;
larger ones are between norms so alike that neither direction is better."""
_POWER = 3
"""Power iterations of the range finder, for spectra that fall slowly (section 4.5 there)."""


class SingularRows(NamedTuple):
    """q (k, m) orthonormal, rows (m, n) = q^T M, norms (m,) descending; outside: |M - q rows|_F;
    bound: as in `svd.Decomposition`."""

    q: Tensor
    rows: Tensor
    norms: Tensor
    outside: float
    bound: float


def exact_rows(matrix: Tensor) -> SingularRows:
    """All k rows of a float64 matrix (k, n)."""
    q, rows, start = _identity(matrix), matrix, 0
    smallest = torch.finfo(matrix.dtype).eps * max(matrix.shape)
    largest = None
    while start < matrix.shape[0]:
        vectors = torch.linalg.eigh(rows[start:] @ rows[start:].T)[1].flip(1)
        rows = torch.cat([rows[:start], vectors.T @ rows[start:]])
        q = torch.cat([q[:, :start], q[:, start:] @ vectors], 1)
        norms = rows[start:].norm(dim=1)
        largest = norms.max() if largest is None else largest
        if norms.max() <= smallest * largest:
            break  # rounding of the first product: no direction is better than another
        start += int((norms >= _STAGE * norms.max()).sum())
    turn = _small_rotation(rows @ rows.T)
    q, rows = q @ turn, turn.T @ rows
    norms, order = rows.norm(dim=1).sort(descending=True, stable=True)
    return SingularRows(q[:, order], rows[order], norms, 0.0, 0.0)


def randomized_rows(matrix: Tensor, rank: int, generator: torch.Generator | None) -> SingularRows:
    """About the first `rank` rows of a float64 matrix (k, n), and a bound of how far they may be
    from the best. `exact_rows`, cut, where the columns drawn would be most of k."""
    drawn = rank + max(16, rank // 4)
    if 2 * drawn > matrix.shape[0]:
        return cut_rows(exact_rows(matrix), rank)
    if generator is None:
        generator = torch.Generator(matrix.device).manual_seed(0)
    shape = (matrix.shape[1], drawn)
    gaussian = torch.randn(
        shape, generator=generator, dtype=matrix.dtype, device=generator.device
    ).to(matrix.device)
    basis = _orthonormal(matrix @ gaussian)
    for _ in range(_POWER):
        basis = _orthonormal(matrix @ (matrix.T @ basis))
    inside = exact_rows(basis.T @ matrix)
    found = inside._replace(q=basis @ inside.q)
    rest = matrix - found.q @ found.rows
    outside = float(rest.norm())
    dropped = _tail_norms(found.norms, outside)[1 : rank + 1]
    least = (dropped.square() - _shortfall(rest, outside, rank)).clamp_min(0).sqrt()
    bound = float((dropped - least).max())
    return cut_rows(found._replace(outside=outside, bound=bound), rank)


def singular_norms(matrix: Tensor) -> Tensor:
    """The norms alone, for k <= n; right to the relative error 2^-20 or to a few eps s_1.

    Eigenvalues of M M^T have the absolute error eps s_1^2; where some s are too small for that, all
    rows after all.
    """
    norms = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp_min(0).sqrt()
    return exact_rows(matrix).norms if norms[-1] < _GRAM_SAFE * norms[0] else norms


def scaled(name: str, tensor: Tensor) -> tuple[Tensor, float]:
    """tensor / scale in float64 and scale, a power of two near the largest entry, so that squares
    stay within float64's range. ValueError for NaN or Inf."""
    if tensor.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; accepted: no size 0")
    values = tensor.detach().double()
    largest = float(values.abs().max())
    if not math.isfinite(largest):
        raise ValueError(f"{name}: holds NaN or Inf; accepted: finite numbers")
    scale = math.ldexp(1.0, math.frexp(largest)[1]) if largest else 1.0
    return values / scale, scale


def wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where that has fewer rows."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def cut_rows(found: SingularRows, rank: int) -> SingularRows:
    """The first `rank` of them; the others' norm joins what is outside."""
    outside = float(_tail_norms(found.norms, found.outside)[rank])
    return SingularRows(
        found.q[:, :rank], found.rows[:rank], found.norms[:rank], outside, found.bound
    )


def _tail_norms(norms: Tensor, outside: float) -> Tensor:
    """(m + 1,): entry r is the norm of what is dropped when r rows are kept."""
    squares = torch.cat([norms, norms.new_tensor([outside])]).square()
    return squares.flip(0).cumsum(0).flip(0).sqrt()


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of these (k, m) columns: two Cholesky factorisations of their products,
    which is matrix products nearly alone, or Householder's where they are close to dependent."""
    found = columns
    for _ in range(2):
        root, fault = torch.linalg.cholesky_ex(found.T @ found)
        if int(fault):
            return torch.linalg.qr(columns)[0]
        found = torch.linalg.solve_triangular(root, found.T, upper=False).T
    # The second was of nearly orthonormal columns, so its root is close to 1, or it was in vain.
    close = bool((root - _identity(root)).norm() < 0.5)
    return found if close else torch.linalg.qr(columns)[0]


def _small_rotation(products: Tensor) -> Tensor:
    """The orthogonal matrix that removes inner products e_ij between rows of squared norms d_i.

    To first order in the angles x_ij = e_ij / (d_j - d_i); pairs with a larger angle stay: their
    norms are alike, and a cosine c changes singular values by the factor 1 +- c at most. The Cayley
    transform of a skew matrix is orthogonal to rounding, whatever its size.
    """
    products = (products + products.T) / 2  # to the last bit: else skew is not skew
    squares = products.diagonal()
    gap = squares[None, :] - squares[:, None]
    small = products.abs() < _SMALL_ANGLE * gap.abs()
    skew = torch.where(small, products / gap, 0.0) / 2
    identity = _identity(products)
    return torch.linalg.solve(identity - skew, identity + skew)


def _shortfall(rest: Tensor, outside: float, rank: int) -> Tensor:
    """(rank,): how much larger the sum of the first r squared singular values of M may be than
    that of the r squared norms found, for r = 1 .. rank.

    M = q rows + rest with q^T rest = 0, so M^T M = rows^T rows + rest^T rest, and by Ky Fan the
    excess is at most the sum of the r largest eigenvalues l of rest rest^T. That is at most their
    whole sum, |rest|_F^2, and by Hoelder at most r^(1-1/p) (sum l^p)^(1/p); p = 16 costs three
    products of size k, and is above the truth by (k / r)^(1/16) at most.
    """
    gram = rest @ rest.T
    scale = gram.diagonal().sum().clamp_min(torch.finfo(gram.dtype).tiny)
    gram = gram / scale
    for _ in range(3):
        gram = gram @ gram
    power_norm = gram.norm() ** (1 / 8) * scale
    counts = torch.arange(1, rank + 1, dtype=rest.dtype, device=rest.device)
    return (power_norm * counts ** (1 - 1 / 16)).clamp_max(outside**2)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[0], dtype=like.dtype, device=like.device)

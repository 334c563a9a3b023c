"""The algebra of products of thin factors, in which no out × in matrix is formed while the factors are smaller.

A LoRA pair changes a layer's weight by ΔW = s·BA, with B out × r, A r × in and s = α/r. The average that is meant,
Σ pᵢsᵢBᵢAᵢ, has rank up to Σrᵢ, and B̄Ā is not it. Here:

    stacked      [B₁ … B_k]·[p₁s₁A₁; …; p_ks_kA_k] = Σ pᵢsᵢBᵢAᵢ, exactly (Wang et al. 2024, arXiv:2409.05976)
    residual     Σ pᵢsᵢBᵢAᵢ − s·B̄Ā as factors (Singhal et al. 2024, arXiv:2410.09432)
    shortened    the same product with an inner size of no more than its rank, before it is sent
    SVD          B = Q_B R_B and Aᵀ = Q_A R_A, so BA = Q_B (R_B R_Aᵀ) Q_Aᵀ: the SVD of the small core gives all of it

All is computed in float64, whatever the factors are held in. With n = Σrᵢ, an SVD takes O((out + in)·n² + n³) time and
O((out + in)·n) memory; the dense way takes O(out·in·min(out, in)) and O(out·in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """One layer's change of weight, scale·BA.

    Args:
        B: out × r.
        A: r × in.
        scale: s, dimensionless: LoRA's α/r, or α/√r.

    Raises:
        ValueError: B and A are not matrices whose inner sizes agree.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"B {list(self.B.shape)} times A {list(self.A.shape)} is no product of matrices")

    @property
    def rank(self) -> int:
        """r, the inner size: the product's rank is at most that."""
        return self.A.shape[0]


def stacked(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """B = [B₁ … B_k], A = [p₁s₁A₁; …], float64, of scale 1: BA = Σ pᵢsᵢBᵢAᵢ. Ranks and scales may differ.

    Raises:
        ValueError: no factors, another number of weights, or layers of different sizes.
    """
    if not factors or len(factors) != len(weights):
        raise ValueError(f"{len(factors)} pairs of factors and {len(weights)} weights: as many of both, at least one")
    sizes = {(one.B.shape[0], one.A.shape[1]) for one in factors}
    if len(sizes) > 1:
        raise ValueError(f"factors of layers of different sizes (out, in): {sorted(sizes)}")
    return Factors(
        torch.cat([one.B.double() for one in factors], dim=1),
        torch.cat([one.A.double() * (weight * one.scale) for one, weight in zip(factors, weights, strict=True)]),
    )


def mean(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """B̄ = Σ pᵢBᵢ and Ā = Σ pᵢAᵢ, float64, with the scale of all.

    Raises:
        ValueError: no factors, or different ranks or scales, of which no mean can be taken.
    """
    kinds = {(one.rank, one.scale) for one in factors}
    if len(kinds) != 1:
        raise ValueError(f"factors of one rank and scale have a mean; these have (rank, scale) {sorted(kinds)}")
    pairs = list(zip(factors, weights, strict=True))
    return Factors(
        sum((one.B.double() * weight for one, weight in pairs[1:]), pairs[0][0].B.double() * pairs[0][1]),
        sum((one.A.double() * weight for one, weight in pairs[1:]), pairs[0][0].A.double() * pairs[0][1]),
        factors[0].scale,
    )


def residual(factors: Sequence[Factors], weights: Sequence[float], average: Factors) -> Factors:
    """Σ pᵢsᵢBᵢAᵢ − s·B̄Ā, float64, of scale 1; its inner size is Σrᵢ + r, and (k + 1)·r if all have one rank r.

    If `average` is their `mean` and Σ pᵢ = 1, this is s·Σ pᵢ(Bᵢ − B̄)(Aᵢ − Ā): of rank (k − 1)·r at most, to which
    `svd_of_product` shortens it without loss before it is sent.

    Raises:
        ValueError: layers of different sizes.
    """
    return stacked([*factors, average], [*weights, -1.0])


def svd_of_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The truncated SVD of BA: U (out × m), S (m, falling), Vᵀ (m × in), float64, with m = min(rank, out, in, inner).

    U·diag(S)·Vᵀ is the matrix of rank m nearest to BA (Eckart and Young 1936). U and V have orthonormal columns, also
    where BA has a lower rank than m; the columns that belong to S = 0 are then any.

    Args:
        B: out × inner.
        A: inner × in.
        rank: how many singular values are wanted, at least 1.

    Raises:
        ValueError: rank is less than 1.
        torch.linalg.LinAlgError: B or A holds NaN or infinity, or they are so large that the product does.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: at least one singular value must be asked for")
    left, right = _Orthogonal(B.double()), _Orthogonal(A.double().T)
    u, s, vt = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.times(u[:, :rank]), s[:rank], right.times(vt[:rank].T).T


def shortened(factors: Factors, rank: int) -> Factors:
    """The same product from its SVD, float64, of scale 1: B = U·diag(S), A = Vᵀ, with an inner size of at most `rank`.

    Directions that lie below the rounding of the product's own terms, ε·‖B‖·‖A‖, are left out: where the terms cancel
    they hold nothing else. So nothing is lost as long as the product's rank is not larger than `rank`; and since every
    column is a mixture of all the sites', none shows a single site's factors.

    Raises:
        torch.linalg.LinAlgError: as `svd_of_product`.
    """
    B, A = factors.B.double(), factors.A.double() * factors.scale
    u, s, vt = svd_of_product(B, A, max(1, rank))
    rounding = torch.finfo(s.dtype).eps * float(torch.linalg.matrix_norm(B)) * float(torch.linalg.matrix_norm(A))
    kept = min(rank, int((s > rounding).sum()))
    return Factors(u[:, :kept] * s[:kept], vt[:kept])


def capped(factors: Factors) -> Factors:
    """The same product, of scale 1, with an inner size of at most out and in: as it is, or else as W·I or I·W.

    The one place where a dense product is formed: it is smaller than factors with a larger inner size are.
    """
    B, A = factors.B.double(), factors.A.double() * factors.scale
    if factors.rank <= min(B.shape[0], A.shape[1]):
        return Factors(B, A)
    identity = torch.eye(min(B.shape[0], A.shape[1]), dtype=B.dtype)
    return Factors(identity, B @ A) if len(identity) == B.shape[0] else Factors(B @ A, identity)


def frobenius_of_product(B: Tensor, A: Tensor) -> float:
    """‖BA‖_F, from ‖BA‖² = Σⱼₖ (BᵀB)ⱼₖ(AAᵀ)ⱼₖ: two matrices of the inner size.

    Where the terms of BA cancel, what is left is known to some 1e-8 of the terms; `product_difference_norm` is exacter.
    """
    wide_b, wide_a = B.double(), A.double()
    return math.sqrt(max(0.0, ((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum().item()))


def product_difference_norm(one: Factors, other: Factors) -> float:
    """‖s₁B₁A₁ − s₂B₂A₂‖_F, to some 1e-15 of the products themselves: through QR, which squares nothing.

    Raises:
        ValueError: layers of different sizes.
    """
    both = stacked([one, other], [1.0, -1.0])
    return float(torch.linalg.matrix_norm(_Orthogonal(both.B).R @ _Orthogonal(both.A.T).R.T))


class _Orthogonal:
    """X = QR by Householder reflections; Q, which is as large as X, stays unformed until something is multiplied."""

    def __init__(self, X: Tensor) -> None:
        self._reflections, self._tau = torch.geqrf(X)
        self.R = self._reflections[: min(X.shape)].triu()

    def times(self, Y: Tensor) -> Tensor:
        """QY, for a Y of as many rows as R; costs as many columns as Y has, not as Q."""
        padded = Y.new_zeros(self._reflections.shape[0], Y.shape[1])
        padded[: Y.shape[0]] = Y
        return torch.ormqr(self._reflections, self._tau, padded)

"""The algebra of factors against dense float64 products in NumPy, on layers whose two sides differ.

Only products are compared, never factors: B·A = (B·M)(M⁻¹·A) for any invertible M.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from commonweight.model.shapes import matrices
from commonweight.model.tensors import Layout
from commonweight.strategies.lora.factors import (
    Factors,
    capped,
    frobenius_of_product,
    mean,
    product_difference_norm,
    residual,
    shortened,
    stacked,
    svd_of_product,
)

Array = NDArray[np.float64]

OUT, IN = 23, 14
#: of each site: rank, scale s, weight (not normalised)
SITES = ((3, 2.0, 5.0), (5, 0.5, 1.0), (2, 16 / 3, 11.0), (4, 1.0, 2.5))
SHAPES = [(23, 14), (14, 23), (9, 31)]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sites_of(
    out: int, inner: int, sites: Sequence[tuple[int, float, float]] = SITES
) -> tuple[list[Factors], list[float]]:
    factors = [
        Factors(drawn(10 * i, out, rank), drawn(10 * i + 1, rank, inner), scale)
        for i, (rank, scale, _) in enumerate(sites)
    ]
    total = sum(weight for _, _, weight in sites)
    return factors, [weight / total for _, _, weight in sites]


def dense(factors: Factors) -> Array:
    B, A = (np.asarray(tensor.to(torch.float64)) for tensor in (factors.B, factors.A))
    product: Array = factors.scale * (B @ A)
    return product


def dense_sum(factors: Sequence[Factors], weights: Sequence[float]) -> Array:
    total = np.zeros((factors[0].B.shape[0], factors[0].A.shape[1]))
    for one, weight in zip(factors, weights, strict=True):
        total += weight * dense(one)
    return total


def nearest_of_rank(W: Array, rank: int) -> Array:
    """Eckart and Young: the nearest matrix of a rank, from the dense SVD."""
    u, s, vt = np.linalg.svd(W, full_matrices=False)
    product: Array = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return product


def relative(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("out", "inner"), SHAPES)
@pytest.mark.parametrize("absent", [None, 2])
def test_stacked_product_is_the_weighted_sum_of_products_of_mixed_ranks_and_scales(
    out: int, inner: int, absent: int | None
) -> None:
    factors, weights = sites_of(out, inner, [site for i, site in enumerate(SITES) if i != absent])
    total = stacked(factors, weights)
    assert total.rank == sum(one.rank for one in factors)
    assert total.scale == 1.0
    assert total.B.dtype == total.A.dtype == torch.float64
    assert relative(dense(total), dense_sum(factors, weights)) < 1e-14


def test_stacked_leaves_its_inputs_as_they_were() -> None:
    factors, weights = sites_of(OUT, IN)
    before = [(one.B.clone(), one.A.clone()) for one in factors]
    total = stacked(factors, weights)
    total.B.zero_()
    total.A.zero_()
    assert all(torch.equal(one.B, B) and torch.equal(one.A, A) for one, (B, A) in zip(factors, before, strict=True))


@pytest.mark.parametrize(("out", "inner"), SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 100])
def test_svd_of_product_is_the_nearest_matrix_of_its_rank_with_orthonormal_sides(
    out: int, inner: int, rank: int
) -> None:
    factors, weights = sites_of(out, inner)
    W = dense_sum(factors, weights)
    total = stacked(factors, weights)
    u, s, vt = svd_of_product(total.B, total.A, rank)

    m = min(rank, out, inner, total.rank)
    assert (u.shape, s.shape, vt.shape) == ((out, m), (m,), (m, inner))
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(W, compute_uv=False)[:m], rtol=1e-12)
    assert relative((u * s @ vt).numpy(), nearest_of_rank(W, rank)) < 1e-12
    np.testing.assert_allclose((u.T @ u).numpy(), np.eye(m), atol=1e-13)
    np.testing.assert_allclose((vt @ vt.T).numpy(), np.eye(m), atol=1e-13)


def test_svd_of_a_product_that_is_zero_since_b_is_zero_has_zero_values_and_orthonormal_sides() -> None:
    u, s, vt = svd_of_product(torch.zeros(OUT, 4), drawn(1, 4, IN), 3)
    assert torch.equal(s, torch.zeros(3, dtype=torch.float64))
    np.testing.assert_allclose((u.T @ u).numpy(), np.eye(3), atol=1e-13)
    np.testing.assert_allclose((vt @ vt.T).numpy(), np.eye(3), atol=1e-13)


def test_svd_of_rank_deficient_factors_finds_the_product_and_no_more_than_its_rank() -> None:
    B = drawn(1, OUT, 2) @ drawn(2, 2, 6)  # rank 2 in 6 columns
    A = drawn(3, 6, IN)
    A[3:] = A[:3]  # rank 3 in 6 rows
    u, s, vt = svd_of_product(B, A, 5)
    W = np.asarray(B.double()) @ np.asarray(A.double())
    assert relative((u * s @ vt).numpy(), W) < 1e-6  # B was rounded to float32: not of rank 2 to the last bit
    assert s[1] > 1e-2 * s[0]
    assert s[2] < 1e-6 * s[0]


def test_a_small_singular_value_is_found_beside_one_ten_orders_larger() -> None:
    left = torch.linalg.qr(drawn(1, OUT, 2, dtype=torch.float64)).Q
    right = torch.linalg.qr(drawn(2, IN, 2, dtype=torch.float64)).Q
    _, s, _ = svd_of_product(left * torch.tensor([1.0, 1e-10], dtype=torch.float64), right.T, 2)
    np.testing.assert_allclose(s.numpy(), [1.0, 1e-10], rtol=1e-5)  # Gram matrices would have lost it below 1e-8


def test_svd_of_product_does_not_depend_on_how_the_product_is_shared_by_its_factors() -> None:
    B, A = drawn(1, OUT, 4, dtype=torch.float64), drawn(2, 4, IN, dtype=torch.float64)
    M = drawn(3, 4, 4, dtype=torch.float64) + 3 * torch.eye(4, dtype=torch.float64)
    one, other = (
        (u * s @ vt).numpy()
        for u, s, vt in (svd_of_product(B, A, 2), svd_of_product(-B @ M, -torch.linalg.inv(M) @ A, 2))
    )
    assert relative(one, other) < 1e-12


@pytest.mark.parametrize(("out", "inner"), SHAPES)
def test_norms_of_products_and_of_their_differences_are_those_of_the_dense_matrices(out: int, inner: int) -> None:
    factors, weights = sites_of(out, inner)
    one, other = factors[0], factors[2]  # of different ranks and scales
    assert frobenius_of_product(one.B, one.A) == pytest.approx(np.linalg.norm(dense(one)) / one.scale, rel=1e-13)
    expected = np.linalg.norm(dense(one) - dense(other))
    assert product_difference_norm(one, other) == pytest.approx(expected, rel=1e-13)
    total = stacked(factors, weights)
    assert frobenius_of_product(total.B, total.A) == pytest.approx(np.linalg.norm(dense(total)), rel=1e-12)


@pytest.mark.parametrize(("out", "inner"), SHAPES)
def test_shortened_factors_have_the_same_product_and_no_more_columns_than_its_rank(out: int, inner: int) -> None:
    factors, weights = sites_of(out, inner)
    total = stacked([*factors, *factors], [*weights, *weights])  # each direction twice
    short = shortened(total, total.rank)
    assert short.rank == min(out, inner, sum(one.rank for one in factors)) < total.rank
    assert short.scale == 1.0
    assert relative(dense(short), dense(total)) < 1e-13
    assert relative(dense(shortened(total, 2)), nearest_of_rank(dense(total), 2)) < 1e-13
    assert shortened(total, 0).rank == 0


def test_shortened_factors_hold_nothing_where_all_cancels_but_keep_what_is_small() -> None:
    B, A = drawn(1, OUT, 4, dtype=torch.float64), drawn(2, 4, IN, dtype=torch.float64)
    nothing = stacked([Factors(B, A), Factors(B, A)], [1.0, -1.0])
    zero = Factors(torch.zeros(OUT, 1), torch.zeros(1, IN))
    assert product_difference_norm(shortened(nothing, 8), zero) < 1e-14 * frobenius_of_product(B, A)
    assert shortened(Factors(torch.zeros(OUT, 4), A), 4).rank == 0
    small = stacked([Factors(B, A), Factors(B, A), Factors(drawn(3, OUT, 1), drawn(4, 1, IN))], [1.0, -1.0, 1e-10])
    assert relative(dense(shortened(small, 1)), 1e-10 * dense(Factors(drawn(3, OUT, 1), drawn(4, 1, IN)))) < 1e-4


@pytest.mark.parametrize(("out", "inner"), SHAPES)
@pytest.mark.parametrize("repeats", [1, 4])
def test_capped_factors_have_the_same_product_in_no_more_numbers_than_the_layer_needs(
    out: int, inner: int, repeats: int
) -> None:
    factors, weights = sites_of(out, inner)
    total = stacked(factors * repeats, weights * repeats)
    small = capped(Factors(total.B, total.A, scale=0.5))
    assert small.rank == min(out, inner, total.rank)
    assert small.scale == 1.0
    assert relative(dense(small), 0.5 * dense(total)) < 1e-14


def test_norm_of_a_product_with_b_zero_is_zero() -> None:
    assert frobenius_of_product(torch.zeros(OUT, 3), drawn(1, 3, IN)) == 0.0


def test_equal_products_of_different_factors_differ_by_nothing_but_rounding() -> None:
    B, A = drawn(1, OUT, 4, dtype=torch.float64), drawn(2, 4, IN, dtype=torch.float64)
    M = drawn(3, 4, 4, dtype=torch.float64) + 3 * torch.eye(4, dtype=torch.float64)
    same = Factors(-2 * B @ M, torch.linalg.inv(M) @ A, scale=-0.5)
    assert product_difference_norm(Factors(B, A), same) < 1e-13 * frobenius_of_product(B, A)


@pytest.mark.parametrize(("out", "inner"), SHAPES)
@pytest.mark.parametrize("absent", [None, 1])
def test_residual_is_what_the_average_of_the_factors_lacks_of_the_average_of_the_products(
    out: int, inner: int, absent: int | None
) -> None:
    alike = [(3, 2.0, weight) for i, (_, _, weight) in enumerate(SITES) if i != absent]
    factors, weights = sites_of(out, inner, alike)
    average = mean(factors, weights)
    lacking = residual(factors, weights, average)

    B = np.sum([w * np.asarray(one.B.double()) for one, w in zip(factors, weights, strict=True)], axis=0)
    A = np.sum([w * np.asarray(one.A.double()) for one, w in zip(factors, weights, strict=True)], axis=0)
    W = dense_sum(factors, weights)
    assert relative(dense(lacking), W - 2.0 * B @ A) < 1e-13
    assert lacking.rank == (len(factors) + 1) * 3
    assert np.linalg.norm(dense(lacking)) > 0.1 * np.linalg.norm(W)  # the plain average is far off here


def test_residual_of_k_sites_is_a_covariance_of_rank_k_minus_1_times_r_and_can_be_sent_as_that() -> None:
    factors, weights = sites_of(OUT, IN, [(3, 2.0, 1.0), (3, 2.0, 4.0), (3, 2.0, 2.5)])
    lacking = residual(factors, weights, mean(factors, weights))
    assert lacking.rank == 12
    average = mean(factors, weights)
    covariance = np.sum(
        [
            2.0 * weight * np.asarray(one.B.double() - average.B) @ np.asarray(one.A.double() - average.A)
            for one, weight in zip(factors, weights, strict=True)
        ],
        axis=0,
    )
    assert relative(dense(lacking), covariance) < 1e-13
    u, s, vt = svd_of_product(lacking.B, lacking.A, 12)
    assert s[6] < 1e-13 * s[0] < s[5]
    assert relative((u[:, :6] * s[:6] @ vt[:6]).numpy(), covariance) < 1e-13


def test_a_base_that_takes_in_each_rounds_residual_follows_the_mean_of_the_sites_weights_exactly() -> None:
    """What FedEx-LoRA promises: base + s·B̄Ā is the weighted mean of all the sites' weights, after every round."""
    scale, weights = 2.0, [0.5, 0.125, 0.375]
    base = np.asarray(drawn(70, OUT, IN).double())
    B, A = drawn(71, OUT, 3).double(), drawn(72, 3, IN).double()
    for number in range(3):
        answered = [site for site in range(3) if (number, site) != (1, 2)]
        shares = [weights[site] / sum(weights[i] for i in answered) for site in answered]
        sites = [
            Factors(B + drawn(100 * number + site, OUT, 3), A + drawn(100 * number + site + 50, 3, IN), scale)
            for site in answered
        ]
        meant = np.sum([share * (base + dense(one)) for share, one in zip(shares, sites, strict=True)], axis=0)
        average = mean(sites, shares)
        assert relative(base + dense(average), meant) > 0.1
        base = base + dense(residual(sites, shares, average))
        B, A = average.B, average.A
        assert relative(base + dense(average), meant) < 1e-14


def test_residual_is_nothing_where_all_sites_have_one_a() -> None:
    A = drawn(1, 3, IN)
    factors = [Factors(drawn(seed, OUT, 3), A) for seed in (2, 3, 4)]
    weights = [0.5, 0.2, 0.3]
    lacking = residual(factors, weights, mean(factors, weights))
    total = stacked(factors, weights)
    zero = Factors(torch.zeros(OUT, 1), torch.zeros(1, IN))
    assert product_difference_norm(lacking, zero) < 1e-14 * frobenius_of_product(total.B, total.A)


def test_factors_that_fit_nothing_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"B \[5, 3\] times A \[2, 7\] is no product"):
        Factors(torch.zeros(5, 3), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="is no product"):
        Factors(torch.zeros(5), torch.zeros(5, 7))
    factors, weights = sites_of(OUT, IN)
    with pytest.raises(ValueError, match="4 pairs of factors and 3 weights"):
        stacked(factors, weights[1:])
    with pytest.raises(ValueError, match="at least one"):
        stacked([], [])
    with pytest.raises(ValueError, match="different sizes"):
        stacked([factors[0], Factors(torch.zeros(OUT, 3), torch.zeros(3, IN + 1))], [0.5, 0.5])
    with pytest.raises(ValueError, match="of one rank and scale have a mean"):
        mean(factors, weights)
    with pytest.raises(ValueError, match="rank 0"):
        svd_of_product(factors[0].B, factors[0].A, 0)


def test_pairs_are_found_by_their_names_with_and_without_an_adapters_name_and_nothing_else_is_one() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "model.q.lora_A.weight": (2, 5),
        "model.q.lora_B.weight": (7, 2),
        "model.k.lora_A.default.weight": (2, 5),
        "model.k.lora_B.default.weight": (7, 2),
        "model.k.lora_A.second.weight": (3, 5),
        "model.k.lora_B.second.weight": (7, 3),
        "model.k.lora_B.second.bias": (7,),
        "model.alone.lora_A.weight": (2, 5),
        "model.convolution.lora_A.weight": (2, 5, 3),
        "model.convolution.lora_B.weight": (7, 2, 1),
        "model.unequal.lora_A.weight": (2, 5),
        "model.unequal.lora_B.weight": (7, 4),
        "model.head.weight": (7, 5),
    }
    layout = Layout.of({name: torch.zeros(shape) for name, shape in shapes.items()})
    assert matrices(layout) == {
        "model.q": ("model.q.lora_A.weight", "model.q.lora_B.weight"),
        "model.k.default": ("model.k.lora_A.default.weight", "model.k.lora_B.default.weight"),
        "model.k.second": ("model.k.lora_A.second.weight", "model.k.lora_B.second.weight"),
    }

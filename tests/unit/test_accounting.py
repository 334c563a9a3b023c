"""Privacy accounting: known values, independent formulas, and what must never be done instead."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commonweight.errors import RecipeError
from commonweight.privacy.accounting import (
    Releases,
    analytic_gaussian,
    epsilon,
    epsilon_by_rdp,
    epsilon_of_all,
    gaussian_delta,
    noise_multiplier,
)

_NORMAL = statistics.NormalDist()


def classical_sigma(target: float, delta: float) -> float:
    """√(2 ln(1.25/δ))/ε: proved for ε < 1 only (Dwork and Roth 2014, theorem A.1)."""
    return math.sqrt(2 * math.log(1.25 / delta)) / target


def test_the_known_value_of_sampled_training() -> None:
    """q .01, σ 1.1, 10,000 steps, δ 1e-5; prv-accountant brackets it by 5.1826 and 5.2026."""
    plan = Releases(1.1, 10_000, 0.01)
    found = epsilon(plan, 1e-5)
    assert found == pytest.approx(5.1926, abs=0.01)
    assert 5.1826 < found < 5.2026
    assert epsilon_by_rdp(plan, 1e-5) == pytest.approx(5.632, abs=0.01)


@pytest.mark.parametrize(("z", "sampling", "steps", "delta"), [(1.1, 0.01, 10_000, 1e-5), (0.8, 0.1, 60, 1e-6)])
def test_epsilon_against_prv_accountant(z: float, sampling: float, steps: int, delta: float) -> None:
    """An accountant written by others (Gopi, Lee and Wutschitz 2021), where it is installed: the extra `oracle`."""
    dpsgd = pytest.importorskip("prv_accountant.dpsgd")
    their = dpsgd.DPSGDAccountant(z, sampling, steps, eps_error=0.01, delta_error=delta / 1e5)
    least, estimate, most = their.compute_epsilon(delta, steps)
    found = epsilon(Releases(z, steps, sampling), delta)
    assert least <= found <= most
    assert found == pytest.approx(estimate, abs=0.01)


@pytest.mark.parametrize(("target", "known"), [(1, 16.7), (3, 6.2), (8, 2.7)])
def test_noise_of_a_few_institutions_that_all_take_part(target: float, known: float) -> None:
    found = noise_multiplier(target, 1e-5, count=20)
    assert found == pytest.approx(known, abs=0.05)
    assert epsilon(Releases(found, 20), 1e-5) <= target < epsilon(Releases(found - 2e-4, 20), 1e-5)


def test_noise_of_many_devices_that_are_sampled() -> None:
    found = noise_multiplier(1, 1e-6, count=1000, sampling=0.01)
    assert found == pytest.approx(1.56, abs=0.005)
    assert 0.99 < epsilon(Releases(found, 1000, 0.01), 1e-6) <= 1


@settings(deadline=None)
@given(sigma=st.floats(0.2, 20), target=st.floats(0.01, 6))
def test_delta_of_a_gaussian_release_is_balles_and_wangs(sigma: float, target: float) -> None:
    """Independently, from the normal distribution of the standard library."""
    plain = _NORMAL.cdf(0.5 / sigma - target * sigma) - math.exp(target) * _NORMAL.cdf(-0.5 / sigma - target * sigma)
    assert gaussian_delta(sigma, target) == pytest.approx(plain, rel=1e-6, abs=1e-12)
    assert gaussian_delta(3 * sigma, target, sensitivity=3.0) == pytest.approx(gaussian_delta(sigma, target), rel=1e-9)


@pytest.mark.parametrize(("target", "delta"), [(0.1, 1e-5), (1, 1e-5), (8, 1e-6), (16, 1e-9), (50, 1e-3)])
def test_the_analytic_gaussian_is_the_least_noise(target: float, delta: float) -> None:
    sigma = analytic_gaussian(target, delta)
    assert gaussian_delta(sigma, target) <= delta < gaussian_delta(sigma * (1 - 1e-9), target)


def test_composed_gaussians_are_the_library_accountants() -> None:
    """What is computed in closed form agrees with dp-accounting's own composition."""
    from dp_accounting.dp_event import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    for z, count in ((2.0, 1), (6.2, 20), (30.0, 300)):
        accountant = PLDAccountant()
        accountant.compose(GaussianDpEvent(z), count)
        assert epsilon(Releases(z, count), 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), abs=0.01)


def test_the_classical_formula_is_wrong_above_one() -> None:
    """At ε = 16 and δ = 1e-5 its noise gives δ = 3.4e-4: 34 times what it promises."""
    assert gaussian_delta(classical_sigma(16, 1e-5), 16) == pytest.approx(3.4e-4, rel=0.02)
    assert classical_sigma(16, 1e-5) < analytic_gaussian(16, 1e-5)
    assert classical_sigma(0.5, 1e-5) > analytic_gaussian(0.5, 1e-5)


def test_a_hundred_releases_at_one_are_not_one() -> None:
    each = Releases(classical_sigma(1, 1e-5), 100)
    assert epsilon(each, 1e-5) == pytest.approx(10.39, abs=0.01)


def test_the_central_limit_promises_too_much() -> None:
    """Sampled training as if it were one Gaussian release, of μ = q·√(T(e^(1/σ²) − 1)): it says ε = 5.06, where the
    truth lies above 5.18."""
    sampling, sigma, steps = 0.01, 1.1, 10_000
    mu = sampling * math.sqrt(steps * math.expm1(sigma**-2))
    promised = epsilon(Releases(1 / mu, 1), 1e-5)
    assert promised == pytest.approx(5.06, abs=0.01)
    assert gaussian_delta(1 / mu, promised) <= 1e-5, "of the wrong mechanism"
    assert promised < 5.1826 < epsilon(Releases(sigma, steps, sampling), 1e-5)


@pytest.mark.parametrize("norm", [10.0, 100.0])
def test_noise_without_clipping_promises_nothing(norm: float) -> None:
    """Noise for ε = 8 at δ = 1e-5 and updates of norm 1: who sends one of norm 10 is recognised almost surely."""
    sigma = analytic_gaussian(8, 1e-5)
    assert gaussian_delta(sigma, 8, sensitivity=1.0) <= 1e-5
    assert gaussian_delta(sigma, 8, sensitivity=norm) > 0.999


def test_costs_of_single_releases_do_not_add_up_to_that_of_all() -> None:
    """Neither way: a hundred of ε = 0.5 are less than 50 together, and much more than 0.5."""
    z = analytic_gaussian(0.5, 1e-5)
    together = epsilon(Releases(z, 100), 1e-5)
    assert 5 < together < 10


def test_no_noise_is_no_privacy_and_no_release_costs_nothing() -> None:
    assert epsilon(Releases(0, 1), 1e-5) == epsilon_by_rdp(Releases(0, 1), 1e-5) == math.inf
    assert epsilon(Releases(1, 0), 1e-5) == epsilon_by_rdp(Releases(0, 0), 1e-5) == epsilon_of_all([], 1e-5) == 0
    assert noise_multiplier(math.inf, 1e-5, count=5) == 0
    assert epsilon(Releases(1e5, 1), 1e-2) == 0


@settings(max_examples=40, deadline=None)
@given(z=st.floats(0.5, 30), count=st.integers(1, 400), more=st.integers(1, 100), wider=st.floats(1.01, 3))
def test_epsilon_never_falls_with_releases_and_never_rises_with_noise(
    z: float, count: int, more: int, wider: float
) -> None:
    here = epsilon(Releases(z, count), 1e-5)
    assert epsilon(Releases(z, count + more), 1e-5) >= here >= epsilon(Releases(z * wider, count), 1e-5)
    assert epsilon_by_rdp(Releases(z, count), 1e-5) >= here - 0.01
    assert epsilon(Releases(z, count), 1e-4) <= here


@settings(max_examples=4, deadline=None)
@given(z=st.floats(0.8, 3), count=st.integers(1, 50), sampling=st.floats(0.01, 0.5))
def test_sampling_only_ever_helps(z: float, count: int, sampling: float) -> None:
    here = epsilon(Releases(z, count, sampling), 1e-5)
    assert here <= epsilon(Releases(z, count), 1e-5) + 0.01
    assert epsilon(Releases(z, count + 1, sampling), 1e-5) >= here - 1e-6
    assert epsilon(Releases(z * 1.2, count, sampling), 1e-5) <= here + 1e-6


def test_plans_add_up() -> None:
    one, other = Releases(5.0, 10), Releases(5.0, 15)
    assert epsilon_of_all([one, other], 1e-5) == pytest.approx(epsilon(Releases(5.0, 25), 1e-5), rel=1e-9)
    sampled = [Releases(1.5, 10, 0.1), Releases(1.5, 15, 0.1)]
    assert epsilon_of_all(sampled, 1e-5) == pytest.approx(epsilon(Releases(1.5, 25, 0.1), 1e-5), rel=1e-3)
    assert epsilon_of_all([one, Releases(0, 1)], 1e-5) == math.inf
    assert epsilon_of_all([one, Releases(0, 0)], 1e-5) == epsilon(one, 1e-5)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((-1, 1, 1), "noise"),
        ((math.nan, 1, 1), "noise"),
        ((1, -1, 1), "releases"),
        ((1, 1, 0), "sampling"),
        ((1, 1, 1.5), "sampling"),
    ],
)
def test_plans_that_cannot_be_are_refused(numbers: tuple[float, int, float], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        Releases(*numbers)
    assert caught.value.hint


def test_targets_that_cannot_be_are_refused() -> None:
    for delta in (0, 1, -1e-5, math.nan):
        with pytest.raises(RecipeError, match="δ"):
            epsilon(Releases(1, 1), delta)
        with pytest.raises(RecipeError, match="δ"):
            analytic_gaussian(1, delta)
    for target in (0, -1, math.nan):
        with pytest.raises(RecipeError, match="target"):
            noise_multiplier(target, 1e-5, count=1)
    with pytest.raises(RecipeError, match="target"):
        analytic_gaussian(0, 1e-5)
    with pytest.raises(RecipeError, match="releases"):
        noise_multiplier(1, 1e-5, count=0)
    with pytest.raises(RecipeError, match="sampling"):
        noise_multiplier(1, 1e-5, count=1, sampling=2)


@pytest.mark.parametrize(("z", "q"), [(1.2, 0.05), (0.9, 0.4), (3.0, 0.2)])
def test_a_unit_that_is_replaced_costs_what_no_pair_of_gradients_exceeds(z: float, q: float) -> None:
    """Independently: δ(ε) between the two mixtures on the line, by numerical integration, for gradients a and b."""
    x = np.linspace(-20 * z, 20 * z, 40_001)

    def mixture(a: float) -> np.ndarray:
        normal = lambda mean: np.exp(-((x - mean) ** 2) / (2 * z * z)) / (z * math.sqrt(2 * math.pi))  # noqa: E731
        return (1 - q) * normal(0.0) + q * normal(a)

    for delta in (1e-3, 1e-5):
        stated = epsilon_of_all([Releases(z, 1, q, replaced=True)], delta)
        for a, b in ((1.0, -1.0), (-1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, 0.3)):
            true = np.trapezoid(np.maximum(mixture(a) - math.exp(stated) * mixture(b), 0), x)
            assert true <= delta * (1 + 1e-6), (a, b)
        assert epsilon(Releases(z, 1, q), delta) < stated


def test_a_unit_that_is_replaced_in_every_release_is_as_with_half_the_noise() -> None:
    both = [Releases(4.0, 3, replaced=True), Releases(2.0, 5)]
    assert epsilon_of_all(both, 1e-5) == pytest.approx(epsilon(Releases(2.0, 8), 1e-5), rel=1e-12)


@pytest.mark.parametrize("q", [0.02, 0.3])
def test_replacing_over_many_releases_costs_no_less_than_the_worst_known_pair(q: float) -> None:
    """Gradients C and −C, whose mixtures are composed on a grid of losses by FFT, rounded down."""
    z, count, delta, step = 2.0, 30, 1e-4, 2e-4
    x = np.linspace(-30 * z, 30 * z, 600_001)
    normal = lambda mean: np.exp(-((x - mean) ** 2) / (2 * z * z)) / (z * math.sqrt(2 * math.pi))  # noqa: E731
    P, Q = ((1 - q) * normal(0.0) + q * normal(a) for a in (1.0, -1.0))
    mass = P * (x[1] - x[0])
    kept = mass > 1e-25
    losses = np.floor(np.log(P[kept] / Q[kept]) / step).astype(int)
    size = 1 << 20
    pmf = np.bincount((losses + size // 2) % size, weights=mass[kept], minlength=size)
    spectrum = np.fft.rfft(np.roll(pmf, -size // 2)) ** count
    total = np.roll(np.fft.irfft(spectrum, size), size // 2)
    grid = (np.arange(size) - size // 2) * step
    stated = epsilon_of_all([Releases(z, count, q, replaced=True)], delta)
    above = grid > stated
    assert float((total[above] * -np.expm1(stated - grid[above])).sum()) <= delta * (1 + 1e-3)

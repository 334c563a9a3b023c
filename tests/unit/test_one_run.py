"""The lower bound on ε from one run, against published values, another implementation and simulated mechanisms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from commonweight.errors import DataError
from commonweight.privacy.one_run import GUESSED, LEVEL, audit, lower_bound, p_value


def test_values_of_the_paper() -> None:
    assert p_value(100, 100, 75, epsilon=math.log(3), delta=0) == pytest.approx(0.553, abs=1e-3)
    assert lower_bound(1000, 100, 75, delta=1e-4) == pytest.approx(0.673, abs=1e-3)
    assert lower_bound(100_000, 1510, 1439, delta=1e-5) == pytest.approx(2.675, abs=1e-3)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "expected"),
    [
        (200, 76, 60, 1e-5, 0.8369059455629948),
        (1000, 600, 456, 1e-5, 0.9919249562844182),
        (64, 24, 23, 1e-3, 1.364673808460356),
        (1000, 413, 242, 1e-4, 0.17259363103426173),
    ],
)
def test_values_of_jax_privacy(canaries: int, guesses: int, correct: int, delta: float, expected: float) -> None:
    """jax-privacy 2.0: CanaryScoreAuditor.epsilon_one_run(0.05, delta, threshold_strategy=Explicit(…))."""
    assert lower_bound(canaries, guesses, correct, delta=delta) == pytest.approx(expected, abs=1e-6)


def test_the_probability_by_summing_it_up() -> None:
    """Without SciPy, term by term."""
    canaries, guesses, correct, epsilon, delta = 30, 12, 9, 0.7, 0.01
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    of = [math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
    steps = [sum(of[k] for k in range(guesses + 1) if correct > k >= correct - i) / i for i in range(1, correct + 1)]
    expected = sum(of[correct:]) + 2 * canaries * delta * max(steps)
    assert p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) == pytest.approx(expected, rel=1e-12)


def test_all_guesses_right_without_delta_has_a_closed_form() -> None:
    """q^16 = .05, so ε = −ln(q⁻¹ − 1)."""
    assert lower_bound(16, 16, 16, delta=0) == pytest.approx(-math.log(0.05 ** (-1 / 16) - 1), abs=1e-9)


def test_guesses_no_better_than_chance_bound_nothing() -> None:
    assert lower_bound(1000, 500, 260, delta=1e-5) == 0
    assert lower_bound(100, 0, 0, delta=1e-5) == 0


def test_the_bound_falls_with_delta_and_with_the_confidence() -> None:
    bounds = [lower_bound(1000, 200, 170, delta=delta) for delta in (0.0, 1e-6, 1e-4, 1e-2)]
    assert bounds == sorted(bounds, reverse=True)
    assert lower_bound(1000, 200, 170, delta=0, level=0.01) < lower_bound(1000, 200, 170, delta=0)


def test_more_right_guesses_than_guesses_are_refused() -> None:
    with pytest.raises(ValueError, match="5 right of 4"):
        p_value(10, 4, 5, epsilon=1, delta=0)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_the_bound_of_randomized_response_is_below_its_epsilon_in_95_of_100_runs_and_near_it(epsilon: float) -> None:
    """Each coin is told truly with probability e^ε/(e^ε + 1): exactly ε-private, and nothing guesses it better."""
    rng, canaries = np.random.default_rng(11), 1000
    bounds = []
    for _ in range(200):
        coins = rng.random(canaries) < 0.5
        told = np.where(rng.random(canaries) < 1 / (1 + math.exp(-epsilon)), coins, ~coins)
        bounds.append(audit(told + 0.1 * rng.random(canaries), coins, delta=0).epsilon)
    assert sum(bound > epsilon for bound in bounds) <= 10
    assert np.mean(bounds) > epsilon - 0.3


def test_delta_is_paid_for() -> None:
    """Each coin is revealed with probability δ, and nothing of it else: (0, δ)-private, whatever δ = 0 would say."""
    rng, canaries, delta = np.random.default_rng(3), 400, 0.1
    above = {0.0: 0, delta: 0}
    for _ in range(40):
        coins = rng.random(canaries) < 0.5
        shown = rng.random(canaries) < delta
        scores = np.where(shown, np.where(coins, 2.0, -2.0), rng.normal(size=canaries) * 0.1)
        for claimed in above:
            above[claimed] += audit(scores, coins, delta=claimed).epsilon > 0
    assert above[delta] <= 2
    assert above[0.0] == 40


def test_the_best_number_of_guesses_is_paid_for() -> None:
    """Only the surest eighth is known: the bound is that of so many guesses, at a fourth of the level."""
    coins = np.tile([True, False], 100)
    scores = np.where(np.arange(200) < 24, np.where(coins, 5.0, -5.0), 0.0) + 1e-3 * np.arange(200)
    found = audit(scores, coins, delta=1e-5)
    assert (found.canaries, found.guesses, found.correct) == (200, 24, 24)
    assert found.epsilon == lower_bound(200, 24, 24, delta=1e-5, level=LEVEL / len(GUESSED))


def test_too_few_canaries_and_broken_scores_are_refused() -> None:
    with pytest.raises(DataError, match="7 canaries"):
        audit([1.0] * 7, [True] * 7, delta=0)
    with pytest.raises(DataError, match="not finite"):
        audit([math.nan] + [1.0] * 9, [True] * 10, delta=0)

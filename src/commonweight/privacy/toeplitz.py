"""Noise that is correlated from round to round, for sites that take part again and again without being sampled.

Models are sums of what rounds release, and so is the error of their noise: noise of which a later round takes back a
part leaves less of it than independent noise of the same privacy (DP-FTRL; Denisov et al., Improved Differential
Privacy for SGD via Optimal Private Linear Operators on Adaptive Streams, NeurIPS 2022, arXiv:2202.08312). With the sums
G of the rounds as rows, what is released is G + C⁻¹Z = C⁻¹(CG + Z), where Z is independent Gaussian noise; C is lower
triangular and Toeplitz with a band of b coefficients c₀ … c_{b−1} in each column (Choquette-Choo et al., (Amplified)
Banded Matrix Factorization, NeurIPS 2023, arXiv:2306.08153).

Privacy is that of CG + Z. A site that takes part at most once in any b rounds moves columns of C whose supports do not
meet: k participations, each of a norm of at most K, move CG by at most √k·‖c‖·K. With ‖c‖ = 1, as here, each is one
Gaussian release of noise multiplier z, and they compose as such, also where rounds depend on those before.

The noise of round t is wₜ = Σₛ hₛ·z_{t−s}, with h the power series of 1/c: it needs the keys of all rounds before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .noise import GaussianNoise, Noise

Coefficients = NDArray[np.float64]


def inverse(c: Coefficients, n: int) -> Coefficients:
    """h₀ … h_{n−1}, the first coefficients of 1/c: the first column of C⁻¹."""
    h = np.zeros(n)
    h[0] = 1 / c[0]
    for k in range(1, n):
        last = min(k, len(c) - 1)
        h[k] = -np.dot(c[1 : last + 1], h[k - last : k][::-1]) / c[0]
    return h


def rmse(c: Coefficients, n: int) -> float:
    """The root mean square, over n rounds, of the error of the sums of all rounds so far, in units of Z's noise.

    The sums' noise is A·C⁻¹·Z with A full of ones below the diagonal: Toeplitz, with the partial sums of h.
    """
    sums = np.cumsum(inverse(c, n))
    return float(np.sqrt(np.dot(np.arange(n, 0, -1), sums**2) / n))


def square_root(n: int) -> Coefficients:
    """The first coefficients of (1 − x)^(−½), the square root of A: binom(2k, k)/4^k."""
    c = np.ones(n)
    for k in range(1, n):
        c[k] = c[k - 1] * (2 * k - 1) / (2 * k)
    return c


def optimised(n: int, band: int) -> Coefficients:
    """c₀ … c_{b−1} of norm 1 with the least error of the sums over n rounds: a minimum of ‖c‖²·rmse(c)², found from the
    square root's.

    Args:
        n: rounds.
        band: b, at most n counts.
    """
    from scipy.optimize import minimize

    band = min(band, n)
    weights = np.arange(n, 0, -1) / n

    def loss(tail: Coefficients) -> tuple[float, Coefficients]:
        c = np.concatenate([[1.0], tail])
        h = inverse(c, n)
        sums = np.cumsum(h)
        error, norm = float(np.dot(weights, sums**2)), float(np.dot(c, c))
        # with S = 1/((1 − x)·c), dS/dcⱼ = −xʲ·S/c
        moved, weighted = np.convolve(sums, h)[:n], weights * sums
        slope = np.array([-2 * np.dot(weighted[j:], moved[: n - j]) for j in range(1, band)])
        return norm * error, norm * slope + 2 * tail * error

    tail = square_root(band)[1:]
    if band > 1:
        found = minimize(loss, tail, jac=True, method="L-BFGS-B", options={"maxiter": 500, "gtol": 1e-9, "ftol": 1e-13})
        tail = found.x
    c = np.concatenate([[1.0], tail])
    return np.asarray(c / np.linalg.norm(c), dtype=np.float64)


class CorrelatedNoise(Noise):
    """The noise of one round, made of the keys of all rounds so far.

    Args:
        keys: of rounds 1 … t, in order.
        c: the strategy's coefficients.
    """

    def __init__(self, keys: Sequence[bytes], c: Sequence[float]) -> None:
        weights = inverse(np.asarray(c, dtype=np.float64), len(keys))
        self._parts = [(GaussianNoise(key), float(weight)) for key, weight in zip(keys, weights[::-1], strict=True)]

    def values(self, number: int, start: int, count: int) -> NDArray[np.float64]:
        total = np.zeros(count)
        for noise, weight in self._parts:
            total += weight * noise.values(number, start, count)
        return total

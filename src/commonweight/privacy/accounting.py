"""How much privacy a number of noisy releases costs, and how much noise a budget needs.

What is accounted for: each release is a sum of vectors of L2 norm at most C, one a privacy unit (an example, a patient,
a site), plus Gaussian noise of standard deviation z·C in every coordinate; z is the noise multiplier. Neighbouring data
sets differ by one unit added or removed, so that the sum's L2 sensitivity is C. In a release each unit takes part with
probability `sampling`, independently of the others (Poisson sampling; 1: every time): other ways of choosing a cohort
amplify nothing that is proved here, and must be given as 1. Where a unit is replaced by another one, rather than added
or removed, the two sums are up to 2C apart, in the releases in which it takes part.

ε is computed from privacy loss distributions (dp-accounting's PLD, pessimistic rounding), with the Rényi accountant
beside it as a check. Noise of whole numbers, whose privacy loss has no closed form in many dimensions, is accounted for
by Rényi divergences alone. Neither the classical σ = √(2 ln(1.25/δ))/ε, whose δ is wrong above ε = 1, nor adding up the
ε of single releases, nor a central-limit estimate, which is too small, is used anywhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..errors import RecipeError

#: calibrated noise multipliers are rounded up to whole parts of this, so that people can write them down
_UNIT = 10_000
_MOST_NOISE = 1e6
#: at whole orders divergences of sampled releases have short sums
_WHOLE_ORDERS = (*range(2, 33), 48, 64, 128, 256, 512)
#: widths of the grids on which privacy losses are rounded up
_FINE, _COARSE = 1e-4, 1e-3
#: δ of one release, beyond which a loss counts as infinite
_TAIL = 1e-15
#: and losses of one release that are told apart; larger ones count as infinite
_MOST_LOSSES = 1 << 22


@dataclass(frozen=True)
class Releases:
    """A plan of noisy releases.

    Args:
        noise_multiplier: z, the noise's standard deviation to the clipping norm; 0 releases everything (ε = ∞).
        count: how many.
        sampling: the probability with which each unit takes part in one.
        replaced: in neighbouring data sets a unit is replaced by another.
        discrete: the noise is of whole numbers (`distributed.py`), whose Rényi divergences are at most the Gaussian's.

    Raises:
        RecipeError: a number is out of its range.
    """

    noise_multiplier: float
    count: int
    sampling: float = 1.0
    replaced: bool = False
    discrete: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise RecipeError(
                f"a noise multiplier of {self.noise_multiplier}", hint="it is a number from 0 on; 0 is no privacy"
            )
        if self.count < 0:
            raise RecipeError(f"{self.count} releases", hint="give how often something is released, 0 or more")
        if not 0 < self.sampling <= 1:
            raise RecipeError(
                f"a sampling probability of {self.sampling}",
                hint="it is above 0 and at most 1, with which every unit takes part each time",
            )


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise RecipeError(
            f"δ = {delta}", hint="δ is between 0 and 1, and well below one over the number of units, such as 1e-5"
        )


def epsilon(releases: Releases, delta: float) -> float:
    """The least ε, to the accountant's accuracy from above, for which all releases together are (ε, δ)-private.

    Raises:
        RecipeError: δ is not between 0 and 1.
    """
    _check_delta(delta)
    return epsilon_of_all([releases], delta)


def epsilons(releases: Releases, rounds: int, delta: float) -> list[float]:
    """ε after each of `rounds` rounds of such releases.

    Raises:
        RecipeError: δ is not between 0 and 1.
    """
    _check_delta(delta)
    if releases.sampling == 1 or releases.noise_multiplier == 0 or releases.count == 0:
        return [epsilon(replace(releases, count=k * releases.count), delta) for k in range(1, rounds + 1)]
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    one = from_gaussian_mechanism(
        releases.noise_multiplier, sampling_prob=releases.sampling, value_discretization_interval=_FINE
    ).self_compose(releases.count)
    loss, found = one, [float(one.get_epsilon_for_delta(delta))]
    for _ in range(rounds - 1):
        loss = loss.compose(one)
        found.append(float(loss.get_epsilon_for_delta(delta)))
    return found


def epsilon_by_rdp(releases: Releases, delta: float) -> float:
    """ε by Rényi differential privacy (Mironov 2017, arXiv:1702.07476): an upper bound, larger than `epsilon`.

    Raises:
        RecipeError: δ is not between 0 and 1.
    """
    _check_delta(delta)
    if releases.count == 0:
        return 0.0
    if releases.noise_multiplier == 0:
        return math.inf
    return _renyi_epsilon(releases, delta, None)


def _renyi_epsilon(releases: Releases, delta: float, orders: Sequence[float] | None) -> float:
    """Args: orders: at which divergences are taken; None: the library's own."""
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders)
    with _silent():  # of orders whose series does not converge; the others bound ε all the same
        accountant.compose(_event(releases), releases.count)
        return float(accountant.get_epsilon(delta))


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, dp-accounting warns nobody."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def epsilon_of_all(plans: list[Releases], delta: float) -> float:
    """ε of several plans, one after the other on the same units.

    Raises:
        RecipeError: δ is not between 0 and 1.
    """
    _check_delta(delta)
    plans = [plan for plan in plans if plan.count]
    if not plans:
        return 0.0
    if any(plan.noise_multiplier == 0 for plan in plans):
        return math.inf
    discrete = [plan for plan in plans if plan.discrete]
    if all(plan.sampling == 1 for plan in plans):
        # Gaussian releases compose to one whose squared ratios of C to σ add up: no accountant is needed
        ratio = sum((2 if p.replaced else 1) ** 2 * p.count / p.noise_multiplier**2 for p in plans)
        return concentrated_epsilon(ratio / 2, delta) if discrete else _gaussian_epsilon(1 / math.sqrt(ratio), delta)
    if discrete:  # a half of δ for what only Rényi divergences are known of, and one for the rest
        others = [plan for plan in plans if not plan.discrete]
        return epsilon_of_all(discrete, delta / 2) + epsilon_of_all(others, delta / 2)
    if any(plan.replaced for plan in plans):
        return _replaced_epsilon(plans, delta, _FINE)
    return _sampled_epsilon(plans, delta, _FINE)


def concentrated_epsilon(rho: float, delta: float) -> float:
    """ε of what is ρ-zCDP, of which the Rényi divergence of every order α > 1 is at most αρ:

        ε = αρ + ln(1 − 1/α) − (ln δ + ln α)/(α − 1)

    at the α where it is least (Canonne, Kamath and Steinke 2020, arXiv:2004.00010, proposition 12).
    """
    from scipy.optimize import minimize_scalar

    def bound(log_order: float) -> float:
        beyond = math.exp(log_order)  # α − 1
        order = 1 + beyond
        return order * rho + math.log(beyond / order) - (math.log(delta) + math.log(order)) / beyond

    # without the logarithms of α it is least at 1 + √(ln(1/δ)/ρ)
    middle = math.log(-math.log(delta) / rho) / 2
    found = minimize_scalar(bound, bounds=(middle - 4, middle + 4), method="bounded", options={"xatol": 1e-9})
    return max(0.0, float(found.fun))


def _sampled_epsilon(plans: list[Releases], delta: float, step: float) -> float:
    """ε by privacy loss distributions on a grid of this width, from above whatever the width."""
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=step)
    for plan in plans:
        accountant.compose(_event(plan), plan.count)
    return float(accountant.get_epsilon(delta))


def _replaced_epsilon(plans: list[Releases], delta: float, step: float) -> float:
    """The same where units are replaced in some of the plans."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism, identity

    total = identity(value_discretization_interval=step)
    for plan in plans:
        if plan.replaced:
            one = _replaced_loss(plan, step)
        else:
            one = from_gaussian_mechanism(
                plan.noise_multiplier, sampling_prob=plan.sampling, value_discretization_interval=step
            )
        total = total.compose(one.self_compose(plan.count))
    return float(total.get_epsilon_for_delta(delta))


def _replaced_loss(plan: Releases, step: float) -> Any:
    """The privacy loss of one sampled release in which a unit is replaced, from above.

    With q the sampling, P = (1 − q)·N(0, z²) + q·N(a, z²) is set against Q, the same with b; |a|, |b| ≤ 1. For ε ≥ 0
    and ε' with e^ε − 1 = q·(e^ε' − 1),

        δ(ε) = q·δ_N(ε'),    δ_N(ε') that of one Gaussian release of sensitivity 2 (Balle, Barthe and Gaboardi 2018,
                             arXiv:1807.01647, theorem 2: a mixture of P's part with 0 and with b, each at most 2 away)

    and, as the bound is the same for Q against P, δ(−ε) = 1 − e^−ε + e^−ε·δ(ε). What dominates every release dominates
    their composition (Zhu, Dong and Wang 2022, arXiv:2106.08567); on the grid the dots are connected, which is from
    above (Doroshenko et al. 2022, arXiv:2207.04380).
    """
    import numpy as np
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
    from scipy.special import log_ndtr

    q, ratio = plan.sampling, 2 / plan.noise_multiplier

    def above(loss: Any) -> Any:
        inner = loss + np.log1p((q - 1) * np.exp(-loss)) - math.log(q)
        first, second = log_ndtr(ratio / 2 - inner / ratio), inner + log_ndtr(-ratio / 2 - inner / ratio)
        return -q * np.exp(first) * np.expm1(np.minimum(second - first, 0))

    most = 1
    while above(most * step) > _TAIL and most < _MOST_LOSSES:
        most *= 2
    losses = step * np.arange(1, most + 1)
    upper = above(losses)
    lower = -np.expm1(-losses) + np.exp(-losses) * upper
    deltas = np.minimum.accumulate(np.concatenate([lower[::-1], [above(0.0)], upper]))
    return PrivacyLossDistribution(create_pmf_pessimistic_connect_dots_fixed_gap(step, -most, most, deltas))


def noise_multiplier(
    target: float, delta: float, *, count: int, sampling: float = 1.0, discrete: bool = False
) -> float:
    """The least z, rounded up to 4 decimals, with which `count` releases cost at most `target`.

    Args:
        target: ε, above 0; ∞ needs no noise.
        delta: δ.
        count: releases, at least 1.
        sampling, discrete: as in `Releases`; discrete noise is never sampled.

    Raises:
        RecipeError: an argument is out of its range, or no noise below 10⁶ is enough.
    """
    _check_delta(delta)
    if not target > 0:
        raise RecipeError(f"a target of ε = {target}", hint="ε is above 0; 8 is weak, 1 is strong")
    if count < 1:
        raise RecipeError(f"{count} releases need no noise", hint="give how often something is released, 1 or more")
    Releases(1.0, count, sampling)
    if target == math.inf:
        return 0.0
    if discrete:
        return _rounded_up(_least_discrete(target, delta) * math.sqrt(count))
    if sampling == 1:
        return _rounded_up(analytic_gaussian(target, delta) * math.sqrt(count))
    return _rounded_up(_sampled_multiplier(target, delta, count, sampling))


def _least_discrete(target: float, delta: float) -> float:
    """z of one release of discrete noise."""
    low, high = 0.0, 1.0
    while concentrated_epsilon(0.5 / high**2, delta) > target:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if concentrated_epsilon(0.5 / middle**2, delta) > target:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=1024)
def _sampled_multiplier(target: float, delta: float, count: int, sampling: float) -> float:
    """z for sampled releases: the Rényi accountant, which is quick and a little too careful, says where to look; then
    a coarse grid, which takes a tenth of the time and says ε within 1e-3, finds it; the fine one has the last word.
    """

    def coarse(releases: Releases, delta: float) -> float:
        return _sampled_epsilon([releases], delta, _COARSE)

    def rough(releases: Releases, delta: float) -> float:
        return _renyi_epsilon(releases, delta, _WHOLE_ORDERS)

    def excess(log_z: float, accountant: Callable[[Releases, float], float]) -> float:
        return float(accountant(Releases(math.exp(log_z), count, sampling), delta) - target)

    from scipy.optimize import brentq

    low, high = math.log(1e-2), 0.0
    while excess(high, rough) > 0:
        high += 1.0
        if high > math.log(_MOST_NOISE):
            raise RecipeError(
                f"no noise is enough for ε = {target} at δ = {delta} with {count} releases",
                hint="ask for a larger ε or fewer rounds",
            )
    high = float(brentq(excess, low, high, args=(rough,), xtol=1e-2)) if excess(low, rough) > 0 else low
    high += 1e-2
    low = high - 0.1
    while excess(low, coarse) <= 0 and low > math.log(1e-2):
        low -= 0.3
    while excess(high, coarse) > 0:
        high += 0.1
    if excess(low, coarse) <= 0:
        return math.exp(low)
    found: float = math.exp(float(brentq(excess, low, high, args=(coarse,), xtol=1e-4)))
    while epsilon(Releases(found, count, sampling), delta) > target:
        found *= 1 + 1e-4
    return found


def _rounded_up(z: float) -> float:

    return math.ceil(z * _UNIT - 1e-7) / _UNIT


def gaussian_delta(sigma: float, epsilon: float, sensitivity: float = 1.0) -> float:
    """δ(ε) of one Gaussian release: Φ(Δ/2σ − εσ/Δ) − e^ε·Φ(−Δ/2σ − εσ/Δ) (Balle and Wang 2018, arXiv:1805.06530,
    theorem 8). Exact.

    Args:
        sigma: the noise's standard deviation, above 0.
        epsilon: at least 0.
        sensitivity: Δ, of the L2 norm.
    """
    ratio = sensitivity / sigma
    first = _log_phi(ratio / 2 - epsilon / ratio)
    second = epsilon + _log_phi(-ratio / 2 - epsilon / ratio)
    return math.exp(first) * -math.expm1(second - first)


def _gaussian_epsilon(sigma: float, delta: float) -> float:
    """ε of one Gaussian release of sensitivity 1, from above."""
    if gaussian_delta(sigma, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(sigma, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if gaussian_delta(sigma, middle) > delta:
            low = middle
        else:
            high = middle
    return high


def analytic_gaussian(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """The least σ for which one release is (ε, δ)-private, solved from `gaussian_delta` to 12 digits.

    Raises:
        RecipeError: ε is not positive, or δ not between 0 and 1.
    """
    _check_delta(delta)
    if not 0 < epsilon < math.inf:
        raise RecipeError(f"a target of ε = {epsilon}", hint="ε is above 0")
    low, high = 0.0, sensitivity
    while gaussian_delta(high, epsilon, sensitivity) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if gaussian_delta(middle, epsilon, sensitivity) > delta:
            low = middle
        else:
            high = middle
    return high


def _log_phi(x: float) -> float:
    """ln of the normal distribution function, also far in its tail."""
    from scipy.special import log_ndtr

    return float(log_ndtr(x))


def _event(releases: Releases) -> object:
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent

    event = GaussianDpEvent(releases.noise_multiplier)
    return event if releases.sampling == 1 else PoissonSampledDpEvent(releases.sampling, event)

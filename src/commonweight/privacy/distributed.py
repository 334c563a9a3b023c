"""Noise that sites add themselves, of whole numbers, so that a secure sum is private before anybody sees it.

Each site's update, clipped to L2 norm C, is multiplied by L/C, rounded to whole numbers whose norm is at most Δ, and
gets noise of its own, a discrete Gaussian with σ; what is summed modulo 2³² has the noise of all sites in it (Kairouz,
Liu and Steinke, The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation, ICML 2021,
arXiv:2102.06387). Of the n sites that a round invites at least t are in the sum, and add noise that
nobody else knows: σ·√t = z·Δ, with z the noise multiplier. The more there are, the more noise; t is the worst case. A
site of the sum knows its own: from its point of view they are one fewer.

Privacy unit: a site, with all its rows. Neighbouring data sets: a site's update or zeros in its place; its noise is
there either way, for that a site answered is no secret. Sensitivity of the sum: Δ, in L2. Sampling: none is assumed.

What it costs. A sum of t discrete Gaussians is one, of variance tσ², but for factors that move no probability by more
than a relative 5·t·exp(−π²σ²): P(X + Y = k) is the discrete Gaussian's times Σₓ exp(−(x − c)²/2s²) at some c that
depends on k, with 1/s² = 1/σ² + 1/τ² and s ≥ σ/√2 for standard deviations σ ≤ τ of X and Y; by Poisson's summation
formula that sum is s√(2π)·(1 + 2·Σₘ exp(−2π²s²m²)·cos 2πmc), nearly the same for every c. With σ at least 8, as here,
that is below 10⁻²⁶⁰. And a discrete Gaussian of standard deviation τ that is shifted by a vector v of whole numbers has
a Rényi divergence of order α of at most α‖v‖²/2τ² from the unshifted, no more than a continuous one: by the same
formula Σₓ exp(−(x − c)²/2τ²) is largest at c = 0. So a round is (1/2z²)-zCDP, as with Gaussian noise.

Rounding is by chance, right in the mean, to one of the two neighbours (with probability 1 − β at least the norm is then
within Δ; where it is not, every element is rounded toward zero instead). L is what remains of Δ for it:

    Δ² = L² + d/4 + √(2 ln 1/β)·(L + √d/2)     (theirs),    or    Δ = L + √d

A whole clipping norm in one element and the noise of all sites fit the ring together, 12 standard deviations of it: by
chance no element of 10¹⁰ in 10⁴ rounds is beyond, but for 10⁻¹⁷. So nothing is gained by spreading a norm evenly over
the elements first, by a random rotation, which rings of fewer bits need.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from ..errors import RecipeError, SiteError
from .discrete_gaussian import DiscreteGaussian, Words
from .noise import derived
from .secure_aggregation.fixed_point import HALF
from .secure_aggregation.graph import majority
from .secure_aggregation.masks import Ring

NAME = "distributed-discrete"
ADJACENCY = "one site whose update is in the sums, or zeros in its place"
#: standard deviations of the sum's noise that the ring has room for
_ROOM = 12.0
#: β: how rarely rounding by chance may come to nothing
_SELDOM = 1e-9
#: σ of a site's noise is at least 2 to the power of this
_LEAST_BITS = 3
#: of Δ so much at least is for the update, and not for its rounding
_LEAST_SHARE = 0.9
#: what `clip_` leaves of a norm above C
_SLACK = 1e-6


@dataclass(frozen=True)
class DistributedNoise:
    """How the sites of a round make of an update whole numbers with noise.

    Args:
        bound: C.
        noise_multiplier: z, above 0.
        num_sites: n, that are invited.
        adding: t, of whom at least so many are in the sum and add noise that nobody else knows.
        length: d, elements of an update.

    Raises:
        RecipeError: the ring is too small for so much noise of so many sites, or for so many elements.
    """

    bound: float
    noise_multiplier: float
    num_sites: int
    adding: int
    length: int

    def __post_init__(self) -> None:
        if self.adding < 1:
            raise RecipeError(
                f"privacy.mechanism.colluding: of the {majority(self.num_sites)} of {self.num_sites} sites that a "
                "secure sum takes none may be left whose noise counts",
                hint="count on fewer sites that leave their noise out, or invite more",
            )
        if self.bits < _LEAST_BITS or self.levels < _LEAST_SHARE * self.sensitivity:
            raise RecipeError(
                f"privacy.mechanism {NAME}: a ring of 32 bits is too small for {self.num_sites} sites with a noise "
                f"multiplier of {self.noise_multiplier:g} and {self.length:,} elements each",
                hint="use smaller cohorts, less noise or a smaller adapter; or mechanism: gaussian",
            )

    @classmethod
    def of(
        cls, *, bound: float, noise_multiplier: float, num_sites: int, colluding: float, length: int
    ) -> DistributedNoise:
        """With the fewest sites that a secure sum takes, less those that might work with the coordinator.

        Args:
            colluding: their share of those invited.
        """
        adding = majority(num_sites) - math.ceil(colluding * num_sites)
        return cls(bound, noise_multiplier, num_sites, adding, length)

    @cached_property
    def bits(self) -> int:
        """σ = 2^bits, the largest with which n whole norms and the noise of n sites fit the ring."""
        n, t, z = self.num_sites, self.adding, self.noise_multiplier
        room = (HALF - 1 - n) / (n * math.sqrt(t) / z + _ROOM * math.sqrt(n))
        return math.floor(math.log2(room)) if room >= 1 else -1

    @property
    def sigma(self) -> float:
        """σ, the standard deviation of one site's noise, in steps."""
        return 2.0**self.bits

    @property
    def sensitivity(self) -> float:
        """Δ, in steps."""
        return self.sigma * math.sqrt(self.adding) / self.noise_multiplier

    @cached_property
    def levels(self) -> float:
        """L, the steps that a norm of C has before it is rounded."""
        d, whole = self.length, self.sensitivity
        spread = math.sqrt(2 * math.log(1 / _SELDOM))
        square = spread**2 / 4 + whole**2 - d / 4 - spread * math.sqrt(d) / 2
        return max(whole - math.sqrt(d), math.sqrt(max(0.0, square)) - spread / 2)

    @property
    def step(self) -> float:
        """The distance between neighbouring numbers, in an update's own units."""
        return self.bound * (1 + _SLACK) / self.levels

    def purpose(self, *, site: str, round: int, digest: str) -> str:
        """Says all that a site's noise in a round is made for. From the same comes the same noise, so that no update is
        ever seen with two; from anything else other noise, so that no noise is ever in two updates.

        Args:
            digest: of the clipped update.
        """
        scale = {"bits": self.bits, "step": self.step.hex()}
        return json.dumps({"site": site, "round": round, "update": digest, **scale}, sort_keys=True)

    def encode(self, stretches: Sequence[tuple[int, Tensor]], out: Ring, key: bytes) -> None:
        """Write an update's elements, rounded and with noise, into `out`.

        Args:
            stretches: all elements, of at most 2¹⁸ each, by where they begin in `out`.
            key: 32 bytes, of this update alone (`purpose`).

        Raises:
            SiteError: the update's norm is above C, or it is not finite.
        """
        if not any(self._rounded(stretches, out, coins) for coins in (derived(key, "rounding"), None)):
            raise SiteError("an update has a norm above privacy.clip: it must be clipped before noise is added")
        DiscreteGaussian(derived(key, "noise"), self.bits).add_(out)

    def _rounded(self, stretches: Sequence[tuple[int, Tensor]], out: Ring, coins: bytes | None) -> bool:
        """Round into `out`; whether the norm is within Δ.

        Args:
            coins: a key; None: toward zero.
        """
        square, before = 0, 0.0
        for number, (start, values) in enumerate(stretches):
            scaled = values.double().numpy() / self.step
            before += float(np.square(scaled).sum())
            if not before <= self.levels**2 * (1 + 1e-9):
                return False
            if coins is None:
                np.trunc(scaled, out=scaled)
            else:
                scaled += Words(coins, number).take(len(scaled)) * 2.0**-64
                np.floor(scaled, out=scaled)
            whole = scaled.astype(np.int64)
            square += int(np.dot(whole, whole))
            out[start : start + len(whole)] = whole.astype(np.uint32)
        return square <= self.sensitivity**2

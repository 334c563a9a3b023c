"""A clipping norm that follows a quantile of the updates' norms (Andrew et al., Differentially Private Learning with
Adaptive Clipping, NeurIPS 2021, arXiv:1905.03871).

Each site sends, beside its update clipped to C, the bit b of whether its norm was at most C. With m the expected cohort

    b̃ = ½ + (Σ (bᵢ − ½) + N(0, σ_b²))/m        C ← C·exp(−η(b̃ − γ))

so that in the long run the share γ of norms is within C. A site that is left out moves Σ (bᵢ − ½) by ½, and the count
is a Gaussian release of noise multiplier 2σ_b. With z_Δ = (z⁻² − (2σ_b)⁻²)^(−½) on the sum of updates the two together
are one release of noise multiplier z: what a round costs is what it costs with a fixed C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import RecipeError
from ..recipe.schema import AdaptiveClipSpec

#: the metric by which an update says b
UNDER_CLIP = "under_clip"
#: σ_b is this part of the expected cohort if the recipe leaves it open, as in the paper
_COUNT_NOISE = 1 / 20


@dataclass(frozen=True)
class AdaptiveClip:
    """How C changes from round to round.

    Args:
        quantile: γ.
        lr: η.
        count_noise: σ_b.
        noise_multiplier: z, of a round's two releases together.
        expected: m.

    Raises:
        RecipeError: the count alone would cost more than z allows.
    """

    quantile: float
    lr: float
    count_noise: float
    noise_multiplier: float
    expected: int

    def __post_init__(self) -> None:
        if self.noise_multiplier and 2 * self.count_noise <= self.noise_multiplier:
            raise RecipeError(
                f"privacy.adaptive_clip.count_noise {self.count_noise:g}: the noisy count alone costs as much as a "
                f"release with noise multiplier {2 * self.count_noise:g}, and a round has {self.noise_multiplier:g}",
                hint=f"set count_noise above {self.noise_multiplier / 2:g}, or leave it out",
            )

    @classmethod
    def of(cls, spec: AdaptiveClipSpec, noise_multiplier: float, expected: int) -> AdaptiveClip:
        """With σ_b of a twentieth of the cohort, but no less than z: with that the sum needs 15 % more noise. (The
        second is ours: the paper's cohorts are large.)"""
        chosen = spec.count_noise
        count_noise = max(_COUNT_NOISE * expected, noise_multiplier) if chosen is None else chosen
        return cls(spec.quantile, spec.lr, count_noise, noise_multiplier, expected)

    @property
    def sum_noise(self) -> float:
        """z_Δ, of the sum of updates in units of C."""
        if not self.noise_multiplier:
            return 0.0
        return float((self.noise_multiplier**-2 - (2 * self.count_noise) ** -2) ** -0.5)

    def share(self, centred: float, noise: float) -> float:
        """b̃.

        Args:
            centred: Σ (bᵢ − ½) over the updates in the sum.
            noise: a standard normal number.
        """
        sigma = self.count_noise if self.noise_multiplier else 0.0
        return 0.5 + (centred + sigma * noise) / self.expected

    def after(self, bound: float, share: float) -> float:
        """The next round's C."""
        return bound * math.exp(-self.lr * (share - self.quantile))

"""Differential privacy of sites: what one site sends is bounded, and the sum of all is released with noise.

Privacy unit: a site, with all its rows. Neighbouring data sets: one site more or fewer. Each site's update is clipped
to L2 norm C over all its tensors together, at the site itself; updates count alike; the coordinator adds noise of
standard deviation z·C to each element of their sum and divides by a number fixed beforehand, whoever answers (McMahan
et al., Learning Differentially Private Recurrent Language Models, ICLR 2018, arXiv:1710.06963). Sensitivity of the sum:
C, in L2. Sampling: none is assumed, so that a site counts as taking part in every round, also in those to which the
draw of a cohort, which anyone can repeat, did not invite it.

Everyone who sees what is published is bounded in what they learn of a site; the coordinator itself, which sees the
updates before the noise, or with secure sums their sum, is not. It is where sites add the noise (`distributed.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..model.tensors import NamedTensors, l2_norm
from ..recipe.schema import Recipe
from .accounting import noise_multiplier
from .noise import Noise


def planned_noise(recipe: Recipe) -> float:
    """z, as the recipe says it or as its ε needs it."""
    spec = recipe.privacy
    if spec.noise_multiplier is not None:
        return spec.noise_multiplier
    assert spec.epsilon is not None
    assert spec.delta is not None
    discrete = spec.mechanism.at_sites
    return noise_multiplier(spec.epsilon, spec.delta, count=participations(recipe), discrete=discrete)


def participations(recipe: Recipe, rounds: int | None = None) -> int:
    """In how many rounds a site takes part at most: of the recipe's, or of the first so many."""
    return math.ceil((recipe.federation.rounds if rounds is None else rounds) / recipe.privacy.mechanism.separation)


def clip_(update: NamedTensors, bound: float) -> float:
    """Δ ← Δ·min(1, C/‖Δ‖₂), in place, over all floating tensors together; returns the norm before.

    After it the norm is at most C·(1 + 1e-6).
    """
    before = norm = l2_norm(update)
    goal = bound
    while norm > bound * (1 + 1e-6):
        for _, flat in update.floating():
            flat.mul_(goal / norm)
        norm = l2_norm(update)
        goal *= 1 - 2**-10  # only dtypes narrower than float32 may have been rounded up so far
    return before


@dataclass(frozen=True)
class NoisyMean:
    """How one round's sum of clipped updates becomes a mean that may be published.

    Args:
        bound: C.
        noise_multiplier: z.
        expected: what the sum is divided by.
        noise: of this round; None: the sum has its noise already.
    """

    bound: float
    noise_multiplier: float
    expected: int
    noise: Noise | None

    def release(self, total: NamedTensors, first: Mapping[torch.dtype, int]) -> NamedTensors:
        """(Σ Δᵢ + N(0, z²C²))/m, in place.

        Args:
            total: Σ Δᵢ, wide, or a stretch of it.
            first: where the stretch begins in each dtype's flat; empty: at the beginning.
        """
        for dtype, flat in total.floating():
            if self.noise is not None:
                sigma = self.noise_multiplier * self.bound
                self.noise.add_(flat, sigma, number=_ROWS[dtype], start=first.get(dtype, 0))
            flat.div_(self.expected)
        return total


#: the row of the noise of a count
COUNT_ROW = 4
#: which row of the noise goes to which flat
_ROWS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

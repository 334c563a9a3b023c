"""The geometric median by smoothed Weiszfeld iterations: RFA (Pillutla et al. 2022, arXiv:1912.13445)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..individuals import weights_of
from ..update import Update
from .rows import Survey, distances_to, squared_distances
from .strategy import Combine, RobustOptions, RobustStrategy


def geometric_median(
    products: Tensor, weights: Sequence[float], *, nu: float = 1e-6, max_iterations: int = 32, tolerance: float = 1e-6
) -> Tensor:
    """argmin over v of Σ pᵢ‖xᵢ − v‖, smoothed: the coefficients of v, (n,), float64, which add up to 1.

    v ← Σ βᵢxᵢ / Σ βᵢ with βᵢ = pᵢ / max(ν, ‖xᵢ − v‖), until Σ pᵢ‖xᵢ − v‖ falls by less than `tolerance` of itself, or
    `max_iterations`. Every v is a combination of the rows, so only its n coefficients are iterated.

    The first βᵢ take a row's median distance to all rows in place of ‖xᵢ − v‖. The paper leaves the start open; from
    the mean, which f huge rows may carry anywhere, an iteration comes back by no more than a factor (n − f)/f.

    Args:
        products: the rows' inner products, n × n.
        weights: pᵢ > 0; only their ratios count.
        nu: ν, below which a distance counts as ν.
    """
    shares = torch.tensor(weights, dtype=torch.float64)
    shares /= shares.sum()
    distances = squared_distances(products).sqrt().median(dim=1).values
    before = torch.inf
    for _ in range(max_iterations + 1):
        coefficients = shares / distances.clamp(min=nu)
        coefficients /= coefficients.sum()
        distances = distances_to(products, coefficients)
        total = float(shares @ distances)
        if before - total <= tolerance * total:
            break
        before = total
    return coefficients


class GeometricMedian(RobustStrategy):
    """θ ← θ + η·argmin over v of Σ pᵢ‖Δᵢ − v‖ (Pillutla et al. 2022, Algorithm 2).

    Weighted as in the paper, pᵢ ∝ the update's weight: it withstands hostile sites that hold less than half of all
    weight together. Where a site's own count cannot be trusted, let the recipe weigh sites alike.
    """

    name = "geometric-median"
    rule = "θ ← θ + η·argmin_v Σ pᵢ‖Δᵢ − v‖"
    source = "Pillutla et al., Robust Aggregation for Federated Learning, IEEE TSP 2022, arXiv:1912.13445"
    pairwise = True

    class Options(RobustOptions):
        """The geometric median's options."""

        nu: float = Field(1e-6, gt=0, description="ν, the least distance that an update is taken to have. Paper: 1e-6.")
        max_iterations: int = Field(32, ge=1, le=10_000, description="Weiszfeld iterations at most.")
        tolerance: float = Field(
            1e-6, ge=0, lt=1, description="Iterating ends when the weighted sum of distances falls by less, relatively."
        )

    options: Options

    def plan(self, seen: Survey, updates: Sequence[Update]) -> Combine:
        o = self.options
        coefficients = geometric_median(
            seen.products, weights_of(updates), nu=o.nu, max_iterations=o.max_iterations, tolerance=o.tolerance
        )
        return lambda rows: coefficients @ rows

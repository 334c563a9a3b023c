"""Centered clipping (Karimireddy et al. 2021, arXiv:2012.10333): each update pulls at the last aggregate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..update import Update
from .rows import Survey, distances_to
from .strategy import Combine, RobustOptions, RobustStrategy


def centered_clipping(products: Tensor, *, tau: float | Literal["median"], iterations: int) -> Tensor:
    """v ← v + mean of (xᵢ − v)·min(1, τ/‖xᵢ − v‖), `iterations` times: the coefficients of v, (n + 1,), float64.

    Every v is a combination of the n rows and of where it begins, the last row, so only coefficients are iterated.

    Args:
        products: the inner products of all n + 1.
        tau: τ > 0; `median`: in each iteration the median of ‖xᵢ − v‖.
    """
    n = len(products) - 1
    coefficients = torch.zeros(n + 1, dtype=torch.float64)
    coefficients[-1] = 1
    for _ in range(iterations):
        distances = distances_to(products, coefficients)[:n]
        radius = float(torch.quantile(distances, 0.5)) if tau == "median" else tau
        pulls = torch.where(distances > radius, radius / distances, 1.0) / n
        coefficients *= 1 - pulls.sum()
        coefficients[:n] += pulls
    return coefficients


class CenteredClipping(RobustStrategy):
    """v ← v + mean of (Δᵢ − v)·min(1, τ/‖Δᵢ − v‖), L times from the last round's v; θ ← θ + ηv. Sites count alike.

    v is 0 before the first round and is carried as the slot `center`. The paper's τ is a number that must suit the
    updates' scale; `median`, which is not the paper's, takes the median distance to v: with fewer hostile sites than
    honest ones it is never larger than an honest one's.
    """

    name = "centered-clipping"
    rule = "v ← v + mean (Δᵢ − v)·min(1, τ/‖Δᵢ − v‖), L times; θ ← θ + ηv"
    source = "Karimireddy et al., Learning from History for Byzantine Robust Optimization, ICML 2021, arXiv:2012.10333"
    slot_names = ("center",)
    pairwise = True

    class Options(RobustOptions):
        """Centered clipping's options."""

        tau: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["median"] = Field(
            "median",
            description="τ, how far one update may pull: an L2 norm, or `median`: the median of ‖Δᵢ − v‖ at each turn.",
        )
        iterations: int = Field(
            3, ge=1, le=1000, description="L, how often the clipping is repeated in a round. The paper's: 1."
        )

    options: Options

    def plan(self, seen: Survey, updates: Sequence[Update]) -> Combine:
        coefficients = centered_clipping(seen.products, tau=self.options.tau, iterations=self.options.iterations)
        return lambda rows: coefficients @ rows

"""Centered clipping (Karimireddy et al. 2021, arXiv:2012.10333): each update pulls at the last aggregate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...model.tensors import NamedTensors
from ..base import ServerState
from ..individuals import vector_of
from ..update import Update
from .rows import combination, distances_to, inner_products
from .strategy import RobustOptions, RobustStrategy

#: the slot that holds the last round's aggregate
CENTER = "center"


def centered_clipping(rows: Tensor, center: Tensor, *, tau: float | Literal["median"], iterations: int) -> Tensor:
    """v ← v + mean of (xᵢ − v)·min(1, τ/‖xᵢ − v‖), `iterations` times from `center`: (d,).

    Every v is a combination of the rows and the center, so only its n + 1 coefficients are iterated.

    Args:
        rows: n × d.
        center: (d,), where v begins.
        tau: τ > 0; `median`: in each iteration the median of ‖xᵢ − v‖.
    """
    n = len(rows)
    products = inner_products(rows, center[None])
    coefficients = torch.zeros(n + 1, dtype=torch.float64)
    coefficients[-1] = 1
    for _ in range(iterations):
        distances = distances_to(products, coefficients)[:n]
        radius = float(torch.quantile(distances, 0.5)) if tau == "median" else tau
        pulls = torch.where(distances > radius, radius / distances, 1.0) / n
        coefficients *= 1 - pulls.sum()
        coefficients[:n] += pulls
    return combination(coefficients, rows, center[None])


class CenteredClipping(RobustStrategy):
    """v ← v + mean of (Δᵢ − v)·min(1, τ/‖Δᵢ − v‖), L times from the last round's v; θ ← θ + ηv. Sites count alike.

    v is 0 before the first round and is carried as the slot `center`. The paper's τ is a number that must suit the
    updates' scale; `median`, which is not the paper's, takes the median distance to v: with fewer hostile sites than
    honest ones it is never larger than an honest one's.
    """

    name = "centered-clipping"
    rule = "v ← v + mean (Δᵢ − v)·min(1, τ/‖Δᵢ − v‖), L times; θ ← θ + ηv"
    source = "Karimireddy et al., Learning from History for Byzantine Robust Optimization, ICML 2021, arXiv:2012.10333"

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

    def init(self, theta: NamedTensors) -> ServerState:
        return ServerState(theta, {CENTER: NamedTensors.zeros(theta.layout, wide=True)})

    def aggregate(self, rows: Tensor, state: ServerState, updates: Sequence[Update]) -> Tensor:
        slot = state.slots[CENTER]
        found = centered_clipping(rows, vector_of(slot), tau=self.options.tau, iterations=self.options.iterations)
        start = 0
        for _, flat in slot.floating():
            flat.copy_(found[start : start + flat.numel()])
            start += flat.numel()
        return found

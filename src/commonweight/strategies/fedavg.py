"""FedAvg: the weighted mean of what the sites changed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .base import SumStrategy


class FedAvg(SumStrategy):
    """θ ← θ + Δ, with Δ = Σ pᵢΔᵢ (McMahan et al. 2017, Algorithm 1).

    The paper averages the sites' models θᵢ; since Σ pᵢ = 1 that is θ + Σ pᵢ(θᵢ − θ). Its weights are the numbers of
    examples; `federation.weighting` chooses others.
    """

    name = "fedavg"
    rule = "θ ← θ + Δ"
    source = (
        "McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, "
        "AISTATS 2017, arXiv:1602.05629"
    )

    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        theta.add_(delta)

"""FedAvgM: server momentum over the mean update."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .base import SumStrategy


class FedAvgM(SumStrategy):
    """m ← βm + Δ; θ ← θ + ηm (Hsu et al. 2019, Section 4.3).

    The momentum is not damped: with updates that agree, the step grows to η/(1 − β) times the mean.
    """

    name = "fedavgm"
    rule = "m ← βm + Δ; θ ← θ + ηm"
    source = (
        "Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, "
        "2019, arXiv:1909.06335"
    )
    slot_names = ("m",)

    class Options(BaseModel):
        """FedAvgM's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        lr: float = Field(1.0, gt=0, le=100, description="η, the server's learning rate. Known to be good: 1.")
        momentum: float = Field(
            0.9, ge=0, lt=1, description="β. Known to be good: 0.9; 0.5 on some language-model tasks."
        )

    options: Options

    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        m = slots["m"]
        m.mul_(self.options.momentum).add_(delta)
        theta.add_(m, alpha=self.options.lr)

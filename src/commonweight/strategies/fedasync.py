"""FedAsync: every arriving model is mixed into the global one at once, a stale one less."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .asynchronous import AsynchronousStrategy


class FedAsync(AsynchronousStrategy):
    """θ ← (1−αₜ)θ + αₜθᵢ with αₜ = α(1+τ)^-b (Xie et al. 2019, Algorithm 1, polynomial staleness).

    θᵢ is the site's model, its update on top of the version that it started from: not Δᵢ on top of the present θ. What
    happened in between is thus mixed out of the model by αₜ. Each arrival is a version. The paper's sites also pull
    towards their start (ρ), as FedProx does; here their work is plain.
    """

    name = "fedasync"
    rule = "θ ← (1−αₜ)θ + αₜθᵢ, αₜ = α(1+τ)^-b, at each arrival"
    source = "Xie et al., Asynchronous Federated Optimization, arXiv 2019, arXiv:1903.03934"
    keeps = "model"

    class Options(BaseModel):
        """FedAsync's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        alpha: float = Field(0.6, gt=0, le=1, description="α, the share of a fresh model. Known to be good: 0.6.")
        exponent: float = Field(
            0.5, ge=0, le=10, description="b: how fast the share falls with staleness. Known to be good: 0.5."
        )
        max_staleness: int = Field(
            100, ge=0, description="τ_max: an update made from a version further behind is refused."
        )

    options: Options

    @property
    def buffer(self) -> int:
        return 1

    @property
    def max_staleness(self) -> int:
        return self.options.max_staleness

    def discount(self, staleness: int) -> float:
        """αₜ."""
        return float(self.options.alpha * (1 + staleness) ** -self.options.exponent)

    def step(self, theta: Tensor, total: Tensor, total_weight: float, num_updates: int) -> None:
        if num_updates != 1:
            raise ValueError(f"{num_updates} updates in a version of {self.name}, which mixes in one at a time")
        theta.mul_(1 - total_weight).add_(total)

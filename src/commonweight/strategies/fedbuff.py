"""FedBuff: updates gather in a buffer, stale ones count less, and a full buffer is one step of the model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .asynchronous import AsynchronousStrategy


class FedBuff(AsynchronousStrategy):
    """θ ← θ + (η/K) Σ (1+τᵢ)^-½ Δᵢ over K updates of distinct sites (Nguyen et al. 2022, Algorithm 1).

    The discount is the paper's choice for stale updates (its section 5). Sites count alike, as in the paper, whatever
    `federation.weighting` says, and the sum is divided by K, not by the discounts' sum: a stale buffer steps shorter.
    """

    name = "fedbuff"
    rule = "θ ← θ + (η/K) Σ (1+τᵢ)^-½ Δᵢ, at K arrivals"
    source = "Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, AISTATS 2022, arXiv:2106.06639"

    class Options(BaseModel):
        """FedBuff's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        buffer: int = Field(
            10,
            ge=1,
            description="K, the updates of distinct sites behind one step; at most as many as work at once "
            "(`federation.cohort`). Known to be good: 10.",
        )
        lr: float = Field(1.0, gt=0, le=100, description="η, the server's learning rate.")
        max_staleness: int = Field(
            100, ge=0, description="τ_max: an update made from a version further behind is refused."
        )

    options: Options

    @property
    def buffer(self) -> int:
        return self.options.buffer

    @property
    def max_staleness(self) -> int:
        return self.options.max_staleness

    def discount(self, staleness: int) -> float:
        """(1+τ)^-½."""
        return float((1 + staleness) ** -0.5)

    def step(self, theta: Tensor, total: Tensor, total_weight: float, num_updates: int) -> None:
        theta.add_(total, alpha=self.options.lr / num_updates)

"""FedProx: FedAvg with sites held near the global model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .fedavg import FedAvg


class FedProx(FedAvg):
    """Site: minimise Lᵢ(θᵢ) + μ/2 ‖θᵢ − θ‖²; server: θ ← θ + Δ (Li et al. 2020, Algorithm 2).

    A site adds μ(θᵢ − θ) to the gradient of its trainable tensors in every local step, θ being the model that it
    received. The paper draws the cohort in proportion to examples and averages it uniformly; here the cohort is drawn
    uniformly and the mean is weighted, as in FedAvg.
    """

    name = "fedprox"
    rule = "min Lᵢ(θᵢ) + μ/2 ‖θᵢ − θ‖² at the site; θ ← θ + Δ"
    source = "Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, arXiv:1812.06127"

    class Options(BaseModel):
        """FedProx's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        mu: float = Field(
            0.01,
            ge=0,
            le=1e3,
            description="μ, the pull towards the global model; 0 is FedAvg. Known to be good: 0.01 for LoRA; "
            "the paper searches 0.001, 0.01, 0.1, 1.",
        )

    options: Options

    def correction(self) -> dict[str, Any]:
        """`{"kind": "prox", "mu": μ}`."""
        return {"kind": "prox", "mu": self.options.mu}

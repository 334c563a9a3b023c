"""FedAdam: Adam at the server, with the mean update in the gradient's place."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..model.tensors import NamedTensors
from .base import ServerState, SumStrategy


class FedAdam(SumStrategy):
    """m ← β₁m + (1−β₁)Δ; v ← β₂v + (1−β₂)Δ²; θ ← θ + ηm/(√v + τ) (Reddi et al. 2021, Algorithm 2).

    m starts at 0 and v at τ². v is built from Δ², not from m², and there is no bias correction: both as in the paper.
    """

    name = "fedadam"
    rule = "m ← β₁m + (1−β₁)Δ; v ← β₂v + (1−β₂)Δ²; θ ← θ + ηm/(√v + τ); v₀ = τ²"
    source = "Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv:2003.00295"
    slot_names = ("m", "v")

    class Options(BaseModel):
        """FedAdam's and FedYogi's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        lr: float = Field(
            1e-2, gt=0, le=100, description="η, the server's learning rate. Known to be good: 0.01 for LoRA."
        )
        beta1: float = Field(0.9, ge=0, lt=1, description="β₁, the decay of m. Known to be good: 0.9.")
        beta2: float = Field(0.99, ge=0, lt=1, description="β₂, the decay of v. Known to be good: 0.99.")
        tau: float = Field(
            1e-4,
            gt=0,
            le=1,
            description="τ: the smaller, the more adaptive. Known to be good: 0.0001 for LoRA; the paper's is 0.001.",
        )

    options: Options

    def init(self, theta: NamedTensors) -> ServerState:
        """θ as given, m = 0 and v = τ²."""
        state = super().init(theta)
        for _, v in state.slots["v"].floating():
            v.fill_(self.options.tau**2)
        return state

    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        m, v = slots["m"], slots["v"]
        m.mul_(self.options.beta1).add_(delta, alpha=1 - self.options.beta1)
        self.update_v(v, delta)
        theta.addcdiv_(m, v.sqrt().add_(self.options.tau), value=self.options.lr)

    def update_v(self, v: Tensor, delta: Tensor) -> None:
        """v ← β₂v + (1−β₂)Δ², in place."""
        v.mul_(self.options.beta2).addcmul_(delta, delta, value=1 - self.options.beta2)

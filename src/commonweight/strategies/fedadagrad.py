"""FedAdagrad: each coordinate's step shrinks with the sum of its squared updates."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..model.tensors import NamedTensors
from .base import ServerState, SumStrategy


class FedAdagrad(SumStrategy):
    """v ← v + Δ²; θ ← θ + ηΔ/(√v + τ) (Reddi et al. 2021, Algorithm 2).

    v starts at τ². The paper's algorithm also allows momentum; its FedAdagrad experiments use none (β₁ = 0).
    """

    name = "fedadagrad"
    rule = "v ← v + Δ²; θ ← θ + ηΔ/(√v + τ); v₀ = τ²"
    source = "Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv:2003.00295"
    slot_names = ("v",)

    class Options(BaseModel):
        """FedAdagrad's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        lr: float = Field(
            1e-2, gt=0, le=100, description="η, the server's learning rate. Known to be good: 0.001 to 0.01 for LoRA."
        )
        tau: float = Field(
            1e-3, gt=0, le=1, description="τ: the smaller, the more adaptive. Known to be good: 0.001, the paper's."
        )

    options: Options

    def init(self, theta: NamedTensors) -> ServerState:
        """θ as given and v = τ²."""
        state = super().init(theta)
        for _, v in state.slots["v"].floating():
            v.fill_(self.options.tau**2)
        return state

    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        v = slots["v"]
        v.addcmul_(delta, delta)
        theta.addcdiv_(delta, v.sqrt().add_(self.options.tau), value=self.options.lr)

"""DiLoCo: many local steps, and Nesterov momentum over their outcome."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .base import SumStrategy


class DiLoCo(SumStrategy):
    """m ← βm + Δ; θ ← θ + η(Δ + βm) (Douillard et al. 2023, Algorithm 1).

    Bit for bit what `torch.optim.SGD(lr=η, momentum=β, nesterov=True)` does with −Δ, the paper's outer gradient. The
    paper's workers take H = 500 steps of AdamW a round (`training.steps`) and keep AdamW's state from round to round,
    where sites here start it afresh; and they count alike (`federation.weighting: uniform`).
    """

    name = "diloco"
    rule = "m ← βm + Δ; θ ← θ + η(Δ + βm)"
    source = (
        "Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models, 2023, arXiv:2311.08105"
    )
    slot_names = ("m",)

    class Options(BaseModel):
        """DiLoCo's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        lr: float = Field(0.7, gt=0, le=100, description="η, the outer learning rate. Known to be good: 0.7.")
        momentum: float = Field(0.9, gt=0, lt=1, description="β, the outer momentum. Known to be good: 0.9.")

    options: Options

    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        m = slots["m"]
        m.mul_(self.options.momentum).add_(delta)
        theta.add_(delta.add_(m, alpha=self.options.momentum), alpha=self.options.lr)

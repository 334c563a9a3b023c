"""FedYogi: FedAdam whose second moment moves by at most (1−β₂)Δ² a round."""

from __future__ import annotations

from torch import Tensor

from .fedadam import FedAdam


class FedYogi(FedAdam):
    """v ← v − (1−β₂)Δ² sign(v − Δ²); m, θ and v₀ as in FedAdam (Reddi et al. 2021, Algorithm 2).

    After a round with large updates v falls by small steps, so the step does not grow again at once as Adam's does.
    """

    name = "fedyogi"
    rule = "m ← β₁m + (1−β₁)Δ; v ← v − (1−β₂)Δ² sign(v − Δ²); θ ← θ + ηm/(√v + τ); v₀ = τ²"

    def update_v(self, v: Tensor, delta: Tensor) -> None:
        """v ← v − (1−β₂)Δ² sign(v − Δ²), in place."""
        squared = delta.square()
        v.addcmul_(squared, (v - squared).sign_(), value=self.options.beta2 - 1)

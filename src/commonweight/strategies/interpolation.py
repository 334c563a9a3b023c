"""Interpolation: each site uses a mixture of the global model and one that it trains alone, in its own proportion."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .fedavg import FedAvg


class Interpolation(FedAvg):
    """θ as by FedAvg; site i uses αᵢvᵢ + (1 − αᵢ)θ, where vᵢ ← vᵢ − η∇Lᵢ(vᵢ) is trained at the site alone.

    Model interpolation (Mansour et al. 2020, MAPPER): a proportion of each site's own, searched on a grid. The models'
    weights are mixed, tensor by tensor, as APFL does (Deng et al. 2020). αᵢ is the one of 0, 0.1 … 1 with the
    lowest loss on training rows that the site has kept aside, chosen anew whenever the site takes up a new θ; or the
    recipe's. Ours, for simplicity: vᵢ follows its own loss, where both papers train it for the mixture, so that vᵢ
    depends on neither α nor θ.

    The rows kept aside train nothing: neither θ nor vᵢ, nor the control arms, which so stay comparable. They are
    whole groups, none of them held out. Local work doubles, and each evaluation reads the rows kept aside eleven
    times. vᵢ and αᵢ stay at the site. vᵢ starts from the θ of its first invitation, as the mixture of two LoRA pairs
    means something only as long as they have not gone far apart; until then the site uses θ.
    """

    name = "interpolation"
    rule = "θ ← θ + Δ; each site trains v alone and uses αv + (1 − α)θ, its own α and v staying there"
    source = (
        "Mansour et al., Three Approaches for Personalization with Applications to Federated Learning, 2020, "
        "arXiv:2002.10619; Deng et al., Adaptive Personalized Federated Learning, 2020, arXiv:2003.13461"
    )
    site_state = True
    own_model = True

    class Options(BaseModel):
        """Interpolation's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        alpha: float | None = Field(
            None,
            ge=0,
            le=1,
            description="α, the share of a site's own model, for all sites; null: each chooses its own.",
        )
        keep_aside: float = Field(
            0.1, gt=0, lt=1, description="Share of each site's training rows kept aside for the choice."
        )
        effort: float = Field(
            1.0, gt=0, le=100, description="A site's steps for its own model, for each of those for the global model."
        )

    options: Options

    @property
    def alpha(self) -> float | None:
        return self.options.alpha

    @property
    def aside(self) -> float:
        return self.options.keep_aside if self.options.alpha is None else 0.0

    def correction(self) -> dict[str, Any]:
        """`{"kind": "own", "pull": 0, "effort": …}`."""
        return {"kind": "own", "pull": 0.0, "effort": self.options.effort}

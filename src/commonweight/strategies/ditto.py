"""Ditto: beside the global model each site trains one of its own, held near it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .fedavg import FedAvg


class Ditto(FedAvg):
    """θ as by FedAvg; at site i also vᵢ ← vᵢ − η(∇Lᵢ(vᵢ) + λ(vᵢ − θ)) (Li et al. 2021, Algorithm 1).

    θ in the second rule is the global model that the site received in this round. vᵢ is the site's private state: it is
    what the site uses, and never leaves. The smaller λ, the more vᵢ is the site's own: λ = 0 trains it alone, a large λ
    makes it the global model. Local work doubles: as many steps for vᵢ as for θ, over its own order of the same rows,
    with a fresh optimizer each round.

    At a site's first invitation vᵢ is the θ that it receives (the paper leaves the start open); until then the site
    uses the global model.
    """

    name = "ditto"
    rule = "θ ← θ + Δ; at each site v ← v − η(∇L(v) + λ(v − θ)), which stays there"
    source = "Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021, arXiv:2012.04221"
    site_state = True
    own_model = True

    class Options(BaseModel):
        """Ditto's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        pull: float = Field(
            0.1,
            ge=0,
            le=1e3,
            description="λ, the pull of each site's own model towards the global one. Known to be good: 0.1 to 1.",
        )
        effort: float = Field(
            1.0, gt=0, le=100, description="A site's steps for its own model, for each of those for the global model."
        )

    options: Options

    def correction(self) -> dict[str, Any]:
        """`{"kind": "own", "pull": λ, "effort": …}`."""
        return {"kind": "own", "pull": self.options.pull, "effort": self.options.effort}

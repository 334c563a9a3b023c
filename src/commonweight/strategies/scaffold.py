"""SCAFFOLD: control variates that cancel each site's drift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .base import Fold, ServerState, SumStrategy, WeightedSum


class Scaffold(SumStrategy):
    """θ ← θ + ηΔ; c ← c + Σ(cᵢ⁺ − cᵢ)/N (Karimireddy et al. 2020, Algorithm 1, option II).

    The site, with its own cᵢ (0 at first) and the received c, replaces each local gradient g by g − cᵢ + c. After K
    steps of learning rate ηₗ it takes cᵢ⁺ = cᵢ − c + (θ − θᵢ)/(Kηₗ) and sends cᵢ⁺ − cᵢ as the channel `control`, in
    theta's dtypes. It must add to cᵢ what it sent, after rounding, and only once its update was accepted: then c stays
    the mean of all cᵢ. The rule is derived for plain SGD.

    N is the number of all the run's sites, not of the cohort: an absent site's cᵢ has not changed. Control variates
    count alike, as in the paper; Δ is weighted as in FedAvg, where the paper's mean is uniform.
    """

    name = "scaffold"
    rule = "g ← g − cᵢ + c at the site; θ ← θ + ηΔ; c ← c + Σ(cᵢ⁺ − cᵢ)/N"
    source = (
        "Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, "
        "ICML 2020, arXiv:1910.06378"
    )
    slot_names = ("control",)
    broadcast_channels = ("control",)
    update_channels = ("delta", "control")
    site_state = True

    class Options(BaseModel):
        """SCAFFOLD's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        lr: float = Field(
            1.0, gt=0, le=100, description="η, the server's learning rate. Known to be good: 1, the paper's choice."
        )

    options: Options

    def correction(self) -> dict[str, Any]:
        """`{"kind": "scaffold"}`."""
        return {"kind": "scaffold"}

    def close(self, state: ServerState, fold: Fold) -> ServerState:
        """End a round: θ from the mean delta, c from the sum of the control changes.

        Raises:
            ValueError: nothing was folded, or more updates than the run has sites: `num_sites` is wrong.
        """
        assert isinstance(fold, WeightedSum)
        if fold.num_updates > self.num_sites:
            raise ValueError(f"{fold.num_updates} updates in a round of a run with num_sites={self.num_sites}")
        for dtype, change in fold.sums["control"].floating():
            state.slots["control"].flats[dtype].add_(change, alpha=1 / self.num_sites)
        return super().close(state, fold)

    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        theta.add_(delta, alpha=self.options.lr)

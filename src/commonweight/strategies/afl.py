"""AFL, agnostic federated learning: the model that does best where the sites' mixture is worst for it.

    min over θ, max over λ of Σ λᵢFᵢ(θ), λ on the simplex:  θ ← θ + η·Σ λᵢΔᵢ;  λ ← Π(λ + γF)
    (Mohri et al. 2019, Algorithm 1)

Legend: Fᵢ the loss of site i at the θ that the round started from, in nats a label token; Π the nearest point of the
simplex {λ ≥ 0, Σλᵢ = 1}.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field

from .base import ServerState
from .individuals import NO_FIRST_LOSS, IndividualsStrategy, add_vector, first_loss, vector_of
from .update import Update


def nearest_on_simplex(values: Sequence[float], total: float) -> list[float]:
    """The point x ≥ 0 with Σxᵢ = total that is nearest to `values`: max(0, vᵢ − c) for the c that gives this sum
    (Duchi et al., Efficient Projections onto the ℓ₁-Ball, ICML 2008, Figure 1).

    Args:
        values: at least one number.
        total: not below 0.
    """
    above, cut = 0.0, 0.0
    for count, value in enumerate(sorted(values, reverse=True), start=1):
        above += value
        if value - (above - total) / count <= 0 and count > 1:
            break
        cut = (above - total) / count
    return [max(0.0, value - cut) for value in values]


class AFL(IndividualsStrategy):
    """θ ← θ + η·Σ λᵢΔᵢ, then λ ← Π(λ + γF), both from the θ and the λ that the round started with (Mohri et al. 2019,
    Algorithm 1, with a site's Δᵢ in place of its gradient).

    λ begins uniform and is carried from round to round, a number for each site. It moves towards the sites with the
    largest losses, at the end on the worst ones alone; sites whose loss is no worry end at 0, and then nothing of what
    they learn counts. Sites' sizes do not count, whatever `federation.weighting` says.

    Of a round that only some sites answer: their λ count by their share, and the ascent goes on among them; together
    they keep what they had, and the λ of the others stay. If all that answer have λ = 0, they count alike. This is
    ours: the paper draws one site at a time by λ, or has them all.

    Fᵢ is an estimate, as for q-FedAvg: the metric `first_loss`, the loss on the site's first batch before any change.
    The paper's bounds are for the mean of all rounds' θ; here the last is the result, as everywhere.
    """

    name = "afl"
    rule = "θ ← θ + η·Σ λᵢΔᵢ; λ ← the point of the simplex nearest to λ + γF"
    source = "Mohri, Sivek and Suresh, Agnostic Federated Learning, ICML 2019, arXiv:1902.00146"
    asks_losses = True
    not_networked = NO_FIRST_LOSS

    class Options(BaseModel):
        """AFL's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        gamma: float = Field(
            0.1,
            ge=0,
            le=100,
            description="γ, the step of λ, which is a share, along losses in nats a token: at 0.1 a site whose loss is "
            "0.5 above the others' gains 0.05 a round. 0 is the plain uniform mean.",
        )
        lr: float = Field(1.0, gt=0, le=100, description="η, the server's learning rate.")

    options: Options

    def combine(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """See `IndividualsStrategy`.

        Raises:
            RoundError: an update has no usable `first_loss`.
        """
        losses = [first_loss(update, self.name) for update in updates]
        shares = [state.numbers.get(update.site, 1 / self.num_sites) for update in updates]
        together = sum(shares)
        weights = shares if together > 0 else [1.0] * len(updates)
        total = torch.zeros(0)
        for weight, update in zip(weights, updates, strict=True):
            delta = vector_of(update.delta)
            total = total.add_(delta, alpha=weight) if len(total) else delta.mul_(weight)
        add_vector(state.theta, total.div_(sum(weights)), lr=self.options.lr)

        climbed = [share + self.options.gamma * loss for share, loss in zip(shares, losses, strict=True)]
        for update, share in zip(updates, nearest_on_simplex(climbed, together), strict=True):
            state.numbers[update.site] = share
        return state

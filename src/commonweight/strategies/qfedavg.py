"""q-FedAvg: sites that are served badly count more.

    Δwᵢ = L(θ − θᵢ);  hᵢ = q·Fᵢ^(q−1)·‖Δwᵢ‖² + L·Fᵢ^q;  θ ← θ − Σ Fᵢ^q·Δwᵢ / Σ hᵢ
    (Li et al. 2020, Algorithm 2)

Legend: Fᵢ the loss of site i at the θ that the round started from, in nats a label token; L = 1/lr.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .base import ServerState
from .individuals import NO_FIRST_LOSS, IndividualsStrategy, add_vector, first_loss, vector_of
from .update import Update

# Fᵢ^(q−1) has no value at a loss of exactly 0, which float32 reaches for text learned by heart
_SMALLEST_LOSS = 1e-10


class QFedAvg(IndividualsStrategy):
    """θ ← θ + Σ Fᵢ^q·Δᵢ / Σ Fᵢ^q(1 + q·L‖Δᵢ‖²/Fᵢ), with L = 1/lr: the paper's rule divided through by L (Li et al.
    2020, Algorithm 2), for the objective Σ Fᵢ^(q+1)/(q+1).

    q = 0 is the plain mean, uniform over the sites; a larger q makes the sites' losses more alike, and slows: the sum
    below the line bounds the step by how fast Fᵢ^q may change. Sites count alike otherwise, whatever
    `federation.weighting` says: the paper draws them by their sizes and then averages uniformly.

    Fᵢ is an estimate: the metric `first_loss`, the loss on the site's first batch before any change, with dropout if
    there is any. The paper takes the loss on all of a site's rows, one more pass over them.

    L is the paper's estimate of the loss's Lipschitz constant, 1 over the learning rate that is best for q = 0. It
    supposes that Δᵢ is the learning rate times a sum of gradients. With AdamW the length of Δᵢ has nothing to do with
    that of the gradients, so that `lr` becomes a free number: larger is bolder, and q‖Δᵢ‖²/(lr·Fᵢ) far above 1 means
    that the step almost vanishes.
    """

    name = "q-fedavg"
    rule = "θ ← θ + Σ Fᵢ^q·Δᵢ / Σ Fᵢ^q(1 + q·‖Δᵢ‖²/(lr·Fᵢ))"
    source = "Li et al., Fair Resource Allocation in Federated Learning, ICLR 2020, arXiv:1905.10497"
    asks_losses = True
    not_networked = NO_FIRST_LOSS

    class Options(BaseModel):
        """q-FedAvg's options."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        q: float = Field(
            0.2,
            ge=0,
            le=100,
            description="Fairness: 0 is the plain uniform mean, large values care for the worst site alone. The paper "
            "uses 0.001 to 5.",
        )
        lr: float = Field(
            100.0,
            gt=0,
            le=1e6,
            description="1/L. With plain SGD at the sites: their learning rate. With AdamW: to be tuned; in the demo "
            "100 keeps pace with the plain mean, and 1 falls far behind.",
        )

    options: Options

    def combine(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """See `IndividualsStrategy`.

        Raises:
            RoundError: an update has no usable `first_loss`.
        """
        q, lr = self.options.q, self.options.lr
        losses = [max(first_loss(update, self.name), _SMALLEST_LOSS) for update in updates]
        largest = max(losses)
        total, below = torch.zeros(0), 0.0
        for loss, update in zip(losses, updates, strict=True):
            delta = vector_of(update.delta)
            # F^q over the largest F^q, by which both sums may be divided: no power overflows
            weight = (loss / largest) ** q
            below += weight * (1 + q * _squared_length(delta) / (lr * loss))
            total = total.add_(delta, alpha=weight) if len(total) else delta.mul_(weight)
        add_vector(state.theta, total.div_(below))
        return state


def _squared_length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64)) ** 2

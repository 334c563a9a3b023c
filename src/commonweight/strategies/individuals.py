"""Strategies that must see individual updates: robust rules, and those that work on each site's factors.

On one machine they hold a round's updates in memory until it closes: O(cohort × update), where a sum is O(update). No
secure aggregation can be had with them. Those that take a stretch of every update at a time (`side_by_side.py`) can be
led by a coordinator, whose memory is then O(cohort × chunk).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import RoundError
from ..model.tensors import NamedTensors, accumulator_dtype, first_non_finite
from .base import Fold, ServerState, Strategy, non_finite
from .update import Update

#: why a strategy that needs `first_loss` cannot run over a network
NO_FIRST_LOSS = "it weighs sites by the loss that they start from, which does not leave a networked site"


class Kept(Fold):
    """A round's updates, copied, in the order in which they were folded."""

    def __init__(self) -> None:
        self.updates: list[Update] = []

    def add(self, update: Update) -> None:
        channels = {name: tensors.clone() for name, tensors in update.channels.items()}
        self.updates.append(replace(update, channels=channels))
        self.num_updates += 1


class IndividualsStrategy(Strategy):
    """A strategy that needs every update at once. A subclass writes `combine`."""

    needs = "individuals"

    def open(self, state: ServerState) -> Kept:
        return Kept()

    def close(self, state: ServerState, fold: Fold) -> ServerState:
        assert isinstance(fold, Kept)
        if not fold.updates:
            raise ValueError("a round was closed with no update in it")
        state = self.combine(state, fold.updates)
        bad = first_non_finite(state.theta)
        if bad is not None:
            raise non_finite(bad, "theta")
        return state

    @abstractmethod
    def combine(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """A round's result from its updates, of which there is at least one. May change `state` in place.

        Raises:
            RoundError: there are too few updates for the rule to hold what it promises.
        """


def weights_of(updates: Sequence[Update]) -> list[float]:
    """pᵢ = wᵢ / Σw."""
    total = sum(update.weight for update in updates)
    return [update.weight / total for update in updates]


def first_loss(update: Update, strategy: str) -> float:
    """The loss that a site started its local work from, in nats a label token: the metric `first_loss`.

    Args:
        strategy: the name of the one that asks.

    Raises:
        RoundError: the update has none, or one that is no loss.
    """
    loss = update.metrics.get("first_loss")
    if loss is None or not 0 <= loss < float("inf"):
        raise RoundError(
            f"the update of site {update.site!r} for round {update.round} has first_loss {loss}; {strategy} weighs "
            "sites by the loss that they start from",
            hint="an objective of one's own must report LocalResult.first_loss, not below 0; or use fedavg",
        )
    return loss


def rows_of(updates: Sequence[Update], channel: str = "delta") -> Tensor:
    """All floating values of each update as one row: n × d, float32, or float64 if any of the tensors are."""
    return torch.stack([vector_of(update.channels[channel]) for update in updates])


def vector_of(tensors: NamedTensors) -> Tensor:
    """All floating values of named tensors, one dtype after the other, in the widest accumulator among them; a copy."""
    widest = max((accumulator_dtype(d) for d, _ in tensors.floating()), key=lambda d: d.itemsize, default=torch.float32)
    return torch.cat([flat.to(widest) for _, flat in tensors.floating()])


def add_vector(theta: NamedTensors, vector: Tensor, *, lr: float = 1.0) -> None:
    """θ ← θ + lr·vector, the vector laid out as by `vector_of`; summed in the vector's precision, rounded once."""
    start = 0
    for _, flat in theta.floating():
        piece = vector[start : start + flat.numel()]
        flat.copy_(flat.to(vector.dtype).add_(piece, alpha=lr))
        start += flat.numel()

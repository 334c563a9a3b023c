"""Strategies without rounds: updates arrive when they are ready, some of them made from an older version of the model.

A version takes in `buffer` updates and then becomes the next. The loop (`federation/asynchronous.py` in simulation,
`coordinator/versions.py` over a network) sets an update's weight to `discount(τ)`, where τ is its staleness: by how
many versions the model has moved on since its site started. Notation otherwise as in `base.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal

from torch import Tensor

from ..errors import RoundError
from ..model.tensors import NamedTensors, accumulator_dtype, first_non_finite
from .base import Fold, ServerState, Strategy, WeightedSum
from .update import Update


class DiscountedSum(WeightedSum):
    """Σ wᵢxᵢ over a version's arrivals, and Σ wᵢ; nothing is divided."""

    def weight(self, update: Update, channel: str) -> float:
        return update.weight


class AsynchronousStrategy(Strategy):
    """A strategy that takes updates as they arrive. A subclass writes `discount` and `step`."""

    needs = "sum"
    asynchronous = True
    not_networked = ""

    #: what is folded: Δᵢ, or the site's model θᵢ = θ + Δᵢ, θ being the version that it started from. In simulation,
    #: where that version is gone by then, it lies by until the update arrives; over a network the version's frame does
    keeps: ClassVar[Literal["delta", "model"]] = "delta"

    @property
    @abstractmethod
    def buffer(self) -> int:
        """K: updates of distinct sites that a version takes in."""

    @property
    @abstractmethod
    def max_staleness(self) -> int:
        """An update of a larger τ is refused."""

    @abstractmethod
    def discount(self, staleness: int) -> float:
        """The weight of an update, by its staleness τ = 0, 1, …"""

    @abstractmethod
    def step(self, theta: Tensor, total: Tensor, total_weight: float, num_updates: int) -> None:
        """Change theta in place, given Σ wᵢxᵢ over what is kept of the updates, Σ wᵢ and their number.

        Called once for each floating dtype. Both are 1-D of equal length, float32 or float64.
        """

    def kept(self, theta: NamedTensors, update: Update) -> Update:
        """A fresh update as it lies by, in memory of its own; `theta` is what its site started from."""
        delta = update.delta
        if self.keeps == "delta":
            return replace(update, channels={"delta": delta.clone()})
        model = NamedTensors.zeros(theta.layout, wide=True)
        for dtype, flat in model.floating():
            flat.copy_(theta.flats[dtype]).add_(delta.flats[dtype].to(accumulator_dtype(dtype)))
        return replace(update, channels={"model": model})

    def open(self, state: ServerState) -> DiscountedSum:
        return DiscountedSum(state.theta.layout, (self.keeps,))

    def close(self, state: ServerState, fold: Fold) -> ServerState:
        assert isinstance(fold, DiscountedSum)
        if fold.num_updates == 0:
            raise ValueError("a version was closed with no update in it")
        for dtype, total in fold.sums[self.keeps].floating():
            theta = state.theta.flats[dtype]
            wide = theta.to(total.dtype)  # theta itself, unless it is narrower than float32
            self.step(wide, total, fold.total_weight, fold.num_updates)
            theta.copy_(wide)
        bad = first_non_finite(state.theta)
        if bad is not None:
            raise RoundError(
                f"the version's result holds NaN or infinity in {bad!r}, although every update was finite",
                hint="lower training.lr or the strategy's lr; the last committed version is untouched",
            )
        return state

"""What a strategy is: server-side algebra, state + a stream of updates → new state.

A strategy is a class with `name`, `needs`, `Options` and the methods below. One with `needs = "sum"` inherits
`SumStrategy` and writes a single method, `step`, which gets the weighted mean of the deltas. It sees each update once,
in cohort order, and keeps nothing of it: memory is O(model) whatever the cohort.

Notation (also in each strategy's file): θ the global trainable tensors; Δᵢ = θᵢ − θ; pᵢ = wᵢ / Σw over the updates that
arrived; Δ = Σ pᵢΔᵢ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import RoundError
from ..model.shapes import Shape
from ..model.tensors import Layout, NamedTensors, first_non_finite
from .lora.factors import Factors
from .update import Update

# elements widened at once, in 16 MiB that stay in cache. Left to itself, `add_` widens the whole of a narrower update
# into a temporary twice its size and takes 8 times as long; smaller pieces wait more often for busy cores
_PIECE = 1 << 22


class NoOptions(BaseModel):
    """For a method that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass
class ServerState:
    """Everything a strategy carries from round to round; a run resumes from exactly this.

    Args:
        theta: the global trainable tensors, in the model's own dtypes.
        slots: further tensors by name (`m`, `v`, `control` …), of theta's layout, wide (`NamedTensors.zeros`).
        numbers: plain numbers by name, a site's weight say; the journal keeps them. Not over a network.
        first: where these tensors begin in the whole model's flats, if they are a stretch of them.
        residual: what the round just closed adds to the frozen base, by module (`individuals.matrices`): factors of
            scale 1, whose product times the adapter's own scale is added. Only of strategies that `moves_base`, and not
            carried on: whoever runs them keeps it.
    """

    theta: NamedTensors
    slots: dict[str, NamedTensors] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    first: Mapping[torch.dtype, int] = field(default_factory=dict)
    residual: dict[str, Factors] = field(default_factory=dict)


class Release(Protocol):
    """How a sum is made one that may be published: `privacy/site_level.py`."""

    def release(self, total: NamedTensors, first: Mapping[torch.dtype, int]) -> NamedTensors:
        """The mean of Σ Δᵢ with noise, in place; `first` as in `ServerState`."""


class Fold(ABC):
    """What a strategy has seen of a round so far."""

    num_updates: int = 0

    @abstractmethod
    def add(self, update: Update) -> None:
        """Take in one checked update. Its tensors may be reused by the caller afterwards."""


class Strategy(ABC):
    """Server-side algebra."""

    name: ClassVar[str]
    needs: ClassVar[Literal["sum", "individuals"]]
    source: ClassVar[str]
    rule: ClassVar[str]
    Options: ClassVar[type[BaseModel]] = NoOptions

    #: channels that a site needs beside theta, out of the slots, and those that its update carries
    broadcast_channels: tuple[str, ...] = ()
    update_channels: ClassVar[tuple[str, ...]] = ("delta",)

    #: whether each site keeps state of its own between rounds (SCAFFOLD's cᵢ)
    site_state: ClassVar[bool] = False

    #: slots that start at zero, in theta's layout
    slot_names: tuple[str, ...] = ()

    #: tensors that are never trained, sent or averaged: those whose dotted names have this part (`lora_A`); "": none
    frozen: ClassVar[str] = ""

    #: parts of tensors' names that rest in turn, one a round; (): none does
    in_turn: ClassVar[tuple[str, ...]] = ()

    #: tensors that each site trains and keeps to itself, never sent or averaged: those whose names have such a part
    personal: ClassVar[tuple[str, ...]] = ()

    #: whether each site trains a whole model of its own beside the global one, and uses `alpha` of it
    own_model: ClassVar[bool] = False

    #: whether it works on LoRA's pairs A, B and means nothing without them
    pairs: ClassVar[bool] = False
    #: whether it combines sites that hold different parts of a LoRA adapter (`shapes`); such a strategy has `pairs`
    mixed_shapes: ClassVar[bool] = False
    #: whether its rounds add to the frozen base what the adapter cannot hold (`ServerState.residual`)
    moves_base: ClassVar[bool] = False
    #: whether it takes in updates as they come, without rounds in which sites wait for each other
    asynchronous: ClassVar[bool] = False
    #: whether sites are put into clusters, each with a model of its own
    clustered: ClassVar[bool] = False
    #: models kept side by side, one a cluster of sites: theta is cluster 0's, the slots `cluster-1` … are the others'
    num_models: int = 1
    #: the round whose updates are put into clusters (`grouped`) before they are combined; 0: none
    grouping_round: int = 0
    #: whether it goes by losses on the sites' training rows: those that they report, or by which they choose
    asks_losses: ClassVar[bool] = False
    #: why no coordinator can run it, whose updates and model lie in files, as the end of a sentence; "": one can
    not_networked: ClassVar[str] = "a coordinator combines from files, and this strategy takes its updates whole"
    #: whether all it learns from a round's updates is Σ Δᵢ, each counted alike and every element of it
    of_plain_mean: ClassVar[bool] = False
    #: whether all it learns from a round's updates is Σ wᵢΔᵢ, Σ wᵢ and whose they are: then nobody need see one alone
    of_weighted_sum: ClassVar[bool] = False
    #: whether it means the same on the means of groups of sites as on single updates
    of_group_means: ClassVar[bool] = False

    def __init__(self, options: BaseModel | None = None, *, num_sites: int = 1) -> None:
        """Args: options: an instance of `Options`. num_sites: N, all the sites of the run, not a round's cohort."""
        self.options = options if options is not None else self.Options()
        self.num_sites = num_sites
        #: of the sites that hold less than the whole adapter, by name
        self.shapes: Mapping[str, Shape] = {}

    def check(self, num_sites: int) -> None:  # noqa: B027  # most strategies are content with any number
        """Raises RecipeError: a round to which `num_sites` sites are invited is too small for what it promises."""

    @property
    def least_updates(self) -> int:
        """How many updates it takes to close a round."""
        return 1

    @property
    def alpha(self) -> float | None:
        """With `own_model`: the share of its own model in what a site uses, or None: each site chooses it, on training
        rows that it has kept aside."""
        return 1.0

    @property
    def aside(self) -> float:
        """The share of each site's training rows that nothing is trained on, for the choice of `alpha`."""
        return 0.0

    def correction(self) -> dict[str, Any]:
        """What a site changes in its local work: `{"kind": "none"}`, `{"kind": "prox", "mu": …}`,
        `{"kind": "own", "pull": …, "effort": …}` (a model of its own beside it), `{"kind": "scaffold"}` or `{"kind":
        "freeze", "in_turn": […]}`, parts of names that rest, one a round.
        """
        return {"kind": "none"}

    def start(self, round: int, cluster: int | None, found: int) -> dict[str, Any]:
        """Where a site starts from in a round (`train/start.py`).

        Args:
            cluster: the one that the site was last in, if any.
            found: clusters that sites have been in so far.
        """
        return {"kind": "theta"}

    def grouped(self, sketches: Mapping[str, Any]) -> dict[str, int]:
        """The cluster of each site that answered `grouping_round`, by the sketches of their deltas, in the order of
        folding."""
        return {}

    def validate(self, layout: Layout) -> None:  # noqa: B027  # most strategies are content with any tensors
        """Raises RecipeError: the strategy cannot run on trainable tensors of this layout."""

    def init(self, theta: NamedTensors) -> ServerState:
        """The state before round 1; it owns theta from then on."""
        return ServerState(theta, {name: NamedTensors.zeros(theta.layout, wide=True) for name in self.slot_names})

    @abstractmethod
    def open(self, state: ServerState) -> Fold:
        """Begin a round."""

    @abstractmethod
    def close(self, state: ServerState, fold: Fold) -> ServerState:
        """End a round with what was folded. May change `state` in place and return it.

        Raises:
            ValueError: nothing was folded.
            RoundError: the result holds NaN or infinity. `state` may be spoilt then; the last committed one is not.
        """


class WeightedSum(Fold):
    """Σ wᵢxᵢ over each channel, accumulated in float32 (float64 where the tensors are), and Σ wᵢ.

    Reference speed: one pass over the update's bytes, as a plain `add_` (`benchmarks/fold.py`). Each element is added
    on its own, so neither the pieces nor the number of threads changes a bit of the sum.
    """

    def __init__(self, layout: Layout, channels: tuple[str, ...]) -> None:
        self.total_weight = 0.0
        self.sums = {channel: NamedTensors.zeros(layout, wide=True) for channel in channels}

    def add(self, update: Update) -> None:
        self.count(update)
        for channel, sums in self.sums.items():
            weight = self.weight(update, channel)
            for dtype, flat in update.channels[channel].floating():
                _add(sums.flats[dtype], flat, weight)

    def count(self, update: Update) -> None:
        """What `add` does but for the tensors, which are not looked at."""
        self.total_weight += update.weight
        self.num_updates += 1

    def merge(self, other: WeightedSum) -> None:
        """Take in what was summed elsewhere, as if after the updates folded here; `other` is used up."""
        self._add_sums(other, 1.0)

    def _add_sums(self, other: WeightedSum, scale: float) -> None:
        for channel, sums in self.sums.items():
            for dtype, flat in other.sums[channel].floating():
                sums.flats[dtype].add_(flat, alpha=scale)
        self.total_weight += other.total_weight
        self.num_updates += other.num_updates

    def weight(self, update: Update, channel: str) -> float:
        """The weight of one update in one channel's sum."""
        return update.weight if channel == "delta" else 1.0

    def total(self) -> NamedTensors:
        """Σ wᵢΔᵢ, in the accumulator's precision."""
        if self.num_updates == 0:
            raise ValueError("a round was closed with no update in it")
        return self.sums["delta"]

    def mean(self) -> NamedTensors:
        """Δ = Σ pᵢΔᵢ, in the accumulator's precision; the sum is used up."""
        for _, total in self.total().floating():
            total.div_(self.total_weight)
        return self.sums["delta"]


def _add(total: Tensor, flat: Tensor, weight: float) -> None:
    """total ← total + weight·flat, in total's precision."""
    if flat.dtype == total.dtype:
        total.add_(flat, alpha=weight)
        return
    scratch = torch.empty(min(_PIECE, flat.numel()), dtype=total.dtype)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        wide = scratch[: piece.numel()].copy_(piece)
        total[start : start + _PIECE].add_(wide, alpha=weight)


class SumStrategy(Strategy):
    """A strategy to which a weighted sum is enough. A subclass writes `step`, and names its `slot_names`."""

    needs: ClassVar[Literal["sum", "individuals"]] = "sum"
    not_networked = ""
    of_plain_mean = True
    of_weighted_sum = True
    #: makes a round's sum one that may be published; None: it is the weighted mean as it is
    private: Release | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if {"open", "close", "update_channels"} & set(vars(cls)):  # it may look at more, unless it says not
            cls.of_plain_mean = vars(cls).get("of_plain_mean", False)
            cls.of_weighted_sum = vars(cls).get("of_weighted_sum", False)

    def open(self, state: ServerState) -> WeightedSum:
        return WeightedSum(state.theta.layout, self.update_channels)

    def close(self, state: ServerState, fold: Fold) -> ServerState:
        assert isinstance(fold, WeightedSum)
        mean = fold.mean() if self.private is None else self.private.release(fold.total(), state.first)
        for dtype, delta in mean.floating():
            theta = state.theta.flats[dtype]
            wide = theta.to(delta.dtype)  # theta itself, unless it is narrower than float32
            self.step(wide, delta, {name: slot.flats[dtype] for name, slot in state.slots.items()})
            theta.copy_(wide)
        refuse_non_finite(state)
        return state

    @abstractmethod
    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        """Change theta and slots in place, given the mean delta Δ. All are 1-D of equal length, float32 or float64.

        Called once for each floating dtype among the trainables. `delta` is not read again and may be overwritten.
        """


def refuse_non_finite(state: ServerState) -> None:
    """Raises RoundError: a round's result is not finite."""
    # each update was finite, but their sum, a square or a long step may not be; named here it blames no site
    for what, tensors in {"theta": state.theta, **state.slots}.items():
        name = first_non_finite(tensors)
        if name is not None:
            raise non_finite(name, what)


def non_finite(name: str, what: str) -> RoundError:
    """What to say of a round whose result holds NaN or infinity in a tensor of theta or of a slot."""
    return RoundError(
        f"the round's result holds NaN or infinity in {name!r} ({what}), although every update was finite",
        hint="lower training.lr or the strategy's lr; the last committed round is untouched",
    )

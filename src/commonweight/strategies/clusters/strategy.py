"""What strategies share that keep a model for each cluster of sites.

    θⱼ ← θⱼ + Σ_{i ∈ Sⱼ} wᵢΔᵢ / Σ_{i ∈ Sⱼ} wᵢ

Legend: θⱼ the model of cluster j (θ₀ is the state's theta, the others are its slots `cluster-1` …); Sⱼ the round's
sites that started from θⱼ; Δᵢ = θᵢ − θⱼ. A cluster in which nobody answered stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ...errors import RecipeError
from ...model.clusters import channel_of
from ...model.tensors import Layout, NamedTensors
from ..base import Fold, ServerState, SumStrategy, WeightedSum, refuse_non_finite
from ..update import Update
from .agglomerate import agglomerate, apart_from_all, cosine_distances
from .sketch import Sketch


class ClusterOptions(BaseModel):
    """What every clustered strategy has to be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clusters: int = Field(2, ge=2, le=16, description="Models kept side by side: clusters of sites, at most.")
    warm_up: int = Field(
        4,
        ge=1,
        description="Rounds with one model for all. The directions of the last one's updates tell the clusters: the "
        "later, the more surely, for at first all sites learn the same.",
    )
    rows: int = Field(
        32, ge=1, le=10**6, description="Training rows, at most, on which a site compares the clusters' models."
    )


class ClusterSum(Fold):
    """Σ wᵢΔᵢ and Σ wᵢ of each cluster that somebody is in."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.round = 0
        self.sums: dict[int, WeightedSum] = {}

    def add(self, update: Update) -> None:
        self.round = update.round
        if update.cluster not in self.sums:
            self.sums[update.cluster] = WeightedSum(self.layout, ("delta",))
        self.sums[update.cluster].add(update)
        self.num_updates += 1


class ClusteredStrategy(SumStrategy):
    """One model a cluster. Rounds 1 … `warm_up` are FedAvg's, with one model for all sites. Before the updates of round
    `warm_up` are combined, they are clustered by their directions, and each cluster's model begins with the mean of its
    own; it goes on from there. A subclass says in `start` how a site comes to its cluster later.

    A warm-up is needed: a LoRA adapter begins without effect (B = 0), so all models would be the same function, and
    every site would choose the first of them. That what all updates share is taken off before they are compared
    (`agglomerate.py`) is our addition: it hides what tells sites apart, and left in, a site whose update is noisy makes
    a cluster of its own.

    That one round's updates are looked at one by one, so that no secure aggregation can hide them (`needs`). In a
    simulation they are held until the round closes, O(cohort × update); a coordinator reads each twice from its disk,
    O(cohort × chunk). Every other round is a sum for each cluster. Models are held in theta's precision, whichever
    cluster's they are.
    """

    needs = "individuals"
    clustered = True
    asks_losses = True  # sites that come late choose the model with the least loss on their rows
    Options: ClassVar[type[BaseModel]] = ClusterOptions

    options: ClusterOptions

    def __init__(self, options: BaseModel | None = None, *, num_sites: int = 1) -> None:
        super().__init__(options, num_sites=num_sites)
        self.num_models = self.options.clusters
        self.grouping_round = self.options.warm_up
        self.slot_names = self.broadcast_channels = tuple(channel_of(j) for j in range(1, self.num_models))

    def check(self, num_sites: int) -> None:
        """Raises RecipeError: there are more clusters than sites from whose updates they could be told."""
        if num_sites < self.options.clusters:
            raise RecipeError(
                f"{self.name} with clusters: {self.options.clusters} needs at least as many sites in a round; "
                f"{num_sites} {'is' if num_sites == 1 else 'are'} invited",
                hint="lower federation.strategy.clusters, or invite more sites by federation.cohort",
            )

    def within(self) -> float | None:
        """The distance up to which clusters go on to be merged; None: only until there are few enough."""
        return None

    def grouped(self, sketches: Mapping[str, Sketch]) -> dict[str, int]:
        distances = cosine_distances(apart_from_all(list(sketches.values())))
        clusters = agglomerate(distances, at_most=self.options.clusters, within=self.within())
        return dict(zip(sketches, clusters, strict=True))

    def least_loss(self, among: int) -> dict[str, Any]:
        """A site chooses among the models of so many clusters."""
        return {"kind": "least-loss", "of": among, "rows": self.options.rows}

    def init(self, theta: NamedTensors) -> ServerState:
        slots = {name: NamedTensors.zeros(theta.layout, wide=True).copy_(theta) for name in self.slot_names}
        return ServerState(theta, slots)

    def open(self, state: ServerState) -> ClusterSum:  # type: ignore[override]  # a sum for each cluster, not one
        return ClusterSum(state.theta.layout)

    def close(self, state: ServerState, fold: Fold) -> ServerState:
        assert isinstance(fold, ClusterSum)
        if not fold.sums:
            raise ValueError("a round was closed with no update in it")
        for cluster, total in fold.sums.items():
            model = state.slots[channel_of(cluster)] if cluster else state.theta
            for dtype, delta in total.mean().floating():
                self.step(delta, model.flats[dtype].to(delta.dtype), {})
                model.flats[dtype].copy_(delta.to(dtype))
        if fold.round < self.grouping_round:
            for slot in state.slots.values():
                slot.copy_(state.theta)
        refuse_non_finite(state)
        return state

    def step(self, theta: Tensor, delta: Tensor, slots: Mapping[str, Tensor]) -> None:
        theta.add_(delta)

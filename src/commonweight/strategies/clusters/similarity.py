"""Clustering by the similarity of updates, once; then each cluster goes on by itself."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .strategy import ClusteredStrategy, ClusterOptions


class Similarity(ClusteredStrategy):
    """After `warm_up` rounds of FedAvg sites are clustered by the cosines of their updates, agglomeratively with
    average linkage, and each cluster federates by itself (Briggs et al. 2020, Section III; Sattler et al. 2019 split in
    two by the same cosines, and again).

    A site stays in its cluster. One that did not answer the round in which clusters were told chooses, when it is first
    asked, the model with the least loss on up to `rows` of its training rows, as in IFCA, and stays with that.

    In the paper all sites train once more only to be clustered, and each cluster begins from the joint model; here the
    cluster's own mean of those very updates is taken at once, so that no round is lost.
    """

    name = "similarity"
    rule = "d(i, j) = 1 − cos(Δᵢ, Δⱼ) without what all share, average linkage, once; θⱼ ← θⱼ + Σ_{i ∈ Sⱼ} pᵢΔᵢ"
    source = (
        "Briggs et al., Federated learning with hierarchical clustering of local updates to improve training on "
        "non-IID data, IJCNN 2020, arXiv:2004.11791; cosines: Sattler et al., arXiv:1910.01991"
    )

    class Options(ClusterOptions):
        """Similarity's options."""

        distance: float | None = Field(
            None,
            ge=0,
            le=2,
            description="Clusters no further apart than this are merged even if there are few enough: 1 − the cosine "
            "of their updates without what all have in common, so 1 for a right angle. Null: exactly `clusters` of "
            "them, if there are as many sites.",
        )

    options: Options

    def within(self) -> float | None:
        return self.options.distance

    def start(self, round: int, cluster: int | None, found: int) -> dict[str, Any]:
        if round <= self.grouping_round:
            return super().start(round, cluster, found)
        return self.least_loss(found) if cluster is None else {"kind": "cluster", "cluster": cluster}

"""IFCA: each site goes with the model that fits its own rows best."""

from __future__ import annotations

from typing import Any

from .strategy import ClusteredStrategy


class IFCA(ClusteredStrategy):
    """j*(i) = argminⱼ Lᵢ(θⱼ); θⱼ ← θⱼ + Σ_{i: j*(i) = j} pᵢΔᵢ (Ghosh et al. 2020, Algorithm 1, with model averaging).

    In every round after the warm-up a site receives all k models, takes the loss of each on up to `rows` of its
    training rows, spread evenly over them, trains from the best one (the first among equals), and says which it was. So
    a site may change its cluster, and one that comes late finds its own. It costs k times the bytes down, and k passes
    over those rows.

    The paper begins from k random models, several times over; we begin from the clusters of the first updates
    (`ClusteredStrategy`). Its weights are uniform, ours as `federation.weighting` says.
    """

    name = "ifca"
    rule = "j*(i) = argminⱼ Lᵢ(θⱼ); θⱼ ← θⱼ + Σ_{i: j*(i) = j} pᵢΔᵢ"
    source = "Ghosh et al., An Efficient Framework for Clustered Federated Learning, NeurIPS 2020, arXiv:2006.04088"

    def start(self, round: int, cluster: int | None, found: int) -> dict[str, Any]:
        if round <= self.grouping_round:
            return super().start(round, cluster, found)
        return self.least_loss(self.num_models)

"""Which site is in which cluster, where a run keeps several global models; and how they lie in its folder.

    adapter/         the model of the largest cluster, the first among equals
    clusters/<j>/    the model of cluster j, for each that a site is in
    clusters.json    `adapter`: whose model lies in adapter/; `sites`: the cluster of each site

A round's folder has the same below it, and is itself what adapter/ is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..model.tensors import NamedTensors
from ..recipe.schema import Recipe
from ..strategies.base import Strategy
from .folder import write_json
from .journal import RunJournal

FILE = "clusters.json"


def clusters_in_rounds(journal: RunJournal) -> dict[str, int]:
    """The cluster that each site was last in when a round committed."""
    return {s: j for record in journal.commits().values() for s, j in record.get("clusters", {}).items()}


def clusters_of(journal: RunJournal) -> dict[str, int]:
    """The cluster of each site as the run ends: that whose model it was scored with, or else the one it was last in.
    Empty where there is one global model."""
    scores = journal.get("scores/federated") or {}
    return {**clusters_in_rounds(journal), **scores.get("clusters", {})}


def largest(clusters: Mapping[str, int]) -> int:
    """The cluster with the most sites, the first among equals; 0 where there are none."""
    sizes = Counter(clusters.values())
    return min(sizes, key=lambda cluster: (-sizes[cluster], cluster), default=0)


def save_models(
    adapter: Path,
    root: Path,
    models: Mapping[int, NamedTensors],
    clusters: Mapping[str, int],
    save: Callable[[NamedTensors, Path], None],
) -> None:
    """Write the largest cluster's model to `adapter`, and each cluster's and who is in it below `root`."""
    for cluster in sorted(set(clusters.values())):
        save(models[cluster], root / "clusters" / str(cluster))
    save(models[largest(clusters)], adapter)
    if clusters:
        write_json(root / FILE, {"adapter": largest(clusters), "sites": dict(clusters)})


def found(clusters: Mapping[str, int], losses: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each cluster for people: its number, its sites, and the mean loss over those that were scored."""
    rows = []
    for cluster in sorted(set(clusters.values())):
        sites = [site for site, own in clusters.items() if own == cluster]
        known = [losses[site] for site in sites if site in losses]
        rows.append({"cluster": cluster, "sites": sites, "macro_loss": sum(known) / len(known) if known else None})
    return rows


def check_clusters(recipe: Recipe, strategy: Strategy) -> None:
    """Refuse a run that would end before its clusters are known.

    Raises:
        RecipeError: the warm-up leaves no round.
    """
    if strategy.grouping_round >= recipe.federation.rounds:
        raise RecipeError(
            f"federation.strategy.warm_up is {strategy.grouping_round}, but the run has {recipe.federation.rounds} "
            f"round{'s' if recipe.federation.rounds > 1 else ''}: no cluster would ever go on by itself",
            hint="lower warm_up, or raise federation.rounds",
        )

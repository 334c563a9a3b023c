"""Krum and Multi-Krum: the updates that lie closest to their neighbours (Blanchard et al. 2017, arXiv:1703.02757)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ...errors import RecipeError
from ..update import Update
from .rows import Survey, mean_of, squared_distances
from .strategy import Combine, RobustStrategy, StatedOptions

_SOURCE = (
    "Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, "
    "NeurIPS 2017, arXiv:1703.02757"
)


def krum_scores(distances: Tensor, f: int) -> Tensor:
    """Each row's sum of squared distances to its n − f − 2 nearest others, at least one of them: (n,), float64.

    Args:
        distances: ‖xᵢ − xⱼ‖², n × n.
    """
    n = len(distances)
    others = distances.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    return others[:, : max(1, n - f - 2)].sum(1)


def multi_krum(products: Tensor, f: int, m: int) -> list[int]:
    """The m of n rows with the lowest Krum scores, the lowest first; of equal scores the first. Krum is m = 1.

    Args:
        products: the rows' inner products, n × n.

    Raises:
        ValueError: f is negative, n < f + 3, so that no neighbour would be left, or m is not between 1 and n.
    """
    n = len(products)
    if f < 0 or n < f + 3 or not 1 <= m <= n:
        raise ValueError(f"Krum of {n} rows with f = {f} and m = {m}: f ≥ 0, n ≥ f + 3 and 1 ≤ m ≤ n are needed")
    best: list[int] = krum_scores(squared_distances(products), f).argsort(stable=True)[:m].tolist()
    return best


class Krum(RobustStrategy):
    """θ ← θ + ηΔₖ, k the site whose update has the least sum of squared distances to its n − f − 2 nearest.

    One site's update is taken and all the others' work is left: `multi-krum` wastes less. Sites count alike. At least
    2f + 3 answers (the paper's 2f + 2 < n).
    """

    name = "krum"
    rule = "θ ← θ + ηΔₖ, k = argmin_i Σ over its n − f − 2 nearest of ‖Δᵢ − Δⱼ‖²"
    source = _SOURCE
    Options = StatedOptions
    needed = (2, 3)
    pairwise = True

    def plan(self, seen: Survey, updates: Sequence[Update]) -> Combine:
        best = multi_krum(seen.products, self.options.f, 1)[0]
        return lambda rows: rows[best]


class MultiKrum(RobustStrategy):
    """θ ← θ + η·(mean of the m updates with the lowest Krum scores). Sites count alike. At least 2f + 3 answers."""

    name = "multi-krum"
    rule = "θ ← θ + η·mean of the m updates nearest to their n − f − 2 nearest"
    source = _SOURCE
    needed = (2, 3)
    pairwise = True

    class Options(StatedOptions):
        """Multi-Krum's options."""

        m: int | None = Field(
            None,
            ge=1,
            description="How many updates are averaged, n − f at most: of a round with fewer answers than m + f, all "
            "but f. null: n − f − 2.",
        )

    options: Options

    def check(self, num_sites: int) -> None:
        """Raises RecipeError: as every robust strategy, or m sites are more than such a round has without its f."""
        super().check(num_sites)
        spared, m = num_sites - self.options.f, self.options.m
        if m is not None and m > spared:
            raise RecipeError(
                f"federation.strategy {self.name!r} is to average m = {m} updates, but of {num_sites} sites no more "
                f"than {spared} are left without f = {self.options.f}",
                hint=f"lower m to {spared}, or leave it out",
            )

    def plan(self, seen: Survey, updates: Sequence[Update]) -> Combine:
        spared = len(updates) - self.options.f
        m = spared - 2 if self.options.m is None else min(self.options.m, spared)
        chosen = multi_krum(seen.products, self.options.f, m)
        return lambda rows: mean_of(rows, chosen)

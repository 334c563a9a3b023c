"""Bulyan: Krum chooses, a trimmed mean around the median combines (El Mhamdi et al. 2018, arXiv:1802.07927)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..update import Update
from .krum import krum_scores
from .rows import Survey, middle, sort_columns_, squared_distances
from .strategy import Combine, RobustStrategy, StatedOptions


def bulyan_choice(products: Tensor, f: int) -> list[int]:
    """The n − 2f rows that Krum chooses one after the other, in the rows' order.

    Krum chooses a row, which is then taken away; of equal scores the first row. When so few are left that Krum's
    n − f − 2 falls below one neighbour, it looks at one.

    Args:
        products: the rows' inner products, n × n.

    Raises:
        ValueError: f is negative, or n < 4f + 3.
    """
    n = len(products)
    if f < 0 or n < 4 * f + 3:
        raise ValueError(f"Bulyan of {n} rows with f = {f}: f ≥ 0 and n ≥ 4f + 3 are needed")
    left = list(range(n))
    if f == 0:
        return left
    distances = squared_distances(products)
    chosen: list[int] = []
    while len(chosen) < n - 2 * f:
        scores = krum_scores(distances[left][:, left], f)
        chosen.append(left.pop(int(scores.argsort(stable=True)[0])))
    return sorted(chosen)


def mean_near_median(rows: Sequence[Tensor], count: int) -> Tensor:
    """The mean, in each column, of the `count` values nearest to the median; of two equally near the smaller: (k,).

    In ascending order they are neighbours: of two values `count` places apart the one further from the median is out.

    Args:
        rows: n of (k,); used up.
    """
    values = sort_columns_(rows)
    center = middle(values)
    upper_kept = [center - low > high - center for low, high in zip(values, values[count:], strict=False)]
    total = torch.zeros_like(center)
    for place, value in enumerate(values):
        kept = torch.ones_like(center, dtype=torch.bool)
        if place < len(upper_kept):
            kept &= ~upper_kept[place]
        if place >= count:
            kept &= upper_kept[place - count]
        total += torch.where(kept, value, 0)
    return total.div_(count)


class Bulyan(RobustStrategy):
    """θ ← θ + η·bulyan(Δᵢ): n − 2f updates by repeated Krum, then in each coordinate the mean of the n − 4f values
    nearest to their median. Sites count alike. At least 4f + 3 answers.
    """

    name = "bulyan"
    rule = "θ ← θ + η·mean of the n − 4f values nearest the median of n − 2f updates chosen by Krum"
    source = (
        "El Mhamdi et al., The Hidden Vulnerability of Distributed Learning in Byzantium, ICML 2018, arXiv:1802.07927"
    )
    Options = StatedOptions
    needed = (4, 3)
    pairwise = True

    def plan(self, seen: Survey, updates: Sequence[Update]) -> Combine:
        chosen = bulyan_choice(seen.products, self.options.f)
        count = len(updates) - 4 * self.options.f
        return lambda rows: mean_near_median([rows[place] for place in chosen], count)

"""Bulyan: Krum chooses, a trimmed mean around the median combines (El Mhamdi et al. 2018, arXiv:1802.07927)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..update import Update
from .krum import krum_scores
from .rows import Survey, middle, sorted_columns, squared_distances
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


def mean_near_median(rows: Tensor, count: int) -> Tensor:
    """The mean, in each column, of the `count` values nearest to the median; of two equally near the smaller: (k,)."""
    ordered = sorted_columns(rows)
    values, center = torch.stack(ordered), middle(ordered)
    first = torch.zeros(1, values.shape[1], dtype=torch.long)
    last = first + len(values) - 1
    for _ in range(len(values) - count):
        # the value furthest from the median is at one of the two ends
        drop_first = center - values.gather(0, first) > values.gather(0, last) - center
        first += drop_first
        last -= (~drop_first).long()
    places = torch.arange(len(values))[:, None]
    return values.masked_fill_((places < first) | (places > last), 0).sum(0).div_(count)


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
        return lambda rows: mean_near_median(rows[chosen], count)

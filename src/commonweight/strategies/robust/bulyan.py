"""Bulyan: Krum chooses, a trimmed mean around the median combines (El Mhamdi et al. 2018, arXiv:1802.07927)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import ServerState
from ..update import Update
from .krum import krum_scores
from .rows import inner_products, middle, sorted_columns, squared_distances, stretches
from .strategy import RobustStrategy, StatedOptions


def bulyan(rows: Tensor, f: int) -> Tensor:
    """The mean, in each column, of the n − 4f values nearest to the median of n − 2f rows that Krum chose: (d,).

    Krum chooses a row, which is then taken away, n − 2f times; of equal scores the first row. When so few are left that
    Krum's n − f − 2 falls below one neighbour, it looks at one. Of two values equally near to the median the smaller
    one is kept.

    Args:
        rows: n × d.

    Raises:
        ValueError: f is negative, or n < 4f + 3.
    """
    n = len(rows)
    if f < 0 or n < 4 * f + 3:
        raise ValueError(f"Bulyan of {n} rows with f = {f}: f ≥ 0 and n ≥ 4f + 3 are needed")
    chosen = _choose(squared_distances(inner_products(rows)), f, n - 2 * f) if f else list(range(n))
    found = torch.empty(rows.shape[1], dtype=rows.dtype)
    for columns in stretches(*rows.shape):
        found[columns] = _mean_near_median(sorted_columns(rows[chosen, columns].double()), n - 4 * f)
    return found


def _choose(distances: Tensor, f: int, count: int) -> list[int]:
    left = list(range(len(distances)))
    chosen: list[int] = []
    while len(chosen) < count:
        scores = krum_scores(distances[left][:, left], f)
        chosen.append(left.pop(int(scores.argsort(stable=True)[0])))
    return sorted(chosen)


def _mean_near_median(ordered: list[Tensor], count: int) -> Tensor:
    """The mean of the `count` values nearest to the median, in columns in ascending order."""
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

    def aggregate(self, rows: Tensor, state: ServerState, updates: Sequence[Update]) -> Tensor:
        return bulyan(rows, self.options.f)

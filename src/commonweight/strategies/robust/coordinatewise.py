"""Coordinate-wise median and trimmed mean (Yin et al. 2018, arXiv:1803.01498)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..update import Update
from .rows import Survey, mean_of, middle, sort_columns_
from .strategy import Combine, RobustStrategy, StatedOptions

_SOURCE = (
    "Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018, arXiv:1803.01498"
)


def median(rows: Tensor) -> Tensor:
    """The median of each column of n × k rows, for even n the mean of the middle two: (k,). The rows are used up."""
    return middle(sort_columns_(list(rows)))


def trimmed_mean(rows: Tensor, f: int) -> Tensor:
    """The mean of each column of n × k rows, float64, without its f smallest and its f largest values: (k,).
    The rows are used up.

    Raises:
        ValueError: f is negative, or n < 2f + 1.
    """
    n = len(rows)
    if f < 0 or n < 2 * f + 1:
        raise ValueError(f"{n} rows cannot be trimmed by f = {f} at each end")
    if f == 0:
        return mean_of(rows)
    total, *others = sort_columns_(list(rows))[f : n - f]
    for values in others:
        total.add_(values)
    return total.div_(n - 2 * f)


class Median(RobustStrategy):
    """θ ← θ + η·median(Δᵢ), coordinate by coordinate. Sites count alike.

    With fewer hostile sites than honest ones every coordinate stays within the range of the honest ones' values.
    """

    name = "median"
    rule = "θ ← θ + η·median Δᵢ, coordinate by coordinate"
    source = _SOURCE

    def plan(self, seen: Survey, updates: Sequence[Update]) -> Combine:
        return median


class TrimmedMean(RobustStrategy):
    """θ ← θ + η·(mean of Δᵢ without the f smallest and the f largest values of each coordinate). Sites count alike.

    With `mixing: nearest` in front it is the robust rule that is recommended.
    """

    name = "trimmed-mean"
    rule = "θ ← θ + η·mean of Δᵢ without the f smallest and f largest, coordinate by coordinate"
    source = _SOURCE
    Options = StatedOptions

    def plan(self, seen: Survey, updates: Sequence[Update]) -> Combine:
        return lambda rows: trimmed_mean(rows, self.options.f)

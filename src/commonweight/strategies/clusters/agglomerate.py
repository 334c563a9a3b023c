"""Agglomerative clustering with average linkage, on the angles between updates.

    xᵢ = Δᵢ/‖Δᵢ‖ − mean over j of Δⱼ/‖Δⱼ‖        d(i, j) = 1 − ⟨xᵢ, xⱼ⟩/(‖xᵢ‖‖xⱼ‖)

Legend: N updates Δ; d goes from 0 (one direction) over 1 (a right angle) to 2 (opposite); the distance of two clusters
is the mean over the pairs of their members.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: distances that differ by less are equal: nothing may hang on the order in which a sketch was summed
_DIGITS = 9
_ROUNDING = 1e-9


def apart_from_all(rows: Sequence[Floats]) -> Floats:
    """x, [N, D]: each update's direction without what all of them share, which says nothing of who goes with whom. One
    that differs from their mean by rounding only is zero."""
    units_ND = _units(np.stack(rows))
    apart_ND: Floats = units_ND - units_ND.mean(axis=0)
    apart_ND[np.linalg.norm(apart_ND, axis=1) < _ROUNDING] = 0.0
    return apart_ND


def cosine_distances(rows_ND: Floats) -> Floats:
    """d, [N, N]. A row of zeros, which has no direction, is at right angles to all but its like."""
    units_ND = _units(rows_ND)
    distances_NN: Floats = np.clip(1.0 - units_ND @ units_ND.T, 0.0, 2.0)
    lost_N = ~units_ND.any(axis=1)
    distances_NN[np.ix_(lost_N, lost_N)] = 0.0
    np.fill_diagonal(distances_NN, 0.0)
    return distances_NN


def _units(rows_ND: Floats) -> Floats:
    norms_N = np.linalg.norm(rows_ND, axis=1)
    return np.asarray(rows_ND / np.where(norms_N > 0, norms_N, 1.0)[:, None])


def agglomerate(distances_NN: Floats, *, at_most: int, within: float | None = None) -> list[int]:
    """The cluster of each of N: the nearest two clusters become one until there are `at_most`, and, if `within` is
    given, as long as their distance is at most that.

    Among equal distances the pair goes first whose first members come first. Clusters are numbered in the order of
    their first members.
    """
    num = len(distances_NN)
    apart = np.round(distances_NN, _DIGITS)
    np.fill_diagonal(apart, np.inf)
    members = {k: [k] for k in range(num)}
    while len(members) > 1:
        first, second = divmod(int(apart.argmin()), num)  # the first of equals; first < second by symmetry
        if len(members) <= at_most and (within is None or apart[first, second] > within):
            break
        sizes = len(members[first]), len(members[second])
        merged = np.round((sizes[0] * apart[first] + sizes[1] * apart[second]) / sum(sizes), _DIGITS)
        merged[first] = np.inf
        apart[first], apart[:, first] = merged, merged
        apart[second], apart[:, second] = np.inf, np.inf
        members[first] += members.pop(second)
    cluster_of = {k: cluster for cluster, key in enumerate(sorted(members)) for k in members[key]}
    return [cluster_of[k] for k in range(num)]

"""Intervals by resampling groups: rows of one subject (patient, disease, document) are drawn together or not at all.

The interval is the percentile bootstrap with two corrections for few groups. Each resample draws G − 1 of G groups, so
that its variance is unbiased (McCarthy and Snowden 1985, "The bootstrap and finite population sampling"; Rao and Wu
1988), and the percentiles are Student's instead of the normal's (Hesterberg 2015, "What teachers should know about the
bootstrap", the expanded percentile interval). In simulations the plain percentile interval covers the truth in
93 % of cases with 24 groups, 89 % with 10 and 84 % with 6; this one in 95 %, 93 % and 92 %.

Below `MIN_GROUPS` there is no interval: five groups that all lean one way are no rare event (2 · ½⁵ = 6 %).

Shapes: N rows, G groups, K summed columns, B resamples, b resamples in one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonweight.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Groups = Sequence[Hashable] | NDArray[Any]

CONFIDENCE = 0.95
MIN_GROUPS = 6
CHUNK_ELEMENTS = 1_000_000
TAIL = (1 - CONFIDENCE) / 2


def group_sums(columns_NK: Floats, groups: Groups) -> Floats:
    """Sums of each column inside each group, [G, K], groups in the order in which they first appear.

    Raises:
        DataError: `groups` is not as long as the rows.
    """
    if len(groups) != len(columns_NK):
        raise DataError(f"{len(groups)} group labels for {len(columns_NK)} rows; every row needs exactly one")
    first: dict[Hashable, int] = {}
    codes_N = [first.setdefault(label, len(first)) for label in groups]
    sums_GK = np.zeros((len(first), columns_NK.shape[1]))
    np.add.at(sums_GK, codes_N, columns_NK)
    return sums_GK


def resample_indices(num_groups: int, resamples: int, seed: int | Sequence[int]) -> Iterator[Ints]:
    """Groups of each resample, in chunks [b, max(1, G − 1)]; the chunks together do not depend on their size."""
    rng = np.random.default_rng(seed)
    draws = max(1, num_groups - 1)
    step = max(1, CHUNK_ELEMENTS // draws)
    for start in range(0, resamples, step):
        yield rng.integers(0, num_groups, size=(min(step, resamples - start), draws))


def resampled_sums(sums_GK: Floats, resamples: int, seed: int | Sequence[int]) -> Floats:
    """Each column summed over the groups of each resample, [B, K]."""
    chunks = resample_indices(len(sums_GK), resamples, seed)
    columns = [np.ascontiguousarray(column_G) for column_G in sums_GK.T]
    return np.concatenate([np.stack([c_G[i_bD].sum(axis=1) for c_G in columns], axis=1) for i_bD in chunks])


def interval(replicates_B: Floats, degrees: int) -> list[float] | None:
    """The 95 % interval [low, high] from bootstrap replicates.

    Args:
        replicates_B: the statistic in each resample.
        degrees: groups minus one, summed over the strata that were resampled apart.

    Returns:
        None when there are fewer than `MIN_GROUPS` − 1 degrees of freedom.
    """
    if degrees < MIN_GROUPS - 1:
        return None
    tail = NormalDist().cdf(-student_quantile(degrees))
    low, high = np.quantile(replicates_B, [tail, 1 - tail])
    return [float(low), float(high)]


def boundary_interval(rate: float, num_groups: int) -> list[float] | None:
    """Clopper and Pearson's exact bounds for a rate of 0 or 1 in all of `num_groups` groups.

    Every resample of nothing but failures is nothing but failures, so that the bootstrap would call it certain.
    """
    if num_groups < MIN_GROUPS:
        return None
    reach = 1 - TAIL ** (1 / num_groups)
    return [0.0, reach] if rate == 0 else [1 - reach, 1.0]


def student_quantile(degrees: int) -> float:
    """Student's t at 97.5 %, within 0.001 from 4 degrees of freedom on (Abramowitz and Stegun 1964, 26.7.5)."""
    z = NormalDist().inv_cdf(1 - TAIL)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / float(degrees**power) for power, term in enumerate(terms, start=1))

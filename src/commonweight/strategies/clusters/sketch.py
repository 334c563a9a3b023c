"""Sketches: a site's update in 16,384 numbers, from which the angles between updates can be told.

    sₘ = Σ_{h(e) = m} σ(e)·Δₑ        E⟨s, s′⟩ = ⟨Δ, Δ′⟩        (the count sketch: Charikar, Chen and Farach-Colton 2002)

Legend: e an element of the update; h(e) its bucket and σ(e) = ±1 its sign, drawn by a fixed hash of its place; M the
number of buckets. The standard error of a cosine is at most about √(2/M) = 0.011.

A sketch is linear, so that it is made of one stretch after the other, also by a coordinator, whose updates lie in
files: the cohort's take O(sites × M), however large the model is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..side_by_side import SideBySide, stretches

Sketch = NDArray[np.float64]

BUCKETS = 1 << 14
_BUCKET_BITS = np.uint64(64 - 14)
_DTYPE_BITS = 48  # places of elements of one dtype come after 2⁴⁸ of the one before
#: stretches are cut as if for so many updates: long enough that a stretch costs more than its sums of buckets
_ROWS = 8


class Projection:
    """The buckets and signs of a stretch of elements.

    Args:
        place: of the first element among all of an update's.
    """

    def __init__(self, place: int, numel: int) -> None:
        hashed = _hash(np.arange(place, place + numel, dtype=np.uint64))
        self.buckets = (hashed >> _BUCKET_BITS).astype(np.intp)
        self.signs = 1.0 - 2.0 * (hashed & np.uint64(1))

    def sketch(self, values: Tensor) -> Sketch:
        """Of the stretch's values, 1-D; summed in float64, one after the other."""
        return np.bincount(self.buckets, self.signs * values.double().numpy(), BUCKETS).astype(np.float64)


def _hash(places: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output for each place: 64 well-mixed bits."""
    mixed = (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def sketches_of(table: SideBySide) -> dict[str, Sketch]:
    """The sketch of each site's update, in the order of the table: the same bits wherever the updates lie."""
    found = {update.site: np.zeros(BUCKETS) for update in table.updates}
    places = {dtype: k << _DTYPE_BITS for k, dtype in enumerate(table.layout.numels)}
    for stretch in stretches(table.layout, _ROWS):
        projection = Projection(places[stretch.dtype] + stretch.start, stretch.numel)
        for sketch, values in zip(found.values(), table.sent(stretch), strict=True):
            sketch += projection.sketch(values)
    return found

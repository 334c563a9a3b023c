"""Hierarchical aggregation: the updates of a region's sites are added up by a relay, and the sum alone goes on.

    sites of a region ─► relay: Σ wᵢΔᵢ, Σ wᵢ ─┐
    sites of a region ─► relay: Σ wᵢΔᵢ, Σ wᵢ ─┴─► coordinator: merged with the updates that came by themselves

What a strategy that needs no more than a sum makes of it is the same, but for the order of additions and so to
rounding. That order is fixed: within a region the cohort's; then the updates that came by themselves, again in the
cohort's; then the regions' sums, as the recipe names the relays. So the bits are the same for any number of workers,
after a resume, and in a network whose relays all delivered.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..strategies.base import Fold, WeightedSum


def merge_partials(whole: Fold, partials: Iterable[Fold]) -> None:
    """Add regions' sums, in the order in which the recipe names the relays, to that of the updates that came by
    themselves."""
    for partial in partials:
        assert isinstance(whole, WeightedSum)
        assert isinstance(partial, WeightedSum)
        whole.merge(partial)

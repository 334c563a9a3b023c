"""What releases cost those whose data are in them, over all runs: the entries of a ledger, and a budget for them.

A release costs a site the unit that it protects. Asked for the cost of another unit, it costs

    asked for   release protects   cost
    site        site               as stated
    site        examples           ∞: nothing bounds what all of a site's rows together do
    example     example            as stated
    example     site               half the noise multiplier: of two data sets that differ in one example a site may
                                   send two updates that are 2C apart, where a site that is left out moves the sum by C
    either      nothing            ∞

Gaussian releases compose adaptively, also where z, the sampling and who takes part change from round to round, as long
as that does not depend on the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

from pydantic import Field

from ..errors import BudgetError
from ..recipe.schema import Section
from .accounting import Releases, epsilon_of_all

Unit = Literal["site", "example"]

ADJACENCY = {
    "none": "any two data sets",
    "site": "one site whose updates are in the sums or left out of them",
    "example": "one example of a site more or fewer",
}


@dataclass(frozen=True)
class Spend:
    """What one site spent in one round.

    Args:
        unit: what the release protects: `site`, `example`, or `none`.
        mechanism: how: `gaussian`, …; `none`.
        noise_multiplier: z, the noise's standard deviation to the sensitivity; 0 without protection.
        sampling: the probability with which a unit takes part in one release; 1: every time.
        count: releases of this kind.
    """

    unit: str
    mechanism: str
    noise_multiplier: float
    sampling: float = 1.0
    count: int = 1

    @property
    def adjacency(self) -> str:
        """Which data sets count as neighbours."""
        return ADJACENCY[self.unit]

    def releases(self, unit: Unit) -> Releases:
        """What it costs a unit."""
        z = self.noise_multiplier if self.unit in (unit, "site") else 0.0
        return Releases(z if self.unit == unit else z / 2, self.count, self.sampling)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From plain values by name; others are passed over."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


#: a round without differential privacy
UNPROTECTED = Spend("none", "none", 0.0)


def cost(spends: Iterable[Spend], unit: Unit, delta: float) -> float:
    """ε of all these together, for one unit at one site."""
    counts: dict[tuple[float, float], int] = {}
    for spend in spends:
        plan = spend.releases(unit)
        key = plan.noise_multiplier, plan.sampling
        counts[key] = counts.get(key, 0) + plan.count
    return _cost(tuple(sorted((*key, count) for key, count in counts.items())), delta)


@lru_cache(maxsize=4096)
def _cost(counts: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """Many sites have spent the same."""
    return epsilon_of_all([Releases(z, count, sampling) for z, sampling, count in counts], delta)


class Budget(Section):
    """How much may be spent of each site's privacy, over all runs."""

    unit: Unit = Field(description="What is protected: `site`, with all its rows, or `example`, one row.")
    epsilon: float = Field(gt=0, description="ε that all releases together may cost.")
    delta: float = Field(gt=0, lt=1, description="δ at which they are added up.")

    def left(self, spends: Iterable[Spend]) -> float:
        """What is left of ε; never below 0."""
        return max(0.0, self.epsilon - cost(spends, self.unit, self.delta))

    def excess(self, before: Iterable[Spend], more: Spend) -> str:
        """Why a site may not spend `more` after `before`; "": it may."""
        before = list(before)
        after = cost([*before, more], self.unit, self.delta)
        if after <= self.epsilon:
            return ""
        spent = cost(before, self.unit, self.delta)
        return (
            f"the budget is ε = {self.epsilon:g} at δ = {self.delta:g} for each {self.unit} over all runs; "
            f"{in_words(spent)} is spent, and this would make it {in_words(after)}"
        )

    def check(self, site: str, before: Iterable[Spend], more: Spend) -> None:
        """Raises BudgetError: a site would have spent more than the budget."""
        why = self.excess(before, more)
        if why:
            raise BudgetError(f"site {site!r}: {why}", hint=_HINT)


_HINT = (
    "nothing was released: the model is as the round before left it. Raise the budget if those whose data they are "
    "agree, use more noise or fewer rounds, or leave the site out"
)


def in_words(epsilon: float) -> str:
    """ε for people."""
    return "∞" if epsilon == math.inf else f"{epsilon:.3f}"

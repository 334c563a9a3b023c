"""What releases cost those whose data are in them, over all runs: the entries of a ledger, and a budget for them.

What a release protects is its unit: `site`; `example`, one row of a site; `group by patient`, all rows of a site with
one value of the field `patient`; `none`. Asked for the cost of another unit than that which it protects, it costs

    asked for   release protects   cost
    site        site               as stated
    site        rows or groups     ∞: nothing bounds what all of a site's rows together do
    example     example            as stated
    example     groups             as stated, but of a group replaced by another: with a row less it is still there, and
                                   its clipped gradient may go anywhere inside the bound
    group       groups, same field as stated
    group       others, examples   ∞: nothing says how many of these one group has
    any of rows site               half the noise multiplier: of two data sets that differ in one example or group a
                                   site may send two updates that are 2C apart, where a site that is left out moves the
                                   sum by C
    any         nothing            ∞

Releases compose adaptively, also where z, the sampling and who takes part change from round to round, as long
as that does not depend on the data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..errors import BudgetError
from ..recipe.schema import PrivacySpec, Section
from . import distributed
from .accounting import Releases, epsilon_of_all

_ADJACENCY = {
    "none": "any two data sets",
    "site": "one site whose updates are in the sums or left out of them",
    "example": "one example of a site more or fewer",
}
_GROUP = "group by "


def group_unit(by: str) -> str:
    """The unit of all rows of a site with one value of a field."""
    return _GROUP + by


def unit_of(spec: PrivacySpec) -> str:
    """What a run protects."""
    return spec.dp if spec.by is None else group_unit(spec.by)


def adjacency(unit: str, mechanism: str = "") -> str:
    """Which data sets count as neighbours."""
    if mechanism == distributed.NAME:
        return distributed.ADJACENCY
    if unit.startswith(_GROUP):
        return f"one {unit.removeprefix(_GROUP)} of a site, with all of its rows, more or fewer"
    return _ADJACENCY[unit]


@dataclass(frozen=True)
class Spend:
    """What one site spent in one round.

    Args:
        unit: what the release protects; see above.
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
        return adjacency(self.unit, self.mechanism)

    def releases(self, unit: str) -> Releases:
        """What it costs a unit."""
        z, discrete = self.noise_multiplier, self.mechanism == distributed.NAME
        if self.unit == unit:
            return Releases(z, self.count, self.sampling, discrete=discrete)
        if self.unit == "site":
            return Releases(z / 2, self.count, self.sampling, discrete=discrete)
        if unit == "example" and self.unit.startswith(_GROUP):
            return Releases(z, self.count, self.sampling, replaced=True)
        return Releases(0.0, self.count, self.sampling)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From plain values by name; others are passed over."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


#: a round without differential privacy
UNPROTECTED = Spend("none", "none", 0.0)


def cost(spends: Iterable[Spend], unit: str, delta: float) -> float:
    """ε of all these together, for one unit at one site."""
    counts = Counter[Releases]()
    for spend in spends:
        plan = spend.releases(unit)
        counts[replace(plan, count=0)] += plan.count
    return _cost(frozenset(counts.items()), delta)


@lru_cache(maxsize=4096)
def _cost(counts: frozenset[tuple[Releases, int]], delta: float) -> float:
    """Many sites have spent the same."""
    plans = [replace(plan, count=count) for plan, count in counts]
    return epsilon_of_all(sorted(plans, key=astuple), delta)


class Budget(Section):
    """How much may be spent of each site's privacy, over all runs."""

    unit: Literal["site", "example", "group"] = Field(
        description="What is protected: `site`, with all its rows; `example`, one row; or `group`, its rows with one "
        "value of `by`."
    )
    by: str | None = Field(None, min_length=1, description="The field that says whose a row is, such as patient.")
    epsilon: float = Field(gt=0, description="ε that all releases together may cost.")
    delta: float = Field(gt=0, lt=1, description="δ at which they are added up.")

    @model_validator(mode="after")
    def _groups_have_a_field(self) -> Self:
        if (self.unit == "group") != (self.by is not None):
            raise ValueError("unit: group needs `by`, the field that says whose a row is, and no other unit has one")
        return self

    @property
    def protects(self) -> str:
        """The unit, as releases name it."""
        return self.unit if self.by is None else group_unit(self.by)

    def left(self, spends: Iterable[Spend]) -> float:
        """What is left of ε; never below 0."""
        return max(0.0, self.epsilon - cost(spends, self.protects, self.delta))

    def excess(self, before: Iterable[Spend], more: Spend) -> str:
        """Why a site may not spend `more` after `before`; "": it may."""
        before = list(before)
        after = cost([*before, more], self.protects, self.delta)
        if after <= self.epsilon:
            return ""
        spent = cost(before, self.protects, self.delta)
        return (
            f"the budget is ε = {self.epsilon:g} at δ = {self.delta:g} for each {self.by or self.unit} over all runs; "
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

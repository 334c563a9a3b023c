"""Groups of sites, each of which makes a secure sum of its own in a round.

A robust rule must tell rows apart, and a secure sum shows none. In groups it has both: what is shown is each group's
sum, and the rule works on the groups' means as it would on single updates. A hostile site spoils its whole group, so
that f counts groups. Groups are drawn anew in every round from the recipe's seed, which every site has: nobody chooses
who is summed with whom, and a site looks whether its own group is the one that the seed makes of the round's cohort.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from ..privacy.secure_aggregation.graph import majority
from ..recipe.schema import Recipe
from ..seeding import derive_seed


@dataclass(frozen=True)
class Groups:
    """A round's groups, or its whole cohort as the only one.

    Args:
        members: the sites of each, in the order of folding, and the groups by their first sites.
        needed: groups whose sums can be opened, without which the round comes to nothing.
    """

    members: tuple[tuple[str, ...], ...]
    needed: int = 1

    @classmethod
    def of(cls, recipe: Recipe, cohort: Sequence[str], round: int, *, least: int = 1) -> Self:
        """The groups of a round.

        Args:
            least: rows without which the strategy cannot do its work.
        """
        size = recipe.privacy.secure_group_size
        if size is None:
            return cls((tuple(cohort),))
        members = draw_groups(cohort, size, seed=recipe.seed, round=round)
        return cls(members, max(least, math.ceil(recipe.federation.quorum * len(members) - 1e-9)))

    @cached_property
    def least_answers(self) -> int:
        """Sites without which too few groups have what they need, whoever they are."""
        return sum(sorted(map(majority, map(len, self.members)))[: self.needed])

    def whole(self, there: Collection[str]) -> tuple[tuple[str, ...], ...]:
        """The groups of which more than two thirds are there."""
        present = frozenset(there)
        return tuple(group for group in self.members if len(present.intersection(group)) >= majority(len(group)))

    def to_json(self) -> dict[str, Any]:
        return {"members": [list(group) for group in self.members], "needed": self.needed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(tuple(tuple(group) for group in value["members"]), value["needed"])


def num_groups(num_sites: int, size: int) -> int:
    """Into how many groups of at least `size` so many sites are split."""
    return max(1, num_sites // size)


def draw_groups(cohort: Sequence[str], size: int, *, seed: int, round: int) -> tuple[tuple[str, ...], ...]:
    """A cohort in as many groups of at least `size` as it makes, which differ by one site at most; uniform.

    Who is with whom depends on who is in the cohort, and not on the order in which somebody names them.
    """
    order = sorted(cohort)
    random.Random(derive_seed(seed, "groups", round)).shuffle(order)
    count, place = num_groups(len(cohort), size), {site: index for index, site in enumerate(cohort)}
    groups = [tuple(sorted(order[start::count], key=place.__getitem__)) for start in range(count)]
    return tuple(sorted(groups, key=lambda group: place[group[0]]))

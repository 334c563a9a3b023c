"""Who takes part in a round: drawn from the seed and the round's number, so that it can be known in advance."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from ..recipe.schema import FederationSpec, Recipe
from ..seeding import derive_seed
from .groups import Groups
from .round import Round, answers_needed


def choose_cohort(
    sites: Sequence[str], spec: FederationSpec, *, seed: int, round: int, resting: Collection[str] = ()
) -> tuple[str, ...]:
    """The sites of one round, uniformly without replacement, in the order of `sites` (the order of folding).

    Args:
        resting: sites that may not be invited.
    """
    able = [index for index, site in enumerate(sites) if site not in resting]
    size = min(invited(spec, len(sites)), len(able))
    if size == len(sites):
        return tuple(sites)
    chosen = set(random.Random(derive_seed(seed, "cohort", round)).sample(able, size))
    return tuple(site for index, site in enumerate(sites) if index in chosen)


def resting_sites(commits: Mapping[int, Mapping[str, Any]], round: int, separation: int) -> set[str]:
    """Sites that were invited to one of the `separation` − 1 rounds before, by the commits' records."""
    before = range(max(1, round - separation + 1), round)
    return {site for number in before for site in commits[number]["cohort"]}


def check_separation(num_sites: int, recipe: Recipe) -> None:
    """Refuse a separation of a site's rounds that so few sites cannot keep.

    Raises:
        RecipeError: the cohorts of so many rounds in a row take more sites than there are.
    """
    separation, size = recipe.privacy.mechanism.separation, invited(recipe.federation, num_sites)
    if separation > 1 and size * separation > num_sites:
        raise RecipeError(
            f"privacy.mechanism.min_separation is {separation} and a round invites {size} sites: that takes "
            f"{size * separation} sites, and there are {num_sites}",
            hint=f"set min_separation to at most {num_sites // size}, or a smaller federation.cohort",
        )


def invited(spec: FederationSpec, num_sites: int) -> int:
    """How many sites a round invites: its cohort, and those whom over-selection adds."""
    return min(num_sites, math.ceil(spec.cohort.size(num_sites) * spec.over_selection - 1e-9))


def new_round(
    number: int, cohort: Sequence[str], spec: FederationSpec, num_sites: int, *, groups: Groups | None = None
) -> Round:
    """A round that has just been opened: it closes when as many have answered as the recipe's cohort asks for.

    Args:
        groups: of its secure sums, which take more answers than the recipe's quorum may; None: there are none.
    """
    target = spec.cohort.size(num_sites)
    needed = answers_needed(spec, min(target, len(cohort)))
    if groups is not None:
        needed = max(needed, groups.least_answers)
    return Round(number, tuple(cohort), needed, target=target if target < len(cohort) else None, groups=groups)


def check_cohort(num_sites: int, spec: FederationSpec) -> None:
    """Refuse settings that no round could meet.

    Raises:
        RecipeError: more sites are asked for than there are, or than a cohort has.
    """
    if spec.cohort.count is not None and spec.cohort.count > num_sites:
        raise RecipeError(
            f"federation.cohort asks for {spec.cohort.count} sites, but the data has {num_sites}",
            hint="lower the count, or use cohort: all",
        )
    size = spec.cohort.size(num_sites)
    if answers_needed(spec, size) > size:
        raise RecipeError(
            f"federation.min_sites is {spec.min_sites}, but a cohort has only {size} of {num_sites} sites",
            hint="lower min_sites, or invite more sites by federation.cohort",
        )

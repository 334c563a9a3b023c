"""Rounds of which the coordinator learns the sum of updates and no single one.

    begin   keys and shares go round among the cohort; whoever does not answer is lost before it trains
            each site trains, encodes its update into a row of the ring and masks it
    open    the survivors sign the list of survivors and reveal shares; the masks come off the sum

In a simulation every site's part is played in this process, masks and all (`simulated_sums.py`): it shows what a
network would do, and hides nothing from anybody. Over a network the messages are tasks (`coordinator/secure_sums.py`,
`site/sums.py`). The bits of the result are the same (`privacy/secure_aggregation/rows.py`).

A round needs more than two thirds of the sites that it invites, whatever `federation.quorum` says, for two lists of
survivors that are both signed by so many share an honest site. One that comes to nothing is repeated with fresh keys
and nothing of what was masked before. Where sums are made in groups (`groups.py`), that holds for each group: one that
has too few is lost to the round, as a site is that does not answer, and the others go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..codec.common import common_numbers
from ..errors import RecipeError, RoundError
from ..model.tensors import Layout, NamedTensors
from ..privacy.homomorphic import tenseal
from ..privacy.secure_aggregation.graph import MIN_SITES, majority
from ..privacy.secure_aggregation.rows import Most, RowCode, Totals
from ..recipe.schema import Recipe
from ..registry import resolve
from ..strategies.base import Strategy
from ..strategies.update import Update
from .cohort import invited
from .groups import Groups, num_groups

#: makes a key of what noise is for (`DistributedNoise.purpose`)
NoiseKey = Callable[[str], bytes]
_NOTHING = Layout(())


@dataclass(frozen=True)
class Terms:
    """What all of a round's sites must be told alike: by whatever is told one site alone its update could be told from
    the others' in the sum.

    Args:
        lr, correction: of the round's training tasks.
        most: the bounds of counts, which decide how much a row weighs.
        cohort: the sites of all groups, in the order of folding; (): there are no groups.
    """

    lr: float
    correction: Mapping[str, Any]
    most: Most
    cohort: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        counts = {"examples": self.most.examples, "label_tokens": self.most.label_tokens}
        told = {"lr": self.lr, "correction": dict(self.correction), "most": counts}
        return {**told, "cohort": list(self.cohort)} if self.cohort else told


def config_of(job: bytes, base: str, terms: Mapping[str, Any]) -> bytes:
    """What a networked session binds all its sites to, so that their messages fit only if they were told alike.

    Args:
        job: SHA-256 of the signed job.
        base: digest of the frame that the round starts from.
        terms: `Terms.to_json`, as it arrived.
    """
    return hashlib.sha256(json.dumps([job.hex(), base, terms], sort_keys=True).encode()).digest()


class SecureRounds(Protocol):
    """What the loop asks of whoever carries secure sums through."""

    def begin(self, round: int, groups: Groups, terms: Terms) -> Mapping[str, str]:
        """Hand keys and shares round; why sites were lost already, by site."""

    def seat(self, site: str) -> Mapping[str, Any] | None:
        """What a site's training task says of the sum."""

    def num_bytes(self, site: str) -> int:
        """What a site has sent."""

    def shown(self, update: Update) -> Update:
        """What may be seen of a single update: nothing that is in the sum."""

    def open(self, round: int, survivors: Sequence[str]) -> Mapping[int, str]:
        """Get what takes the masks off; why groups are lost, by their places.

        Raises:
            QuorumError: too few sites or groups went along.
        """

    def abandon(self, round: int) -> None:
        """The round has come to nothing: the next attempt has fresh keys."""

    def committed(self, round: int) -> None:
        """The round's commit is in the journal: its keys are of no more use."""


def mean_of_group(place: int, round: int, totals: Totals | None, channels: Mapping[str, NamedTensors]) -> Update:
    """A group's sum as an update, so that a strategy takes groups for sites.

    Args:
        totals: None: they cannot be, and the channels are zeros.
        channels: Σ wᵢΔᵢ / Σ wᵢ, in the accumulator's precision; {}: it lies elsewhere.
    """
    found = totals or Totals(1.0, 0, 0, 0.0)
    return Update(f"group-{place + 1}", round, channels, found.weight, found.examples, found.label_tokens, 1)


class GroupTotals:
    """What the totals of a round's groups say, as they are read.

    A group whose totals no honest sites come to has a hostile one, who must not halt the round: it counts as one of the
    f, with a row of zeros. A rule that withstands any f rows withstands these.
    """

    def __init__(self) -> None:
        self.sum = Totals(0.0, 0, 0, 0.0)
        self.spoilt: dict[int, str] = {}

    def read(self, place: int, totals: Callable[[], Totals]) -> Totals | None:
        """A group's totals; None: they cannot be."""
        try:
            found = totals()
        except RoundError as error:
            self.spoilt[place] = error.message
            return None
        before = self.sum
        self.sum = Totals(
            before.weight + found.weight,
            before.examples + found.examples,
            before.label_tokens + found.label_tokens,
            before.nats + found.nats,
        )
        return found


def noise_key(code: RowCode, key: NoiseKey | None, site: str, round: int, delta: NamedTensors) -> bytes | None:
    """The key of a site's noise on an update; None: it adds none."""
    if code.noise is None:
        return None
    assert key is not None
    return key(code.noise.purpose(site=site, round=round, digest=delta.digest()))


def bare(update: Update, metrics: Mapping[str, float], clipped: int) -> Update:
    """An update without what the sum holds. How many elements were clipped is worth telling, if any were."""
    told = {**metrics, **({"clipped": float(clipped)} if clipped else {})}
    return replace(update, weight=1.0, num_examples=1, num_label_tokens=0, metrics=told)


def check_sums(recipe: Recipe, num_sites: int, layout: Layout = _NOTHING) -> None:
    """Refuse secure sums that no round of so many sites could make.

    Args:
        layout: of the updates, as far as it is known.

    Raises:
        RecipeError: a cohort is too small, invites so many more than it takes that those who answer could be too few,
            or is so large that too few bits are left for each site; or there are none, and noise counts on them.
    """
    if not recipe.privacy.summed:
        if recipe.privacy.mechanism.at_sites:
            raise RecipeError(
                f"privacy.mechanism {recipe.privacy.mechanism.name}: with it a site adds too little noise to hide its "
                "update by itself, and updates would not be summed securely here",
                hint="set privacy.secure_aggregation: on",
            )
        return
    if recipe.privacy.secure_aggregation == "homomorphic":
        tenseal()
    spec = recipe.federation
    size, asked = spec.cohort.size(num_sites), invited(spec, num_sites)
    if size < MIN_SITES:
        raise RecipeError(
            f"privacy.secure_aggregation: a cohort of {size} sites; with fewer than {MIN_SITES} a sum shows what one "
            "of them sent",
            hint="invite more sites by federation.cohort, or set privacy.secure_aggregation: off",
        )
    if size < majority(asked):
        raise RecipeError(
            f"federation.over_selection {spec.over_selection:g}: {asked} sites are invited and {size} are enough, but "
            f"a secure sum needs {majority(asked)} of them",
            hint="set federation.over_selection below 1.5, or privacy.secure_aggregation: off",
        )
    if recipe.privacy.secure_group_size is not None:
        _check_groups(recipe, size, recipe.privacy.secure_group_size)
        asked = recipe.privacy.secure_group_size
    _ = RowCode.of(recipe, layout, asked, Most(1, 1), common_numbers(recipe, layout, 0)).elements


def _check_groups(recipe: Recipe, cohort: int, size: int) -> None:
    """Raises RecipeError: a cohort makes fewer groups than the strategy needs rows."""
    method = recipe.federation.strategy
    kind = resolve("strategy", method.name)
    strategy: Strategy = kind(kind.Options(**method.options))
    groups, least = num_groups(cohort, size), strategy.least_updates
    if cohort < size or groups < least:
        f = getattr(strategy.options, "f", 0)
        raise RecipeError(
            f"federation.strategy {method.name!r} with f = {f} needs at least {least} groups a round, for one hostile "
            f"site spoils its whole group; a cohort of {cohort} sites makes {cohort // size} of at least {size}",
            hint=f"lower f, lower privacy.secure_group_size (no lower than {MIN_SITES}), or invite at least "
            f"{least * size} sites by federation.cohort",
        )
    strategy.check(groups)

"""Rounds of which the coordinator learns the sum of updates and no single one.

    begin   keys and shares go round among the cohort; whoever does not answer is lost before it trains
            each site trains, encodes its update into a row of the ring and masks it
    open    the survivors sign the list of survivors and reveal shares; the masks come off the sum

In a simulation every site's part is played in this process (`SimulatedSums`), masks and all: it shows what a network
would do, and hides nothing from anybody. Over a network the messages are tasks (`coordinator/secure_sums.py`,
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

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import RecipeError, RoundError, SiteError, UpdateRefused
from ..model.tensors import Layout, NamedTensors
from ..privacy.secure_aggregation.collector import Collector
from ..privacy.secure_aggregation.graph import MIN_SITES, majority
from ..privacy.secure_aggregation.masks import Ring
from ..privacy.secure_aggregation.messages import Session
from ..privacy.secure_aggregation.party import Party
from ..privacy.secure_aggregation.rows import NUM_TOTALS, Most, RowCode, Totals, row_starts
from ..recipe.schema import Recipe
from ..registry import resolve
from ..strategies.base import Strategy, WeightedSum
from ..strategies.update import Update
from .cohort import invited
from .groups import Groups, num_groups

#: metrics of a single site that a round with secure sums still shows
_SHOWN = ("seconds", "kept")


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


class SimulatedSum:
    """One secure sum among sites of this process: of a whole cohort, or of a group. Rows are added as they come.

    Args:
        identities: by site, made when they are first asked for.
    """

    def __init__(
        self, recipe: Recipe, layout: Layout, session: Session, terms: Terms, identities: dict[str, Ed25519PrivateKey]
    ) -> None:
        self.sites, self.layout, self._identities = session.sites, layout, identities
        self.code = RowCode.of(recipe, layout, len(session.sites), terms.most)
        self._collector = Collector(session, verify=self._verify)
        self._parties = {
            site: Party(session, site, sign=self._identity(site).sign, verify=self._verify) for site in session.sites
        }
        for party in self._parties.values():
            self._collector.advert(party.advertise())
        adverts = self._collector.close_adverts()
        for site, party in self._parties.items():
            self._collector.shares(site, party.share(adverts))
        self._boxes = self._collector.close_shares()
        self._total: Ring = np.zeros(self.code.length, dtype=np.uint32)
        self._row: Ring = np.empty_like(self._total)

    def _identity(self, site: str) -> Ed25519PrivateKey:
        return self._identities.setdefault(site, Ed25519PrivateKey.generate())

    def _verify(self, site: str, message: bytes, signature: bytes) -> bool:
        try:
            self._identity(site).public_key().verify(signature, message)
        except InvalidSignature:
            return False
        return True

    @property
    def there(self) -> Sequence[str]:
        """Sites whose rows are in the total."""
        return self._collector.masked

    def add(self, update: Update) -> int:
        """Encode and mask an update as its site would, and add it to the total; how many elements were clipped."""
        clipped = self.code.encode(
            update.delta,
            examples=update.num_examples,
            label_tokens=update.num_label_tokens,
            loss=update.metrics.get("loss", 0.0),
            out=self._row,
        )
        self._parties[update.site].mask(self._boxes[update.site], self._row)
        self._collector.row(update.site, self._row, self._total)
        return clipped

    def open(self) -> None:
        found = self._collector.close_rows()
        for site in found:
            self._collector.consent(site, self._parties[site].consent(found))
        consents = self._collector.close_consents()
        for site in found:
            self._collector.reveal(self._parties[site].reveal(consents))
        self._collector.open(self._total)

    def into(self, fold: WeightedSum) -> Totals:
        """Make a fold of the opened sum, as if the updates had been folded into it.

        Raises:
            RoundError: as `RowCode.totals`.
        """
        totals = self.code.totals(self._total[-NUM_TOTALS:], len(self.there))
        for dtype, start in row_starts(self.layout).items():
            out = fold.sums["delta"].flats[dtype]
            self.code.decode(self._total[start : start + out.numel()], out)
        fold.total_weight, fold.num_updates = totals.weight, len(self.there)
        return totals


class SimulatedSums:
    """Secure sums among sites of this process, one a round or one a group."""

    def __init__(self, recipe: Recipe, layout: Layout) -> None:
        self.recipe, self.layout = recipe, layout
        self._identities: dict[str, Ed25519PrivateKey] = {}
        self._attempt = 0
        self._clipped: dict[str, int] = {}

    def begin(self, round: int, groups: Groups, terms: Terms) -> Mapping[str, str]:
        self._groups = groups
        sessions = [Session(self.recipe.name, round, self._attempt, group) for group in groups.members]
        self.sums = [SimulatedSum(self.recipe, self.layout, s, terms, self._identities) for s in sessions]
        self._sum_of = {site: one for one in self.sums for site in one.sites}
        self._clipped = {}
        return {}

    def seat(self, site: str) -> Mapping[str, Any] | None:
        return None

    def check(self, update: Update) -> None:
        """Raises UpdateRefused: its site could not have sent it."""
        try:
            self._sum_of[update.site].code.check(update.num_examples, update.num_label_tokens)
        except SiteError as error:
            raise UpdateRefused(error.message, hint=error.hint) from error

    def add(self, update: Update) -> None:
        self._clipped[update.site] = self._sum_of[update.site].add(update)

    def shown(self, update: Update) -> Update:
        metrics = {name: update.metrics[name] for name in _SHOWN if name in update.metrics}
        return bare(update, metrics, self._clipped.get(update.site, 0))

    def open(self, round: int, survivors: Sequence[str]) -> Mapping[int, str]:
        lost = {}
        whole = self._groups.whole(survivors)
        self.opened: list[tuple[int, SimulatedSum]] = []
        for place, one in enumerate(self.sums):
            if one.sites not in whole:
                lost[place] = f"{len(one.there)} of {len(one.sites)} sites sent their rows"
                continue
            one.open()
            self.opened.append((place, one))
        return lost

    def abandon(self, round: int) -> None:
        self._attempt += 1

    def committed(self, round: int) -> None:
        """Its keys go with the next round's."""


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


def bare(update: Update, metrics: Mapping[str, float], clipped: int) -> Update:
    """An update without what the sum holds. How many elements were clipped is worth telling, if any were."""
    told = {**metrics, **({"clipped": float(clipped)} if clipped else {})}
    return replace(update, weight=1.0, num_examples=1, num_label_tokens=0, metrics=told)


def check_sums(recipe: Recipe, num_sites: int) -> None:
    """Refuse secure sums that no round of so many sites could make.

    Raises:
        RecipeError: a cohort is too small, invites so many more than it takes that those who answer could be too few,
            or is so large that too few bits are left for each site.
    """
    if recipe.privacy.secure_aggregation != "on":
        return
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
    _ = RowCode.of(recipe, Layout(()), asked, Most(1, 1)).elements


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

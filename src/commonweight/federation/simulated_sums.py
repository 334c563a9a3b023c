"""Secure sums whose parties are all played in this process: what a network would do, and no secret from anybody.

A sum is of masked rows (`MaskedSum`, the protocol of a network) or of encrypted ones (`EncryptedSum`). Both are exact,
so that the result has the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..codec.common import common_numbers
from ..errors import SiteError, UpdateRefused
from ..model.tensors import Layout
from ..privacy.homomorphic import Adder, Keyholder
from ..privacy.secure_aggregation.collector import Collector
from ..privacy.secure_aggregation.masks import Ring
from ..privacy.secure_aggregation.messages import Session
from ..privacy.secure_aggregation.party import Party
from ..privacy.secure_aggregation.rows import NUM_TOTALS, RowCode, Totals
from ..recipe.schema import Recipe
from ..strategies.base import WeightedSum
from ..strategies.update import Update
from .groups import Groups
from .secure_rounds import NoiseKey, Terms, bare, noise_key

#: metrics of a single site that a round with secure sums still shows
_SHOWN = ("seconds", "kept")


class SimulatedSum(ABC):
    """One sum among sites of this process: of a whole cohort, or of a group. Rows are added as they come."""

    def __init__(self, recipe: Recipe, layout: Layout, session: Session, terms: Terms) -> None:
        self.sites, self.layout = session.sites, layout
        numbers = common_numbers(recipe, layout, session.round)
        self.code = RowCode.of(recipe, layout, len(session.sites), terms.most, numbers)
        self.there: list[str] = []
        self._total: Ring = np.zeros(self.code.length, dtype=np.uint32)
        self._row: Ring = np.empty_like(self._total)

    def add(self, update: Update, key: bytes | None = None) -> tuple[int, int]:
        """Encode an update, hide it as its site would, and add it to the total; how many elements were clipped, and how
        many bytes were sent.

        Args:
            key: of the site's noise, if it adds any.
        """
        clipped = self.code.encode(
            update.delta,
            examples=update.num_examples,
            label_tokens=update.num_label_tokens,
            loss=update.metrics.get("loss", 0.0),
            out=self._row,
            key=key,
        )
        sent = self._send(update.site, self._row)
        self.there.append(update.site)
        return clipped, sent

    @abstractmethod
    def _send(self, site: str, row: Ring) -> int:
        """Hide a row, which may be overwritten, and add it; returns the bytes of it that are sent."""

    @abstractmethod
    def open(self) -> None:
        """Bring the total to the sum of the rows that are there."""

    def into(self, fold: WeightedSum) -> Totals:
        """Make a fold of the opened sum, as if the updates had been folded into it.

        Raises:
            RoundError: as `RowCode.totals`.
        """
        totals = self.code.totals(self._total[-NUM_TOTALS:], len(self.there))
        for dtype, out in fold.sums["delta"].floating():
            self.code.spread(lambda first, length: self._total[first : first + length], dtype, 0, out)
        fold.total_weight, fold.num_updates = totals.weight, len(self.there)
        return totals


class MaskedSum(SimulatedSum):
    """A sum of masked rows."""

    def __init__(self, recipe: Recipe, layout: Layout, session: Session, terms: Terms) -> None:
        super().__init__(recipe, layout, session, terms)
        self._identities = {site: Ed25519PrivateKey.generate() for site in session.sites}
        self._collector = Collector(session, verify=self._verify)
        self._parties = {
            site: Party(session, site, sign=self._identities[site].sign, verify=self._verify) for site in session.sites
        }
        for party in self._parties.values():
            self._collector.advert(party.advertise())
        adverts = self._collector.close_adverts()
        for site, party in self._parties.items():
            self._collector.shares(site, party.share(adverts))
        self._boxes = self._collector.close_shares()

    def _verify(self, site: str, message: bytes, signature: bytes) -> bool:
        try:
            self._identities[site].public_key().verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def _send(self, site: str, row: Ring) -> int:
        self._parties[site].mask(self._boxes[site], row)
        self._collector.row(site, row, self._total)
        return row.nbytes

    def open(self) -> None:
        found = self._collector.close_rows()
        for site in found:
            self._collector.consent(site, self._parties[site].consent(found))
        consents = self._collector.close_consents()
        for site in found:
            self._collector.reveal(self._parties[site].reveal(consents))
        self._collector.open(self._total)


class EncryptedSum(SimulatedSum):
    """A sum of encrypted rows, under a key that is fresh for each sum. The first site that is there decrypts it."""

    def __init__(self, recipe: Recipe, layout: Layout, session: Session, terms: Terms) -> None:
        super().__init__(recipe, layout, session, terms)
        first = Keyholder()
        self._adder, secret = Adder(), first.secret()
        self._sites = {site: first if site == session.sites[0] else Keyholder(secret) for site in session.sites}

    def _send(self, site: str, row: Ring) -> int:
        ciphertexts = self._sites[site].encrypt(row)
        self._adder.add(ciphertexts)
        return sum(map(len, ciphertexts))

    def open(self) -> None:
        self._total = self._sites[self.there[0]].decrypt(self._adder.total())


class SimulatedSums:
    """Secure sums among sites of this process, one a round or one a group.

    Args:
        noise_key: makes the keys of the sites' noise, where they add any.
    """

    def __init__(self, recipe: Recipe, layout: Layout, noise_key: NoiseKey | None = None) -> None:
        self.recipe, self.layout, self.noise_key = recipe, layout, noise_key
        self._kind = EncryptedSum if recipe.privacy.secure_aggregation == "homomorphic" else MaskedSum
        self._attempt = 0
        self._clipped: dict[str, int] = {}
        self._sent: dict[str, int] = {}

    def begin(self, round: int, groups: Groups, terms: Terms) -> Mapping[str, str]:
        self._groups = groups
        sessions = [Session(self.recipe.name, round, self._attempt, group) for group in groups.members]
        self.sums = [self._kind(self.recipe, self.layout, session, terms) for session in sessions]
        self._sum_of = {site: one for one in self.sums for site in one.sites}
        self._clipped, self._sent = {}, {}
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
        one = self._sum_of[update.site]
        key = noise_key(one.code, self.noise_key, update.site, update.round, update.delta)
        self._clipped[update.site], self._sent[update.site] = one.add(update, key)

    def num_bytes(self, site: str) -> int:
        return self._sent[site]

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

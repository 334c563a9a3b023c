"""Secure sums among parties of this process, for tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from commonweight.privacy.secure_aggregation.collector import Collector
from commonweight.privacy.secure_aggregation.masks import Ring
from commonweight.privacy.secure_aggregation.messages import Session
from commonweight.privacy.secure_aggregation.party import Party


@dataclass
class Identities:
    """Pinned identities, made when they are first asked for."""

    keys: dict[str, Ed25519PrivateKey] = field(default_factory=dict)

    def of(self, site: str) -> Ed25519PrivateKey:
        return self.keys.setdefault(site, Ed25519PrivateKey.generate())

    def verify(self, site: str, message: bytes, signature: bytes) -> bool:
        try:
            self.of(site).public_key().verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def party(self, session: Session, site: str) -> Party:
        return Party(session, site, sign=self.of(site).sign, verify=self.verify)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"site-{index:03d}" for index in range(count))


def rows(sites: Iterable[str], length: int = 50, seed: int = 0) -> dict[str, Ring]:
    draw = np.random.default_rng(seed)
    return {site: draw.integers(0, 1 << 32, length, dtype=np.uint32) for site in sites}


class Sum:
    """One secure sum, step by step.

    Args:
        lost_at: sites by the last step that they take: `nothing`, `advertise`, `share`, `mask`, `consent`.
    """

    def __init__(
        self,
        session: Session,
        values: dict[str, Ring],
        lost_at: dict[str, str] | None = None,
        identities: Identities | None = None,
    ) -> None:
        self.session, self.values, self.lost_at = session, values, lost_at or {}
        self.identities = identities or Identities()
        self.parties = {site: self.identities.party(session, site) for site in session.sites}
        self.collector = Collector(session, verify=self.identities.verify)
        self.total: Ring = np.zeros_like(next(iter(values.values())))

    def takes(self, site: str, step: str) -> bool:
        steps = ("nothing", "advertise", "share", "mask", "consent", "reveal")
        return steps.index(step) <= steps.index(self.lost_at.get(site, "reveal"))

    def among(self, sites: Collection[str], step: str) -> list[str]:
        return [site for site in self.session.sites if site in sites and self.takes(site, step)]

    def up_to_rows(self) -> tuple[str, ...]:
        for site in self.among(self.session.sites, "advertise"):
            self.collector.advert(self.parties[site].advertise())
        adverts = self.collector.close_adverts()
        for site in self.among(self.collector.adverts, "share"):
            self.collector.shares(site, self.parties[site].share(adverts))
        boxes = self.collector.close_shares()
        for site in self.among(boxes, "mask"):
            row = self.values[site].copy()
            self.parties[site].mask(boxes[site], row)
            self.collector.row(site, row, self.total)
        return self.collector.close_rows()

    def run(self) -> tuple[Ring, tuple[str, ...]]:
        """The sum, and the survivors whose it is."""
        survivors = self.up_to_rows()
        for site in self.among(survivors, "consent"):
            self.collector.consent(site, self.parties[site].consent(survivors))
        consents = self.collector.close_consents()
        for site in self.among(survivors, "reveal"):
            self.collector.reveal(self.parties[site].reveal(consents))
        self.collector.open(self.total)
        return self.total, survivors

    def plain(self, sites: Iterable[str]) -> Ring:
        total = np.zeros_like(self.total)
        for site in sites:
            total += self.values[site]
        return total

"""What sites and the coordinator say to each other in a secure sum, and the bytes that are signed.

Advert    site → all       its public keys of this session, signed
Sealed    site → a peer    shares of its two secrets, which only that peer can open
(masked row)  site → coordinator
Consent   site → all       the list of survivors that it was shown, signed
Reveal    site → coordinator   for each peer one share: of its own mask if it survived, of its pair key if it is lost
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import SiteError
from .graph import degree, majority, neighbours

#: signs bytes with a site's pinned identity
Sign = Callable[[bytes], bytes]
#: whether a signature of bytes is a site's
Verify = Callable[[str, bytes, bytes], bool]


class SecureAggregationError(SiteError):
    """Somebody did not keep to the protocol; nothing that would open a mask was sent."""


@dataclass(frozen=True)
class Session:
    """One attempt at one secure sum. A retry is another session, with fresh keys.

    Args:
        run, round, attempt: which.
        sites: the sites invited, in the order of folding.
        config: what all must agree on beside (the recipe's digest, say).
        corrupt, lost: the declared shares that decide the graph (`graph.degree`).

    Raises:
        RecipeError: there are too few sites.
    """

    run: str
    round: int
    attempt: int
    sites: tuple[str, ...]
    config: bytes = b""
    corrupt: float = 0.1
    lost: float = 0.3

    def __post_init__(self) -> None:
        if len(set(self.sites)) != len(self.sites):
            raise ValueError("a site is invited twice")
        degree(len(self.sites), corrupt=self.corrupt, lost=self.lost)

    @property
    def context(self) -> bytes:
        """32 bytes that stand for everything above."""
        parts = [self.run, self.round, self.attempt, list(self.sites), self.config.hex(), self.corrupt, self.lost]
        return hashlib.sha256(b"commonweight secure sum 1\n" + json.dumps(parts).encode()).digest()

    @property
    def needed(self) -> int:
        """How many sites must be there at each step: more than two thirds of those invited."""
        return majority(len(self.sites))

    def place(self, site: str) -> int:
        """A site's place among those invited, from 1: where its shares of others' secrets are evaluated."""
        return self.sites.index(site) + 1


@dataclass(frozen=True)
class Advert:
    """A site's public keys of one session.

    Args:
        channel: X25519, 32 bytes: for sealing shares.
        pair: X25519, 32 bytes: for masks.
        commitment: SHA-256 of the seed of its own mask, so that a wrong reconstruction is noticed.
        signature: of `signed`, by its pinned identity.
    """

    site: str
    channel: bytes
    pair: bytes
    commitment: bytes
    signature: bytes = b""

    def signed(self, session: Session) -> bytes:
        return b"advert\n" + session.context + _joined(self.site.encode(), self.channel, self.pair, self.commitment)


@dataclass(frozen=True)
class Circle:
    """The sites that advertised, and whose masks cancel whose. Everyone makes the same one from the same adverts."""

    session: Session
    adverts: Mapping[str, Advert]
    neighbours: Mapping[str, tuple[str, ...]] = field(init=False)
    threshold: int = field(init=False)

    def __post_init__(self) -> None:
        session, present = self.session, [site for site in self.session.sites if site in self.adverts]
        chosen = degree(len(present), corrupt=session.corrupt, lost=session.lost)
        keys = b"".join(self.adverts[site].signed(session) for site in present)
        seed = hashlib.sha256(session.context + keys).digest()
        object.__setattr__(self, "neighbours", neighbours(present, chosen.neighbours, seed))
        object.__setattr__(self, "threshold", chosen.threshold)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.neighbours)


def check_adverts(session: Session, adverts: Sequence[Advert], verify: Verify) -> Circle:
    """The circle of these adverts.

    Raises:
        SecureAggregationError: a site is not invited or is there twice, a key is used twice, a signature is not by the
            site's pinned identity, or too few sites are there.
    """
    seen: dict[str, Advert] = {}
    keys: set[bytes] = set()
    for advert in adverts:
        if advert.site not in session.sites:
            raise SecureAggregationError(f"site {advert.site!r} advertises keys and is not invited")
        if advert.site in seen:
            raise SecureAggregationError(f"site {advert.site!r} advertises keys twice")
        if {advert.channel, advert.pair} & keys or advert.channel == advert.pair:
            raise SecureAggregationError(f"site {advert.site!r} advertises a key that is in use already")
        if not verify(advert.site, advert.signed(session), advert.signature):
            raise SecureAggregationError(
                f"the keys shown for site {advert.site!r} are not signed by its identity",
                hint="somebody between the sites puts in keys of their own; nothing was sent",
            )
        seen[advert.site] = advert
        keys |= {advert.channel, advert.pair}
    if len(seen) < session.needed:
        raise SecureAggregationError(
            f"{len(seen)} of {len(session.sites)} sites advertise keys, {session.needed} are needed", retry=True
        )
    return Circle(session, seen)


def consent_bytes(session: Session, survivors: Sequence[str]) -> bytes:
    """What a site signs to say that this is the list of survivors which it was shown."""
    return b"consent\n" + session.context + _joined(*(site.encode() for site in survivors))


@dataclass(frozen=True)
class Reveal:
    """One site's answer to a list of survivors: shares by whose secret they are of, 33 bytes each.

    Args:
        own: of the seeds of survivors' own masks.
        pair: of the pair keys of those who are lost.
    """

    site: str
    own: Mapping[str, bytes]
    pair: Mapping[str, bytes]


def _joined(*parts: bytes) -> bytes:
    """Parts, each behind its length, so that no two lists of parts have the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)

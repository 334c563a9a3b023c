"""The coordinator's side of a secure sum: it carries messages, adds masked rows, and takes the masks off the sum.

    adverts ─► shares ─► masked rows ─► consents ─► reveals ─► the sum

Nothing that it ever holds opens a single row, as long as fewer than a threshold of the sites work with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ...errors import QuorumError, UpdateRefused
from . import shamir
from .masks import Expander, Ring, own_key, pair_key
from .messages import Advert, Circle, Reveal, Session, Verify, check_adverts, consent_bytes
from .party import pair_context, pair_sign


class Collector:
    """One session, as the coordinator carries it through.

    Args:
        verify: sites' signatures, by their pinned identities.
    """

    def __init__(self, session: Session, *, verify: Verify) -> None:
        self.session, self._verify = session, verify
        self.adverts: dict[str, Advert] = {}
        self._circle: Circle | None = None
        self.boxes: dict[str, dict[str, bytes]] = {}
        self._sharers: tuple[str, ...] | None = None
        self.masked: list[str] = []
        self._survivors: tuple[str, ...] | None = None
        self.consents: dict[str, bytes] = {}
        self.reveals: dict[str, Reveal] = {}

    # --- keys

    def advert(self, advert: Advert) -> None:
        """Raises UpdateRefused: it is not invited, not its own, uses another's key, or comes twice or too late."""
        site = advert.site
        if self._circle is not None:
            raise UpdateRefused(f"site {site!r} advertises keys when all have been handed round")
        if site not in self.session.sites or site in self.adverts:
            raise UpdateRefused(f"site {site!r} is not invited to this sum, or has advertised keys before")
        used = {key for known in self.adverts.values() for key in (known.channel, known.pair)}
        if {advert.channel, advert.pair} & used or advert.channel == advert.pair:
            raise UpdateRefused(f"site {site!r} advertises a key that is in use already")
        if not self._verify(site, advert.signed(self.session), advert.signature):
            raise UpdateRefused(f"the keys of site {site!r} are not signed by its identity")
        self.adverts[site] = advert

    def close_adverts(self) -> list[Advert]:
        """What goes to every site that advertised.

        Raises:
            QuorumError: they are too few.
        """
        self._enough(len(self.adverts), "advertised keys")
        ordered = [self.adverts[site] for site in self.session.sites if site in self.adverts]
        self._circle = check_adverts(self.session, ordered, self._verify)
        return ordered

    # --- shares

    def shares(self, site: str, sealed: Mapping[str, bytes]) -> None:
        """Raises UpdateRefused: they are not for exactly the site's neighbours, or come twice or too late."""
        circle = self._in_circle()
        if self._sharers is not None or site in self.boxes or site not in circle.adverts:
            raise UpdateRefused(f"the shares of site {site!r} are not awaited")
        if set(sealed) != set(circle.neighbours[site]):
            raise UpdateRefused(f"the shares of site {site!r} are not for its neighbours")
        self.boxes[site] = dict(sealed)

    def close_shares(self) -> dict[str, dict[str, bytes]]:
        """For every site that handed out shares, what others that did have sealed for it.

        Raises:
            QuorumError: they are too few.
        """
        self._enough(len(self.boxes), "handed out shares")
        circle = self._in_circle()
        self._sharers = tuple(site for site in circle.sites if site in self.boxes)
        there = set(self._sharers)
        return {s: {p: self.boxes[p][s] for p in circle.neighbours[s] if p in there} for s in self._sharers}

    # --- masked rows

    def row(self, site: str, row: Ring, total: Ring) -> None:
        """Add a masked row to the total, in place; the row is not kept.

        Raises:
            UpdateRefused: the site handed out no shares, has sent its row, the row has another length, or it is late.
        """
        if row.shape != total.shape or row.dtype != total.dtype:
            raise UpdateRefused(f"the masked row of site {site!r} has {row.size} elements, not {total.size}")
        self.arrived(site)
        total += row

    def arrived(self, site: str) -> None:
        """A site's masked row is in the total, or wherever the total will be made.

        Raises:
            UpdateRefused: the site handed out no shares, has sent its row, or it is late.
        """
        if self._sharers is None or site not in self._sharers or self._survivors is not None or site in self.masked:
            raise UpdateRefused(f"a masked row of site {site!r} is not awaited")
        self.masked.append(site)

    def close_rows(self) -> tuple[str, ...]:
        """The survivors: those whose rows are in the total.

        Raises:
            QuorumError: they are too few.
        """
        self._enough(len(self.masked), "sent their rows")
        self._survivors = tuple(site for site in self.session.sites if site in self.masked)
        return self._survivors

    # --- opening

    def consent(self, site: str, signature: bytes) -> None:
        """Raises UpdateRefused: the site is no survivor, or did not sign this list."""
        survivors = self._survivors or ()
        if site not in survivors or not self._verify(site, consent_bytes(self.session, survivors), signature):
            raise UpdateRefused(f"site {site!r} did not sign the list of survivors")
        self.consents[site] = signature

    def close_consents(self) -> dict[str, bytes]:
        """What goes to every survivor.

        Raises:
            QuorumError: they are too few.
        """
        self._enough(len(self.consents), "signed the list of survivors")
        return dict(self.consents)

    def reveal(self, reveal: Reveal) -> None:
        """Raises UpdateRefused: the shares are not those that were asked for."""
        circle, survivors = self._in_circle(), set(self._survivors or ())
        if reveal.site not in survivors or reveal.site in self.reveals:
            raise UpdateRefused(f"shares of site {reveal.site!r} are not awaited")
        known = {reveal.site, *circle.neighbours[reveal.site]}
        if not set(reveal.own) <= survivors & known or not set(reveal.pair) <= known - survivors:
            raise UpdateRefused(f"site {reveal.site!r} reveals shares that nobody asked for")
        if any(len(share) != shamir.SHARE_BYTES for share in (*reveal.own.values(), *reveal.pair.values())):
            raise UpdateRefused(f"site {reveal.site!r} reveals shares of a wrong length")
        self.reveals[reveal.site] = reveal

    def can_open(self) -> bool:
        """Whether enough shares of every secret are there."""
        return not self._short()

    def _short(self) -> list[str]:
        circle = self._in_circle()
        return [site for site in self._wanted() if len(self._shares_of(site)) < circle.threshold]

    def _wanted(self) -> tuple[str, ...]:
        """Sites of which a secret must be known: survivors their seeds, the lost their pair keys."""
        return self._sharers or ()

    def _shares_of(self, site: str) -> dict[int, bytes]:
        kind = "own" if site in (self._survivors or ()) else "pair"
        found = {}
        for reveal in self.reveals.values():
            share = getattr(reveal, kind).get(site)
            if share is not None:
                found[self.session.place(reveal.site)] = share
        return found

    def open(self, total: Ring) -> None:
        """Take the masks off the total, in place: then it is the sum of the survivors' encoded rows.

        Raises:
            QuorumError: as `masks`.
        """
        expander = Expander()
        for key, sign in self.masks():
            expander.add(total, key, sign=sign)

    def masks(self) -> list[tuple[bytes, int]]:
        """What opens the total, or any stretch of it: (key, sign) of each mask that is to be added (`Expander.add`).

        Raises:
            QuorumError: shares are missing, or those revealed do not give what was advertised. A retry needs fresh
                keys of everyone.
        """
        short = self._short()
        if short or self._survivors is None:
            raise QuorumError(
                f"too few shares of the secrets of {', '.join(short[:3]) or 'the survivors'} were revealed",
                hint="the round is repeated with fresh keys",
                retry=True,
            )
        circle, session = self._in_circle(), self.session
        alive, masks = set(self._survivors), []
        for site in self._wanted():
            secret = self._secret(site)
            if site in alive:
                if hashlib.sha256(secret).digest() != circle.adverts[site].commitment:
                    raise self._wrong(site)
                masks.append((own_key(secret, session.context), -1))
                continue
            mine = X25519PrivateKey.from_private_bytes(secret)
            if mine.public_key().public_bytes_raw() != circle.adverts[site].pair:
                raise self._wrong(site)
            for peer in circle.neighbours[site]:
                if peer in alive:
                    key = pair_key(mine, circle.adverts[peer].pair, pair_context(session, site, peer))
                    masks.append((key, -pair_sign(session, peer, site)))
        return masks

    def _secret(self, site: str) -> bytes:
        try:
            return shamir.combine(self._shares_of(site), self._in_circle().threshold)
        except ValueError as error:
            raise self._wrong(site) from error

    def _wrong(self, site: str) -> QuorumError:
        return QuorumError(
            f"the shares revealed of site {site!r} do not give what it advertised: somebody has sent a wrong share",
            hint="the round is repeated with fresh keys",
            retry=True,
        )

    def _in_circle(self) -> Circle:
        if self._circle is None:
            raise UpdateRefused("the sites' keys have not been handed round yet")
        return self._circle

    def _enough(self, found: int, what: str) -> None:
        if found < self.session.needed:
            raise QuorumError(
                f"{found} of {len(self.session.sites)} sites {what}, {self.session.needed} are needed",
                hint="nothing of any site was opened; the round is repeated with fresh keys",
                retry=True,
            )

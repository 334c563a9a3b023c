"""A site's side of a secure sum.

    advertise ─► share ─► mask ─► consent ─► reveal

Each step is taken once. What a step has decided is handed to `keep` before its message is given out, so that a site
that was killed goes on from there (`Party.restored`) and never says two different things: a second, different list of
survivors is refused, whoever shows it, and for no peer both kinds of share are ever given.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from . import shamir
from .masks import Expander, Ring, channel_key, own_key, pair_key
from .messages import (
    Advert,
    Circle,
    Reveal,
    SecureAggregationError,
    Session,
    Sign,
    Verify,
    check_adverts,
    consent_bytes,
)

#: takes a step's state, which is secret, to where it outlives the process
Keep = Callable[[bytes], None]
_NONCE = bytes(12)  # every key seals one message only


class Party:
    """One site in one session.

    Args:
        sign: by the site's pinned identity.
        verify: others' signatures, by theirs.
        keep: called with the state before each message is given out.
    """

    def __init__(self, session: Session, site: str, *, sign: Sign, verify: Verify, keep: Keep = lambda _: None) -> None:
        if site not in session.sites:
            raise SecureAggregationError(f"site {site!r} is not invited to this sum")
        self.session, self.site = session, site
        self._sign, self._verify, self._keep = sign, verify, keep
        self._channel, self._pair = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(shamir.SECRET_BYTES)
        self._adverts: list[Advert] = []
        self._circle: Circle | None = None
        self._sealed: dict[str, bytes] = {}
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        self._survivors: tuple[str, ...] | None = None
        #: what this very process has done; another one may say the same again
        self._has_shared = self._has_masked = False

    # --- the steps

    def advertise(self) -> Advert:
        """This session's public keys, signed."""
        advert = Advert(
            self.site,
            self._channel.public_key().public_bytes_raw(),
            self._pair.public_key().public_bytes_raw(),
            hashlib.sha256(self._seed).digest(),
        )
        signature = self._sign(advert.signed(self.session))
        self._keep(self.state())
        return Advert(advert.site, advert.channel, advert.pair, advert.commitment, signature)

    def share(self, adverts: Sequence[Advert]) -> dict[str, bytes]:
        """Shares of this site's two secrets, sealed, by the peer for whom they are. A party that was restored says the
        same again to the same adverts.

        Raises:
            SecureAggregationError: the adverts are not what they must be, this site's own is missing or changed, or
                other adverts were shown before.
        """
        circle = check_adverts(self.session, adverts, self._verify)
        mine = circle.adverts.get(self.site)
        if mine is None or (mine.channel, mine.pair) != (
            self._channel.public_key().public_bytes_raw(),
            self._pair.public_key().public_bytes_raw(),
        ):
            raise SecureAggregationError("this site's own keys are missing among those shown, or are not its own")
        if self._has_shared:
            raise SecureAggregationError("this site has handed out its shares already")
        self._has_shared = True
        if self._circle is not None:
            if list(adverts) != self._adverts:
                raise SecureAggregationError("this site was shown other keys before, and has handed out its shares")
            return dict(self._sealed)
        peers = [*circle.neighbours[self.site], self.site]
        places = [self.session.place(peer) for peer in peers]
        own = shamir.split(self._seed, circle.threshold, places)
        pair = shamir.split(self._pair.private_bytes_raw(), circle.threshold, places)
        sealed = {}
        for peer, place in zip(peers, places, strict=True):
            if peer == self.site:
                self._shares[peer] = (own[place], pair[place])
                continue
            key = channel_key(self._channel, circle.adverts[peer].channel, self._way(self.site, peer))
            sealed[peer] = ChaCha20Poly1305(key).encrypt(_NONCE, own[place] + pair[place], self._way(self.site, peer))
        self._circle, self._adverts, self._sealed = circle, list(adverts), sealed
        self._keep(self.state())
        return dict(sealed)

    def mask(self, sealed: Mapping[str, bytes], row: Ring) -> None:
        """Open the peers' shares, and add to `row`, in place, this site's masks: then it may be sent.

        Only peers whose shares came are masked against: the coordinator tells everyone the same ones. A party that was
        restored masks anew with the same shares alone; that the row is the same too, or that none was sent, is for the
        caller to see to.

        Args:
            sealed: what peers have sealed for this site, by peer.
            row: 1-D, uint32: the encoded values.

        Raises:
            SecureAggregationError: shares of somebody who is no neighbour, shares that do not open, or too few.
        """
        circle = self._in_circle()
        if self._has_masked:
            raise SecureAggregationError("this site has masked its row already")
        opened = {}
        for peer, box in sealed.items():
            if peer not in circle.neighbours[self.site]:
                raise SecureAggregationError(f"shares of {peer!r}, who is not this site's neighbour")
            way = self._way(peer, self.site)
            key = channel_key(self._channel, circle.adverts[peer].channel, way)
            try:
                both = ChaCha20Poly1305(key).decrypt(_NONCE, box, way)
            except InvalidTag as error:
                raise SecureAggregationError(f"the shares of {peer!r} were changed on the way") from error
            opened[peer] = (both[: shamir.SHARE_BYTES], both[shamir.SHARE_BYTES :])
        if len(opened) + 1 < circle.threshold:
            raise SecureAggregationError(
                f"{len(opened)} peers have handed out shares, {circle.threshold - 1} are needed", retry=True
            )
        before = {peer: shares for peer, shares in self._shares.items() if peer != self.site}
        if before and before != opened:
            raise SecureAggregationError("this site has masked its row with other shares before")
        self._has_masked = True
        self._shares.update(opened)
        self._keep(self.state())
        expander = Expander()
        expander.add(row, own_key(self._seed, self.session.context))
        for peer in opened:
            key = pair_key(self._pair, circle.adverts[peer].pair, pair_context(self.session, self.site, peer))
            expander.add(row, key, sign=pair_sign(self.session, self.site, peer))

    def consent(self, survivors: Sequence[str]) -> bytes:
        """The signature of the list of survivors, which this site binds itself to.

        Raises:
            SecureAggregationError: the list is too short, leaves this site out or names strangers, or another list was
                signed before.
        """
        circle, shown = self._in_circle(), tuple(survivors)
        if self._survivors is not None and self._survivors != shown:
            raise SecureAggregationError(
                "this site was shown another list of survivors before",
                hint="a coordinator that shows different lists could learn a single update; nothing more is answered",
            )
        strangers = [site for site in shown if site not in circle.adverts]
        if strangers or len(set(shown)) != len(shown):
            raise SecureAggregationError(f"the list of survivors names {(strangers or ['somebody twice'])[0]!r}")
        if self.site not in shown:
            raise SecureAggregationError("the list of survivors leaves this site out, whose row has been sent")
        if len(shown) < self.session.needed:
            raise SecureAggregationError(
                f"{len(shown)} survivors, {self.session.needed} are needed: the sum would be of too few", retry=True
            )
        self._survivors = shown
        self._keep(self.state())
        return self._sign(consent_bytes(self.session, shown))

    def reveal(self, signatures: Mapping[str, bytes]) -> Reveal:
        """For each peer one share: of its own mask if it survived, of its pair key if it is lost.

        Args:
            signatures: consents by site.

        Raises:
            SecureAggregationError: no list was consented to, or too few sites have signed this very list.
        """
        circle = self._in_circle()
        if self._survivors is None:
            raise SecureAggregationError("no list of survivors was shown to this site")
        text = consent_bytes(self.session, self._survivors)
        agreed = [s for s in self._survivors if s in signatures and self._verify(s, text, signatures[s])]
        if len(agreed) < self.session.needed:
            raise SecureAggregationError(
                f"{len(agreed)} sites have signed the list of survivors that this site was shown, "
                f"{self.session.needed} are needed",
                hint="sites that were shown different lists do not open anything",
            )
        alive = set(self._survivors)
        held = {peer: shares for peer, shares in self._shares.items() if peer in circle.adverts}
        return Reveal(
            self.site,
            own={peer: own for peer, (own, _) in held.items() if peer in alive},
            pair={peer: pair for peer, (_, pair) in held.items() if peer not in alive},
        )

    def _in_circle(self) -> Circle:
        if self._circle is None:
            raise SecureAggregationError("this site has not handed out shares yet")
        return self._circle

    def _way(self, sender: str, receiver: str) -> bytes:
        return self.session.context + sender.encode() + b"\n" + receiver.encode()

    # --- outliving the process

    def state(self) -> bytes:
        """Everything that this site has decided so far. It is secret."""
        record: dict[str, Any] = {
            "context": self.session.context.hex(),
            "site": self.site,
            "channel": self._channel.private_bytes_raw().hex(),
            "pair": self._pair.private_bytes_raw().hex(),
            "seed": self._seed.hex(),
            "adverts": [
                [a.site, a.channel.hex(), a.pair.hex(), a.commitment.hex(), a.signature.hex()] for a in self._adverts
            ],
            "sealed": {peer: _text(box) for peer, box in self._sealed.items()},
            "shares": {peer: [_text(own), _text(pair)] for peer, (own, pair) in self._shares.items()},
            "survivors": self._survivors,
        }
        return json.dumps(record).encode()

    @classmethod
    def restored(
        cls, state: bytes, session: Session, *, sign: Sign, verify: Verify, keep: Keep = lambda _: None
    ) -> Party:
        """The party that `state` was of, in a new process.

        Raises:
            SecureAggregationError: it is of another session.
        """
        record = json.loads(state)
        if record["context"] != session.context.hex():
            raise SecureAggregationError("what was kept is of another session: begin one with fresh keys", retry=True)
        party = cls(session, record["site"], sign=sign, verify=verify, keep=keep)
        party._channel = X25519PrivateKey.from_private_bytes(bytes.fromhex(record["channel"]))
        party._pair = X25519PrivateKey.from_private_bytes(bytes.fromhex(record["pair"]))
        party._seed = bytes.fromhex(record["seed"])
        party._adverts = [Advert(site, *(bytes.fromhex(p) for p in parts)) for site, *parts in record["adverts"]]
        if party._adverts:
            party._circle = Circle(session, {advert.site: advert for advert in party._adverts})
        party._sealed = {peer: _bytes(box) for peer, box in record["sealed"].items()}
        party._shares = {peer: (_bytes(own), _bytes(pair)) for peer, (own, pair) in record["shares"].items()}
        party._survivors = None if record["survivors"] is None else tuple(record["survivors"])
        return party


def pair_context(session: Session, one: str, other: str) -> bytes:
    """The same for a pair, from either side."""
    first, second = sorted((one, other), key=session.place)
    return session.context + first.encode() + b"\n" + second.encode()


def pair_sign(session: Session, site: str, peer: str) -> int:
    """A pair's mask is added by the one that stands first, and subtracted by the other."""
    return 1 if session.place(site) < session.place(peer) else -1


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)

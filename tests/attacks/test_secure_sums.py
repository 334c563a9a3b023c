"""Attacks on secure sums: a coordinator or sites that do not keep to the protocol learn nothing, and are noticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from commonweight.errors import QuorumError, RecipeError, UpdateRefused
from commonweight.privacy.secure_aggregation import shamir
from commonweight.privacy.secure_aggregation.masks import Expander, own_key, pair_key
from commonweight.privacy.secure_aggregation.messages import Advert, Reveal, SecureAggregationError, Session
from commonweight.privacy.secure_aggregation.party import Party, pair_context, pair_sign
from tests.secure_sums import Sum, names, rows


@pytest.fixture
def sums() -> Sum:
    session = Session("run", 1, 0, names(7))
    return Sum(session, rows(session.sites))


# ---- a coordinator that shows different sites different things


def test_forked_lists_of_survivors_open_nothing(sums: Sum) -> None:
    """Half of the sites are told that the victim survived, half that it is lost: together they would open its row."""
    survivors = sums.up_to_rows()
    victim = survivors[3]
    without = tuple(site for site in survivors if site != victim)
    shown = {site: survivors if index % 2 or site == victim else without for index, site in enumerate(survivors)}
    signatures = {site: sums.parties[site].consent(shown[site]) for site in survivors}
    for site in survivors:
        with pytest.raises(SecureAggregationError, match="have signed the list of survivors that this site was shown"):
            sums.parties[site].reveal(signatures)


def test_a_second_list_is_refused_also_after_a_restart(sums: Sum) -> None:
    survivors = sums.up_to_rows()
    site, other = survivors[0], survivors[:-1]
    first = sums.parties[site].consent(survivors)
    assert sums.parties[site].consent(survivors) == first
    again = Party.restored(
        sums.parties[site].state(),
        sums.session,
        sign=sums.identities.of(site).sign,
        verify=sums.identities.verify,
    )
    for party in (sums.parties[site], again):
        with pytest.raises(SecureAggregationError, match="another list of survivors before"):
            party.consent(other)


def test_no_peer_is_revealed_twice_over(sums: Sum) -> None:
    """Both kinds of share of one peer are never in one answer, and an answer never changes."""
    lost = sums.session.sites[2]
    sums.lost_at = {lost: "share"}
    survivors = sums.up_to_rows()
    signatures = {site: sums.parties[site].consent(survivors) for site in survivors}
    for site in survivors:
        reveal = sums.parties[site].reveal(signatures)
        assert not set(reveal.own) & set(reveal.pair)
        assert set(reveal.pair) == {lost}
        assert sums.parties[site].reveal(signatures) == reveal


def test_signatures_that_are_forged_or_of_another_sum_do_not_count(sums: Sum) -> None:
    survivors = sums.up_to_rows()
    signatures = {site: sums.parties[site].consent(survivors) for site in survivors}
    other = Sum(replace(sums.session, round=2), sums.values, identities=sums.identities)
    elsewhere = {site: other.parties[site] for site in survivors}
    foreign = other.up_to_rows()
    replayed = {site: elsewhere[site].consent(foreign) for site in survivors}
    site = survivors[0]
    few = {s: signatures[s] for s in survivors[: sums.session.needed - 1]}
    for shown in (few, {**few, survivors[-1]: bytes(64)}, {**few, survivors[-1]: replayed[survivors[-1]]}):
        with pytest.raises(SecureAggregationError, match="are needed"):
            sums.parties[site].reveal(shown)


def test_a_list_that_is_too_short_or_names_strangers_is_not_signed(sums: Sum) -> None:
    survivors = sums.up_to_rows()
    site = survivors[0]
    for shown, words in (
        (survivors[: sums.session.needed - 1], "are needed"),
        ((*survivors, "stranger"), "'stranger'"),
        (survivors[1:], "leaves this site out"),
        ((*survivors, survivors[0]), "twice"),
    ):
        with pytest.raises(SecureAggregationError, match=words):
            sums.parties[site].consent(shown)


# ---- a coordinator that swaps keys


@pytest.mark.parametrize("kind", ["channel", "pair", "commitment"])
def test_a_substituted_key_is_refused(sums: Sum, kind: str) -> None:
    adverts = [sums.parties[site].advertise() for site in sums.session.sites]
    mine = X25519PrivateKey.generate().public_key().public_bytes_raw()
    adverts[3] = replace(adverts[3], **{kind: mine})
    with pytest.raises(SecureAggregationError, match="not signed by its identity"):
        sums.parties[sums.session.sites[0]].share(adverts)
    with pytest.raises(UpdateRefused, match="not signed by its identity"):
        sums.collector.advert(adverts[3])


def test_keys_of_another_session_are_refused(sums: Sum) -> None:
    """A replayed advert, whose private keys somebody may have learnt since."""
    old = sums.identities.party(replace(sums.session, attempt=1), sums.session.sites[3]).advertise()
    adverts = [sums.parties[site].advertise() for site in sums.session.sites]
    adverts[3] = old
    with pytest.raises(SecureAggregationError, match="not signed by its identity"):
        sums.parties[sums.session.sites[0]].share(adverts)


def test_one_key_under_two_names_is_refused(sums: Sum) -> None:
    a, b = sums.session.sites[:2]
    first = sums.parties[a].advertise()
    copy = Advert(b, first.channel, X25519PrivateKey.generate().public_key().public_bytes_raw(), first.commitment)
    copy = replace(copy, signature=sums.identities.of(b).sign(copy.signed(sums.session)))
    others = [sums.parties[site].advertise() for site in sums.session.sites[2:]]
    with pytest.raises(SecureAggregationError, match="in use already"):
        sums.parties[a].share([first, copy, *others])


def test_a_site_whose_own_keys_are_not_among_those_shown_goes_no_further(sums: Sum) -> None:
    adverts = [sums.parties[site].advertise() for site in sums.session.sites]
    with pytest.raises(SecureAggregationError, match="own keys are missing"):
        sums.parties[sums.session.sites[0]].share(adverts[1:])


def test_strangers_and_too_few_sites_are_refused(sums: Sum) -> None:
    adverts = [sums.parties[site].advertise() for site in sums.session.sites]
    site = sums.session.sites[0]
    stranger = replace(adverts[1], site="stranger")
    for shown, words in (
        ([*adverts, stranger], "not invited"),
        ([*adverts, adverts[1]], "twice"),
        (adverts[: sums.session.needed - 1], "are needed"),
    ):
        with pytest.raises(SecureAggregationError, match=words):
            sums.parties[site].share(shown)


@pytest.mark.parametrize("n", [1, 2])
def test_a_sum_of_one_or_two_is_refused(n: int) -> None:
    with pytest.raises(RecipeError, match="fewer than 3"):
        Session("run", 1, 0, names(n))


# ---- shares that are changed, moved or collected


def test_shares_changed_or_sent_to_another_are_noticed(sums: Sum) -> None:
    for site in sums.session.sites:
        sums.collector.advert(sums.parties[site].advertise())
    adverts = sums.collector.close_adverts()
    sealed = {site: sums.parties[site].share(adverts) for site in sums.session.sites}
    a, b, c = sums.session.sites[:3]
    inbox = {site: sealed[site][a] for site in sums.session.sites if site != a}
    flipped = bytes([inbox[b][0] ^ 1]) + inbox[b][1:]
    for bad in ({**inbox, b: flipped}, {**inbox, b: sealed[b][c]}, {**inbox, b: inbox[c]}):
        row = sums.values[a].copy()
        with pytest.raises(SecureAggregationError, match="changed on the way"):
            sums.parties[a].mask(bad, row)
        assert (row == sums.values[a]).all()
    with pytest.raises(SecureAggregationError, match="neighbour"):
        sums.parties[a].mask({**inbox, "stranger": inbox[b]}, sums.values[a].copy())
    with pytest.raises(SecureAggregationError, match="are needed"):
        sums.parties[a].mask({b: inbox[b]}, sums.values[a].copy())


def test_colluders_below_the_threshold_cannot_open_a_row(sums: Sum) -> None:
    """t − 1 sites and the coordinator put together all that they hold of a victim: its masks stay on."""
    survivors = sums.up_to_rows()
    victim, session = survivors[0], sums.session
    threshold = session.needed
    colluders = survivors[1:threshold]  # t − 1 of them
    circle = sums.parties[victim]._circle
    assert circle is not None
    assert circle.threshold == threshold
    held = {s: sums.parties[s]._shares[victim] for s in colluders}
    for kind in (0, 1):
        shares = {session.place(s): both[kind] for s, both in held.items()}
        with pytest.raises(ValueError, match="are needed"):
            shamir.combine(shares, threshold)
        # nor does leaving the threshold out of the computation help: a polynomial too low gives something else
        guess = shamir.combine(shares, threshold - 1)
        true = sums.parties[victim]._seed if kind == 0 else sums.parties[victim]._pair.private_bytes_raw()
        assert guess != true


def test_a_row_with_all_pair_masks_taken_off_is_still_masked(sums: Sum) -> None:
    """Everyone but the victim colludes on the pair masks: its own mask, which needs t shares, still hides it."""
    survivors = sums.up_to_rows()
    victim, session, values = survivors[0], sums.session, sums.values
    party = sums.parties[victim]
    assert party._circle is not None
    row, expander = values[victim].copy(), Expander()
    expander.add(row, own_key(party._seed, session.context))
    for peer in party._circle.neighbours[victim]:
        key = pair_key(party._pair, party._circle.adverts[peer].pair, pair_context(session, victim, peer))
        expander.add(row, key, sign=pair_sign(session, victim, peer))
    for peer in party._circle.neighbours[victim]:
        theirs = sums.parties[peer]
        key = pair_key(theirs._pair, party._circle.adverts[victim].pair, pair_context(session, peer, victim))
        expander.add(row, key, sign=-pair_sign(session, victim, peer))
    assert (row != values[victim]).mean() > 0.9
    expander.add(row, own_key(party._seed, session.context), sign=-1)
    assert (row == values[victim]).all()


def test_wrong_shares_are_noticed_when_the_secret_is_put_together(sums: Sum) -> None:
    for kind in ("own", "pair"):
        lying = Sum(replace(sums.session, round=3 if kind == "own" else 4), sums.values)
        lost = lying.session.sites[-1]
        lying.lost_at = {lost: "share"}
        survivors = lying.up_to_rows()
        for site in survivors:
            lying.collector.consent(site, lying.parties[site].consent(survivors))
        consents = lying.collector.close_consents()
        for site in survivors:
            reveal = lying.parties[site].reveal(consents)
            if site == survivors[0]:
                shares = dict(getattr(reveal, kind))
                of = next(iter(shares))
                shares[of] = bytes(shamir.SHARE_BYTES)
                reveal = replace(reveal, **{kind: shares})
            lying.collector.reveal(reveal)
        with pytest.raises(QuorumError, match="wrong share") as caught:
            lying.collector.open(lying.total)
        assert caught.value.retry


def test_reveals_that_nobody_asked_for_are_refused(sums: Sum) -> None:
    lost = sums.session.sites[-1]
    sums.lost_at = {lost: "share"}
    survivors = sums.up_to_rows()
    for site in survivors:
        sums.collector.consent(site, sums.parties[site].consent(survivors))
    good = sums.parties[survivors[0]].reveal(sums.collector.close_consents())
    share = bytes(shamir.SHARE_BYTES)
    for bad in (
        replace(good, own={**good.own, lost: share}),
        replace(good, pair={survivors[1]: share}),
        replace(good, own={survivors[1]: b"short"}),
        Reveal("stranger", {}, {}),
        Reveal(lost, {}, {}),
    ):
        with pytest.raises(UpdateRefused):
            sums.collector.reveal(bad)


def test_the_coordinator_does_not_see_a_row_in_what_it_gets(sums: Sum) -> None:
    """Correlation of a masked row with the row itself: that of two random rows."""
    session = Session("run", 9, 0, names(3))
    length = 100_000
    values = {site: np.full(length, index, dtype=np.uint32) for index, site in enumerate(session.sites)}
    values[session.sites[0]] = np.tile(np.asarray([0, 2**31], dtype=np.uint32), length // 2)
    plain = Sum(session, values)
    for site in session.sites:
        plain.collector.advert(plain.parties[site].advertise())
    adverts = plain.collector.close_adverts()
    for site in session.sites:
        plain.collector.shares(site, plain.parties[site].share(adverts))
    boxes = plain.collector.close_shares()
    victim = session.sites[0]
    row = values[victim].copy()
    plain.parties[victim].mask(boxes[victim], row)
    seen = row.astype(np.float64)
    correlation = np.corrcoef(seen, values[victim].astype(np.float64))[0, 1]
    assert abs(correlation) < 5 / np.sqrt(length)

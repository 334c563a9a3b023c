"""Secure sums: the algebra of shares, masks, fixed point and graphs, and whole sums with sites lost at every step."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from commonweight.errors import QuorumError, RecipeError, UpdateRefused
from commonweight.privacy.secure_aggregation import shamir
from commonweight.privacy.secure_aggregation.fixed_point import FixedPoint
from commonweight.privacy.secure_aggregation.graph import degree, majority, neighbours
from commonweight.privacy.secure_aggregation.masks import Expander, own_key, pair_key
from commonweight.privacy.secure_aggregation.messages import SecureAggregationError, Session
from commonweight.privacy.secure_aggregation.party import Party
from tests.secure_sums import Sum, names, rows

# ---- shares


@settings(deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), threshold=st.integers(1, 6), spare=st.integers(0, 3))
def test_any_threshold_of_shares_give_the_secret(secret: bytes, threshold: int, spare: int) -> None:
    places = [3 * k + 1 for k in range(threshold + spare)]
    shares = shamir.split(secret, threshold, places)
    assert shamir.combine(shares, threshold) == secret
    last = dict(sorted(shares.items())[-threshold:])
    assert shamir.combine(last, threshold) == secret
    with pytest.raises(ValueError, match="are needed"):
        shamir.combine(dict(list(shares.items())[: threshold - 1]), threshold)


def test_shares_lie_on_a_polynomial_through_the_secret() -> None:
    """Independently: the values at 1, 2, 3 of a parabola, and Neville's scheme at 0."""
    secret = bytes(range(32))
    shares = {x: int.from_bytes(s, "big") for x, s in shamir.split(secret, 3, [1, 2, 3, 4]).items()}
    p = shamir.PRIME
    at_zero = (3 * shares[1] - 3 * shares[2] + shares[3]) % p
    assert at_zero == int.from_bytes(secret, "big")
    assert (shares[4] - 3 * shares[3] + 3 * shares[2] - shares[1]) % p == 0


def test_one_share_fewer_says_nothing() -> None:
    """For every secret there is a polynomial through t − 1 given shares: each is equally likely."""
    shares = shamir.split(b"\x07" * 32, 3, [1, 2, 3])
    held = {x: int.from_bytes(shares[x], "big") for x in (1, 2)}
    for guess in (0, 1, 2**255):
        # the parabola through (0, guess) and both shares; its value at 3 is the share that would prove the guess
        third = (guess - 3 * held[1] + 3 * held[2]) % shamir.PRIME
        forged = {**{x: shares[x] for x in (1, 2)}, 3: third.to_bytes(33, "big")}
        assert int.from_bytes(shamir.combine(forged, 3), "big") == guess


def test_the_field_is_a_prime_above_every_secret() -> None:
    p = shamir.PRIME
    assert p > 2**256
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):  # Miller and Rabin
        odd, twos = p - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        x = pow(base, odd, p)
        assert x in (1, p - 1) or any(pow(x, 2**k, p) == p - 1 for k in range(twos))


@pytest.mark.parametrize(
    ("secret", "threshold", "places"),
    [(b"short", 1, [1]), (bytes(32), 3, [1, 2]), (bytes(32), 1, [0, 1]), (bytes(32), 1, [1, 1])],
)
def test_shares_that_cannot_be_are_refused(secret: bytes, threshold: int, places: list[int]) -> None:
    with pytest.raises(ValueError, match=r"bytes|threshold|places"):
        shamir.split(secret, threshold, places)


def test_shares_that_do_not_belong_together_are_noticed_or_give_another_secret() -> None:
    one, other = shamir.split(bytes(32), 2, [1, 2]), shamir.split(b"\xff" * 32, 2, [1, 2])
    with suppress(ValueError):
        assert shamir.combine({1: one[1], 2: other[2]}, 2) not in (bytes(32), b"\xff" * 32)


# ---- masks


def test_a_mask_is_aes_in_counter_mode_over_pieces_of_any_length() -> None:
    key = bytes(range(16))
    for length in (1, 5, (1 << 18) - 1, (1 << 18), (1 << 18) + 3):
        row = np.zeros(length, dtype=np.uint32)
        Expander().add(row, key)
        plain = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * length))
        assert row.tobytes() == plain
        Expander().add(row, key, sign=-1)
        assert not row.any()


def test_both_sides_of_a_pair_have_the_same_key_and_each_pair_and_session_another() -> None:
    one, two, three = (X25519PrivateKey.generate() for _ in range(3))
    public = {k: k.public_key().public_bytes_raw() for k in (one, two, three)}
    assert pair_key(one, public[two], b"c") == pair_key(two, public[one], b"c")
    keys = [pair_key(one, public[two], b"c"), pair_key(one, public[three], b"c"), pair_key(one, public[two], b"d")]
    keys.append(own_key(bytes(32), b"c"))
    assert len(set(keys)) == 4


def test_a_masked_row_is_uniform_whatever_is_in_it() -> None:
    """Chi-square over 256 values of each of a word's four bytes; 330 is exceeded once in a thousand."""
    session = Session("run", 1, 0, names(3))
    sums = Sum(session, {site: np.zeros(40_000, dtype=np.uint32) for site in session.sites})
    adverts = []
    for party in sums.parties.values():
        sums.collector.advert(party.advertise())
    adverts = sums.collector.close_adverts()
    for site, party in sums.parties.items():
        sums.collector.shares(site, party.share(adverts))
    boxes = sums.collector.close_shares()
    row = sums.values["site-000"].copy()
    sums.parties["site-000"].mask(boxes["site-000"], row)
    for byte in row.view(np.uint8).reshape(-1, 4).T:
        counts = np.bincount(byte, minlength=256)
        expected = len(byte) / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < 400


# ---- fixed point


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-3, 3), min_size=1, max_size=40),
    num_sites=st.integers(1, 400),
)
def test_encoding_is_within_half_a_step_and_clips(values: list[float], num_sites: int) -> None:
    fixed = FixedPoint(2.0, num_sites)
    out = np.empty(len(values), dtype=np.uint32)
    clipped = fixed.encode(np.asarray(values), out)
    inside = np.clip(values, -2.0, 2.0)
    assert np.abs(fixed.decode(out) - inside).max() <= fixed.step / 2 * (1 + 1e-9)
    assert clipped == int((np.abs(np.asarray(values) / fixed.step) > fixed.levels).sum())


def test_the_largest_sum_does_not_wrap() -> None:
    for n in (1, 3, 50, 1000, 16_777_215):
        fixed = FixedPoint(1.0, n)
        for sign in (1.0, -1.0):
            out = np.empty(1, dtype=np.uint32)
            fixed.encode(np.asarray([sign * 1e30]), out)
            total = (out.astype(np.uint64) * n % 2**32).astype(np.uint32)
            assert fixed.decode(total)[0] == pytest.approx(sign * n, rel=1e-9)


def test_a_sum_in_the_ring_is_the_sum_of_the_numbers() -> None:
    draw = np.random.default_rng(1)
    fixed, parts = FixedPoint(0.5, 7), draw.uniform(-0.5, 0.5, (7, 1000)).astype(np.float32)
    total, row = np.zeros(1000, dtype=np.uint32), np.empty(1000, dtype=np.uint32)
    for part in parts:
        fixed.encode(part, row)
        total += row
    exact = parts.astype(np.float64).sum(0)
    assert np.abs(fixed.decode(total) - exact).max() <= 7 * fixed.step / 2


@pytest.mark.parametrize(
    ("bound", "num_sites"), [(0, 3), (-1, 3), (float("inf"), 3), (float("nan"), 3), (1, 0), (1, 1 << 25)]
)
def test_an_encoding_that_cannot_be_is_refused(bound: float, num_sites: int) -> None:
    with pytest.raises(RecipeError):
        FixedPoint(bound, num_sites)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        FixedPoint(1.0, 3).encode(np.asarray([0.0, np.nan]), np.empty(2, dtype=np.uint32))


# ---- graphs


def test_small_cohorts_have_the_full_graph_and_two_thirds() -> None:
    for n in range(3, 51):
        found = degree(n)
        assert (found.neighbours, found.threshold) == (n - 1, 2 * n // 3 + 1)
        assert 3 * found.threshold > 2 * n
    for n in (0, 1, 2):
        with pytest.raises(RecipeError, match="fewer than 3"):
            degree(n)


@pytest.mark.parametrize("n", [51, 100, 200, 1000])
def test_the_degree_of_a_large_cohort_holds_its_bounds(n: int) -> None:
    """By scipy-free, independent sums over Fractions."""
    found = degree(n, corrupt=0.1, lost=0.3)
    k, t = found.neighbours, found.threshold
    if k == n - 1:
        return
    corrupt, lost = math.floor(0.1 * n), math.ceil(0.3 * n)

    def at_least(marked: int, least: int) -> float:
        total = math.comb(n - 1, k)
        return sum(math.comb(marked, h) * math.comb(n - 1 - marked, k - h) for h in range(least, k + 1)) / total

    assert n * at_least(corrupt, t) <= 2.0**-40
    assert n * at_least(lost, k - t + 1) <= 2.0**-20
    assert found.neighbours < n - 1


def test_a_circle_is_symmetric_regular_connected_and_the_same_everywhere() -> None:
    sites = names(120)
    found = neighbours(sites, 10, b"seed")
    assert Counter(len(near) for near in found.values()) == {10: 120}
    assert all(site in found[other] for site in sites for other in found[site])
    reached, edge = {sites[0]}, {sites[0]}
    while edge:
        edge = {other for site in edge for other in found[site]} - reached
        reached |= edge
    assert reached == set(sites)
    assert found == neighbours(sites, 10, b"seed") != neighbours(sites, 10, b"another")


def test_a_majority_overlaps_with_every_other_in_more_than_a_third() -> None:
    assert all(2 * majority(n) - n > n / 3 - 1e-9 for n in range(3, 400))


# ---- whole sums


@pytest.mark.parametrize("n", [3, 4, 10, 60])
def test_the_sum_is_exact(n: int) -> None:
    session = Session("run", 1, 0, names(n))
    sums = Sum(session, rows(session.sites))
    total, survivors = sums.run()
    assert survivors == session.sites
    assert (total == sums.plain(session.sites)).all()


@pytest.mark.parametrize("step", ["nothing", "advertise", "share", "mask", "consent"])
@pytest.mark.parametrize("n", [10, 60])
def test_sites_lost_at_any_step_leave_an_exact_sum_of_the_others(n: int, step: str) -> None:
    session = Session("run", 1, 0, names(n))
    lost = dict.fromkeys(session.sites[1::5], step)
    sums = Sum(session, rows(session.sites), lost)
    total, survivors = sums.run()
    there = [site for site in session.sites if step in ("mask", "consent") or site not in lost]
    assert list(survivors) == there
    assert (total == sums.plain(there)).all()


def test_sites_lost_at_all_steps_at_once() -> None:
    session = Session("run", 1, 0, names(20))
    steps = ("nothing", "advertise", "share", "mask", "consent")
    sums = Sum(session, rows(session.sites), dict(zip(session.sites[::4], steps, strict=True)))
    total, survivors = sums.run()
    assert (total == sums.plain(survivors)).all()
    assert len(survivors) == 17


@pytest.mark.parametrize("step", ["nothing", "advertise", "share", "mask", "consent"])
def test_too_few_sites_open_nothing(step: str) -> None:
    session = Session("run", 1, 0, names(9))
    sums = Sum(session, rows(session.sites), dict.fromkeys(session.sites[:3], step))
    with pytest.raises(QuorumError, match=r"are needed|were revealed") as caught:
        sums.run()
    assert caught.value.retry


def test_the_weight_travels_as_one_more_element() -> None:
    """Weighted means: Σ wᵢxᵢ and Σ wᵢ out of one sum."""
    draw, sites = np.random.default_rng(3), names(5)
    weights, values = draw.integers(1, 100, 5), draw.uniform(-1, 1, (5, 30))
    fixed = FixedPoint(100.0, 5)
    encoded = {}
    for site, weight, value in zip(sites, weights, values, strict=True):
        encoded[site] = np.empty(31, dtype=np.uint32)
        fixed.encode(np.append(weight * value, weight), encoded[site])
    total, survivors = Sum(Session("run", 1, 0, sites), encoded, {sites[2]: "share"}).run()
    found = fixed.decode(total)
    there = [sites.index(site) for site in survivors]
    exact = (weights[there, None] * values[there]).sum(0) / weights[there].sum()
    assert np.abs(found[:-1] / found[-1] - exact).max() < 1e-6


# ---- order and repetition


def test_a_party_goes_on_in_a_new_process_from_every_step() -> None:
    session = Session("run", 2, 0, names(4))
    sums = Sum(session, rows(session.sites))

    def restart() -> None:
        for site, party in sums.parties.items():
            sums.parties[site] = Party.restored(
                party.state(), session, sign=sums.identities.of(site).sign, verify=sums.identities.verify
            )

    for site in session.sites:
        sums.collector.advert(sums.parties[site].advertise())
    restart()
    adverts = sums.collector.close_adverts()
    for site in session.sites:
        sums.collector.shares(site, sums.parties[site].share(adverts))
    restart()
    for site, boxes in sums.collector.close_shares().items():
        row = sums.values[site].copy()
        sums.parties[site].mask(boxes, row)
        sums.collector.row(site, row, sums.total)
    restart()
    survivors = sums.collector.close_rows()
    for site in survivors:
        sums.collector.consent(site, sums.parties[site].consent(survivors))
    restart()
    consents = sums.collector.close_consents()
    first = sums.parties[survivors[0]].reveal(consents)
    restart()
    assert sums.parties[survivors[0]].reveal(consents) == first
    for site in survivors:
        sums.collector.reveal(sums.parties[site].reveal(consents))
    sums.collector.open(sums.total)
    assert (sums.total == sums.plain(survivors)).all()


def test_what_is_kept_is_kept_before_it_is_said() -> None:
    session, kept = Session("run", 1, 0, names(3)), []
    sums = Sum(session, rows(session.sites))
    site = session.sites[0]
    sums.parties[site] = Party(
        session, site, sign=sums.identities.of(site).sign, verify=sums.identities.verify, keep=kept.append
    )
    sums.run()
    assert len(kept) == 4
    assert kept[-1] == sums.parties[site].state()


def test_a_state_of_another_session_is_refused() -> None:
    one, other = Session("run", 1, 0, names(3)), Session("run", 1, 1, names(3))
    sums = Sum(one, rows(one.sites))
    state = sums.parties["site-000"].state()
    with pytest.raises(SecureAggregationError, match="another session"):
        Party.restored(state, other, sign=sums.identities.of("site-000").sign, verify=sums.identities.verify)


def test_a_retry_has_fresh_keys_and_another_context() -> None:
    contexts = {Session("run", r, a, names(3), bytes([c])).context for r in (1, 2) for a in (0, 1) for c in (0, 1)}
    assert len(contexts) == 8


def test_messages_out_of_their_order_are_refused() -> None:
    session = Session("run", 1, 0, names(4))
    sums = Sum(session, rows(session.sites))
    collector, (a, b, c, d) = sums.collector, session.sites
    with pytest.raises(UpdateRefused, match="handed round"):
        collector.shares(a, {})
    adverts = {site: sums.parties[site].advertise() for site in session.sites}
    with pytest.raises(SecureAggregationError, match="not handed out"):
        sums.parties[a].mask({}, sums.values[a])
    for site in (a, b, c):
        collector.advert(adverts[site])
    with pytest.raises(UpdateRefused, match="before"):
        collector.advert(adverts[a])
    shown = collector.close_adverts()
    with pytest.raises(UpdateRefused, match="handed round"):
        collector.advert(adverts[d])
    sealed = {site: sums.parties[site].share(shown) for site in (a, b, c)}
    with pytest.raises(SecureAggregationError, match="already"):
        sums.parties[a].share(shown)
    with pytest.raises(UpdateRefused, match="neighbours"):
        collector.shares(a, {b: sealed[a][b]})
    for site in (a, b, c):
        collector.shares(site, sealed[site])
    boxes = collector.close_shares()
    with pytest.raises(UpdateRefused, match="not awaited"):
        collector.row(d, sums.values[d], sums.total)
    with pytest.raises(UpdateRefused, match="elements"):
        collector.row(a, sums.values[a][:3], sums.total)
    for site in (a, b, c):
        row = sums.values[site].copy()
        sums.parties[site].mask(boxes[site], row)
        collector.row(site, row, sums.total)
        with pytest.raises(UpdateRefused, match="not awaited"):
            collector.row(site, row, sums.total)
        with pytest.raises(SecureAggregationError, match="already"):
            sums.parties[site].mask(boxes[site], row)
    survivors = collector.close_rows()
    with pytest.raises(SecureAggregationError, match="no list"):
        sums.parties[a].reveal({})
    with pytest.raises(UpdateRefused, match="did not sign"):
        collector.consent(a, bytes(64))
    for site in survivors:
        collector.consent(site, sums.parties[site].consent(survivors))
    reveals = [sums.parties[site].reveal(collector.close_consents()) for site in survivors]
    collector.reveal(reveals[0])
    with pytest.raises(UpdateRefused, match="not awaited"):
        collector.reveal(reveals[0])
    assert not collector.can_open()
    for reveal in reveals[1:]:
        collector.reveal(reveal)
    assert collector.can_open()
    collector.open(sums.total)
    assert (sums.total == sums.plain(survivors)).all()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(3, 12),
    data=st.data(),
)
def test_whatever_is_lost_the_sum_is_of_the_survivors_or_nothing_is_opened(n: int, data: st.DataObject) -> None:
    session = Session("run", 1, 0, names(n))
    steps = ("nothing", "advertise", "share", "mask", "consent", "reveal")
    lost = {site: data.draw(st.sampled_from(steps), label=site) for site in session.sites}
    sums = Sum(session, rows(session.sites, 8), lost)
    with suppress(QuorumError, SecureAggregationError):
        total, survivors = sums.run()
        assert (total == sums.plain(survivors)).all()
        assert len(survivors) >= majority(n)


def test_shares_add_up_for_every_choice_of_holders() -> None:
    shares = shamir.split(b"\x01" * 32, 3, [1, 2, 3, 4, 5])
    for chosen in itertools.combinations(shares, 3):
        assert shamir.combine({x: shares[x] for x in chosen}, 3) == b"\x01" * 32

"""Sites are killed in every phase of a round, and come back or do not."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from commonweight.site.records import SiteRecords

from .conftest import Measured
from .nursery import Death
from .world import World

#: phase of a round, where it is cut, and whether the site trains again afterwards
_PHASES = [
    ("the job is there", Death("site.gate:Gate.admit", "after", 1), False),
    ("joined", Death("site.gate:Gate.joined", "after", 1), False),
    ("the task is taken", Death("site.gate:Gate.take", "after", 3), False),
    ("the fetch begins", Death("site.inbox:Inbox.begin", "after", 1), False),
    ("chunks have come", Death("site.inbox:Arrival.keep", "after", 5), False),
    ("the fetch ends", Death("site.inbox:Inbox.finish", "after", 2), False),
    ("training begins", Death("benchmarks.federation:NoiseWorkshop.train", "before", 2), False),
    ("trained", Death("benchmarks.federation:NoiseWorkshop.train", "after", 2), True),
    ("the update is being kept", Death("site.outbox:write_frame", "after", 2), True),
    ("the update is kept", Death("site.outbox:Outbox.keep", "after", 2), False),
    ("bytes are about to be counted", Death("site.records:SiteRecords.spend", "before", 3), False),
    ("bytes were counted", Death("site.records:SiteRecords.spend", "after", 3), False),
    ("chunks have left", Death("site.outbox:pack_chunk", "after", 12), False),
    ("accepted, before it is written down", Death("site.gate:Gate.end", "before", 3), False),
    ("accepted, and written down", Death("site.gate:Gate.end", "after", 3), False),
    ("accepted, and forgotten", Death("site.outbox:Outbox.delete", "after", 2), False),
]


@pytest.mark.parametrize(("phase", "death", "again"), _PHASES, ids=[phase for phase, _, _ in _PHASES])
def test_a_site_that_comes_back_is_counted(
    phase: str, death: Death, again: bool, make_world: Callable[..., World]
) -> None:
    world = make_world(keep_after_s=0.0)
    world.begin()
    sites = world.site_names(2)
    dying = world.begin_site(sites[0], death)
    world.begin_site(sites[1])
    run = world.start_run(sites)
    world.finish(run, tend=world.revive_all)
    assert dying.wait() == -9, f"it was not killed when {phase}"
    world.check(run, everyone=sites)
    assert world.trained(sites[1]) == [1, 2, 3]
    assert world.trained(sites[0]) == ([1, 2, 2, 3] if again else [1, 2, 3])
    records = SiteRecords(world.folder / "sites" / sites[0] / "state.sqlite")
    size = world.theta.layout.num_bytes
    left = {sent.round: sent.bytes for sent in records.sent(run) if sent.what == "update"}
    assert all(left[number] >= size for number in (1, 2, 3)), "more has left than was counted"
    records.close()


@pytest.mark.parametrize("accepted", [False, True], ids=["before it was accepted", "after"])
def test_a_site_that_stays_away_is_done_without(
    accepted: bool, make_world: Callable[..., World], measured: Measured
) -> None:
    world = make_world(heartbeat_s=2.0)
    world.begin()
    sites = world.site_names(3)
    # joining, the evaluation of what the run begins from, and round 1 come first
    place = Death("site.gate:Gate.end", nth=4) if accepted else Death("site.records:SiteRecords.spend", nth=4)
    dying = world.begin_site(sites[0], place)
    for site in sites[1:]:
        world.begin_site(site)
    run = world.start_run(sites, rounds=4, patience_s=2.0)
    dying.wait()
    died = time.time()
    away = world.event(run, "site_away", site=sites[0])
    measured("site killed: until the run says that it is away", away["t"] - died, 10)
    world.finish(run)
    world.check(run, rounds=4)
    answered = {n: record["answered"] for n, record in world.store.commits(run).items() if n}
    assert [sites[0] in answered[n] for n in (1, 2, 3, 4)] == [True, accepted, False, False]
    assert all(set(sites[1:]) <= set(answered[n]) for n in answered)


def test_a_site_that_falls_silent_is_done_without(make_world: Callable[..., World], measured: Measured) -> None:
    """Stopped, not killed: nothing closes its connections, and its kernel still acknowledges what is sent."""
    world = make_world(heartbeat_s=2.0, seconds=1.0)
    sites = world.begin_all()
    run = world.start_run(sites, rounds=3, patience_s=2.0)
    world.training(sites[0], 2)
    world.site_of[sites[0]].stop()
    silent = time.time()
    away = world.event(run, "site_away", site=sites[0])
    measured("site silent: until the run says that it is away", away["t"] - silent, 10)
    committed = world.event(run, "round_committed", round=2)
    measured("site silent: until its round is committed without it", committed["t"] - silent, 14)
    world.site_of[sites[0]].go_on()  # what it sends now comes too late, or for the last round in time
    world.finish(run)
    world.check(run)
    assert sites[0] not in world.store.commits(run)[2]["answered"]
    assert [world.trained(site) for site in sites[1:]] == [[1, 2, 3]] * 2


_BOTH = [
    ("coordinator.store:Store.accept_upload", "after", 4, "site.gate:Gate.end", "before", 3),
    ("coordinator.store:Store.commit", "before", 3, "benchmarks.federation:NoiseWorkshop.train", "before", 3),
    ("coordinator.store:Store.commit", "after", 3, "site.inbox:Arrival.keep", "after", 12),
    ("coordinator.receive:SealedFile.write", "after", 20, "site.outbox:Outbox.keep", "after", 2),
    ("coordinator.store:Store.open_round", "after", 2, "site.gate:Gate.take", "after", 3),
    ("coordinator.store:Store.put_member", "after", 1, "site.gate:Gate.joined", "before", 1),
]


@pytest.mark.parametrize("deaths", _BOTH, ids=lambda d: f"{d[0].rpartition('.')[2]} and {d[3].rpartition('.')[2]}")
def test_coordinator_and_sites_killed_in_one_round(
    deaths: tuple[str, str, int, str, str, int], make_world: Callable[..., World]
) -> None:
    world = make_world(keep_after_s=0.0)
    dying = [world.begin(Death(*deaths[:3]))]
    sites = world.site_names(3)
    dying += [world.begin_site(site, Death(*deaths[3:])) for site in sites[:2]]
    world.begin_site(sites[2])
    run = world.submit_through(world.propose(sites))
    world.finish(run, tend=world.revive_all)
    assert [process.wait() for process in dying] == [-9] * 3
    world.check(run, everyone=sites)
    assert [world.trained(site) for site in sites] == [[1, 2, 3]] * 3

"""Downloads made small, while coordinator or sites are killed: what sites hold is what it is in an undisturbed run, to
the bit, and no site starts from anything else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .nursery import Death
from .world import World

_CODED = {"down": {"shorten": {"name": "top-k", "keep": 0.3}, "round": "int8"}}
_ROUNDS = 4

_COORDINATOR = [
    Death("coordinator.stored_down:StoredDown.follow", "before", 2),
    Death("coordinator.stored_down:Down.step", "after", 1),
    Death("coordinator.stored_down:StoredDown.follow", "after", 2),  # four frames are written, none committed
    Death("coordinator.store:Store.commit", "after", 3),  # committed, older differences not deleted
    Death("coordinator.catch_ups:CatchUps.frames", "before", 2),
    Death("coordinator.catch_ups:CatchUps.frames", "after", 3),
]
_SITE = [
    Death("site.inbox:Inbox.latest", "after", 2),
    Death("site.inbox:Inbox.move_on", "before", 1),  # the difference is here
    Death("site.catch_up:_add", "after", 2),  # added in a copy
    Death("site.inbox:Inbox._made", "after", 1),
    Death("site.inbox:Inbox.move_on", "after", 2),
]


@pytest.mark.parametrize("death", _COORDINATOR, ids=str)
def test_the_coordinator_dies(death: Death, make_world: Callable[..., World]) -> None:
    world = make_world()
    sites = world.begin_all(deaths=[death])
    dying = world.main
    run = world.submit_through(world.propose(sites, rounds=_ROUNDS, compression=_CODED))
    world.finish(run)
    assert dying.poll() is not None
    world.check(run, rounds=_ROUNDS, everyone=sites)


@pytest.mark.parametrize("death", _SITE, ids=str)
def test_a_site_dies(death: Death, make_world: Callable[..., World]) -> None:
    world = make_world()
    world.begin()
    sites = world.site_names(2)
    dying = world.begin_site(sites[0], death)
    world.begin_site(sites[1])
    run = world.start_run(sites, rounds=_ROUNDS, compression=_CODED)
    world.finish(run, tend=world.revive_all)
    assert dying.poll() is not None
    world.check(run, rounds=_ROUNDS, everyone=sites)
    world.site_event(sites[0], "caught_up")


def test_a_site_that_was_away_catches_up(make_world: Callable[..., World]) -> None:
    """It misses two rounds, and is sent their differences in a chain."""
    world = make_world(seconds=0.5)
    sites = world.begin_all(3)
    run = world.start_run(sites, rounds=6, compression=_CODED, patience_s=1.0, min_sites=2, quorum=0.5)
    away = world.site_of[sites[2]]
    world.event(run, "round_committed", round=1)
    away.kill()
    away.wait()
    world.event(run, "round_committed", round=3)
    world.begin_site(sites[2])
    world.finish(run)
    world.check(run, rounds=6)
    chains = [event["differences"] for event in world.site_events(sites[2]) if event["event"] == "caught_up"]
    assert max(chains) > 1

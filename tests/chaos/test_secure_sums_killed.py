"""The coordinator or a site is killed within a secure round, and started again: the run has the bits of an undisturbed
one, whoever died when."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from .nursery import Death
from .world import World

SECURE = {"secure_aggregation": "on"}
_COORDINATOR = {
    "before training": [
        Death("coordinator.secure_sums:Collector.close_adverts", "before"),
        Death("coordinator.store:Store.put_result", "after", 3),  # who was taken into a step
        Death("coordinator.secure_sums:Collector.close_shares", "after"),
        Death("coordinator.store:Store.accept_upload", "after", 2),
    ],
    "after training": [
        Death("coordinator.secure_sums:Collector.close_rows", "before"),
        Death("coordinator.secure_sums:Collector.close_consents", "after"),
        Death("coordinator.masked_updates:MaskedUpdates.into", "after"),
        Death("coordinator.store:Store.commit", "after", 2),
    ],
}
_SITE = [
    Death("site.records:SiteRecords.keep_sum", "after", 1),  # its keys, of which nobody has heard
    Death("site.records:SiteRecords.keep_sum", "after", 3),  # its masks; the row is not made
    Death("site.records:SiteRecords.send_row", "after"),
    Death("site.records:SiteRecords.open_sum", "after"),
]


def undisturbed(world: World, sites: Sequence[str]) -> list[object]:
    run = world.start_run(sites, rounds=1, privacy=SECURE)
    world.finish(run)
    return states(world, run)


def states(world: World, run: str) -> list[object]:
    """What every round has made of the model, and who was in it."""
    return [(record["state"], record.get("answered")) for _, record in sorted(world.store.commits(run).items())]


@pytest.mark.parametrize("when", list(_COORDINATOR))
def test_a_coordinator_that_is_killed_within_a_secure_round(when: str, make_world: Callable[..., World]) -> None:
    world = make_world()
    sites = world.begin_all(3)
    expected = undisturbed(world, sites)
    for death in _COORDINATOR[when]:
        world.main.kill()
        world.main.wait()
        dying = world.begin(death)
        run = world.submit_through(world.propose(sites, rounds=1, privacy=SECURE))
        world.finish(run)
        assert dying.poll() is not None, f"it did not die {death}"
        assert states(world, run) == expected, str(death)
        world.check_tidy(run)


def test_a_site_that_is_killed_within_a_secure_round(make_world: Callable[..., World]) -> None:
    world = make_world()
    sites = world.begin_all(3)
    expected = undisturbed(world, sites)
    for death in _SITE:
        world.site_of[sites[0]].kill()
        world.site_of[sites[0]].wait()
        dying = world.begin_site(sites[0], death)
        run = world.start_run(sites, rounds=1, privacy=SECURE)
        world.finish(run, tend=world.revive_all)
        assert dying.poll() is not None, f"it did not die {death}"
        assert states(world, run) == expected, str(death)

"""The coordinator or its database is away for a while, in the middle of a round."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.postgres import Cluster, postgres, postgres_url  # noqa: F401  (fixtures)

from .conftest import Measured
from .nursery import Death
from .world import World

#: in a transaction whose commit the database does not live to see: a round's, and an update's
_MIDST = ["coordinator.journal:spend", "coordinator.uploads:append"]


@pytest.mark.parametrize("place", _MIDST, ids=lambda place: place.partition(":")[2])
def test_the_database_crashes_in_a_transaction(
    place: str,
    postgres: Cluster,  # noqa: F811
    postgres_url: str,  # noqa: F811
    make_world: Callable[..., World],
) -> None:
    world = make_world(database=postgres_url)
    coordinator = world.begin(Death(place, "after", 3, signal.SIGSTOP))
    sites = world.site_names(3)
    for site in sites:
        world.begin_site(site)
    run = world.start_run(sites)
    coordinator.wait_until_stopped()
    postgres.stop(signal.SIGQUIT)
    postgres.start()
    coordinator.go_on()
    world.finish(run)
    assert coordinator.poll() is None
    world.check(run, everyone=sites)
    assert [world.trained(site) for site in sites] == [[1, 2, 3]] * 3, "a site trained again"


@pytest.mark.parametrize("away_s", [5.0, 60.0])
def test_the_coordinator_is_away(away_s: float, make_world: Callable[..., World], measured: Measured) -> None:
    world = make_world(heartbeat_s=2.0, seconds=1.5)
    sites = world.begin_all()
    run = world.start_run(sites)
    world.training(sites[0], 2)
    world.main.kill()
    world.main.wait()
    time.sleep(away_s)
    world.begin()
    back = time.time()
    before = len(world.store.commits(run)) - 1
    assert before == 1
    committed = world.event(run, "round_committed", round=2)
    measured(f"coordinator away for {away_s:g} s: from its return to the round's commit", committed["t"] - back, 15)
    world.finish(run)
    world.check(run, everyone=sites)
    assert [world.trained(site) for site in sites] == [[1, 2, 3]] * 3, "a site trained again"


def test_the_database_is_away(
    postgres: Cluster,  # noqa: F811
    postgres_url: str,  # noqa: F811
    make_world: Callable[..., World],
    measured: Measured,
) -> None:
    world = make_world(heartbeat_s=2.0, seconds=1.5, database=postgres_url)
    sites = world.begin_all()
    run = world.start_run(sites, rounds=4)
    world.training(sites[0], 2)
    postgres.stop()
    try:
        time.sleep(30)
    finally:
        postgres.start()
    back = time.time()
    assert world.main.poll() is None, "the coordinator did not outlive its database"
    committed = world.event(run, "round_committed", round=2)
    measured("database away for 30 s: from its return to the round's commit", committed["t"] - back, 15)
    world.finish(run)
    world.check(run, rounds=4, everyone=sites)
    assert [world.trained(site) for site in sites] == [[1, 2, 3, 4]] * 3, "a site trained again"
    assert "cannot be reached" in (world.folder / "coordinator.log").read_text()

"""Two replicas share a database: one that was stopped, and goes on where it was, changes nothing any more."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.postgres import Cluster, postgres, postgres_url  # noqa: F401  (fixtures)

from .conftest import Measured
from .nursery import Death
from .proxy import Proxy
from .world import World

#: where the leader is stopped for longer than its lease
_PLACES = [
    Death("coordinator.stored_model:StoredModel.close", "after", 2, signal.SIGSTOP),
    Death("coordinator.store:Store.commit", "before", 3, signal.SIGSTOP),
    Death("coordinator.journal:spend", "before", 3, signal.SIGSTOP),  # in the midst of the commit, its locks held
    Death("coordinator.store:Store.commit", "after", 3, signal.SIGSTOP),
    Death("coordinator.conduct:NetworkShelf.forget", "before", 2, signal.SIGSTOP),
    Death("coordinator.receive:SealedFile.sync", "before", 4, signal.SIGSTOP),
    Death("coordinator.receive:Blobs.put", "before", 5, signal.SIGSTOP),
    Death("coordinator.store:Store.accept_upload", "before", 4, signal.SIGSTOP),
    Death("coordinator.store:Store.accept_upload", "after", 4, signal.SIGSTOP),
    Death("coordinator.store:Store.add_tasks", "before", 4, signal.SIGSTOP),
]


@pytest.mark.parametrize("death", _PLACES, ids=str)
def test_a_paused_leader(
    death: Death,
    postgres: Cluster,  # noqa: F811
    postgres_url: str,  # noqa: F811
    tmp_path: Path,
    make_world: Callable[..., World],
    measured: Measured,
) -> None:
    world = make_world(database=postgres_url, blobs=str(tmp_path / "blobs"), lease_s=2.0)
    first = world.begin(death)
    sites = world.site_names(3)
    world.enrol_sites(sites)
    with Proxy(world.ports["services"]).serving() as proxy:
        world.route_lead(proxy.port)
        for site in sites:
            world.route(site, proxy.port)
            world.begin_site(site)
        run = world.start_run(sites)
        first.wait_until_stopped()
        stopped = time.time()
        proxy.target = world.begin_second()
        proxy.cut()
        world.patiently(lambda: world.store.run_row(run).has_ended, f"the run ends, its first leader {death}")
        measured("leader stopped: until another has ended its run", time.time() - stopped, 30)
        first.go_on()
        world.check(run, everyone=sites)
        log = world.folder / "coordinator.log"
        world.patiently(lambda: "led by another replica by now" in log.read_text(), "the first one notices")
        proxy.target = world.ports["services"]
        proxy.cut()
        again = world.start_run(sites)  # both serve on, and either may lead
        world.finish(again)
        world.check(again, everyone=sites)
    assert first.poll() is None
    assert world.second.poll() is None
    assert [sorted(world.trained(site)) for site in sites] == [[1, 1, 2, 2, 3, 3]] * 3, "a site trained again"

"""Sites on lines so slow that a chunk takes longer than the patience for heartbeats."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.federation import random_tensors
from benchmarks.slow_links import Line

from .world import World

_MB = 1.0


def test_heartbeats_pass_chunks_on_a_slow_line(make_world: Callable[..., World]) -> None:
    """An update of one chunk takes 6 s at 1.4 Mbit/s; a site that is not heard for 2.5 s is given up."""
    world = make_world(theta=random_tensors(_MB), chunk_bytes=1 << 20, heartbeat_s=0.5)
    world.begin()
    (site,) = world.site_names(1)
    world.enrol_sites([site])
    with Line(world.ports["services"], up=1.4, down=14).open() as port:
        world.route(site, port)
        world.begin_site(site)
        world.site_event(site, "connected")
        run = world.start_run([site], rounds=1)
        world.finish(run)
    world.check(run, rounds=1, everyone=[site])
    events = (world.folder / "sites" / site / "log.jsonl").read_text()
    assert events.count('"connected"') == 1
    assert "transfer.cut" not in events
    assert not world.client().run(run)["history"][0].get("late")

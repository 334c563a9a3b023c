"""Everything is killed at random for about a minute: the run ends as if nothing had happened."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from .world import World

_KILLING_S = 60.0
_SEED = 20260301


def test_random_kills(make_world: Callable[..., World]) -> None:
    world = make_world(seconds=2.0)
    sites = world.begin_all(4)
    run = world.start_run(sites, rounds=8)
    draw, began, kills = random.Random(_SEED), time.monotonic(), 0
    while time.monotonic() < began + _KILLING_S and not world.store.run_row(run).has_ended:
        time.sleep(draw.uniform(0.2, 3.0))
        victims = draw.sample(["coordinator", *sites], draw.choice((1, 1, 1, 2)))
        for victim in victims:
            process = world.main if victim == "coordinator" else world.site_of[victim]
            process.kill()
            process.wait()
            kills += 1
        time.sleep(draw.uniform(0.0, 1.5))
        world.revive_all()
    world.finish(run, tend=world.revive_all)
    assert kills >= 10
    world.check(run, rounds=8, everyone=sites)

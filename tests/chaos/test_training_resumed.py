"""A site is killed in the midst of real training: it goes on from its last checkpoint, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from commonweight.lead.submit import prepare
from commonweight.recipe import Recipe
from tests.conftest import SITES

from .nursery import Death
from .world import World

#: the third checkpoint of a process; what it has written is not on the disk yet, or is
_DEATHS = [
    Death("train.checkpoint:FileCheckpoint.save", "before", 3),
    Death("train.checkpoint:FileCheckpoint.save", "after", 3),
    Death("site.outbox:Outbox.keep", "after", 1),
]


def test_training_goes_on_from_its_checkpoint(
    make_world: Callable[..., World], make_recipe: Callable[..., Recipe], small_data: Path
) -> None:
    world = make_world(keep_after_s=0.0)
    world.begin()
    for site in SITES:
        world.enrol_sites([site])
        settings = {"name": site, "address": f"127.0.0.1:{world.ports['services']}", "device": "cpu", "threads": 1}
        settings["data"] = {"path": str(small_data), "partition": site}
        (world.folder / "sites" / site / "site.yaml").write_text(yaml.safe_dump(settings))
        world.begin_recipe_site(site)
    recipe = make_recipe(federation={"rounds": 2, "patience_s": 60.0}, training={"epochs": 1})

    def submit() -> str:
        with world.client() as client:
            prepared = prepare(recipe, client.identity, sites=SITES)
            return client.submit(prepared.signed, prepared.tensors, prepared.frame)

    undisturbed = submit()
    world.finish(undisturbed)
    steps = checkpoints(world, SITES[0])
    assert [number for number, _ in steps].count(1) >= 3
    for death in _DEATHS:
        world.site_of[SITES[0]].kill()
        world.site_of[SITES[0]].wait()
        before = len(checkpoints(world, SITES[0]))
        dying = world.begin_recipe_site(SITES[0], death)
        run = submit()
        world.patiently(lambda dying=dying: dying.poll() is not None, f"the site dies {death}")
        world.begin_recipe_site(SITES[0])
        world.finish(run)
        assert world.store.commits(run)[2]["state"] == world.store.commits(undisturbed)[2]["state"]
        again = checkpoints(world, SITES[0])[before:]
        redone = [(1, 3)] if death.when == "before" else []  # noted, but not on the disk
        assert sorted(again) == sorted(steps + redone), "steps were taken again"


def checkpoints(world: World, site: str) -> list[tuple[int, int]]:
    """(round, steps) of every checkpoint that a site has made."""
    path = world.folder / "sites" / site / "checkpoints"
    return [(int(a), int(b)) for a, b in (line.split() for line in path.read_text().splitlines())]

"""The coordinator is killed at every step that it writes down, and started again: the run ends as if nothing was."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest

from .conftest import Measured
from .nursery import Death
from .world import World, expected_model

#: while a run is led: place, and which calls of it
_STEPS = {
    "coordinator.store:Store.claim": (1,),
    "coordinator.store:Store.bind": (1,),
    "coordinator.store:Store.put_member": (1, 3),
    "coordinator.store:Store.put_result": (1, 3),
    "coordinator.store:Store.add_tasks": (1, 3, 4),
    "coordinator.store:Store.open_round": (1, 3),
    "coordinator.store:Store.open_upload": (1, 5),
    "coordinator.store:Store.reply": (2, 8),
    "coordinator.receive:SealedFile.write": (1, 13),
    "coordinator.receive:SealedFile.sync": (1, 6),
    "coordinator.receive:Blobs.put": (3, 7),
    "coordinator.store:Store.accept_upload": (1, 2, 3, 9),
    "coordinator.uploads:append": (1, 6),
    "coordinator.stored_model:StoredModel.close": (1, 2),
    "coordinator.frame_files:FrameWriter.finish": (2, 4),
    "coordinator.frame_files:FrameFiles.put": (2, 3),
    "coordinator.frame_files:Blobs.put_bytes": (3, 4),
    "coordinator.store:Store.commit": (1, 2, 4),
    "coordinator.journal:spend": (2, 4),
    "coordinator.conduct:NetworkShelf.forget": (1, 3),
    "coordinator.store:Store.forget_upload": (1, 5, 9),
    "coordinator.frame_files:FrameFiles.forget": (2, 3),
    "coordinator.store:Store.add_events": (1, 3),
    "coordinator.store:Store.set_run_state": (2, 3),
    "coordinator.conduct:write_json": (1,),
    "coordinator.conduct:write_report": (1,),
    "coordinator.conduct:shutil.copyfile": (1, 4),
    "coordinator.conduct:Conductor._tidy": (1,),
    "coordinator.receive:Receiver.forget_run": (1,),
}
_LED = [Death(place, when, nth) for place, calls in _STEPS.items() for nth in calls for when in ("before", "after")]

#: while a run is submitted
_SUBMITTING = [
    Death(place, when)
    for place, when in itertools.product(
        (
            "coordinator.store:Store.add_run",
            "coordinator.receive:FrameWriter.write",
            "coordinator.receive:FrameWriter.finish",
            "coordinator.frame_files:Blobs.put_bytes",
            "coordinator.store:Store.set_run_state",
        ),
        ("before", "after"),
    )
]


@pytest.mark.parametrize("death", _LED, ids=str)
def test_the_run_goes_on(death: Death, make_world: Callable[..., World], measured: Measured) -> None:
    world = make_world()
    sites = world.begin_all(deaths=[death])
    run = world.submit_through(world.propose(sites))
    died = []

    def tend() -> None:
        if world.main.poll() is not None:
            died.append(time.monotonic())
            world.begin()

    row = world.finish(run, tend=tend)
    if not died:  # its place comes when the run has ended already
        world.patiently(lambda: world.main.poll() is not None, f"the coordinator dies {death}", seconds=30)
        world.begin()
    world.check(run, everyone=sites)
    assert [world.trained(site) for site in sites] == [[1, 2, 3]] * 3, "a site trained twice"
    if died and row.ended_at is not None:
        measured("coordinator killed at a step: from its death to the run's end", time.monotonic() - died[0], 30)


@pytest.mark.parametrize("death", _SUBMITTING, ids=str)
def test_submitting_can_be_repeated(death: Death, make_world: Callable[..., World]) -> None:
    world = make_world()
    sites = world.begin_all(deaths=[death])
    dying = world.main
    run = world.submit_through(world.propose(sites))
    world.finish(run)
    assert dying.poll() is not None
    world.check(run, everyone=sites)


def test_what_is_expected_is_what_an_undisturbed_run_gives(make_world: Callable[..., World]) -> None:
    world = make_world()
    sites = world.begin_all()
    run = world.start_run(sites)
    world.finish(run)
    world.check(run, everyone=sites)
    # a lost update, one counted twice and a missing round would show
    whole = [(sites, sites)] * 3
    others = [whole[:2], [whole[0], (sites, sites[1:]), whole[2]], [*whole, whole[0]]]
    assert expected_model(world.theta, whole).digest() not in {expected_model(world.theta, o).digest() for o in others}

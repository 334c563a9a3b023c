"""The coordinator is killed at every step that it writes down, and started again: the run ends as if nothing was."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from .conftest import Measured
from .nursery import Death
from .world import World, expected_model

#: while a run is led: place, and before or after which call of it
_STEPS = {
    "coordinator.store:Store.claim": ("before 1", "after 1"),
    "coordinator.store:Store.bind": ("after 1",),
    "coordinator.store:Store.put_member": ("before 1", "after 3"),
    "coordinator.store:Store.put_result": ("before 1", "after 1", "before 3", "after 3"),
    "coordinator.store:Store.add_tasks": ("before 1", "after 1", "before 3", "after 3", "after 4"),
    "coordinator.store:Store.open_round": ("before 1", "after 1", "after 3"),
    "coordinator.store:Store.open_upload": ("before 1", "after 1", "after 5"),
    "coordinator.store:Store.reply": ("before 2", "after 8"),
    "coordinator.receive:SealedFile.write": ("before 1", "after 13"),
    "coordinator.receive:SealedFile.sync": ("before 1", "after 6"),
    "coordinator.receive:Blobs.put": ("before 3", "after 3", "after 7"),
    "coordinator.store:Store.accept_upload": ("before 1", "after 1", "after 2", "before 3", "after 3", "after 9"),
    "coordinator.uploads:append": ("before 1", "after 6"),
    "coordinator.stored_model:StoredModel.close": ("before 1", "after 1", "after 2"),
    "coordinator.frame_files:FrameWriter.finish": ("before 2", "after 4"),
    "coordinator.frame_files:Blobs.put": ("before 2", "after 8"),
    "coordinator.frame_files:Blobs.put_bytes": ("before 3", "after 4"),
    "coordinator.store:Store.charge": ("before 1", "after 2"),
    "coordinator.store:Store.commit": ("before 1", "after 1", "before 2", "after 2", "before 4", "after 4"),
    "coordinator.journal:spend": ("before 2", "after 3"),
    "coordinator.conduct:NetworkShelf.forget": ("before 1", "after 3"),
    "coordinator.store:Store.forget_upload": ("before 1", "after 5", "after 9"),
    "coordinator.frame_files:FrameFiles.forget": ("before 2", "after 3"),
    "coordinator.store:Store.add_events": ("before 1", "after 3"),
    "coordinator.conduct:write_json": ("before 1",),
    "coordinator.conduct:write_report": ("after 1",),
    "coordinator.conduct:shutil.copyfile": ("before 1", "after 4"),
    "coordinator.store:Store.set_run_state": ("before 2", "after 2", "before 3", "after 3"),
    "coordinator.conduct:Conductor._tidy": ("before 1", "after 1"),
}
_LED = [
    Death(place, when, int(nth))
    for place, moments in _STEPS.items()
    for when, nth in (moment.split() for moment in moments)
]

#: while a run is submitted
_SUBMITTING = [
    Death(place, when, nth)
    for place, nth in (
        ("coordinator.store:Store.add_run", 1),
        ("coordinator.receive:FrameWriter.write", 3),
        ("coordinator.receive:FrameWriter.finish", 1),
        ("coordinator.frame_files:Blobs.put_bytes", 2),  # the first is a probe, at the start
        ("coordinator.store:Store.set_run_state", 1),
    )
    for when in ("before", "after")
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


def test_a_cancelled_run_leaves_nothing_behind(make_world: Callable[..., World]) -> None:
    """The coordinator dies when the run is cancelled, before the updates that were accepted are deleted."""
    world = make_world()
    dying = world.begin(Death("coordinator.conduct:Conductor._tidy"))
    sites = world.site_names(3)
    for site in sites[:2]:
        world.begin_site(site)
    world.begin_site(sites[2], Death("benchmarks.federation:NoiseWorkshop.train"))
    run = world.start_run(sites)
    world.patiently(lambda: len(world.store.accepted_uploads(run, 1)) == 2, "two sites have answered")
    with world.client() as client:
        client.cancel(run)
    dying.wait()
    assert world.store.run_row(run).state == "cancelled"
    assert world.left_of(run)
    world.begin()
    world.check_tidy(run)


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

"""The coordinator's disk is full for a while: what needs it waits, says so, and goes on when there is room."""

from __future__ import annotations

import errno
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import Measured
from .nursery import Death
from .world import World

_SIZE = "24m"


class Disk:
    """A small file system, which can be filled and cleared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Until not a byte more fits."""
        with self._ballast.open("wb", buffering=0) as file:
            block = bytes(1 << 16)
            while block:
                try:
                    file.write(block)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    block = block[: len(block) // 2]

    def clear(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (that takes root)")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def said(world: World, words: str) -> bool:
    return words in (world.folder / "coordinator.log").read_text()


def waits(world: World, run: str, round: int, seconds: float = 3.0) -> None:
    """For a while, the round is not committed, and nothing ends."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        assert world.main.poll() is None, "the coordinator died"
        row = world.store.run_row(run)
        assert row.state == "running", f"{row.state}: {row.error}"
        assert round not in world.store.commits(run)
        time.sleep(0.1)


def on(disk: Disk, world: World) -> None:
    """Put the coordinator's blobs and scratch files on the disk; its database is elsewhere."""
    world.make()
    scratch = world.coordinator_folder / "scratch"
    scratch.rmdir()
    (disk.folder / "scratch").mkdir()
    scratch.symlink_to(disk.folder / "scratch")


def test_full_during_an_upload(disk: Disk, make_world: Callable[..., World], measured: Measured) -> None:
    world = make_world(seconds=1.0, blobs=str(disk.folder / "blobs"))
    on(disk, world)
    sites = world.begin_all()
    run = world.start_run(sites)
    world.training(sites[0], 1)
    disk.fill()
    world.patiently(lambda: said(world, "the disk is full"), "it says so")
    waits(world, run, 1)
    disk.clear()
    cleared = time.time()
    committed = world.event(run, "round_committed", round=1)
    measured("disk full during an upload: from room to the round's commit", committed["t"] - cleared, 15)
    world.finish(run)
    world.check(run, everyone=sites)
    assert [world.trained(site) for site in sites] == [[1, 2, 3]] * 3, "a site trained again"


@pytest.mark.parametrize(
    "place",
    [
        "coordinator.stored_model:StoredModel.close",
        "coordinator.frame_files:FrameFiles.put",
        "coordinator.conduct:write_json",
    ],
    ids=lambda place: place.rpartition(":")[2],
)
def test_full_during_a_commit(place: str, disk: Disk, make_world: Callable[..., World], measured: Measured) -> None:
    world = make_world(blobs=str(disk.folder / "blobs"))
    on(disk, world)
    nth = 2 if place.endswith("put") else 1  # the first frame is the initial one
    coordinator = world.begin(Death(place, "before", nth, signal.SIGSTOP))
    sites = world.site_names(3)
    for site in sites:
        world.begin_site(site)
    run = world.start_run(sites)
    coordinator.wait_until_stopped()
    disk.fill()
    coordinator.go_on()
    world.patiently(lambda: said(world, "pauses"), "it says so")
    assert said(world, "No space left on device") or said(world, "disk is full")
    assert world.store.run_row(run).state == "running"
    disk.clear()
    cleared = time.monotonic()
    world.finish(run)
    measured("disk full during a commit: from room to the run's end", time.monotonic() - cleared, 15)
    world.check(run, everyone=sites)
    assert [world.trained(site) for site in sites] == [[1, 2, 3]] * 3, "a site trained again"


def test_full_under_the_database_too(disk: Disk, make_world: Callable[..., World], measured: Measured) -> None:
    world = make_world(seconds=1.0)
    world.coordinator_folder.symlink_to(disk.folder / "coordinator")
    (disk.folder / "coordinator").mkdir()
    world.make()
    sites = world.begin_all()
    run = world.start_run(sites)
    world.training(sites[0], 1)
    disk.fill()
    world.patiently(lambda: said(world, "full") or said(world, "cannot"), "it says so")
    waits(world, run, 1)
    disk.clear()
    cleared = time.time()
    committed = world.event(run, "round_committed", round=1)
    measured("disk full under the database: from room to the round's commit", committed["t"] - cleared, 15)
    world.finish(run)
    world.check(run, everyone=sites)
    assert [world.trained(site) for site in sites] == [[1, 2, 3]] * 3, "a site trained again"

"""Chunks that come before the manifest of their update: they spare time, and nothing depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commonweight.codec.coded import CODED, Packer
from commonweight.codec.feedback import coder_of
from commonweight.model.tensors import NamedTensors
from commonweight.recipe.schema import CompressionSpec, Method
from commonweight.wire import protocol_pb2 as pb

from .federations import CHUNK_BYTES, Coordinator, Hand, Site, chunks_of, frame_for, theta, wait_for

OPEN, ACCEPTED, REFUSED = pb.UploadStatus.OPEN, pb.UploadStatus.ACCEPTED, pb.UploadStatus.REFUSED
Start = Callable[..., tuple[Site, pb.Task]]


def idle(site: Site, task: pb.Task) -> None:
    """Leave a task as it is."""


@pytest.fixture
def start(coordinator: Coordinator, lead: Hand) -> Iterator[Start]:
    """A run of one site that was asked to train: the site, and its task."""
    runs = []

    def start(**more: Any) -> tuple[Site, pb.Task]:
        name = f"early-{len(coordinator.store.principals('site'))}"
        site = coordinator.site(name, train=idle)
        runs.append(lead.submit(lead.job(sites=[name], **more)))
        return site, site.task(run=runs[-1])

    yield start
    for run in runs:
        lead.call("Control/Cancel", pb.RunRequest(run=run))


def request(task: pb.Task, /, **changes: Any) -> pb.Ahead:
    return pb.Ahead(**{"run": task.run, "round": task.round, "task": task.id, "chunk_bytes": CHUNK_BYTES, **changes})


def ahead(site: Site, task: pb.Task, messages: list[bytes]) -> pb.UploadStatus:
    status: pb.UploadStatus = site.call("Federation/OpenAhead", request(task))
    assert status.state == OPEN
    return site.push(status.upload, messages)


def messages(tensors: NamedTensors | None = None) -> list[bytes]:
    given = tensors or theta()
    return chunks_of(given, frame_for(given, "delta"))


def files_of(coordinator: Coordinator) -> set[Path]:
    return set((coordinator.home / "scratch" / "uploads").glob("*"))


def rest(site: Site, task: pb.Task, missing: list[int], tensors: NamedTensors | None = None) -> None:
    """Offer the update, which lacks these chunks only, and send them."""
    status = site.open(site.manifest(task, *([] if tensors is None else [tensors])))
    assert (status.state, list(status.missing)) == (OPEN, missing)
    parts = messages(tensors)
    assert site.push(status.upload, [parts[index] for index in missing]).state == ACCEPTED


def test_what_came_ahead_is_there_when_the_manifest_comes(coordinator: Coordinator, start: Start, lead: Hand) -> None:
    site, task = start()
    before = files_of(coordinator)
    status = ahead(site, task, [messages()[2], messages()[0]])
    assert (status.state, list(status.missing)) == (OPEN, [])
    rest(site, task, [1, 3, 4])
    run = lead.wait(task.run)
    frame = coordinator.here.files(task.run).open(run["base"]).frame
    expected = NamedTensors.of({name: 2 * tensor for name, tensor in theta().items()})
    assert frame.digest == frame_for(expected).digest
    assert files_of(coordinator) <= before


def test_all_of_an_update_may_come_ahead(start: Start) -> None:
    site, task = start()
    ahead(site, task, messages())
    assert site.open(site.manifest(task)).state == ACCEPTED


def test_a_chunk_that_the_manifest_does_not_name_is_missing(start: Start) -> None:
    site, task = start()
    ahead(site, task, [messages()[0], *messages(theta(2.0))[1:3]])
    rest(site, task, [1, 2, 3, 4])


def test_begun_again_it_begins_anew(coordinator: Coordinator, start: Start) -> None:
    site, task = start()
    before = files_of(coordinator)
    ahead(site, task, messages(theta(2.0)))
    ahead(site, task, messages()[:1])
    assert len(files_of(coordinator) - before) == 1
    rest(site, task, [1, 2, 3, 4])


def test_after_a_restart_it_is_as_if_nothing_had_come(coordinator: Coordinator, start: Start) -> None:
    site, task = start()
    before = files_of(coordinator)
    ahead(site, task, messages()[:3])
    coordinator.here.receiver._receipts.clear()
    coordinator.here.receiver.sweep()
    assert files_of(coordinator) <= before
    rest(site, task, [0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": "0" * 32}, "no run"),
        ({"run": "../x"}, "a run"),
        ({"task": "another"}, "no training task"),
        ({"round": 7}, "the task is of round 1"),
        ({"chunk_bytes": 2048}, "chunks are of 2048 bytes"),
    ],
)
def test_what_is_none_of_the_sites_business_is_refused(
    coordinator: Coordinator, start: Start, changes: dict[str, Any], words: str
) -> None:
    site, task = start()
    before = files_of(coordinator)
    denial = site.denied("Federation/OpenAhead", request(task, **changes))
    assert words in denial.message
    assert files_of(coordinator) <= before


def test_a_task_that_is_over_takes_nothing_more(coordinator: Coordinator, start: Start) -> None:
    site, task = start(retries=5)
    before = files_of(coordinator)
    ahead(site, task, messages()[:2])
    site.reply(task, pb.TaskReply.FAILED, reason="on purpose")
    again = wait_for(lambda: [t for t in site.tasks if t.kind == "train" and t.id != task.id])[0]
    assert "is over" in site.denied("Federation/OpenAhead", request(task)).message
    coordinator.here.receiver.forget_ended()
    assert files_of(coordinator) <= before
    assert site.update(again).state == ACCEPTED


def test_another_site_may_not_push_to_it(coordinator: Coordinator, start: Start) -> None:
    site, task = start()
    other, _ = start()
    status = site.call("Federation/OpenAhead", request(task))
    with pytest.raises(Exception, match="is not one of"):
        other.push(status.upload, messages()[:1])
    assert "no training task" in other.denied("Federation/OpenAhead", request(task)).message


@pytest.mark.parametrize("bad", ["cut", "beyond", "not finite"])
def test_a_bad_chunk_ends_it_and_the_update_may_still_come(coordinator: Coordinator, start: Start, bad: str) -> None:
    site, task = start()
    before = files_of(coordinator)
    spoilt = {
        "cut": messages()[1][:-4],
        "beyond": (99).to_bytes(4, "big") + messages()[0][4:],
        "not finite": messages(NamedTensors.of({name: t * float("nan") for name, t in theta().items()}))[1],
    }[bad]
    assert ahead(site, task, [messages()[0], spoilt]).state == REFUSED
    assert files_of(coordinator) <= before
    rest(site, task, [0, 1, 2, 3, 4])


def test_a_coded_update_comes_ahead_before_its_size_is_known(start: Start) -> None:
    spec = CompressionSpec(round=Method(name="bf16"), pack=Method(name="huffman"), error_feedback=False)
    coder = coder_of(spec, theta().layout, 0)
    assert coder is not None
    packer, update = Packer(coder), theta(0.01)
    for payload in coder.encode({"delta": update}, {}, 5):
        packer.add(payload)
    sent = packer.packed(5)
    frame = frame_for(sent, CODED, 1024)
    parts = chunks_of(sent, frame)
    last = len(parts) - 1
    assert last > 2
    site, task = start(compression={"round": "bf16", "pack": "huffman", "error_feedback": False})
    status = site.call("Federation/OpenAhead", request(task, chunk_bytes=1024))
    site.push(status.upload, parts[2:last])
    status = site.open(site.manifest(task, frame=frame.header))
    assert list(status.missing) == [0, 1, last]
    assert site.push(status.upload, [parts[index] for index in status.missing]).state == ACCEPTED

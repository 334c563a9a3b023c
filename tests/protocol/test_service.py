"""What the coordinator's services answer: attendance, global tensors, and what users ask for."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commonweight.coordinator import hub
from commonweight.coordinator.audit import AuditEntry, verify_chain
from commonweight.coordinator.hub import Hub, Stream
from commonweight.coordinator.plans import RunPlan
from commonweight.coordinator.pushes import TRANSFERS
from commonweight.errors import RecipeError, StateError, StorageError
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import chunk_digest, parse_header
from commonweight.wire.refusals import Refusal
from commonweight.wire.service import CERTIFICATE_KEY, CODE_KEY

from .federations import BEAT_S, Coordinator, Denial, Hand, Site, chunks_of, frame_for, theta, wait_for

import grpc  # isort: skip

INVALID, NOT_NOW = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


def hello(**values: Any) -> pb.SiteMessage:
    return pb.SiteMessage(hello=pb.Hello(**{"protocol_min": 1, "protocol_max": 1, **values}))


def idle(site: Site, task: pb.Task) -> None:
    """Leave a task as it is."""


# --- attendance


@pytest.mark.parametrize(
    ("first", "reason", "come_back"),
    [
        (pb.SiteMessage(heartbeat=pb.Heartbeat()), "must be a hello", True),
        (pb.SiteMessage(), "must be a hello", True),
        (hello(protocol_min=2, protocol_max=9), "no version of the protocol in common", False),
        (hello(protocol_min=0, protocol_max=0), "no version of the protocol in common", False),
        (hello(tasks=["../../etc"]), "task in hand", True),
        (hello(tasks=["t"] * 10_001), "tasks in hand", True),
        (hello(software="\x1b[2J"), "software", True),
        (hello(audit_head=pb.AuditHead(hash=b"short")), "audit head", True),
    ],
)
def test_an_attendance_begins_with_a_hello(
    coordinator: Coordinator, first: pb.SiteMessage, reason: str, come_back: bool, request: pytest.FixtureRequest
) -> None:
    name = f"guest-{request.node.callspec.indices['first']}"
    stay = coordinator.guest(name).attendance(first)
    bye = stay.first("bye")
    assert reason in bye.reason
    assert bye.come_back == come_back
    stay.ended()
    assert not stay.all("welcome")
    assert name not in coordinator.here.hub.streams


def test_a_newer_protocol_is_met_at_the_version_in_common(coordinator: Coordinator) -> None:
    stay = coordinator.guest("modern").attendance(hello(protocol_min=1, protocol_max=7))
    welcome = stay.first("welcome")
    assert (welcome.protocol, welcome.name, welcome.heartbeat_s) == (1, "modern", BEAT_S)
    assert len(welcome.audit_head.hash) == 32
    assert len(welcome.audit_head.signature) == 64
    assert dict(stay.call.initial_metadata())[CERTIFICATE_KEY] == coordinator.here.certificate()
    stay.first("heartbeat")
    stay.leave()


@pytest.mark.parametrize("message", [hello(), pb.SiteMessage()])
def test_a_hello_comes_once(coordinator: Coordinator, message: pb.SiteMessage, request: pytest.FixtureRequest) -> None:
    site = coordinator.site(f"twice-{request.node.callspec.indices['message']}")
    site.stay.send(message)
    assert "hello comes once" in site.stay.first("bye").reason
    site.stay.ended()


def test_a_site_that_falls_silent_is_away(coordinator: Coordinator) -> None:
    site = coordinator.site("silent")
    site.stay.silent = True
    bye = site.stay.first("bye")
    assert bye.come_back
    assert "nothing was heard" in bye.reason
    site.stay.ended()
    wait_for(lambda: "silent" not in coordinator.here.presence.attending())


def test_a_site_that_leaves_is_away_at_once(coordinator: Coordinator) -> None:
    site = coordinator.site("leaver")
    assert "leaver" in coordinator.here.presence.attending()
    site.stay.leave()
    wait_for(lambda: coordinator.here.presence.away_for("leaver") is not None)
    site.attend()
    assert coordinator.here.presence.away_for("leaver") is None


def test_a_newer_stream_takes_the_place_of_an_older(coordinator: Coordinator, lead: Hand) -> None:
    site = coordinator.site("reborn", join=idle)
    run = lead.submit(lead.job(sites=["reborn"]))
    older, task = site.stay, site.task("join")
    site.attend()
    bye = older.first("bye")
    assert "connected anew" in bye.reason
    older.ended()
    wait_for(lambda: [t.id for t in site.tasks] == [task.id, task.id])  # the new stream did not know of it
    assert coordinator.here.presence.away_for("reborn") is None
    lead.call("Control/Cancel", pb.RunRequest(run=run))


def test_tasks_in_hand_are_not_offered_again_and_those_that_are_over_are_taken_back(
    coordinator: Coordinator, lead: Hand
) -> None:
    site = coordinator.site("handy", join=idle)
    run = lead.submit(lead.job(sites=["handy"]))
    task = site.task("join")
    site.stay.leave()
    site.tasks.clear()
    site.attend(hello=hello(tasks=[task.id, "long-gone"]))
    assert site.stay.first("withdraw").task == "long-gone"
    site.stay.first("heartbeat")
    assert not site.tasks
    lead.call("Control/Cancel", pb.RunRequest(run=run))
    wait_for(lambda: [w for w in site.stay.all("withdraw") if w.task == task.id])


def test_sites_are_told_of_runs_that_end_and_of_those_that_ended_while_they_were_away(
    coordinator: Coordinator, lead: Hand
) -> None:
    here, away, stranger = coordinator.site("here"), coordinator.site("away"), coordinator.site("stranger")
    here.answers["train"] = idle
    run = lead.submit(lead.job(sites=["here", "away"]))
    here.task("train")
    away.stay.leave()
    lead.call("Control/Cancel", pb.RunRequest(run=run))
    assert here.stay.first("ended") == pb.RunEnded(run=run, state="cancelled")
    away.attend()
    assert away.stay.first("ended") == pb.RunEnded(run=run, state="cancelled")
    assert not stranger.stay.all("ended")


def test_progress_is_shown_unless_it_cannot_be(coordinator: Coordinator, lead: Hand) -> None:
    site = coordinator.site("busy")
    site.answers["evaluate"] = idle
    run = lead.submit(lead.job(sites=["busy"]))
    site.task("evaluate")
    for note, shown in (("epoch 1 of 3", "epoch 1 of 3"), ("\x1b[2J", ""), ("x" * 5000, "")):
        progress = [pb.Progress(task=site.task("evaluate").id, note=note)]
        site.stay.silent = True
        site.stay.send(pb.SiteMessage(heartbeat=pb.Heartbeat(progress=progress)))
        wait_for(lambda shown=shown: lead.run(run)["sites"][0]["doing"] == shown)  # type: ignore[misc]
        site.stay.silent = False
    lead.call("Control/Cancel", pb.RunRequest(run=run))


@pytest.mark.parametrize(
    "reply",
    [
        pb.TaskReply(task="none", state=pb.TaskReply.DONE),
        pb.TaskReply(task="none", state=pb.TaskReply.FAILED, reason="why not"),
    ],
)
def test_a_reply_to_a_task_that_is_not_known_does_no_harm(coordinator: Coordinator, reply: pb.TaskReply) -> None:
    site = coordinator.site(f"calm-{reply.state}")
    beats = len(site.stay.all("heartbeat"))
    site.stay.send(pb.SiteMessage(reply=reply))
    wait_for(lambda: len(site.stay.all("heartbeat")) > beats + 1)
    assert not site.stay.has_ended


@pytest.mark.parametrize(
    "reply",
    [
        pb.TaskReply(task="../..", state=pb.TaskReply.DONE),
        pb.TaskReply(state=pb.TaskReply.DONE),
    ],
)
def test_a_reply_to_no_task_at_all_ends_the_stream(
    coordinator: Coordinator, reply: pb.TaskReply, request: pytest.FixtureRequest
) -> None:
    site = coordinator.site(f"odd-{request.node.callspec.indices['reply']}")
    site.stay.send(pb.SiteMessage(reply=reply))
    assert "task" in site.stay.first("bye").reason
    coordinator.audited("reply refused", site.name, "malformed")


@pytest.mark.parametrize(
    ("state", "changes", "reason"),
    [
        (99, {}, "answer in state 99"),
        (pb.TaskReply.DONE, {"result": b"x" * (9 << 20)}, "9,437,184"),
        (pb.TaskReply.FAILED, {"reason": "\x1b]0;gotcha\x07"}, "reason"),
    ],
)
def test_an_answer_that_cannot_be_used_is_a_failure_of_its_task(
    coordinator: Coordinator, lead: Hand, state: int, changes: dict[str, Any], reason: str
) -> None:
    name = f"clumsy-{state}"
    site = coordinator.site(name, join=lambda site, task: site.reply(task, state, **changes))
    run = lead.submit(lead.job(sites=[name]))
    ended = lead.wait(run, "failed")
    assert "its answer was refused" in ended["error"]
    assert reason in ended["error"]
    assert not site.stay.has_ended
    assert reason in coordinator.audited("task failed", name, "refused").details["reason"]


def test_a_task_that_is_done_without_its_update_has_failed(coordinator: Coordinator, lead: Hand) -> None:
    site = coordinator.site("boaster", train=lambda site, task: site.reply(task, pb.TaskReply.DONE))
    other = coordinator.site("modest")
    ended = lead.wait(lead.submit(lead.job(sites=["boaster", "modest"])))
    assert "no update of it was accepted" in ended["history"][0]["failed"]["boaster"]
    assert other.trained == [1]
    assert len([t for t in site.tasks if t.kind == "train"]) == 2  # it was asked again once


def test_a_failure_told_twice_is_written_down_once(coordinator: Coordinator, lead: Hand) -> None:
    def fail(site: Site, task: pb.Task) -> None:
        for _ in range(3):
            site.reply(task, pb.TaskReply.FAILED, reason="no luck")

    coordinator.site("stutterer", join=fail)
    lead.wait(lead.submit(lead.job(sites=["stutterer"])), "failed")
    assert len([e for e in coordinator.audit("task failed") if e.actor == "stutterer"]) == 1


# --- streams, by themselves


def test_a_site_that_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither memory nor the stream's place is held by a site that sends and never reads."""
    monkeypatch.setattr(hub, "_LAST_WORDS_S", 0.05)

    async def attend(made: list[Stream]) -> None:
        made.append(Stream("deaf", "s", None, set()))  # type: ignore[arg-type]
        await asyncio.sleep(60)  # as a message that nobody takes makes it wait

    async def scenario() -> None:
        made: list[Stream] = []
        call = asyncio.create_task(attend(made))
        await asyncio.sleep(0)
        for _ in range(hub._MOST_WAITING + 10):
            made[0].send(heartbeat=pb.Heartbeat())
        assert made[0]._out.qsize() == hub._MOST_WAITING + 2
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_tasks_are_pushed_once_the_database_is_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An outage while tasks are pushed must not be the end of pushing."""
    from commonweight.coordinator.plans import Plans
    from commonweight.coordinator.relays import Routes
    from commonweight.coordinator.store import Store

    monkeypatch.setattr(hub, "_AGAIN_S", 0.01)
    outages = [3]

    async def away(function: Any, *arguments: Any) -> Any:
        if outages[0] and getattr(function, "__name__", "") == "_open_tasks":
            outages[0] -= 1
            raise StorageError("the database is away", retry=True)
        return function(*arguments)

    async def scenario() -> None:
        one = Hub(store, away, Routes(store, Plans(store, ())))
        stream = Stream("north", "s", None, {"over"})  # type: ignore[arg-type]
        one.add(stream)
        following = asyncio.create_task(one.follow())
        message = await anext(stream.messages())
        assert message.withdraw.task == "over"
        assert not outages[0]
        assert not following.done()
        following.cancel()

    with Store(f"sqlite:///{tmp_path / 'state.sqlite'}") as store:
        asyncio.run(asyncio.wait_for(scenario(), 10))


# --- global tensors


@pytest.fixture(scope="module")
def reader(coordinator: Coordinator) -> Site:
    return coordinator.site("reader")


@pytest.fixture(scope="module")
def held(coordinator: Coordinator, lead: Hand, reader: Site) -> Iterator[pb.Task]:
    """A task whose run waits: its base stays."""
    reader.answers["train"] = idle
    run = lead.submit(lead.job(sites=["reader"]))
    yield reader.task(run=run)
    lead.call("Control/Cancel", pb.RunRequest(run=run))


def test_chunks_come_in_order_from_the_first_wanted(reader: Site, held: pb.Task) -> None:
    header, *chunks = reader.call("Transfer/Fetch", pb.FetchRequest(run=held.run, frame=held.base))
    frame = parse_header(header)
    assert frame.digest == held.base
    assert [chunk_digest(chunk) for chunk in chunks] == list(frame.digests)
    assert b"".join(chunks) == b"".join(m[4:] for m in chunks_of(theta(), frame_for(theta())))
    for first in range(frame.plan.num_chunks + 1):
        request = pb.FetchRequest(run=held.run, frame=held.base, first=first)
        assert reader.call("Transfer/Fetch", request) == [header, *chunks[first:]]
    beyond = pb.FetchRequest(run=held.run, frame=held.base, first=2**32 - 1)
    assert reader.call("Transfer/Fetch", beyond) == [header]
    only = pb.FetchRequest(run=held.run, frame=held.base, header_only=True)
    assert reader.call("Transfer/Fetch", only) == [header]


@pytest.mark.parametrize("frame", ["", "x", "0" * 63, "../../../master.key", "0" * 64 + "/..", "A" * 64])
def test_a_frame_is_named_by_its_digest_alone(reader: Site, held: pb.Task, frame: str) -> None:
    denial = reader.denied("Transfer/Fetch", pb.FetchRequest(run=held.run, frame=frame))
    assert (denial.code, denial.metadata[CODE_KEY]) == (INVALID, Refusal.MALFORMED)


def test_a_frame_that_is_not_there_any_more_is_not_waited_for(reader: Site, held: pb.Task) -> None:
    denial = reader.denied("Transfer/Fetch", pb.FetchRequest(run=held.run, frame="ab" * 32))
    assert denial.code is NOT_NOW
    assert denial.details["retry"] is False
    assert "has no frame" in denial.message
    denial = reader.denied("Transfer/Fetch", pb.FetchRequest(run="none", frame=held.base))
    assert denial.metadata[CODE_KEY] == Refusal.UNKNOWN_RUN


def test_a_frame_that_is_deleted_while_it_is_read_keeps_its_bytes(
    coordinator: Coordinator, lead: Hand, reader: Site, held: pb.Task
) -> None:
    """Its file is closed when nobody reads it any more: a descriptor used anew would show another file's bytes."""
    files = coordinator.here.files(held.run)
    stored = files.open(held.base)
    whole = [stored.chunk(index) for index in range(5)]
    copy = {
        key: coordinator.here.blobs.get_bytes(key) for key in coordinator.here.blobs.keys(f"runs/{held.run}/frames")
    }
    spares, files.spares = files.spares, None
    files.forget([held.base])
    try:
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
        assert [stored.chunk(index) for index in range(5)] == whole
        assert reader.denied("Transfer/Fetch", pb.FetchRequest(run=held.run, frame=held.base)).code is NOT_NOW
        for other in others:
            os.close(other)
    finally:
        files.spares = spares
        for key, content in copy.items():
            coordinator.here.blobs.put_bytes(key, content)


def test_one_caller_cannot_hold_any_number_of_transfers(reader: Site, held: pb.Task) -> None:
    calls = []
    stop = threading.Event()

    def nothing() -> Iterator[bytes]:
        stop.wait(30)
        yield from ()

    upload = reader.open(reader.manifest(held)).upload
    try:
        for _ in range(TRANSFERS):
            calls.append(reader.begin("Transfer/Push", nothing(), commonweight_upload=upload))
        denial = wait_for(lambda: _too_many(reader, held))
        assert denial.code is grpc.StatusCode.UNAVAILABLE
    finally:
        stop.set()
    for call in calls:
        assert call.result().state == pb.UploadStatus.OPEN
    assert reader.call("Transfer/Fetch", pb.FetchRequest(run=held.run, frame=held.base))


def _too_many(reader: Site, held: pb.Task) -> Any:
    try:
        reader.call("Transfer/Fetch", pb.FetchRequest(run=held.run, frame=held.base))
    except grpc.RpcError as error:
        return Denial(error)
    return None


# --- submitting


def test_submitting_twice_is_submitting_once(coordinator: Coordinator, lead: Hand, reader: Site) -> None:
    job = lead.job(sites=["reader"])
    first, again = (lead.call("Control/Submit", lead.sign(job)) for _ in range(2))
    assert first == again
    assert first.upload.state == pb.UploadStatus.OPEN
    assert list(first.upload.missing) == list(range(5))
    messages = chunks_of(theta(), frame_for(theta()))
    status = lead.call("Transfer/Push", iter(messages[:2]), commonweight_upload=first.upload.upload)
    assert list(status.missing) == [2, 3, 4]
    assert list(lead.call("Control/Submit", lead.sign(job)).upload.missing) == [2, 3, 4]
    # one that is damaged on the way is asked for again
    status = lead.call("Transfer/Push", iter([messages[2][:-1] + b"x"]), commonweight_upload=first.upload.upload)
    assert list(status.missing) == [2, 3, 4]
    status = lead.call("Transfer/Push", iter(messages[2:]), commonweight_upload=first.upload.upload)
    assert status.state == pb.UploadStatus.ACCEPTED
    last = lead.call("Control/Submit", lead.sign(job))
    assert (last.run, last.upload.state) == (job.id, pb.UploadStatus.ACCEPTED)
    assert len([e for e in coordinator.audit("run submitted") if e.subject == job.id]) == 1
    lead.call("Control/Cancel", pb.RunRequest(run=job.id))

    changed = pb.Job()
    changed.CopyFrom(job)
    changed.purpose = "another"
    denial = lead.denied("Control/Submit", lead.sign(changed))
    assert denial.code is NOT_NOW
    assert "another run with the id" in denial.message


def test_a_run_whose_tensors_arrived_in_the_last_moment_of_a_process_waits_to_be_led(
    coordinator: Coordinator, lead: Hand, reader: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, original = lead.job(sites=["reader"]), coordinator.store.set_run_state

    def killed(*_: Any, **__: Any) -> None:
        raise StorageError("killed", retry=True)

    monkeypatch.setattr(coordinator.store, "set_run_state", killed)
    upload = lead.call("Control/Submit", lead.sign(job)).upload
    messages = chunks_of(theta(), frame_for(theta()))
    denial = lead.denied("Transfer/Push", iter(messages), commonweight_upload=upload.upload)
    assert denial.code is grpc.StatusCode.UNAVAILABLE
    monkeypatch.setattr(coordinator.store, "set_run_state", original)
    assert lead.submit(job) == job.id
    wait_for(lambda: lead.run(job.id)["state"] in ("waiting", "running"))
    lead.call("Control/Cancel", pb.RunRequest(run=job.id))


def changed(job: pb.Job, **values: Any) -> pb.Job:
    for name, value in values.items():
        if name == "sites":
            job.sites.extend(value)
        else:
            setattr(job, name, value)
    return job


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ({"id": "x"}, INVALID, "32 hex digits"),
        ({"id": "../" + "a" * 29}, INVALID, "id is"),
        ({"kind": "destroy"}, INVALID, "this coordinator knows: train"),
        ({"kind": ""}, INVALID, "kind"),
        ({"name": "\x1b[31m"}, INVALID, "name"),
        ({"recipe": "rounds: ["}, INVALID, "recipe"),
        ({"recipe": "name: x\nfederation: {rounds: 1, strategy: none-such}"}, INVALID, "none-such"),
        ({"recipe": "name: x\nfederation: {strategy: 'os:system'}"}, INVALID, "os:system"),
        ({"recipe": "name: x\nfederation: {strategy: 'os.path:join'}"}, INVALID, "os.path:join"),
        ({"recipe": "[" * 5000}, INVALID, "recipe"),
        ({"initial": b"junk"}, INVALID, "header"),
        ({"initial": b""}, INVALID, ""),
        ({"initial": frame_for(theta(), "delta").header}, INVALID, "one channel theta"),
        ({"sites": ["nobody"]}, NOT_NOW, "no site is enrolled under the name 'nobody'"),
        ({"sites": ["lena"]}, NOT_NOW, "no site is enrolled under the name 'lena'"),
        ({"sites": ["reader", "reader"]}, INVALID, "twice"),
        ({"submitted_at": float("nan")}, INVALID, "time"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused_and_leaves_no_run(
    coordinator: Coordinator, lead: Hand, reader: Site, values: dict[str, Any], code: Any, words: str
) -> None:
    before = len(coordinator.store.runs())
    denial = lead.denied("Control/Submit", lead.sign(changed(lead.job(), **values)))
    assert denial.code is code, denial
    assert words in denial.message
    assert len(coordinator.store.runs()) == before


def test_no_code_is_imported_that_the_coordinator_does_not_list(
    lead: Hand, reader: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "imported"
    (tmp_path / "of_the_lead.py").write_text(f"open({str(mark)!r}, 'a').write('x')\nclass Mean: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = changed(lead.job(), recipe="name: x\ntraining: {objective: 'of_the_lead:Mean'}")
    assert lead.call("Control/Submit", lead.sign(loss)).run  # it runs at sites, if they allow it, and never here
    mean = changed(lead.job(), recipe="name: x\nfederation: {strategy: 'of_the_lead:Mean'}")
    denial = lead.denied("Control/Submit", lead.sign(mean))
    assert "is not among those that this coordinator runs: built-in" in denial.message
    assert not mark.exists()
    with pytest.raises(RecipeError, match="declares no options"):  # where it is listed, it is looked at
        RunPlan.of(mean, ["built-in", "of_the_lead:Mean"])
    assert mark.exists()


def test_a_job_with_a_field_that_this_version_does_not_know_is_not_waved_through(lead: Hand, reader: Site) -> None:
    job = lead.job(sites=["reader"]).SerializeToString() + b"\xf8\x01\x01"
    denial = lead.denied("Control/Submit", lead.sign(_Raw(job)))  # type: ignore[arg-type]
    assert denial.metadata[CODE_KEY] == Refusal.MALFORMED


class _Raw:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def SerializeToString(self, deterministic: bool = False) -> bytes:
        return self.content


def test_initial_tensors_beyond_the_bound_are_refused_before_there_is_a_run(
    coordinator: Coordinator, lead: Hand, reader: Site
) -> None:
    import torch

    from commonweight.model.tensors import NamedTensors

    large = NamedTensors.of({"w": torch.zeros(300_000)})
    before = len(coordinator.store.runs())
    denial = lead.denied("Control/Submit", lead.sign(lead.job(tensors=large)))
    assert denial.metadata[CODE_KEY] == Refusal.TOO_LARGE
    assert len(coordinator.store.runs()) == before


def test_initial_tensors_that_are_not_finite_end_their_run(lead: Hand, reader: Site) -> None:
    bad = theta()
    bad["a.weight"].view(-1)[700] = float("nan")
    job = lead.job(sites=["reader"], tensors=bad)
    upload = lead.call("Control/Submit", lead.sign(job)).upload
    status = lead.call("Transfer/Push", iter(chunks_of(bad, frame_for(bad))), commonweight_upload=upload.upload)
    assert (status.state, status.code) == (pb.UploadStatus.REFUSED, Refusal.NON_FINITE)
    run = lead.run(job.id)
    assert run["state"] == "failed"
    assert "'a.weight'" in run["error"]


# --- looking


def test_a_run_is_found_by_id_name_or_beginning(coordinator: Coordinator, lead: Hand, reader: Site) -> None:
    jobs = []
    for number, name in enumerate(("alpha", "beta", "beta")):
        job = lead.job(sites=["reader"], name=name)
        job.id = "facade" + job.id[7:] + f"{number}"
        lead.call("Control/Submit", lead.sign(job))
        jobs.append(job.id)
    for which, run in ((jobs[0], jobs[0]), ("alpha", jobs[0]), ("beta", jobs[2]), (jobs[1][:31], None)):
        if run is not None:
            assert lead.run(which)["id"] == run
    assert "several runs begin with 'facade'" in lead.denied("Control/GetRun", pb.RunRequest(run="facade")).message
    for which in ("", "gamma", jobs[0][:3], "%", "_" * 32, "x" * 10_000):
        denial = lead.denied("Control/GetRun", pb.RunRequest(run=which))
        assert denial.code is NOT_NOW
        assert "there is no run" in denial.message
        assert len(denial.message) < 2000
    listed = lead.json("Control/ListRuns", pb.ListRunsRequest())["runs"]
    assert [r["id"] for r in listed][:3] == jobs[::-1]
    for run in jobs:
        lead.call("Control/Cancel", pb.RunRequest(run=run))


def test_a_watcher_follows_until_the_end(coordinator: Coordinator, lead: Hand, auditor: Hand) -> None:
    site = coordinator.site("watched", train=idle)
    run = lead.submit(lead.job(sites=["watched"]))
    task = site.task()
    lines = auditor.stream("Control/Watch", pb.WatchRequest(run=run, follow=True), timeout=30)
    seen = [json.loads(next(lines).line)["event"]]
    assert auditor.call("Control/Watch", pb.WatchRequest(run=run))  # without `follow` it ends with what there is
    site.train(task)
    rest = list(lines)
    seen += [json.loads(line.line)["event"] for line in rest]
    assert seen[0] == "run_started"
    assert seen[-1] == "run_finished"
    after = rest[3].sequence
    assert auditor.call("Control/Watch", pb.WatchRequest(run=run, after=after)) == rest[4:]
    assert auditor.call("Control/Watch", pb.WatchRequest(run=run, after=10**9, follow=True)) == []


def test_the_files_of_a_run_are_its_own(coordinator: Coordinator, lead: Hand, auditor: Hand) -> None:
    coordinator.site("filed")
    run = lead.submit(lead.job(sites=["filed"]))
    ended = lead.wait(run)
    assert ended["files"] == ["events.jsonl", "metrics.json", "recipe.yaml", "report.html"]
    pieces = auditor.call("Control/GetFile", pb.FileRequest(run=run, name="metrics.json"))
    assert json.loads(b"".join(p.content for p in pieces))["engine"] == "network"
    for name in ("", "none", "../../frames", "metrics.json/..", "/etc/passwd", "x" * 5000):
        denial = auditor.denied("Control/GetFile", pb.FileRequest(run=run, name=name))
        assert denial.code is NOT_NOW
        assert "its files: events.jsonl" in denial.details["hint"]


def test_sites_are_listed_with_their_state(coordinator: Coordinator, lead: Hand) -> None:
    coordinator.site("listed")
    coordinator.guest("absent")
    coordinator.store.set_state("absent", "revoked", "closed down", "ada")
    found = {site["site"]: site for site in lead.json("Control/ListSites", pb.ListSitesRequest())["sites"]}
    assert (found["listed"]["state"], found["listed"]["attending"]) == ("active", True)
    assert found["absent"]["attending"] is False
    assert (found["absent"]["state"], found["absent"]["reason"]) == ("revoked", "closed down")
    assert "lena" not in found


def test_the_audit_log_can_be_read_and_verified(coordinator: Coordinator, auditor: Hand, admin: Hand) -> None:
    lines = [json.loads(line.line) for line in auditor.call("Control/ReadAudit", pb.AuditRequest())]
    entries = [AuditEntry.from_json(line) for line in lines]
    sequence, _ = verify_chain(entries)
    assert sequence == len(entries)
    later = admin.call("Control/ReadAudit", pb.AuditRequest(after=entries[3].sequence))
    assert json.loads(later[0].line)["sequence"] == entries[4].sequence
    entries[2] = AuditEntry(**{**vars(entries[2]), "actor": "mallory"})
    with pytest.raises(StateError, match="entry 3"):
        verify_chain(entries)


# --- cancelling


def test_a_run_is_cancelled_in_every_state(coordinator: Coordinator, lead: Hand, admin: Hand) -> None:
    site = coordinator.site("stopped", join=idle)
    job = lead.job(sites=["stopped"])

    receiving = lead.call("Control/Submit", lead.sign(job))
    assert lead.json("Control/Cancel", pb.RunRequest(run=job.id))["state"] == "cancelled"
    assert coordinator.here.receiver.receipt(receiving.upload.upload) is None
    status = lead.denied("Transfer/Push", iter([b"0000"]), commonweight_upload=receiving.upload.upload)
    assert status.code is grpc.StatusCode.UNAVAILABLE

    joining = lead.submit(lead.job(sites=["stopped"]))
    site.task("join", run=joining)
    admin.call("Control/Cancel", pb.RunRequest(run=joining))
    assert lead.wait(joining, "cancelled")["cancelled_by"] == "ada"

    site.answers["join"] = lambda site, task: site.done(task, {"steps": 1, "groups": []})
    site.answers["train"] = idle
    training = lead.submit(lead.job(sites=["stopped"]))
    task = site.task(run=training)
    lead.call("Control/Cancel", pb.RunRequest(run=training))
    lead.wait(training, "cancelled")
    wait_for(lambda: [w for w in site.stay.all("withdraw") if w.task == task.id])
    assert site.update(task).code == Refusal.RUN_ENDED

    site.answers["train"] = lambda site, task: site.train(task)
    finished = lead.submit(lead.job(sites=["stopped"]))
    lead.wait(finished)
    assert lead.json("Control/Cancel", pb.RunRequest(run=finished))["state"] == "finished"
    assert lead.json("Control/Cancel", pb.RunRequest(run=job.id))["state"] == "cancelled"


def test_a_defect_is_not_told_to_strangers(
    coordinator: Coordinator, lead: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the secret is in the words")

    monkeypatch.setattr(coordinator.here.presence, "attending", broken)
    denial = lead.denied("Control/ListSites", pb.ListSitesRequest())
    assert denial.code is grpc.StatusCode.INTERNAL
    assert "secret" not in denial.message

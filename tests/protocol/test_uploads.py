"""Updates as they arrive: every way in which one is refused, and every way in which one is taken up again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch

from commonweight.coordinator.receipts import UpdateReceipt
from commonweight.coordinator.store import Lease
from commonweight.coordinator.tables import leases
from commonweight.coordinator.uploads import MOST_OFFERS
from commonweight.errors import StorageError, UnreachableError
from commonweight.federation.round import DeadlinePassed
from commonweight.model.tensors import NamedTensors
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import header_digest
from commonweight.wire.refusals import Refusal, Refused

from .federations import Coordinator, Hand, Site, chunks_of, frame_for, theta, wait_for

import grpc  # isort: skip

OPEN, ACCEPTED, REFUSED = pb.UploadStatus.OPEN, pb.UploadStatus.ACCEPTED, pb.UploadStatus.REFUSED
Start = Callable[..., tuple[Site, pb.Task]]


def idle(site: Site, task: pb.Task) -> None:
    """Leave a task as it is."""


@pytest.fixture
def start(coordinator: Coordinator, lead: Hand, request: pytest.FixtureRequest) -> Iterator[Start]:
    """A run of one site that was asked to train: the site, and its task."""
    runs = []

    def start(*others: str, **federation: Any) -> tuple[Site, pb.Task]:
        name = f"s{len(coordinator.store.principals('site'))}"
        site = coordinator.site(name, train=idle)
        run = lead.submit(lead.job(sites=[name, *others], **federation))
        runs.append(run)
        return site, site.task(run=run)

    yield start
    for run in runs:
        lead.call("Control/Cancel", pb.RunRequest(run=run))


def lease_of(coordinator: Coordinator, run: str) -> Lease:
    """The lease of the run's leader."""
    query = sa.select(leases).where(leases.c.run == run)
    return Lease(**coordinator.store.database.read(lambda connection: connection.execute(query).mappings().one()))


def messages(tensors: NamedTensors | None = None) -> list[bytes]:
    given = tensors or theta()
    return chunks_of(given, frame_for(given, "delta"))


def files_of(coordinator: Coordinator) -> list[Path]:
    return sorted((coordinator.home / "scratch" / "uploads").glob("*"))


# --- what is refused


def other_layout() -> NamedTensors:
    return NamedTensors.of({"a.weight": torch.zeros(32, 32), "c.weight": torch.zeros(64)})


def other_shape() -> NamedTensors:
    return NamedTensors.of({"a.weight": torch.zeros(16, 64), "b.weight": torch.zeros(64)})


def other_dtype() -> NamedTensors:
    a, b = torch.zeros(32, 32, dtype=torch.float16), torch.zeros(64, dtype=torch.float16)
    return NamedTensors.of({"a.weight": a, "b.weight": b})


def large() -> NamedTensors:
    return NamedTensors.of({"a.weight": torch.zeros(1 << 19)})


REFUSALS: list[tuple[Refusal, str, dict[str, Any]]] = [
    (Refusal.MALFORMED, "frame", {"frame": b"junk"}),
    (Refusal.MALFORMED, "policy", {"policy": "none"}),
    (Refusal.MALFORMED, "metric", {"metrics": {"../loss": 1.0}}),
    (Refusal.MALFORMED, "metric", {"metrics": {"loss": 1e300}}),
    (Refusal.MALFORMED, "metrics", {"metrics": {f"m{k}": 1.0 for k in range(65)}}),
    (Refusal.WRONG_SITE, "names site 'lena'", {"site": "lena"}),
    (Refusal.UNKNOWN_RUN, "no run", {"run": "0" * 32}),
    (Refusal.WRONG_TASK, "no training task", {"task": "another"}),
    (Refusal.WRONG_TASK, "the manifest of 2", {"round": 2}),
    (Refusal.WRONG_BASE, "started from", {"base": "ab" * 32}),
    (Refusal.WRONG_BASE, "started from the model of cluster 1, expected 0", {"cluster": 1}),
    (Refusal.WRONG_SHAPE, "c.weight", {"frame": frame_for(other_layout(), "delta").header}),
    (Refusal.WRONG_SHAPE, "a.weight", {"frame": frame_for(other_shape(), "delta").header}),
    (Refusal.WRONG_SHAPE, "a.weight", {"frame": frame_for(other_dtype(), "delta").header}),
    (Refusal.WRONG_SHAPE, "theta", {"frame": frame_for(theta(), "theta").header}),
    (Refusal.WRONG_SHAPE, "chunks", {"frame": frame_for(theta(), "delta", 2048).header}),
    (Refusal.TOO_LARGE, "2,097,152 bytes", {"frame": frame_for(large(), "delta").header}),
    (Refusal.TOO_LARGE, "too many fields", {"metrics": {f"{k:060}": 1.0 for k in range(2000)}}),
    (Refusal.TOO_LARGE, "beside its frame", {"metrics": {f"{k:05}" * 1000: 1.0 for k in range(20)}}),
    (Refusal.NON_FINITE, "loss", {"metrics": {"loss": float("nan")}}),
    (Refusal.BAD_WEIGHT, "trained on 0", {"num_examples": 0}),
    (Refusal.BAD_WEIGHT, "trained on", {"num_examples": 2**63}),
    (Refusal.BAD_WEIGHT, "took 2 local steps, the task asked for 1", {"num_steps": 2}),
    (Refusal.BAD_WEIGHT, "took 0 local steps", {"num_steps": 0}),
]


@pytest.mark.parametrize(
    ("code", "words", "changes"), REFUSALS, ids=[f"{k}-{code.value}" for k, (code, _, _) in enumerate(REFUSALS)]
)
def test_a_manifest_is_refused_before_anything_is_allocated(
    coordinator: Coordinator, start: Start, code: Refusal, words: str, changes: dict[str, Any]
) -> None:
    site, task = start(retries=0)
    before = files_of(coordinator)
    status = site.open(site.manifest(task, **changes))
    assert (status.state, status.code) == (REFUSED, code)
    assert words in status.reason
    assert files_of(coordinator) == before
    entry = coordinator.audited("update refused", site.name, code.value)
    assert words in entry.details["reason"]


def test_a_manifest_of_another_signer(coordinator: Coordinator, start: Start) -> None:
    site, task = start()
    signed = site.manifest(task)
    for signature in (b"", b"x" * 64, bytes(64), signed.signature[:-1]):
        status = site.open(pb.SignedManifest(manifest=signed.manifest, signature=signature))
        assert (status.state, status.code) == (REFUSED, Refusal.BAD_SIGNATURE)


def test_what_is_a_sites_own_fault_is_a_failure_of_its_task(coordinator: Coordinator, start: Start, lead: Hand) -> None:
    """So that the round need not wait for it until the deadline."""
    site, task = start(retries=1)
    site.answers["train"] = lambda site, task: codes.append(site.open(site.manifest(task, num_examples=0)).code)
    codes = [site.open(site.manifest(task, num_examples=0)).code]
    ended = lead.wait(task.run, "failed")
    assert "trained on 0 examples" in ended["error"]
    tasks = [t for t in site.tasks if t.kind == "train"]
    assert {(t.round, t.base, t.body) for t in tasks} == {(task.round, task.base, task.body)}
    # once, once more, and once when the round itself is repeated
    assert codes == [Refusal.BAD_WEIGHT] * 3 == [Refusal.BAD_WEIGHT] * len({t.id for t in tasks})


def test_a_task_that_is_over_is_no_way_around_the_checks(coordinator: Coordinator, start: Start) -> None:
    """A site that lets its first task fail is asked again; by the first one's id nothing is taken any more."""
    site, task = start(retries=5)
    site.reply(task, pb.TaskReply.FAILED, reason="on purpose")
    again = wait_for(lambda: [t for t in site.tasks if t.kind == "train" and t.id != task.id])[0]
    before = files_of(coordinator)
    for changes, code in (
        ({"frame": frame_for(large(), "delta").header}, Refusal.TOO_LARGE),
        ({"frame": frame_for(other_shape(), "delta").header}, Refusal.WRONG_SHAPE),
        ({"base": "ab" * 32}, Refusal.WRONG_BASE),
        ({}, Refusal.WRONG_TASK),
    ):
        status = site.open(site.manifest(task, **changes))
        assert (status.state, status.code) == (REFUSED, code)
    assert files_of(coordinator) == before
    assert site.update(again).state == ACCEPTED


def test_a_run_that_has_ended(start: Start, lead: Hand) -> None:
    site, task = start()
    assert site.update(task).state == ACCEPTED
    lead.wait(task.run)
    assert site.update(task).state == ACCEPTED  # what counted once counts, and changes nothing
    status = site.update(task, metrics={"loss": 2.0})
    assert (status.state, status.code) == (REFUSED, Refusal.RUN_ENDED)


def test_a_second_update_of_a_round_is_a_replay(coordinator: Coordinator, start: Start) -> None:
    other = coordinator.guest(f"other-{len(coordinator.store.principals())}")
    other.answers["train"] = idle
    other.attend()
    site, task = start(other.name)
    assert site.update(task).state == ACCEPTED
    status = site.update(task, metrics={"loss": 2.0})
    assert (status.state, status.code) == (REFUSED, Refusal.REPLAYED)
    assert [u.digest for u in coordinator.store.accepted_uploads(task.run, 1)] == [
        header_digest(site.manifest(task).manifest)
    ]


def test_a_round_that_is_closed(coordinator: Coordinator, start: Start) -> None:
    name = f"slow-{len(coordinator.store.principals())}"
    slow = coordinator.site(name, train=idle)
    site, task = start(name, rounds=2, quorum=0.5)
    late = slow.task(run=task.run)
    half = slow.open(slow.manifest(late))
    assert slow.push(half.upload, messages()[:2]).state == OPEN
    assert site.update(task).state == ACCEPTED
    coordinator.store.apply(task.run, 1, DeadlinePassed(1), lease=lease_of(coordinator, task.run))
    second = site.task(round=2, run=task.run)
    # the update that was under way, and one that comes only now
    assert (slow.open(slow.manifest(late)).code) == Refusal.ROUND_CLOSED
    assert slow.update(late, metrics={"loss": 3.0}).code == Refusal.ROUND_CLOSED
    wait_for(lambda: coordinator.here.receiver.receipt(half.upload) is None)
    assert site.update(second).state == ACCEPTED


def test_a_round_that_has_enough(coordinator: Coordinator, start: Start) -> None:
    name = f"second-{len(coordinator.store.principals())}"
    second = coordinator.site(name, train=idle)
    site, task = start(name, cohort=1, over_selection=2.0, rounds=2)
    late = second.task(run=task.run)
    half = second.open(second.manifest(late))
    assert site.update(task).state == ACCEPTED
    status = second.open(second.manifest(late, metrics={"loss": 3.0}))
    assert (status.state, status.code) == (REFUSED, Refusal.ENOUGH)
    wait_for(lambda: [w for w in second.stay.all("withdraw") if w.task == late.id])
    denial = second.denied("Transfer/Push", iter(messages()[:1]), commonweight_upload="unknown")
    assert denial.code is grpc.StatusCode.UNAVAILABLE  # to be opened anew, which tells
    assert half.state == OPEN


def test_numbers_that_are_not_finite_are_found_as_they_come(coordinator: Coordinator, start: Start, lead: Hand) -> None:
    name = f"sound-{len(coordinator.store.principals())}"
    coordinator.site(name)
    site, task = start(name)
    for bad in (float("nan"), float("inf"), float("-inf")):
        tensors = theta()
        tensors["b.weight"].view(-1)[3] = bad
        status = site.update(task, tensors)
        assert status.state == REFUSED
        assert status.code in (Refusal.NON_FINITE, Refusal.ROUND_CLOSED, Refusal.RUN_ENDED, Refusal.WRONG_TASK)
        if bad != bad:
            assert "'b.weight'" in status.reason
    ended = lead.wait(task.run)
    assert ended["history"][0]["answered"] == [name]
    assert "NaN or infinity in 'b.weight'" in ended["history"][0]["failed"][site.name]
    assert coordinator.audited("update refused", site.name, "non-finite")
    uploads = [path for path in files_of(coordinator) if path.name.startswith(status.upload)]
    assert not status.upload or not uploads


@pytest.mark.parametrize("message", [b"", b"abc"])
def test_a_chunk_without_an_index(start: Start, message: bytes) -> None:
    site, task = start()
    status = site.push(site.open(site.manifest(task)).upload, [message])
    assert (status.state, status.code) == (REFUSED, Refusal.MALFORMED)


def test_metrics_that_are_named_like_an_events_own_fields_do_no_harm(start: Start, lead: Hand) -> None:
    site, task = start()
    names = ("self", "t", "event", "round", "site", "examples", "loss", "kind", "details")
    assert site.update(task, metrics=dict.fromkeys(names, 7.0)).state == ACCEPTED
    lead.wait(task.run)
    (event,) = [event for event in lead.events(task.run) if event["event"] == "update_accepted"]
    assert (event["round"], event["site"], event["examples"], event["loss"]) == (1, site.name, 10, 7.0)
    assert event["t"] > 1e9


def test_a_site_cannot_offer_any_number_of_updates(coordinator: Coordinator, start: Start) -> None:
    site, task = start()
    before = len(files_of(coordinator))
    codes = [site.open(site.manifest(task, metrics={"loss": float(k)})).code for k in range(MOST_OFFERS + 5)]
    assert codes[: MOST_OFFERS + 1] == [""] * MOST_OFFERS + [Refusal.TOO_LARGE]
    assert all(codes[MOST_OFFERS:])
    assert len(files_of(coordinator)) - before == MOST_OFFERS


# --- what is taken up again


def test_a_chunk_that_is_damaged_on_the_way_is_asked_for_again(start: Start) -> None:
    site, task = start()
    upload, whole = site.open(site.manifest(task)).upload, messages()
    damaged = [
        whole[1][:-1] + b"x",  # another content
        whole[1][:-4],  # cut
        whole[1] + b"more",
        (77).to_bytes(4, "big") + whole[1][4:],  # no such chunk
        whole[2][:4] + whole[1][4:],  # another chunk's content
    ]
    for one in damaged:
        status = site.push(upload, [one])
        assert (status.state, list(status.missing)) == (OPEN, [0, 1, 2, 3, 4])
    status = site.push(upload, [whole[4], whole[1], whole[1]])  # any order, and twice
    assert list(status.missing) == [0, 2, 3]
    assert list(site.open(site.manifest(task)).missing) == [0, 2, 3]
    assert site.push(upload, [whole[k] for k in (3, 0, 2)]).state == ACCEPTED
    assert site.push(upload, []).state == ACCEPTED


def test_a_push_that_is_cut_is_taken_up_where_it_was(coordinator: Coordinator, start: Start) -> None:
    site, task = start()
    upload, whole, stop = site.open(site.manifest(task)).upload, messages(), threading.Event()

    def some() -> Iterator[bytes]:
        yield from whole[:3]
        stop.wait(30)

    call = site.begin("Transfer/Push", some(), commonweight_upload=upload)
    receipt = coordinator.here.receiver.receipt(upload)
    assert receipt is not None
    wait_for(lambda: len(receipt.present) == 3)
    call.cancel()
    stop.set()
    status = site.open(site.manifest(task))
    assert (status.upload, list(status.missing)) == (upload, [3, 4])
    assert site.push(upload, whole[3:]).state == ACCEPTED


def test_two_pushes_of_one_upload_at_once(coordinator: Coordinator, start: Start) -> None:
    """The one that comes too late must not write into a file that was closed, or was handed on."""
    site, task = start()
    upload, whole = site.open(site.manifest(task)).upload, messages()
    receipt = coordinator.here.receiver.receipt(upload)
    assert isinstance(receipt, UpdateReceipt)
    go = threading.Event()

    def slow() -> Iterator[bytes]:
        yield whole[0]
        go.wait(30)
        yield whole[0]
        yield whole[1]

    call = site.begin("Transfer/Push", slow(), commonweight_upload=upload)
    wait_for(lambda: 0 in receipt.present)
    assert site.push(upload, whole).state == ACCEPTED
    go.set()
    assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(UnreachableError):
        coordinator.here.receiver.take(receipt, whole[2])
    assert site.open(site.manifest(task)).state == ACCEPTED


def test_an_upload_outlives_the_process(tmp_path: Path) -> None:
    """What lies in the sealed file is verified anew; what is damaged there is asked for again."""
    with Coordinator(tmp_path) as coordinator:
        lead = coordinator.hand("lena", "lead")
        site, other = coordinator.site("north", train=idle), coordinator.site("south", train=idle)
        run = lead.submit(lead.job(sites=["north", "south"], patience_s=60))
        task, whole = site.task(), messages()
        upload = site.open(site.manifest(task)).upload
        assert list(site.push(upload, [whole[k] for k in (0, 1, 3)]).missing) == [2, 4]
        initial = lead.call("Control/Submit", lead.sign(job := lead.job(sites=["north"]))).upload
        lead.call("Transfer/Push", iter(whole[:1]), commonweight_upload=initial.upload)
        rubbish = coordinator.home / "scratch" / "uploads" / f"{'0' * 32}.sealed"
        rubbish.write_bytes(b"left by a crash")
        coordinator.stop()
        (sealed,) = [path for path in files_of(coordinator) if path.name.startswith(upload)]
        content = bytearray(sealed.read_bytes())
        content[20] ^= 1
        sealed.write_bytes(content)
        coordinator.start()
        assert not rubbish.exists()
        denial = wait_for(lambda: _refused(site, upload, whole))
        assert denial.code is grpc.StatusCode.UNAVAILABLE
        status = site.open(site.manifest(task))
        assert (status.upload, status.state, list(status.missing)) == (upload, OPEN, [0, 2, 4])
        assert site.push(upload, [whole[k] for k in (0, 2, 4)]).state == ACCEPTED
        assert lead.run(run)["state"] == "running"
        site.attend()
        other.attend()
        assert other.update(other.task()).state == ACCEPTED
        assert lead.wait(run)["history"][0]["answered"] == ["north", "south"]
        # a run's initial tensors begin anew
        assert list(lead.call("Control/Submit", lead.sign(job)).upload.missing) == [0, 1, 2, 3, 4]


def _refused(site: Site, upload: str, whole: list[bytes]) -> Any:
    """The denial of a push once the new process answers."""
    denial = site.denied("Transfer/Push", iter(whole[:1]), commonweight_upload=upload)
    return denial if "not open here" in denial.message else None


def test_an_update_whose_last_step_failed_is_accepted_when_it_is_offered_again(
    coordinator: Coordinator, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was stored, the database away: nothing is sent twice."""
    site, task = start()
    accept = coordinator.store.accept_upload

    def away(upload: str, members: Any) -> Any:
        raise StorageError("the database is away", retry=True)

    monkeypatch.setattr(coordinator.store, "accept_upload", away)
    upload = site.open(site.manifest(task)).upload
    denial = site.denied("Transfer/Push", iter(messages()), commonweight_upload=upload)
    assert denial.code is grpc.StatusCode.UNAVAILABLE
    assert denial.details["retry"] is True
    monkeypatch.setattr(coordinator.store, "accept_upload", accept)
    assert site.open(site.manifest(task)).state == ACCEPTED


def test_uploads_that_were_decided_elsewhere_are_dropped(coordinator: Coordinator, start: Start) -> None:
    site, task = start()
    upload = site.open(site.manifest(task)).upload
    assert coordinator.here.receiver.receipt(upload) is not None
    coordinator.store.refuse_upload(upload, Refusal.ROUND_CLOSED, "by another replica")
    coordinator.here.receiver.forget_ended()
    assert coordinator.here.receiver.receipt(upload) is None
    assert not [path for path in files_of(coordinator) if path.name.startswith(upload)]
    status = site.open(site.manifest(task))
    assert (status.state, status.code, status.reason) == (REFUSED, Refusal.ROUND_CLOSED, "by another replica")


def test_nothing_of_a_run_is_left_when_it_has_ended(coordinator: Coordinator, start: Start, lead: Hand) -> None:
    name = f"left-{len(coordinator.store.principals())}"
    other = coordinator.site(name, train=idle)
    site, task = start(name)
    assert site.update(task).state == ACCEPTED
    upload = other.open(other.manifest(other.task(run=task.run))).upload
    other.push(upload, messages()[:2])
    lead.call("Control/Cancel", pb.RunRequest(run=task.run))
    lead.wait(task.run, "cancelled")
    wait_for(lambda: not coordinator.here.blobs.keys(f"runs/{task.run}/updates"))
    wait_for(lambda: coordinator.here.receiver.receipt(upload) is None)
    assert not [path for path in files_of(coordinator) if path.name.startswith(upload)]
    assert not list((coordinator.home / "scratch" / "spares").glob(f"*/{task.run}"))


def test_a_refusal_is_told_by_its_code() -> None:
    for code in Refusal:
        assert Refused(code, "why").code is code

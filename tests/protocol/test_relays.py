"""Relays over the network: equal to the flat result, and nothing lost or counted twice when one dies or lies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from commonweight.coordinator.folder import enroll
from commonweight.identity.folder import IdentityFolder
from commonweight.identity.keys import PARTIAL
from commonweight.identity.tls import TARGET_OPTIONS, channel_credentials, relay_options
from commonweight.lead.client import Client
from commonweight.model.tensors import NamedTensors
from commonweight.recipe.schema import FederationSpec
from commonweight.relay.agent import RelayAgent
from commonweight.relay.settings import RelaySettings, load_settings
from commonweight.site.agent import Agent
from commonweight.site.audit import SiteAudit
from commonweight.site.gate import Gate
from commonweight.site.policy import PolicyFile, policy_text
from commonweight.site.records import SiteRecords
from commonweight.site.settings import DataSettings, SiteSettings
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import Channel, frame_of, plan_for
from commonweight.wire.refusals import Refusal
from commonweight.wire.service import channel_options
from tests.unit.command_line import call
from tests.unit.site_policies import make_policy

from .federations import CHUNK_BYTES, WAIT_S, Coordinator, Hand, Site, chunks_of, frame_for, theta, wait_for
from .test_agent import Bench

import grpc  # isort: skip

ACCEPTED, REFUSED, HELD = pb.UploadStatus.ACCEPTED, pb.UploadStatus.REFUSED, pb.UploadStatus.HELD


def idle(site: Site, task: pb.Task) -> None:
    """Leave a task as it is."""


class Relay:
    """A relay at work in a thread; `stop` leaves its folder as it is, `start` goes on with it."""

    def __init__(self, coordinator: Coordinator, name: str) -> None:
        self.name, self.folder = name, coordinator.folder / "relays" / name
        self.identity = coordinator.enrol(name, "relay")
        self.listen = "127.0.0.1:0"
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.start()

    def start(self) -> None:
        ready = threading.Event()
        settings = RelaySettings(
            name=self.name, address=self.identity.address, listen=self.listen, reached_at=self.listen
        )

        def opened(port: int) -> None:
            self.listen = f"127.0.0.1:{port}"  # where it is found again
            ready.set()

        async def serve() -> None:
            self.agent = RelayAgent(
                settings, self.identity, self.folder, lambda event, **fields: self.log.append((event, fields))
            )
            await self.agent.run(ready=opened)

        self._thread = threading.Thread(target=asyncio.run, args=(serve(),), name=self.name, daemon=True)
        self._thread.start()
        assert ready.wait(WAIT_S)
        wait_for(lambda: "connected" in self.events)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.agent.stop()
            self._thread.join(WAIT_S)
            assert not self._thread.is_alive()

    @property
    def events(self) -> list[str]:
        return [event for event, _ in list(self.log)]

    def kept(self) -> list[Path]:
        """Files with updates in them."""
        return [p for p in self.folder.rglob("*") if p.is_file() and ("updates" in p.parts or p.suffix == ".sealed")]


@pytest.fixture
def relay(coordinator: Coordinator) -> Iterator[Callable[[], Relay]]:
    made: list[Relay] = []

    def make() -> Relay:
        made.append(Relay(coordinator, f"r{len(coordinator.store.principals())}"))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def names(coordinator: Coordinator) -> list[str]:
    count = len(coordinator.store.principals())
    return [f"s{count}-{letter}" for letter in "abc"]


class Visit(Hand):
    """A site, or somebody else, at a relay's door."""

    def __init__(self, identity: IdentityFolder, address: str, relay: str) -> None:
        super().__init__(identity)
        options = [*channel_options(), *relay_options(relay)]
        self.__dict__["channel"] = grpc.secure_channel(address, channel_credentials(identity), options=options)


def send(site: Site, task: pb.Task, tensors: NamedTensors | None = None, /, **changes: Any) -> pb.UploadStatus:
    """Give an update to the relay that a task names."""
    assert task.relay
    visit = Visit(site.identity, task.relay_address, task.relay)
    try:
        signed = site.manifest(task, tensors, **changes)
        status = wait_for(lambda: opened(visit, signed))
        if status.state == pb.UploadStatus.OPEN:
            given = theta() if tensors is None else tensors
            messages = chunks_of(given, frame_for(given, "delta"))
            chosen = [messages[index] for index in status.missing]
            status = visit.call("Transfer/Push", iter(chosen), commonweight_upload=status.upload)
        return status
    finally:
        visit.close()


def opened(visit: Visit, signed: pb.SignedManifest) -> pb.UploadStatus | None:
    """None: the relay has not heard of the round yet."""
    try:
        status: pb.UploadStatus = visit.call("Federation/OpenUpload", signed)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:  # type: ignore[attr-defined]
            raise
        return None
    return status


def withdrawn(site: Site, task: pb.Task) -> None:
    wait_for(lambda: [w for w in site.stay.all("withdraw") if w.task == task.id])


def direct(site: Site, task: pb.Task) -> pb.Task:
    """The same task, offered anew without a relay."""
    return wait_for(lambda: [t for t in list(site.tasks) if t.id == task.id and not t.relay])[0]


def fetched(lead: Hand, run: dict[str, Any]) -> NamedTensors:
    with Client(lead.identity.path) as client:
        return client.frame(run["id"], run["base"])["theta"]


def events(lead: Hand, run: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in lead.events(run) if event["event"] == kind]


def assert_theta(lead: Hand, run: dict[str, Any], factor: float) -> None:
    """θ was `theta()`, and each update a multiple of it: the result must be this multiple."""
    torch.testing.assert_close(fetched(lead, run)["a.weight"], theta()["a.weight"] * factor)


# --- all is well


def test_a_region_counts_by_its_sum(
    coordinator: Coordinator, lead: Hand, relay: Callable[[], Relay], names: list[str]
) -> None:
    upland = relay()
    a, b, alone = (coordinator.site(name, train=idle) for name in names)
    run = lead.submit(lead.job(sites=names, rounds=2, relays={upland.name: names[:2]}, patience_s=30.0))
    for number in (1, 2):
        tasks = [site.task(round=number, run=run) for site in (a, b, alone)]
        assert [task.relay for task in tasks] == [upland.name, upland.name, ""]
        first = a.manifest(tasks[0], theta(1.0), num_examples=10)
        assert send(a, tasks[0], theta(1.0)).state == HELD
        assert send(a, tasks[0], theta(1.0)).state == HELD  # saying it again changes nothing
        assert alone.update(tasks[2], theta(3.0)).state == ACCEPTED
        assert send(b, tasks[1], theta(2.0), num_examples=30).state == HELD
        withdrawn(a, tasks[0])
        withdrawn(b, tasks[1])
        # the coordinator has it, though it never had a byte of it
        assert a.open(first).state == ACCEPTED
        other = a.open(a.manifest(tasks[0], theta(1.0), metrics={"loss": 2.0}))
        assert (other.state, other.code) == (REFUSED, Refusal.REPLAYED)
    ended = lead.wait(run)
    # 1 + 1·(10·1 + 30·2 + 10·3)/50, twice, each update being a multiple of the first θ
    assert_theta(lead, ended, 1 + 2 * (10 + 60 + 30) / 50)
    history = ended["history"]
    assert [sorted(one["answered"]) for one in history] == [sorted(names)] * 2
    size = theta().layout.num_bytes
    assert [(one["bytes_up"], one["bytes_received"]) for one in history] == [(3 * size, 2 * size)] * 2
    accepted = [e for e in coordinator.audit("partial sum accepted") if e.subject == run]
    assert [(e.actor, e.details["sites"]) for e in accepted] == [(upland.name, 2)] * 2
    by_relay = [e.actor for e in coordinator.audit("update accepted") if e.details.get("relay") == upland.name]
    assert by_relay == names[:2] * 2
    wait_for(lambda: "run.ended" in upland.events)
    assert upland.kept() == []


def test_a_site_that_answers_itself_is_in_no_sum(
    coordinator: Coordinator, lead: Hand, relay: Callable[[], Relay], names: list[str]
) -> None:
    upland = relay()
    a, b = (coordinator.site(name, train=idle) for name in names[:2])
    run = lead.submit(lead.job(sites=names[:2], relays={upland.name: names[:2]}, patience_s=30.0))
    tasks = [site.task(run=run) for site in (a, b)]
    assert send(a, tasks[0], theta(1.0)).state == HELD
    assert a.update(tasks[0], theta(1.0)).state == ACCEPTED  # it thought the relay dead
    assert send(b, tasks[1], theta(3.0)).state == HELD
    ended = lead.wait(run)
    assert_theta(lead, ended, 1 + (1 + 3) / 2)
    accepted = [e for e in coordinator.audit("partial sum accepted") if e.subject == run]
    assert [e.details["sites"] for e in accepted] == [1]
    assert ended["history"][0]["bytes_received"] == 2 * theta().layout.num_bytes


def test_a_relay_does_not_wait_for_a_site_that_has_failed(
    coordinator: Coordinator, lead: Hand, relay: Callable[[], Relay], names: list[str]
) -> None:
    upland = relay()
    a, b = (coordinator.site(name, train=idle) for name in names[:2])
    job = lead.job(sites=names[:2], relays={upland.name: names[:2]}, patience_s=30.0, quorum=0.5, retries=0)
    run = lead.submit(job)
    assert send(a, a.task(run=run), theta(1.0)).state == HELD
    b.reply(b.task(run=run), pb.TaskReply.FAILED, reason="out of memory")
    ended = lead.wait(run)
    assert ended["history"][0]["answered"] == [a.name]
    assert_theta(lead, ended, 2.0)


def test_a_round_that_is_begun_anew_keeps_a_regions_sum(
    coordinator: Coordinator, lead: Hand, relay: Callable[[], Relay], names: list[str]
) -> None:
    upland = relay()
    a, b = (coordinator.site(name, train=idle) for name in names[:2])

    def third_time(site: Site, task: pb.Task) -> None:
        tries.append(task.id)
        if len(tries) < 3:
            wait_for(lambda: [e for e in coordinator.audit("partial sum accepted") if e.subject == task.run])
            site.reply(task, pb.TaskReply.FAILED, reason="not yet")
        else:
            site.update(task, theta(3.0))

    tries: list[str] = []
    coordinator.site(names[2], train=third_time)
    job = lead.job(sites=names, relays={upland.name: names[:2]}, quorum=1.0, retries=1)
    run = lead.submit(job)
    for site in (a, b):
        assert send(site, site.task(run=run), theta(1.0)).state == HELD
    ended = lead.wait(run)
    assert len(events(lead, run, "round_repeated")) == 1
    assert_theta(lead, ended, 1 + 5 / 3)
    assert len([task for task in a.tasks if task.kind == "train"]) == 1


# --- a relay that dies


def test_a_relay_that_dies_before_it_delivers(
    coordinator: Coordinator, lead: Hand, relay: Callable[[], Relay], names: list[str]
) -> None:
    upland = relay()
    a, b = (coordinator.site(name, train=idle) for name in names[:2])
    run = lead.submit(lead.job(sites=names[:2], rounds=2, relays={upland.name: names[:2]}))
    tasks = [site.task(round=1, run=run) for site in (a, b)]
    assert send(a, tasks[0], theta(1.0)).state == HELD
    upland.stop()
    for site, task in zip((a, b), tasks, strict=True):  # the work that they have done goes to the coordinator
        assert site.update(direct(site, task), theta(1.0)).state == ACCEPTED
    tasks = [site.task(round=2, run=run) for site in (a, b)]
    assert [task.relay for task in tasks] == ["", ""]
    for site, task in zip((a, b), tasks, strict=True):
        assert site.update(task, theta(1.0)).state == ACCEPTED
    assert_theta(lead, lead.wait(run), 3.0)
    assert [e["relay"] for e in events(lead, run, "relay_given_up")] == [upland.name]


def test_a_relay_that_comes_back_goes_on(
    coordinator: Coordinator, lead: Hand, relay: Callable[[], Relay], names: list[str]
) -> None:
    upland = relay()
    a, b = (coordinator.site(name, train=idle) for name in names[:2])
    run = lead.submit(lead.job(sites=names[:2], relays={upland.name: names[:2]}, patience_s=60.0))
    tasks = [site.task(run=run) for site in (a, b)]
    assert send(a, tasks[0], theta(1.0)).state == HELD
    upland.stop()
    assert upland.kept()
    upland.log.clear()
    upland.start()
    assert send(b, tasks[1], theta(2.0)).state == HELD
    assert_theta(lead, lead.wait(run), 1 + 1.5)
    assert [e.details["sites"] for e in coordinator.audit("partial sum accepted") if e.subject == run] == [2]
    assert events(lead, run, "relay_given_up") == []


def test_a_relay_that_never_comes(coordinator: Coordinator, lead: Hand, names: list[str]) -> None:
    """Enrolled, and not here: asked, not waited for beyond the recipe's patience."""
    coordinator.enrol(f"{names[0]}-relay", "relay")
    a = coordinator.site(names[0])
    run = lead.submit(lead.job(sites=names[:1], relays={f"{names[0]}-relay": names[:1]}))
    lead.wait(run)
    assert [task.relay for task in a.tasks] == [""] * len(a.tasks)


def test_a_relay_that_nobody_has_enrolled(coordinator: Coordinator, lead: Hand, names: list[str]) -> None:
    a = coordinator.site(names[0])
    lead.wait(lead.submit(lead.job(sites=names[:1], relays={"nowhere": names[:1], "lena": names[1:2]})))
    assert [task.relay for task in a.tasks] == [""] * len(a.tasks)


def test_a_coordinator_that_is_started_anew_in_the_middle(
    tmp_path: Path,
) -> None:
    with Coordinator(tmp_path) as coordinator:
        lead, upland = coordinator.hand("lena", "lead"), Relay(coordinator, "upland")
        a, b = (coordinator.site(name, train=idle) for name in "ab")
        run = lead.submit(lead.job(sites=["a", "b"], relays={"upland": ["a", "b"]}, patience_s=60.0))
        tasks = [site.task(run=run) for site in (a, b)]
        assert send(a, tasks[0], theta(1.0)).state == HELD
        coordinator.restart()
        a.attend()
        b.attend()
        assert send(b, tasks[1], theta(2.0)).state == HELD
        assert_theta(lead, lead.wait(run), 1 + 1.5)
        upland.stop()


# --- a relay that lies


class Liar(Site):
    """A relay that answers as a test tells it to."""

    def serve(self, coordinator: Coordinator) -> Liar:
        coordinator.hold(self.identity)
        self.answers["join"] = lambda site, task: site.done(task, {"address": "127.0.0.1:1"})
        self.answers["relay"] = idle
        self.attend()
        return self

    def partial(self, task: pb.Task, members: list[pb.SignedManifest], /, **changes: Any) -> pb.SignedPartial:
        tensors = theta()
        plan = plan_for(tensors.layout, (Channel("delta", wide=True),), CHUNK_BYTES)
        values: dict[str, Any] = {
            "run": task.run,
            "round": task.round,
            "task": task.id,
            "relay": self.name,
            "base": task.base,
            "frame": frame_of({"delta": tensors}, plan).header,
            "members": members,
            "total_weight": 10.0 * len(members),
        }
        partial = pb.Partial(**{**values, **changes}).SerializeToString(deterministic=True)
        return pb.SignedPartial(partial=partial, signature=self.identity.signing_key.sign(PARTIAL, partial))


def forged(a: Site, b: Site, task: pb.Task, other: pb.Task) -> dict[str, Any]:
    """b's manifest, with a's signature."""
    signed = b.manifest(other)
    return {"members": [a.manifest(task), pb.SignedManifest(manifest=signed.manifest, signature=bytes(64))]}


LIES: list[tuple[Refusal, str, Callable[[Site, Site, pb.Task, pb.Task], dict[str, Any]]]] = [
    (Refusal.BAD_SIGNATURE, "not by the key of that site", forged),
    (Refusal.BAD_WEIGHT, "of weight 1000", lambda a, b, s, t: {"total_weight": 1000.0}),
    (Refusal.BAD_WEIGHT, "of weight nan", lambda a, b, s, t: {"total_weight": float("nan")}),
    (Refusal.MALFORMED, "a site is twice", lambda a, b, s, t: {"members": [a.manifest(s), a.manifest(s)]}),
    (Refusal.MALFORMED, "0 updates", lambda a, b, s, t: {"members": []}),
    (Refusal.WRONG_TASK, "no open training task", lambda a, b, s, t: {"members": [a.manifest(s, task="x")]}),
    (Refusal.WRONG_TASK, "the partial sum of 2", lambda a, b, s, t: {"members": [a.manifest(s)], "round": 2}),
    (Refusal.BAD_WEIGHT, "3 local steps", lambda a, b, s, t: {"members": [a.manifest(s, num_steps=3)]}),
    (Refusal.WRONG_BASE, "started from", lambda a, b, s, t: {"members": [a.manifest(s, base="ab" * 32)]}),
    (Refusal.WRONG_SHAPE, "does not fit the run", lambda a, b, s, t: {"frame": frame_for(theta(), "delta").header}),
    (Refusal.WRONG_SITE, "names relay 'lena'", lambda a, b, s, t: {"relay": "lena"}),
    (Refusal.WRONG_TASK, "given to this relay", lambda a, b, s, t: {"task": s.id}),
    (Refusal.UNKNOWN_RUN, "no run", lambda a, b, s, t: {"run": "0" * 32}),
]


@pytest.fixture
def liar(coordinator: Coordinator) -> Iterator[Liar]:
    name = f"liar{len(coordinator.store.principals())}"
    liar = Liar(coordinator.enrol(name, "relay"), {}).serve(coordinator)
    yield liar
    liar.close()


@pytest.mark.parametrize(("code", "words", "lie"), LIES, ids=[f"{k}-{lie[0].value}" for k, lie in enumerate(LIES)])
def test_a_relay_that_lies_is_refused_and_its_sites_send_themselves(
    coordinator: Coordinator, lead: Hand, liar: Liar, names: list[str], code: Refusal, words: str, lie: Any
) -> None:
    a, b = (coordinator.site(name, train=idle) for name in names[:2])
    run = lead.submit(lead.job(sites=names[:2], relays={liar.name: names[:2]}, patience_s=30.0))
    tasks = [site.task(run=run) for site in (a, b)]
    task = liar.task("relay", run=run)
    values = {"members": [a.manifest(tasks[0]), b.manifest(tasks[1])], **lie(a, b, *tasks)}
    members = values.pop("members")
    status = liar.call("Federation/OpenPartial", liar.partial(task, members, **values))
    assert (status.state, status.code) == (REFUSED, code), status.reason
    assert words in status.reason
    assert coordinator.audited("partial sum refused", liar.name, code.value)
    if {"task", "run", "relay"} & set(values):  # nothing of it was about this task
        liar.reply(task, pb.TaskReply.FAILED, reason="enough")
    for site, one in zip((a, b), tasks, strict=True):
        assert site.update(direct(site, one), theta(1.0)).state == ACCEPTED
    assert_theta(lead, lead.wait(run), 2.0)


def test_a_sum_with_a_site_that_has_answered_is_refused_whole(
    coordinator: Coordinator, lead: Hand, liar: Liar, names: list[str]
) -> None:
    a, b = (coordinator.site(name, train=idle) for name in names[:2])
    run = lead.submit(lead.job(sites=names[:2], relays={liar.name: names[:2]}, patience_s=30.0))
    tasks, task = [site.task(run=run) for site in (a, b)], liar.task("relay", run=run)
    signed = liar.partial(task, [a.manifest(tasks[0]), b.manifest(tasks[1])])
    opened = liar.call("Federation/OpenPartial", signed)
    assert opened.state == pb.UploadStatus.OPEN
    assert a.update(tasks[0], theta(1.0)).state == ACCEPTED
    tensors = theta()
    plan = plan_for(tensors.layout, (Channel("delta", wide=True),), CHUNK_BYTES)
    messages = chunks_of(tensors, frame_of({"delta": tensors}, plan))
    status = liar.call("Transfer/Push", iter(messages), commonweight_upload=opened.upload)
    assert (status.state, status.code) == (REFUSED, Refusal.REPLAYED)
    assert b.update(direct(b, tasks[1]), theta(1.0)).state == ACCEPTED
    assert_theta(lead, lead.wait(run), 2.0)


def test_a_site_of_another_region(coordinator: Coordinator, lead: Hand, liar: Liar, names: list[str]) -> None:
    a, b = (coordinator.site(name, train=idle) for name in names[:2])
    run = lead.submit(lead.job(sites=names[:2], relays={liar.name: names[:1]}, patience_s=30.0))
    tasks, task = [site.task(run=run) for site in (a, b)], liar.task("relay", run=run)
    assert [t.relay for t in tasks] == [liar.name, ""]
    status = liar.call("Federation/OpenPartial", liar.partial(task, [b.manifest(tasks[1])]))
    assert (status.state, status.code) == (REFUSED, Refusal.NOT_INVITED)
    for site, one in zip((a, b), (direct(a, tasks[0]), tasks[1]), strict=True):
        assert site.update(one, theta(1.0)).state == ACCEPTED
    lead.wait(run)


def test_a_relay_that_keeps_what_it_has(coordinator: Coordinator, lead: Hand, liar: Liar, names: list[str]) -> None:
    """It attends, and all of its sites say that it holds their updates, but no sum comes."""
    a = coordinator.site(names[0], train=idle)
    run = lead.submit(lead.job(sites=names[:1], relays={liar.name: names[:1]}, patience_s=0.05))
    task = a.task(run=run)
    liar.task("relay", run=run)
    a.reply(task, pb.TaskReply.HELD)
    assert a.update(direct(a, task), theta(1.0)).state == ACCEPTED
    lead.wait(run)
    assert "has had all of its sites' updates" in events(lead, run, "relay_given_up")[0]["reason"]


# --- who may do what


def test_a_relays_certificate_is_good_for_nothing_else(
    coordinator: Coordinator, lead: Hand, liar: Liar, relay: Callable[[], Relay], names: list[str]
) -> None:
    upland = relay()
    a = coordinator.site(names[0], train=idle)
    run = lead.submit(lead.job(sites=names[:1], relays={upland.name: names[:1]}, patience_s=30.0))
    task = a.task(run=run)
    denied = grpc.StatusCode.PERMISSION_DENIED
    assert liar.denied("Federation/OpenUpload", a.manifest(task)).code is denied
    assert liar.denied("Control/ListRuns", pb.ListRunsRequest()).code is denied
    assert liar.denied("Transfer/Fetch", pb.FetchRequest(run=run, frame=task.base)).code is denied
    assert "does not name the relay" in liar.denied("Federation/GetJob", pb.JobRequest(run=run)).message
    other = upland.agent.identity
    asked = Hand(other).denied("Federation/Region", pb.RegionRequest(task=task.id))
    assert "was given to this relay" in asked.message
    for method, request in (("OpenPartial", pb.SignedPartial()), ("Region", pb.RegionRequest(task=task.id))):
        assert a.denied(f"Federation/{method}", request).code is denied
        assert lead.denied(f"Federation/{method}", request).code is denied
    # at the relay's door: sites alone, and of its region
    for hand, words in ((lead, "a lead may not call"), (liar, "a relay may not call")):
        visit = Visit(hand.identity, task.relay_address, upland.name)
        assert words in visit.denied("Transfer/Push", iter([b"x"]), commonweight_upload="x").message
        visit.close()
    stranger = coordinator.guest(names[1])
    visit = Visit(stranger.identity, task.relay_address, upland.name)
    wait_for(lambda: upland.agent.depot.store.task(task.id))
    status = visit.call("Federation/OpenUpload", stranger.manifest(task))
    assert (status.state, status.code) == (REFUSED, Refusal.WRONG_TASK)
    visit.close()
    # it passes for no other relay, and for no coordinator
    for options in (relay_options(liar.name), TARGET_OPTIONS):
        credentials = channel_credentials(a.identity)
        channel = grpc.secure_channel(task.relay_address, credentials, options=list(options))
        with channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=1)
    lead.call("Control/Cancel", pb.RunRequest(run=run))


@pytest.mark.parametrize(
    ("code", "changes", "value"),
    [
        (Refusal.NON_FINITE, {}, float("nan")),
        (Refusal.BAD_WEIGHT, {"num_steps": 5}, 1.0),
        (Refusal.WRONG_BASE, {"base": "ab" * 32}, 1.0),
        (Refusal.WRONG_SHAPE, {"frame": frame_for(theta(), "theta").header}, 1.0),
    ],
)
def test_a_relay_checks_what_a_coordinator_checks(
    coordinator: Coordinator,
    lead: Hand,
    relay: Callable[[], Relay],
    names: list[str],
    code: Refusal,
    changes: dict[str, Any],
    value: float,
) -> None:
    upland = relay()
    a = coordinator.site(names[0], train=idle)
    run = lead.submit(lead.job(sites=names[:1], relays={upland.name: names[:1]}, patience_s=30.0))
    task = a.task(run=run)
    tensors = theta()
    tensors["b.weight"].view(-1)[3] = value
    status = send(a, task, tensors, **changes)
    assert (status.state, status.code) == (REFUSED, code)
    lead.call("Control/Cancel", pb.RunRequest(run=run))


# --- a whole agent


class AgentSite:
    """A site's own agent, in a thread."""

    def __init__(self, coordinator: Coordinator, name: str, relays: list[str]) -> None:
        self.folder = coordinator.folder / "agents" / name
        self.folder.mkdir(parents=True)
        identity = coordinator.enrol(name, "site")
        policy = make_policy(
            models=["any"],
            signers=["any"],
            purposes=["any"],
            relays=relays,
            min_cohort=1,
            max_bytes_per_round=1_000_000,
            max_bytes_total=1_000_000,
        )
        (self.folder / "policy.yaml").write_text(policy_text(policy))
        self.records = SiteRecords(self.folder / "state.sqlite")
        self.audit = SiteAudit(self.folder / "audit.jsonl", self.records)
        self.bench = Bench()
        settings = SiteSettings(name=name, address=identity.address, data=DataSettings(path=str(self.folder)))
        self.log: list[str] = []

        async def attend() -> None:
            self.agent = Agent(
                settings,
                identity,
                self.bench,  # type: ignore[arg-type]
                PolicyFile(self.folder / "policy.yaml"),
                self.records,
                self.audit,
                log=lambda event, **fields: self.log.append(event),
            )
            await self.agent.run()

        self._thread = threading.Thread(target=asyncio.run, args=(attend(),), name=name, daemon=True)
        self._thread.start()

    def left_to(self) -> list[str]:
        return [row["to"] for row in self.audit.rows() if row["what"] == "update"]

    def stop(self) -> None:
        wait_for(lambda: hasattr(self, "agent"))
        self.agent.stop()
        self._thread.join(WAIT_S)
        self.records.close()


def test_an_agent_leaves_a_relay_that_is_given_up(
    coordinator: Coordinator, lead: Hand, relay: Callable[[], Relay], names: list[str]
) -> None:
    upland = relay()
    site, slow = AgentSite(coordinator, names[0], [upland.name]), coordinator.site(names[1], train=idle)
    try:
        run = lead.submit(lead.job(sites=names[:2], relays={upland.name: names[:2]}))
        task = slow.task(run=run)
        wait_for(lambda: "update.held" in site.log)
        upland.stop()
        assert slow.update(direct(slow, task)).state == ACCEPTED
        ended = lead.wait(run)
        assert sorted(ended["history"][0]["answered"]) == sorted(names[:2])
        assert [call for call in site.bench.calls if call.startswith("train")] == ["train 1"]
        assert site.left_to() == [f"relay {upland.name} ({upland.listen})", *[coordinator.settings.address] * 2]
        assert "update.accepted" in site.log
    finally:
        site.stop()


def test_an_agent_whose_policy_lists_no_relay_passes_it_by(
    coordinator: Coordinator, lead: Hand, relay: Callable[[], Relay], names: list[str]
) -> None:
    upland = relay()
    site, other = AgentSite(coordinator, names[0], []), AgentSite(coordinator, names[1], ["any"])
    try:
        coordinator.site(names[2])
        run = lead.submit(lead.job(sites=names, relays={upland.name: names[:2]}, patience_s=30.0))
        lead.wait(run)
        assert "relay.passed_by" in site.log
        assert site.left_to() == [coordinator.settings.address]
        assert "update.held" in other.log
        # to the relay; to the coordinator nothing but the manifest, which asks whether it counts
        assert other.left_to()[0] == f"relay {upland.name} ({upland.listen})"
        sizes = [row["bytes"] for row in other.audit.rows() if row["what"] == "update"]
        assert sizes[1] < theta().layout.num_bytes
    finally:
        site.stop()
        other.stop()


def test_a_coordinator_alone_cannot_send_an_update_elsewhere(coordinator: Coordinator, names: list[str]) -> None:
    """The signed job must name the relay for this site, and the site's policy must list it."""
    folder, identity = coordinator.folder / names[0], coordinator.enrol(names[0], "site")
    folder.mkdir()
    records = SiteRecords(folder / "state.sqlite")
    audit = SiteAudit(folder / "audit.jsonl", records)
    gate = Gate(
        folder, lambda: identity, PolicyFile(folder / "policy.yaml"), records, audit, lambda *_, **__: None, to=""
    )
    known: Any = SimpleNamespace(federation=FederationSpec(relays={"upland": names[:1], "lowland": names[1:2]}))
    for listed, relay, expected in (
        (["upland"], "upland", "upland"),
        (["any"], "upland", "upland"),
        (["any"], "lowland", ""),
        (["any"], "elsewhere", ""),
        (["lowland"], "upland", ""),
        ([], "upland", ""),
        (["any"], "", ""),
    ):
        (folder / "policy.yaml").write_text(policy_text(make_policy(relays=listed)))
        assert gate.relay_for(known, pb.Task(relay=relay)) == expected, (listed, relay)
    records.close()


# --- the commands


def test_joining_as_a_relay(coordinator: Coordinator, names: list[str], tmp_path: Path) -> None:
    def token(name: str, role: str) -> str:
        return enroll(coordinator.home, name, role).to_text()

    name, home = f"{names[0]}-relay", tmp_path / "relay"
    at = ("--reached-at", "relay.example.org:8445")
    joined = call("relay", "join", token(name, "relay"), home, *at)
    assert joined.code == 0, joined.err
    settings = load_settings(home)
    assert (settings.name, settings.reached_at, settings.listen) == (name, at[1], "0.0.0.0:8445")
    again = call("relay", "join", token(name, "relay"), home, *at, "--json").json
    assert (again["relay"], again["coordinator"]) == (name, coordinator.settings.address)
    for command, role, words in (
        (("relay", "join"), "site", "use it by: commonweight site join TOKEN DIR"),
        (("site", "join"), "relay", "use it by: commonweight relay join TOKEN DIR"),
    ):
        refused = call(*command, token(names[1], role), tmp_path / "other", *(at if command[0] == "relay" else ()))
        assert (refused.code, words in refused.err) == (8, True), refused.err
    wrong = call("relay", "join", token(f"{name}-2", "relay"), tmp_path / "third", "--reached-at", "nowhere")
    assert (wrong.code, "host:port" in wrong.err) == (2, True), wrong.err
    nothing = call("relay", "run", tmp_path / "nothing")
    assert (nothing.code, "is no relay's folder" in nothing.err) == (6, True), nothing.err
    text = (home / "relay.yaml").read_text()
    (home / "relay.yaml").write_text(text.replace(name, "another"))
    other = call("relay", "run", home)
    assert (other.code, "relay.yaml is of relay another" in other.err) == (8, True), other.err

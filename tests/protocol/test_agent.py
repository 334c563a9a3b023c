"""The site's agent against a coordinator that vanishes, falls silent, cuts, damages, doubles and lies."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from commonweight.errors import AccessError, SiteError, StorageError
from commonweight.federation.messages import EvaluateTask, TrainTask
from commonweight.model.tensors import NamedTensors, Room, in_memory
from commonweight.privacy.spending import UNPROTECTED
from commonweight.site import ahead, link, outbox
from commonweight.site.agent import Agent
from commonweight.site.audit import SiteAudit
from commonweight.site.gate import Alarm
from commonweight.site.inbox import FrameFile, Inbox, write_frame
from commonweight.site.log import SiteLog
from commonweight.site.outbox import Outbox, Parcel
from commonweight.site.policy import PolicyFile
from commonweight.site.records import SiteRecords
from commonweight.site.settings import DataSettings, SiteSettings
from commonweight.site.workshop import Work
from commonweight.train.local import Cancelled
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import unpack_chunk
from commonweight.wire.manifest import check_chunk
from commonweight.wire.service import UPLOAD_KEY

from .fake_coordinator import Body, FakeCoordinator, People, signed_job

import grpc  # isort: skip
import grpc.aio  # isort: skip

WAIT_S = 30.0
DONE, TAKEN, REFUSED, FAILED = pb.TaskReply.DONE, pb.TaskReply.TAKEN, pb.TaskReply.REFUSED, pb.TaskReply.FAILED

RECIPE = """\
name: small
model: {name: commonweight/tiny}
data: {path: rows.jsonl, prompt: "{question}", completion: "{answer}", sites: {by: site}}
federation: {rounds: 3}
"""

POLICY: dict[str, Any] = {
    "models": ["any"],
    "signers": ["any"],
    "kinds": ["train", "evaluate"],
    "purposes": ["any"],
    "strategies": ["built-in"],
    "objectives": ["built-in"],
    "relays": [],
    "min_cohort": 1,
    "max_rounds": 10,
    "max_bytes_per_round": 10_000_000,
    "max_bytes_total": 100_000_000,
    "privacy": {
        "dp_required": False,
        "max_epsilon": None,
        "budget": None,
        "secure_aggregation_required": False,
        "own_noise_required": False,
    },
    "remote_code": False,
    "approval": "none",
    "share": {"scores": "rows", "samples": False},
}

SCORES = {"north": {"nll": [1.0, 2.0], "tokens": [3, 4], "correct": [1, 2]}}

_next_wait = link.Backoff.next_s


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link.Backoff, "next_s", lambda self: 0.02)


def theta(seed: int = 0) -> dict[str, NamedTensors]:
    """14 chunks of theta in two dtypes and 18 of a wide slot."""
    torch.manual_seed(seed)
    tensors = NamedTensors.of({"a": torch.randn(40, 25), "b": torch.randn(4608).to(torch.bfloat16)})
    slot = NamedTensors.zeros(tensors.layout, wide=True)
    for flat in slot.flats.values():
        flat.copy_(torch.randn(flat.numel()))
    return {"theta": tensors, "slot/momentum": slot}


def body_of(channels: dict[str, NamedTensors]) -> Body:
    return Body.of(channels, wide=("slot/momentum",))


class Bench:
    """A workshop that adds one to everything, and can be held up."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.forgotten: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None
        self.base: Mapping[str, NamedTensors] = {}
        self.cancelled = 0
        self.drawn = NamedTensors.of({})

    def join(self, job: Any, progress: Any = None) -> dict[str, Any]:
        self.calls.append(f"join {job.id}")
        return {"steps": 2, "groups": ["1", "1", "2"], "train_examples": 5}

    def initial(self, run: str, progress: Any = None) -> NamedTensors:
        self.calls.append("initial")
        return self.drawn

    def train(
        self, run: str, task: TrainTask, base: Mapping[str, NamedTensors], *, cancelled: Any, progress: Any, **_: Any
    ) -> Work:
        self.calls.append(f"train {task.round}")
        progress("step 1 of 2")
        while not self.go.wait(0.01):
            if cancelled():
                self.cancelled += 1
                raise Cancelled("stopped")
        if self.error is not None:
            raise self.error
        self.base = base
        delta = base["theta"].clone()
        for flat in delta.flats.values():
            flat.add_(1)
        return Work({"delta": delta}, 5, 50, task.steps, {"loss": 1.5})

    def answer(self, run: str, task: Any, base: Mapping[str, NamedTensors], **_: Any) -> dict[str, Any]:
        self.calls.append(type(task).__name__)
        if self.error is not None:
            raise self.error
        return SCORES if isinstance(task, EvaluateTask) else {"answers": [{"answer": "x"}]}

    def forget(self, run: str) -> None:
        self.forgotten.append(run)


class Site:
    """One site's folder, its agent and what that logs."""

    def __init__(self, folder: Path, people: People, port: Callable[[], int], name: str = "north") -> None:
        self.folder, self.name, self.port = folder / name, name, port
        self.folder.mkdir()
        self.identity = people.enrol(name, "site")
        self.bench = Bench()
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.options: dict[str, Any] = {}
        self.policy()
        self.agent: Agent
        self.task: asyncio.Task[None]

    def policy(self, **changes: Any) -> None:
        (self.folder / "policy.yaml").write_text(json.dumps({**POLICY, **changes}))

    def start(self, *, signals: bool = False) -> None:
        self.records = SiteRecords(self.folder / "state.sqlite")
        self.audit = SiteAudit(self.folder / "audit.jsonl", self.records)
        settings = SiteSettings(
            name=self.name, address=f"127.0.0.1:{self.port()}", data=DataSettings(path="rows.jsonl")
        )
        options = {"open_channel": lambda: grpc.aio.insecure_channel(f"127.0.0.1:{self.port()}"), **self.options}
        self.agent = Agent(
            settings,
            self.identity,
            self.bench,
            PolicyFile(self.folder / "policy.yaml"),
            self.records,
            self.audit,
            log=lambda event, **fields: self.log.append((event, fields)),
            **options,
        )
        self.task = asyncio.create_task(self.agent.run(signals=signals))

    async def stop(self) -> None:
        self.agent.stop()
        await asyncio.wait_for(asyncio.gather(self.task, return_exceptions=True), WAIT_S)
        self.records.close()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.log if event == name]

    def audited(self, what: str) -> list[dict[str, Any]]:
        return [row for row in self.audit.rows() if row["what"] == what]


class Stage:
    """A coordinator and a site, a run whose job is known, and its tensors."""

    def __init__(
        self,
        folder: Path,
        *,
        bench: Bench | None = None,
        kind: type[FakeCoordinator] = FakeCoordinator,
        **coordinator: Any,
    ) -> None:
        self.people = People(folder)
        self.lead = self.people.enrol("lena", "lead")
        self.coordinator = kind(self.people, **coordinator)
        self.site = Site(folder, self.people, lambda: self.coordinator.port)
        self.site.bench = bench or self.site.bench
        self.channels = theta()
        self.body = body_of(self.channels)
        self.base = self.coordinator.add(self.body)
        self.add_job("run1")

    def add_job(self, run: str, **changes: Any) -> None:
        self.coordinator.jobs[run] = signed_job(self.lead, run, RECIPE, self.body.frame.header, **changes)

    def offer(self, id: str, kind: str = "train", *, run: str = "run1", round: int = 1, base: str = "") -> pb.Task:
        bodies: dict[str, dict[str, Any]] = {
            "join": {},
            "train": {"round": round, "site": "north", "lr": 0.1, "steps": 2},
            "evaluate": {"sites": ["north"]},
            "sample": {"prompts": [["north", 0]]},
        }
        task = pb.Task(id=id, run=run, round=round, kind=kind, body=json.dumps(bodies[kind]).encode())
        if kind != "join":
            task.base = base or self.base
        self.coordinator.send(task=task)
        return task

    async def attended(self, visits: int = 1) -> None:
        await until(lambda: len(self.coordinator.visits) >= visits and self.site.agent.link.current is not None)

    async def ended(self, task: str) -> pb.TaskReply:
        await until(lambda: self.coordinator.last_reply(task) is not None)
        reply = self.coordinator.last_reply(task)
        assert reply is not None
        return reply


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not true():
            await asyncio.sleep(0.005)


def play(folder: Path, scene: Callable[[Stage], Awaitable[None]], *, start: bool = True, **coordinator: Any) -> None:
    """Play a scene with coordinator and site running, and stop both."""

    async def whole() -> None:
        stage = Stage(folder, **coordinator)
        await stage.coordinator.start()
        if start:
            stage.site.start()
            await stage.attended()
        try:
            await scene(stage)
        finally:
            await stage.site.stop()
            await stage.coordinator.stop()

    asyncio.run(whole())


# ---- attendance


def test_a_whole_run(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        site, coordinator = stage.site, stage.coordinator
        stage.offer("j", "join", round=0)
        assert json.loads((await stage.ended("j")).result)["groups"] == ["1", "1", "2"]
        stage.offer("t")
        assert (await stage.ended("t")).state == DONE
        stage.offer("e", "evaluate")
        assert json.loads((await stage.ended("e")).result) == SCORES
        (upload,) = coordinator.uploads.values()
        assert upload.state == pb.UploadStatus.ACCEPTED
        assert coordinator.signed_by(upload, site.identity)
        assert (upload.manifest.site, upload.manifest.base, upload.manifest.num_examples) == ("north", stage.base, 5)
        sent = torch.frombuffer(bytearray(upload.chunks[0]), dtype=torch.float32)
        assert torch.equal(sent, stage.channels["theta"].flats[torch.float32][: len(sent)] + 1)
        assert torch.equal(
            site.bench.base["slot/momentum"]["b"], stage.channels["slot/momentum"]["b"]
        )  # a wide channel came wide
        assert coordinator.jobs_asked == {"run1": 1}
        assert [row["bytes"] for row in site.audited("update")] == [
            len(upload.signed.manifest) + upload.frame.plan.num_bytes
        ]
        assert site.records.spent("run1", 1).bytes_round == sum(
            row["bytes"] for what in ("update", "scores") for row in site.audited(what)
        )
        assert "step 1 of 2" not in coordinator.visits[0].hello.tasks
        coordinator.send(ended=pb.RunEnded(run="run1", state="finished"))
        await until(lambda: site.bench.forgotten == ["run1"] and not list(site.folder.glob("runs/run1/base-*")))
        site.audit.verify()

    play(tmp_path, scene)


def test_a_coordinator_that_vanishes_is_found_again(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        await stage.coordinator.stop()
        await until(lambda: stage.site.agent.link.current is None)
        await asyncio.sleep(0.3)  # several attempts fail
        await stage.coordinator.start()
        await stage.attended(2)
        stage.offer("j", "join", round=0)
        assert (await stage.ended("j")).state == DONE
        told = [event for event, _ in stage.site.log if event in ("connected", "disconnected", "unreachable")]
        assert told == ["connected", "disconnected", "connected"]  # once for each change, not for each attempt

    play(tmp_path, scene)


def test_a_silent_stream_is_given_up(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.coordinator.mute = True
        await until(lambda: bool(stage.site.events("disconnected")))
        assert "nothing heard" in stage.site.events("disconnected")[0]["reason"]
        stage.coordinator.mute = False
        await until(lambda: len(stage.site.events("connected")) == 2)

    play(tmp_path, scene)


def test_no_welcome_within_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "WELCOME_S", 0.1)

    async def scene(stage: Stage) -> None:
        stage.coordinator.mute = True
        stage.site.start()
        await until(lambda: len(stage.coordinator.visits) >= 2)
        assert "no answer" in stage.site.events("unreachable")[0]["reason"]

    play(tmp_path, scene, start=False)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_a_site_that_is_not_let_in_ends(tmp_path: Path, code: grpc.StatusCode) -> None:
    async def scene(stage: Stage) -> None:
        stage.coordinator.abort = code
        stage.site.start()
        with pytest.raises(AccessError, match="go away"):
            await asyncio.wait_for(stage.site.task, WAIT_S)

    play(tmp_path, scene, start=False)


def test_other_errors_are_waited_out(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.coordinator.abort = grpc.StatusCode.FAILED_PRECONDITION
        stage.site.start()
        await until(lambda: bool(stage.site.events("unreachable")))
        stage.coordinator.abort = None
        await stage.attended()

    play(tmp_path, scene, start=False)


def test_goodbye(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.coordinator.send(bye=pb.Bye(reason="restarting", come_back=True))
        await stage.attended(2)
        stage.coordinator.send(bye=pb.Bye(reason="you were revoked"))
        with pytest.raises(AccessError, match="you were revoked"):
            await asyncio.wait_for(stage.site.task, WAIT_S)
        assert stage.site.events("ended")[0]["reason"] == "you were revoked"

    play(tmp_path, scene)


def test_waits_are_spread_and_bounded() -> None:
    backoff = link.Backoff()
    limits = [min(8.0, 0.25 * 2**n) for n in range(60)]
    for limit in limits:
        assert 0 <= _next_wait(backoff) <= limit
    draws = [_next_wait(backoff) for _ in range(200)]
    assert min(draws) < 2 < 6 < max(draws) <= 8
    backoff.reset()
    assert _next_wait(backoff) <= 0.25


def test_many_agents_in_one_process(tmp_path: Path) -> None:
    count = 50

    async def whole() -> None:
        stage = Stage(tmp_path, heartbeat_s=1.0)
        await stage.coordinator.start()

        numbers = itertools.count(1)

        def offer(visit: Any) -> None:
            number = next(numbers)
            for kind in ("join", "evaluate"):
                body = {"join": b"{}", "evaluate": b'{"sites": ["north"]}'}[kind]
                task = pb.Task(id=f"{kind}-{number}", run="run1", kind=kind, body=body)
                if kind == "evaluate":
                    task.base = stage.base
                visit.out.put_nowait(pb.CoordinatorMessage(task=task))

        stage.coordinator.on_visit = offer
        before = threading.active_count()
        with ThreadPoolExecutor(2) as executor:
            sites = [Site(tmp_path, stage.people, lambda: stage.coordinator.port, f"s{k}") for k in range(count)]
            for site in sites:
                site.options["executor"] = executor
                site.start()
            ids = [f"{kind}-{k}" for kind in ("join", "evaluate") for k in range(1, count + 1)]
            try:
                await until(lambda: len(stage.coordinator.ended) == len(ids))
                assert threading.active_count() - before < 20
            finally:
                await asyncio.gather(*(site.stop() for site in sites))
                await stage.coordinator.stop()
        assert [stage.coordinator.ended[id].state for id in ids] == [DONE] * len(ids)

    asyncio.run(whole())


# ---- tasks


def test_a_task_that_is_offered_again_runs_once(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.bench.go.clear()
        for _ in range(3):
            stage.offer("t")
        await until(lambda: TAKEN in stage.coordinator.replies("t"))
        stage.offer("t")
        stage.site.bench.go.set()
        assert (await stage.ended("t")).state == DONE
        await until(lambda: not stage.site.agent._hand.answers)  # told, and known to have been heard
        stage.offer("t")  # as a coordinator does that has missed the answer
        await until(lambda: stage.coordinator.replies("t").count(DONE) == 2)
        assert stage.site.bench.calls == ["train 1"]
        assert sum(stage.coordinator.pushed.values()) == len(stage.coordinator.pushed)

    play(tmp_path, scene)


def test_an_answer_survives_the_connection_and_the_agent(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        site = stage.site
        site.bench.go.clear()
        stage.offer("t")
        await until(lambda: site.bench.calls == ["train 1"])
        await stage.coordinator.stop()
        site.bench.error = ValueError("row 7 says: secret")
        site.bench.go.set()
        await until(lambda: bool(site.events("task.failed")))
        await stage.coordinator.start()
        reply = await stage.ended("t")  # nobody offered it again
        assert reply.state == FAILED
        assert "ValueError" in reply.reason
        assert "secret" not in reply.reason
        assert list(stage.coordinator.visits[-1].hello.tasks) == ["t"]
        await site.stop()
        site.start()
        await stage.attended(len(stage.coordinator.visits) + 1)
        before = len(stage.coordinator.replies("t"))
        stage.offer("t")
        await until(lambda: len(stage.coordinator.replies("t")) > before)
        assert site.bench.calls == ["train 1"]

    play(tmp_path, scene)


def test_training_goes_before_evaluation(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.bench.go.clear()
        stage.offer("t1")
        await until(lambda: stage.site.bench.calls == ["train 1"])
        stage.offer("e", "evaluate")
        stage.offer("t2", round=2)
        await until(lambda: len(stage.site.agent._hand.items) == 3)
        stage.site.bench.go.set()
        await stage.ended("e")
        assert stage.site.bench.calls == ["train 1", "train 2", "EvaluateTask"]

    play(tmp_path, scene)


def test_the_attendance_goes_on_while_work_does(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.bench.go.clear()
        stage.offer("t")
        await until(lambda: stage.coordinator.visits[0].progress.count("step 1 of 2") > 3)
        assert len(stage.coordinator.visits) == 1
        stage.site.bench.go.set()
        await stage.ended("t")

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SiteError("the optimizer diverged", hint="lower training.lr"), "the optimizer diverged (lower training.lr)"),
        (StorageError("/data/secret is full"), "its storage"),
        (RuntimeError("patient 7"), "RuntimeError at the site"),
    ],
)
def test_work_that_fails_says_why_and_no_more(tmp_path: Path, error: Exception, told: str) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.bench.error = error
        stage.offer("t")
        reply = await stage.ended("t")
        assert reply.state == FAILED
        assert told in reply.reason
        assert "patient" not in reply.reason
        assert "/data" not in reply.reason
        assert any(str(error) in fields["reason"] for fields in stage.site.events("task.trouble"))

    play(tmp_path, scene)


def test_a_body_that_makes_no_sense_fails(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        for id, body in (("a", b"{"), ("b", b"[]"), ("c", b'{"sites": ["north"], "evil": 1}')):
            stage.coordinator.send(task=pb.Task(id=id, run="run1", kind="evaluate", body=body, base=stage.base))
            assert (await stage.ended(id)).state == FAILED
        for id, run, kind in (("../x", "run1", "join"), ("d", "../../etc", "join"), ("e", "run1", "shell")):
            stage.coordinator.send(task=pb.Task(id=id, run=run, kind=kind))
        await until(lambda: len(stage.site.events("message.ignored")) == 3)
        assert stage.site.bench.calls == []
        assert not (tmp_path / "etc").exists()

    play(tmp_path, scene)


def test_a_withdrawn_task(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.bench.go.clear()
        stage.offer("running")
        await until(lambda: stage.site.bench.calls == ["train 1"])
        stage.offer("waiting", round=2)
        await until(lambda: len(stage.site.agent._hand.items) == 2)
        for task in ("waiting", "running"):
            stage.coordinator.send(withdraw=pb.Withdraw(task=task, reason="the round is over"))
        await until(lambda: not stage.site.agent._hand.items and stage.site.bench.cancelled == 1)
        stage.site.bench.go.set()
        stage.offer("next", round=3)
        assert (await stage.ended("next")).state == DONE
        assert stage.site.bench.calls == ["train 1", "train 3"]
        assert DONE not in stage.coordinator.replies("running")

    play(tmp_path, scene)


def test_a_run_that_ends_takes_its_tasks_along(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.bench.go.clear()
        stage.offer("t")
        await until(lambda: stage.site.bench.calls == ["train 1"])
        stage.coordinator.send(ended=pb.RunEnded(run="run1", state="cancelled"))
        await until(lambda: stage.site.bench.cancelled == 1 and not list(stage.site.folder.glob("runs/run1/base-*")))
        assert stage.site.bench.forgotten == ["run1"]
        await until(lambda: not stage.site.agent.gate.goes_on("run1"))
        for run in ("run1", "unknown"):  # a coordinator says so at each connection
            stage.coordinator.send(ended=pb.RunEnded(run=run, state="cancelled"))
        stage.add_job("run2")
        stage.offer("j", "join", run="run2", round=0)
        await stage.ended("j")
        assert stage.site.bench.forgotten == ["run1"]
        assert len(stage.site.events("run.ended")) == 1

    play(tmp_path, scene)


# ---- jobs and policy


def test_policy_says_no(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.policy(purposes=["billing"])
        stage.offer("j", "join", round=0)
        reply = await stage.ended("j")
        assert reply.state == REFUSED
        assert "purposes: billing" in reply.reason
        assert stage.site.audited("refused")[0]["task"] == "j"
        assert stage.site.bench.calls == []
        stage.site.policy(share={"scores": "none", "samples": False})
        stage.offer("e", "evaluate")
        assert "share.scores" in (await stage.ended("e")).reason
        stage.site.policy(max_bytes_per_round=100)
        stage.offer("t")
        assert (await stage.ended("t")).state == REFUSED
        assert stage.site.bench.calls == []

    play(tmp_path, scene)


def test_a_bare_update_does_not_leave_where_the_job_promised_secure_sums(tmp_path: Path) -> None:
    """The site's policy asks for them, the signed job has them, and the coordinator asks for an update without."""

    async def scene(stage: Stage) -> None:
        stage.site.policy(privacy={**POLICY["privacy"], "secure_aggregation_required": True})
        stage.offer("bare")
        reply = await stage.ended("bare")
        assert reply.state == REFUSED
        assert "the job shows the coordinator each site's update" in reply.reason
        secure = RECIPE + "privacy: {secure_aggregation: on}\n"
        stage.coordinator.jobs["run2"] = signed_job(stage.lead, "run2", secure, stage.body.frame.header)
        stage.offer("again", run="run2")
        reply = await stage.ended("again")
        assert reply.state == REFUSED
        assert "updates are seen in sums alone" in reply.reason
        assert not stage.coordinator.uploads
        assert stage.site.audited("refused")

    play(tmp_path, scene)


def test_without_a_policy_everything_is_denied_and_no_path_leaves(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        (stage.site.folder / "policy.yaml").unlink()
        stage.offer("j", "join", round=0)
        reply = await stage.ended("j")
        assert reply.state == REFUSED
        assert str(tmp_path) not in reply.reason
        assert str(tmp_path) in stage.site.events("policy.unusable")[0]["hint"]

    play(tmp_path, scene)


def test_scores_are_reduced_and_samples_stay(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.policy(share={"scores": "total", "samples": False})
        stage.offer("j", "join", round=0)
        assert json.loads((await stage.ended("j")).result)["groups"] == ["total"]
        stage.offer("e", "evaluate")
        assert json.loads((await stage.ended("e")).result) == {"north": {"nll": [3.0], "tokens": [7], "correct": [3]}}
        stage.offer("s", "sample")
        assert (await stage.ended("s")).state == REFUSED
        stage.site.policy(share={"scores": "total", "samples": True})
        stage.offer("s2", "sample")
        assert (await stage.ended("s2")).state == DONE
        assert len(stage.site.audited("samples")) == 1

    play(tmp_path, scene)


def test_an_update_over_the_limit_stays(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.bench.go.clear()
        stage.offer("t")
        await until(lambda: stage.site.bench.calls == ["train 1"])
        stage.site.policy(max_bytes_per_round=2000)  # while it trains
        stage.site.bench.go.set()
        reply = await stage.ended("t")
        assert reply.state == REFUSED
        assert "max_bytes_per_round" in reply.reason
        assert not stage.coordinator.pushed

    play(tmp_path, scene)


def test_what_an_update_costs_is_written_down_and_bounded(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.offer("t")
        assert (await stage.ended("t")).state == DONE
        assert stage.site.records.spends() == [("run1", UNPROTECTED)]
        stage.site.bench.go.clear()
        stage.offer("u", round=2)
        await until(lambda: stage.site.bench.calls == ["train 1", "train 2"])
        budget = {"unit": "site", "epsilon": 8.0, "delta": 1e-5}
        rules = {**POLICY["privacy"], "budget": budget}
        stage.site.policy(privacy=rules)  # while it trains
        stage.site.bench.go.set()
        reply = await stage.ended("u")
        assert reply.state == REFUSED
        assert "privacy.budget: the budget is ε = 8" in reply.reason
        stage.offer("v", round=3)
        assert "privacy.budget: in all the job's rounds: " in (await stage.ended("v")).reason
        assert stage.site.bench.calls == ["train 1", "train 2"]
        assert stage.site.records.spends() == [("run1", UNPROTECTED)]

    play(tmp_path, scene)


def test_a_person_must_approve(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        site = stage.site
        site.policy(approval="every-run")
        stage.add_job("run2")
        stage.offer("j1", "join", round=0)
        stage.offer("j2", "join", run="run2", round=0)
        await until(lambda: len(site.records.pending()) == 2)
        assert stage.coordinator.replies("j1") == []
        site.records.decide("run1", True, "olga")
        site.records.decide("run2", False, "olga")
        assert (await stage.ended("j1")).state == DONE
        assert (await stage.ended("j2")).state == REFUSED
        assert len(site.events("approval.needed")) == 2  # asked once, not at each heartbeat

    play(tmp_path, scene)


def test_jobs_that_are_not_what_they_say(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        header = stage.body.frame.header
        jobs = stage.coordinator.jobs
        jobs["forged"] = signed_job(stage.lead, "forged", RECIPE, header)
        jobs["forged"].signature = bytes(64)
        jobs["other"] = signed_job(stage.lead, "run1", RECIPE, header)
        jobs["by-site"] = signed_job(stage.people.enrol("south", "site"), "by-site", RECIPE, header)
        stranger = People(tmp_path / "elsewhere").enrol("lena", "lead")
        jobs["stranger"] = signed_job(stranger, "stranger", RECIPE, header)
        jobs["late"] = signed_job(stage.lead, "late", RECIPE, header, submitted_at=4e9)
        for run in ("forged", "other", "by-site", "stranger", "late"):
            stage.offer(run, "join", run=run, round=0)
            assert (await stage.ended(run)).state == REFUSED, run
        jobs["recipe"] = signed_job(stage.lead, "recipe", "nonsense: 1", header)
        for run in ("recipe", "unknown"):
            stage.offer(run, "join", run=run, round=0)
            assert (await stage.ended(run)).state == FAILED, run
        assert stage.site.bench.calls == []

    play(tmp_path, scene)


# ---- transfers


def test_a_fetch_goes_on_after_cuts(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.coordinator.cut_fetch = {0, 3, 4, 17, 31}
        stage.offer("t")
        assert (await stage.ended("t")).state == DONE
        # only a chunk on its way when a call was cut may travel twice
        assert sum(stage.coordinator.fetched.values()) <= len(stage.body.chunks) + 5
        assert set(stage.coordinator.fetched) == set(range(len(stage.body.chunks)))
        fetches = stage.coordinator.fetches
        assert fetches == sorted(fetches)
        for name, tensors in stage.channels.items():
            for dtype, flat in tensors.flats.items():
                assert torch.equal(stage.site.bench.base[name].flats[dtype], flat)

    play(tmp_path, scene)


def test_a_fetch_goes_on_in_a_new_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link.Backoff, "next_s", lambda self: 0.3)

    async def scene(stage: Stage) -> None:
        stage.coordinator.cut_fetch = {9}
        stage.offer("t")
        await until(lambda: bool(stage.site.events("transfer.cut")))
        (part,) = stage.site.folder.glob("runs/run1/base-*.part")
        await stage.site.stop()
        with part.open("rb+") as file:  # one chunk was damaged on disk meanwhile
            file.seek(2 * 1024)
            file.write(b"x")
        stage.coordinator.fetched.clear()
        stage.coordinator.fetches.clear()
        stage.site.start()
        await stage.attended(2)
        stage.offer("t")
        assert (await stage.ended("t")).state == DONE
        assert stage.coordinator.fetches[0] == 2
        assert 10 in stage.coordinator.fetches or 9 in stage.coordinator.fetches
        assert stage.coordinator.fetched[0] == stage.coordinator.fetched[1] == 0
        assert stage.site.bench.calls == ["train 1"]

    play(tmp_path, scene)


def test_a_damaged_chunk_is_fetched_again(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.coordinator.spoil[5] = 2
        stage.offer("t")
        assert (await stage.ended("t")).state == DONE
        assert stage.coordinator.fetches == [0, 5, 5]
        assert len(stage.site.events("transfer.broken")) == 2
        other = body_of(theta(1))
        stage.coordinator.add(other)
        stage.coordinator.spoil[5] = 99
        stage.offer("t2", round=2, base=other.frame.digest)
        reply = await stage.ended("t2")
        assert reply.state == FAILED
        assert "chunk 5" in reply.reason

    play(tmp_path, scene)


def test_tensors_that_are_not_the_jobs_are_not_taken(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        other = Body.of({"theta": NamedTensors.of({"a": torch.zeros(7)})})
        stage.coordinator.add(other)
        stage.offer("t", base=other.frame.digest)
        assert "not those of the signed job" in (await stage.ended("t")).reason
        stage.coordinator.frames["cd" * 32] = stage.body
        stage.offer("t2", round=2, base="cd" * 32)
        assert "another frame" in (await stage.ended("t2")).reason
        stage.offer("t3", round=3, base="../../policy.yaml")
        await until(lambda: bool(stage.site.events("message.ignored")))
        assert not list(stage.site.folder.glob("runs/run1/base-*"))

    play(tmp_path, scene)


def test_a_base_is_fetched_once_and_goes_when_a_newer_one_is_there(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.offer("t1")
        stage.offer("e1", "evaluate")
        await stage.ended("e1")
        assert set(stage.coordinator.fetched.values()) == {1}
        newer = stage.coordinator.add(body_of(theta(1)))
        stage.offer("t2", round=2, base=newer)
        await stage.ended("t2")
        assert [path.name for path in stage.site.folder.glob("runs/run1/base-*.bin")] == [f"base-{newer}.bin"]

    play(tmp_path, scene)


def test_a_push_goes_on_after_cuts(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.coordinator.cut_push = {0, 4, 11}
        stage.coordinator.lose[7] = 2
        stage.offer("t")
        assert (await stage.ended("t")).state == DONE
        (upload,) = stage.coordinator.uploads.values()
        assert upload.state == pb.UploadStatus.ACCEPTED
        assert stage.coordinator.pushed[7] == 3
        assert stage.coordinator.pushed[0] == 1  # it had arrived
        assert stage.site.bench.calls == ["train 1"]
        left = sum(row["bytes"] for row in stage.site.audited("update"))
        assert left >= len(upload.signed.manifest) + upload.frame.plan.num_bytes + 2 * 1024  # sent again counts again
        assert stage.site.records.spent("run1", 1).bytes_round == left

    play(tmp_path, scene)


def test_a_push_that_is_answered_early(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.coordinator.hasty = True
        stage.coordinator.busy = 2
        stage.coordinator.lose.update({3: 2, 9: 1})
        stage.offer("t")
        assert (await stage.ended("t")).state == DONE
        assert stage.coordinator.pushed[3] == 3
        assert stage.site.events("update.accepted")
        assert not stage.site.events("task.withdrawn")  # though the coordinator withdrew it as it was accepted

    play(tmp_path, scene)


@pytest.mark.parametrize("hasty", [False, True])
def test_a_chunk_that_never_arrives_whole_ends_the_task(tmp_path: Path, hasty: bool) -> None:
    async def scene(stage: Stage) -> None:
        stage.coordinator.hasty = hasty
        stage.coordinator.lose[7] = 99
        stage.offer("t")
        reply = await stage.ended("t")
        assert reply.state == FAILED
        assert "chunk 7" in reply.reason

    play(tmp_path, scene)


def test_a_refused_update_is_over(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.options["keep_after_s"] = 0.0
        stage.coordinator.refuse = ("round-closed", "round 1 is over")
        stage.offer("t")
        reply = await stage.ended("t")
        assert reply.state == FAILED
        assert "round-closed" in reply.reason
        assert stage.site.events("update.refused")[0]["code"] == "round-closed"
        assert stage.site.audited("update refused")[0]["code"] == "round-closed"
        assert not list(stage.site.folder.glob("runs/run1/outbox-*"))
        assert not stage.coordinator.pushed

    play(tmp_path, scene)


def test_a_stale_update_is_no_error_and_work_of_a_later_version_follows(tmp_path: Path) -> None:
    """Rounds of an asynchronous run rise from task to task, and skip."""

    async def scene(stage: Stage) -> None:
        stage.coordinator.refuse = ("stale", "it is 3 versions behind, more than max_staleness 2")
        stage.offer("t")
        assert (await stage.ended("t")).state == FAILED
        assert stage.site.events("update.refused")[0]["code"] == "stale"
        assert stage.site.audited("update refused")[0]["code"] == "stale"
        stage.coordinator.refuse = None
        stage.offer("u", round=3)
        assert (await stage.ended("u")).state == DONE
        assert [record["round"] for record in stage.site.events("update.accepted")] == [3]

    play(tmp_path, scene)


def test_a_finished_update_survives_a_new_agent(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        site, coordinator = stage.site, stage.coordinator
        site.options["keep_after_s"] = 0.0
        site.start()
        await stage.attended()
        site.bench.go.clear()
        stage.offer("t")
        await until(lambda: site.bench.calls == ["train 1"])
        await coordinator.stop()
        site.bench.go.set()
        await until(lambda: bool(list(site.folder.glob("runs/run1/outbox-*.manifest"))))
        await site.stop()
        site.start()
        await coordinator.start()
        await stage.attended(2)
        stage.offer("t")
        assert (await stage.ended("t")).state == DONE
        assert site.bench.calls == ["train 1"]
        (upload,) = coordinator.uploads.values()
        assert coordinator.signed_by(upload, site.identity)
        await until(lambda: not list(site.folder.glob("runs/run1/outbox-*")))

    play(tmp_path, scene, start=False)


def test_stopping_interrupts_work(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.site.bench.go.clear()
        stage.offer("t")
        await until(lambda: stage.site.bench.calls == ["train 1"])
        stage.site.agent.stop()
        await asyncio.wait_for(stage.site.task, WAIT_S)
        assert stage.site.bench.cancelled == 1
        assert stage.site.records.tasks_in_hand()[0].id == "t"
        assert stage.coordinator.replies("t") == [TAKEN]

    play(tmp_path, scene)


def test_a_signal_stops_the_agent(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        await stage.site.stop()
        stage.site.start(signals=True)
        await stage.attended(2)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stage.site.task, WAIT_S)
        assert stage.site.events("stopped")

    play(tmp_path, scene)


def test_folders_of_ended_runs_go(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        runs = [f"run-{k}" for k in range(7)]
        for run in runs:
            stage.add_job(run)
            stage.offer(f"t-{run}", run=run)
            assert (await stage.ended(f"t-{run}")).state == DONE
        for run in runs:
            stage.coordinator.send(ended=pb.RunEnded(run=run, state="finished"))
            await until(lambda run=run: not stage.site.agent.gate.goes_on(run))  # type: ignore[misc]
        await until(lambda: {path.name for path in (stage.site.folder / "runs").iterdir()} == set(runs[2:]))
        assert len(stage.site.audited("update")) == 7  # what left is remembered

    play(tmp_path, scene)


# ---- the coordinator's audit log


def test_a_forked_audit_log_ends_the_agent(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.coordinator.send(audit_head=stage.coordinator.sign_head(5, b"a" * 32))
        await until(lambda: stage.site.records.last_head() is not None)
        stage.coordinator.send(audit_head=stage.coordinator.sign_head(5, b"b" * 32))
        with pytest.raises(Alarm, match="was changed"):
            await asyncio.wait_for(stage.site.task, WAIT_S)
        assert stage.site.events("alarm")
        assert stage.site.audited("alarm")
        await stage.site.stop()
        stage.coordinator.head = stage.coordinator.sign_head(4, b"c" * 32)
        stage.site.start()
        with pytest.raises(Alarm, match="went back"):
            await asyncio.wait_for(stage.site.task, WAIT_S)
        head = stage.coordinator.visits[-1].hello.audit_head
        assert (head.sequence, head.hash) == (5, b"a" * 32)

    play(tmp_path, scene)


def test_an_audit_head_that_somebody_else_signed(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        head = stage.coordinator.sign_head(5, b"a" * 32)
        head.signature = bytes(64)
        stage.coordinator.send(audit_head=head)
        with pytest.raises(Alarm, match="not signed by the coordinator"):
            await asyncio.wait_for(stage.site.task, WAIT_S)
        assert stage.site.records.last_head() is None

    play(tmp_path, scene)


def test_two_bases_for_one_round_are_an_alarm(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.offer("t")
        await stage.ended("t")
        stage.offer("again", base=stage.coordinator.add(body_of(theta(1))))
        with pytest.raises(Alarm, match="other tensors"):
            await asyncio.wait_for(stage.site.task, WAIT_S)
        assert stage.site.bench.calls == ["train 1"]

    play(tmp_path, scene)


# ---- TLS and certificates


def test_by_tls_with_a_certificate_that_is_renewed(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        import time

        site = stage.site
        asked = site.identity.request()
        key = site.identity.holder.signing_key
        began = time.time() - 23 * 3600
        pem = stage.people.authority.issue(asked, name="north", role="site", signing_key=key, hours=24, now=began)
        site.identity = site.identity.write_certificate(pem)
        site.options["open_channel"] = None
        site.start()
        await until(lambda: len(site.events("renewed")) == 1)
        await stage.attended(2)
        assert site.agent.identity.holder.not_after > time.time() + 3600
        stage.offer("t")
        assert (await stage.ended("t")).state == DONE
        assert stage.coordinator.renewals == 1

    play(tmp_path, scene, start=False, tls=True)


def test_an_expired_certificate_ends_the_agent(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        site, key = stage.site, stage.site.identity.holder.signing_key
        asked = site.identity.request()
        pem = stage.people.authority.issue(asked, name="north", role="site", signing_key=key, hours=1, now=1.7e9)
        site.identity = site.identity.write_certificate(pem)
        site.options["open_channel"] = None
        site.start()
        with pytest.raises(AccessError, match="expired"):
            await asyncio.wait_for(site.task, WAIT_S)

    play(tmp_path, scene, start=False, tls=True)


# ---- on disk


def test_a_frames_file(tmp_path: Path) -> None:
    channels = theta()
    body = body_of(channels)
    path = tmp_path / "x.bin"
    write_frame(path, body.frame, channels)
    file = FrameFile(path, body.frame)
    assert all(file.whole_chunks())
    found = file.tensors()
    for name, tensors in channels.items():
        for key in tensors:
            assert torch.equal(found[name][key], tensors[key])
            assert found[name][key].dtype == tensors[key].dtype
    found["theta"]["a"].zero_()  # what a workshop should not do changes no file
    assert all(file.whole_chunks())
    with path.open("rb+") as handle:
        handle.write(b"xxxx")
    assert file.whole_chunks().find(0) == 0
    path.write_bytes(path.read_bytes()[:-1])
    assert not any(file.whole_chunks())
    with pytest.raises(StorageError, match="cut short"):
        file.tensors()


def test_a_frame_without_values(tmp_path: Path) -> None:
    body = Body.of({"theta": NamedTensors.of({"a": torch.zeros(0)})})
    inbox = Inbox(tmp_path)
    arrival = inbox.begin("r", body.frame)
    assert arrival.first_missing() is None
    assert inbox.finish("r", 1, arrival)["theta"]["a"].shape == (0,)
    assert inbox.resume("r", body.frame.digest) is not None


def test_an_outbox_gives_back_only_what_is_whole_and_asked_for(tmp_path: Path) -> None:
    channels = {"delta": theta()["theta"]}
    body = Body.of(channels)
    manifest = pb.Manifest(run="r", task="t", base="ab", site="north", frame=body.frame.header).SerializeToString()
    outbox = Outbox(tmp_path)
    outbox.keep("r", "t", Parcel(manifest, body.frame, channels))
    found = outbox.find("r", "t", base="ab", site="north")
    assert found is not None
    assert found.manifest == manifest
    assert torch.equal(found.tensors["delta"]["b"], channels["delta"]["b"])
    for other in ({"base": "cd", "site": "north"}, {"base": "ab", "site": "south"}):
        assert outbox.find("r", "t", **other) is None
    (body_file,) = tmp_path.glob("r/outbox-*.bin")
    body_file.write_bytes(b"\0" + body_file.read_bytes()[1:])
    assert outbox.find("r", "t", base="ab", site="north") is None
    outbox.delete("r", "t")
    assert not list(tmp_path.glob("r/*"))


def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(ahead, "COUNTED_BYTES", 1024)


class Gradual(Bench):
    """Makes its update in two parts, and waits between them until it may go on."""

    def train(
        self, run: str, task: TrainTask, base: Mapping[str, NamedTensors], *, room: Room = in_memory, **_: Any
    ) -> Work:
        theta = base["theta"]
        delta = room("delta", theta.layout)
        half = theta.flats[torch.float32].numel() // 2
        for start, stop in ((0, half), (half, 2 * half)):
            delta.flats[torch.float32][start:stop] = theta.flats[torch.float32][start:stop] + 1
            room.written("delta", torch.float32, stop)
            assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        delta.flats[torch.bfloat16].copy_(theta.flats[torch.bfloat16] + 1)
        return Work({"delta": delta}, 5, 50, task.steps, {"loss": 1.5})


class EarlyCoordinator(FakeCoordinator):
    """Takes chunks before their manifest, which is then found to have them. `loses`: they are gone by then."""

    early: dict[int, bytes]
    loses = False

    async def OpenAhead(self, request: pb.Ahead, context: Any) -> pb.UploadStatus:
        self.early = {}
        return pb.UploadStatus(state=pb.UploadStatus.OPEN, upload="ahead")

    async def OpenUpload(self, signed: pb.SignedManifest, context: Any) -> pb.UploadStatus:
        status = await super().OpenUpload(signed, context)
        upload = self.uploads[status.upload]
        for index, chunk in {} if self.loses else self.early.items():
            check_chunk(upload.frame, index, chunk)
            upload.chunks[index] = chunk
        return self._status(status.upload)

    async def Push(self, messages: Any, context: Any) -> pb.UploadStatus:
        if dict(context.invocation_metadata())[UPLOAD_KEY] != "ahead":
            return await super().Push(messages, context)
        async for parcel in messages:
            index, chunk = unpack_chunk(parcel.take())
            self.early[index] = bytes(chunk)
        return pb.UploadStatus(state=pb.UploadStatus.OPEN, upload="ahead")


@pytest.mark.parametrize("loses", [False, True])
def test_a_large_update_is_on_its_way_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loses: bool
) -> None:
    everything_is_large(monkeypatch)

    async def scene(stage: Stage) -> None:
        coordinator = stage.coordinator
        assert isinstance(coordinator, EarlyCoordinator)
        coordinator.early, coordinator.loses, stage.site.bench.go = {}, loses, threading.Event()
        stage.offer("t")
        await until(lambda: set(coordinator.early) == {0})  # of the first 500 elements, in chunks of 256
        assert not coordinator.uploads
        stage.site.bench.go.set()
        assert (await stage.ended("t")).state == DONE
        (upload,) = coordinator.uploads.values()
        expected = Body.of({"delta": plus_one(stage.channels["theta"])})
        assert [upload.chunks[index] for index in sorted(upload.chunks)] == expected.chunks
        rows = stage.site.audited("update")
        assert rows[0]["bytes"] == 1024 * rows[0]["chunks"]
        assert not list(stage.site.folder.glob("runs/run1/outbox-*"))

    play(tmp_path, scene, bench=Gradual(), kind=EarlyCoordinator)


def plus_one(tensors: NamedTensors) -> NamedTensors:
    found = tensors.clone()
    for flat in found.flats.values():
        flat.add_(1)
    return found


def test_a_coordinator_that_takes_nothing_ahead_gets_the_whole_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_is_large(monkeypatch)

    async def scene(stage: Stage) -> None:
        stage.site.bench.go.clear()
        stage.offer("t")
        await until(lambda: bool(stage.site.events("ahead.left")))
        stage.site.bench.go.set()
        assert (await stage.ended("t")).state == DONE
        (upload,) = stage.coordinator.uploads.values()
        assert upload.chunks[0] == Body.of({"delta": plus_one(stage.channels["theta"])}).chunks[0]

    play(tmp_path, scene, bench=Gradual())


@pytest.mark.parametrize("stops", ["withdrawn", "stopped"])
def test_an_update_on_its_way_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: str) -> None:
    """Also when there is no connection to send it over."""
    everything_is_large(monkeypatch)

    async def scene(stage: Stage) -> None:
        assert isinstance(stage.coordinator, EarlyCoordinator)
        stage.coordinator.early = {}
        stage.site.bench.go.clear()
        stage.offer("t")
        try:
            await until(lambda: bool(stage.coordinator.early))
            if stops == "withdrawn":
                stage.coordinator.send(withdraw=pb.Withdraw(task="t", reason="nobody wants it"))
                await until(lambda: bool(stage.site.events("task.withdrawn")))
            else:
                await stage.coordinator.stop()
                stage.site.agent.stop()
        finally:
            stage.site.bench.go.set()
        await until(lambda: stage.site.agent._hand.running is None)
        assert not stage.coordinator.uploads
        assert not list(stage.site.folder.glob("runs/run1/outbox-*"))

    play(tmp_path, scene, bench=Gradual(), kind=EarlyCoordinator)


def test_training_that_fails_after_a_part_has_left_offers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_is_large(monkeypatch)

    async def scene(stage: Stage) -> None:
        assert isinstance(stage.coordinator, EarlyCoordinator)
        stage.coordinator.early = {}
        stage.site.bench.error = SiteError("it went wrong")
        stage.offer("t")
        assert (await stage.ended("t")).state == FAILED
        assert not stage.coordinator.uploads
        assert not list(stage.site.folder.glob("runs/run1/outbox-*"))

    play(tmp_path, scene, bench=Gradual(), kind=EarlyCoordinator)


def test_nothing_leaves_ahead_that_a_policy_does_not_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_is_large(monkeypatch)

    async def scene(stage: Stage) -> None:
        assert isinstance(stage.coordinator, EarlyCoordinator)
        stage.coordinator.early = {}
        stage.site.policy(max_bytes_per_round=2000)
        stage.offer("t")
        assert (await stage.ended("t")).state in (FAILED, REFUSED)
        assert sum(map(len, stage.coordinator.early.values())) <= 2000
        assert not stage.coordinator.pushed

    play(tmp_path, scene, bench=Gradual(), kind=EarlyCoordinator)


def test_a_full_disk_does_not_end_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    log = SiteLog(Path("/dev/full"), quiet=True)
    log("task.done", run="run1")
    assert "No space left" in (told := capsys.readouterr().err)
    assert "run1" in told


def test_the_log_is_for_people_and_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = SiteLog(tmp_path / "log.jsonl")
    log("task.refused", run="run1", reason="no\nway", other=1)
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "no\nway"
    assert capsys.readouterr().err.rstrip().endswith("task.refused: run run1, reason no way")

"""A federation of real processes on loopback whose sites do no training: they add noise to what they get and return it.

    with Federation(folder) as federation:
        federation.start_coordinator()
        federation.start_sites(4)
        run = federation.submit(theta, rounds=5)
        federation.wait(run)

Coordinator and sites are processes of their own with real identities, TLS, stores and policies; only the sites'
workshop is made up. Benchmarks measure it, the chaos suite kills it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from commonweight.codec.coded import CODED, Packer
from commonweight.codec.feedback import Coder, coder_of
from commonweight.coordinator.folder import enroll, init
from commonweight.coordinator.server import log_to_stderr, serve
from commonweight.coordinator.settings import CoordinatorSettings
from commonweight.federation.messages import TrainTask
from commonweight.identity.enrol import enrol
from commonweight.identity.folder import IdentityFolder
from commonweight.lead.client import Client
from commonweight.lead.submit import sign
from commonweight.model.tensors import InMemory, Layout, NamedTensors, Room, in_memory
from commonweight.recipe.load import parse_recipe
from commonweight.recipe.resolved import recipe_text
from commonweight.recipe.schema import CompressionSpec, Recipe
from commonweight.site.agent import Agent
from commonweight.site.audit import SiteAudit
from commonweight.site.log import SiteLog
from commonweight.site.outbox import Desk
from commonweight.site.policy import PolicyFile
from commonweight.site.records import SiteRecords
from commonweight.site.settings import SiteSettings
from commonweight.site.workshop import Work
from commonweight.wire.buffers import bound_memory
from commonweight.wire.frames import CHUNK_BYTES, Channel, frame_of, plan_for
from commonweight.wire.protocol_pb2 import Job

ROOT = Path(__file__).resolve().parents[1]
POLICY = """\
models: [any]
signers: [lena]
kinds: [train, evaluate]
purposes: [any]
strategies: [built-in]
objectives: [built-in]
min_cohort: 1
max_rounds: 100000
max_bytes_per_round: 1000 GiB
max_bytes_total: 100000 GiB
privacy: {dp_required: false, max_epsilon: null, budget: null, secure_aggregation_required: false,
  own_noise_required: false}
relays: []
remote_code: false
approval: none
share: {scores: rows, samples: false}
"""
_NOISE = 1 << 18
#: what a site that adds noise may say that it has trained on
_EXAMPLES_AT_MOST = 128


class NoiseWorkshop:
    """A workshop that trains nothing: the update is noise that site, round and element decide, the same on every run.

    Args:
        seconds: how long it pretends to train.
        folder: where it keeps what codecs lose, in files; None: everything is in its memory, and the update's tensors
            are used again.
        at_once: nothing is told of an update before it is whole.
    """

    def __init__(
        self,
        name: str,
        *,
        seconds: float = 0.0,
        log: Path | None = None,
        folder: Path | None = None,
        at_once: bool = False,
    ) -> None:
        self.name, self.seconds, self.log, self.folder, self.at_once = name, seconds, log, folder, at_once
        self._delta: NamedTensors | None = None
        self._compression: dict[str, CompressionSpec] = {}
        self._late: dict[str, NamedTensors] = {}

    def join(self, job: Any, progress: Any = None) -> dict[str, Any]:
        self._compression[job.id] = parse_recipe(job.recipe, "the job's recipe").compression
        return {"steps": 1, "groups": ["0"]}

    def initial(self, run: str, progress: Any = None) -> NamedTensors:
        return NamedTensors.of({})  # its runs begin with the tensors that were submitted, and it does not know them

    def train(
        self,
        run: str,
        task: TrainTask,
        base: Mapping[str, NamedTensors],
        *,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Any = None,
        base_digest: str | None = None,
        room: Room = in_memory,
    ) -> Work:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{task.round}\n")
        ends = time.monotonic() + self.seconds
        while time.monotonic() < ends and not cancelled():
            time.sleep(0.02)
        if self.at_once:
            room = _AtOnce(room)
        delta = self._empty(base["theta"].layout, room)
        seed = int.from_bytes(f"{self.name}/{task.round}".encode()[-7:], "big")
        block = torch.empty(_NOISE).normal_(std=1e-3, generator=torch.Generator().manual_seed(seed))
        coder = coder_of(self._compression.get(run, CompressionSpec()), delta.layout, 0)
        for dtype, flat in delta.floating():
            for start in range(0, flat.numel(), _NOISE):
                piece = flat[start : start + _NOISE]
                piece.copy_(block[: piece.numel()])
                if coder is None:
                    room.written("delta", dtype, start + piece.numel())
        figures = (10 + len(self.name), 100, 1, {"loss": 1.0, "seconds": self.seconds})
        return Work({"delta": delta} if coder is None else self._coded(coder, run, task.round, delta, room), *figures)

    def _empty(self, layout: Layout, room: Room) -> NamedTensors:
        if self.folder is not None:
            return room("delta", layout)
        if self._delta is None or self._delta.layout != layout:
            self._delta = NamedTensors.empty(layout)
        return self._delta

    def _coded(self, coder: Coder, run: str, round: int, delta: NamedTensors, room: Room) -> dict[str, NamedTensors]:
        """What a codec makes of the update; what that loses is kept while the process lives."""
        spec = self._compression[run]
        if spec.keeps_errors and run not in self._late:
            lasting = in_memory if self.folder is None else Desk(self.folder / "lasting")
            self._late[run] = lasting("late", delta.layout, wide=True)
        errors = {"delta": self._late[run]} if spec.keeps_errors else {}
        seed = coder.update_seed(self.name, round)
        packer = Packer(coder, room)
        for coded in coder.encode({"delta": delta}, errors, seed):
            packer.add(coded)
        return {CODED: packer.packed(seed)}

    def answer(self, run: str, task: Any, base: Any, **_: Any) -> dict[str, Any]:
        return {site: {"nll": [1.0], "tokens": [1], "correct": [1]} for site in task.sites}

    def forget(self, run: str) -> None:
        pass


class _AtOnce(InMemory):
    """Another room, which hears of nothing."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def __call__(self, name: str, layout: Layout, *, wide: bool = False) -> NamedTensors:
        return self._room(name, layout, wide=wide)


class Federation:
    """Processes that stop with the block.

    Args:
        settings: of the coordinator, beside its ports.
        seconds: how long sites pretend to train.
        large: their updates are made in files, as those of large models are.
        at_once: large updates are sent when they are whole, not before.
    """

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        large: bool = False,
        at_once: bool = False,
    ) -> None:
        self.folder, self.seconds = folder, seconds
        self._kind = "sites" if not large else "large-sites-at-once" if at_once else "large-sites"
        self.coordinator_folder, self.lead_folder = folder / "coordinator", folder / "lead"
        self.settings = dict(settings or {})
        self.coordinator: subprocess.Popen[bytes] | None = None
        self.sites: list[subprocess.Popen[bytes]] = []
        self.ports: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.sites, *([self.coordinator] if self.coordinator else [])]:
            if process.poll() is None:
                process.kill()
            process.wait()

    def make(self) -> None:
        """The coordinator's folder, with ports that are free now and stay its own."""
        self.ports = free_ports("services", "enrolment", "http")
        at = {name: f"127.0.0.1:{port}" for name, port in self.ports.items()}
        settings = CoordinatorSettings(
            listen=at["services"],
            listen_enrolment=at["enrolment"],
            listen_http=at["http"],
            address=at["services"],
            address_enrolment=at["enrolment"],
            **self.settings,
        )
        init(self.coordinator_folder, settings, ["localhost", "127.0.0.1"])

    def start_coordinator(self, *, wait: bool = True) -> subprocess.Popen[bytes]:
        """Start it, for the first time or again."""
        if not self.coordinator_folder.exists():
            self.make()
        ready = self.folder / "ready"
        ready.unlink(missing_ok=True)
        self.coordinator = self._start("coordinator", ["coordinator", str(self.coordinator_folder), str(ready)])
        while wait and not ready.exists():
            if self.coordinator.poll() is not None:
                raise RuntimeError((self.folder / "coordinator.log").read_text()[-2000:])
            time.sleep(0.02)
        return self.coordinator

    def enrol(self, name: str, role: str, folder: Path) -> None:
        enrol(enroll(self.coordinator_folder, name, role).to_text(), folder)

    def site_names(self, count: int) -> list[str]:
        return [f"site-{number:03d}" for number in range(count)]

    def enrol_sites(self, names: Sequence[str]) -> None:
        for name in names:
            folder = self.folder / "sites" / name
            if not (folder / "identity" / "tls.pem").exists():
                self.enrol(name, "site", folder / "identity")
                (folder / "policy.yaml").write_text(POLICY)

    def start_sites(self, count: int, *, per_process: int = 1) -> list[subprocess.Popen[bytes]]:
        """Enrol and start sites; several may share a process."""
        names = self.site_names(count)
        self.enrol_sites(names)
        for start in range(0, count, per_process):
            self.sites.append(self.start_site(*names[start : start + per_process]))
        return self.sites

    def route(self, site: str, port: int) -> None:
        """From its next start on, a site that is enrolled dials another port."""
        redirect(self.folder / "sites" / site / "identity", port)

    def start_site(self, *names: str) -> subprocess.Popen[bytes]:
        return self._start(names[0], [self._kind, str(self.folder), str(self.seconds), *names])

    def _start(self, log: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (self.folder / f"{log}.log").open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.federation", *arguments], stdout=out, stderr=out, env=environment
            )

    def client(self) -> Client:
        if not self.lead_folder.exists():
            self.enrol("lena", "lead", self.lead_folder)
        return Client(self.lead_folder)

    def submit(
        self,
        theta: NamedTensors,
        *,
        rounds: int,
        sites: Sequence[str] = (),
        chunk_bytes: int = CHUNK_BYTES,
        id: str = "",
        compression: Any = "none",
        secure: bool = False,
        **federation: Any,
    ) -> str:
        """Submit a run whose initial tensors are given; no model is opened by anyone.

        Args:
            secure: whether updates are summed securely.
        """
        recipe = Recipe.model_validate(
            {
                "name": "noise",
                "federation": {"rounds": rounds, **federation},
                "compression": compression,
                "training": {"batch_size": _EXAMPLES_AT_MOST},
                "privacy": {"secure_aggregation": "on" if secure else "off"},
                "evaluation": {"controls": [], "every": rounds, "samples": 0},
                "output": {"keep_rounds": 1},
            }
        )
        frame = frame_of({"theta": theta}, plan_for(theta.layout, (Channel("theta"),), chunk_bytes))
        with self.client() as client:
            job = Job(
                id=id or os.urandom(16).hex(),
                name="noise",
                recipe=recipe_text(recipe),
                kind="train",
                sites=sites,
                must_match={"base weights": "0" * 64},
                initial=frame.header,
                submitted_at=time.time(),
            )
            return client.submit(sign(job, client.identity), {"theta": theta}, frame)

    def run(self, run: str) -> dict[str, Any]:
        with self.client() as client:
            return client.run(run)

    def wait(self, run: str, *, seconds: float = 300.0, state: str = "finished") -> dict[str, Any]:
        """Until the run has ended."""
        ends = time.monotonic() + seconds
        while True:
            found = self.run(run)
            if found["state"] in ("finished", "failed", "cancelled"):
                if found["state"] != state:
                    raise RuntimeError(f"the run is {found['state']}: {found['error']}")
                return found
            if time.monotonic() > ends:
                raise TimeoutError(f"after {seconds} s the run is {found['state']}, round {found['round']}")
            time.sleep(0.1)

    def events(self, run: str) -> list[dict[str, Any]]:
        with self.client() as client:
            return list(client.events(run))


def random_tensors(mb: float, *, tensors: int = 64) -> NamedTensors:
    """Float32 tensors of equal size, `mb` MiB together; cheap to make."""
    rows = max(1, int(mb * 2**20) // (tensors * 64 * 4))
    draw = torch.Generator().manual_seed(0)
    block = torch.empty(rows, 64).normal_(std=0.02, generator=draw)
    return NamedTensors.of({f"layer.{k:03d}.lora_A.weight": block for k in range(tensors)})


def redirect(identity: Path, port: int) -> None:
    """Let the owner of an identity dial another port of loopback."""
    path = identity / "identity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "address": f"127.0.0.1:{port}"}))


def free_ports(*names: str) -> dict[str, int]:
    """A free port of loopback for each name."""
    import socket

    sockets = [socket.socket() for _ in names]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}
    for one in sockets:
        one.close()
    return ports


def _coordinator(folder: Path, ready: Path) -> None:
    torch.set_num_threads(1)
    log_to_stderr()
    serve(folder, ready=lambda settings, ports: ready.write_text(json.dumps(ports)) and None)


async def _sites(kind: str, folder: Path, seconds: float, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    bound_memory()
    pool = ThreadPoolExecutor(4)
    agents = []
    for name in names:
        home = folder / "sites" / name
        identity = IdentityFolder.open(home / "identity")
        records = SiteRecords(home / "state.sqlite")
        settings = SiteSettings(name=name, address=identity.address, data={"path": "none"})
        own, at_once = home if kind.startswith("large") else None, kind.endswith("at-once")
        workshop = NoiseWorkshop(name, seconds=seconds, log=home / "trained", folder=own, at_once=at_once)
        agents.append(
            Agent(
                settings,
                identity,
                workshop,
                PolicyFile(home / "policy.yaml"),
                records,
                SiteAudit(home / "audit.jsonl", records),
                executor=pool,
                log=SiteLog(home / "log.jsonl", quiet=len(names) > 1),
            )
        )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    tasks = [asyncio.create_task(agent.run()) for agent in agents]
    done, _ = await asyncio.wait([*tasks, asyncio.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
    for agent in agents:
        agent.stop()
    for task in done:
        task.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["coordinator", "sites", "large-sites", "large-sites-at-once"])
    parser.add_argument("rest", nargs="+")
    given = parser.parse_args()
    if given.what == "coordinator":
        _coordinator(Path(given.rest[0]), Path(given.rest[1]))
    else:
        asyncio.run(_sites(given.what, Path(given.rest[0]), float(given.rest[1]), given.rest[2:]))


if __name__ == "__main__":
    main()

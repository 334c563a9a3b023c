"""A federation whose processes can be killed, and what must be true of a run whatever has happened to it.

The database is read directly, so that one can look while the coordinator is down.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.federation import Federation, NoiseWorkshop, free_ports, random_tensors, redirect
from commonweight.codec.down import down_of
from commonweight.coordinator.blobs import Blobs
from commonweight.coordinator.settings import FILE, CoordinatorSettings, load_settings, settings_text
from commonweight.coordinator.store import Run, Store, verify_chain
from commonweight.errors import CommonweightError, StorageError, UnreachableError
from commonweight.federation.messages import TrainTask
from commonweight.lead.submit import sign
from commonweight.model.tensors import NamedTensors
from commonweight.recipe.load import parse_recipe
from commonweight.recipe.resolved import recipe_text
from commonweight.recipe.schema import DownSpec, Recipe
from commonweight.strategies.fedavg import FedAvg
from commonweight.strategies.update import Update
from commonweight.wire.frames import Channel, frame_of, plan_for
from commonweight.wire.protocol_pb2 import Job

from .nursery import Death, Nursery, Process

#: a run that is not done after this is not going to be
LIVENESS_S = 120.0
CHUNK_BYTES = 1 << 16
_POLL_S = 0.02


class World(Federation):
    """A coordinator, a lead and sites that add noise.

    Args:
        seconds: how long sites pretend to train.
        keep_after_s: training that took longer is kept on the site's disk.
        theta: what runs begin from.
        chunk_bytes: how their tensors are cut.
    """

    def __init__(
        self,
        nursery: Nursery,
        folder: Path,
        *,
        seconds: float = 0.0,
        keep_after_s: float = 1.0,
        theta: NamedTensors | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        **settings: Any,
    ) -> None:
        super().__init__(folder, settings={"heartbeat_s": 1.0, **settings}, seconds=seconds)
        self.nursery, self.keep_after_s = nursery, keep_after_s
        self.theta = random_tensors(0.5, tensors=8) if theta is None else theta
        self.chunk_bytes = chunk_bytes
        self.site_of: dict[str, Process] = {}
        self._deaths: Sequence[Death] = ()
        self._processes: list[Process] = []

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        if "store" in self.__dict__:
            self.store.close()

    def _start(self, log: str, arguments: list[str]) -> Any:
        process = self.nursery.start(
            arguments, self.folder / f"{log}.log", self._deaths, keep_after_s=self.keep_after_s
        )
        self._processes.append(process)
        return process

    # --- processes

    def begin(self, *deaths: Death) -> Process:
        """Start the coordinator, for the first time or again, to die as told."""
        self._deaths = deaths
        try:
            return self.start_coordinator()  # type: ignore[return-value]  # a Process is used like a Popen
        finally:
            self._deaths = ()

    def begin_site(self, name: str, *deaths: Death) -> Process:
        """Start a site, for the first time or again."""
        self.enrol_sites([name])
        self._deaths = deaths
        try:
            self.site_of[name] = self.start_site(name)  # type: ignore[assignment]
        finally:
            self._deaths = ()
        return self.site_of[name]

    def begin_recipe_site(self, name: str, *deaths: Death) -> Process:
        """Start a site that is enrolled and really trains (recipe_site.py), for the first time or again."""
        self._deaths = deaths
        try:
            self.site_of[name] = self._start(name, ["recipe-site", str(self.folder / "sites" / name)])
        finally:
            self._deaths = ()
        return self.site_of[name]

    def begin_all(self, count: int = 3, *, deaths: Sequence[Death] = ()) -> list[str]:
        """The coordinator, to die as told, and some sites, each a process of its own."""
        self.begin(*deaths)
        names = self.site_names(count)
        for name in names:
            self.begin_site(name)
        return names

    def route_lead(self, port: int) -> None:
        """From now on the lead dials another port."""
        self.client().__exit__(None, None, None)  # who is enrolled at the first opportunity
        redirect(self.lead_folder, port)

    def begin_second(self, *deaths: Death) -> int:
        """Start another replica, with a folder of its own; returns the port of its services."""
        folder, ready = self.folder / "coordinator-2", self.folder / "ready-2"
        if not folder.exists():
            shutil.copytree(self.coordinator_folder, folder, ignore=shutil.ignore_patterns("scratch"))
            (folder / "scratch").mkdir()
            settings = load_settings(folder).model_dump()
            ports = free_ports("listen", "listen_enrolment", "listen_http")
            settings |= {name: f"127.0.0.1:{port}" for name, port in ports.items()}
            (folder / FILE).write_text(settings_text(CoordinatorSettings(**settings)))
        ready.unlink(missing_ok=True)
        self._deaths = deaths
        self.second: Process = self._start("coordinator-2", ["coordinator", str(folder), str(ready)])
        self._deaths = ()
        self.patiently(ready.exists, "the second replica serves")
        return int(json.loads(ready.read_text())["services"])

    @property
    def main(self) -> Process:
        """The coordinator's process."""
        assert isinstance(self.coordinator, Process)
        return self.coordinator

    # --- runs

    def propose(
        self,
        sites: Sequence[str],
        *,
        rounds: int = 3,
        patience_s: float = 60.0,
        privacy: Mapping[str, Any] = MappingProxyType({}),
        compression: Any = "none",
        **federation: Any,
    ) -> Callable[[], str]:
        """A signed job. What is returned submits it: the same job, whenever it is called."""
        settings = {"rounds": rounds, "patience_s": patience_s, **federation}
        evaluation = {"controls": [], "every": rounds, "samples": 0}
        recipe = Recipe.model_validate(
            {
                "name": "noise",
                "federation": settings,
                "training": {"batch_size": 128},  # of which a site's noise may say that it is made
                "privacy": dict(privacy),
                "compression": compression,
                "evaluation": evaluation,
                "output": {"keep_rounds": 1},
            }
        )
        frame = frame_of({"theta": self.theta}, plan_for(self.theta.layout, (Channel("theta"),), self.chunk_bytes))
        with self.client() as client:
            job = Job(
                id=f"{time.time_ns():032x}",
                name="noise",
                recipe=recipe_text(recipe),
                kind="train",
                sites=sites,
                must_match={"base weights": "0" * 64},
                initial=frame.header,
                submitted_at=time.time(),
            )
            signed = sign(job, client.identity)

        def submit() -> str:
            with self.client() as client:
                return client.submit(signed, {"theta": self.theta}, frame)

        return submit

    def start_run(self, sites: Sequence[str], **federation: Any) -> str:
        return self.propose(sites, **federation)()

    def submit_through(self, submit: Callable[[], str]) -> str:
        """Submit as a person would whose coordinator dies meanwhile: again, until it is taken."""
        ends = time.monotonic() + LIVENESS_S
        with ThreadPoolExecutor(1) as aside:
            while True:
                taken = aside.submit(submit)
                while not taken.done():
                    self.revive()
                    time.sleep(_POLL_S)
                try:
                    return taken.result()
                except (UnreachableError, StorageError):
                    if time.monotonic() > ends:
                        raise

    # --- looking

    @cached_property
    def store(self) -> Store:
        return Store(load_settings(self.coordinator_folder).database_url(self.coordinator_folder))

    def patiently(self, found: Callable[[], Any], what: str, *, seconds: float = LIVENESS_S) -> Any:
        """What `found` gives as soon as it is something; nothing while the database is away."""
        ends = time.monotonic() + seconds
        while True:
            try:
                result = found()
            except StorageError:
                result = None
            if result:
                return result
            if time.monotonic() > ends:
                raise AssertionError(f"{what}: not within {seconds:g} s\n{self.logs()}")
            time.sleep(_POLL_S)

    def logs(self) -> str:
        """The end of every process's log."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def all_events(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in self.store.events(run, 0, 100_000)]

    def event(self, run: str, name: str, *, seconds: float = LIVENESS_S, **fields: Any) -> dict[str, Any]:
        """The first event of a run of this name and these fields, once it is there."""

        def found() -> dict[str, Any] | None:
            return next((e for e in self.all_events(run) if _fits(e, name, fields)), None)

        return self.patiently(found, f"event {name} {fields}", seconds=seconds)  # type: ignore[no-any-return]

    def site_events(self, site: str) -> list[dict[str, Any]]:
        path = self.folder / "sites" / site / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def site_event(self, site: str, name: str, *, seconds: float = LIVENESS_S, **fields: Any) -> dict[str, Any]:
        """The first line of a site's own log of this event and these fields, once it is there."""

        def found() -> dict[str, Any] | None:
            return next((e for e in self.site_events(site) if _fits(e, name, fields)), None)

        return self.patiently(found, f"{site}: {name} {fields}", seconds=seconds)  # type: ignore[no-any-return]

    def trained(self, site: str) -> list[int]:
        """The rounds that a site has begun to train for, each as often as it did."""
        path = self.folder / "sites" / site / "trained"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def training(self, site: str, round: int) -> None:
        """Wait until a site trains for a round."""
        self.patiently(lambda: round in self.trained(site), f"{site} trains for round {round}")

    def revive(self) -> bool:
        """Start the coordinator again if it is dead; whether it was."""
        if self.main.poll() is None:
            return False
        self.begin()
        return True

    def finish(self, run: str, *, seconds: float = LIVENESS_S, tend: Callable[[], Any] | None = None) -> Run:
        """Wait until a run has ended; what died meanwhile is started again by `tend` (by default the coordinator)."""

        def found() -> Run | None:
            (tend or self.revive)()
            row = self.store.run_row(run)
            return row if row.has_ended else None

        row: Run = self.patiently(found, f"the end of run {run}", seconds=seconds)
        assert row.state == "finished", f"{row.error} ({row.hint})\n{self.logs()}"
        return row

    def revive_all(self) -> None:
        """Start again whatever is dead."""
        self.revive()
        for name, process in list(self.site_of.items()):
            if process.poll() is not None:
                self.begin_site(name)

    # --- what must be true

    def check(
        self,
        run: str,
        *,
        rounds: int = 3,
        everyone: Sequence[str] | None = None,
        instead: Mapping[tuple[int, str], NamedTensors] = MappingProxyType({}),
    ) -> None:
        """A finished run is what an undisturbed one is.

        Every round was committed once. Who was told that its update was accepted is counted, once. The model is, bit
        for bit, the initial one and the updates of those who count. The audit log is whole. Nothing individual is left.

        Args:
            everyone: sites that must have answered in every round, in the order of folding.
            instead: updates that were not a site's usual noise, by round and site.
        """
        history = {number: record for number, record in self.store.commits(run).items() if number}
        assert sorted(history) == list(range(1, rounds + 1))
        if everyone is not None:
            assert {tuple(record["cohort"]) for record in history.values()} == {tuple(everyone)}
            assert all(set(r["answered"]) == set(everyone) for r in history.values()), self.history(run)
        entries = list(self.audit())
        verify_chain(entries)
        mine = [entry for entry in entries if entry.subject == run]
        assert Counter(e.details["round"] for e in mine if e.action == "round committed") == Counter(range(rounds + 1))
        accepted = Counter((e.details["round"], e.actor) for e in mine if e.action == "update accepted")
        assert accepted == Counter((n, site) for n, record in history.items() for site in record["answered"])
        for number, record in history.items():
            assert record["examples"] == sum(10 + len(site) for site in record["answered"]), number
            assert not set(record["answered"]) & {*record["failed"], *record["late"]}
        for folder in (self.folder / "sites").iterdir():
            told = {e["round"] for e in self.site_events(folder.name) if _fits(e, "update.accepted", {"run": run})}
            counted = {n for n, record in history.items() if folder.name in record["answered"]}
            assert told <= counted, f"{folder.name} was told that it counts in {sorted(told - counted)}"
        self.check_model(run, history, instead)
        self.check_tidy(run)

    def history(self, run: str) -> str:
        return json.dumps(
            {n: {k: r.get(k) for k in ("answered", "failed", "late")} for n, r in self.store.commits(run).items() if n}
        )

    def audit(self) -> Iterator[Any]:
        after = 0
        while entries := self.store.audit_entries(after):
            yield from entries
            after = entries[-1].sequence

    def check_model(self, run: str, history: dict[int, Any], instead: Mapping[tuple[int, str], NamedTensors]) -> None:
        rounds = [(r["cohort"], r["answered"]) for _, r in sorted(history.items())]
        recipe = parse_recipe(Job.FromString(self.store.run_row(run).job).recipe, "the job's recipe")
        expected = expected_model(self.theta, rounds, instead, down=recipe.compression.down)
        saved = [event["digest"] for event in self.all_events(run) if event["event"] == "adapter_saved"]
        assert saved
        assert set(saved) == {expected.digest()}
        frame = frame_of({"theta": expected}, plan_for(expected.layout, (Channel("theta"),), self.chunk_bytes))
        last = history[max(history)]
        assert last["state"]["base"] == frame.digest
        with self.client() as client:
            stored = client.frame(run, frame.digest)["theta"]
        assert stored.digest() == expected.digest()

    def check_tidy(self, run: str) -> None:
        """Nothing individual outlives its round: no blob, no sealed file; and no half-written one either."""
        self.patiently(lambda: not self.left_of(run), f"left behind: {self.left_of(run)}", seconds=60)

    def left_of(self, run: str) -> list[str]:
        """What there is of single updates of a run, and of half-written files."""
        settings = load_settings(self.coordinator_folder)
        blobs = Blobs(settings.blobs_url(self.coordinator_folder), self.folder / "looking", **settings.blob_options)
        found = blobs.keys(f"runs/{run}/updates")
        for scratch in self.folder.glob("coordinator*/scratch"):
            files = [*scratch.glob("uploads/*.sealed"), *scratch.glob("frame-*"), *scratch.glob("runs/*")]
            found += map(str, [*files, *scratch.glob(f"spares/{run}")])
        return found


def _fits(event: dict[str, Any], name: str, fields: dict[str, Any]) -> bool:
    return event["event"] == name and all(event.get(key) == value for key, value in fields.items())


_expected: dict[tuple[Any, ...], NamedTensors] = {}


def expected_model(
    theta: NamedTensors,
    rounds: Sequence[tuple[Sequence[str], Sequence[str]]],
    instead: Mapping[tuple[int, str], NamedTensors] = MappingProxyType({}),
    down: DownSpec | None = None,
) -> NamedTensors:
    """The model after some rounds of federated averaging over sites that add noise, made in memory.

    Args:
        rounds: of each, the cohort in the order of folding, and those of it who answered.
        instead: updates that were not a site's usual noise, by round and site.
        down: how what rounds change is coded on its way to the sites.
    """
    way = down_of(down or DownSpec(), theta.layout, 0)
    others = frozenset((place, tensors.digest()) for place, tensors in instead.items())
    key = (theta.digest(), others, repr(down), *((tuple(cohort), frozenset(answered)) for cohort, answered in rounds))
    if key not in _expected:
        strategy, late = FedAvg(), NamedTensors.zeros(theta.layout, wide=True)
        state = strategy.init(theta.clone())
        for number, (cohort, answered) in enumerate(rounds, 1):
            fold = strategy.open(state)
            for site in cohort:
                if site in answered:
                    update = noise_update(theta, site, number)
                    other = instead.get((number, site))
                    fold.add(update if other is None else replace(update, channels={"delta": other}))
            before = state.theta.clone()
            state = strategy.close(state, fold)
            for _ in way.follow(number, before, state.theta, late) if way is not None else ():
                pass
        _expected[key] = state.theta
    return _expected[key]


def noise_update(theta: NamedTensors, site: str, round: int) -> Update:
    """What a site that adds noise answers."""
    task = TrainTask(round, site, 0.0, 1, correction={"kind": "none"})
    work = NoiseWorkshop(site).train("", task, {"theta": theta})
    return Update(
        site, round, work.channels, float(work.num_examples), work.num_examples, work.num_label_tokens, work.num_steps
    )


__all__ = ["CommonweightError", "World", "expected_model", "noise_update"]

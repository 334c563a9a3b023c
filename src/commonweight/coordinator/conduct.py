"""One run from its first invitation to its report, on the replica that leads it; another may take it up at any time."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, cast

from .. import __version__
from ..errors import CommonweightError, QuorumError, StorageError, UnreachableError
from ..evaluate.report import write_report
from ..federation.asynchronous import with_equal_budget
from ..federation.catch_up import sizes_of, still_of_use
from ..federation.clusters import check_clusters, clusters_of, largest
from ..federation.controls import run_controls
from ..federation.evaluation import Evaluation
from ..federation.events import Events, phase_seconds
from ..federation.folder import storage_errors, write_json, write_text
from ..federation.ledger import Charges
from ..federation.messages import Completed, TrainTask
from ..federation.private_rounds import PrivateRounds, Seal
from ..federation.record import Record
from ..federation.run import FederatedRun
from ..federation.secure_rounds import check_sums
from ..federation.tally import Sites
from ..strategies.asynchronous import AsynchronousStrategy
from ..strategies.update import Update
from .context import Context
from .engine import Cancelled, Led, NetworkEngine, Stopped
from .plans import RunPlan
from .roster import Roster
from .secure_sums import NetworkSums
from .store import LeaseLost, StoreJournal, StoreLedger
from .stored_model import Combining, StoredModel, frames_of
from .versions import Versions

#: events wait at most this long in memory before others can read them
_FLUSH_S = 0.25
_FILES = ("recipe.yaml", "events.jsonl", "metrics.json", "report.html")


class NetworkShelf:
    """What a networked run may throw away. Accepted updates are the store's: nothing has to be kept beside."""

    def __init__(self, context: Context, run: str, model: StoredModel, journal: StoreJournal, keep_rounds: Any) -> None:
        self.here, self.run_id, self.model, self.journal, self.keep_rounds = context, run, model, journal, keep_rounds

    def kept(self, round: int) -> set[str]:
        return set()

    def take(self, task: TrainTask) -> Completed:
        raise NotImplementedError("accepted updates come through the engine")

    def keep(self, update: Update) -> None:
        """It is kept already: it was accepted by the store."""

    def site_file(self, site: str, round: int) -> str:
        """Sites keep their private state at home, by round."""
        return f"sites/000/{round:04d}.safetensors"

    def forget(self, round: int, answered: Sequence[str]) -> None:
        """Delete individual updates that were folded, and frames that nobody will ask for again."""
        self.forget_updates()
        commits = self.journal.commits()
        states = {n: record["state"] for n, record in commits.items()}
        kept = states if self.keep_rounds == "all" else dict(list(states.items())[-int(self.keep_rounds) :])
        last = states[max(states)]
        wanted = {state["base"] for state in kept.values()} | {last["slots"], last.get("late"), self.model.initial}
        wanted |= {last["base"], *self.here.store.bases_in_use(self.run_id)}
        of_use = still_of_use(sizes_of(commits), self.model.layout.num_bytes)
        wanted |= {states[number]["down"]["frame"] for number in of_use}
        # a frame that is in no commit may be another leader's, who is about to commit it
        known = set().union(*map(frames_of, states.values()))
        files = self.here.files(self.run_id)
        files.forget([digest for digest in files.digests() if digest in known - wanted])

    def forget_updates(self) -> None:
        for upload in self.here.store.spent_uploads(self.run_id):
            self.here.discard(upload)


class StoreEvents:
    """A listener that writes a run's events to the store, some at a time."""

    def __init__(self, context: Context, run: str) -> None:
        self.here, self.run_id = context, run
        self._lines: list[str] = []
        self._flushed_at = time.monotonic()
        self._opened_at: dict[int, float] = {}

    def listen(self, event: str, fields: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps({"t": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False))
        self._count(event, fields)
        if time.monotonic() - self._flushed_at > _FLUSH_S:
            self.flush()

    def _count(self, event: str, fields: Mapping[str, Any]) -> None:
        metrics = self.here.metrics
        if event == "round_opened":
            self._opened_at = {fields["round"]: time.monotonic()}
        elif event == "round_committed":
            metrics.rounds.labels("committed").inc()
            metrics.round_seconds.observe(time.monotonic() - self._opened_at.get(fields["round"], time.monotonic()))
        elif event == "round_abandoned":
            metrics.rounds.labels("abandoned").inc()

    def flush(self) -> None:
        """Write out what has gathered, if it has gathered for a while or is all there is to do."""
        if self._lines:
            self.here.store.add_events(self.run_id, self._lines)
            self._lines = []
        self._flushed_at = time.monotonic()


class Conductor:
    """Leads one run.

    Args:
        led: the lease, and what may stop it.
    """

    def __init__(self, context: Context, led: Led) -> None:
        self.here, self.led = context, led
        self.run_id = led.lease.run
        self.store = context.store
        self.folder = context.scratch / "runs" / self.run_id

    def conduct(self) -> None:
        """Carry the run to its end, or as far as this replica gets. What the run's people should see is in its state.

        Raises:
            LeaseLost: another replica leads it by now.
            StorageError, UnreachableError: the database or the blob store is away; the run is to be claimed anew later.
        """
        try:
            self._carry_on()
        finally:
            self.here.spares.forget(self.run_id)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _carry_on(self) -> None:
        lease = self.led.lease
        try:
            self._conduct()
        except Stopped:
            return
        except LeaseLost:
            raise
        except Cancelled:
            self.store.set_run_state(self.run_id, "cancelled", lease=lease)
        except CommonweightError as error:
            if error.retry and isinstance(error, StorageError | UnreachableError):
                raise
            self.store.set_run_state(self.run_id, "failed", error=error.message, hint=error.hint, lease=lease)
        self._tidy()

    def _tidy(self) -> None:
        """Nothing individual outlives its run."""
        for upload in self.store.spent_uploads(self.run_id):
            self.here.discard(upload)
        self.here.receiver.forget_run(self.run_id)

    def _conduct(self) -> None:
        plan = self.here.plans.of(self.run_id)
        assert plan is not None
        journal = StoreJournal(self.store, self.led.lease)
        self.store.set_run_state(self.run_id, "running", lease=self.led.lease)
        listener = StoreEvents(self.here, self.run_id)
        events = self._events(listener)
        try:
            began = time.perf_counter()
            events.emit("run_started", name=plan.recipe.name, resumed_after_round=journal.last_round())
            self._train(plan, journal, events, listener.flush)
            events.emit("run_finished", seconds=time.perf_counter() - began)
            events.flush()
            listener.flush()  # whoever follows the run reads on until it has ended
            self._keep_files()
            self.store.set_run_state(self.run_id, "finished", lease=self.led.lease)
        except CommonweightError as error:
            events.emit("run_interrupted", reason=error.message)
            raise
        finally:
            with suppress(CommonweightError):
                listener.flush()
            events.close()

    def _events(self, listener: StoreEvents) -> Events:
        """The run's events, those of other replicas before: the file is made anew from the store."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, after, lines = self.folder / "events.jsonl", 0, []
        while found := self.store.events(self.run_id, after, 10_000):
            lines += [line + "\n" for _, line in found]
            after = found[-1][0]
        write_text(path, "".join(lines))
        return Events(path, (listener.listen,))

    def _train(self, plan: RunPlan, journal: StoreJournal, events: Events, flush: Callable[[], None]) -> None:
        here, recipe = self.here, plan.recipe
        engine = NetworkEngine(self.led, plan, self.store, here.blobs, here.vault, here.presence, events, flush)
        roster = Roster(engine, journal, events)
        journal.bind({**dict(plan.job.must_match), "initial adapter": plan.initial.digest})
        started = datetime.now(UTC)
        if journal.last_round() == 0:
            roster.gather()
        first = roster.sites(journal.last_round() + 1)
        events.emit("loaded", sites=list(first.names)[:100], num_sites=len(first.names), layout="", seconds=0.0)
        if plan.shapes:
            events.emit("parts", sites=plan.parts)
        strategy = cast(Combining, plan.strategy(len(first.names)))
        strategy.shapes = plan.shapes
        strategy.check(recipe.federation.cohort.size(len(first.names)))
        check_clusters(recipe, strategy)
        private = PrivateRounds.of(recipe, journal, len(first.names), self._seal())
        charges = Charges(recipe, StoreLedger(self.store, self.led.lease, here.settings.privacy_budget))
        relays = tuple(recipe.federation.relays)
        check_sums(recipe, len(first.names), plan.layout)
        secure = NetworkSums(engine, journal, here.authority.certificate_pem) if plan.secure else None
        files = here.files(self.run_id)
        model = StoredModel(strategy, files, plan.initial.digest, private, relays, secure, plan.down)
        trainable = sum(plan.layout.numels.values())
        events.emit(
            "engine_started",
            workers=len(first.names),
            device="network",
            trainable=trainable,
            rounds=recipe.federation.rounds,
        )
        evaluation = Evaluation(recipe, first, engine, journal, events, strategy=strategy, apart=True)
        engine.announce(model.initial)
        evaluation.base()
        shelf = NetworkShelf(here, self.run_id, model, journal, recipe.output.keep_rounds)
        if isinstance(strategy, AsynchronousStrategy):
            versions = Versions(
                recipe, roster, strategy, model, engine, journal, shelf, events, evaluation, flush, charges
            )
            versions.run()
            sites = versions.sites
        else:
            federated = FederatedRun(
                recipe,
                roster.sites,
                strategy,
                model,
                engine,
                journal,
                shelf,
                events,
                evaluation,
                secure,
                charges=charges,
            )
            self._rounds(federated, events, recipe.federation.retries, recipe.federation.patience_s)
            sites = federated.sites
        events.emit("adapter_saved", folder="", digest=model.digest(largest(clusters_of(journal))))
        if "local" in recipe.evaluation.controls:
            engine.announce(model.initial)
            budget = with_equal_budget(recipe, strategy, len(sites.names))
            run_controls(budget, sites, engine, journal, events, apart=True)
        self._report(plan, journal, sites, roster, model, started)

    def _rounds(self, federated: FederatedRun, events: Events, retries: int, patience_s: float) -> None:
        """All rounds. One that was abandoned is tried again: the model is as the round before left it."""
        abandoned: dict[int, int] = {}
        while True:
            try:
                federated.run()
                return
            except QuorumError:
                number = federated.journal.last_round() + 1
                abandoned[number] = abandoned.get(number, 0) + 1
                if abandoned[number] > retries:
                    raise
                events.emit("round_repeated", round=number, attempt=abandoned[number] + 1)
                ends = time.monotonic() + patience_s
                while time.monotonic() < ends:
                    self.led.check()
                    time.sleep(min(0.2, patience_s))

    def _seal(self) -> Seal:
        """Noise lies in the database under the vault's key: who reads the database alone cannot take it off."""
        vault = self.here.vault

        def close(name: str, key: bytes) -> str:
            return vault.wrap(key, f"{self.run_id}/{name}").hex()

        return Seal(close, lambda name, text: vault.unwrap(bytes.fromhex(text), f"{self.run_id}/{name}"))

    # --- what is left for people

    def _report(
        self, plan: RunPlan, journal: StoreJournal, sites: Sites, roster: Roster, model: StoredModel, started: datetime
    ) -> None:
        recipe, facts = plan.recipe, roster.joined()
        write_text(self.folder / "recipe.yaml", plan.job.recipe)
        layout = plan.layout
        matched = dict(plan.job.must_match)
        record = Record(recipe, sites, journal).metrics(
            {
                "started": started.isoformat(timespec="seconds"),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": phase_seconds(self.folder / "events.jsonl"),
                "version": __version__,
                "sites": {site: facts[site]["data"] for site in sites.names},
                "partition": {},
                "engine": "network",
                "model": {
                    "name": recipe.model.name,
                    "trainable": sum(layout.numels.values()),
                    "adapter_bytes": layout.num_bytes,
                    "digest": matched.get("base weights", ""),
                    "tokenizer_digest": matched.get("tokenizer", ""),
                },
                "machine": {"workers": len(sites.names), "device": "network"},
                "adapter": {"digest": model.digest(largest(clusters_of(journal)))},
                **({"parts": plan.parts} if plan.shapes else {}),
            }
        )
        write_json(self.folder / "metrics.json", record)
        write_report(self.folder)

    def _keep_files(self) -> None:
        for name in _FILES:
            path = self.folder / name
            if path.exists():
                copy = self.folder / f".{name}.stored"
                with storage_errors(copy):
                    shutil.copyfile(path, copy)
                self.here.blobs.put(f"runs/{self.run_id}/result/{name}", copy)

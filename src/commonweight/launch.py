"""From a recipe to a finished run's folder: puts the parts together and hands over to `federation/run.py`."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__
from .codec.down import down_of
from .data.canaries import FILE as CANARIES
from .data.names import require_sites
from .engines.bench import Bench, build_bench
from .engines.inprocess import InProcessEngine, available_cores
from .engines.noise_secret import NoiseSecret
from .errors import StateError
from .evaluate.report import write_report
from .federation.asynchronous import AsynchronousRun, check_asynchronous, with_equal_budget
from .federation.clock import VirtualClock
from .federation.clusters import check_clusters, clusters_of, largest
from .federation.cohort import check_cohort, check_separation
from .federation.controls import run_controls
from .federation.evaluation import Evaluation
from .federation.events import Events, Listener, phase_seconds
from .federation.folder import RunFolder, storage_errors, write_json, write_text
from .federation.global_model import MemoryModel
from .federation.journal import Journal
from .federation.ledger import Charges
from .federation.ledger_file import LedgerFile, RunsLedger, check_ledger
from .federation.private_rounds import PrivateRounds
from .federation.record import Record
from .federation.residuals import save_residual
from .federation.run import FederatedRun
from .federation.secure_rounds import check_sums
from .federation.shelf import FolderShelf
from .federation.simulated_sums import SimulatedSums
from .federation.tally import Sites
from .model.base import tokenizer_digest
from .recipe.compatibility import keeps_state
from .recipe.load import check_methods, load_recipe
from .recipe.resolved import recipe_differences, recipe_digest, recipe_text
from .recipe.schema import Recipe
from .registry import resolve
from .strategies.asynchronous import AsynchronousStrategy
from .strategies.base import Strategy


def run(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    listeners: tuple[Listener, ...] = (),
    ledger: Path | None = None,
) -> dict[str, Any]:
    """Carry out a recipe and return its metrics; everything is left in the folder `output`.

    Args:
        output: the run's folder: a new or empty one, or with `resume` that of a run to go on with.
        listeners: called with (event, fields) as the run goes on.
        ledger: the file of a ledger to which rounds are charged, and whose budget may end the run.

    Raises:
        CommonweightError: see `errors.py`. What was committed stays, and `resume` goes on from it.
    """
    check_methods(recipe)
    folder = RunFolder(output, resume=resume)
    try:
        if resume:
            _check_same_recipe(recipe, folder)
        with nullcontext() if ledger is None else LedgerFile(ledger) as file:
            return _run(recipe, folder, listeners, file)
    finally:
        folder.close()


def _check_same_recipe(recipe: Recipe, folder: RunFolder) -> None:
    known = folder.path / "recipe.yaml"
    if not known.exists():
        return  # killed before it was written: nothing had begun
    differences = recipe_differences(load_recipe(known), recipe)
    if differences:
        raise StateError(
            f"the recipe has changed since the run in {folder.path} began: {'; '.join(differences)}",
            hint="resume with the recipe it began with, or start a new run in another folder (-o)",
        )


def _run(
    recipe: Recipe, folder: RunFolder, listeners: tuple[Listener, ...], ledger: LedgerFile | None
) -> dict[str, Any]:
    events = Events(folder.path / "events.jsonl", listeners)
    journal = Journal(folder.path / "state.sqlite")
    try:
        began, started = time.perf_counter(), datetime.now(UTC)
        folder.check_journal(journal.commits())
        check_ledger(journal, ledger)
        charges = Charges(recipe, None if ledger is None else RunsLedger(ledger, journal, folder.path.name))
        write_text(folder.path / "recipe.yaml", recipe_text(recipe))
        events.emit("run_started", name=recipe.name, resumed_after_round=journal.last_round())
        bench = build_bench(recipe)
        sites = bench.facts
        check_cohort(len(sites.names), recipe.federation)
        check_separation(len(sites.names), recipe)
        check_sums(recipe, len(sites.names), bench.theta.layout)
        require_sites(recipe.federation.relay_of, sites.names, "federation.relays")
        strategy = _strategy(recipe, len(sites.names))
        strategy.check(recipe.federation.cohort.size(len(sites.names)))
        check_asynchronous(recipe, len(sites.names))
        check_clusters(recipe, strategy)
        clock = _clock(recipe, sites)
        digests = _digests(recipe, bench)
        journal.bind(digests)
        if bench.canaries is not None:
            write_json(folder.path / CANARIES, bench.canaries.to_json(bench.base.tokenizer))
        seconds = time.perf_counter() - began
        layout = bench.partition["layout"]
        parts = {site: shape.facts(bench.theta.layout) for site, shape in bench.shapes.items()}
        events.emit("loaded", sites=list(sites.names)[:100], num_sites=len(sites.names), layout=layout, seconds=seconds)
        if parts:
            events.emit("parts", sites=parts)
        if recipe.privacy.own_noise:
            bench.secret = NoiseSecret(folder.path)
            bench.secret.make()
        trained = _train(bench, sites, clock, folder, journal, events, charges)
        if bench.secret is not None:
            bench.secret.delete()
        events.emit("run_finished", seconds=time.perf_counter() - began)
        events.flush()
        facts = {
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": phase_seconds(folder.path / "events.jsonl"),
            **_facts(bench, digests, trained),
            **({"parts": parts} if parts else {}),
            **({"clock": clock.facts(journal.commits())} if clock else {}),
        }
        metrics = Record(recipe, sites, journal).metrics(facts)
        write_json(folder.path / "metrics.json", metrics)
        write_report(folder.path)
        return metrics
    finally:
        events.close()
        journal.close()


def _train(
    bench: Bench,
    sites: Sites,
    clock: VirtualClock | None,
    folder: RunFolder,
    journal: Journal,
    events: Events,
    charges: Charges,
) -> dict[str, Any]:
    """Every arm, on the engine's workers: their number, and the digest of the resulting adapter."""
    recipe = bench.recipe
    strategy = _strategy(recipe, len(sites.names))
    strategy.shapes = bench.shapes
    with InProcessEngine(bench, strategy, folder.path, events) as engine:
        events.emit(
            "engine_started",
            workers=engine.num_workers,
            device=str(bench.base.device),
            trainable=bench.participant.trainables.num_parameters,
            rounds=recipe.federation.rounds,
        )
        evaluation = Evaluation(recipe, sites, engine, journal, events, strategy=strategy)
        engine.broadcast(bench.theta, {})
        evaluation.base()
        private = PrivateRounds.of(recipe, journal, len(sites.names))
        secure = None
        if recipe.privacy.summed:
            secure = SimulatedSums(recipe, bench.theta.layout, None if bench.secret is None else bench.secret.key)
        theta, spec = bench.theta.clone(), recipe.federation
        down = down_of(recipe.compression.down, theta.layout, recipe.seed)
        model = MemoryModel(strategy, theta, folder, bench.save, spec, private, bench.moved, secure, down)
        shelf = FolderShelf(
            folder,
            journal,
            sites,
            model.layout,
            site_state=keeps_state(recipe, strategy),
            keep_rounds=recipe.output.keep_rounds,
        )
        if isinstance(strategy, AsynchronousStrategy):
            assert clock is not None
            AsynchronousRun(
                recipe, sites, clock, strategy, model, engine, journal, shelf, folder, events, evaluation, charges
            ).run()
        else:
            FederatedRun(
                recipe, lambda _: sites, strategy, model, engine, journal, shelf, events, evaluation, secure, charges
            ).run()
        clusters = clusters_of(journal)
        model.save_models(folder.path / "adapter", folder.path, clusters, partial(bench.save, tokenizer=True))
        if strategy.moves_base:
            with storage_errors(folder.path):
                save_residual(model.residuals, recipe.federation.rounds, folder.path / "adapter")
        digest = model.model_of(largest(clusters)).digest()
        events.emit("adapter_saved", folder="adapter", digest=digest)
        if {"local", "centralised"} & set(recipe.evaluation.controls):
            run_controls(with_equal_budget(recipe, strategy, len(sites.names)), sites, engine, journal, events)
        return {"workers": engine.num_workers, "adapter_digest": digest}


def _strategy(recipe: Recipe, num_sites: int) -> Strategy:
    method = recipe.federation.strategy
    kind = resolve("strategy", method.name)
    strategy: Strategy = kind(kind.Options(**method.options), num_sites=num_sites)
    return strategy


def _clock(recipe: Recipe, sites: Sites) -> VirtualClock | None:
    spec = recipe.federation.clock
    return VirtualClock.of(spec, sites, seed=recipe.seed) if spec.runs else None


def _digests(recipe: Recipe, bench: Bench) -> dict[str, str]:
    """What a run is made of; a resumed one must be made of the same."""
    return {
        "recipe": recipe_digest(recipe),
        "base weights": bench.base_digest,
        "tokenizer": tokenizer_digest(bench.base.tokenizer),
        "data": str(bench.partition["digest"]),
        "adapter layout": bench.theta.layout.digest,
        "initial adapter": bench.theta.digest(),
        **bench.must_match_too,
    }


def _facts(bench: Bench, digests: Mapping[str, str], trained: Mapping[str, Any]) -> dict[str, Any]:
    """What the journal does not know: versions, data, model, machine."""
    return {
        "version": __version__,
        "sites": bench.partition["sites"],
        "partition": {key: value for key, value in bench.partition.items() if key != "sites"},
        "engine": bench.recipe.engine.kind,
        "model": {
            "name": bench.base.name,
            "parameters": bench.base.num_parameters,
            "trainable": bench.participant.trainables.num_parameters,
            "adapter_bytes": bench.theta.layout.num_bytes,
            "digest": digests["base weights"],
            "tokenizer_digest": digests["tokenizer"],
        },
        "machine": {**_machine(), "device": str(bench.base.device), "workers": trained["workers"]},
        "adapter": {"digest": trained["adapter_digest"]},
        **({"canaries": bench.canaries.facts()} if bench.canaries is not None else {}),
    }


def _machine() -> dict[str, Any]:
    import peft
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "platform": platform.platform(),
        "cpus": available_cores(),
    }

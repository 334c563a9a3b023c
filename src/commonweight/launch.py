"""From a recipe to a finished run's folder: puts the parts together and hands over to `federation/run.py`."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__
from .engines.bench import Bench, build_bench
from .engines.inprocess import InProcessEngine, available_cores
from .errors import StateError
from .evaluate.report import write_report
from .federation.cohort import check_cohort
from .federation.controls import run_controls
from .federation.evaluation import Evaluation
from .federation.events import Events, Listener
from .federation.folder import RunFolder, write_json, write_text
from .federation.journal import Journal
from .federation.record import Record
from .federation.run import FederatedRun
from .model.adapters import save_adapter
from .model.base import tokenizer_digest, weights_digest
from .model.tensors import NamedTensors
from .recipe.load import check_methods, load_recipe
from .recipe.resolved import recipe_differences, recipe_digest, recipe_text
from .recipe.schema import Recipe
from .registry import resolve
from .strategies.base import Strategy


def run(recipe: Recipe, output: Path, *, resume: bool = False, listeners: tuple[Listener, ...] = ()) -> dict[str, Any]:
    """Carry out a recipe and return its metrics; everything is left in the folder `output`.

    Args:
        output: the run's folder: a new or empty one, or with `resume` that of a run to go on with.
        listeners: called with (event, fields) as the run goes on.

    Raises:
        CommonweightError: see `errors.py`. What was committed stays, and `resume` goes on from it.
    """
    check_methods(recipe)
    folder = RunFolder(output, resume=resume)
    try:
        if resume:
            _check_same_recipe(recipe, folder)
        return _run(recipe, folder, listeners)
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


def _run(recipe: Recipe, folder: RunFolder, listeners: tuple[Listener, ...]) -> dict[str, Any]:
    began, started = time.perf_counter(), datetime.now(UTC)
    events = Events(folder.path / "events.jsonl", listeners)
    journal = Journal(folder.path / "state.sqlite")
    try:
        write_text(folder.path / "recipe.yaml", recipe_text(recipe))
        events.emit("run_started", name=recipe.name, resumed_after_round=journal.last_round())
        bench = build_bench(recipe)
        sites = bench.facts
        check_cohort(len(sites.names), recipe.federation)
        digests = _digests(recipe, bench)
        journal.bind(digests)
        strategy = _strategy(recipe, len(sites.names))
        loaded = time.perf_counter()
        events.emit("loaded", sites=list(sites.names)[:100], num_sites=len(sites.names), seconds=loaded - began)
        with InProcessEngine(bench, strategy, folder.path, events) as engine:
            _describe(engine, bench, events)
            evaluation = Evaluation(recipe, sites, engine, journal, events)
            engine.broadcast(bench.theta, {})
            evaluation.base()
            trained_from = time.perf_counter()

            def save(theta: NamedTensors, where: Path) -> None:
                bench.participant.trainables.values.copy_(theta)
                save_adapter(bench.model, None, where)

            federated = FederatedRun(recipe, sites, strategy, engine, folder, journal, events, evaluation, save)
            state = federated.run(bench.theta.clone())
            bench.participant.trainables.values.copy_(state.theta)
            save_adapter(bench.model, bench.base.tokenizer, folder.path / "adapter")
            federated_at = time.perf_counter()
            events.emit("adapter_saved", folder="adapter", digest=state.theta.digest())
            if {"local", "centralised"} & set(recipe.evaluation.controls):
                run_controls(recipe, sites, engine, journal, events)
            workers = engine.num_workers
        ended = time.perf_counter()
        facts = {
            "version": __version__,
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {
                "total": ended - began,
                "load": loaded - began,
                "evaluate": trained_from - loaded,
                "federated": federated_at - trained_from,
                "controls": ended - federated_at,
            },
            "sites": bench.partition["sites"],
            "partition": {key: value for key, value in bench.partition.items() if key != "sites"},
            "engine": recipe.engine.kind,
            "model": {
                **_model_facts(bench),
                "digest": digests["base weights"],
                "tokenizer_digest": digests["tokenizer"],
            },
            "adapter": {"digest": state.theta.digest()},
            "machine": {**_machine(bench), "workers": workers},
        }
        metrics = Record(recipe, sites, journal).metrics(facts)
        write_json(folder.path / "metrics.json", metrics)
        write_report(folder.path)
        events.emit("run_finished", seconds=ended - began)
        return metrics
    finally:
        events.close()
        journal.close()


def _strategy(recipe: Recipe, num_sites: int) -> Strategy:
    method = recipe.federation.strategy
    kind = resolve("strategy", method.name)
    strategy: Strategy = kind(kind.Options(**method.options), num_sites=num_sites)
    return strategy


def _digests(recipe: Recipe, bench: Bench) -> dict[str, str]:
    """What a run is made of; a resumed one must be made of the same."""
    return {
        "recipe": recipe_digest(recipe),
        "base weights": weights_digest(bench.base.model)
        if recipe.model.adapter.kind != "full"
        else bench.theta.digest(),
        "tokenizer": tokenizer_digest(bench.base.tokenizer),
        "data": str(bench.partition["digest"]),
        "adapter layout": bench.theta.layout.digest,
        "initial adapter": bench.theta.digest(),
    }


def _describe(engine: InProcessEngine, bench: Bench, events: Events) -> None:
    events.emit(
        "engine_started",
        workers=engine.num_workers,
        device=str(bench.base.device),
        trainable=bench.participant.trainables.num_parameters,
        rounds=bench.recipe.federation.rounds,
    )


def _model_facts(bench: Bench) -> Mapping[str, Any]:
    return {
        "name": bench.base.name,
        "parameters": bench.base.num_parameters,
        "trainable": bench.participant.trainables.num_parameters,
        "adapter_bytes": bench.theta.layout.num_bytes,
    }


def _machine(bench: Bench) -> dict[str, Any]:
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
        "device": str(bench.base.device),
    }

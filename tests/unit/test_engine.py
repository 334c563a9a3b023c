"""The in-process engine: the same bits however many workers there are, and whatever happens to them."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from commonweight.engines import inprocess
from commonweight.engines.bench import Bench, build_bench
from commonweight.engines.inprocess import InProcessEngine
from commonweight.errors import QuorumError
from commonweight.federation.events import Events
from commonweight.federation.messages import Completed, Dropped, EvaluateTask, Outcome, Task, TrainTask
from commonweight.launch import run
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.strategies.fedavg import FedAvg
from commonweight.strategies.scaffold import Scaffold
from tests.unit.wayward import ALWAYS

MakeRecipe = Callable[..., Recipe]
ROWS = {"north": 20, "south": 14, "west": 8}  # training rows of the sites of `small_data`
SHORT = {"optimizer": "sgd", "lr": 0.1, "steps": 2}


def wayward(folder: Path, way: str, *, at: str | None = None, times: int = ALWAYS) -> dict[str, Any]:
    """A training section whose objective goes wrong."""
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    rows = None if at is None else ROWS[at]
    objective = {"name": "tests.unit.wayward:Wayward", "way": way, "folder": str(marks), "rows": rows, "times": times}
    return {**SHORT, "objective": objective}


def events_of(run_folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (run_folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def digest(metrics: dict[str, Any]) -> str:
    return str(metrics["adapter"]["digest"])


@pytest.fixture(autouse=True)
def children_of_others() -> Iterator[None]:
    """Other tests' servers may be children of this process too."""
    OTHERS.update(psutil.Process().children(recursive=True))
    yield
    OTHERS.clear()


OTHERS: set[psutil.Process] = set()


def no_children_are_left() -> bool:
    return not set(psutil.Process().children(recursive=True)) - OTHERS


@pytest.fixture
def undisturbed(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of two plain rounds of FedAvg, run once."""
    folder = tmp_path_factory.getbasetemp() / "undisturbed"
    if not folder.exists():
        run(make_recipe(training=SHORT), folder)
    return digest(json.loads((folder / "metrics.json").read_text()))


# --- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "federation",
    [{"strategy": "fedavg"}, {"strategy": "scaffold"}, {"strategy": "fedadam", "cohort": 0.6, "weighting": "tokens"}],
    ids=lambda federation: federation["strategy"],
)
def test_the_bits_do_not_depend_on_the_number_of_workers(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, federation: dict[str, Any]
) -> None:
    found: dict[int | str, Any] = {}
    for workers in (1, 2, 3):
        recipe = make_recipe(federation=federation, training=SHORT, engine={"workers": workers})
        metrics = run(recipe, tmp_path / str(workers))
        assert metrics["machine"]["workers"] == workers
        found[workers] = digest(metrics), losses(metrics)
    monkeypatch.setattr(inprocess, "sys", SimpleNamespace(platform="darwin"))  # where forks are not safe
    metrics = run(make_recipe(federation=federation, training=SHORT), tmp_path / "here")
    found["none"] = digest(metrics), losses(metrics)
    assert len(set(map(str, found.values()))) == 1, found


def losses(metrics: dict[str, Any]) -> list[Any]:
    return [[point["macro_loss"], point["sites"]] for point in metrics["arms"]["federated"]["rounds"]]


def test_a_run_leaves_the_process_as_it_was(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    run(make_recipe(training=SHORT), tmp_path / "run")
    assert told == [1, 5]
    assert gc.get_freeze_count() == 0
    assert no_children_are_left()


# --- the engine by itself -----------------------------------------------------------------------------------------


@contextmanager
def engine_over(
    recipe: Recipe, folder: Path, *, strategy: FedAvg | Scaffold | None = None
) -> Iterator[tuple[InProcessEngine, Bench]]:
    bench, events = build_bench(recipe), Events(folder / "events.jsonl")
    with InProcessEngine(bench, strategy or FedAvg(), folder, events) as engine:
        engine.broadcast(bench.theta, {})
        yield engine, bench
    events.close()


def train_tasks(count: int) -> list[Task]:
    """Tasks of very different lengths, the first of every four much the longest."""
    names = list(ROWS)
    return [TrainTask(1, names[k % 3], 0.1, 12 if k % 4 == 0 else 1) for k in range(count)]


def deltas(outcomes: Iterator[Outcome]) -> list[str]:
    return [outcome.update.delta.digest() for outcome in outcomes if isinstance(outcome, Completed) and outcome.update]


@pytest.mark.parametrize("at_once", [1, 8], ids=["one task a message", "several tasks a message"])
def test_outcomes_come_in_the_order_of_the_tasks_and_stay_valid_until_the_next(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(inprocess, "_TASKS_AT_ONCE", at_once)
    monkeypatch.setattr(inprocess, "_SHORT_TASK_S", 1e9)
    monkeypatch.setattr(inprocess, "_SLOTS_BYTES", 0)
    tasks = train_tasks(17)
    tasks[5:5] = [EvaluateTask(("west",)), EvaluateTask(("north", "south"))]
    with engine_over(make_recipe(training=SHORT, engine={"workers": 1}), tmp_path) as (engine, _):
        expected = deltas(engine.run(tasks))
    with engine_over(make_recipe(training=SHORT, engine={"workers": 3}), tmp_path) as (engine, _):
        assert len(engine.slots) < 17  # so that slots are used again
        seen: list[Task] = []
        digests: list[str] = []
        for outcome in engine.run(tasks):
            seen.append(outcome.task)
            assert isinstance(outcome, Completed)
            if outcome.update is not None:
                digests.append(outcome.update.delta.digest())
                time.sleep(0.05)  # the workers go on meanwhile
                assert outcome.update.delta.digest() == digests[-1]
    assert seen == tasks
    assert digests == expected
    assert len(set(digests)) == 6  # three sites, two lengths


def test_an_update_carries_what_its_site_did(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(training={**SHORT, "steps": None, "epochs": 1}, federation={"weighting": "tokens"})
    with engine_over(recipe, tmp_path) as (engine, bench):
        for outcome in engine.run([TrainTask(3, site, 0.1, bench.facts.steps[site]) for site in ROWS]):
            assert isinstance(outcome, Completed)
            update = outcome.update
            assert update is not None
            assert (update.round, update.num_examples) == (3, ROWS[update.site])
            assert update.num_steps == math.ceil(ROWS[update.site] / 4)
            assert update.weight == update.num_label_tokens
            assert update.num_label_tokens == int(bench.sites[update.site].train.labelled.sum())
            assert math.isfinite(update.metrics["loss"])


def test_tasks_start_from_what_was_broadcast_last(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    tasks = train_tasks(3)
    with engine_over(make_recipe(training=SHORT), tmp_path) as (engine, bench):
        first = deltas(engine.run(tasks))
        moved = bench.theta.clone()
        for _, flat in moved.floating():
            flat.add_(0.5)
        engine.broadcast(moved, {})
        assert set(deltas(engine.run(tasks))).isdisjoint(first)
        engine.broadcast(bench.theta, {})
        assert deltas(engine.run(tasks)) == first


def test_a_shift_that_is_left_early_does_not_disturb_the_next(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    tasks = train_tasks(6)
    with engine_over(make_recipe(training=SHORT), tmp_path) as (engine, _):
        expected = deltas(engine.run(tasks))
        left = engine.run(tasks)
        next(left)
        left.close()  # type: ignore[attr-defined]
        assert deltas(engine.run(tasks)) == expected


def test_short_tasks_go_out_several_at_once_but_never_all_to_one_worker_nor_with_long_ones(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with engine_over(make_recipe(training=SHORT), tmp_path) as (engine, _):
        one, other = engine.workers
        one.task_s = {EvaluateTask: 0.0}
        assert len(inprocess.Shift(engine, train_tasks(9), None)._choose(one)) == 1  # nothing is known of training
        one.task_s = other.task_s = {TrainTask: 0.0}
        shift = inprocess.Shift(engine, [*train_tasks(7), EvaluateTask(("west",))], None)
        assert [index for index, _ in shift._choose(one)] == [0, 1, 2, 3]
        assert [index for index, _ in shift._choose(other)] == [4, 5]
        assert len(inprocess.Shift(engine, train_tasks(99), None)._choose(one)) == 8
        assert len(inprocess.Shift(engine, train_tasks(99), 10.0)._choose(one)) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_shared_memory_is_no_file_of_bounded_size(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Containers often have 64 MB of /dev/shm; whatever is mapped from there fails when it is used up."""
    with engine_over(make_recipe(training=SHORT), tmp_path):
        mapped = Path("/proc/self/maps").read_text().splitlines()
    assert not [line for line in mapped if "/dev/shm/" in line and "/sem." not in line]


# --- workers that die ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["killed", "exits"])
def test_a_worker_that_dies_in_the_middle_is_replaced_and_nothing_changes(
    make_recipe: MakeRecipe, tmp_path: Path, undisturbed: str, way: str
) -> None:
    recipe = make_recipe(training=wayward(tmp_path, way, at="south", times=1))
    metrics = run(recipe, tmp_path / "run")
    replaced = events_of(tmp_path / "run", "worker_replaced")
    assert [event["exit_code"] for event in replaced] == [-signal.SIGKILL if way == "killed" else 7]
    assert digest(metrics) == undisturbed
    assert all(len(round["answered"]) == 3 for round in metrics["rounds"])
    assert no_children_are_left()


@pytest.mark.parametrize("retries", [0, 2])
def test_a_site_that_kills_every_worker_is_given_up_after_its_retries(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retries: int
) -> None:
    monkeypatch.setattr(inprocess, "_TASKS_AT_ONCE", 1)  # so that there is no doubt which of several tasks it was
    recipe = make_recipe(training=wayward(tmp_path, "killed", at="north"), federation={"rounds": 1, "retries": retries})
    (round,) = run(recipe, tmp_path / "run")["rounds"]
    assert round["answered"] == ["south", "west"]
    assert round["failed"] == {"north": "its worker was killed by SIGKILL (out of memory?)"}
    assert len(events_of(tmp_path / "run", "worker_replaced")) == retries + 1
    assert [event["site"] for event in events_of(tmp_path / "run", "site_failed")] == ["north"]


def test_one_of_several_tasks_in_a_message_that_kills_is_found_and_the_others_are_done(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inprocess, "_SHORT_TASK_S", 1e9)
    tasks = [TrainTask(1, site, 0.1, 1) for site in ("north", "west", "south", "west", "north", "west")]
    with engine_over(make_recipe(training=SHORT, engine={"workers": 1}), tmp_path) as (engine, _):
        expected = deltas(engine.run(tasks))
    recipe = make_recipe(
        training=wayward(tmp_path, "killed", at="south"), federation={"retries": 1}, engine={"workers": 1}
    )
    with engine_over(recipe, tmp_path) as (engine, _):
        next(engine.run([EvaluateTask(("west",))]))  # from now on its tasks count as short
        engine.broadcast(engine.bench.theta, {})
        outcomes = []
        for outcome in engine.run(tasks):
            assert isinstance(outcome, Dropped) == (outcome.task == tasks[2])
            outcomes += deltas(iter([outcome]))
    assert outcomes == [found for k, found in enumerate(expected) if k != 2]


def test_an_idle_worker_that_died_is_replaced_when_it_is_needed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    tasks = train_tasks(4)
    with engine_over(make_recipe(training=SHORT), tmp_path) as (engine, _):
        expected = deltas(engine.run(tasks))
        for worker in engine.workers:
            os.kill(worker.process.pid or 0, signal.SIGKILL)
            psutil.wait_procs([psutil.Process(worker.process.pid)], timeout=30)
        assert deltas(engine.run(tasks)) == expected
    assert len(events_of(tmp_path, "worker_replaced")) >= 1


def test_a_round_short_of_its_quorum_ends_the_run_and_a_resumed_one_tries_again(
    make_recipe: MakeRecipe, tmp_path: Path, undisturbed: str
) -> None:
    recipe = make_recipe(
        training=wayward(tmp_path, "killed", at="west", times=2), federation={"quorum": 1.0, "retries": 1}
    )
    with pytest.raises(QuorumError, match="round 1 was abandoned: 2 of 3 sites answered, 3 are needed") as caught:
        run(recipe, tmp_path / "run")
    assert "west: its worker was killed by SIGKILL" in caught.value.message
    assert caught.value.retry
    assert no_children_are_left()
    assert [event["answered"] for event in events_of(tmp_path / "run", "round_abandoned")] == [["north", "south"]]
    assert digest(run(recipe, tmp_path / "run", resume=True)) == undisturbed


# --- sites that go wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("raises", "ValueError: row 3 is no row"),
        ("nan loss", "the training loss became nan at local step 1"),
        ("nan report", "the objective reported a training loss of nan"),
        ("nan values", "the update of site 'south' for round 1 holds NaN or infinity in 'base_model."),
        ("infinite values", "the update of site 'south' for round 1 holds NaN or infinity in 'base_model."),
    ],
)
def test_what_goes_wrong_at_one_site_is_named_and_the_others_are_averaged(
    make_recipe: MakeRecipe, tmp_path: Path, way: str, reason: str
) -> None:
    federation = {"rounds": 1, "strategy": "scaffold"}
    recipe = make_recipe(training=wayward(tmp_path, way, at="south"), federation=federation)
    metrics = run(recipe, tmp_path / "run")
    (failed,) = events_of(tmp_path / "run", "site_failed")
    assert failed["site"] == "south"
    assert failed["reason"].startswith(reason)
    assert metrics["rounds"][0]["answered"] == ["north", "west"]
    assert list(metrics["rounds"][0]["failed"]) == ["south"]
    assert events_of(tmp_path / "run", "worker_replaced") == []
    assert_is_the_mean_of_the_others(tmp_path, make_recipe, leaving_out="south")


def assert_is_the_mean_of_the_others(folder: Path, make_recipe: MakeRecipe, *, leaving_out: str) -> None:
    names = [name for name in ROWS if name != leaving_out]
    recipe = make_recipe(training=SHORT)
    with engine_over(recipe, folder, strategy=Scaffold(num_sites=3)) as (engine, bench):
        engine.broadcast(bench.theta, {"control": NamedTensors.zeros(bench.theta.layout)})
        found = [
            ({n: t.double() for n, t in o.update.delta.items()}, o.update.weight)
            for o in engine.run([TrainTask(1, name, 0.1, 2) for name in names])
            if isinstance(o, Completed) and o.update is not None
        ]
    total = sum(weight for _, weight in found)
    state = load_file(folder / "run" / "state" / "0001.safetensors")["theta/float32"]
    result = NamedTensors(bench.theta.layout, {torch.float32: state})
    for name, tensor in result.items():
        mean = bench.theta[name].double() + sum(delta[name] * (weight / total) for delta, weight in found)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


def test_a_round_in_which_every_site_fails_is_abandoned_with_their_reasons(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(QuorumError, match="0 of 3 sites answered, 2 are needed") as caught:
        run(make_recipe(training=wayward(tmp_path, "raises")), tmp_path / "run")
    assert "north: ValueError: row 3 is no row; south: ValueError" in caught.value.message
    assert [event["site"] for event in events_of(tmp_path / "run", "site_failed")] == list(ROWS)
    assert caught.value.exit_code == 5
    assert no_children_are_left()


def outcomes_by_kind(outcomes: Sequence[Outcome]) -> list[str]:
    return ["late" if isinstance(o, Dropped) and o.late else type(o).__name__ for o in outcomes]


# --- the deadline -------------------------------------------------------------------------------------------------


class Clock:
    """The engine's clock, which jumps far beyond any deadline when told to."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(inprocess, "time", clock)
    return clock


def jumps_after(clock: Clock, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps when so many updates have reached the coordinator in a shift."""
    seen: Counter[int] = Counter()
    whole = InProcessEngine.outcome

    def outcome(self: InProcessEngine, task: Task, answer: Any, slot: int | None) -> Outcome:
        found = whole(self, task, answer, slot)
        if isinstance(task, TrainTask):
            seen[task.round] += 1
            clock.ahead += 1e6 * (seen[task.round] == count)
        return found

    monkeypatch.setattr(InProcessEngine, "outcome", outcome)


@pytest.mark.parametrize("slow", ["north", "west"])
def test_a_site_that_is_slow_beyond_the_deadline_is_late_and_the_round_goes_on(
    make_recipe: MakeRecipe, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """Whether the others wait for it in the order of folding (the first) or not (the last)."""
    jumps_after(clock, 2, monkeypatch)
    recipe = make_recipe(training=wayward(tmp_path, "slow", at=slow), federation={"deadline_s": 10_000})
    metrics = run(recipe, tmp_path / "run")
    others = [site for site in ROWS if site != slow]
    assert [round["answered"] for round in metrics["rounds"]] == [others, others]
    assert [round["late"] for round in metrics["rounds"]] == [[slow], [slow]]
    assert [round["failed"] for round in metrics["rounds"]] == [{}, {}]
    assert [(e["round"], e["site"]) for e in events_of(tmp_path / "run", "site_late")] == [(1, slow), (2, slow)]
    assert [point["round"] for point in metrics["arms"]["federated"]["rounds"]] == [0, 1, 2]
    assert no_children_are_left()


def test_a_slow_site_makes_no_other_late_though_tasks_were_short_before(
    make_recipe: MakeRecipe, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps_after(clock, 5, monkeypatch)
    monkeypatch.setattr(inprocess, "_SHORT_TASK_S", 1e9)
    tasks = [TrainTask(1, site, 0.1, 1) for site in ("north", "south", "west", "south", "west", "south")]
    with engine_over(make_recipe(training=wayward(tmp_path, "slow", at="north")), tmp_path) as (engine, _):
        list(engine.run([EvaluateTask((site,)) for site in ("north", "south", "west", "north")]))
        outcomes = list(engine.run(tasks, deadline_s=10_000))
    assert outcomes_by_kind(outcomes) == ["late"] + ["Completed"] * 5


def test_too_many_late_sites_end_the_run(
    make_recipe: MakeRecipe, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(
        training=wayward(tmp_path, "slow", at="north"), federation={"deadline_s": 10_000, "quorum": 1.0}
    )
    monkeypatch.setattr(inprocess.Shift, "_send_out", jumping(inprocess.Shift._send_out, clock))
    with pytest.raises(QuorumError, match="0 of 3 sites answered, 3 are needed") as caught:
        run(recipe, tmp_path / "run")
    for site in ROWS:
        assert f"{site}: no answer within federation.deadline_s" in caught.value.message


def jumping(send_out: Callable[[Any], None], clock: Clock) -> Callable[[Any], None]:
    """The clock jumps as soon as training tasks have gone out."""

    def call(shift: Any) -> None:
        send_out(shift)
        if any(isinstance(task, TrainTask) for task in shift.tasks):
            clock.ahead += 1e6

    return call


def test_only_training_is_late_what_else_was_asked_for_is_waited_for(
    make_recipe: MakeRecipe, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inprocess.Shift, "_send_out", jumping(inprocess.Shift._send_out, clock))
    tasks: list[Task] = [*train_tasks(5), EvaluateTask(("west",)), EvaluateTask(("north",))]
    recipe = make_recipe(training=wayward(tmp_path, "slow"))
    with engine_over(recipe, tmp_path) as (engine, _):
        outcomes = list(engine.run(tasks, deadline_s=10_000))
        assert outcomes_by_kind(outcomes) == ["late"] * 5 + ["Completed"] * 2
        assert len(engine.workers) == 2

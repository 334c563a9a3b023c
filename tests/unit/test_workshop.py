"""A site's workshop: the in-process engine's bits from the site's own rows, and no more told or trusted than needed."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict

from commonweight.data.sites import load_sites
from commonweight.engines.bench import Bench, build_bench
from commonweight.engines.handshake import check_handshake, handshake
from commonweight.engines.inprocess import InProcessEngine
from commonweight.errors import (
    CommonweightError,
    DataError,
    ModelError,
    PolicyError,
    RecipeError,
    SiteError,
    StateError,
    StorageError,
)
from commonweight.federation.events import Events
from commonweight.federation.messages import ChainTask, Completed, EvaluateTask, SampleTask, Task, TrainTask
from commonweight.model.base import load_tokenizer
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.recipe.resolved import recipe_text
from commonweight.registry import resolve
from commonweight.site.run_files import RunFiles
from commonweight.site.settings import SiteSettings
from commonweight.site.workshop import Cancelled, RecipeWorkshop, Work, codes, reason_for_others
from commonweight.strategies.base import ServerState
from commonweight.strategies.update import Update
from commonweight.train.batches import Batch
from commonweight.train.local import LocalResult, LocalWork, Participant
from commonweight.train.loss import LanguageModel
from commonweight.train.sft import SupervisedFineTuning
from commonweight.wire import protocol_pb2 as pb

MakeRecipe = Callable[..., Recipe]
RUN = "run-1"
SHORT: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "steps": 3}


class Odd(SupervisedFineTuning):
    """Goes wrong as its option says."""

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)

        way: str = ""

    options: Options

    def work(self, participant: Participant, task: LocalWork) -> LocalResult:
        match self.options.way:
            case "memory":
                raise MemoryError
            case "gpu memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            case "raises":
                raise ValueError("row 3 says: Mrs Smith has a fever")
        result = super().work(participant, task)
        if self.options.way == "infinite":
            for _, flat in participant.trainables.values.floating():
                flat.data[-1] = float("inf")
        return result


class Waiting(SupervisedFineTuning):
    """Sets `begun` at the first step, and goes on once `go` is set."""

    begun, go = threading.Event(), threading.Event()

    def backward(self, language_model: LanguageModel, batch: Batch, scale: float) -> float:
        self.begun.set()
        assert self.go.wait(60)
        return super().backward(language_model, batch, scale)


def job_of(recipe: Recipe, *, id: str = RUN, must_match: Mapping[str, str] | None = None, purpose: str = "") -> pb.Job:
    expected = handshake(build_bench(recipe)) if must_match is None else must_match
    return pb.Job(id=id, recipe=recipe_text(recipe), must_match=dict(expected), purpose=purpose)


def workshop_of(
    folder: Path, data: Path | str | None, *, name: str = "clinic", partition: str | None = None, **more: Any
) -> RecipeWorkshop:
    own = {"path": None if data is None else str(data), "partition": partition, **more.pop("data_settings", {})}
    values = {"name": name, "address": "localhost:1", "data": own, "device": "cpu", "threads": 1}
    return RecipeWorkshop(SiteSettings.model_validate(values), folder, **more)


@pytest.fixture
def own_rows(tmp_path: Path) -> Path:
    """Eleven rows in a CSV file without a column for the site, and one without an answer."""
    path = tmp_path / "own.csv"
    lines = [f'patient {k // 2},"what helps {k}?",rest and honey {k} times' for k in range(11)]
    path.write_text("\n".join(["subject,question,answer", *lines, "patient 9,what helps?,"]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def joined(make_recipe: MakeRecipe, small_data: Path, tmp_path: Path) -> tuple[RecipeWorkshop, Bench]:
    """A workshop that has joined a run as the part `north`, and the bench of the same recipe with every site."""
    recipe = make_recipe(training=SHORT)
    bench = build_bench(recipe)
    workshop = workshop_of(tmp_path / "site", small_data, partition="north")
    workshop.join(job_of(recipe, must_match=handshake(bench)))
    return workshop, bench


def digests(channels: Mapping[str, NamedTensors]) -> dict[str, str]:
    return {name: tensors.digest() for name, tensors in channels.items()}


def figures(update: Update | Work) -> tuple[Any, ...]:
    return update.num_examples, update.num_label_tokens, update.num_steps, update.metrics["loss"]


# --- the same bits ---


@contextmanager
def engine_over(bench: Bench, strategy: Any, folder: Path) -> Iterator[InProcessEngine]:
    folder.mkdir()
    events = Events(folder / "events.jsonl")
    with InProcessEngine(bench, strategy, folder, events) as engine:
        yield engine
    events.close()


CASES: dict[str, dict[str, Any]] = {
    "fedavg, dropout": {"federation": {"strategy": "fedavg"}, "model": {"adapter": {"r": 2, "dropout": 0.3}}},
    "fedprox": {
        "federation": {"strategy": {"name": "fedprox", "mu": 0.5}},
        "training": {**SHORT, "steps": None, "epochs": 1.5},
    },
    "scaffold, packed": {"federation": {"strategy": "scaffold"}, "training": {**SHORT, "packing": True}},
    "scaffold, bfloat16": {
        "federation": {"strategy": "scaffold"},
        "model": {"adapter": {"kind": "full"}, "dtype": "bfloat16"},
        "training": SHORT,
    },
    "dirichlet sites": {"data": {"sites": {"scheme": "dirichlet", "by": "site", "count": 3}}},
}


@pytest.mark.parametrize("sections", CASES.values(), ids=list(CASES))
def test_two_rounds_of_every_site_have_the_bits_of_the_in_process_engine(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    recipe = make_recipe(**sections)
    bench = build_bench(recipe)
    method = recipe.federation.strategy
    kind = resolve("strategy", method.name)
    strategy = kind(kind.Options(**method.options), num_sites=3)
    job = job_of(recipe, must_match=handshake(bench))
    sites = {
        name: workshop_of(tmp_path / f"at-{name}", small_data, name=f"clinic-{k}", partition=name)
        for k, name in enumerate(bench.sites)
    }
    facts = {name: site.join(job) for name, site in sites.items()}
    assert {name: found["steps"] for name, found in facts.items()} == bench.facts.steps
    with engine_over(bench, strategy, tmp_path / "run") as engine:
        state = strategy.init(bench.theta.clone())
        for number in (1, 2):
            state = one_round(number, state, strategy, engine, sites, bench)


def one_round(
    number: int,
    state: ServerState,
    strategy: Any,
    engine: InProcessEngine,
    sites: Mapping[str, RecipeWorkshop],
    bench: Bench,
) -> ServerState:
    further = {name: state.slots[name] for name in strategy.broadcast_channels}
    base = {"theta": state.theta, **further}
    before = digests(base)
    engine.broadcast(state.theta, further)
    fold = strategy.open(state)
    for outcome in engine.run([train_task(number, name, strategy, bench) for name in bench.sites]):
        assert isinstance(outcome, Completed)
        update, task = outcome.update, outcome.task
        assert update is not None
        assert isinstance(task, TrainTask)
        site = sites[task.site]
        work = site.train(RUN, replace(task, site=site.settings.name), base)
        assert digests(work.channels) == digests(update.channels)
        assert figures(work) == figures(update)
        assert digests(base) == before
        fold.add(update)
    closed: ServerState = strategy.close(state, fold)
    return closed


def train_task(number: int, name: str, strategy: Any, bench: Bench) -> TrainTask:
    place = list(bench.sites).index(name)
    keeps = strategy.site_state or bool(bench.personal)
    return TrainTask(
        number,
        name,
        0.1,
        bench.facts.steps[name],
        correction=strategy.correction(),
        state_in=f"sites/{place:03d}/{number - 1:04d}.safetensors" if keeps and number > 1 else None,
        state_out=f"sites/{place:03d}/{number:04d}.safetensors" if keeps else None,
    )


def test_answers_are_those_of_the_in_process_engine_under_the_sites_own_name(
    joined: tuple[RecipeWorkshop, Bench], tmp_path: Path
) -> None:
    workshop, bench = joined
    theta = bench.theta.clone()
    for flat in theta.flats.values():
        flat.add_(0.05)
    rounds = ((1, 0.1, 2), (2, 0.05, 1))
    tasks: dict[str, tuple[Task, Task]] = {
        "global": (EvaluateTask(("north",), generate=True), EvaluateTask(("clinic",), generate=True)),
        "base": (EvaluateTask(("north",), "base"), EvaluateTask(("clinic",), "base")),
        "sample": (SampleTask((("north", 0), ("north", 3))), SampleTask((("clinic", 0), ("clinic", 3)))),
        "chain": (
            ChainTask("control/local/north", "local", ("north",), rounds, ("north",), (), "controls/local/000"),
            ChainTask("control/local/clinic", "local", ("clinic",), rounds, ("clinic",), ("clinic", "b"), "../../x"),
        ),
    }
    with engine_over(bench, resolve("strategy", "fedavg")(), tmp_path / "run") as engine:
        engine.broadcast(theta, {})
        outcomes = list(engine.run([here for here, _ in tasks.values()]))
    notes: list[str] = []
    for (_, there), outcome in zip(tasks.values(), outcomes, strict=True):
        assert isinstance(outcome, Completed)
        assert not isinstance(there, TrainTask)
        found = workshop.answer(RUN, there, {"theta": theta}, progress=notes.append)
        expected = json.loads(json.dumps(outcome.result).replace('"north"', '"clinic"'))
        assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert notes == ["round 1, 2 in all", "round 2, 2 in all"]
    assert len(list((workshop.folder / "runs" / RUN / "controls").iterdir())) == 1


def test_a_chain_that_was_killed_goes_on(joined: tuple[RecipeWorkshop, Bench], small_data: Path) -> None:
    workshop, _ = joined
    task = ChainTask("k", "local", ("clinic",), ((1, 0.1, 2), (2, 0.1, 2)), ("clinic",), (), "f")
    other = workshop_of(workshop.folder, small_data, partition="north")
    with pytest.raises(Cancelled):
        workshop.answer(RUN, task, {}, cancelled=after(3))
    notes: list[str] = []
    found = other.answer(RUN, task, {}, progress=notes.append)
    assert notes[-1:] == ["round 2, 2 in all"]
    assert "round 1, 2 in all" not in notes
    other.forget(RUN)
    other.join(job_of_joined(workshop, joined[1]))
    whole = other.answer(RUN, task, {})
    assert {**found, "seconds": 0} == {**whole, "seconds": 0}


def job_of_joined(workshop: RecipeWorkshop, bench: Bench) -> pb.Job:
    return job_of(bench.recipe, must_match=handshake(bench))


def after(steps: int) -> Callable[[], bool]:
    asked = iter(range(1000))
    return lambda: next(asked) == steps


def test_training_that_is_killed_goes_on_from_its_checkpoint_with_the_same_bits(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(model={"adapter": {"dropout": 0.2}}, training={"steps": 8, "optimizer": "adamw"})
    bench = build_bench(recipe)
    task, base = TrainTask(1, "clinic", 0.01, 8), {"theta": bench.theta}
    workshop = workshop_of(tmp_path / "site", small_data, partition="south", checkpoint_s=0.0)
    workshop.join(job_of(recipe, must_match=handshake(bench)))
    pid = os.fork()
    if pid == 0:
        asked = after(5)
        workshop.train(RUN, task, base, cancelled=lambda: os.kill(os.getpid(), signal.SIGKILL) if asked() else False)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert (tmp_path / "site" / "runs" / RUN / "checkpoint.safetensors").exists()
    torch.manual_seed(123)
    notes: list[str] = []
    again = workshop_of(tmp_path / "site", small_data, partition="south")
    found = again.train(RUN, task, base, progress=notes.append)
    assert [note for note in notes if note.startswith("step")] == [f"step {k} of 8" for k in (5, 6, 7)]
    undisturbed = workshop_of(tmp_path / "other", small_data, partition="south")
    undisturbed.join(job_of(recipe, must_match=handshake(bench)))
    expected = undisturbed.train(RUN, task, base)
    assert digests(found.channels) == digests(expected.channels)
    assert figures(found) == figures(expected)


@pytest.mark.parametrize("changed", ["round", "lr", "steps", "base", "correction"])
def test_a_checkpoint_is_of_one_task_only(joined: tuple[RecipeWorkshop, Bench], small_data: Path, changed: str) -> None:
    workshop, bench = joined
    base = {"theta": bench.theta}
    first = TrainTask(1, "clinic", 0.1, 4, state_out=None)
    tasks = {
        "round": replace(first, round=2),
        "lr": replace(first, lr=0.05),
        "steps": replace(first, steps=5),
        "base": first,
        "correction": replace(first, correction={"kind": "prox", "mu": 1.0}),
    }
    stopping = workshop_of(workshop.folder, small_data, partition="north", checkpoint_s=0.0)
    with pytest.raises(Cancelled):
        stopping.train(RUN, first, base, cancelled=after(2))
    assert (workshop.folder / "runs" / RUN / "checkpoint.safetensors").exists()
    if changed == "base":
        base = {"theta": bench.theta.clone()}
        base["theta"].flats[torch.float32][0] += 1.0
    notes: list[str] = []
    workshop.train(RUN, tasks[changed], base, progress=notes.append)
    assert next(note for note in notes if note.startswith("step")).startswith("step 0 ")


def test_sites_that_share_a_process_do_not_disturb_each_other(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(model={"adapter": {"dropout": 0.5}}, training={"steps": 6})
    bench = build_bench(recipe)
    job = job_of(recipe, must_match=handshake(bench))
    sites = [workshop_of(tmp_path / name, small_data, name=name, partition=name) for name in ("north", "south")]
    for site in sites:
        site.join(job)
    base = {"theta": bench.theta}

    def train(site: RecipeWorkshop) -> str:
        return site.train(RUN, TrainTask(1, site.settings.name, 0.01, 6), base).channels["delta"].digest()

    alone = [train(site) for site in sites]
    together: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda site=site: together.update({site.settings.name: train(site)})) for site in sites
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together["north"], together["south"]] == alone


# --- joining ---


def test_all_rows_of_a_sites_own_file_are_its_own_whatever_the_recipe_says_of_sites(
    make_recipe: MakeRecipe, own_rows: Path, tmp_path: Path
) -> None:
    by_site = make_recipe(data={"sites": {"by": "site", "only": ["north"], "min_rows": 20, "take": 4}})
    workshop = workshop_of(tmp_path / "site", own_rows)
    facts = workshop.join(job_of(by_site))
    assert {key: facts[key] for key in ("rows", "skipped", "train_examples", "heldout_examples", "unused")} == {
        "rows": 11,
        "skipped": 1,
        "train_examples": 4,
        "heldout_examples": 4,
        "unused": 11 - 4 - 4 - facts["withheld"],
    }
    assert facts["steps"] == 1
    work = workshop.train(RUN, TrainTask(1, "clinic", 0.01, 2), {"theta": build_bench(by_site).theta})
    assert (work.num_steps, work.num_examples) == (2, 8)


def test_a_part_of_shared_rows_has_the_tokens_of_a_run_on_one_machine(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(data={"sites": {"scheme": "quantity", "count": 4, "alpha": 2.0, "take": 5}})
    everyone, report = load_sites(
        recipe.data, seed=recipe.seed, tokenizer=load_tokenizer(recipe.model), max_tokens=recipe.training.max_tokens
    )
    job = job_of(recipe)
    for site in everyone:
        workshop = workshop_of(tmp_path / site.name, small_data, partition=site.name)
        facts = workshop.join(job)
        (own,) = workshop._open[RUN].sites.values()
        for part in ("train", "heldout"):
            for array in ("ids", "labelled", "bounds"):
                assert (getattr(getattr(own, part), array) == getattr(getattr(site, part), array)).all()
        assert own.groups == site.groups
        assert report["sites"][site.name].items() <= facts.items()


def test_no_name_of_a_group_or_of_another_site_is_told(joined: tuple[RecipeWorkshop, Bench]) -> None:
    workshop, bench = joined
    facts = workshop.join(job_of_joined(workshop, bench))
    told = json.dumps(facts)
    assert not any(name in told for name in ("north", "south", "west", str(workshop.folder)))
    names = bench.sites["north"].groups
    assert len(facts["groups"]) == len(names) == facts["heldout_examples"]
    assert sorted(range(4), key=lambda k: names[k]) == sorted(range(4), key=lambda k: facts["groups"][k])


def test_codes_keep_order_and_sameness() -> None:
    names = [f"patient {k}" for k in (11, 2, 2, 30, 1, 4, 5, 6, 7, 8, 9, 10)]
    found = codes(names)
    assert len({len(code) for code in found}) == 1
    for one, a in zip(names, found, strict=True):
        for other, b in zip(names, found, strict=True):
            assert ((one < other), (one == other)) == ((a < b), (a == b))


def test_every_mismatch_is_named_with_both_values() -> None:
    found = {"base weights": "aa", "tokenizer": "bb", "dtype": "float32", "quantization": "none"}
    check_handshake(dict(found), found)
    with pytest.raises(SiteError) as caught:
        check_handshake({"base weights": "zz", "tokenizer": "bb", "quantization": "4bit", "moon": "full"}, found)
    for part in (
        "base weights: the job has zz, here is aa",
        "quantization: the job has 4bit, here is none",
        "dtype: the job has nothing, here is float32",
        "moon: the job has full, here is nothing",
    ):
        assert part in caught.value.message
    assert "tokenizer:" not in caught.value.message


def test_a_handshake_tells_apart_what_must_not_be_mixed(make_recipe: MakeRecipe) -> None:
    usual = handshake(build_bench(make_recipe()))
    cases: dict[str, tuple[dict[str, Any], set[str]]] = {
        "alpha": ({"adapter": {"r": 2, "alpha": 8}}, {"adapter"}),
        "rslora": ({"adapter": {"kind": "rslora", "r": 2, "alpha": 4}}, {"adapter"}),
        "rank": ({"adapter": {"r": 3, "alpha": 4}}, {"adapter", "adapter layout"}),
        "targets": ({"adapter": {"r": 2, "alpha": 4, "targets": ["q_proj"]}}, {"adapter", "adapter layout"}),
        "full": ({"adapter": {"kind": "full"}}, {"adapter", "adapter layout"}),
        "dtype": ({"dtype": "bfloat16"}, {"base weights", "dtype"}),
        "tiny": (
            {"name": "commonweight/tiny"},
            {"base weights", "tokenizer", "adapter layout"},
        ),
    }
    assert handshake(build_bench(make_recipe())) == usual
    for name, (model, expected) in cases.items():
        found = handshake(build_bench(make_recipe(model=model)))
        assert {key for key in usual if usual[key] != found[key]} >= expected, name
        assert all(isinstance(value, str) and value for value in found.values())


def test_a_mismatch_refuses_the_run_and_leaves_nothing(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe()
    expected = {**handshake(build_bench(recipe)), "base weights": "f" * 64}
    workshop = workshop_of(tmp_path / "site", small_data, partition="north")
    with pytest.raises(SiteError, match=f"base weights: the job has {'f' * 64}, here is"):
        workshop.join(job_of(recipe, must_match=expected))
    with pytest.raises(SiteError, match="has not joined"):
        workshop.train(RUN, TrainTask(1, "clinic", 0.1, 1), {})
    assert not (tmp_path / "site" / "runs").exists()


def test_the_rows_go_by_the_jobs_purpose(make_recipe: MakeRecipe, own_rows: Path, tmp_path: Path) -> None:
    recipe = make_recipe()
    workshop = workshop_of(tmp_path / "site", None, data_settings={"by_purpose": {"triage": str(own_rows)}})
    assert workshop.join(job_of(recipe, purpose="triage"))["rows"] == 11
    with pytest.raises(PolicyError, match="no data for the purpose 'billing'"):
        workshop.join(job_of(recipe, id="run-2", purpose="billing"))


def test_a_run_is_joined_with_one_recipe_and_the_same_rows(
    make_recipe: MakeRecipe, own_rows: Path, tmp_path: Path
) -> None:
    recipe = make_recipe()
    job = job_of(recipe)
    workshop = workshop_of(tmp_path / "site", own_rows)
    assert workshop.join(job) == workshop.join(job)
    with pytest.raises(SiteError, match="another recipe"):
        workshop.join(job_of(make_recipe(seed=1), must_match=dict(job.must_match)))
    own_rows.write_text(own_rows.read_text().replace("honey 5", "honey 55"))
    task, base = TrainTask(1, "clinic", 0.01, 1), {"theta": build_bench(recipe).theta}
    workshop.train(RUN, task, base)  # what is open goes on with what it had read
    for act in (lambda w: w.train(RUN, task, base), lambda w: w.join(job)):
        with pytest.raises(SiteError, match="are not those with which it joined"):
            act(workshop_of(tmp_path / "site", own_rows))


# --- private state ---


def scaffold_task(number: int, before: str | None = None, after: str | None = None) -> TrainTask:
    return TrainTask(number, "clinic", 0.1, 2, {"kind": "scaffold"}, before, after)


def test_private_state_is_known_by_its_round_only_and_old_ones_go(
    joined: tuple[RecipeWorkshop, Bench], tmp_path: Path
) -> None:
    workshop, bench = joined
    outside = tmp_path / "0001.safetensors"
    outside.write_bytes(b"not to be touched")
    base = {"theta": bench.theta, "control": NamedTensors.zeros(bench.theta.layout, wide=True)}
    folder = workshop.folder / "runs" / RUN / "state"
    workshop.train(RUN, scaffold_task(1, None, str(outside)), base)
    workshop.train(RUN, scaffold_task(2, "../../0001.safetensors", "/0002.safetensors"), base)
    assert sorted(file.name for file in folder.iterdir()) == ["0001.safetensors", "0002.safetensors"]
    workshop.train(RUN, scaffold_task(3, "sites/004/0001.safetensors", "0003.safetensors"), base)
    assert (
        folder / "0001.safetensors"
    ).exists()  # round 2's update was not accepted: the state before it is the true one
    workshop.train(RUN, scaffold_task(4, "0003.safetensors", "0004.safetensors"), base)
    assert sorted(file.name for file in folder.iterdir()) == ["0003.safetensors", "0004.safetensors"]
    assert outside.read_bytes() == b"not to be touched"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("sites/000/0001.safetensors", "sites/000/0002.safetensors", "after round 1 of run run-1 is missing"),
        ("sites/000/state.pt", None, "tells no round"),
        ("", None, "tells no round"),
        ("0001.safetensors/..", None, "tells no round"),
        (None, "0003.safetensors", "rounds None and 3"),
        ("0002.safetensors", "0002.safetensors", "rounds 2 and 2"),
    ],
)
def test_private_state_that_is_not_there_or_makes_no_sense(
    joined: tuple[RecipeWorkshop, Bench], before: str | None, after: str | None, words: str
) -> None:
    workshop, bench = joined
    base = {"theta": bench.theta, "control": NamedTensors.zeros(bench.theta.layout)}
    with pytest.raises(SiteError, match=words):
        workshop.train(RUN, scaffold_task(2, before, after), base)


def test_damaged_private_state_is_refused(joined: tuple[RecipeWorkshop, Bench]) -> None:
    workshop, bench = joined
    base = {"theta": bench.theta, "control": NamedTensors.zeros(bench.theta.layout)}
    workshop.train(RUN, scaffold_task(1, None, "0001.safetensors"), base)
    file = workshop.folder / "runs" / RUN / "state" / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(StateError, match="is damaged") as caught:
        workshop.train(RUN, scaffold_task(2, "0001.safetensors", "0002.safetensors"), base)
    assert str(workshop.folder) not in reason_for_others(caught.value)


# --- tasks that are not for this site, or make no sense ---

TRAIN = TrainTask(1, "clinic", 0.1, 2)
CHAIN = ChainTask("k", "local", ("clinic",), ((1, 0.1, 1),), ("clinic",), (), "f")
REFUSED: list[tuple[Task, str]] = [
    (replace(TRAIN, site="north"), "is about north, but this site, clinic"),  # its name is the enrolled one
    (replace(TRAIN, site="../x"), "answers for itself only"),
    (replace(TRAIN, steps=0), "asks for 0 steps"),
    (replace(TRAIN, steps=-1), "asks for -1 steps"),
    (replace(TRAIN, lr=float("nan")), "lr nan"),
    (replace(TRAIN, lr=-0.1), "lr -0.1"),
    (replace(TRAIN, round=0), "round 0"),
    (replace(TRAIN, correction={"kind": "newer"}), "correction 'newer', which is not known"),
    (replace(TRAIN, correction={}), "correction None"),
    (replace(TRAIN, correction={"kind": "scaffold"}), "lack the channel 'control'"),
    (EvaluateTask(("clinic", "south")), "is about clinic, south"),
    (EvaluateTask(()), "no site"),
    (EvaluateTask(("clinic",), arm="moon"), "arm 'moon'"),
    (SampleTask((("south", 0),)), "is about south"),
    (SampleTask((("clinic", 4),)), "held-out row 4; this site has 4"),
    (SampleTask((("clinic", -1),)), "held-out row -1"),
    (replace(CHAIN, arm="centralised"), "cannot train the 'centralised' control arm"),
    (replace(CHAIN, sites=("clinic", "south")), "is about clinic, south"),
    (replace(CHAIN, own=("south",)), "is about south"),
    (replace(CHAIN, rounds=((1, 0.1, -1),)), "without steps"),
]


def test_a_task_that_is_not_for_this_site_or_makes_no_sense_is_refused(joined: tuple[RecipeWorkshop, Bench]) -> None:
    workshop, bench = joined
    for task, words in REFUSED:
        with pytest.raises(SiteError, match=words):
            carry_out(workshop, task, {"theta": bench.theta})
    assert workshop.train(RUN, TRAIN, {"theta": bench.theta}).num_steps == 2


def carry_out(workshop: RecipeWorkshop, task: Task, base: Mapping[str, NamedTensors], run: str = RUN) -> Any:
    if isinstance(task, TrainTask):
        return workshop.train(run, task, base)
    return workshop.answer(run, task, base)


def test_global_tensors_of_another_layout_are_refused(joined: tuple[RecipeWorkshop, Bench]) -> None:
    workshop, _ = joined
    other = {"theta": NamedTensors.of({"weight": torch.zeros(3)})}
    for task in (TRAIN, EvaluateTask(("clinic",))):
        with pytest.raises(SiteError, match="do not have the layout"):
            carry_out(workshop, task, other)
        with pytest.raises(SiteError, match="lack the channel 'theta'"):
            carry_out(workshop, task, {})


@pytest.mark.parametrize("run", ["../other", "", ".hidden", "a/b", "a" * 129, "a\n"])
def test_a_runs_id_is_no_path(joined: tuple[RecipeWorkshop, Bench], run: str) -> None:
    workshop, bench = joined
    with pytest.raises(SiteError, match="no run's id"):
        workshop.train(run, TRAIN, {"theta": bench.theta})
    with pytest.raises(SiteError, match="no run's id"):
        workshop.join(pb.Job(id=run, recipe="", purpose=""))
    workshop.forget(run)
    assert workshop.train(RUN, TRAIN, {"theta": bench.theta}).num_steps == 2


# --- what goes wrong ---


def odd(way: str) -> dict[str, Any]:
    return {**SHORT, "objective": {"name": "tests.unit.test_workshop:Odd", "way": way}}


@pytest.mark.parametrize(
    ("sections", "kind", "words"),
    [
        ({"training": {"objective": "dpoo"}}, RecipeError, "no objective is called 'dpoo'"),
        ({"training": {"objective": "no_such_package:Loss"}}, RecipeError, "cannot be imported"),
        ({"training": {"objective": {"name": "sft", "beta": 1}}}, RecipeError, "beta"),
        ({"training": {"objective": "pathlib:Path"}}, SiteError, "joining the run failed"),
        ({"model": {"name": "/no/such/model"}}, ModelError, "there is no model folder /no/such/model"),
        ({"model": {"quantization": "4bit"}}, ModelError, "needs a CUDA GPU"),
        ({"training": {"max_tokens": 4096}}, RecipeError, "positions for 128"),
        ({"data": {"holdout": {"by": "ward", "examples": 2}}}, RecipeError, "'ward', which no row has"),
        ({"data": {"holdout": {"by": "subject", "examples": 400}}}, DataError, "too few"),
    ],
)
def test_a_recipe_that_cannot_be_carried_out_here_says_why(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path, sections: dict[str, Any], kind: type[Any], words: str
) -> None:
    workshop = workshop_of(tmp_path / "site", small_data, partition="north")
    with pytest.raises(kind, match=words) as caught:
        workshop.join(job_of(make_recipe(**sections), must_match={}))
    assert isinstance(caught.value, CommonweightError)


@pytest.mark.parametrize("text", ["", "- a", "name: [", "name: x\nprivacy: {dp: example}", "x" * (1 << 21)])
def test_a_jobs_recipe_that_is_none(text: str, small_data: Path, tmp_path: Path) -> None:
    workshop = workshop_of(tmp_path / "site", small_data, partition="north")
    with pytest.raises((RecipeError, SiteError)) as caught:
        workshop.join(pb.Job(id=RUN, recipe=text))
    assert caught.value.message


def test_code_of_a_models_own_is_never_run(make_recipe: MakeRecipe, small_data: Path, tmp_path: Path) -> None:
    text = recipe_text(make_recipe()).replace("trust_remote_code: false", "trust_remote_code: true")
    with pytest.raises(RecipeError, match="trust_remote_code"):
        workshop_of(tmp_path / "site", small_data, partition="north").join(pb.Job(id=RUN, recipe=text))


def test_rows_that_are_not_there_or_have_no_such_part(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    job = job_of(make_recipe())
    with pytest.raises(DataError, match="there is no"):
        workshop_of(tmp_path / "a", tmp_path / "none.jsonl").join(job)
    with pytest.raises(DataError, match="no part 'nord'") as caught:
        workshop_of(tmp_path / "b", small_data, partition="nord").join(job)
    assert "data.partition" in caught.value.hint
    assert "nord" not in reason_for_others(caught.value)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("memory", "training ran out of memory"),
        ("gpu memory", "training ran out of memory"),
        ("raises", "training failed: ValueError"),
        ("infinite", "left NaN or infinity in"),
    ],
)
def test_training_that_goes_wrong_is_a_sites_error_and_the_next_task_is_done(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path, way: str, words: str
) -> None:
    recipe = make_recipe(training=odd(way))
    bench = build_bench(recipe)
    workshop = workshop_of(tmp_path / "site", small_data, partition="north")
    workshop.join(job_of(recipe, must_match=handshake(bench)))
    with pytest.raises(SiteError, match=words) as caught:
        workshop.train(RUN, TRAIN, {"theta": bench.theta})
    assert "Mrs Smith" not in reason_for_others(caught.value)
    assert set(workshop.answer(RUN, EvaluateTask(("clinic",)), {"theta": bench.theta})) == {"clinic"}


def test_what_is_told_of_an_error_quotes_no_row_and_no_path() -> None:
    rows = DataError("rows.jsonl, line 7: 'name' is 'Mrs Smith' here", hint="write it alike")
    for error in (rows, StorageError("cannot write in /srv/clinic"), StateError("/srv/clinic is damaged")):
        told = reason_for_others(error)
        assert type(error).__name__ in told
        assert not any(word in told for word in ("Smith", "clinic", "rows.jsonl"))
    assert reason_for_others(SiteError("the loss became nan")) == "the loss became nan"


# --- several runs, and their end ---


def test_runs_take_turns_in_memory_and_a_restarted_site_opens_them_again(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipes = {f"run-{seed}": make_recipe(seed=seed) for seed in (1, 2)}
    benches = {run: build_bench(recipe) for run, recipe in recipes.items()}
    workshop = workshop_of(tmp_path / "site", small_data, partition="north", max_open=1)
    for run, recipe in recipes.items():
        workshop.join(job_of(recipe, id=run, must_match=handshake(benches[run])))
    assert list(workshop._open) == ["run-2"]
    first = {}
    for run in recipes:
        notes: list[str] = []
        first[run] = workshop.train(run, TRAIN, {"theta": benches[run].theta}, progress=notes.append)
        assert list(workshop._open) == [run]
        assert notes[0].startswith("opening")
    restarted = workshop_of(tmp_path / "site", small_data, partition="north", max_open=2)
    for run in (*recipes, *recipes):
        again = restarted.train(run, TRAIN, {"theta": benches[run].theta})
        assert digests(again.channels) == digests(first[run].channels)
    assert list(restarted._open) == ["run-1", "run-2"]
    restarted.train("run-1", TRAIN, {"theta": benches["run-1"].theta})
    assert list(restarted._open) == ["run-2", "run-1"]


def test_a_run_that_has_ended_leaves_nothing_of_the_workshops(joined: tuple[RecipeWorkshop, Bench]) -> None:
    workshop, bench = joined
    base = {"theta": bench.theta, "control": NamedTensors.zeros(bench.theta.layout)}
    workshop.train(RUN, scaffold_task(1, None, "0001.safetensors"), base)
    workshop.answer(RUN, CHAIN, {})
    folder = workshop.folder / "runs" / RUN
    assert {path.name for path in folder.iterdir()} == {"joined.json", "state", "controls"}
    (folder / "log.jsonl").write_text("{}\n")  # somebody else's
    workshop.forget(RUN)
    workshop.forget("never-heard-of")
    assert [path.name for path in folder.iterdir()] == ["log.jsonl"]
    assert not workshop._open
    with pytest.raises(SiteError, match="has not joined"):
        workshop.train(RUN, TRAIN, base)
    workshop.join(job_of_joined(workshop, bench))
    assert workshop.train(RUN, TRAIN, base).num_steps == 2


def test_a_run_that_ends_while_it_is_worked_on_stops_and_leaves_nothing(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(training={**SHORT, "objective": "tests.unit.test_workshop:Waiting"})
    bench = build_bench(recipe)
    workshop = workshop_of(tmp_path / "site", small_data, partition="north", checkpoint_s=0.0)
    workshop.join(job_of(recipe, must_match=handshake(bench)))
    Waiting.begun.clear()
    Waiting.go.clear()
    raised: list[BaseException] = []

    def train() -> None:
        try:
            workshop.train(RUN, replace(TRAIN, steps=50), {"theta": bench.theta})
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        assert Waiting.begun.wait(60)
        waiting = workshop_of(tmp_path / "other", small_data, name="other")
        with pytest.raises(Cancelled, match="before it began"):  # what waits for its turn can be withdrawn
            waiting.train(RUN, replace(TRAIN, site="other"), {}, cancelled=lambda: True)
        workshop.forget(RUN)
    finally:
        Waiting.go.set()
        thread.join(60)
    assert [type(error) for error in raised] == [Cancelled]
    assert not (tmp_path / "site" / "runs" / RUN).exists()
    assert not workshop._open


def test_a_damaged_note_of_what_was_joined_says_so(joined: tuple[RecipeWorkshop, Bench], small_data: Path) -> None:
    workshop, bench = joined
    for text in ("{", "[]", '{"recipe": "x"}'):
        (RunFiles(workshop.folder, RUN).folder / "joined.json").write_text(text)
        with pytest.raises(StateError, match="is damaged"):
            workshop_of(workshop.folder, small_data, partition="north").train(RUN, TRAIN, {"theta": bench.theta})

"""What survives a kill: a run killed at chosen or random instants, again and again, ends with the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from commonweight.federation.folder import write_text
from commonweight.launch import run
from commonweight.recipe import Recipe
from commonweight.recipe.resolved import recipe_text
from tests.processes import Death, Nursery
from tests.unit.command_line import Answer, call

MakeRecipe = Callable[..., Recipe]
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery") / "log") as nursery:
        yield nursery


@dataclass(frozen=True)
class Story:
    """A recipe's sections, and the deaths that its run dies one after the other, each time resumed."""

    sections: dict[str, Any]
    deaths: tuple[Death, ...] = ()
    keep_updates_over_s: float = 1.0
    kept: bool = field(default=False)  # whether some update must have been taken from the disk


def deaths(*places: tuple[str, str] | tuple[str, str, int]) -> tuple[Death, ...]:
    return tuple(Death(*place) for place in places)


EVERY_ARM = Story(
    {
        "model": {"adapter": {"dropout": 0.2}},
        "federation": {"rounds": 3, "strategy": "fedavg"},
        "training": {"steps": 2},
        "evaluation": {"controls": ["base", "local", "centralised"], "samples": 1, "max_new_tokens": 2},
    },
    deaths(
        ("folder.__init__", "after"),  # nothing but a folder: begun anew
        ("journal.__init__", "after"),  # no recipe.yaml
        ("journal.put", "before"),  # the base's scores are computed, not kept
        ("write_state", "after"),  # the initial state is written, not committed
        ("journal.commit", "after"),
        ("fold.add", "after", 2),
        ("save_adapter", "after"),
        ("rename", "before", 2),  # a state beside its name
        ("journal.commit", "before"),  # everything of round 1 is written, not committed
        ("journal.commit", "after"),  # round 1 is committed, nothing tidied up
        ("journal.put", "after"),  # round 2's curve is kept while round 3 goes on
        ("journal.commit", "after"),
        ("journal.put", "before"),  # the result's scores
        ("journal.put", "after"),
        ("save_adapter", "after"),
        ("chain.save", "before", 2),
        ("chain.save", "after"),
        ("chain.result", "after"),
        ("journal.put", "before"),  # a control's outcome
        ("journal.put", "after"),
        ("write_json", "before"),
    ),
)
SITE_STATE = Story(
    {
        "federation": {"rounds": 4, "strategy": "scaffold", "cohort": 2, "weighting": "tokens"},
        "training": {"optimizer": "sgd", "lr": 0.1, "steps": 2},
    },
    deaths(
        ("write_tensors", "after", 2),  # round 1: a site has written cᵢ, nobody has heard of it
        ("journal.keep_update", "before"),
        ("journal.keep_update", "after"),
        ("journal.keep_update", "after"),  # now both are kept
        ("journal.commit", "before"),
        ("journal.commit", "after"),  # cᵢ of round 1 beside older ones
        ("journal.keep_update", "after"),
        ("forget", "before", 2),
        ("write_tensors", "before"),
        ("fold.add", "before", 2),
        ("forget", "after"),
        ("forget", "after", 2),
        ("write_state", "before"),
        ("write_state", "after"),
    ),
    keep_updates_over_s=0.0,
    kept=True,
)
MOMENTS = Story(
    {
        "model": {"adapter": {"kind": "rslora", "dropout": 0.1}},
        "federation": {"rounds": 4, "strategy": "fedadam", "cohort": 0.6, "weighting": "uniform"},
        "training": {"steps": 2, "schedule": "cosine", "warmup_rounds": 1},
        "evaluation": {"every": 2},
        "output": {"keep_rounds": 1},
    },
    deaths(
        ("round", "before"),
        ("journal.keep_update", "after"),
        ("write_state", "before"),
        ("journal.commit", "after"),
        ("journal.keep_update", "after", 2),
        ("round", "after"),  # both updates came from the disk
        ("forget_before", "before", 2),
        ("fold.add", "after"),
        ("forget_before", "after", 2),
        ("evaluation.final", "before"),
    ),
    keep_updates_over_s=0.0,
    kept=True,
)
NUMBERS = Story(
    {"federation": {"rounds": 3, "strategy": {"name": "afl", "gamma": 0.5}, "cohort": 2}, "training": {"steps": 1}},
    deaths(
        ("journal.commit", "before", 2),  # the tensors of round 1 are written, its sites' weights are not
        ("journal.commit", "after"),
        ("write_state", "after"),
        ("journal.commit", "after"),
    ),
)
PARTS = Story(
    {
        "model": {
            "adapter": {"r": 4, "dropout": 0.1, "sites": {"south": {"r": 2, "alpha": 6}}, "budget": {"west": 0.2}}
        },
        "federation": {"rounds": 2, "strategy": "flexlora"},
        "training": {"steps": 2},
        "evaluation": {"controls": ["local"]},
    },
    deaths(
        ("journal.keep_update", "after", 2),
        ("journal.keep_update", "after"),  # the third: all are kept
        ("journal.commit", "before"),
        ("round", "after"),
        ("journal.commit", "after"),
        ("chain.save", "after", 3),
    ),
    keep_updates_over_s=0.0,
    kept=True,
)
MOVED_BASE = Story(
    {
        "federation": {"rounds": 4, "strategy": "flora", "cohort": 2, "weighting": "tokens"},
        "training": {"lr": 0.05, "steps": 2},
        "evaluation": {"controls": ["base", "local"]},
    },
    deaths(
        ("fold.add", "after", 2),  # both updates are kept
        ("write_residual", "before"),
        ("write_residual", "after"),  # round 1's residual is written, not added or committed
        ("journal.commit", "before"),
        ("journal.commit", "after"),
        ("move_base", "before"),  # resumed: round 1's is to be added again
        ("move_base", "after", 2),  # and round 2's to it
        ("write_residual", "before"),
        ("journal.keep_update", "after"),
        ("journal.commit", "after", 2),
        ("save_residual", "before"),
        ("save_residual", "after"),  # the adapter and its residual are there, controls are to come
        ("chain.save", "after"),
    ),
    keep_updates_over_s=0.0,
    kept=True,
)
CLUSTERS = Story(
    {
        "federation": {"rounds": 4, "strategy": {"name": "ifca", "warm_up": 2, "rows": 4}, "cohort": 2},
        "training": {"steps": 1},
        "evaluation": {"samples": 1, "max_new_tokens": 2},
    },
    deaths(
        ("journal.commit", "after", 2),  # round 1 is committed: one model still
        ("journal.keep_update", "after"),  # an update of the round in which clusters are told is kept
        ("fold.add", "before"),  # all are there, and put into clusters
        ("save_adapter", "after", 2),  # one cluster's adapter is written, another's not
        ("journal.commit", "before"),
        ("journal.commit", "after"),  # who is in which cluster stands in the journal alone
        ("journal.keep_update", "after"),  # with the cluster that its site chose
        ("write_state", "before"),
        ("journal.commit", "after", 2),
        ("journal.put", "after"),  # the result's scores, and whose model each site has
        ("save_adapter", "after", 2),
        ("write_json", "before"),
    ),
    keep_updates_over_s=0.0,
    kept=True,
)
ERRORS = Story(
    {
        "federation": {"rounds": 4, "cohort": 2},
        "training": {"steps": 1},
        "compression": {"shorten": {"name": "top-k", "keep": 0.1}, "round": {"name": "uniform", "bits": 4}},
    },
    deaths(
        ("write_tensors", "after", 2),  # a site has written what it could not send, and nobody has its update
        ("journal.keep_update", "after"),
        ("journal.commit", "before"),
        ("journal.commit", "after"),
        ("forget", "before", 2),
        ("write_state", "after"),
    ),
    keep_updates_over_s=0.0,
    kept=True,
)
DOWN = Story(
    {
        "federation": {"rounds": 4, "cohort": 2, "strategy": "fedadam"},
        "training": {"steps": 1},
        "compression": {"round": "sign", "down": {"shorten": {"name": "top-k", "keep": 0.1}, "round": "int8"}},
    },
    deaths(
        ("write_state", "after", 2),  # round 1's model and what is late of it are written, not committed
        ("journal.commit", "before"),
        ("journal.commit", "after"),
        ("journal.keep_update", "after"),
        ("write_state", "before"),
        ("write_state", "after"),
    ),
    keep_updates_over_s=0.0,
    kept=True,
)
STORIES = {
    "every arm": EVERY_ARM,
    "site state": SITE_STATE,
    "moments": MOMENTS,
    "numbers": NUMBERS,
    "clusters": CLUSTERS,
    "parts": PARTS,
    "moved base": MOVED_BASE,
    "errors": ERRORS,
    "down": DOWN,
}


# --- what must be the same ----------------------------------------------------------------------------------------


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        times = ("seconds", "started", "finished")
        return {key: without_times(item) for key, item in value.items() if key not in times}
    return [without_times(item) for item in value] if isinstance(value, list) else value


TENSORS = ("state", "residuals", "sites", "updates", "rounds", "adapter", "clusters")


def tensors_in(folder: Path) -> dict[str, str]:
    """Digest by name of every file that holds tensors, bar the control arms' (their results are in the metrics)."""
    found = (path for part in TENSORS for path in (folder / part).rglob("*"))
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
        if path.suffix == ".safetensors"
    }


def assert_same(folder: Path, undisturbed: Path) -> None:
    metrics, expected = (json.loads((f / "metrics.json").read_text(encoding="utf-8")) for f in (folder, undisturbed))
    assert metrics["adapter"] == expected["adapter"]
    assert without_times(metrics) == without_times(expected)
    assert tensors_in(folder) == tensors_in(undisturbed)
    assert (folder / "report.html").exists()


@pytest.fixture
def undisturbed(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a story's run that nobody killed."""

    def folder(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"undisturbed {name}"
        if not path.exists():
            run(make_recipe(**STORIES[name].sections), path)
        return path

    return folder


# --- kills --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.kills
def test_a_run_killed_at_every_step_ends_with_the_same_bits(
    make_recipe: MakeRecipe, tmp_path: Path, nursery: Nursery, undisturbed: Callable[[str], Path], name: str
) -> None:
    story, folder = STORIES[name], tmp_path / "run"
    recipe = make_recipe(**story.sections)
    for death in (*story.deaths, None):
        begun = (folder / "state.sqlite").exists()
        pid = nursery.start(recipe, folder, resume=begun, death=death, keep_updates_over_s=story.keep_updates_over_s)
        assert nursery.wait(pid) == (KILLED if death else 0), (death, nursery.log.read_text())
    assert_same(folder, undisturbed(name))
    assert_nothing_was_done_twice(folder)
    if story.kept:
        assert any(event.get("kept") for event in events_of(folder))


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_nothing_was_done_twice(folder: Path) -> None:
    committed = [event["round"] for event in events_of(folder) if event["event"] == "round_committed"]
    assert committed == sorted(set(committed))


def test_a_run_killed_at_random_instants_ends_with_the_same_bits(
    make_recipe: MakeRecipe, tmp_path: Path, nursery: Nursery, undisturbed: Callable[[str], Path]
) -> None:
    draw, folder = random.Random(0), tmp_path / "run"
    recipe = make_recipe(**SITE_STATE.sections)
    delays = [draw.uniform(0.2, 0.9) for _ in range(5)]
    for delay in delays:
        begun = (folder / "state.sqlite").exists()
        pid = nursery.start(recipe, folder, resume=begun, keep_updates_over_s=0.0)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        assert nursery.wait(pid) in (KILLED, 0), nursery.log.read_text()
    pid = nursery.start(recipe, folder, resume=(folder / "state.sqlite").exists(), keep_updates_over_s=0.0)
    assert nursery.wait(pid) == 0, nursery.log.read_text()
    assert_same(folder, undisturbed("site state"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_run_however_it_ends(
    make_recipe: MakeRecipe, tmp_path: Path, nursery: Nursery, number: signal.Signals
) -> None:
    pid = nursery.start(slow(make_recipe, tmp_path), tmp_path / "run")
    workers = working(pid, tmp_path)
    os.kill(pid, number)
    assert nursery.wait(pid) == -number
    assert psutil.wait_procs(workers, timeout=60)[1] == []


def slow(make_recipe: MakeRecipe, folder: Path) -> Recipe:
    """A recipe whose tasks take an hour."""
    (folder / "marks").mkdir()
    objective = {"name": "tests.unit.wayward:Wayward", "way": "slow", "folder": str(folder / "marks")}
    return make_recipe(training={"objective": objective})


def working(pid: int, folder: Path) -> list[psutil.Process]:
    """The workers of a run, once both are at work on the hour-long tasks of `slow`."""
    ends = time.monotonic() + 120
    while len(list((folder / "marks").iterdir())) < 2:
        assert time.monotonic() < ends, "no task was begun"
        time.sleep(0.02)
    workers = psutil.Process(pid).children(recursive=True)
    assert len(workers) == 2
    return workers


def test_ctrl_c_ends_a_run_with_its_workers_and_says_how_to_go_on(
    make_recipe: MakeRecipe, tmp_path: Path, nursery: Nursery
) -> None:
    write_text(tmp_path / "recipe.yaml", recipe_text(slow(make_recipe, tmp_path)))
    pid = nursery.call(["run", "recipe.yaml", "-o", "run", "-q"], tmp_path)
    workers = working(pid, tmp_path)
    said_before = len(nursery.log.read_text())
    os.killpg(pid, signal.SIGINT)  # as a terminal does
    assert nursery.wait(pid) == 130
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    said = nursery.log.read_text()[said_before:]
    assert "Traceback" not in said
    assert "interrupted" in said
    assert "--resume" in said


# --- resuming what cannot be resumed ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interrupted:
    """A run that was killed in round 3, with kept updates, over a data file of its own."""

    folder: Path
    recipe: Path
    data: Path

    def resume(self, *arguments: str) -> Answer:
        return call("run", self.recipe, "-o", self.folder, "--resume", "-q", *arguments)


@pytest.fixture
def interrupted(
    make_recipe: MakeRecipe,
    small_data: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    nursery: Nursery,
) -> Interrupted:
    """A copy, which may be damaged; the data's place is the same for all, since it is in the recipe."""
    first = tmp_path_factory.getbasetemp() / "interrupted"
    data = first / "rows.jsonl"
    if not first.exists():
        first.mkdir()
        shutil.copy(small_data, data)
        recipe = make_recipe(**{**SITE_STATE.sections, "data": {"path": str(data)}})
        write_text(first / "recipe.yaml", recipe_text(recipe))
        death = Death("journal.keep_update", "after", 5)
        pid = nursery.start(recipe, first / "run", death=death, keep_updates_over_s=0.0)
        assert nursery.wait(pid) == KILLED, nursery.log.read_text()
    shutil.copy(small_data, data)
    shutil.copytree(first / "run", tmp_path / "run")
    return Interrupted(tmp_path / "run", first / "recipe.yaml", data)


def assert_refused(answer: Answer, *words: str) -> None:
    assert answer.code == 6, answer
    for word in words:
        assert word in answer.err
    assert "Traceback" not in answer.err


def test_what_was_interrupted_can_be_resumed_from_the_command_line(interrupted: Interrupted) -> None:
    answer = interrupted.resume("--json", "--set", "engine.workers=1", "--set", "name=other")
    assert answer.code == 0, answer
    assert len(answer.json["rounds"]) == 4


def test_a_changed_recipe_is_refused_by_the_name_of_the_field(interrupted: Interrupted) -> None:
    answer = interrupted.resume("--set", "training.lr=0.02", "--set", "federation.rounds=9")
    assert_refused(answer, "the recipe has changed", "training.lr: 0.1 -> 0.02", "federation.rounds: 4 -> 9")


def test_changed_data_are_refused_by_both_digests(interrupted: Interrupted) -> None:
    lines = interrupted.data.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[3] = lines[3].replace('"answer": "', '"answer": "well ')
    interrupted.data.write_text("".join(lines), encoding="utf-8")
    answer = interrupted.resume()
    assert_refused(answer, "this run began with another data: ")
    before, _, now = answer.err.partition("another data: ")[2].splitlines()[0].partition(", now ")
    assert len(before) == len(now) == 64
    assert before != now


def test_a_run_that_has_ended_is_not_resumed(undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("moments"), folder)
    before = (folder / "metrics.json").read_bytes()
    assert_refused(call("run", folder / "recipe.yaml", "-o", folder, "--resume"), "has ended")
    assert_refused(call("run", folder / "recipe.yaml", "-o", folder), "already holds a run")
    assert (folder / "metrics.json").read_bytes() == before


def test_a_missing_state_is_refused_by_its_name(interrupted: Interrupted) -> None:
    (interrupted.folder / "state" / "0002.safetensors").unlink()
    assert_refused(interrupted.resume(), "0002.safetensors is missing", "restore the folder from a copy")


@pytest.mark.parametrize("part", ["state", "updates"])
def test_a_damaged_file_is_refused_by_its_name(interrupted: Interrupted, part: str) -> None:
    (path,) = (interrupted.folder / part).glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert_refused(interrupted.resume(), f"{path.name} is damaged: its digest is not the one in the journal")


def test_a_damaged_journal_is_refused(interrupted: Interrupted) -> None:
    for path in interrupted.folder.glob("state.sqlite*"):
        path.write_bytes(b"\xa5" * 8192)
    assert_refused(interrupted.resume(), "state.sqlite is damaged")


def test_rubbish_of_a_killed_process_is_ignored_and_removed(interrupted: Interrupted) -> None:
    rubbish = [
        interrupted.folder / "state" / ".0003.safetensors.99.tmp",
        interrupted.folder / "state" / "0003.safetensors",
        interrupted.folder / "updates" / ".0003-001.safetensors.99.tmp",
    ]
    for path in rubbish:
        path.write_bytes(b"half")
    assert interrupted.resume().code == 0
    names = {path.name for part in ("state", "updates") for path in (interrupted.folder / part).iterdir()}
    assert names == {"0004.safetensors"}


def test_a_private_state_that_is_damaged_costs_its_site_the_round_and_says_so(interrupted: Interrupted) -> None:
    damaged = 0
    for path in interrupted.folder.glob("sites/*/0002.safetensors"):
        path.write_bytes(b"half")
        damaged += 1
    assert damaged == 2
    answer = interrupted.resume()
    failed = [event for event in events_of(interrupted.folder) if event["event"] == "site_failed"]
    assert answer.code in (0, 5)
    assert failed
    assert all("0002.safetensors is damaged" in event["reason"] for event in failed)

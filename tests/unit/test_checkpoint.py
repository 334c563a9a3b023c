"""Local work that is stopped at any step and taken up by a fresh process ends with the same bits."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from commonweight.errors import SiteError
from commonweight.recipe.schema import TrainingSpec
from commonweight.train.checkpoint import FileCheckpoint, WorkState
from commonweight.train.local import Cancelled, LocalResult, LocalWork, Participant
from commonweight.train.sft import SupervisedFineTuning
from tests.unit.tiny_models import examples, participant

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

TOKENS = examples((3, 9), (5, 1), (1, 4), (7, 2), (2, 12), (4, 3))
STEPS = 7
TASK = {"run": "r1", "round": 3, "lr": 0.01}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw, dropout": ({}, {"dropout": 0.4}),
    "momentum": ({"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01}, {}),
    "plain sgd": ({"optimizer": "sgd"}, {}),
    "packed": ({"packing": True, "max_tokens": 20, "weight_decay": 0.1}, {"dropout": 0.1}),
    "every weight, bfloat16": ({}, {"kind": "full", "dtype": torch.bfloat16}),
}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata))


def kept(path: Path, *, task: Mapping[str, Any] = TASK, every_s: float = 0.0) -> FileCheckpoint:
    return FileCheckpoint(path, task, write, every_s=every_s)


def after(steps: int) -> Callable[[], bool]:
    """Says stop once so many steps are done."""
    asked = iter(range(1000))
    return lambda: next(asked) == steps


def worker(**adapter: Any) -> Participant:
    return participant(**({"dtype": torch.float32} | adapter))


def work(who: Participant, spec: dict[str, Any], **more: Any) -> LocalResult:
    settings = TrainingSpec(**({"batch_size": 2, "max_tokens": 32} | spec))
    task = LocalWork(TOKENS, settings, **({"lr": 0.01, "steps": STEPS, "seed": 5, "pack_seed": 6} | more))
    return SupervisedFineTuning().work(who, task)


@pytest.mark.parametrize("case", CASES)
def test_work_that_is_stopped_at_any_step_ends_with_the_same_bits(case: str, tmp_path: Path) -> None:
    spec, adapter = CASES[case]
    whole = worker(**adapter)
    expected = work(whole, spec)
    for stop in (1, 3, STEPS - 1):
        file = tmp_path / f"{stop}.safetensors"
        with pytest.raises(Cancelled, match=f"after {stop} of {STEPS}"):
            work(worker(**adapter), spec, checkpoint=kept(file), interrupted=after(stop))
        torch.manual_seed(99)
        other, told = worker(**adapter), list[int]()
        assert work(other, spec, checkpoint=kept(file), progress=told.append) == expected
        assert told == list(range(stop, STEPS))
        assert other.trainables.values.digest() == whole.trainables.values.digest()


def test_work_may_be_stopped_again_and_again(tmp_path: Path) -> None:
    spec, adapter = CASES["adamw, dropout"]
    whole = worker(**adapter)
    expected = work(whole, spec)
    for _ in range(STEPS - 1):
        with pytest.raises(Cancelled):
            work(worker(**adapter), spec, checkpoint=kept(tmp_path / "c"), interrupted=after(1))
    last = worker(**adapter)
    assert work(last, spec, checkpoint=kept(tmp_path / "c")) == expected
    assert last.trainables.values.digest() == whole.trainables.values.digest()


def test_without_a_checkpoint_a_stop_loses_the_work() -> None:
    """That the test above shows something: what is not restored would show."""
    spec, adapter = CASES["adamw, dropout"]
    whole, parted = worker(**adapter), worker(**adapter)
    work(whole, spec)
    with pytest.raises(Cancelled):
        work(parted, spec, interrupted=after(3))
    work(parted, spec)
    assert parted.trainables.values.digest() != whole.trainables.values.digest()


def test_a_stop_comes_before_the_next_step() -> None:
    who, asked = worker(), 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        return asked == 1

    before = who.trainables.values.digest()
    with pytest.raises(Cancelled) as caught:
        work(who, {}, interrupted=interrupted)
    assert isinstance(caught.value, SiteError)
    assert asked == 1
    assert who.trainables.values.digest() == before


def test_it_is_saved_every_so_often_and_not_after_the_last_step(tmp_path: Path) -> None:
    now, saved = 0.0, list[int]()

    class Counting(FileCheckpoint):
        def save(self, state: WorkState) -> None:
            saved.append(state.sums.steps)
            super().save(state)

    def tick(steps: int) -> None:
        nonlocal now
        now += 10.0

    checkpoint = Counting(tmp_path / "c", TASK, write, every_s=20.0, clock=lambda: now)
    work(worker(), {}, checkpoint=checkpoint, progress=tick, steps=6)
    assert saved == [2, 4]


OTHERS: list[dict[str, Any]] = [{**TASK, "round": 4}, {**TASK, "run": "r2"}, {**TASK, "lr": 0.02}, {**TASK, "more": 1}]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_another_tasks_checkpoint_is_passed_over_and_deleted(other: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "c"
    whole, again = worker(), worker()
    expected = work(whole, {})
    with pytest.raises(Cancelled):
        work(worker(), {}, checkpoint=kept(file, task=other), interrupted=after(2))
    assert kept(file, task=other).load() is not None
    assert kept(file).load() is None
    assert not file.exists()
    assert work(again, {}, checkpoint=kept(file)) == expected
    assert again.trainables.values.digest() == whole.trainables.values.digest()


def spoilt(whole: bytes, way: str) -> bytes:
    match way:
        case "cut":
            return whole[: len(whole) // 2]
        case "empty":
            return b""
        case "pickle":
            return pickle.dumps({"sums": 1})
        case "header":
            return b"\xff" * 8 + whole[8:]
        case "words":
            return whole.replace(b"optimizer_steps", b"optimizer_stepz")
    raise ValueError(way)


@pytest.mark.parametrize("way", ["cut", "empty", "pickle", "header", "words"])
def test_a_damaged_checkpoint_costs_time_only(way: str, tmp_path: Path) -> None:
    file = tmp_path / "c"
    with pytest.raises(Cancelled):
        work(worker(), {}, checkpoint=kept(file), interrupted=after(2))
    file.write_bytes(spoilt(file.read_bytes(), way))
    told: list[int] = []
    work(worker(), {}, checkpoint=kept(file, every_s=1e9), progress=told.append)
    assert told[0] == 0
    assert not file.exists()


def test_it_is_plain_tensors_and_json(tmp_path: Path) -> None:
    file = tmp_path / "c"
    with pytest.raises(Cancelled):
        work(worker(dropout=0.1), {}, checkpoint=kept(file), interrupted=after(2))
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        record = json.loads(opened.metadata()["checkpoint"])
        random = opened.get_tensor("random/cpu")
    assert names == {"values/float32", "exp_avg/float32", "exp_avg_sq/float32", "random/cpu"}
    assert random.dtype == torch.uint8
    assert record["task"] == TASK
    assert record["sums"]["steps"] == 2
    assert record["optimizer_steps"] == [2.0]

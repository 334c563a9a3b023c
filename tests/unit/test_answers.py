"""What sites answer in plain data: nothing that they can say may reach a reckoning unchecked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commonweight.coordinator.answers import checked_facts, checked_result
from commonweight.errors import SiteError
from commonweight.federation.messages import ChainTask, EvaluateTask, SampleTask, TrainTask

SCORES = {"nll": [1.5, 2.0], "tokens": [3, 4], "correct": [1, 0]}
CHAIN = ChainTask("control/local/a", "local", ("a",), ((1, 0.1, 5), (2, 0.1, 5)), ("a",), (), "controls")
FINE: dict[str, Any] = {
    "rounds": [{"round": 1, "losses": {"a": 1.0}}, {"round": 2, "losses": {"a": 0.5}}],
    "final": {"a": SCORES},
    "best": {"round": 2, "loss": 0.5, "scores": SCORES},
    "seconds": 2.5,
}
SAMPLES = SampleTask((("a", 0),))
ANSWER = {"site": "a", "prompt": "why?", "reference": "because", "answer": "so"}


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_facts_are_reduced_to_what_is_reckoned_with() -> None:
    given = {"steps": 3, "groups": ["1", "2"], "train_examples": 40, "rows": -1, "dropped": True, "path": "/home/x"}
    assert checked_facts(raw(given)) == {"steps": 3, "groups": ["1", "2"], "data": {"train_examples": 40}}
    assert checked_facts(raw({"steps": 1, "groups": []}))["data"] == {}


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"steps": 1},
        {"groups": []},
        {"steps": 1.5, "groups": []},
        {"steps": -1, "groups": []},
        {"steps": 10**10, "groups": []},
        {"steps": "1", "groups": []},
        {"steps": 1, "groups": [None]},
        {"steps": 1, "groups": {"a": 1}},
        {"steps": 1, "groups": ["x" * 65]},
    ],
)
def test_facts_that_are_none(facts: Any) -> None:
    with pytest.raises(SiteError):
        checked_facts(raw(facts))


def test_scores_pass_as_they_are_and_of_the_tasks_site_alone() -> None:
    task = EvaluateTask(("a",))
    assert checked_result(task, raw({"a": SCORES, "b": {"nll": "hostile"}})) == {"a": SCORES}
    for missing in (None, b"", b"{}", raw({"b": SCORES})):
        with pytest.raises(SiteError):
            checked_result(task, missing)


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": None},
        {"rounds": [1]},
        {"rounds": [{"round": 1}]},
        {"rounds": [{"round": 3, "losses": {"a": 1.0}}]},
        {"rounds": [{"round": 1.0, "losses": {"a": 1.0}}]},
        {"rounds": [{"round": True, "losses": {"a": 1.0}}]},
        {"rounds": [{"round": 1, "losses": {"b": 1.0}}]},
        {"rounds": [{"round": 1, "losses": {"a": 1e300}}]},
        {"rounds": [{"round": 1, "losses": {"a": 10**400}}]},
        {"final": {}},
        {"final": {"a": {}}},
        {"final": []},
        {"best": {"round": 2, "loss": 0.5}},
        {"best": {"round": 10**30, "loss": 0.5, "scores": SCORES}},
        {"best": {"round": 2, "loss": "low", "scores": SCORES}},
        {"best": {"round": 2, "loss": 0.5, "scores": {**SCORES, "nll": [1.0]}}},
        {"seconds": None},
        {"seconds": True},
        {"seconds": -1e300},
    ],
    ids=range(19),
)
def test_a_local_models_figures(change: dict[str, Any]) -> None:
    assert checked_result(CHAIN, raw(FINE)) == FINE
    with pytest.raises(SiteError):
        checked_result(CHAIN, raw({**FINE, **change}))


def test_a_local_models_curve_has_no_more_points_than_rounds() -> None:
    many = {**FINE, "rounds": FINE["rounds"] * 1000}
    assert len(checked_result(CHAIN, raw(many))["rounds"]) == 3


def test_sample_answers_are_texts_of_the_site_that_was_asked() -> None:
    assert checked_result(SAMPLES, raw({"answers": [ANSWER]})) == {"answers": [ANSWER]}
    assert checked_result(SAMPLES, raw({"answers": [{**ANSWER, "site": "b", "more": 1}]})) == {"answers": [ANSWER]}
    long = checked_result(SAMPLES, raw({"answers": [{**ANSWER, "answer": "x" * 10**6}]}))["answers"][0]["answer"]
    assert len(long) == 20_000
    for wrong in (None, [], [ANSWER, ANSWER], [None], ["text"], [{**ANSWER, "answer": 1}], {"0": ANSWER}):
        with pytest.raises(SiteError):
            checked_result(SAMPLES, raw({"answers": wrong}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def like(value: Any) -> st.SearchStrategy[Any]:
    """The value, with anything in the place of any part of it."""
    match value:
        case dict():
            whole: st.SearchStrategy[Any] = st.fixed_dictionaries({key: like(part) for key, part in value.items()})
        case list():
            whole = st.tuples(*map(like, value)).map(list) | st.lists(like(value[0]), max_size=3)
        case _:
            whole = st.just(value)
    return whole | JSON


@given(answer=like({"steps": 1, "groups": ["1"], "train_examples": 1}))
def test_whatever_facts_are_they_are_good_or_refused(answer: Any) -> None:
    try:
        found = checked_facts(raw(answer))
    except SiteError:
        return
    assert isinstance(found["steps"], int)
    json.loads(json.dumps(found, allow_nan=False))


@pytest.mark.parametrize(
    ("task", "good"),
    [(EvaluateTask(("a",)), {"a": SCORES}), (CHAIN, FINE), (SAMPLES, {"answers": [ANSWER]})],
    ids=["evaluate", "chain", "sample"],
)
@given(data=st.data())
def test_whatever_an_answer_is_it_is_good_or_refused(task: Any, good: Any, data: st.DataObject) -> None:
    try:
        found = checked_result(task, raw(data.draw(like(good))))
    except SiteError:
        return
    json.loads(json.dumps(found, allow_nan=False))


def test_a_training_tasks_answer_is_its_upload() -> None:
    assert checked_result(TrainTask(1, "a", 0.1, 1), b"{}") == {}
    for deep in (b"[" * 10**6, b'{"a":' * 10**5 + b"1" + b"}" * 10**5, b"{}" + b" " * (9 << 20), b"\xff", b"1", b"nan"):
        with pytest.raises(SiteError):
            checked_result(EvaluateTask(("a",)), deep)

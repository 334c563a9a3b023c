"""Runs from their first invitation to their end, with sites that refuse, fail, leave, come late and lie."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from commonweight.model.tensors import NamedTensors
from commonweight.wire import protocol_pb2 as pb

from .federations import Coordinator, Hand, Site, theta, wait_for

DONE, FAILED, REFUSED, ACCEPTED = (
    pb.TaskReply.DONE,
    pb.TaskReply.FAILED,
    pb.TaskReply.REFUSED,
    pb.UploadStatus.ACCEPTED,
)


def idle(site: Site, task: pb.Task) -> None:
    """Leave a task as it is."""


def refuse(reason: str) -> Any:
    return lambda site, task: site.reply(task, REFUSED, reason=reason)


def fail(reason: str) -> Any:
    return lambda site, task: site.reply(task, FAILED, reason=reason)


@pytest.fixture
def names(request: pytest.FixtureRequest) -> list[str]:
    """Names of this test's own sites."""
    words = re.findall(r"[a-z0-9]+", request.node.name.lower())[1:]
    return [f"{'-'.join(words)[-48:].strip('-')}-{letter}" for letter in "abcd"]


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """A coordinator of one test's own: for runs that any site may join."""
    with Coordinator(tmp_path_factory.mktemp("alone")) as coordinator:
        yield coordinator


def fetched(lead: Hand, run: dict[str, Any]) -> NamedTensors:
    from commonweight.lead.client import Client

    with Client(lead.identity.path) as client:
        return client.frame(run["id"], run["base"])["theta"]


def events(lead: Hand, run: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in lead.events(run) if event["event"] == kind]


# --- who takes part


def test_nobody_can_join(coordinator: Coordinator, lead: Hand, names: list[str]) -> None:
    coordinator.site(names[0], join=refuse("its policy does not allow it: models"))
    coordinator.site(names[1], join=fail("base weights: ab here, cd in the job"))
    run = lead.submit(lead.job(sites=names[:2]))
    ended = lead.wait(run, "failed")
    assert "0 of 2 sites joined" in ended["error"]
    assert "its policy does not allow it: models" in ended["error"]
    assert "base weights: ab here" in ended["error"]
    assert "submit again" in ended["hint"]
    assert {s["site"]: (s["state"], s["reason"]) for s in ended["sites"]} == {
        names[0]: ("refused", "its policy does not allow it: models"),
        names[1]: ("refused", "base weights: ab here, cd in the job"),
    }
    assert ended["history"] == []
    assert coordinator.audited("task refused", names[0], "models").details["kind"] == "join"


def test_one_who_refuses_does_not_hold_the_others_up(coordinator: Coordinator, lead: Hand, names: list[str]) -> None:
    coordinator.site(names[0], join=refuse("not for this purpose"))
    other = coordinator.site(names[1])
    ended = lead.wait(lead.submit(lead.job(sites=names[:2], quorum=0.5)))
    assert other.trained == [1]
    assert [s["reason"] for s in ended["sites"] if s["state"] == "refused"] == ["not for this purpose"]
    assert ended["history"][0]["cohort"] == [names[1]]


@pytest.mark.parametrize(
    "facts",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"steps": NaN, "groups": []}',
        b'{"steps": 1e400, "groups": []}',
        b'{"steps": 0, "groups": []}',
        b'{"steps": true, "groups": []}',
        b'{"steps": 1, "groups": "all"}',
        b'{"steps": 1, "groups": [1]}',
        b'{"steps": ' + b"9" * 5000 + b', "groups": []}',
        b'{"a": ' * 100_000,
        b"[" * 100_000,
        b'{"steps": 1, "groups": [' + b'"0",' * 600_000 + b'"0"]}',
        b"\xff\xfe",
    ],
    ids=range(15),
)
def test_facts_that_make_no_sense(coordinator: Coordinator, lead: Hand, names: list[str], facts: bytes) -> None:
    coordinator.site(names[0], join=lambda site, task: site.done(task, facts))
    ended = lead.wait(lead.submit(lead.job(sites=names[:1])), "failed")
    assert "its facts cannot be used" in ended["error"]
    assert ended["sites"][0]["state"] == "refused"


def test_a_run_for_everybody_waits_until_somebody_comes(alone: Coordinator) -> None:
    lead = alone.hand("lena", "lead")
    first = alone.site("first", join=refuse("no"))
    run = lead.submit(lead.job())
    wait_for(lambda: events(lead, run, "site_refused"))
    assert lead.run(run)["state"] == "running"
    second = alone.site("second")
    ended = lead.wait(run)
    assert ended["history"][0]["cohort"] == ["second"]
    assert second.trained == [1]
    assert not first.trained


def test_a_site_that_comes_in_the_middle_of_a_run_takes_part_from_the_next_round(alone: Coordinator) -> None:
    lead = alone.hand("lena", "lead")
    first = alone.site("first", train=idle)
    run = lead.submit(lead.job(rounds=4))
    assert first.update(first.task(round=1)).state == ACCEPTED
    task = first.task(round=2)
    late = alone.site("late")
    assert first.update(task).state == ACCEPTED
    task = first.task(round=3)  # it was asked when this round began
    wait_for(lambda: [t for t in alone.store.tasks(run, 0) if t.site == "late" and t.state == "done"])
    assert first.update(task).state == ACCEPTED
    assert first.update(first.task(round=4)).state == ACCEPTED
    ended = lead.wait(run)
    assert [r["cohort"] for r in ended["history"]] == [["first"]] * 3 + [["first", "late"]]
    assert late.trained == [4]


def test_a_revoked_site_is_not_invited_and_not_waited_for(
    coordinator: Coordinator, lead: Hand, names: list[str]
) -> None:
    a, b, c = (coordinator.site(name, train=idle) for name in names[:3])
    coordinator.guest(names[3])
    coordinator.store.set_state(names[3], "revoked", "gone", "ada")
    run = lead.submit(lead.job(sites=names, rounds=2, quorum=0.75, patience_s=30.0, retries=0))
    tasks = [site.task(round=1, run=run) for site in (a, b, c)]
    assert [s["state"] for s in lead.run(run)["sites"]] == ["joined"] * 3 + ["refused"]
    for site, task in zip((a, b, c), tasks, strict=True):
        assert site.update(task).state == ACCEPTED
    for site in (a, b, c):
        site.task(round=2, run=run)
    coordinator.store.set_state(c.name, "revoked", "gone too", "ada")
    # its quorum cannot be had any more: not even patience helps, and the model stays as round 1 left it
    ended = lead.wait(run, "failed")
    assert f"{c.name}: its enrolment was revoked" in ended["error"]
    assert ended["round"] == 1


# --- rounds


def test_over_selection_closes_at_the_target_and_withdraws_the_late(
    coordinator: Coordinator, lead: Hand, names: list[str]
) -> None:
    sites = [coordinator.site(name, train=idle) for name in names]
    run = lead.submit(lead.job(sites=names, cohort=2, over_selection=2.0))
    tasks = {site.name: site.task(run=run) for site in sites}
    first, second = sites[3], sites[1]  # not the first in the order of folding
    assert first.update(tasks[first.name], theta(1.0)).state == ACCEPTED
    assert second.update(tasks[second.name], theta(3.0)).state == ACCEPTED
    ended = lead.wait(run)
    (round,) = ended["history"]
    assert round["cohort"] == names
    assert sorted(round["answered"]) == sorted([first.name, second.name])
    assert sorted(round["late"]) == sorted([names[0], names[2]])
    for site in (sites[0], sites[2]):
        wait_for(lambda site=site: [w for w in site.stay.all("withdraw") if w.task == tasks[site.name].id])  # type: ignore[misc]
    assert not ended["error"]
    # θ + lr · mean: what came too late is in it nowhere
    torch.testing.assert_close(fetched(lead, ended)["a.weight"], theta()["a.weight"] * 3.0)


def test_a_deadline_closes_a_round_without_those_who_still_work(
    coordinator: Coordinator, lead: Hand, names: list[str]
) -> None:
    quick, slow = coordinator.site(names[0]), coordinator.site(names[1], train=idle)
    run = lead.submit(lead.job(sites=names[:2], deadline_s=1.0, quorum=0.5))
    task = slow.task(run=run)
    assert 0 < task.seconds_left <= 1.0
    ended = lead.wait(run)
    assert ended["history"][0]["answered"] == [quick.name]
    assert ended["history"][0]["late"] == [slow.name]
    assert events(lead, run, "site_late")[-1]["site"] == slow.name


def test_a_round_without_its_quorum_is_repeated_and_then_the_run_fails_with_the_model_as_it_was(
    coordinator: Coordinator, lead: Hand, names: list[str]
) -> None:
    good, bad = coordinator.site(names[0]), coordinator.site(names[1])

    def break_down(site: Site, task: pb.Task) -> None:
        if task.round == 1:
            site.train(task)
        else:
            wait_for(lambda: 2 in good.trained)
            site.reply(task, FAILED, reason="the disk is full")

    bad.answers["train"] = break_down
    run = lead.submit(lead.job(sites=names[:2], rounds=3, quorum=1.0, retries=1))
    ended = lead.wait(run, "failed")
    assert "round 2 was abandoned: 1 of 2 sites answered, 2 are needed" in ended["error"]
    assert f"{bad.name}: the disk is full" in ended["error"]
    assert (ended["round"], len(ended["history"])) == (1, 1)
    assert good.trained == [1, 2]  # its update of the abandoned round was kept, and not asked for again
    assert [e["attempt"] for e in events(lead, run, "round_repeated")] == [2]
    torch.testing.assert_close(fetched(lead, ended)["b.weight"], theta()["b.weight"] * 2.0)


def test_a_round_that_was_abandoned_succeeds_when_it_is_repeated(
    coordinator: Coordinator, lead: Hand, names: list[str]
) -> None:
    good, shaky = coordinator.site(names[0]), coordinator.site(names[1])
    tries: list[str] = []

    def third_time(site: Site, task: pb.Task) -> None:
        tries.append(task.id)
        site.train(task) if len(tries) == 3 else site.reply(task, FAILED, reason="not yet")

    shaky.answers["train"] = third_time
    run = lead.submit(lead.job(sites=names[:2], quorum=1.0, retries=1))
    ended = lead.wait(run)
    assert len(set(tries)) == 3
    assert good.trained == shaky.trained == [1]
    assert ended["history"][0]["failed"] == {}
    torch.testing.assert_close(fetched(lead, ended)["b.weight"], theta()["b.weight"] * 2.0)


def test_min_sites_is_a_bound_whatever_the_quorum(coordinator: Coordinator, lead: Hand, names: list[str]) -> None:
    coordinator.site(names[0])
    coordinator.site(names[1], train=fail("no"))
    coordinator.site(names[2], train=fail("no"))
    run = lead.submit(lead.job(sites=names[:3], quorum=0.1, min_sites=2, retries=0))
    assert "of 3 sites answered, 2 are needed" in lead.wait(run, "failed")["error"]


def test_a_site_that_refuses_a_round_is_not_asked_again(coordinator: Coordinator, lead: Hand, names: list[str]) -> None:
    coordinator.site(names[0])
    other = coordinator.site(names[1], train=refuse("bytes_per_round"))
    ended = lead.wait(lead.submit(lead.job(sites=names[:2], retries=5)))
    assert ended["history"][0]["failed"] == {names[1]: "its policy refused: bytes_per_round"}
    assert len([t for t in other.tasks if t.kind == "train"]) == 1


def test_a_site_that_is_away_is_waited_for_and_then_given_up(
    coordinator: Coordinator, lead: Hand, names: list[str]
) -> None:
    stays, leaves = coordinator.site(names[0]), coordinator.site(names[1], train=idle)
    run = lead.submit(lead.job(sites=names[:2], rounds=2, quorum=0.5, patience_s=1.0))
    task = leaves.task(run=run)
    leaves.stay.leave()
    wait_for(lambda: events(lead, run, "site_away"))
    leaves.attend()
    wait_for(lambda: events(lead, run, "site_back"))
    assert leaves.update(task).state == ACCEPTED
    leaves.task(round=2, run=run)
    leaves.stay.leave()
    ended = lead.wait(run)
    assert sorted(ended["history"][0]["answered"]) == sorted([stays.name, leaves.name])
    assert ended["history"][1]["failed"][leaves.name].startswith("away for ")


def test_several_runs_at_once(coordinator: Coordinator, lead: Hand, names: list[str]) -> None:
    sites = [coordinator.site(name) for name in names[:2]]
    runs = [lead.submit(lead.job(sites=names[:2], rounds=k)) for k in (1, 2, 3)]
    for k, run in enumerate(runs, 1):
        ended = lead.wait(run)
        assert ended["round"] == k
        torch.testing.assert_close(fetched(lead, ended)["b.weight"][0], torch.tensor(_after(k)), rtol=1e-5, atol=0.0)
    for site in sites:
        assert sorted(site.trained) == [1, 1, 1, 2, 2, 3]


def _after(rounds: int) -> float:
    """Every site adds ones, whatever the learning rate of its local work: fedavg takes the mean of what they add."""
    return 1.0 + rounds


# --- answers that are wrong or hostile


HOSTILE: list[Any] = [
    b"",
    b"null",
    b"{" * 100_000,
    {},
    {"?": 1},
    {"nll": [], "tokens": [], "correct": []},
    {"nll": [1.0], "tokens": [1]},
    {"nll": [1.0], "tokens": [1], "correct": [1], "extra": []},
    {"nll": [1.0, 2.0], "tokens": [1], "correct": [1]},
    {"nll": [float("nan")], "tokens": [1], "correct": [1]},
    {"nll": [1e308, 1e308], "tokens": [1, 1], "correct": [1, 1]},
    {"nll": [1.0], "tokens": [10**18], "correct": [1]},
    {"nll": [1.0], "tokens": [10**30], "correct": [1]},
    {"nll": [1.0], "tokens": [0], "correct": [0]},
    {"nll": [1.0], "tokens": [1], "correct": [2]},
    {"nll": [[1.0]], "tokens": [[1]], "correct": [[1]]},
    {"nll": "one", "tokens": "two", "correct": "three"},
    {"nll": {"0": 1.0}, "tokens": {"0": 1}, "correct": {"0": 1}},
    {"nll": [1.0], "tokens": [1], "correct": [1], "exact": ["yes", "no"]},
    {"nll": [1.0] * 200_000, "tokens": [1] * 200_000, "correct": [1] * 200_000},
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_scores_that_make_no_sense_are_left_out(
    coordinator: Coordinator, lead: Hand, names: list[str], number: int
) -> None:
    """The run goes on with the scores of the others."""
    given = HOSTILE[number]
    coordinator.site(names[0])
    lies = lambda site, task: site.done(task, given if isinstance(given, bytes) else {site.name: given})  # noqa: E731
    coordinator.site(names[1], evaluate=lies)
    run = lead.submit(lead.job(sites=names[:2]))
    ended = lead.wait(run)
    assert ended["history"][0]["answered"]
    missing = events(lead, run, "evaluation_missing")
    assert {site for event in missing for site in event["sites"]} == {names[1]}
    pieces = lead.call("Control/GetFile", pb.FileRequest(run=run, name="metrics.json"))
    metrics = json.loads(b"".join(piece.content for piece in pieces), parse_constant=pytest.fail)
    assert metrics["not_evaluated"] == [names[1]]


def test_nobody_can_be_evaluated(coordinator: Coordinator, lead: Hand, names: list[str]) -> None:
    """It fails once and for all, rather than asking for ever."""
    sites = [coordinator.site(name, evaluate=refuse("share.scores: none")) for name in names[:2]]
    ended = lead.wait(lead.submit(lead.job(sites=names[:2])), "failed")
    assert "no site could evaluate the model" in ended["error"]
    assert [len([t for t in site.tasks if t.kind == "evaluate"]) for site in sites] == [1, 1]


def test_a_site_that_answers_in_anothers_name_scores_nobody(
    coordinator: Coordinator, lead: Hand, names: list[str]
) -> None:
    coordinator.site(names[0])
    one = {"nll": [9.0], "tokens": [1], "correct": [0]}
    coordinator.site(names[1], evaluate=lambda site, task: site.done(task, {names[0]: one, names[1]: one}))
    run = lead.submit(lead.job(sites=names[:2]))
    lead.wait(run)
    pieces = lead.call("Control/GetFile", pb.FileRequest(run=run, name="metrics.json"))
    sites = json.loads(b"".join(piece.content for piece in pieces))["arms"]["federated"]["sites"]
    assert {site: found["loss"] for site, found in sites.items()} == {names[0]: 1.0, names[1]: 9.0}

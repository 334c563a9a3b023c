"""Asynchronous runs over the network: a real coordinator, light sites, arrivals in the order that a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commonweight.coordinator.stored_model import StoredModel
from commonweight.errors import StorageError
from commonweight.model.tensors import NamedTensors
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import parse_header

from .federations import WAIT_S, Coordinator, Hand, Site, theta, wait_for

ACCEPTED, REFUSED = pb.UploadStatus.ACCEPTED, pb.UploadStatus.REFUSED


def idle(site: Site, task: pb.Task) -> None:
    """Takes a task on, and does nothing."""
    site.reply(task, pb.TaskReply.TAKEN)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    with Coordinator(tmp_path) as one:
        yield one


@pytest.fixture
def lead(coordinator: Coordinator) -> Hand:
    return coordinator.hand("lena", "lead")


def sites_of(coordinator: Coordinator, *names: str, **answers: Any) -> list[Site]:
    return [coordinator.site(name, **{"train": idle, **answers}) for name in names]


def submit(lead: Hand, strategy: Mapping[str, Any], *, rounds: int, **federation: Any) -> str:
    return lead.submit(lead.job(rounds=rounds, strategy=dict(strategy), **federation))


def delta(number: float) -> NamedTensors:
    """What a site adds: told apart by its number."""
    return theta(number)


def rounds_of(site: Site) -> list[int]:
    """The rounds of a site's training tasks."""
    return [task.round for task in list(site.tasks) if task.kind == "train"]


def committed(lead: Hand, run: str, number: int) -> dict[str, Any]:
    """A version's record, when it is committed."""
    found: dict[str, Any] = wait_for(lambda: next((r for r in lead.run(run)["history"] if r["round"] == number), None))
    return found


def fetched(lead: Hand, run: str) -> np.ndarray[Any, Any]:
    """The present model, flat, as it lies in its frame."""
    header, *chunks = lead.call("Transfer/Fetch", pb.FetchRequest(run=run, frame=lead.run(run)["base"]))
    assert parse_header(bytes(header)).plan.channels[0].name == "theta"
    return np.frombuffer(b"".join(bytes(chunk) for chunk in chunks), dtype="<f4").astype(np.float64)


def flat(tensors: NamedTensors) -> np.ndarray[Any, Any]:
    return torch.cat([values.double().flatten() for values in tensors.flats.values()]).numpy()


def expected(history: Sequence[Mapping[str, Any]], numbers: Mapping[tuple[str, int], float], strategy: str) -> Any:
    """The algebra in float64, from the order that the journal has, whole models at a time."""
    models = [flat(theta())]
    for record in history:
        present, total, alpha_sum = models[-1], np.zeros_like(models[0]), 0.0
        for update in record["updates"]:
            number = numbers[update["site"], update["version"]]
            tau = len(models) - 1 - update["version"]
            assert tau == update["staleness"]
            if strategy == "fedbuff":
                total += (1 + tau) ** -0.5 * flat(delta(number))
            else:
                alpha = 0.6 * (1 + tau) ** -0.5
                alpha_sum += alpha
                total += alpha * (models[update["version"]] + flat(delta(number)))
        kept = 1.0 if strategy == "fedbuff" else 1 - alpha_sum
        models.append(kept * present + (total / len(record["updates"]) if strategy == "fedbuff" else total))
    return models[-1]


@pytest.mark.parametrize("strategy", ["fedbuff", "fedasync"])
def test_a_slow_site_blocks_nobody_and_its_late_update_counts_less(
    coordinator: Coordinator, lead: Hand, strategy: str
) -> None:
    """Three versions are made by the quick while the slow one works at its first task; then that is folded."""
    quick, other, slow = sites_of(coordinator, "quick", "other", "slow")
    options = {"name": strategy, **({"buffer": 2} if strategy == "fedbuff" else {})}
    run = submit(lead, options, rounds=4)
    late, numbers = slow.task(run=run), dict[tuple[str, int], float]()
    assert late.round == 1
    for number in (1, 2, 3):
        for place, site in enumerate([quick, other] if strategy == "fedbuff" else [quick]):
            numbers[site.name, number - 1] = given = 0.1 * number + place
            assert site.update(site.task(round=number, run=run), delta(given)).state == ACCEPTED
        record = committed(lead, run, number)
        assert [u["staleness"] for u in record["updates"]] == [0] * len(record["updates"])
    assert slow.call("Transfer/Fetch", pb.FetchRequest(run=run, frame=late.base)), "what it started from is there"
    numbers["slow", 0], numbers["quick", 3] = 7.0, 0.5
    assert slow.update(late, delta(7.0)).state == ACCEPTED
    if strategy == "fedbuff":
        assert quick.update(quick.task(round=4, run=run), delta(0.5)).state == ACCEPTED
    ended = lead.wait(run)
    assert ended["history"][3]["updates"][0] == {"site": "slow", "version": 0, "staleness": 3}
    assert rounds_of(slow) == [1]
    np.testing.assert_allclose(fetched(lead, run), expected(ended["history"], numbers, strategy), rtol=1e-5, atol=1e-5)
    assert coordinator.store.spent_uploads(run) == [], "what was folded is deleted"


def test_beyond_max_staleness_an_update_is_refused_and_its_site_gets_fresh_work(
    coordinator: Coordinator, lead: Hand
) -> None:
    """One that is on its way as its version falls too far behind, and one that is offered after."""
    quick, slow, slower = sites_of(coordinator, "quick", "slow", "slower")
    run = submit(lead, {"name": "fedbuff", "buffer": 1, "max_staleness": 1}, rounds=5)
    late, later = slow.task(run=run), slower.task(run=run)
    on_its_way = slow.open(slow.manifest(late, delta(1.0)))
    assert on_its_way.state == pb.UploadStatus.OPEN
    for number in (1, 2):
        assert quick.update(quick.task(round=number, run=run)).state == ACCEPTED
        committed(lead, run, number)
    status = slow.push(on_its_way.upload, [])
    assert (status.state, status.code) == (REFUSED, "stale")
    status = slower.update(later)
    assert (status.state, status.code, "2 versions behind" in status.reason) == (REFUSED, "stale", True), status.reason
    wait_for(lambda: later.id in {withdrawn.task for withdrawn in slower.stay.all("withdraw")})
    assert slow.update(slow.task(round=3, run=run)).state == ACCEPTED
    record = committed(lead, run, 3)
    assert record["updates"] == [{"site": "slow", "version": 2, "staleness": 0}]
    assert record["late"] == ["slower"], "the other has answered after all"
    refused = [e["site"] for e in lead.events(run) if e["event"] == "update_refused"]
    assert sorted(refused) == ["slow", "slower"]
    assert slower.update(slower.task(round=3, run=run)).state == ACCEPTED
    assert quick.update(quick.task(round=5, run=run)).state == ACCEPTED, "its task of round 3 would be too stale by now"
    ended = lead.wait(run)
    assert [u["staleness"] for r in ended["history"] for u in r["updates"]] == [0, 0, 0, 1, 0]


def test_a_buffer_is_of_distinct_sites_and_an_update_counts_once(coordinator: Coordinator, lead: Hand) -> None:
    """A site whose update lies in the open buffer is given nothing until the commit; what it sends again changes
    nothing, another update for the same task is refused."""
    one, two = sites_of(coordinator, "one", "two")
    run = submit(lead, {"name": "fedbuff", "buffer": 2}, rounds=2)
    task = one.task(run=run)
    assert one.update(task, delta(1.0)).state == ACCEPTED
    assert one.update(task, delta(1.0)).state == ACCEPTED
    again = one.update(task, delta(2.0))
    assert (again.state, again.code) == (REFUSED, "replayed")
    third = coordinator.site("three", train=idle)  # joins, and looks at the run are due: still nothing for the first
    assert third.task(run=run).round == 1
    assert rounds_of(one) == [1]
    assert two.update(two.task(run=run), delta(3.0)).state == ACCEPTED
    record = committed(lead, run, 1)
    assert record["answered"] == ["one", "two"]
    assert one.task(round=2, run=run).base != task.base
    for site in (third, two):
        assert site.update(site.task(run=run), delta(1.0)).state == ACCEPTED
    ended = lead.wait(run)
    numbers = {("one", 0): 1.0, ("two", 0): 3.0, ("three", 0): 1.0, ("two", 1): 1.0}
    assert ended["history"][1]["updates"][0] == {"site": "three", "version": 0, "staleness": 1}
    np.testing.assert_allclose(fetched(lead, run), expected(ended["history"], numbers, "fedbuff"), rtol=1e-5, atol=1e-5)


def test_a_coordinator_that_was_stopped_goes_on_with_the_same_buffer(coordinator: Coordinator, lead: Hand) -> None:
    """Tasks from before are answered after, and each update counts once."""
    one, two = sites_of(coordinator, "one", "two")
    run = submit(lead, {"name": "fedasync"}, rounds=1)  # and beside it one that ends in between
    assert one.update(one.task(run=run), delta(2.0)).state == ACCEPTED
    lead.wait(run)
    run = submit(lead, {"name": "fedbuff", "buffer": 2}, rounds=2)
    tasks = {site.name: site.task(run=run) for site in (one, two)}
    assert one.update(tasks["one"], delta(2.0)).state == ACCEPTED
    coordinator.restart()
    for site in (one, two):
        site.attend()
    assert one.update(tasks["one"], delta(2.0)).state == ACCEPTED, "the same, once more"
    assert two.update(tasks["two"], delta(3.0)).state == ACCEPTED
    record = committed(lead, run, 1)
    assert record["answered"] == ["one", "two"]
    for site in (two, one):
        assert site.update(site.task(round=2, run=run), delta(1.0)).state == ACCEPTED
    ended = lead.wait(run)
    numbers = {("one", 0): 2.0, ("two", 0): 3.0, ("one", 1): 1.0, ("two", 1): 1.0}
    assert ended["history"][1]["answered"] == ["two", "one"]
    np.testing.assert_allclose(fetched(lead, run), expected(ended["history"], numbers, "fedbuff"), rtol=1e-5, atol=1e-5)


def test_as_many_work_at_once_as_the_cohort_says_and_who_is_away_is_passed_over(
    coordinator: Coordinator, lead: Hand
) -> None:
    sites = {site.name: site for site in sites_of(coordinator, "a", "b", "c")}
    run = submit(lead, {"name": "fedbuff", "buffer": 2}, rounds=2, cohort=2)
    wait_for(lambda: sum(len(rounds_of(site)) for site in sites.values()) == 2)
    (spare,) = [site for site in sites.values() if not rounds_of(site)]
    working = [site for site in sites.values() if site is not spare]
    working[0].stay.leave()
    assert spare.task(run=run).round == 1, "in the place of the one that went away"
    for site in (spare, working[1]):
        assert site.update(site.task(run=run)).state == ACCEPTED
    assert sorted(committed(lead, run, 1)["answered"]) == sorted([spare.name, working[1].name])
    working[0].attend()
    assert working[0].update(working[0].task(run=run)).state == ACCEPTED, "it goes on where it was"
    assert spare.update(spare.task(round=2, run=run)).state == ACCEPTED
    ended = lead.wait(run)
    assert ended["history"][1]["updates"][0] == {"site": working[0].name, "version": 0, "staleness": 1}


def test_a_run_ends_when_so_many_failed_that_no_buffer_can_fill(coordinator: Coordinator, lead: Hand) -> None:
    def fail(site: Site, task: pb.Task) -> None:
        site.reply(task, pb.TaskReply.FAILED, reason="out of memory")

    sites_of(coordinator, "works")
    broken = coordinator.site("broken", train=fail)
    run = submit(lead, {"name": "fedbuff", "buffer": 2}, rounds=2, sites=["works", "broken"], retries=1)
    ended = lead.wait(run, "failed")
    assert "version 1 was abandoned: 0 sites answered, the buffer takes 2" in ended["error"]
    assert "broken: out of memory" in ended["error"]
    assert rounds_of(broken) == [1, 1]


@pytest.mark.parametrize(
    ("strategy", "federation", "words"),
    [
        ({"name": "fedbuff", "buffer": 4}, {"sites": ["a", "b"]}, "only 2 of 2 work at once"),
        ({"name": "fedbuff", "buffer": 4}, {"cohort": 3}, "only 3 work at once"),
        ({"name": "fedasync"}, {"min_sites": 2}, "min_sites is 2, but a version of fedasync takes in the updates of 1"),
    ],
)
def test_settings_that_no_version_could_meet_are_refused_at_once(
    coordinator: Coordinator, lead: Hand, strategy: Any, federation: dict[str, Any], words: str
) -> None:
    sites_of(coordinator, *federation.get("sites", ()))
    denial = lead.denied("Control/Submit", lead.sign(lead.job(strategy=strategy, **federation)))
    assert words in denial.message, denial


def test_what_comes_while_a_version_is_combined_goes_into_the_next_and_a_crash_then_loses_nothing(
    coordinator: Coordinator, lead: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is lost as the first version is combined; whoever leads next combines the very same."""
    combine, begun, go_on, tries = StoredModel.close, threading.Event(), threading.Event(), list[list[str]]()

    def interrupted(model: StoredModel, round: int) -> dict[str, Any]:
        tries.append([update.site for update in model._updates])
        begun.set()
        assert go_on.wait(WAIT_S)
        if len(tries) == 1:
            raise StorageError("the database went away", retry=True)
        return combine(model, round)

    monkeypatch.setattr(StoredModel, "close", interrupted)
    sites = {site.name: site for site in sites_of(coordinator, "a", "b", "c", "d")}
    run = submit(lead, {"name": "fedbuff", "buffer": 2}, rounds=2)
    tasks = {name: site.task(run=run) for name, site in sites.items()}
    for name in ("c", "a"):
        assert sites[name].update(tasks[name], delta(1.0)).state == ACCEPTED
    assert begun.wait(WAIT_S)
    for name in ("d", "b"):
        assert sites[name].update(tasks[name], delta(2.0)).state == ACCEPTED
    assert lead.run(run)["history"] == []
    go_on.set()
    ended = lead.wait(run)
    assert tries == [["c", "a"], ["c", "a"], ["d", "b"]]
    assert [r["answered"] for r in ended["history"]] == [["c", "a"], ["d", "b"]]
    numbers = {("c", 0): 1.0, ("a", 0): 1.0, ("d", 0): 2.0, ("b", 0): 2.0}
    np.testing.assert_allclose(fetched(lead, run), expected(ended["history"], numbers, "fedbuff"), rtol=1e-5, atol=1e-5)
    assert [len(r["updates"]) for r in ended["history"]] == [2, 2]


def test_a_site_that_joins_on_the_way_fills_a_buffer_that_waits(coordinator: Coordinator, lead: Hand) -> None:
    """Of two sites one leaves for good; nobody gives the run up, and a third that comes is given work at once."""
    stays, leaves = sites_of(coordinator, "stays", "leaves")
    run = submit(lead, {"name": "fedbuff", "buffer": 2}, rounds=1)
    leaves.task(run=run)
    leaves.stay.leave()
    assert stays.update(stays.task(run=run)).state == ACCEPTED
    wait_for(lambda: [e for e in lead.events(run) if e["event"] == "site_away" and e["site"] == "leaves"])
    assert lead.run(run)["state"] == "running"
    comes = coordinator.site("comes", train=idle)
    assert comes.update(comes.task(run=run)).state == ACCEPTED
    ended = lead.wait(run)
    assert ended["history"][0]["answered"] == ["stays", "comes"]
    metrics = b"".join(p.content for p in lead.call("Control/GetFile", pb.FileRequest(run=run, name="metrics.json")))
    assert json.loads(metrics)["arrivals"] == {"staleness": {"0": 2}, "shares": {"comes": 0.5, "stays": 0.5}}


def test_nobody_waits_for_an_evaluation(coordinator: Coordinator, lead: Hand) -> None:
    """One site does not come to it before the last version: the evaluations that were due meanwhile are left out."""
    asked: list[str] = []

    def once(site: Site, task: pb.Task) -> None:
        asked.append(task.id)
        if len(asked) != 2:
            site.done(task, site.scores())

    (quick,) = sites_of(coordinator, "quick")
    slow = coordinator.site("slow", train=idle, evaluate=once)
    job = lead.job(rounds=3, strategy={"name": "fedasync"})
    job.recipe = job.recipe.replace("every: 3", "every: 1")
    run = lead.submit(job)
    assert quick.update(quick.task(round=1, run=run)).state == ACCEPTED
    wait_for(lambda: len(asked) == 2)
    for number in (2, 3):
        assert quick.update(quick.task(round=number, run=run)).state == ACCEPTED
    ended = lead.wait(run)
    assert [len(r["updates"]) for r in ended["history"]] == [1, 1, 1]
    evaluated = [e.get("round") for e in lead.events(run) if e["event"] == "evaluated"]
    assert evaluated == [0, 3]
    withdrawn = coordinator.store.task(asked[1])
    assert withdrawn is not None
    assert (withdrawn.state, withdrawn.reason) == ("withdrawn", "the last version is evaluated instead")
    assert rounds_of(slow) == [1]

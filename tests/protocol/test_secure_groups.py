"""Secure sums in groups over the wire: the rule's bits, groups that are lost, restarts, sites that lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from commonweight.federation.groups import draw_groups
from commonweight.model.tensors import NamedTensors
from commonweight.registry import resolve
from commonweight.strategies.update import Update
from commonweight.wire import protocol_pb2 as pb

from .federations import theta, wait_for
from .sum_sites import SumSite, mean_of
from .test_secure_sums import Stage, fail, once

MEDIAN: dict[str, Any] = {"strategy": "median", "min_sites": 3}


class Grouped(Stage):
    """Nine sites in three groups, of which two must be whole."""

    privacy: ClassVar[dict[str, Any]] = {"secure_aggregation": "on", "secure_group_size": 3}

    def groups(self, round: int) -> tuple[tuple[str, ...], ...]:
        return draw_groups(list(self.sites), 3, seed=self.recipe.seed, round=round)

    def expected_of(self, counted: Sequence[Sequence[int]], zeros: Sequence[int] = ()) -> NamedTensors:
        """The model after rounds in which these groups counted; `zeros`: those whose sums could not be."""
        rule = resolve("strategy", "median")()
        state = rule.init(theta())
        for number, places in enumerate(counted, 1):
            rows = []
            for place in places:
                group = list(self.groups(number)[place])
                mean = mean_of(group, len(group), self.recipe, number, state.theta.layout)
                if place in zeros:
                    mean = NamedTensors.zeros(mean.layout)
                rows.append(Update(f"group-{place}", number, {"delta": mean}, 1.0, 1, 1, 1))
            state = rule.combine(state, rows)
        found: NamedTensors = state.theta
        return found

    def check_groups(self, run: str, counted: Sequence[Sequence[int]], zeros: Sequence[int] = ()) -> dict[str, Any]:
        ended = self.lead.wait(run)
        assert self.model(ended).digest() == self.expected_of(counted, zeros).digest()
        for number, (row, places) in enumerate(zip(ended["history"], counted, strict=True), 1):
            assert [tuple(group["sites"]) for group in row["groups"]] == list(self.groups(number))
            there = [place for place, group in enumerate(row["groups"]) if "lost" not in group or place in zeros]
            assert there == list(places)
        return ended


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Grouped]:
    stage = Grouped(tmp_path)
    with stage.coordinator:
        yield stage


def begin(stage: Grouped, *, rounds: int = 1, instead: Any = None, **federation: Any) -> str:
    return stage.begin(9, rounds=rounds, instead=instead, **{**MEDIAN, **federation})


def test_rounds_have_the_bits_of_the_rule_over_groups(stage: Grouped) -> None:
    run = begin(stage, rounds=2)
    ended = stage.check_groups(run, [[0, 1, 2]] * 2)
    assert stage.groups(1) != stage.groups(2)
    assert ended["history"][0]["label_tokens"] == 9 * 40
    seen = {kind for site in stage.sites.values() for kind, *_ in site.said}
    assert seen == {"keys", "shares", "consent", "reveal"}
    for site in stage.sites.values():
        (mine,) = (group for group in stage.groups(1) if site.name in group)
        first = next(said for kind, _, said in site.said if kind == "shares")
        assert set(first["boxes"]) == set(mine) - {site.name}, "shares go to the group alone"


@pytest.mark.parametrize("step", ["keys", "shares", "train", "consent", "reveal"])
def test_a_group_with_too_few_is_lost_and_the_others_go_on(stage: Grouped, step: str) -> None:
    run = begin(stage, instead={"site-e": {step: fail}})
    lost = next(place for place, group in enumerate(stage.groups(1)) if "site-e" in group)
    ended = stage.check_groups(run, [[place for place in range(3) if place != lost]])
    assert [event["sites"] for event in stage.events(run, "group_lost")] == [list(stage.groups(1)[lost])]
    assert not stage.events(run, "round_abandoned")
    assert len(ended["history"]) == 1


@pytest.mark.parametrize("step", ["shares", "consent"])
def test_with_too_few_groups_the_round_is_repeated_with_fresh_keys(stage: Grouped, step: str) -> None:
    once_each = {"site-a": {step: once(fail)}, "site-e": {step: once(fail)}, "site-i": {step: once(fail)}}
    run = begin(stage, instead=once_each, quorum=1.0)
    stage.check_groups(run, [[0, 1, 2]])
    assert [event["round"] for event in stage.events(run, "round_abandoned")] == [1]
    first, second = stage.attempts("site-b", "keys")
    assert not {first["channel"], first["pair"], first["commitment"]} & set(second.values())


def test_a_lie_about_a_share_loses_the_liars_group_alone(stage: Grouped) -> None:
    def lie(site: SumSite, task: pb.Task) -> None:
        answer = site.step(task)
        site.site.done(task, {**answer, "own": dict.fromkeys(answer["own"], "00" * 33)})

    run = begin(stage, instead={"site-c": {"reveal": lie}})
    lost = next(place for place, group in enumerate(stage.groups(1)) if "site-c" in group)
    ended = stage.check_groups(run, [[place for place in range(3) if place != lost]])
    assert "wrong share" in ended["history"][0]["groups"][lost]["lost"]


def test_a_group_that_weighs_what_no_sites_weigh_is_a_row_of_zeros(stage: Grouped) -> None:
    """One site adds to the weight of its masked row, which nobody can see: the round goes on."""

    def heavy(site: SumSite, task: pb.Task) -> None:
        tensors, work = site.masked(task)
        values = tensors["totals"]
        values[0] = torch.tensor((int(values[0]) + (1 << 30) + (1 << 31)) % (1 << 32) - (1 << 31), dtype=torch.int32)
        site.site.reply(task, pb.TaskReply.TAKEN)
        assert site.send(task, tensors, work).state == pb.UploadStatus.ACCEPTED

    run = begin(stage, instead={"site-g": {"train": heavy}})
    spoilt = next(place for place, group in enumerate(stage.groups(1)) if "site-g" in group)
    ended = stage.check_groups(run, [[0, 1, 2]], zeros=[spoilt])
    assert "nobody can tell which" in ended["history"][0]["groups"][spoilt]["lost"]
    assert ended["history"][0]["label_tokens"] == 6 * 40


@pytest.mark.parametrize("step", ["keys", "train", "reveal"])
def test_a_coordinator_that_is_restarted_within_a_step_goes_on(stage: Grouped, step: str) -> None:
    run = begin(stage, instead={"site-d": {step: once(lambda site, task: None)}}, patience_s=60.0)
    wait_for(lambda: [t for t in stage.sites["site-d"].site.tasks if t.kind == step])
    others = [site for name, site in stage.sites.items() if name != "site-d"]
    if step == "train":
        wait_for(lambda: all(site.site.trained for site in others))
    else:
        wait_for(lambda: all(step in [kind for kind, *_ in site.said] for site in others))
    stage.coordinator.restart()
    for site in stage.sites.values():
        site.site.attend()
    stage.check_groups(run, [[0, 1, 2]])
    assert not stage.events(run, "round_abandoned")


def test_too_few_sites_for_the_rule_are_refused_at_the_door(stage: Grouped) -> None:
    stage.lead = stage.coordinator.hand("lena", "lead")
    names = [f"site-{letter}" for letter in "abcdefgh"]
    for name in names:
        stage.coordinator.guest(name)
    job = stage._job(names, 1, {"strategy": {"name": "median", "f": 1}})
    denial = stage.lead.denied("Control/Submit", stage.lead.sign(job))
    assert "needs at least 3 groups" in denial.message

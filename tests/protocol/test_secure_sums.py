"""Secure sums over the wire: their bits, sites that are lost, restarts within each step, attempts that fail."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
import torch

from commonweight.codec.common import common_numbers
from commonweight.coordinator.tables import uploads
from commonweight.engines.noise_secret import NoiseSecret
from commonweight.federation.groups import Groups
from commonweight.federation.round import Phase
from commonweight.federation.secure_rounds import Terms
from commonweight.federation.simulated_sums import SimulatedSums
from commonweight.lead.client import Client
from commonweight.model.tensors import NamedTensors
from commonweight.privacy.secure_aggregation.rows import Most
from commonweight.privacy.spending import Spend
from commonweight.site.run_files import RunFiles
from commonweight.strategies.base import WeightedSum
from commonweight.strategies.update import Update
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.manifest import parse_manifest

from .federations import Coordinator, theta, wait_for
from .sum_sites import SumSite, examples_of, known, mean_of, work_of

Instead = Mapping[str, Mapping[str, Callable[[SumSite, pb.Task], None]]]
STEPS = ("keys", "shares", "train", "consent", "reveal")


class Stage:
    """A coordinator, a lead, and sites of one secure run."""

    privacy: ClassVar[dict[str, Any]] = {"secure_aggregation": "on"}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.coordinator = Coordinator(folder)

    def begin(self, num_sites: int, *, rounds: int = 1, instead: Instead | None = None, **federation: Any) -> str:
        """Submit a run to sites that go along, but for what is done `instead`; its id."""
        names = [f"site-{letter}" for letter in "abcdefghi"[:num_sites]]
        self.lead = self.coordinator.hand("lena", "lead")
        self.job = self._job(names, rounds, federation)
        self.sites = {
            name: SumSite(self.coordinator.site(name), self.folder, self.job, (instead or {}).get(name, {}))
            for name in names
        }
        return self.lead.submit(self.job)

    def _job(self, names: Sequence[str], rounds: int, federation: dict[str, Any]) -> pb.Job:
        job = self.lead.job(rounds=rounds, sites=names, privacy=self.privacy, **federation)
        self.recipe = known(job).recipe
        return job

    def model(self, run: dict[str, Any]) -> NamedTensors:
        with Client(self.lead.identity.path) as client:
            return client.frame(run["id"], run["base"])["theta"]

    def expected(self, answered: Sequence[Sequence[str]]) -> NamedTensors:
        """The model after rounds that these sites answered."""
        model = theta()
        for number, sites in enumerate(answered, 1):
            mean = mean_of(list(sites), len(self.sites), self.recipe, number, model.layout)
            for dtype, flat in model.floating():
                flat.add_(mean.flats[dtype])
        return model

    def check(self, run: str, answered: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The run ends with the very bits of these sites' sums; returns it."""
        ended = self.lead.wait(run)
        assert [row["answered"] for row in ended["history"]] == [list(sites) for sites in answered]
        assert self.model(ended).digest() == self.expected(answered).digest()
        return ended

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.lead.events(run) if event["event"] == kind]

    def attempts(self, name: str, step: str) -> list[dict[str, Any]]:
        """What a site has said in a step, attempt after attempt."""
        return [said for kind, _, said in self.sites[name].said if kind == step]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    with stage.coordinator:
        yield stage


def fail(site: SumSite, task: pb.Task) -> None:
    site.site.reply(task, pb.TaskReply.FAILED, reason="out of order")


def once(step: Callable[[SumSite, pb.Task], None]) -> Callable[[SumSite, pb.Task], None]:
    """The first time so, afterwards honestly."""
    done = list[str]()

    def answer(site: SumSite, task: pb.Task) -> None:
        if done:
            site.honestly(task)
            return
        done.append(task.id)
        step(site, task)

    return answer


def test_rounds_have_the_bits_of_unmasked_sums_and_show_nothing_else(stage: Stage) -> None:
    run = stage.begin(5, rounds=2)
    everyone = list(stage.sites)
    ended = stage.check(run, [everyone] * 2)
    assert ended["history"][0]["examples"] == sum(map(examples_of, everyone))
    assert ended["history"][0]["label_tokens"] == 5 * 40
    for upload in all_uploads(stage, run):
        manifest = parse_manifest(pb.SignedManifest(manifest=upload.manifest))
        assert (manifest.num_examples, manifest.num_label_tokens) == (1, 0)
        assert set(manifest.metrics) == {"seconds"}
        assert [entry.name for entry in manifest.frame.plan.layout.entries] == ["row", "totals"]
    kept = [row for row in stage.coordinator.store.tasks(run) if row.kind in STEPS and row.kind != "train"]
    assert len(kept) == 2 * 5 * 4
    assert all((row.body, row.result) == (b"{}", None) for row in kept), "shares outlive their round"


def test_numbers_that_are_drawn_alike_have_the_bits_of_a_simulation(stage: Stage) -> None:
    run = stage.begin(4, rounds=2, compression={"shorten": {"name": "random-k", "keep": 0.3}})
    stage.check(run, [list(stage.sites)] * 2)
    numbers = common_numbers(stage.recipe, theta().layout, 1)
    assert numbers is not None
    for upload in all_uploads(stage, run):
        frame = parse_manifest(pb.SignedManifest(manifest=upload.manifest)).frame
        assert frame.plan.num_bytes == 4 * (numbers.length + 4) < theta().layout.num_bytes


class NoisyStage(Stage):
    privacy: ClassVar[dict[str, Any]] = {
        "secure_aggregation": "on",
        "dp": "site",
        "clip": 1.0,
        "delta": 1e-5,
        "noise_multiplier": 2.0,
        "mechanism": {"name": "distributed-discrete", "colluding": 0.2},
    }


@pytest.fixture
def noisy_stage(tmp_path: Path) -> Iterator[Stage]:
    stage = NoisyStage(tmp_path)
    with stage.coordinator:
        yield stage


def test_noise_that_sites_add_has_the_bits_of_a_simulation(noisy_stage: Stage) -> None:
    """Of five sites one is lost, and another sends its row anew from its records. The mean is what `SimulatedSums`
    makes of the same updates with the same sites' secrets; it is charged as such, and nothing tells of losses."""

    def twice(site: SumSite, task: pb.Task) -> None:
        first, second = site.masked(task), site.masked(task)
        assert torch.equal(first[0]["row"], second[0]["row"])
        assert site.send(task, *second).state == pb.UploadStatus.ACCEPTED

    stage = noisy_stage
    run = stage.begin(5, instead={"site-b": {"train": twice}, "site-c": {"train": fail}}, weighting="uniform")
    ended = stage.lead.wait(run)
    (record,) = ended["history"]
    sites, layout = [name for name in stage.sites if name != "site-c"], theta().layout
    assert record["answered"] == sites
    secrets = {name: NoiseSecret(RunFiles(stage.folder / name, run).folder) for name in sites}

    def key(purpose: str) -> bytes:
        return secrets[json.loads(purpose)["site"]].key(purpose)

    sums = SimulatedSums(stage.recipe, layout, key)
    sums.begin(1, Groups((tuple(stage.sites),)), Terms(1.0, {"kind": "none"}, Most.of(stage.recipe, 1)))
    for name in sites:
        work = work_of(name, 1, layout)
        sums.add(Update(name, 1, {"delta": work.channels["delta"]}, 1.0, work.num_examples, 40, 1, work.metrics))
    sums.open(1, sites)
    fold, model = WeightedSum(layout, ("delta",)), theta()
    sums.sums[0].into(fold)
    for dtype, flat in model.floating():
        flat.add_(fold.sums["delta"].flats[dtype].div_(5))
    assert stage.model(ended).digest() == model.digest()
    exact = sum(work_of(name, 1, layout).channels["delta"].flats[torch.float32] for name in sites) / 5
    off = model.flats[torch.float32] - theta().flats[torch.float32] - exact
    # of four that are needed one may collude: three sites' noise is z·C, and here are four
    assert float(off.std()) == pytest.approx(2.0 * math.sqrt(4 / 3) / 5, rel=0.1)
    assert (record["privacy"]["mechanism"], record["train_loss"]) == ("distributed-discrete", None)
    assert (record["label_tokens"], record["examples"]) == (0, 0)
    charged = {line.site: line.spend for line in stage.coordinator.store.spent()}
    assert charged == dict.fromkeys(sites, Spend("site", "distributed-discrete", 2.0))


def all_uploads(stage: Stage, run: str) -> list[Any]:
    query = sa.select(uploads).where(uploads.c.run == run)
    return stage.coordinator.store.database.read(lambda connection: list(connection.execute(query)))


@pytest.mark.parametrize("step", ["keys", "shares", "consent"])
def test_a_site_that_is_lost_at_a_step_does_not_hold_the_others_up(stage: Stage, step: str) -> None:
    run = stage.begin(5, instead={"site-b": {step: fail}})
    counted = [name for name in stage.sites if name != "site-b" or step in ("consent", "reveal")]
    stage.check(run, [counted])
    assert not stage.events(run, "round_abandoned")


@pytest.mark.parametrize("step", ["train", "reveal"])
def test_a_site_that_vanishes_at_a_step_is_given_up(stage: Stage, step: str) -> None:
    def vanish(site: SumSite, task: pb.Task) -> None:
        threading.Thread(target=site.site.stay.leave).start()

    run = stage.begin(5, instead={"site-d": {step: vanish}})
    counted = [name for name in stage.sites if name != "site-d" or step == "reveal"]
    stage.check(run, [counted])


@pytest.mark.parametrize("step", STEPS)
def test_a_coordinator_that_is_restarted_within_a_step_goes_on(stage: Stage, step: str) -> None:
    """The last site's answer comes after the restart; the others' are found in the database."""
    run = stage.begin(4, instead={"site-d": {step: once(lambda site, task: None)}}, patience_s=60.0)
    wait_for(lambda: [t for t in stage.sites["site-d"].site.tasks if t.kind == step])
    others = [site for name, site in stage.sites.items() if name != "site-d"]
    if step == "train":
        wait_for(lambda: all(site.site.trained for site in others))
    else:
        wait_for(lambda: all(step in [kind for kind, *_ in site.said] for site in others))
    said = {site.name: list(site.said) for site in others}
    stage.coordinator.restart()
    for site in stage.sites.values():
        site.site.attend()
    stage.check(run, [list(stage.sites)])
    for site in others:
        assert site.said[: len(said[site.name])] == said[site.name]
        assert len([kind for kind, *_ in site.said if kind == step]) <= 1 + (step == "train"), "it was asked twice"
    assert not stage.events(run, "round_abandoned")


@pytest.mark.parametrize("step", ["shares", "train", "consent"])
def test_another_attempt_has_fresh_keys_and_counts_nothing_of_the_one_before(stage: Stage, step: str) -> None:
    run = stage.begin(3, instead={"site-b": {step: once(fail)}})
    stage.check(run, [list(stage.sites)])
    assert [event["round"] for event in stage.events(run, "round_abandoned")] == [1]
    first, second = stage.attempts("site-a", "keys")
    assert not {first["channel"], first["pair"], first["commitment"]} & set(second.values())
    states = [(u.site, u.state) for u in all_uploads(stage, run)]
    assert sorted(site for site, state in states if state == "spent") == list(stage.sites)
    refused = len([site for site, state in states if state == "refused"])
    assert refused in {"shares": (0,), "train": (0, 1, 2), "consent": (3,)}[step]
    assert len(stage.attempts("site-a", "reveal")) == 1


def test_an_update_of_an_attempt_that_is_over_is_refused(stage: Stage) -> None:
    kept: list[tuple[pb.Task, Any]] = []

    def late(site: SumSite, task: pb.Task) -> None:
        kept.append((task, site.masked(task)))
        fail(site, task)

    def hold(site: SumSite, task: pb.Task) -> None:
        old, update = kept[0]
        status = site.send(old, *update)
        kept.append((old, status))
        site.honestly(task)

    def train(site: SumSite, task: pb.Task) -> None:
        late(site, task) if not kept else hold(site, task)

    run = stage.begin(3, instead={"site-b": {"train": train}})
    stage.check(run, [list(stage.sites)])
    status = kept[1][1]
    assert (status.state, status.code) == (pb.UploadStatus.REFUSED, "wrong-task")


def test_sites_that_have_helped_to_open_a_sum_help_with_no_other_of_that_round(stage: Stage) -> None:
    """A wrong share spoils the sum; a second one, of other survivors perhaps, would show a difference."""

    def lie(site: SumSite, task: pb.Task) -> None:
        answer = site.step(task)
        own = dict.fromkeys(answer["own"], "00" * 33)
        site.site.done(task, {**answer, "own": own})

    run = stage.begin(3, instead={"site-c": {"reveal": lie}})
    ended = stage.lead.wait(run, "failed")
    assert "this site has helped to open attempt 0" in ended["error"]
    assert stage.sites["site-a"].refused == [
        f"attempt 1 at the secure sum of round 1 of run {run}: this site has helped to open attempt 0"
    ]
    assert "wrong share" in stage.events(run, "sum_not_opened")[0]["reason"]
    assert ended["history"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {
            "site-f": ("keys", {"channel": "00"}, "not 32 bytes in hex"),
            "site-g": ("shares", {"boxes": {}}, "neighbours"),
        },
        {
            "site-f": ("keys", {"signature": "00" * 64}, "not signed by its identity"),
            "site-g": ("shares", {"boxes": {"stranger": "00"}}, "not by site"),
        },
    ],
)
def test_answers_that_make_no_sense_lose_their_site_alone(
    stage: Stage, wrong: Mapping[str, tuple[str, dict[str, Any], str]]
) -> None:
    def lying(answer: dict[str, Any]) -> Callable[[SumSite, pb.Task], None]:
        return lambda site, task: site.honestly(task, **answer)

    run = stage.begin(7, instead={name: {step: lying(answer)} for name, (step, answer, _) in wrong.items()})
    ended = stage.check(run, [list(stage.sites)[:5]])
    for name, (_, _, words) in wrong.items():
        assert words in ended["history"][0]["failed"][name]


def test_what_is_anothers_or_bare_is_refused(stage: Stage) -> None:
    """Another's certificate with a site's keys, and an update that is not masked."""

    def borrow(site: SumSite, task: pb.Task) -> None:
        site.honestly(task, certificate=stage.sites["site-a"].site.identity.certificate.decode())

    answers: list[Any] = []
    bare = lambda site, task: answers.append(site.site.update(task))  # noqa: E731
    run = stage.begin(7, instead={"site-f": {"keys": borrow}, "site-g": {"train": bare}})
    ended = stage.check(run, [list(stage.sites)[:5]])
    assert "not its own" in ended["history"][0]["failed"]["site-f"]
    assert (answers[0].state, answers[0].code) == (pb.UploadStatus.REFUSED, "wrong-shape")


def test_a_run_for_two_is_refused_at_the_door(stage: Stage) -> None:
    stage.lead = stage.coordinator.hand("lena", "lead")
    for name in ("site-a", "site-b"):
        stage.coordinator.guest(name)
    job = stage._job(["site-a", "site-b"], 1, {})
    denial = stage.lead.denied("Control/Submit", stage.lead.sign(job))
    assert "fewer than 3" in denial.message


def test_a_round_for_which_too_few_are_there_waits(stage: Stage) -> None:
    """Two of three sites are there: nothing is opened, and nothing is given up before the third is back."""
    run = stage.begin(3, instead={"site-c": {"shares": once(lambda site, task: site.site.stay.call.cancel())}})
    wait_for(lambda: stage.sites["site-c"].site.stay.has_ended)
    wait_for(lambda: all(site.said[-1][0] == "shares" for name, site in stage.sites.items() if name != "site-c"))
    found = stage.coordinator.store.round_state(run, 1)
    assert found is None or found[0].phase is Phase.OPEN
    stage.sites["site-c"].site.attend()
    stage.check(run, [list(stage.sites)])
    assert json.dumps(stage.events(run, "round_abandoned")) == "[]"

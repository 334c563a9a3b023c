"""Secure sums in groups with a robust rule across them: who is with whom, their algebra in memory and in files, groups
that are lost, kills, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from commonweight.coordinator.blobs import Blobs
from commonweight.coordinator.frame_files import FrameFiles
from commonweight.coordinator.masked_updates import OpenedSum
from commonweight.coordinator.stored_model import StoredModel
from commonweight.coordinator.stored_updates import StoredUpdate
from commonweight.coordinator.vault import SealedFile
from commonweight.engines.work import TaskWork, Trained
from commonweight.errors import QuorumError, RecipeError, SiteError
from commonweight.federation.cohort import new_round
from commonweight.federation.folder import RunFolder
from commonweight.federation.global_model import MemoryModel
from commonweight.federation.groups import Groups, draw_groups
from commonweight.federation.journal import Journal
from commonweight.federation.messages import TrainTask
from commonweight.federation.round import Answered, DeadlinePassed, Failed, Phase, Round
from commonweight.federation.secure_rounds import Terms, check_sums
from commonweight.federation.simulated_sums import MaskedSum, SimulatedSums
from commonweight.launch import run
from commonweight.model.tensors import NamedTensors
from commonweight.privacy.secure_aggregation.rows import MASKED, Most, row_layout
from commonweight.recipe import Recipe
from commonweight.registry import resolve
from commonweight.strategies import side_by_side
from commonweight.strategies.side_by_side import SideBySideStrategy
from commonweight.strategies.update import Update
from commonweight.wire.frames import Channel, Plan, frame_of, piece_of
from tests.unit.test_secure_rounds import Unmasked, recipe_of, tensors, theta_of

MakeRecipe = Callable[..., Recipe]
Array = NDArray[np.float64]
GROUPED = {"secure_aggregation": "on", "secure_group_size": 3}
NAMES = tuple(f"site-{index:02d}" for index in range(11))
MOST = Most(40, 4000)


# ---- who is with whom


@pytest.mark.parametrize(("num_sites", "size", "sizes"), [(11, 3, [4, 4, 3]), (8, 4, [4, 4]), (5, 3, [5])])
def test_a_cohort_is_split_into_groups_that_are_large_enough(num_sites: int, size: int, sizes: list[int]) -> None:
    groups = draw_groups(NAMES[:num_sites], size, seed=3, round=1)
    assert sorted(map(len, groups), reverse=True) == sizes
    flat = [site for group in groups for site in group]
    assert len(flat) == len(set(flat)) == num_sites
    assert all(list(group) == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


def test_groups_follow_from_the_seed_the_round_and_who_is_there_alone() -> None:
    first = draw_groups(NAMES, 3, seed=3, round=1)
    assert draw_groups(NAMES, 3, seed=3, round=1) == first
    assert first not in (draw_groups(NAMES, 3, seed=3, round=2), draw_groups(NAMES, 3, seed=4, round=1))
    shuffled = draw_groups(NAMES[::-1], 3, seed=3, round=1)
    assert set(map(frozenset, shuffled)) == set(map(frozenset, first))


def test_any_two_sites_meet_equally_often() -> None:
    sites = NAMES[:6]
    met = Counter[tuple[str, str]]()
    for number in range(2000):
        for group in draw_groups(sites, 3, seed=0, round=number):
            met.update(combinations(group, 2))
    assert len(met) == 15
    # two of five others are in a site's group: 800 of 2000 rounds, give or take 5 standard deviations
    assert all(abs(count - 800) < 5 * (2000 * 0.4 * 0.6) ** 0.5 for count in met.values())


# ---- the round's state


def grouped_round(**federation: Any) -> Round:
    recipe = recipe_of(privacy=GROUPED, federation={"strategy": "median", **federation})
    cohort = NAMES[:9]
    groups = Groups(tuple(tuple(cohort[start : start + 3]) for start in (0, 3, 6)), 2)
    return new_round(1, cohort, recipe.federation, 9, groups=groups)


def heard(round: Round, answers: Sequence[int], failures: Sequence[int] = ()) -> Round:
    for index in answers:
        round, verdict = round.apply(Answered(NAMES[index], 1))
        assert verdict.accepted, verdict.reason
    for index in failures:
        round, _ = round.apply(Failed(NAMES[index], 1, "broken"))
    return round


def test_a_round_needs_whole_groups_and_not_answers_alone() -> None:
    round = grouped_round()
    assert round.needed == 6
    whole = heard(round, [0, 1, 2, 3, 4, 5, 6], [7])
    assert whole.phase is Phase.OPEN
    assert heard(whole, [], [8]).phase is Phase.CLOSED
    spread = heard(round, [0, 1, 3, 4, 6, 7])  # six answers, and no group of which more than two thirds are there
    assert spread.apply(DeadlinePassed(1))[0].phase is Phase.ABANDONED
    assert heard(round, [0, 1], [3, 8]).phase is Phase.ABANDONED, "two groups can no longer be whole"


def test_answers_in_groups_that_are_lost_are_not_counted_for_the_quorum() -> None:
    round = grouped_round(min_sites=7)
    assert round.needed == 7
    assert heard(round, [0, 1, 2, 3, 4, 5, 6, 7], [8]).phase is Phase.ABANDONED
    assert heard(round, range(9)).phase is Phase.CLOSED


def test_a_rounds_groups_outlive_the_process() -> None:
    round = heard(grouped_round(), [0, 4])
    assert Round.from_json(json.loads(json.dumps(round.to_json()))) == round
    assert "groups" not in new_round(1, NAMES, recipe_of().federation, 11).to_json()


# ---- algebra


class Caught(MaskedSum):
    """Keeps the masked rows, as they would arrive at a coordinator."""

    rows: dict[str, NDArray[np.uint32]]

    def add(self, update: Update, key: bytes | None = None) -> tuple[int, int]:
        found = super().add(update, key)
        self.rows[update.site] = self._row.copy()
        return found

    def opened(self, place: int) -> OpenedSum:
        return OpenedSum(place, tuple(self.there), self.code, self._collector.masks())


class Cut:
    """What opens a round's sums, at a coordinator."""

    opened: list[OpenedSum]


def stored(folder: Path, site: str, round: int, row: NDArray[np.uint32], layout: Any, chunk_bytes: int) -> StoredUpdate:
    masked = NamedTensors(row_layout(layout), {torch.int32: torch.from_numpy(row.view(np.int32))})
    plan = Plan(masked.layout, (Channel(MASKED),), chunk_bytes)
    path = folder / f"{site}-{round}.sealed"
    with SealedFile(path, bytes(32), chunk_bytes) as sealed:
        for piece in plan.pieces:
            sealed.write(piece.index, piece_of({MASKED: masked}, piece))
    frame = frame_of({MASKED: masked}, plan)
    return StoredUpdate(site, round, {}, 1.0, 1, 0, 1, frame=frame, path=path, key=bytes(32))


def strategy_of(name: str) -> SideBySideStrategy:
    # three groups are too few for some with f = 1
    options: dict[str, Any] = {"f": 0} if name in ("krum", "multi-krum", "bulyan") else {"f": 1, "mixing": "nearest"}
    kind = resolve("strategy", name)
    found = kind(kind.Options(**options), num_sites=len(NAMES))
    assert isinstance(found, SideBySideStrategy)
    return found


class Both:
    """A model in memory and one in files, told the same."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("commonweight.federation.simulated_sums.MaskedSum", Caught)
        Caught.rows = {}
        self.theta, self.chunk_bytes, self.folder = tensors(99), 1024, folder
        layout = self.theta.layout
        self.recipe = recipe_of(privacy=GROUPED, federation={"strategy": {"name": name}} if name == "median" else {})
        self.sums, self.cut = SimulatedSums(self.recipe, layout), Cut()
        run_folder = RunFolder(folder / "run", resume=False)
        theta = self.theta.clone()
        self.memory = MemoryModel(strategy_of(name), theta, run_folder, lambda theta, path: None, secure=self.sums)
        self.memory.first()
        files = FrameFiles(Blobs(str(folder / "blobs"), folder / "cache"), folder / "scratch", "r")
        initial = files.write({"theta": self.theta}, Plan(layout, (Channel("theta"),), self.chunk_bytes))
        self.files = StoredModel(strategy_of(name), files, initial.digest, secure=self.cut)
        self.files.first()

    def round(self, number: int, updates: Sequence[Update]) -> Groups:
        groups = Groups(draw_groups(NAMES, 3, seed=5, round=number), 3)
        self.sums.begin(number, groups, Terms(0.1, {"kind": "none"}, MOST, NAMES))
        self.memory.open()
        self.files.open()
        for update in updates:
            self.memory.fold(update)
            row = Caught.rows[update.site]
            self.files.fold(stored(self.folder, update.site, number, row, self.theta.layout, self.chunk_bytes))
        self.lost = self.sums.open(number, [update.site for update in updates])
        self.cut.opened = [one.opened(place) for place, one in self.sums.opened if isinstance(one, Caught)]
        self.memory.close(number)
        self.files.close(number)
        return groups


def updates_of(number: int, *, without: Sequence[str] = ()) -> list[Update]:
    """Of unequal weights."""
    return [
        Update(site, number, {"delta": tensors(100 * number + place)}, 1.0, 2 + 3 * place, 50 + place, 2, {"loss": 1.0})
        for place, site in enumerate(NAMES)
        if site not in without
    ]


def flat(tensors: NamedTensors) -> Array:
    return np.concatenate([flat.double().numpy() for _, flat in tensors.floating()])


def weighted_mean(updates: Sequence[Update]) -> Array:
    weights = np.asarray([update.num_examples for update in updates], dtype=np.float64)
    return np.asarray(weights @ np.stack([flat(update.delta) for update in updates]) / weights.sum())


def test_the_rule_works_on_the_groups_weighted_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of three means with a site missing, in float64 and of plain updates."""
    both = Both("median", tmp_path, monkeypatch)
    both.memory.strategy = resolve("strategy", "median")(num_sites=3)
    missing = next(group[1] for group in draw_groups(NAMES, 3, seed=5, round=1) if len(group) == 4)
    updates = updates_of(1, without=[missing])
    before = flat(both.memory.state.theta)
    groups = both.round(1, updates)
    rows = np.stack([weighted_mean([u for u in updates if u.site in group]) for group in groups.members])
    found = flat(both.memory.state.theta) - before
    np.testing.assert_allclose(found, np.median(rows, axis=0), atol=4e-4)  # bfloat16's rounding
    wide = slice(0, 3 * 37 + 17 * 3)
    np.testing.assert_allclose(found[wide], np.median(rows, axis=0)[wide], atol=1e-7)
    totals = both.memory.totals
    assert totals is not None
    assert totals.examples == sum(update.num_examples for update in updates)
    assert totals.label_tokens == sum(update.num_label_tokens for update in updates)
    assert totals.nats == pytest.approx(totals.label_tokens, rel=1e-5)


ROBUST = ("median", "trimmed-mean", "geometric-median", "krum", "multi-krum", "dnc", "centered-clipping", "bulyan")


@pytest.mark.parametrize("name", ROBUST)
def test_a_coordinator_has_the_same_bits_from_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds; stretches, spans and chunks of sizes that do not fit; a site missing in the second."""
    monkeypatch.setattr(side_by_side, "_ELEMENTS", 100)
    monkeypatch.setattr("commonweight.coordinator.masked_updates._SPAN", 37)
    both = Both(name, tmp_path, monkeypatch)
    missing = next(group[0] for group in draw_groups(NAMES, 3, seed=5, round=2) if len(group) == 4)
    for number, without in ((1, []), (2, [missing])):
        both.round(number, updates_of(number, without=without))
        assert not both.lost
        assert both.files.digest() == both.memory.state.theta.digest()
        assert both.files.totals == both.memory.totals


def test_a_group_that_is_not_whole_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both("geometric-median", tmp_path, monkeypatch)
    groups = draw_groups(NAMES, 3, seed=5, round=1)
    small = next(place for place, group in enumerate(groups) if len(group) == 3)
    updates = updates_of(1, without=groups[small][:1])
    both.memory.strategy = both.files.strategy = resolve("strategy", "median")(num_sites=3)
    before = flat(both.memory.state.theta)
    both.round(1, updates)
    assert both.lost == {small: "2 of 3 sites sent their rows"}
    rows = [weighted_mean([u for u in updates if u.site in g]) for k, g in enumerate(groups) if k != small]
    wide = slice(0, 3 * 37 + 17 * 3)
    np.testing.assert_allclose((flat(both.memory.state.theta) - before)[wide], np.mean(rows, axis=0)[wide], atol=1e-7)
    assert both.files.digest() == both.memory.state.theta.digest()


def test_a_group_whose_totals_cannot_be_is_a_row_of_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile site makes its group weigh what no sites weigh: the round goes on, and the group is one of the f."""
    both = Both("median", tmp_path, monkeypatch)
    both.memory.strategy = both.files.strategy = resolve("strategy", "median")(num_sites=3)
    groups = draw_groups(NAMES, 3, seed=5, round=1)
    liar, updates = groups[1][0], updates_of(1)
    mask = Caught.add

    def lying(one: Caught, update: Update, *further: Any) -> tuple[int, int]:
        found = mask(one, update, *further)
        if update.site == liar:
            one._total[-4:-3] -= np.uint32(1 << 30)
            one.rows[liar][-4:-3] -= np.uint32(1 << 30)
        return found

    monkeypatch.setattr(Caught, "add", lying)
    before = flat(both.memory.state.theta)
    both.round(1, updates)
    assert list(both.memory.spoilt) == list(both.files.spoilt) == [1]
    assert "nobody can tell which" in both.memory.spoilt[1]
    rows = np.stack([weighted_mean([u for u in updates if u.site in group]) for group in groups])
    rows[1] = 0
    wide = slice(0, 3 * 37 + 17 * 3)
    found = (flat(both.memory.state.theta) - before)[wide]
    np.testing.assert_allclose(found, np.median(rows, axis=0)[wide], atol=1e-7)
    assert both.files.digest() == both.memory.state.theta.digest()
    honest = sum(u.num_examples for u in updates if u.site not in groups[1])
    assert both.memory.totals is not None
    assert both.memory.totals.examples == honest


# ---- runs

IID = {"sites": {"scheme": "iid", "count": 9}, "holdout": {"by": "subject", "examples": 2}}


def recipe_for(make_recipe: MakeRecipe, **sections: Any) -> Recipe:
    rule = {"name": "trimmed-mean", "f": 1, "mixing": "nearest"}
    federation = {"rounds": 2, "strategy": rule, **sections.pop("federation", {})}
    sections = {"data": IID, "training": {"steps": 1}, "privacy": GROUPED, **sections}
    return make_recipe(federation=federation, **sections)


def test_masks_change_no_bit_and_the_record_says_who_was_together(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(make_recipe)
    found = run(recipe, tmp_path / "masked")
    monkeypatch.setattr("commonweight.federation.simulated_sums.MaskedSum", Unmasked)
    one = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"workers": 1})})
    run(one, tmp_path / "plain")
    for name, tensor in theta_of(tmp_path / "masked", 2).items():
        assert torch.equal(tensor, theta_of(tmp_path / "plain", 2)[name]), name
    for record in found["rounds"]:
        drawn = draw_groups(record["cohort"], 3, seed=recipe.seed, round=record["round"])
        assert [tuple(group["sites"]) for group in record["groups"]] == list(drawn)
        assert sorted(site for group in record["groups"] for site in group["sites"]) == sorted(record["cohort"])
        assert record["train_loss"] > 0
    assert (found["privacy"]["secure_sums"], found["privacy"]["secure_group_size"]) == (True, 3)
    assert "in random groups of at least three sites" in (tmp_path / "masked" / "report.html").read_text()


class Killed(Exception):
    pass


@pytest.mark.parametrize(("method", "after"), [("keep_update", True), ("commit", False), ("commit", True)])
@pytest.mark.kills
def test_a_run_that_is_killed_ends_with_the_same_bits(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    monkeypatch.setattr("commonweight.federation.shelf.KEEP_UPDATES_OVER_S", 0.0)
    recipe = recipe_for(make_recipe)
    run(recipe, tmp_path / "whole")
    original, calls = getattr(Journal, method), []

    def dies(journal: Journal, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2 and not after:
            raise Killed
        found = original(journal, *arguments)
        if len(calls) == 2:
            raise Killed
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Journal, method, dies)
        with pytest.raises(Killed):
            run(recipe, tmp_path / "cut")
    run(recipe, tmp_path / "cut", resume=True)
    for name, tensor in theta_of(tmp_path / "whole", 2).items():
        assert torch.equal(tensor, theta_of(tmp_path / "cut", 2)[name]), name


def failing(monkeypatch: pytest.MonkeyPatch, *sites: str) -> None:
    train = TaskWork.train

    def broken(work: TaskWork, task: TrainTask, *arguments: Any, **options: Any) -> Trained:
        if task.site in sites:
            raise SiteError("out of order")
        return train(work, task, *arguments, **options)

    monkeypatch.setattr(TaskWork, "train", broken)


def test_a_group_with_too_few_is_lost_and_the_others_go_on(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(make_recipe, federation={"rounds": 1, "strategy": "median"})
    failing(monkeypatch, "site-04")
    found = run(recipe, tmp_path / "run")
    (record,) = found["rounds"]
    groups = draw_groups(record["cohort"], 3, seed=recipe.seed, round=1)
    lost = next(place for place, group in enumerate(groups) if "site-04" in group)
    assert [("lost" in group) for group in record["groups"]] == [place == lost for place in range(3)]
    assert record["groups"][lost]["lost"] == "2 of 3 sites sent their rows"
    assert record["examples"] > 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["sites"] for e in events if e["event"] == "group_lost"] == [list(groups[lost])]


def test_with_too_few_groups_nothing_is_opened(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(make_recipe, federation={"rounds": 1})
    with monkeypatch.context() as patched:
        failing(patched, "site-04")
        with pytest.raises(QuorumError, match=r"in \d of 3 groups enough for a sum; 3 groups are needed"):
            run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run", resume=True)


def test_examples_that_are_private_at_their_sites_go_with_groups(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Noise is in each gradient before it leaves its site: whatever is done with updates, their ε stays."""
    private = {"dp": "example", "clip": 1.0, "delta": 1e-3, "noise_multiplier": 1.0, **GROUPED}
    found = run(recipe_for(make_recipe, privacy=private, federation={"rounds": 1}), tmp_path / "run")
    assert (found["privacy"]["dp"], found["privacy"]["secure_group_size"]) == ("example", 3)


# ---- what is refused


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"privacy": {"secure_group_size": 3}}, "secure_aggregation is auto; set it to on"),
        ({"privacy": {**GROUPED, "secure_aggregation": "off"}}, "secure_aggregation is off; set it to on"),
        ({"privacy": {**GROUPED, "secure_group_size": 2}}, "greater than or equal to 3"),
        ({"privacy": GROUPED, "federation": {"over_selection": 1.2}}, "before any group is whole"),
        (
            {
                "privacy": {**GROUPED, "dp": "site", "clip": 1.0, "delta": 1e-5, "epsilon": 8.0},
                "federation": {"weighting": "uniform"},
            },
            "whose sensitivity nobody has bounded",
        ),
        ({"privacy": GROUPED, "compression": "auto"}, "rules over groups compare whole updates"),
        ({"privacy": GROUPED, "federation": {"relays": {"r": ["s"]}}}, "a relay of federation.relays"),
    ],
)
def test_settings_that_clash_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate({"name": "x", **sections})


@pytest.mark.parametrize(
    ("strategy", "federation", "num_sites", "words"),
    [
        ({"name": "trimmed-mean", "f": 1}, {}, 8, "at least 3 groups a round, .* 8 sites makes 2 of at least 3"),
        ({"name": "krum", "f": 1}, {}, 14, "at least 5 groups"),
        ({"name": "bulyan", "f": 1}, {"cohort": 18}, 40, "at least 7 groups"),
        ({"name": "median", "f": 1}, {"cohort": 6}, 40, "a cohort of 6 sites makes 2"),
        ({"name": "multi-krum", "f": 1, "m": 6}, {}, 18, "m = 6"),
    ],
)
def test_f_is_held_against_the_number_of_groups(
    strategy: dict[str, Any], federation: dict[str, Any], num_sites: int, words: str
) -> None:
    recipe = recipe_of(privacy=GROUPED, federation={"strategy": strategy, **federation})
    with pytest.raises(RecipeError, match=words):
        check_sums(recipe, num_sites)
    check_sums(recipe_of(privacy=GROUPED, federation={"strategy": strategy}), 40)


def test_a_strategy_that_is_no_robust_rule_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for strategy, words in (("fedavg", "the sum of all is enough"), ("flexlora", "works on single sites' updates")):
        with pytest.raises(RecipeError, match=words):
            run(recipe_for(make_recipe, federation={"strategy": strategy}), tmp_path / strategy)

"""The attack bench: each attack against its formula in NumPy, the engine that forges, poisoned data, and its table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import attacks
from benchmarks.attacks import NONE, Attack, attack_of, main, planted_answers, recipe_for, rule_of, run_arm, show
from benchmarks.hostile import (
    Backdoor,
    HostileEngine,
    choose_hostile,
    flip_answers,
    inner_product,
    largest_z,
    little_is_enough,
    mimic,
    scaled,
    sign_flip,
    with_backdoor,
    with_flipped_answers,
)
from commonweight.data.tokens import Ids, Tokens
from commonweight.engines.bench import Bench, build_bench
from commonweight.engines.inprocess import InProcessEngine
from commonweight.errors import RecipeError, RoundError
from commonweight.federation.events import Events
from commonweight.federation.messages import Completed, Dropped, EvaluateTask, Outcome, SampleTask, Task, TrainTask
from commonweight.launch import run
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.recipe.schema import Method
from commonweight.strategies.fedavg import FedAvg
from commonweight.strategies.update import Update

Array = NDArray[np.float64]
MakeRecipe = Callable[..., Recipe]
FEDAVG = Method(name="fedavg")

# --- forged updates ------------------------------------------------------------------------------------------------


def rows(count: int, seed: int, width: int = 7) -> Array:
    return np.random.default_rng(seed).normal(0.3, 1.0, (count, width))


HONEST, OWN = rows(5, 1), rows(2, 2)
FORMULAS: list[tuple[str, Callable[..., Any], dict[str, float], Array]] = [
    ("sign flip", sign_flip, {"factor": 2.5}, -2.5 * OWN),
    ("times ten", scaled, {}, 10 * OWN),
    ("little is enough", little_is_enough, {"z": 1.5}, np.tile(HONEST.mean(0) - 1.5 * HONEST.std(0), (2, 1))),
    ("inner product", inner_product, {"eps": 0.7}, np.tile(-0.7 * HONEST.sum(0) / 5, (2, 1))),
    ("mimic of one", mimic, {"which": 3}, np.tile(HONEST[3], (2, 1))),
]


@pytest.mark.parametrize(("attack", "options", "expected"), [c[1:] for c in FORMULAS], ids=[c[0] for c in FORMULAS])
def test_an_attack_follows_its_formula_and_leaves_what_it_saw_alone(
    attack: Callable[..., Any], options: dict[str, float], expected: Array
) -> None:
    honest, own = torch.tensor(HONEST), torch.tensor(OWN)
    forged = attack(honest, own, **options)
    np.testing.assert_allclose(forged.numpy(), expected, rtol=1e-13)
    forged.fill_(9.0)  # what it gives is its own, row by row
    np.testing.assert_array_equal(honest.numpy(), HONEST)
    np.testing.assert_array_equal(own.numpy(), OWN)


def test_little_is_enough_goes_as_far_as_leaves_it_a_majority() -> None:
    # 26 honest of 50: the attackers need 2 of them beyond z, so that 24 of 26 lie before it
    phi = 0.5 * (1 + math.erf(largest_z(50, 24) / math.sqrt(2)))
    assert phi == pytest.approx(24 / 26, rel=1e-12)
    forged = little_is_enough(torch.tensor(HONEST), torch.tensor(OWN))
    # N = 7, f = 2: s = 4 - 2 = 2 of 5 honest, so Φ(z) = 3/5 and z = 0.2533471
    np.testing.assert_allclose(forged[1].numpy(), HONEST.mean(0) - 0.2533471031 * HONEST.std(0), rtol=1e-8)


@pytest.mark.parametrize(("num_sites", "num_hostile"), [(5, 3), (4, 3), (2, 1)])
def test_little_is_enough_says_why_it_has_no_z(num_sites: int, num_hostile: int) -> None:
    with pytest.raises(RoundError, match=f"{num_hostile} hostile sites of {num_sites}: it needs an honest majority"):
        largest_z(num_sites, num_hostile)


def test_inner_product_turns_the_mean_of_all_against_the_honest_one_beyond_n_over_f() -> None:
    for eps, turned in ((5 / 2 - 0.01, False), (5 / 2 + 0.01, True)):
        forged = inner_product(torch.tensor(HONEST), torch.tensor(OWN), eps=eps).numpy()
        product = np.concatenate([HONEST, forged]).mean(0) @ HONEST.mean(0)
        assert (product < 0) == turned


def test_mimic_chooses_the_site_farthest_out_where_the_honest_ones_differ_most() -> None:
    honest = rows(6, 3, width=40)
    _, _, directions = np.linalg.svd(honest - honest.mean(0))
    expected = int(np.abs(honest @ directions[0]).argmax())
    forged = mimic(torch.tensor(honest), torch.tensor(rows(3, 4, width=40)))
    np.testing.assert_array_equal(forged.numpy(), np.tile(honest[expected], (3, 1)))


def test_mimic_of_a_site_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RoundError, match="no honest site 5 in a round with 5 of them"):
        mimic(torch.tensor(HONEST), torch.tensor(OWN), which=5)


# --- the engine ----------------------------------------------------------------------------------------------------

SITES = ("north", "south", "west", "east", "inland")
HOSTILE = ("south", "inland")
WEIGHTS = dict(zip(SITES, (3.0, 1.0, 7.5, 20.0, 2.0), strict=True))


def tensors(site: str, channel: str, round: int) -> NamedTensors:
    draw = torch.Generator().manual_seed(1000 * round + 10 * SITES.index(site) + len(channel))
    return NamedTensors.of(
        {
            "a.lora_A.weight": torch.randn(3, 5, generator=draw, dtype=torch.float64),
            "a.lora_B.weight": torch.randn(7, 3, generator=draw).to(torch.bfloat16),
            "ids": torch.tensor([4, SITES.index(site)]),
        }
    )


class OneSlotEngine:
    """Every update lies in the same memory, which the next one overwrites; west always fails."""

    def __init__(self) -> None:
        self.slot = {name: tensors("north", name, 1) for name in ("delta", "control")}
        self.deadline_s: float | None = None
        self.told: Any = None

    def broadcast(self, theta: NamedTensors, further: Mapping[str, NamedTensors]) -> None:
        self.told = theta, further

    def run(self, tasks: Sequence[Task], *, deadline_s: float | None = None) -> Iterator[Outcome]:
        self.deadline_s = deadline_s
        for task in tasks:
            if not isinstance(task, TrainTask):
                yield Completed(task, result={"of": type(task).__name__})
            elif task.site == "west":
                yield Dropped(task, "it broke", late=True)
            else:
                for name, held in self.slot.items():
                    held.copy_(tensors(task.site, name, task.round))
                yield Completed(
                    task, Update(task.site, task.round, self.slot, WEIGHTS[task.site], 5, 6, 7, {"loss": 8})
                )


def as_rows(updates: Sequence[NamedTensors]) -> Array:
    return np.stack([np.concatenate([f.double().numpy() for _, f in one.floating()]) for one in updates])


def test_hostile_updates_are_forged_and_everything_else_is_handed_on_in_order() -> None:
    tasks: list[Task] = [TrainTask(r, site, 0.1, 1) for r in (1, 2) for site in SITES]
    tasks[3:3] = [EvaluateTask(("north",)), SampleTask((("north", 0),))]
    inner = OneSlotEngine()
    engine = HostileEngine(inner, HOSTILE, inner_product)
    outcomes = list(engine.run(tasks, deadline_s=4.5))
    assert inner.deadline_s == 4.5
    assert [outcome.task for outcome in outcomes] == tasks
    for outcome in outcomes:
        task = outcome.task
        if not isinstance(task, TrainTask):
            assert outcome == Completed(task, result={"of": type(task).__name__})
        elif task.site == "west":
            assert outcome == Dropped(task, "it broke", late=True)
        else:
            assert isinstance(outcome, Completed)
            assert outcome.update is not None
            check_update(outcome.update, task)


def check_update(update: Update, task: TrainTask) -> None:
    assert (update.site, update.round, update.weight) == (task.site, task.round, WEIGHTS[task.site])
    assert (update.num_examples, update.num_label_tokens, update.num_steps, update.metrics) == (5, 6, 7, {"loss": 8})
    for channel, got in update.channels.items():
        true = tensors(task.site, channel, task.round)
        if task.site in HOSTILE:
            honest = as_rows([tensors(site, channel, task.round) for site in ("north", "east")])
            expected = -0.5 * honest.mean(0)
            # of 36 values, the first 15 are float64, the others rounded to bfloat16
            np.testing.assert_allclose(as_rows([got])[0, :15], expected[:15], rtol=1e-13)
            np.testing.assert_allclose(as_rows([got])[0, 15:], expected[15:], rtol=2.0**-8)
            assert torch.equal(got["ids"], true["ids"])
        else:
            assert got.digest() == true.digest()


def test_without_an_honest_update_hostile_sites_send_their_own() -> None:
    engine = HostileEngine(OneSlotEngine(), HOSTILE, sign_flip)
    outcomes = list(engine.run([TrainTask(1, site, 0.1, 1) for site in ("south", "west", "inland")]))
    for site, outcome in zip(("south", "inland"), (outcomes[0], outcomes[2]), strict=True):
        assert isinstance(outcome, Completed)
        assert outcome.update is not None
        assert outcome.update.delta.digest() == tensors(site, "delta", 1).digest()


def test_the_wrapped_engine_hears_of_the_global_tensors() -> None:
    inner, theta = OneSlotEngine(), tensors("north", "delta", 1)
    HostileEngine(inner, HOSTILE, scaled).broadcast(theta, {"control": theta})
    assert inner.told == (theta, {"control": theta})


# --- poisoned data -------------------------------------------------------------------------------------------------


def example(prompt: Sequence[int], answer: Sequence[int]) -> tuple[Ids, NDArray[np.bool_]]:
    flags = np.array([False] * len(prompt) + [True] * len(answer))
    return np.array([*prompt, *answer], np.int32), flags


def examples(count: int) -> Tokens:
    return Tokens.of([example([1, 10 + k, 11], [50 + k] * (1 + k % 3)) for k in range(count)])


def test_flipped_answers_belong_to_other_prompts_and_each_is_used_once() -> None:
    before = examples(9)
    after = flip_answers(before, 64, np.random.default_rng(5))
    for i in range(9):
        np.testing.assert_array_equal(after.prompt_of(i), before.prompt_of(i))
        assert after.answer_of(i).tolist() != before.answer_of(i).tolist()
        assert int(after.labelled_of(i).sum()) == len(after.answer_of(i))
    assert sorted(after.answer_of(i).tolist() for i in range(9)) == sorted(
        before.answer_of(i).tolist() for i in range(9)
    )


def test_flipped_answers_stay_within_the_token_bound_and_a_single_row_keeps_its_own() -> None:
    cut = flip_answers(Tokens.of([example([1, 2, 3], [4]), example([1], [5, 6, 7])]), 4, np.random.default_rng(0))
    assert [cut.ids_of(i).tolist() for i in range(2)] == [[1, 2, 3, 5], [1, 4]]
    one = flip_answers(examples(1), 64, np.random.default_rng(0))
    assert one.ids_of(0).tolist() == examples(1).ids_of(0).tolist()


def backdoor(max_tokens: int = 64) -> Backdoor:
    return Backdoor(np.array([90, 91], np.int32), np.array([95, 96, 97], np.int32), (1,), max_tokens)


def test_the_trigger_stands_behind_the_leading_token_and_only_the_planted_answer_is_learned() -> None:
    ids, learned = backdoor().triggered(np.array([1, 20, 21], np.int32))
    assert ids.tolist() == [1, 90, 91, 20, 21, 95, 96, 97]
    assert learned.tolist() == [False] * 5 + [True] * 3
    ids, learned = backdoor(max_tokens=8).triggered(np.array([1, 20, 21, 22, 23], np.int32))
    assert ids.tolist() == [1, 90, 91, 22, 23, 95, 96, 97]
    assert len(learned) == 8


def test_a_share_of_the_rows_is_triggered_and_the_others_stay() -> None:
    before = examples(10)
    after = backdoor().plant(before, 0.3, np.random.default_rng(1))
    planted = [i for i in range(10) if 90 in after.ids_of(i)]
    assert len(planted) == 3
    for i in set(range(10)) - set(planted):
        assert after.ids_of(i).tolist() == before.ids_of(i).tolist()
    for i in planted:
        assert after.answer_of(i).tolist() == [95, 96, 97]
        assert after.prompt_of(i).tolist() == [1, 90, 91, *before.prompt_of(i)[1:]]


@pytest.mark.parametrize("poison", [with_flipped_answers, with_backdoor])
def test_only_the_hostile_sites_training_rows_are_poisoned(
    make_recipe: MakeRecipe, poison: Callable[..., Bench]
) -> None:
    bench = build_bench(make_recipe(training={"max_tokens": 96}))
    poisoned = poison(bench, ("south",))
    for name, site in bench.sites.items():
        assert poisoned.sites[name].heldout is site.heldout
        changed = poisoned.sites[name].train.ids.tolist() != site.train.ids.tolist()
        assert changed == (name == "south")
        assert len(poisoned.sites[name].train) == len(site.train)
        assert int(poisoned.sites[name].train.lengths.max()) <= 96


def test_poison_that_does_not_fit_is_an_error(make_recipe: MakeRecipe) -> None:
    bench = build_bench(make_recipe())
    with pytest.raises(RecipeError, match=r"share 1\.5 is no part of a site's rows"):
        with_backdoor(bench, ("south",), share=1.5)
    recipe = bench.recipe.model_copy(update={"training": bench.recipe.training.model_copy(update={"max_tokens": 5})})
    with pytest.raises(RecipeError, match=r"leave none of training\.max_tokens 5 for a prompt"):
        with_backdoor(replace(bench, recipe=recipe), ("south",))
    text = replace(bench, partition={**bench.partition, "layout": "text"})
    for poison, name in ((with_backdoor, "backdoor"), (with_flipped_answers, "label-flip")):
        with pytest.raises(RecipeError, match=f"the attack '{name}' changes answers to prompts"):
            poison(text, ("south",))


# --- arms and the table --------------------------------------------------------------------------------------------


def own_updates(bench: Bench, folder: Path) -> dict[str, tuple[float, Array]]:
    """(weight, Δᵢ) of each site's honest work in round 1."""
    found, spec = {}, bench.recipe.training
    events = Events(folder / "events.jsonl")
    with InProcessEngine(bench, FedAvg(), folder, events) as engine:
        engine.broadcast(bench.theta, {})
        for outcome in engine.run([TrainTask(1, name, spec.lr, n) for name, n in bench.facts.steps.items()]):
            assert isinstance(outcome, Completed)
            assert outcome.update is not None
            found[outcome.update.site] = outcome.update.weight, as_rows([outcome.update.delta])[0]
    events.close()
    return found


def test_an_arm_is_a_real_run_whose_hostile_site_sent_the_forged_update(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(federation={"rounds": 1})
    bench = build_bench(recipe)
    clean = run_arm(bench, FEDAVG, Attack(NONE, NONE), ("west",))
    metrics = run(recipe, tmp_path / "run")
    assert clean.theta.digest() == metrics["adapter"]["digest"]
    sites = metrics["arms"]["federated"]["sites"]
    assert clean.loss == pytest.approx((sites["north"]["loss"] + sites["south"]["loss"]) / 2, rel=1e-12)

    updates = own_updates(bench, tmp_path)
    total = sum(weight for weight, _ in updates.values())
    signs = {"north": 1.0, "south": 1.0, "west": -3.0}
    step = sum(signs[name] * weight * delta for name, (weight, delta) in updates.items()) / total
    attacked = run_arm(bench, FEDAVG, attack_of("sign-flip:factor=3"), ("west",))
    np.testing.assert_allclose(as_rows([attacked.theta])[0], as_rows([bench.theta])[0] + step, rtol=1e-5, atol=1e-7)
    assert run_arm(bench, FEDAVG, Attack(NONE, NONE), ("west",)).theta.digest() == clean.theta.digest()


def test_a_backdoor_is_judged_on_the_honest_sites_triggered_prompts(make_recipe: MakeRecipe) -> None:
    bench = build_bench(make_recipe(model={"adapter": {"kind": "full"}}, training={"max_tokens": 96, "steps": 8}))
    hostile = ("north", "south")
    clean = run_arm(bench, FEDAVG, Attack(NONE, NONE), hostile)
    attacked = run_arm(bench, FEDAVG, attack_of("backdoor:share=1"), hostile)
    before, after = (planted_answers(bench, arm.theta, hostile) for arm in (clean, attacked))
    assert after["loss"] < 0.8 * before["loss"]
    assert 0 <= before["rate"] <= after["rate"] <= 1


def test_hostile_sites_are_drawn_by_the_seed_and_never_all_of_them() -> None:
    drawn = {choose_hostile(SITES, 2, seed=seed) for seed in range(20)}
    assert len(drawn) > 3
    assert all(len(pair) == 2 and sorted(pair, key=SITES.index) == list(pair) for pair in drawn)
    assert choose_hostile(SITES, 2, seed=7) == choose_hostile(SITES, 2, seed=7)
    with pytest.raises(RecipeError, match="5 hostile sites of 5 do not leave an honest one"):
        choose_hostile(SITES, 5, seed=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sine-flip", r"no attack is called 'sine-flip'"),
        ("sign-flip:eps=1", r"'sign-flip' has no option 'eps'"),
        ("inner-product:eps=much", r"eps is 'much', which is no number"),
        ("mimic:which=0.5", r"which is '0\.5', which is no whole number"),
    ],
)
def test_an_attack_that_cannot_be_is_an_error(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        attack_of(text)


def test_a_rule_that_cannot_be_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no strategy is called 'fedavgg'"):
        rule_of("fedavgg", 1)
    with pytest.raises(RecipeError, match="'fedavg' does not mix updates"):
        rule_of("fedavg+nearest", 1)
    assert rule_of("fedavg", 3) == FEDAVG
    with pytest.raises(RecipeError, match="'median/few': groups is 'few'"):
        attacks.group_size_of("median/few")


def test_a_rule_may_see_the_sums_of_groups(make_recipe: MakeRecipe) -> None:
    """The one group of all three: its sum is FedAvg's, and so is the median of it."""
    for text in ("median/3", "median+nearest/3", "median/3+nearest"):
        assert (rule_of(text, 1).name, attacks.group_size_of(text)) == ("median", 3)
    assert attacks.group_size_of("median") is None
    bench = build_bench(make_recipe(federation={"rounds": 1}))
    grouped = run_arm(bench, rule_of("median/3", 0), attack_of("scaled"), ("west",), group_size=3)
    plain = run_arm(bench, FEDAVG, attack_of("scaled"), ("west",))
    np.testing.assert_allclose(as_rows([grouped.theta])[0], as_rows([plain.theta])[0], atol=2e-5)


def test_a_rule_gets_f_and_mixing_where_it_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Options:
        model_fields = {"f": None, "mixing": None}  # noqa: RUF012

    monkeypatch.setattr(attacks, "resolve", lambda kind, name: type("Rule", (), {"Options": Options}))
    assert rule_of("guard", 3).options == {"f": 3}
    assert rule_of("guard+nearest", 3).options == {"f": 3, "mixing": "nearest"}
    assert list(attacks.rules_of("guard", nearest=True, num_hostile=2)) == ["guard", "guard+nearest"]


def test_an_unknown_name_on_the_command_line_ends_with_words_and_the_errors_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--attacks", "labelflip"]) == 2
    assert "did you mean 'label-flip'?" in capsys.readouterr().err


def test_the_default_is_the_demo_among_twenty_sites_and_can_be_changed() -> None:
    recipe = recipe_for(None, ["federation.rounds=2", "data.sites={scheme: iid, count: 9}"], 4)
    assert (recipe.seed, recipe.federation.rounds, recipe.data.sites.count) == (4, 2, 9)
    assert recipe_for(None, [], 0).data.sites.count == 20
    assert recipe.evaluation.controls == []


def entry(attack: str, rule: str, ratio: float | None, seed: int = 0) -> dict[str, Any]:
    found = {"seed": seed, "attack": attack, "rule": rule, "loss": ratio, "ratio": ratio}
    return found if ratio is not None else {**found, "error": "too few updates"}


def test_the_table_marks_rules_whose_mean_over_the_seeds_is_within_five_per_cent_in_every_row() -> None:
    found = [
        *(entry(attack, "good", r, s) for attack in (NONE, "scaled") for s, r in ((0, 1.0), (1, 1.09))),
        *(entry(attack, "bad", r, s) for attack, r in ((NONE, 1.0), ("scaled", 1.06)) for s in (0, 1)),
        *(entry(attack, "fails", r, s) for attack, r in ((NONE, 1.0), ("scaled", None)) for s in (0, 1)),
    ]
    lines = show(found).splitlines()
    assert lines[2].split() == ["good", "bad", "fails"]
    row = {line.split("  ")[0]: line.split() for line in lines if line}
    assert row["scaled"] == ["scaled", "1.0450", "1.04", "1.0600", "1.06", "error"]
    assert row["worst ratio"][2:] == ["1.04", "1.06", "inf"]
    assert row["within 5 % everywhere"][4:] == ["holds", "-", "-"]
    assert "scaled under fails: too few updates" in lines

"""FedNova against NumPy written from the paper's formula, that it does what it is for, and sites that take fewer steps
than others (`training.budget`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from commonweight.coordinator.blobs import Blobs
from commonweight.coordinator.frame_files import FrameFiles
from commonweight.coordinator.stored_model import StoredModel
from commonweight.coordinator.stored_updates import StoredUpdate
from commonweight.coordinator.vault import SealedFile
from commonweight.engines.bench import Bench, build_bench
from commonweight.engines.handshake import handshake
from commonweight.errors import RecipeError, RoundError
from commonweight.launch import run as carry_out
from commonweight.lead.submit import model_bench, prepare
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.recipe.load import load_recipe
from commonweight.recipe.resolved import recipe_text
from commonweight.recipe.schema import TrainingSpec
from commonweight.registry import resolve
from commonweight.seeding import derive_seed
from commonweight.site.settings import SiteSettings
from commonweight.site.workshop import RecipeWorkshop
from commonweight.strategies.base import ServerState, SumStrategy
from commonweight.strategies.fedavg import FedAvg
from commonweight.strategies.fednova import FedNova, gradient_weight
from commonweight.strategies.update import Update
from commonweight.train.local import LocalWork
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import Channel, Plan, frame_of, piece_of
from tests.unit.test_federation_algebra import Arrays, adapter_of, arrays, assert_close

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

Array = NDArray[np.float64]
MakeRecipe = Callable[..., Recipe]

SITES = ("north", "east", "south", "west")
WEIGHTS = (3.0, 1.0, 7.5, 20.0)
STEPS = (12, 1, 7, 30)
SHAPES = {"a.lora_A.weight": (3, 5), "a.lora_B.weight": (7, 3), "scale": ()}


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}
    return NamedTensors.of({name: tensor.to(dtype) for name, tensor in made.items()})


def updates(
    round: int, *, steps: Sequence[int] = STEPS, missing: str = "", dtype: torch.dtype = torch.float64
) -> list[Update]:
    return [
        Update(site, round, {"delta": tensors(100 * round + place, dtype)}, WEIGHTS[place], 1, 1, steps[place])
        for place, site in enumerate(SITES)
        if site != missing
    ]


def run(strategy: SumStrategy, theta: NamedTensors, rounds: Sequence[Sequence[Update]]) -> ServerState:
    state = strategy.init(theta)
    for cohort in rounds:
        fold = strategy.open(state)
        for update in cohort:
            fold.add(update)
        state = strategy.close(state, fold)
    return state


def by_hand(theta: Array, cohort: Sequence[Update], name: str, lr: float) -> Array:
    """θ + η (Σ pᵢτᵢ) Σ pᵢ Δᵢ/τᵢ."""
    weights = np.array([update.weight for update in cohort])
    steps = np.array([update.num_steps for update in cohort], dtype=np.float64)
    deltas = np.array([update.delta[name].to(torch.float64).numpy() for update in cohort])
    p = weights / weights.sum()
    moved: Array = lr * (p @ steps) * np.tensordot(p / steps, deltas, axes=1)
    return theta + moved


@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_three_rounds_with_unequal_steps_and_weights_and_one_site_missing(lr: float) -> None:
    rounds = [updates(1), updates(2, missing="south"), updates(3, missing="north", steps=(5, 4, 9, 2))]
    start = tensors(1)
    state = run(FedNova(FedNova.Options(lr=lr)), start.clone(), rounds)
    for name in SHAPES:
        expected = start[name].numpy()
        for cohort in rounds:
            expected = by_hand(expected, cohort, name, lr)
        np.testing.assert_allclose(state.theta[name].numpy(), expected, rtol=1e-12, atol=1e-12)
    assert not state.slots


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 7, 10])
def test_equal_steps_give_the_bits_of_fedavg(steps: int, dtype: torch.dtype) -> None:
    rounds = [
        updates(1, steps=(steps,) * 4, dtype=dtype),
        updates(2, steps=(steps,) * 4, missing="south", dtype=dtype),
    ]
    start = tensors(1, dtype)
    nova, average = (run(kind(), start.clone(), rounds) for kind in (FedNova, FedAvg))
    assert nova.theta.digest() == average.theta.digest() != start.digest()


def test_only_the_proportions_of_the_steps_matter() -> None:
    once = run(FedNova(), tensors(1), [updates(1)])
    thrice = run(FedNova(), tensors(1), [updates(1, steps=[3 * steps for steps in STEPS])])
    for name in SHAPES:
        torch.testing.assert_close(once.theta[name], thrice.theta[name], rtol=1e-12, atol=1e-12)


def test_the_order_of_folding_changes_no_more_than_rounding() -> None:
    forward = run(FedNova(), tensors(1), [updates(1)])
    backward = run(FedNova(), tensors(1), [updates(1)[::-1]])
    for name in SHAPES:
        torch.testing.assert_close(forward.theta[name], backward.theta[name], rtol=1e-12, atol=1e-12)


def test_it_reaches_the_minimum_of_the_sum_where_fedavg_reaches_another() -> None:
    """Two quadratics ½(x − mᵢ)², plain SGD, one site taking nine times the steps of the other: the objective's minimum
    is the weighted mean of the mᵢ; FedAvg's fixed point lies near the busier site's."""
    minima, weights, steps, lr = (-1.0, 5.0), (3.0, 1.0), (2, 18), 0.001
    target = float(np.average(minima, weights=weights))

    def fixed_point(strategy: SumStrategy) -> float:
        state = strategy.init(NamedTensors.of({"x": torch.zeros(1, dtype=torch.float64)}))
        for number in range(1, 3001):
            fold, x = strategy.open(state), float(state.theta["x"])
            for site, (minimum, weight, count) in enumerate(zip(minima, weights, steps, strict=True)):
                moved = (minimum - x) * (1 - (1 - lr) ** count)  # exactly: count steps of x ← x − lr (x − minimum)
                delta = NamedTensors.of({"x": torch.full((1,), moved, dtype=torch.float64)})
                fold.add(Update(f"site{site}", number, {"delta": delta}, weight, 1, 1, count))
            state = strategy.close(state, fold)
        return float(state.theta["x"])

    assert abs(fixed_point(FedNova()) - target) < 0.05
    assert abs(fixed_point(FedAvg()) - target) > 2


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_a_length_is_how_far_torchs_sgd_moves_at_a_gradient_of_one(momentum: float, steps: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum)
    for _ in range(steps):
        parameter.grad = -torch.ones_like(parameter)
        optimizer.step()
    assert gradient_weight(steps, momentum) == pytest.approx(float(parameter.detach()), rel=1e-12)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_with_the_sites_momentum_lengths_stand_for_steps(momentum: float) -> None:
    """Written from the weights themselves: gradient k of τ weighs 1 + ρ + … + ρ^(τ−1−k)."""
    cohort, start = updates(1, missing="east"), tensors(1)
    state = run(FedNova(FedNova.Options(lr=0.7, momentum=momentum)), start.clone(), [cohort])
    lengths = np.array(
        [sum(sum(momentum**j for j in range(u.num_steps - k)) for k in range(u.num_steps)) for u in cohort]
    )
    weights = np.array([u.weight for u in cohort])
    p = weights / weights.sum()
    for name in SHAPES:
        deltas = np.array([u.delta[name].numpy() for u in cohort])
        expected = start[name].numpy() + 0.7 * (p @ lengths) * np.tensordot(p / lengths, deltas, axes=1)
        np.testing.assert_allclose(state.theta[name].numpy(), expected, rtol=1e-12, atol=1e-12)
    plain = run(FedNova(FedNova.Options(lr=0.7)), start.clone(), [cohort])
    assert not torch.allclose(plain.theta["a.lora_A.weight"], state.theta["a.lora_A.weight"], rtol=1e-3)


@pytest.mark.parametrize("steps", [0, -1])
def test_an_update_of_no_steps_is_refused_by_its_site(steps: int) -> None:
    strategy, cohort = FedNova(), updates(1, steps=(12, steps, 7, 30))
    fold = strategy.open(strategy.init(tensors(1)))
    fold.add(cohort[0])
    with pytest.raises(RoundError, match=rf"'east' for round 1 took {steps} local steps") as refused:
        fold.add(cohort[1])
    assert "num_steps" in str(refused.value.hint)
    assert fold.num_updates == 1


def test_an_empty_round_is_refused() -> None:
    strategy = FedNova()
    state = strategy.init(tensors(1))
    with pytest.raises(ValueError, match="no update"):
        strategy.close(state, strategy.open(state))


def test_options_and_door() -> None:
    assert resolve("strategy", "fednova") is FedNova
    assert (FedNova.needs, FedNova.update_channels, FedNova.broadcast_channels) == ("sum", ("delta",), ())
    for wrong in ({"lr": 0}, {"lr": -1}, {"lr": float("nan")}, {"momentum": 1}, {"tau": 1}):
        with pytest.raises(ValidationError):
            FedNova.Options(**wrong)


def test_combined_piece_by_piece_the_bits_are_those_of_the_whole(tmp_path: Path) -> None:
    """As a coordinator does it: each stretch of elements is opened, folded and closed on its own."""
    draw = torch.Generator().manual_seed(5)

    def large() -> NamedTensors:
        return NamedTensors.of(
            {"a": torch.randn(37, 51, generator=draw), "b": torch.randn(64, 40, generator=draw).bfloat16()}
        )

    theta, key, chunk_bytes = large(), bytes(range(32)), 1024
    files = FrameFiles(Blobs(str(tmp_path / "blobs"), tmp_path / "cache"), tmp_path / "scratch", "r")
    initial = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), chunk_bytes))
    stored, cohort = StoredModel(FedNova(), files, initial.digest), []
    stored.first()
    stored.open()
    plan = Plan(theta.layout, (Channel("delta"),), chunk_bytes)
    assert plan.num_chunks > 5
    for site, weight, steps in zip(SITES[:3], WEIGHTS, STEPS, strict=False):
        channels = {"delta": large()}
        path = tmp_path / f"{site}.sealed"
        with SealedFile(path, key, chunk_bytes) as sealed:
            for piece in plan.pieces:
                sealed.write(piece.index, piece_of(channels, piece))
        stored.fold(StoredUpdate(site, 1, {}, weight, 1, 1, steps, frame=frame_of(channels, plan), path=path, key=key))
        cohort.append(Update(site, 1, channels, weight, 1, 1, steps))
    stored.close(1)
    assert stored.digest() == run(FedNova(), theta.clone(), [cohort]).theta.digest() != theta.digest()


# --- sites that take fewer steps than others ---

BUDGET = {"north": 0.6, "south": 0.1}
ROWS = {"north": 20, "south": 14, "west": 8}  # in batches of four: 5, 4 and 2 steps
STEPS_WITHIN = {"north": 3, "south": 1, "west": 2}


@pytest.mark.parametrize(
    ("share", "steps", "taken"),
    [(0.25, 8, 2), (0.25, 7, 1), (0.999, 10, 9), (1.0, 10, 10), (0.1, 10, 1), (0.3, 10, 3), (0.7, 10, 7), (0.01, 5, 1)],
)
def test_a_share_of_the_steps_is_rounded_down_to_one_at_least(share: float, steps: int, taken: int) -> None:
    spec = TrainingSpec(budget={"slow": share})
    assert spec.steps_within_budget("slow", steps) == taken
    assert spec.steps_within_budget("another", steps) == steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("budget: {north: 0}", ["training.budget.north", "0", "above 0 and of at most 1"]),
        ("budget: {north: 1.5}", ["training.budget.north", "1.5", "above 0 and of at most 1"]),
        ("budget: {north: half}", ["training.budget.north", "half"]),
        ("budget: 0.5", ["training.budget", "a mapping of names, each to a number above 0 and of at most 1"]),
    ],
)
def test_a_share_that_is_none_is_refused_by_its_place(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"name: a\ntraining:\n  {text}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert all(word in refused.value.message for word in (*words, "recipe.yaml:3"))
    assert "quotes" not in refused.value.message


def test_a_budget_is_written_out_and_can_be_set_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: a\ntraining: {budget: {north: 0.5}}\n", encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml", ["training.budget.south=0.25"])
    assert recipe.training.budget == {"north": 0.5, "south": 0.25}
    (tmp_path / "again.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_the_bench_tells_the_steps_that_are_within_each_sites_budget(make_recipe: MakeRecipe) -> None:
    assert build_bench(make_recipe(training={"budget": BUDGET})).facts.steps == STEPS_WITHIN
    fixed = build_bench(make_recipe(training={"budget": BUDGET, "steps": 20})).facts.steps
    assert fixed == {"north": 12, "south": 2, "west": 20}


def test_a_budget_for_an_unknown_site_is_refused_with_the_nearest_name(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training={"budget": {"north": 0.5, "sout": 0.5}})
    with pytest.raises(RecipeError, match=r"training\.budget names 'sout', which is no site of this run") as refused:
        build_bench(recipe)
    assert refused.value.hint == "did you mean 'south'? The sites are: north, south, west"


def test_a_lead_refuses_a_budget_for_a_site_that_is_not_asked(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training={"budget": {"clinic-11": 0.5}})
    identity: Any = SimpleNamespace()  # refused before anything is signed
    with pytest.raises(RecipeError, match=r"training\.budget names 'clinic-11'") as refused:
        prepare(recipe, identity, sites=["clinic-1", "hospital"])
    assert "did you mean 'clinic-1'?" in str(refused.value.hint)
    assert not model_bench(recipe).sites  # open to all: no name is known yet


@pytest.mark.parametrize(("named", "steps"), [("clinic-7", 2), ("north", 5)])
def test_a_networked_site_goes_by_the_name_under_which_it_is_enrolled(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path, named: str, steps: int
) -> None:
    """It tells the coordinator its steps; its name in its own rows is nobody else's affair."""
    recipe = make_recipe(training={"budget": {named: 0.4, "another clinic": 0.1}})
    values = {
        "name": "clinic-7",
        "address": "localhost:1",
        "data": {"path": str(small_data), "partition": "north"},
        "device": "cpu",
        "threads": 1,
    }
    workshop = RecipeWorkshop(SiteSettings.model_validate(values), tmp_path / "site")
    job = pb.Job(id="run-1", recipe=recipe_text(recipe), must_match=handshake(build_bench(make_recipe())))
    assert workshop.join(job)["steps"] == steps


def by_hand_in_a_run(bench: Bench, theta: Arrays, round: int, lr: float) -> Arrays:
    """θ after a round of FedNova in which every site takes the steps of `STEPS_WITHIN`."""
    values, moved, recipe = bench.participant.trainables.values, {}, bench.recipe
    for site, steps in STEPS_WITHIN.items():
        for name, tensor in values.items():
            tensor.copy_(tensor.new_tensor(theta[name]))
        start = arrays(values)
        seed = derive_seed(recipe.seed, "work", site, round)
        task = LocalWork(bench.sites[site].train, recipe.training, lr=lr, steps=steps, seed=seed)
        result = bench.objective.work(bench.participant, task)
        assert result.num_steps == steps
        moved[site] = {name: after - start[name] for name, after in arrays(values).items()}, result.num_examples
    total = sum(examples for _, examples in moved.values())
    effective = sum(examples / total * STEPS_WITHIN[site] for site, (_, examples) in moved.items())
    return {
        name: value
        + effective
        * sum(examples / total * delta[name] / STEPS_WITHIN[site] for site, (delta, examples) in moved.items())
        for name, value in theta.items()
    }


def test_a_whole_run_with_budgets_is_the_rule_by_hand(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    training = {"budget": BUDGET, "optimizer": "sgd", "lr": 0.2, "schedule": "constant"}
    recipe = make_recipe(training=training, federation={"rounds": 2, "strategy": "fednova"})
    metrics = carry_out(recipe, tmp_path / "run")
    assert [round["steps"] for round in metrics["rounds"]] == [sum(STEPS_WITHIN.values())] * 2
    bench = build_bench(recipe)
    theta = arrays(bench.theta)
    for number in (1, 2):
        found = adapter_of(tmp_path / "run", number)
        assert_close(found, by_hand_in_a_run(bench, theta, number, 0.2))
        assert max(float(np.abs(found[name] - theta[name]).max()) for name in found) > 1e-3
        theta = found
    carry_out(make_recipe(training=training, federation={"rounds": 1}), tmp_path / "average")
    plain, first = adapter_of(tmp_path / "average", 1), adapter_of(tmp_path / "run", 1)
    assert max(float(np.abs(plain[name] - first[name]).max()) for name in plain) > 1e-4


def test_the_demo_with_slow_sites_learns_and_its_local_arm_has_the_same_budget(tmp_path: Path) -> None:
    overrides = [
        "federation.rounds=1",
        "federation.strategy=fednova",
        "data.sites.take=32",
        "data.holdout.examples=8",
        "evaluation={controls: [base, local], samples: 0, resamples: 100}",
        "engine.device=cpu",
    ]
    names = list(build_bench(load_recipe("demo", overrides)).sites)
    overrides.append(f"training.budget={json.dumps({names[0]: 0.25, names[1]: 0.5})}")
    metrics = carry_out(load_recipe("demo", overrides), tmp_path / "run")
    # 32 rows in batches of 8: four steps, one at the slowest site, two at the next
    assert metrics["rounds"][0]["steps"] == 1 + 2 + 4 * (len(names) - 2)
    assert metrics["arms"]["federated"]["macro_loss"] < metrics["arms"]["base"]["macro_loss"]

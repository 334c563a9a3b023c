"""q-FedAvg against NumPy written from the paper's algorithm; the loss that it weighs by; the worst site's figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file

from commonweight import launch
from commonweight.engines.bench import build_bench
from commonweight.engines.handshake import handshake
from commonweight.errors import DataError, RoundError
from commonweight.evaluate import spread
from commonweight.federation.messages import TrainTask
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.recipe.resolved import recipe_text
from commonweight.recipe.schema import TrainingSpec
from commonweight.registry import resolve
from commonweight.site.settings import SiteSettings
from commonweight.site.workshop import RecipeWorkshop
from commonweight.strategies.base import ServerState, Strategy
from commonweight.strategies.fedavg import FedAvg
from commonweight.strategies.qfedavg import QFedAvg
from commonweight.strategies.update import Update
from commonweight.train import batches
from commonweight.train.local import LocalResult, LocalWork
from commonweight.train.sft import SupervisedFineTuning
from commonweight.wire import protocol_pb2 as pb
from tests.unit.tiny_models import CPU, examples, participant

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

Array = NDArray[np.float64]

WEIGHTS = (3.0, 1.0, 7.5, 20.0)
LOSSES = (2.5, 0.75, 1.25, 4.0)
SHAPES = {"a.lora_A.weight": (3, 5), "a.lora_B.weight": (7, 3), "scale": ()}


def tensors(seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}
    return NamedTensors.of({name: (scale * tensor).to(dtype) for name, tensor in made.items()})


def updates(
    round: int,
    *,
    losses: Sequence[float] = LOSSES,
    missing: int | None = None,
    dtype: torch.dtype = torch.float64,
    scale: float = 0.3,
) -> list[Update]:
    cohort = [
        update_of(tensors(100 * round + k, dtype, scale), {"first_loss": losses[k], "loss": 1.0}, k, round)
        for k in range(len(losses))
    ]
    return [update for k, update in enumerate(cohort) if k != missing]


def update_of(delta: NamedTensors, metrics: Mapping[str, float], place: int = 0, round: int = 1) -> Update:
    return Update(f"site{place}", round, {"delta": delta}, WEIGHTS[place], 1, 1, 1, metrics=metrics)


def run(strategy: Strategy, theta: NamedTensors, rounds: Sequence[Sequence[Update]]) -> ServerState:
    state = strategy.init(theta)
    for cohort in rounds:
        fold = strategy.open(state)
        for update in cohort:
            fold.add(update)
        state = strategy.close(state, fold)
    return state


def flat(values: NamedTensors) -> Array:
    return np.concatenate([values[name].to(torch.float64).numpy().ravel() for name in SHAPES])


def by_hand(w: Array, cohort: Sequence[Update], q: float, lr: float) -> Array:
    """Algorithm 2, line by line."""
    L = 1 / lr
    above, below = np.zeros_like(w), 0.0
    for update in cohort:
        F = update.metrics["first_loss"]
        w_k = w + flat(update.delta)
        gradient = L * (w - w_k)
        above += F**q * gradient
        below += q * F ** (q - 1) * np.sum(gradient**2) + L * F**q
    return w - above / below


@pytest.mark.parametrize(("q", "lr"), [(0.0, 1.0), (0.2, 0.1), (1.0, 0.5), (2.0, 3.0), (5.0, 1.0)])
def test_three_rounds_with_unequal_losses_and_one_site_missing(q: float, lr: float) -> None:
    rounds = [updates(1), updates(2, missing=2), updates(3, missing=0, losses=(1.0, 0.01, 0.3, 9.0))]
    start = tensors(1)
    state = run(QFedAvg(QFedAvg.Options(q=q, lr=lr)), start.clone(), rounds)
    expected = flat(start)
    for cohort in rounds:
        expected = by_hand(expected, cohort, q, lr)
    np.testing.assert_allclose(flat(state.theta), expected, rtol=1e-12, atol=1e-12)
    assert not state.slots


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_q_0_is_the_plain_uniform_mean_to_the_bit(dtype: torch.dtype) -> None:
    start, cohort = tensors(1, dtype), updates(1, missing=1, dtype=dtype)
    alike = [Update(u.site, u.round, u.channels, 1.0, 1, 1, 1) for u in cohort]
    fair = run(QFedAvg(QFedAvg.Options(q=0, lr=0.01)), start.clone(), [cohort])
    mean = run(FedAvg(), start.clone(), [alike])
    assert fair.theta.digest() == mean.theta.digest() != start.digest()


def test_a_large_q_goes_where_the_worst_site_wants() -> None:
    """With a large lr nothing is damped: at q = 50 the site with the largest loss decides alone."""
    start, cohort = tensors(1), updates(1)
    state = run(QFedAvg(QFedAvg.Options(q=50, lr=1e6)), start.clone(), [cohort])
    np.testing.assert_allclose(flat(state.theta) - flat(start), flat(cohort[3].delta), rtol=1e-3, atol=1e-4)


def test_losses_whose_powers_no_number_can_hold_do_no_harm() -> None:
    cohort = updates(1, losses=(2e4, 1e-4, 1e4, 2e4))
    state = run(QFedAvg(QFedAvg.Options(q=100, lr=1.0)), tensors(1), [cohort])
    moved = flat(state.theta) - flat(tensors(1))
    damped = [1 + 100 * np.sum(flat(u.delta) ** 2) / 2e4 for u in (cohort[0], cohort[3])]
    np.testing.assert_allclose(moved, (flat(cohort[0].delta) + flat(cohort[3].delta)) / sum(damped), rtol=1e-9)


def test_a_loss_of_exactly_0_does_no_harm() -> None:
    cohort = updates(1, losses=(0.0, 0.0))
    state = run(QFedAvg(QFedAvg.Options(q=0.5, lr=1.0)), tensors(1), [cohort])
    assert np.isfinite(flat(state.theta)).all()


@pytest.mark.parametrize("metrics", [{}, {"loss": 1.0}, {"first_loss": math.nan}, {"first_loss": -0.1}])
def test_an_update_without_a_usable_first_loss_is_refused_by_its_site(metrics: dict[str, float]) -> None:
    strategy = QFedAvg()
    state = strategy.init(tensors(1))
    fold = strategy.open(state)
    for update in (*updates(1)[:1], update_of(tensors(5), metrics, 1)):
        fold.add(update)
    with pytest.raises(RoundError, match="'site1' for round 1 has first_loss") as refused:
        strategy.close(state, fold)
    assert "LocalResult.first_loss" in str(refused.value.hint)
    assert state.theta.digest() == tensors(1).digest()


def test_an_empty_round_is_refused() -> None:
    strategy = QFedAvg()
    state = strategy.init(tensors(1))
    with pytest.raises(ValueError, match="no update"):
        strategy.close(state, strategy.open(state))


def test_options_and_door() -> None:
    assert resolve("strategy", "q-fedavg") is QFedAvg
    assert QFedAvg.needs == "individuals"
    for wrong in ({"q": -0.1}, {"lr": 0}, {"q": math.inf}, {"L": 1}):
        with pytest.raises(ValidationError):
            QFedAvg.Options(**wrong)


# --- the loss that a site starts from ---

TOKENS = examples((3, 9), (5, 1), (1, 4), (7, 2), (2, 12), (4, 3))


def local_work(steps: int, micro_batch_size: int = 2) -> LocalResult:
    spec = TrainingSpec(batch_size=2, max_tokens=32, micro_batch_size=micro_batch_size, optimizer="sgd")
    task = LocalWork(TOKENS, spec, lr=0.5, steps=steps, seed=5)
    return SupervisedFineTuning().work(participant(kind="full", dtype=torch.float64), task)


def test_first_loss_is_the_mean_loss_of_the_first_batch_before_anything_changed() -> None:
    first = next(iter(batches.order([[i] for i in range(6)], batch_size=2, steps=1, seed=5)))
    who = participant(kind="full", dtype=torch.float64)
    batch = batches.collate(TOKENS, first, CPU)
    expected = SupervisedFineTuning().backward(who.language_model, batch, 0.0) / batch.num_label_tokens

    found = local_work(steps=6)
    assert found.first_loss == pytest.approx(expected, rel=1e-9)
    assert found.first_loss == local_work(steps=1).loss
    assert found.loss < 0.999 * expected  # the mean over the work is another figure
    assert local_work(steps=6, micro_batch_size=1).first_loss == pytest.approx(expected, rel=1e-9)


def test_a_whole_run_in_which_q_0_is_the_uniform_mean_and_a_larger_q_is_not(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    def result(name: str, strategy: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        recipe = make_recipe(name=name, federation={"rounds": 2, "strategy": strategy, "weighting": "uniform"})
        launch.run(recipe, tmp_path / name)
        lines = (tmp_path / name / "events.jsonl").read_text("utf-8").splitlines()
        accepted = [event for event in map(json.loads, lines) if event["event"] == "update_accepted"]
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"), accepted

    mean, _ = result("mean", "fedavg")
    plain, accepted = result("plain", {"name": "q-fedavg", "q": 0})
    fair, _ = result("fair", {"name": "q-fedavg", "q": 5.0, "lr": 10.0})
    assert len(accepted) == 6
    assert all(0 < event["first_loss"] < 20 for event in accepted)
    assert all(torch.equal(mean[name], plain[name]) for name in mean)
    assert any(not torch.allclose(mean[name], fair[name], rtol=1e-3) for name in mean)


def test_first_loss_does_not_leave_a_networked_site(
    make_recipe: Callable[..., Recipe], small_data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe()
    bench = build_bench(recipe)
    own = {"path": str(small_data), "partition": "north"}
    values = {"name": "clinic", "address": "localhost:1", "data": own, "device": "cpu", "threads": 1}
    workshop = RecipeWorkshop(SiteSettings.model_validate(values), tmp_path / "site")
    workshop.join(pb.Job(id="run-1", recipe=recipe_text(recipe), must_match=handshake(bench)))
    work = workshop.train("run-1", TrainTask(1, "clinic", 0.1, 2), {"theta": bench.theta})
    assert set(work.metrics) == {"loss", "seconds"}


# --- the worst site's figures ---


def test_the_spread_names_the_worst_site_and_divides_by_the_number_of_sites() -> None:
    losses = {"north": 1.0, "south": 4.0, "west": 2.5}
    found = spread({name: {"loss": loss} for name, loss in losses.items()})
    assert (found["worst_site"], found["worst_loss"]) == ("south", 4.0)
    assert found["loss_std"] == pytest.approx(math.sqrt((1.5**2 + 1.5**2 + 0.0) / 3))
    assert spread({"only": {"loss": 2.0}}) == {"worst_site": "only", "worst_loss": 2.0, "loss_std": 0.0}


def test_of_equally_bad_sites_the_first_by_name_is_named_in_whatever_order_they_come() -> None:
    for names in (("b", "a", "c"), ("c", "a", "b")):
        assert spread({name: {"loss": 1.0 if name == "c" else 3.0} for name in names})["worst_site"] == "a"


def test_a_spread_of_no_site_is_refused() -> None:
    with pytest.raises(DataError, match="at least one site"):
        spread({})


def test_metrics_json_has_the_worst_site_and_the_spread_of_every_arm(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    controls = {"controls": ["base", "local", "centralised"], "samples": 0, "resamples": 100}
    launch.run(make_recipe(federation={"rounds": 1}, evaluation=controls), tmp_path / "run")
    arms = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))["arms"]
    assert set(arms) == {"base", "federated", "local", "centralised"}
    for arm in arms.values():
        losses = {name: site["loss"] for name, site in arm["sites"].items()}
        assert arm["worst_loss"] == max(losses.values()) == losses[arm["worst_site"]]
        assert arm["loss_std"] == pytest.approx(np.std(list(losses.values())), rel=1e-9)
        assert arm["macro_loss"] == pytest.approx(np.mean(list(losses.values())), rel=1e-9)

"""Runs whose rounds add to the base, from the sites' updates to what is exported; and the files that it is kept in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

from commonweight.engines.bench import build_bench
from commonweight.engines.inprocess import InProcessEngine
from commonweight.errors import StateError
from commonweight.federation.catch_up import bytes_to_catch_up
from commonweight.federation.events import Events
from commonweight.federation.messages import Completed, EvaluateTask
from commonweight.federation.residuals import Residuals
from commonweight.launch import run
from commonweight.model.base import load_base
from commonweight.recipe import Recipe
from commonweight.registry import resolve
from commonweight.result import export_result, open_result, score
from commonweight.strategies import individuals
from commonweight.strategies.lora.factors import Factors
from commonweight.strategies.update import Update
from tests.conftest import SITES
from tests.unit.command_line import call
from tests.unit.tiny_models import CPU, tiny
from tests.unit.tiny_tokenizers import bpe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

Array = NDArray[np.float64]
Make = Callable[..., Recipe]
IDS = torch.tensor([[0, 9, 4, 30, 7, 60, 3, 11, 200, 300]])
ROUNDS, S = 3, 2.0  # s = α/r
EXACT = ["flora", "fedex-lora"]


def logits_of(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def recipe_of(model: Path, data: Path, strategy: str, **federation: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "moved",
            "model": {"name": str(model), "adapter": {"r": 2, "alpha": 4}},
            "data": {"path": str(data), "sites": {"by": "site"}, "holdout": {"by": "subject", "examples": 4}},
            "training": {"lr": 0.1, "batch_size": 4, "max_tokens": 48, "steps": 3, "epochs": None},
            "federation": {"rounds": ROUNDS, "cohort": 2, "strategy": strategy, "weighting": "tokens", **federation},
            "evaluation": {"controls": ["base", "local", "centralised"], "samples": 0, "resamples": 100},
            "engine": {"workers": 2, "device": "cpu"},
        }
    )


@dataclass(frozen=True)
class Finished:
    """A run that has ended, and the updates that were folded in it."""

    recipe: Recipe
    folder: Path
    updates: list[Update]

    @property
    def metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return found


def noted_updates(patch: pytest.MonkeyPatch) -> list[Update]:
    """The updates that are folded from now on, one after the other."""
    updates: list[Update] = []
    add = individuals.Kept.add

    def noted(self: individuals.Kept, update: Update) -> None:
        add(self, update)
        updates.append(self.updates[-1])

    patch.setattr(individuals.Kept, "add", noted)
    return updates


@pytest.fixture(scope="module")
def finish(small_model: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """A finished run of a strategy, carried out once."""
    made: dict[str, Finished] = {}

    def finished(strategy: str) -> Finished:
        if strategy not in made:
            recipe, folder = recipe_of(small_model, small_data, strategy), tmp_path_factory.mktemp("moved") / "run"
            with pytest.MonkeyPatch.context() as patch:
                updates = noted_updates(patch)
                run(recipe, folder)
            made[strategy] = Finished(recipe, folder, updates)
        return made[strategy]

    return finished


@pytest.fixture(params=EXACT)
def finished(request: pytest.FixtureRequest, finish: Callable[[str], Finished]) -> Finished:
    return finish(request.param)


def layers_of(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def weights_of(model: Any) -> dict[str, Array]:
    """Each layer's weight together with what its adapter adds to it, out × in."""
    found = {}
    for name, layer in layers_of(model):
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        found[name] = (layer.base_layer.weight.double() + S * B.double() @ A.double()).detach().numpy()
    return found


def relative(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# --- exact, from end to end ---


def test_after_a_round_the_model_is_the_average_of_the_sites_models(finished: Finished) -> None:
    plain = open_result(finished.folder, (), round=None, base=True).model
    loaded = {name: p.detach().double().numpy() for name, p in plain.named_parameters()}
    theta = {name: t.double().numpy() for name, t in build_bench(finished.recipe).theta.items()}
    for number in (1, 2):
        updates = [update for update in finished.updates if update.round == number]
        assert len(updates) == 2
        total = sum(update.weight for update in updates)
        assert updates[0].weight != updates[1].weight
        model = open_result(finished.folder, (), round=number, base=False).model
        after = weights_of(model)
        for name, weight in after.items():
            before = loaded[name.removeprefix("base_model.model.") + ".weight"]
            meant, plainly = np.zeros_like(before), []
            for update in updates:
                A, B = (
                    theta[f"{name}.lora_{x}.default.weight"] + update.delta[f"{name}.lora_{x}.default.weight"].numpy()
                    for x in "AB"
                )
                meant += update.weight / total * S * B @ A
                plainly.append((update.weight / total, B, A))
            change = weight - before
            assert relative(change, meant) < 1e-6
            average = S * sum(p * B for p, B, _ in plainly) @ sum(p * A for p, _, A in plainly)
            assert relative(average, meant) > 1e-2
        if number == 1:  # round 2 begins from here
            for name, layer in layers_of(model):
                loaded[name.removeprefix("base_model.model.") + ".weight"] = (
                    layer.base_layer.weight.detach().double().numpy()
                )
                for x in "AB":
                    factor = getattr(layer, f"lora_{x}")["default"].weight
                    theta[f"{name}.lora_{x}.default.weight"] = factor.detach().double().numpy()


def test_both_are_exact_so_both_have_one_loss_after_the_first_round(finish: Callable[[str], Finished]) -> None:
    flora, fedex = (finish(name).metrics["arms"]["federated"]["rounds"][1]["macro_loss"] for name in EXACT)
    average = finish("fedavg").metrics["arms"]["federated"]["rounds"][1]["macro_loss"]
    assert flora == pytest.approx(fedex, rel=1e-6)
    assert abs(average - flora) > 1e-3


def test_the_other_arms_begin_from_the_base_as_it_was_loaded(
    finished: Finished, finish: Callable[[str], Finished]
) -> None:
    arms, plain = finished.metrics["arms"], finish("fedavg").metrics["arms"]
    for arm in ("base", "local", "centralised"):
        assert arms[arm]["macro_loss"] == plain[arm]["macro_loss"]
    assert arms["federated"]["macro_loss"] != plain["federated"]["macro_loss"]


def test_the_base_can_be_scored_after_it_was_added_to(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(federation={"strategy": "flora"})
    bench = build_bench(recipe)
    kind = resolve("strategy", "flora")
    task, moved = {arm: EvaluateTask(SITES, arm) for arm in ("base", "global")}, {}
    for name, layer in layers_of(bench.model):
        out, inner = layer.base_layer.weight.shape
        moved[f"{name}.default"] = (torch.full((out, 1), 0.05), torch.ones(1, inner))
    with InProcessEngine(bench, kind(), tmp_path, Events(tmp_path / "events.jsonl")) as engine:
        engine.broadcast(bench.theta, {})

        def scores() -> dict[str, Any]:
            outcomes = engine.run(list(task.values()))
            return {arm: o.result for arm, o in zip(task, outcomes, strict=True) if isinstance(o, Completed)}

        before = scores()
        assert bench.moved is not None
        bench.moved.add(moved)  # after the workers were forked
        after = scores()
        for worker in list(engine.workers):
            engine._replace(worker)
        assert scores() == after
    assert before["base"] == before["global"] == after["base"]
    assert after["global"] != before["global"]


@pytest.mark.parametrize("strategy", EXACT)
def test_any_number_of_workers_gives_the_same_bits(
    strategy: str, finish: Callable[[str], Finished], tmp_path: Path
) -> None:
    first = finish(strategy)
    values = first.recipe.model_dump(mode="json")
    values["engine"]["workers"] = 1
    values["evaluation"]["controls"] = []
    run(Recipe.model_validate(values), tmp_path / "run")
    for number in range(1, ROUNDS + 1):
        one, other = (Residuals(folder).file(number).read_bytes() for folder in (first.folder, tmp_path / "run"))
        assert one == other
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["adapter"] == first.metrics["adapter"]
    assert metrics["arms"]["federated"]["sites"] == first.metrics["arms"]["federated"]["sites"]


def test_a_site_is_sent_what_was_added_since_it_was_last_invited(finished: Finished) -> None:
    residuals, metrics = Residuals(finished.folder), finished.metrics
    sizes = {0: 0}
    for number, residual in enumerate(residuals.read(ROUNDS), start=1):
        sizes[number] = sum(4 * (f.B.numel() + f.A.numel()) for f in residual.values())
    adapter, has = metrics["bytes"]["adapter"], dict.fromkeys(SITES, 0)
    for number, one in enumerate(metrics["rounds"], start=1):
        expected = 0
        for site in one["cohort"]:
            expected += adapter + sum(sizes[k] for k in range(has[site] + 1, number))
            has[site] = number - 1
        assert one["bytes_down"] == expected
    assert metrics["rounds"][1]["bytes_down"] > 3 * adapter
    assert metrics["rounds"][0]["bytes_up"] == 2 * adapter


def test_flora_is_exact_for_sites_of_different_ranks_scales_and_modules(
    small_model: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales, ranks = {"north": 2.0, "south": 3.0, "west": 2.0}, {"north": 4, "south": 2, "west": 1}
    values = recipe_of(small_model, small_data, "flora", rounds=1, cohort="all").model_dump(mode="json")
    values["evaluation"]["controls"] = []
    values["model"]["adapter"] |= {
        "r": 4,
        "alpha": 8,
        "sites": {"south": {"r": 2, "alpha": 6}},
        "budget": {"west": 0.2},
    }
    recipe, updates = Recipe.model_validate(values), noted_updates(monkeypatch)
    run(recipe, tmp_path / "run")
    theta = build_bench(recipe).theta
    loaded = dict(open_result(tmp_path / "run", (), round=None, base=True).model.named_parameters())
    numbers_of_holders = set()
    for name, weight in weights_of(open_result(tmp_path / "run", (), round=None, base=False).model).items():
        before = loaded[name.removeprefix("base_model.model.") + ".weight"].detach().double().numpy()
        name_a, name_b = (f"{name}.lora_{x}.default.weight" for x in "AB")
        # B begins at zero, and a site that holds it has moved it
        holders = [update for update in updates if update.delta[name_b].any()]
        total, meant = sum(update.weight for update in holders), np.zeros_like(before)
        for update in holders:
            r = ranks[update.site]
            B = update.delta[name_b][:, :r].double().numpy()
            A = (theta[name_a][:r].double() + update.delta[name_a][:r]).numpy()
            meant += update.weight / total * scales[update.site] * B @ A
        assert relative(weight - before, meant) < 1e-6
        numbers_of_holders.add(len(holders))
    assert numbers_of_holders == {2, 3}


# --- the result, in use ---


def test_scores_are_those_that_the_run_reported(finished: Finished) -> None:
    arms = finished.metrics["arms"]
    for base, arm in ((False, "federated"), (True, "base")):
        found = score(open_result(finished.folder, (), round=None, base=base), exact_match=False)
        for site, summary in found.items():
            assert summary["loss"] == pytest.approx(arms[arm]["sites"][site]["loss"], rel=1e-6)
    for point in arms["federated"]["rounds"][1:]:
        found = score(open_result(finished.folder, (), round=point["round"], base=False), exact_match=False)
        assert {s: summary["loss"] for s, summary in found.items()} == pytest.approx(point["sites"], rel=1e-6)


def test_adapter_and_residual_are_opened_by_peft_alone(finished: Finished) -> None:
    expected = logits_of(open_result(finished.folder, (), round=None, base=False).model)
    plain = load_base(finished.recipe.model, CPU).model
    model = PeftModel.from_pretrained(plain, finished.folder / "adapter")
    alone = logits_of(model)
    model.load_adapter(finished.folder / "adapter" / "residual", "residual")
    model.base_model.set_adapter(["default", "residual"])
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, expected, atol=1e-3)
    config = json.loads((finished.folder / "adapter" / "residual" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    for name, layer in layers_of(model):
        assert layer.scaling["residual"] == 1.0
        rank = config["rank_pattern"][name.removeprefix("base_model.model.")]
        assert rank == layer.r["residual"] <= min(layer.base_layer.weight.shape)


@pytest.mark.parametrize("round", [None, 1])
def test_one_adapter_with_both_effects_is_exported(finished: Finished, round: int | None, tmp_path: Path) -> None:
    answer = call("export", finished.folder, tmp_path / "out", *([] if round is None else ["--round", str(round)]))
    assert answer.code == 0, answer
    expected = logits_of(open_result(finished.folder, (), round=round, base=False).model)
    plain = load_base(finished.recipe.model, CPU).model
    untouched = logits_of(plain)
    model = PeftModel.from_pretrained(plain, tmp_path / "out")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(untouched, expected, atol=1e-3)
    assert not (tmp_path / "out" / "residual").exists()
    assert max(layer.r["default"] for _, layer in layers_of(model)) > 2
    assert all(layer.r["default"] <= min(layer.base_layer.weight.shape) for _, layer in layers_of(model))


@pytest.mark.parametrize("round", [None, 2])
def test_merged_weights_have_both_effects(finished: Finished, round: int | None, tmp_path: Path) -> None:
    export_result(finished.folder, tmp_path / "out", merge=True, round=round)
    expected = logits_of(open_result(finished.folder, (), round=round, base=False).model)
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, rtol=1e-4, atol=1e-5
    )


def test_a_model_with_transposed_weights_is_trained_scored_and_exported(small_data: Path, tmp_path: Path) -> None:
    tokenizer = bpe()
    tiny("conv1d", dtype=torch.float32, vocab_size=len(tokenizer), n_positions=128).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    recipe = recipe_of(tmp_path / "gpt2", small_data, "fedex-lora", rounds=2)
    run(recipe, tmp_path / "run")
    result = open_result(tmp_path / "run", (), round=None, base=False)
    reported = json.loads((tmp_path / "run" / "metrics.json").read_text())["arms"]["federated"]["sites"]
    for site, summary in score(result, exact_match=False).items():
        assert summary["loss"] == pytest.approx(reported[site]["loss"], rel=1e-6)
    export_result(tmp_path / "run", tmp_path / "adapter", merge=False, round=None)
    export_result(tmp_path / "run", tmp_path / "merged", merge=True, round=None)
    expected = logits_of(result.model)
    exported = PeftModel.from_pretrained(load_base(recipe.model, CPU).model, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(exported), expected, rtol=1e-4, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)


# --- files that are missing or damaged ---


@pytest.fixture
def copied(finish: Callable[[str], Finished], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finish("flora").folder, tmp_path / "copy"))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_result_is_refused_if_a_rounds_residual_is_missing_or_damaged(copied: Path) -> None:
    Residuals(copied).file(2).rename(copied / "kept")
    for action in (
        lambda: open_result(copied, (), round=None, base=False),
        lambda: export_result(copied, copied.parent / "out", merge=False, round=3),
    ):
        with pytest.raises(StateError, match=r"0002\.safetensors is missing") as caught:
            action()
        assert "restore" in caught.value.hint
    open_result(copied, (), round=1, base=False)
    open_result(copied, (), round=None, base=True)
    (copied / "kept").rename(Residuals(copied).file(2))
    damage(Residuals(copied).file(1))
    with pytest.raises(StateError, match=r"0001\.safetensors is damaged"):
        open_result(copied, (), round=2, base=False)
    shutil.rmtree(copied / "residuals")
    with pytest.raises(StateError, match=r"0003\.safetensors is missing"):
        open_result(copied, (), round=None, base=False)


def residual(seed: int, rank: int = 2) -> dict[str, Factors]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"layer.{k}.default": Factors(torch.randn(5, rank, generator=draw), torch.randn(rank, 7, generator=draw))
        for k in range(3)
    }


def same(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[m].B, other[m].B) and torch.equal(one[m].A, other[m].A) for m in one
    )


def test_residuals_are_read_in_order_as_they_were_written_and_an_empty_round_counts(tmp_path: Path) -> None:
    residuals, written = Residuals(tmp_path), [residual(1), {}, residual(3, rank=4)]
    records = [residuals.write(number, one) for number, one in enumerate(written, start=1)]
    assert [record["bytes"] for record in records] == [3 * 4 * 2 * 12, 0, 3 * 4 * 4 * 12]
    residuals.check(3, records[-1]["sha256"])
    assert all(same(one, other) for one, other in zip(residuals.read(3), written, strict=True))
    again = Residuals(tmp_path / "again")
    assert [again.write(number, one) for number, one in enumerate(written, start=1)] == records


def test_the_last_digest_vouches_for_every_round_and_their_order(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path)
    for number in (1, 2, 3):
        last = residuals.write(number, residual(number))["sha256"]
    with pytest.raises(StateError, match=r"0003\.safetensors is damaged"):
        residuals.check(3, "0" * 64)
    first, second = residuals.file(1).read_bytes(), residuals.file(2).read_bytes()
    residuals.file(1).write_bytes(second)
    with pytest.raises(StateError, match=r"0001\.safetensors is damaged"):
        residuals.check(3, last)
    residuals.file(1).write_bytes(first[:40])
    with pytest.raises(StateError, match=r"0001\.safetensors is damaged"):
        residuals.check(1)


def test_the_sum_of_all_rounds_is_no_larger_than_the_layer(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path)
    for number in (1, 2, 3):
        residuals.write(number, residual(number))
    for last, rank in ((1, 2), (2, 4), (3, 5)):
        total = residuals.total(last)
        for module, factors in total.items():
            assert factors.rank == rank
            parts = [one[module] for one in (residual(n) for n in range(1, last + 1))]
            expected = sum((p.B.double() @ p.A.double() for p in parts), torch.zeros(5, 7, dtype=torch.float64))
            torch.testing.assert_close(factors.B @ factors.A, expected, rtol=1e-12, atol=1e-12)


def test_bytes_to_catch_up_are_those_since_a_site_was_last_invited() -> None:
    commits: dict[int, dict[str, Any]] = {0: {"state": {}}}
    assert bytes_to_catch_up(commits, {"a": 1, "b": 5}, small=False) == {"a": 1, "b": 5}
    cohorts = {1: ["a", "b"], 2: ["a"], 3: ["a", "c"]}
    for number, cohort in cohorts.items():
        commits[number] = {"state": {"residual": {"bytes": 10**number}}, "cohort": cohort}
    # round 4: a took part in 3 and has 1 and 2; b took part in 1; d never did
    found = bytes_to_catch_up(commits, dict.fromkeys("abcd", 1), small=False)
    assert found == {"a": 1001, "b": 1111, "c": 1001, "d": 1111}

"""Hierarchical aggregation: sums of sums are the sum, in whatever regions the sites lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from commonweight.coordinator.stored_model import StoredModel
from commonweight.coordinator.stored_updates import StoredPartial
from commonweight.coordinator.vault import SealedFile
from commonweight.errors import RecipeError
from commonweight.federation.folder import RunFolder
from commonweight.federation.global_model import MemoryModel
from commonweight.federation.journal import Journal
from commonweight.federation.relays import merge_partials
from commonweight.launch import run
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.recipe.schema import FederationSpec
from commonweight.registry import names, resolve
from commonweight.relay.sums import add_up
from commonweight.strategies.base import SumStrategy, WeightedSum
from commonweight.strategies.update import Update
from commonweight.wire.frames import Channel, Plan

from . import test_stored_model as stored

MakeRecipe = Callable[..., Recipe]
SITES = ("a", "b", "c", "d", "e")
WEIGHTS = dict(zip(SITES, (24.0, 18.0, 0.5, 7.0, 100.0), strict=True))
STEPS = dict(zip(SITES, (3, 1, 8, 2, 5), strict=True))
REGIONS = {"north": ["d", "a"], "south": ["c", "e"]}
KINDS = {name: resolve("strategy", name) for name in names("strategy")}
SUMS = [n for n, kind in KINDS.items() if issubclass(kind, SumStrategy) and kind.needs == "sum"]


def tensors(seed: int) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    return NamedTensors.of(
        {
            "a.weight": torch.randn(3, 5, generator=draw, dtype=torch.float64),
            "b.weight": torch.randn(4, generator=draw, dtype=torch.float64),
        }
    )


def update_of(strategy: SumStrategy, site: str) -> Update:
    channels = {name: tensors(SITES.index(site) + 10 * k) for k, name in enumerate(strategy.update_channels, start=1)}
    return Update(site, 1, channels, WEIGHTS[site], num_examples=1, num_label_tokens=1, num_steps=STEPS[site])


def closed(folder: Path, name: str, sites: tuple[str, ...], spec: FederationSpec) -> NamedTensors:
    strategy = resolve("strategy", name)(num_sites=len(SITES))
    model = MemoryModel(strategy, tensors(0), RunFolder(folder, resume=False), lambda theta, path: None, spec)
    model.first()
    model.open()
    for site in sites:
        model.fold(update_of(strategy, site))
    model.close(1)
    return model.state.theta


# --- the algebra of merging


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("sites", [SITES, ("b", "c"), ("d", "a")], ids=["all", "some", "one region alone"])
def test_every_sum_strategy_is_flat_to_rounding(name: str, sites: tuple[str, ...], tmp_path: Path) -> None:
    flat = closed(tmp_path / "flat", name, sites, FederationSpec())
    tree = closed(tmp_path / "tree", name, sites, FederationSpec(relays=REGIONS))
    for tensor in flat:
        torch.testing.assert_close(tree[tensor], flat[tensor], rtol=1e-13, atol=1e-13)


def test_against_the_weighted_mean_written_down(tmp_path: Path) -> None:
    found = closed(tmp_path, "fedavg", SITES, FederationSpec(relays=REGIONS))
    weights = np.array([WEIGHTS[site] for site in SITES])
    for name in found:
        deltas = np.stack([tensors(SITES.index(site) + 10)[name].numpy() for site in SITES])
        expected = tensors(0)[name].numpy() + np.tensordot(weights / weights.sum(), deltas, 1)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-13)


def test_fednova_takes_regions_whose_unit_of_length_differs(tmp_path: Path) -> None:
    """θ + τ_eff·Σ pᵢΔᵢ/τᵢ: each region measures in the steps of its own first site."""
    found = closed(tmp_path, "fednova", SITES, FederationSpec(relays=REGIONS))
    p = np.array([WEIGHTS[site] for site in SITES])
    p, steps = p / p.sum(), np.array([float(STEPS[site]) for site in SITES])
    for name in found:
        deltas = np.stack([tensors(SITES.index(site) + 10)[name].numpy() for site in SITES])
        expected = tensors(0)[name].numpy() + (p * steps).sum() * np.tensordot(p / steps, deltas, 1)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-13)


def test_an_empty_sum_changes_nothing() -> None:
    for name in ("fedavg", "fednova"):
        strategy = resolve("strategy", name)(num_sites=5)
        state = strategy.init(tensors(0))
        alone, beside = strategy.open(state), strategy.open(state)
        for fold in (alone, beside):
            fold.add(update_of(strategy, "a"))
        merge_partials(beside, [strategy.open(state)])
        assert alone.mean().digest() == beside.mean().digest()


def test_the_count_of_a_sum_is_kept_apart_from_its_tensors() -> None:
    """What a coordinator knows of a region: its sum, and what each site says of itself."""
    for name in SUMS:
        strategy = resolve("strategy", name)(num_sites=5)
        state = strategy.init(tensors(0))
        whole, counted = strategy.open(state), strategy.open(state)
        assert isinstance(whole, WeightedSum)
        assert isinstance(counted, WeightedSum)
        for site in ("c", "a"):
            whole.add(update_of(strategy, site))
            counted.count(update_of(strategy, site))
        counted.sums = {channel: sums.clone() for channel, sums in whole.sums.items()}
        assert counted.total_weight == whole.total_weight == WEIGHTS["c"] + WEIGHTS["a"]
        assert counted.mean().digest() == whole.mean().digest()


# --- whole runs


def digest_of(recipe: Recipe, folder: Path) -> Any:
    return run(recipe, folder)["adapter"]["digest"]


def test_a_run_in_regions(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    relays = {"r1": ["west"], "r2": ["north", "south"]}
    flat = run(make_recipe(federation={"strategy": "fedadam"}), tmp_path / "flat")
    recipe = make_recipe(federation={"strategy": "fedadam", "relays": relays})
    tree = run(recipe, tmp_path / "tree")
    copy = tree["model"]["adapter_bytes"]
    assert [(r["bytes_up"], r["bytes_received"]) for r in tree["rounds"]] == [(3 * copy, 2 * copy)] * 2
    assert tree["bytes"]["received"] == 4 * copy
    assert "received" not in flat["bytes"]
    losses = [m["arms"]["federated"]["macro_loss"] for m in (flat, tree)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    alone = make_recipe(federation={"strategy": "fedadam", "relays": relays}, engine={"workers": 1})
    assert digest_of(alone, tmp_path / "alone") == tree["adapter"]["digest"]


def test_a_round_that_is_taken_up_again_has_the_same_bits(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(federation={"relays": {"r": ["south", "north"]}})
    expected = digest_of(recipe, tmp_path / "through")
    commit, times = Journal.commit, []

    def cut(self: Journal, round: int, record: Any) -> None:
        times.append(round)
        if times == [0, 1, 2]:
            raise KeyboardInterrupt
        commit(self, round, record)

    monkeypatch.setattr(Journal, "commit", cut)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut")
    assert run(recipe, tmp_path / "cut", resume=True)["adapter"]["digest"] == expected


def test_a_site_that_there_is_not(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"federation\.relays names 'nord', which is no site of this run"):
        run(make_recipe(federation={"relays": {"r": ["nord"]}}), tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"relays": {"r": ["a"], "s": ["b", "a"]}}, "the site 'a' twice"),
        ({"relays": {"r": []}}, "the relay 'r' has no site"),
        ({"relays": {"": ["a"]}}, "the relay '' has no site, or no name"),
        ({"relays": {"r": ["a"]}, "over_selection": 1.5}, "do not go together"),
    ],
)
def test_regions_that_make_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        FederationSpec.model_validate(values)


# --- as a coordinator has it: the sum in a sealed file, which a relay has added up from sealed updates


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("name", SUMS)
def test_files_give_the_bits_of_memory(name: str, mixed: bool, tmp_path: Path) -> None:
    theta, spec = stored.tensors(0, mixed=mixed), FederationSpec(relays={"r2": ["north", "west"]})
    memory_strategy = stored.strategy_of(name)
    folder = RunFolder(tmp_path / "run", resume=False)
    memory = MemoryModel(memory_strategy, theta.clone(), folder, lambda theta, path: None, spec)
    memory.first()
    files = stored.files_in(tmp_path)
    initial = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), 1024))
    model = StoredModel(stored.strategy_of(name), files, initial.digest, relays=tuple(spec.relays))
    model.first()
    for number in (1, 2):
        memory.open()
        model.open()
        updates = {}
        for place, (site, weight) in enumerate(zip(stored.SITES[:3], stored.WEIGHTS, strict=False)):
            channels = {
                channel: stored.tensors(100 * number + 10 * place + k, mixed=mixed)
                for k, channel in enumerate(memory_strategy.update_channels)
            }
            memory.fold(Update(site, number, channels, weight, 1, 1, 1 + place))
            made = stored.stored_update(tmp_path, site, weight, channels, 1024, number)
            updates[site] = replace(made, num_steps=1 + place)
        region = [updates["north"], updates["west"]]
        summed = add_up(stored.strategy_of(name), region, theta.layout, 1024, files)
        path = tmp_path / f"r2-{number}.sealed"
        with SealedFile(path, stored.KEY, 1024) as sealed:
            for piece in summed.plan.pieces:
                sealed.write(piece.index, files.open(summed.digest).chunk(piece.index))
        partial = StoredPartial("r2", ("north", "west"), summed, path, stored.KEY)
        for site in stored.SITES[:3]:
            model.fold(updates[site] if site == "south" else replace(updates[site], path=None, partial=partial))
        assert [model.relay(update) for update in model._updates] == ["r2", "", "r2"]
        memory.close(number)
        model.close(number)
    assert model.digest() == memory.state.theta.digest()

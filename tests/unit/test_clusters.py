"""Clustered federations: the algebra of a mean a cluster, how clusters are told and chosen, and whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from commonweight.coordinator.answers import checked_result
from commonweight.data.tokens import Tokens
from commonweight.engines.bench import build_bench
from commonweight.engines.work import TaskWork
from commonweight.errors import RecipeError, RoundError, SiteError, StateError, UpdateRefused
from commonweight.evaluate.report import build_report
from commonweight.evaluate.scoring import score_tokens
from commonweight.federation.clusters import found, largest
from commonweight.federation.folder import RunFolder
from commonweight.federation.global_model import MemoryModel
from commonweight.federation.messages import EvaluateTask, TrainTask
from commonweight.launch import run
from commonweight.model.clusters import channel_of
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.recipe.load import check_methods
from commonweight.result import export_result, open_result, score_run
from commonweight.site.policy import shared
from commonweight.strategies.base import ServerState
from commonweight.strategies.clusters.agglomerate import agglomerate, apart_from_all, cosine_distances
from commonweight.strategies.clusters.ifca import IFCA
from commonweight.strategies.clusters.similarity import Similarity
from commonweight.strategies.clusters.sketch import BUCKETS, sketches_of
from commonweight.strategies.side_by_side import InMemory
from commonweight.strategies.update import Update
from commonweight.train.start import FROM_THETA, candidates, check_cluster, least, rows_to_ask
from tests.unit.command_line import call
from tests.unit.site_policies import make_policy

MakeRecipe = Callable[..., Recipe]


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> NamedTensors:
    """A LoRA pair of a layer of 5 by 7, and a vector."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"l.lora_A.weight": (3, 7), "l.lora_B.weight": (5, 3), "l.bias": (5,)}
    made = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return NamedTensors.of({name: tensor.to(dtype) for name, tensor in made.items()})


def update(site: str, round: int, cluster: int, delta: NamedTensors, weight: float) -> Update:
    return Update(site, round, {"delta": delta}, weight, 1, 1, 1, cluster=cluster)


def flat(given: NamedTensors) -> np.ndarray:
    return np.concatenate([given[name].double().numpy().ravel() for name in sorted(given)])


# --- the mean of each cluster


def test_each_model_moves_by_the_weighted_mean_of_its_own_updates() -> None:
    """Unequal weights; of five sites one is missing; nobody is in cluster 2."""
    strategy = IFCA(IFCA.Options(clusters=3, warm_up=1))
    state = strategy.init(tensors(0))
    for cluster in (1, 2):
        state.slots[channel_of(cluster)].copy_(tensors(10 + cluster))
    before = [flat(m) for m in (state.theta, state.slots["cluster-1"], state.slots["cluster-2"])]
    came = [("a", 1, 3.0), ("b", 0, 0.5), ("d", 1, 1.25), ("e", 0, 8.0)]  # c is missing
    fold = strategy.open(state)
    for place, (site, cluster, weight) in enumerate(came):
        fold.add(update(site, 2, cluster, tensors(100 + place), weight))
    state = strategy.close(state, fold)
    deltas = [flat(tensors(100 + place)) for place in range(len(came))]
    first, second = (0.5 * deltas[1] + 8.0 * deltas[3]) / 8.5, (3.0 * deltas[0] + 1.25 * deltas[2]) / 4.25
    np.testing.assert_allclose(flat(state.theta), before[0] + first, rtol=1e-12)
    np.testing.assert_allclose(flat(state.slots["cluster-1"]), before[1] + second, rtol=1e-12)
    assert np.array_equal(flat(state.slots["cluster-2"]), before[2])


def test_before_the_clusters_are_told_all_models_are_the_one() -> None:
    strategy = IFCA(IFCA.Options(clusters=2, warm_up=2))
    state = strategy.init(tensors(0))
    assert state.slots["cluster-1"].digest() == state.theta.digest()
    fold = strategy.open(state)
    fold.add(update("a", 1, 0, tensors(1), 1.0))
    fold.add(update("b", 1, 0, tensors(2), 3.0))
    state = strategy.close(state, fold)
    expected = flat(tensors(0)) + 0.25 * flat(tensors(1)) + 0.75 * flat(tensors(2))
    np.testing.assert_allclose(flat(state.theta), expected, rtol=1e-12)
    assert state.slots["cluster-1"].digest() == state.theta.digest()


def test_models_are_held_in_the_precision_of_theta() -> None:
    strategy = IFCA(IFCA.Options(warm_up=1))
    state = strategy.init(tensors(0, torch.bfloat16))
    fold = strategy.open(state)
    for cluster in (0, 1):
        fold.add(update("ab"[cluster], 2, cluster, tensors(7, torch.bfloat16), 1.0))
    state = strategy.close(state, fold)
    assert np.array_equal(flat(state.theta), flat(state.slots["cluster-1"]))


def test_nothing_folded_and_a_result_that_is_not_finite() -> None:
    strategy = Similarity(Similarity.Options(warm_up=1))
    state = strategy.init(tensors(0, torch.float32))
    with pytest.raises(ValueError, match="no update"):
        strategy.close(state, strategy.open(state))
    huge = tensors(1, torch.float32)
    huge["l.bias"].fill_(3e38)
    fold = strategy.open(state)
    fold.add(update("a", 2, 1, huge, 1.0))
    fold.add(update("b", 2, 1, huge, 1e9))
    with pytest.raises(RoundError, match=r"'l\.bias' \(cluster-1\)"):
        strategy.close(state, fold)


# --- how clusters are told


def plainly_agglomerated(distances: np.ndarray, at_most: int, within: float | None) -> set[frozenset[int]]:
    """Average linkage from the definition: every pair of clusters is measured anew in every step."""
    clusters = [frozenset([k]) for k in range(len(distances))]
    while len(clusters) > 1:
        pairs = [(a, b) for k, a in enumerate(clusters) for b in clusters[k + 1 :]]
        apart = {pair: np.mean([distances[i, j] for i in pair[0] for j in pair[1]]) for pair in pairs}
        first, second = min(pairs, key=apart.__getitem__)
        if len(clusters) <= at_most and (within is None or apart[first, second] > within):
            break
        clusters = [c for c in clusters if c not in (first, second)] + [first | second]
    return set(clusters)


@pytest.mark.parametrize(("at_most", "within"), [(1, None), (3, None), (5, 0.9), (12, 1.02), (12, None)])
def test_agglomeration_against_its_definition(at_most: int, within: float | None) -> None:
    for seed in range(8):
        rows = np.random.default_rng(seed).normal(size=(12, 30))
        distances = cosine_distances(rows)
        i, j = 3, 7
        cosine = rows[i] @ rows[j] / math.sqrt((rows[i] @ rows[i]) * (rows[j] @ rows[j]))
        assert distances[i, j] == pytest.approx(1 - cosine, abs=1e-12)
        labels = agglomerate(distances, at_most=at_most, within=within)
        groups = {frozenset(k for k in range(12) if labels[k] == label) for label in labels}
        assert groups == plainly_agglomerated(distances, at_most, within)
        firsts = [labels.index(label) for label in range(max(labels) + 1)]
        assert firsts == sorted(firsts), "clusters are numbered in the order of their first members"


def test_ties_and_updates_without_a_direction() -> None:
    assert agglomerate(np.full((4, 4), 0.5), at_most=2) == [0, 0, 0, 1]
    assert agglomerate(np.zeros((1, 1)), at_most=2) == [0]
    distances = cosine_distances(np.array([np.zeros(3), np.ones(3), np.ones(3)]))
    np.testing.assert_allclose(distances, [[0, 1, 1], [1, 0, 0], [1, 0, 0]], atol=1e-12)
    assert cosine_distances(np.zeros((2, 3))).tolist() == [[0, 0], [0, 0]]
    nearly = np.array([[0, 0.5, 0.5 + 1e-13], [0.5, 0, 0.9], [0.5 + 1e-13, 0.9, 0]])
    other = np.array([[0, 0.5 + 1e-13, 0.5], [0.5 + 1e-13, 0, 0.9], [0.5, 0.9, 0]])
    assert agglomerate(nearly, at_most=2) == agglomerate(other, at_most=2) == [0, 0, 1]


def test_what_all_updates_share_is_taken_off() -> None:
    draw = np.random.default_rng(0)
    common, kinds = 10 * draw.normal(size=200), draw.normal(size=(2, 200))
    rows = [scale * (common + kinds[k % 2] + 0.5 * draw.normal(size=200)) for k, scale in enumerate((1, 9, 4, 0.2))]
    directions = [row / np.sqrt(row @ row) for row in rows]
    expected = [d - sum(directions) / 4 for d in directions]
    np.testing.assert_allclose(apart_from_all(rows), expected, atol=1e-12)
    assert agglomerate(cosine_distances(apart_from_all(rows)), at_most=2) == [0, 1, 0, 1]
    assert not apart_from_all([common, 7 * common, 0.3 * common]).any()


def test_a_sketch_keeps_angles_and_is_the_signed_sum_of_its_buckets() -> None:
    draw, made = torch.Generator().manual_seed(0), []
    common = torch.randn(60_000, generator=draw)
    for noise in range(4):
        wide = torch.randn(999, generator=draw, dtype=torch.float64)
        made.append(NamedTensors.of({"a": common + noise * torch.randn(60_000, generator=draw), "b": wide}))
    updates = [update(f"s{k}", 1, 0, one, 1.0) for k, one in enumerate(made)]
    sketches = sketches_of(InMemory(ServerState(made[0]), updates))
    assert list(sketches) == ["s0", "s1", "s2", "s3"]
    rows = [np.concatenate([f.double().numpy() for f in one.flats.values()]) for one in made]
    angles = cosine_distances(np.stack(rows))
    np.testing.assert_allclose(cosine_distances(np.stack(list(sketches.values()))), angles, atol=0.05)
    places = [(k << 48) + place for k, n in enumerate(made[0].layout.numels.values()) for place in range(n)]
    plain = [0.0] * BUCKETS
    for place, value in zip(places, rows[1], strict=True):
        hashed = split_mix(place)
        plain[hashed >> 50] += -value if hashed & 1 else value
    np.testing.assert_allclose(sketches["s1"], plain, atol=1e-9)


def split_mix(place: int) -> int:
    """SplitMix64 of `place`, in whole numbers of any size."""
    mixed = (place + 1) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


def test_a_model_in_memory_begins_each_cluster_with_its_own_mean(tmp_path: Path) -> None:
    strategy, theta = Similarity(Similarity.Options(clusters=2, warm_up=1), num_sites=4), tensors(0)
    model = MemoryModel(strategy, theta.clone(), RunFolder(tmp_path / "run", resume=False), lambda theta, path: None)
    model.first()
    model.open()
    north, south = tensors(1), tensors(2)
    for site, delta, weight in (("a", north, 1.0), ("b", south, 1.0), ("c", north, 2.0), ("d", south, 5.0)):
        model.fold(update(site, 1, 0, delta, weight))
    model.close(1)
    assert model.clusters == {"a": 0, "b": 1, "c": 0, "d": 1}
    np.testing.assert_allclose(flat(model.model_of(0)), flat(theta) + flat(north), rtol=1e-12)
    np.testing.assert_allclose(flat(model.model_of(1)), flat(theta) + flat(south), rtol=1e-12)
    assert json.loads((tmp_path / "run" / "rounds" / "0001" / "clusters.json").read_text()) == {
        "adapter": 0,
        "sites": model.clusters,
    }


def test_fewer_updates_than_clusters_and_a_distance() -> None:
    same = {"a": np.ones(9), "b": 3 * np.ones(9)}
    assert IFCA(IFCA.Options(clusters=3)).grouped(same) == {"a": 0, "b": 1}
    assert Similarity(Similarity.Options(clusters=3, distance=0.1)).grouped(same) == {"a": 0, "b": 0}


# --- how a site comes to its model


def test_where_a_site_starts() -> None:
    ifca = IFCA(IFCA.Options(clusters=3, warm_up=2, rows=5))
    assert ifca.start(2, None, 0) == FROM_THETA
    assert ifca.start(3, 1, 3) == {"kind": "least-loss", "of": 3, "rows": 5}
    similarity = Similarity(Similarity.Options(clusters=3, warm_up=2, rows=5))
    assert similarity.start(2, None, 0) == FROM_THETA
    assert similarity.start(3, 1, 2) == {"kind": "cluster", "cluster": 1}
    assert similarity.start(9, None, 2) == {"kind": "least-loss", "of": 2, "rows": 5}


def test_the_choice_is_the_least_loss_and_the_first_among_equals() -> None:
    assert least([2.0, 1.0, 1.0]) == 1
    assert least([math.nan, 3.0]) == 1
    tokens = Tokens.of([(np.array([k, k], np.int32), np.array([False, True])) for k in range(10)])
    asked = rows_to_ask({"kind": "least-loss", "of": 2, "rows": 3}, tokens)
    assert [int(asked.ids_of(k)[0]) for k in range(len(asked))] == [0, 3, 6]
    assert len(rows_to_ask({"kind": "least-loss", "of": 2, "rows": 99}, tokens)) == 10


@pytest.mark.parametrize(
    "start",
    [
        {},
        {"kind": "best"},
        {"kind": "theta", "cluster": 1},
        {"kind": "cluster"},
        {"kind": "cluster", "cluster": -1},
        {"kind": "cluster", "cluster": True},
        {"kind": "least-loss", "of": 2, "rows": "all"},
        {"kind": "least-loss", "of": 17, "rows": 1},
        {"kind": "least-loss", "of": 0, "rows": 1},
    ],
)
def test_a_start_that_is_not_known_is_refused(start: dict[str, Any]) -> None:
    with pytest.raises(SiteError, match="which is not known here"):
        candidates(start)


def test_an_update_of_another_cluster_than_the_task_allows_is_refused() -> None:
    choice = {"kind": "least-loss", "of": 2, "rows": 1}
    check_cluster(1, choice, "a", 3)
    with pytest.raises(UpdateRefused, match=r"'a' for round 3 .* cluster 2, expected one of 0 to 1"):
        check_cluster(2, choice, "a", 3)
    with pytest.raises(UpdateRefused, match="of cluster 0, expected 1"):
        check_cluster(0, {"kind": "cluster", "cluster": 1}, "a", 3)
    with pytest.raises(UpdateRefused, match="of cluster 1, expected 0"):
        check_cluster(1, FROM_THETA, "a", 3)


def test_a_scored_sites_cluster_is_checked_and_may_leave() -> None:
    start = {"kind": "least-loss", "of": 2, "rows": 1}
    task = EvaluateTask(("a",), starts={"a": start})
    scores = {"nll": [1.0], "tokens": [2], "correct": [1]}
    assert checked_result(task, json.dumps({"a": {**scores, "cluster": 1}}).encode()) == {"a": {**scores, "cluster": 1}}
    for bad in (2, -1, "1", True, None):
        with pytest.raises(SiteError, match="the model of cluster"):
            checked_result(task, json.dumps({"a": {**scores, "cluster": bad}}).encode())
    with pytest.raises(SiteError):
        checked_result(EvaluateTask(("a",)), json.dumps({"a": {**scores, "cluster": 1}}).encode())
    assert shared({"a": {**scores, "cluster": 1}}, make_policy())["a"]["cluster"] == 1


def test_a_site_takes_the_model_that_fits_its_training_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    bench = build_bench(make_recipe())
    work = TaskWork(bench, tmp_path, lambda fields: None)
    values, rows = bench.participant.trainables.values, bench.sites["south"].train
    broadcast = {channel_of(j): bench.theta.clone() for j in range(3)}
    for j, noise in ((0, 0.3), (1, 0.0), (2, 0.2)):
        for name, tensor in broadcast[channel_of(j)].items():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name) + j)), alpha=noise)
    losses = []
    for tensors_of in broadcast.values():
        values.copy_(tensors_of)
        nats, labels, _ = score_tokens(bench.participant.language_model, rows)
        losses.append(nats.sum() / labels.sum())
    best = int(np.argmin(losses))
    start = {"kind": "least-loss", "of": 3, "rows": 1000}
    delta = NamedTensors.empty(bench.theta.layout)
    done = work.train(TrainTask(2, "south", 0.01, 1, start=start), broadcast, delta, {})
    assert done.figures["cluster"] == best
    again = NamedTensors.empty(bench.theta.layout)
    fixed = {"kind": "cluster", "cluster": best}
    work.train(TrainTask(2, "south", 0.01, 1, start=fixed), broadcast, again, {})
    assert again.digest() == delta.digest(), "the choice leaves no trace in the work"
    result = work.evaluate(EvaluateTask(("north", "south"), starts={"south": start}), broadcast)
    assert "cluster" not in result["north"]
    assert result["south"]["cluster"] == best


# --- whole runs


@pytest.fixture(scope="module")
def two_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sites that are asked the same; what three answer is not what the other three do."""
    path = tmp_path_factory.mktemp("two-kinds") / "rows.jsonl"
    answers = {"day": "honey water honey water", "night": "sleep knee lung sleep"}
    with path.open("w", encoding="utf-8") as file:
        for number in range(6):
            kind = ("day", "night")[number % 2]
            for k in range(14):
                row = {"site": f"{kind}-{number}", "subject": str(k), "question": f"fever {k}", "answer": answers[kind]}
                file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def make_clustered(make_recipe: MakeRecipe, two_kinds: Path) -> MakeRecipe:
    def make(strategy: Any, **federation: Any) -> Recipe:
        return make_recipe(
            data={"path": str(two_kinds), "holdout": {"by": "subject", "examples": 3}},
            training={"lr": 0.1, "steps": 6, "max_tokens": 24},
            federation={"rounds": 4, "strategy": strategy, **federation},
            evaluation={"samples": 1, "max_new_tokens": 3},
        )

    return make


KINDS = [{"day-0", "day-2", "day-4"}, {"night-1", "night-3", "night-5"}]


def test_two_kinds_of_sites_are_found_and_served_better(make_clustered: MakeRecipe, tmp_path: Path) -> None:
    plain = run(make_clustered("fedavg"), tmp_path / "plain")
    for name in ("ifca", "similarity"):
        metrics = run(make_clustered({"name": name, "warm_up": 1}), tmp_path / name)
        clusters = metrics["clusters"]["found"]
        assert [set(one["sites"]) for one in clusters] == KINDS
        assert metrics["arms"]["federated"]["macro_loss"] < plain["arms"]["federated"]["macro_loss"] - 0.1
        losses = {site: one["loss"] for site, one in metrics["arms"]["federated"]["sites"].items()}
        for one in clusters:
            assert one["macro_loss"] == pytest.approx(np.mean([losses[site] for site in one["sites"]]))
        told = [round for round in metrics["rounds"] if "clusters" in round]
        assert [round["round"] for round in told] == [1, 2, 3, 4]
        assert set(told[-1]["clusters"]) == KINDS[0] | KINDS[1]
        # both models go down to every site
        assert metrics["bytes"]["down"] == 2 * metrics["bytes"]["up"] == 2 * plain["bytes"]["down"]
    page = build_report(metrics, "")
    assert "Clusters of sites" in page
    assert "They fell into two clusters, of 3 and 3 sites" in page
    assert "Clusters of sites" not in build_report(plain, "")


def test_the_result_of_a_site(make_clustered: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    metrics = run(make_clustered({"name": "ifca", "warm_up": 2}, rounds=3), folder)
    adapters = [folder / name / "adapter_model.safetensors" for name in ("adapter", "clusters/0", "clusters/1")]
    main, first, second = (path.read_bytes() for path in adapters)
    assert main == first != second, "of clusters that are equally large, the first"
    of = json.loads((folder / "clusters.json").read_text())
    assert of == {"adapter": 0, "sites": {site: k for k, kind in enumerate(KINDS) for site in kind}}
    scored = score_run(folder, (), round=None, base=False, site=None, exact_match=False)
    assert list(scored) == list(metrics["arms"]["federated"]["sites"])
    for site, summary in scored.items():
        assert summary["loss"] == pytest.approx(metrics["arms"]["federated"]["sites"][site]["loss"], abs=1e-5)
    swapped = call("evaluate", folder, "--site", "night-1", "--json").json
    assert swapped["site"] == "night-1"
    assert swapped["sites"]["night-1"]["loss"] == pytest.approx(scored["night-1"]["loss"])
    assert swapped["sites"]["day-0"]["loss"] > scored["day-0"]["loss"] + 0.2
    export_result(folder, tmp_path / "out", merge=False, round=None, site="night-1")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == second
    assert call("chat", folder, "--site", "night-1", "--round", 3, "-p", "fever", "--max-new-tokens", 1).code == 0
    of_round = load_file(folder / "rounds" / "0003" / "clusters" / "1" / "adapter_model.safetensors")
    assert all(torch.equal(value, load_file(adapters[2])[name]) for name, value in of_round.items())
    export_result(folder, tmp_path / "round", merge=False, round=3)
    assert not (tmp_path / "round" / "clusters").exists()

    with pytest.raises(StateError, match="knows no cluster of a site 'dusk'") as unknown:
        open_result(folder, (), round=None, base=False, site="dusk")
    assert "day-0" in unknown.value.hint
    with pytest.raises(RecipeError, match=r"round 1 of the run in .* has one model for all sites"):
        open_result(folder, (), round=1, base=False, site="day-0")
    both = call("chat", folder, "--site", "day-0", "--base", "-p", "x")
    assert (both.code, "--base and --site exclude each other" in both.err) == (2, True)


def test_workers_change_no_bit_and_late_sites_find_their_cluster(make_clustered: MakeRecipe, tmp_path: Path) -> None:
    """A cohort of four of six: two sites are not there when the clusters are told."""
    recipe = make_clustered({"name": "similarity", "warm_up": 1}, cohort=4, rounds=5)
    one = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"workers": 1})})
    metrics, again = run(recipe, tmp_path / "two"), run(one, tmp_path / "one")
    assert metrics["clusters"] == again["clusters"]
    states = [(tmp_path / name / "state" / "0005.safetensors").read_bytes() for name in ("one", "two")]
    assert states[0] == states[1]
    told = metrics["rounds"][0]["clusters"]
    assert len(told) == 4
    assert sum(len(cluster["sites"]) for cluster in metrics["clusters"]["found"]) == 6
    of = {site: one["cluster"] for one in metrics["clusters"]["found"] for site in one["sites"]}
    assert told.items() <= of.items(), "a site stays in its cluster"


def test_runs_that_cannot_be_clustered_are_refused(make_clustered: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least as many sites in a round; 6 are invited"):
        run(make_clustered({"name": "ifca", "clusters": 7}), tmp_path / "many")
    with pytest.raises(RecipeError, match="at least as many sites in a round; 1 is invited"):
        run(make_clustered("similarity", cohort=1), tmp_path / "one")
    with pytest.raises(RecipeError, match="warm_up is 4, but the run has 4 rounds"):
        run(make_clustered({"name": "ifca", "warm_up": 4}), tmp_path / "long")
    for name, option in (("ifca", "clusters"), ("similarity", "clusters"), ("ifca", "warm_up"), ("ifca", "rows")):
        with pytest.raises(RecipeError, match=option):
            check_methods(make_clustered({"name": name, option: 1 if option == "clusters" else 0}))


def test_the_largest_cluster() -> None:
    assert largest({}) == 0
    assert largest({"a": 1, "b": 1, "c": 0}) == 1
    assert largest({"a": 1, "b": 0}) == 0
    rows = found({"a": 1, "b": 0, "c": 1}, {"a": 2.0, "c": 4.0})
    assert rows == [
        {"cluster": 0, "sites": ["b"], "macro_loss": None},
        {"cluster": 1, "sites": ["a", "c"], "macro_loss": 3.0},
    ]

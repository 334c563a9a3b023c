"""Asynchronous runs: both rules and the loop against NumPy, the clock, and what survives a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from commonweight.errors import QuorumError, RecipeError, RoundError
from commonweight.federation.asynchronous import AsynchronousRun
from commonweight.federation.clock import VirtualClock
from commonweight.federation.events import Events
from commonweight.federation.folder import RunFolder
from commonweight.federation.global_model import MemoryModel
from commonweight.federation.journal import Journal
from commonweight.federation.messages import Completed, Dropped, Outcome, Task, TrainTask
from commonweight.federation.shelf import FolderShelf
from commonweight.federation.tally import Sites
from commonweight.launch import run
from commonweight.lead.submit import networked
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.recipe.compatibility import check_pairings
from commonweight.recipe.load import parse_recipe, recipe_text
from commonweight.recipe.schema import ClockSpec
from commonweight.registry import resolve
from commonweight.strategies.asynchronous import AsynchronousStrategy
from commonweight.strategies.fedasync import FedAsync
from commonweight.strategies.fedbuff import FedBuff
from commonweight.strategies.update import Update
from tests.processes import Death, Nursery

MakeRecipe = Callable[..., Recipe]
Array = NDArray[np.float64]
NAMES = ("a", "b", "c", "d", "e")


def initial() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "a.lora_A.weight": torch.randn(3, 5, generator=draw, dtype=torch.float64),
        "a.lora_B.weight": torch.randn(7, 3, generator=draw),
        "half": torch.randn(4, 2, generator=draw).to(torch.bfloat16),
        "ids": torch.tensor([3, -1, 2**40]),
    }


def as_array(tensor: torch.Tensor) -> Array:
    return tensor.to(torch.float64).numpy().copy()


def update_of(delta: NamedTensors, site: str = "s", round: int = 1) -> Update:
    return Update(site, round, {"delta": delta}, 5.0, num_examples=5, num_label_tokens=11, num_steps=2)


def noise(like: NamedTensors, *key: int) -> NamedTensors:
    draw = np.random.default_rng(key)
    made = NamedTensors.zeros(like.layout)
    for tensor in made.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(draw.normal(0.1, 0.5, tensor.shape)))
    return made


#: of θ's dtype: a few roundings to it, of numbers about 1
ATOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-6}

# --- the rules ----------------------------------------------------------------------------------------------------


def folded(strategy: AsynchronousStrategy, start: NamedTensors, arrivals: Sequence[tuple[int, NamedTensors]]) -> Any:
    """θ after arrivals of given staleness, all of which started from `start` plus one tenth."""
    state = strategy.init(start.clone())
    fold = strategy.open(state)
    older = shifted(start)
    for staleness, delta in arrivals:
        kept = strategy.kept(older, update_of(delta))
        fold.add(replace(kept, weight=strategy.discount(staleness)))
    return strategy.close(state, fold).theta


def shifted(start: NamedTensors) -> NamedTensors:
    older = start.clone()
    for _, flat in older.floating():
        flat.add_(0.1)
    return older


def test_fedbuff_sums_discounted_updates_and_divides_by_their_number_as_numpy_does() -> None:
    start = NamedTensors.of(initial())
    arrivals = [(tau, noise(start, place)) for place, tau in enumerate((0, 3, 1))]
    theta = folded(FedBuff(FedBuff.Options(buffer=3, lr=0.7)), start, arrivals)
    for name, entry in start.layout.by_name.items():
        if entry.dtype.is_floating_point:
            step = sum(as_array(delta[name]) / math.sqrt(1 + tau) for tau, delta in arrivals)
            expected = as_array(start[name]) + 0.7 / 3 * step
            np.testing.assert_allclose(as_array(theta[name]), expected, rtol=0, atol=ATOL[entry.dtype])
    assert torch.equal(theta["ids"], start["ids"])
    assert theta["half"].dtype == torch.bfloat16


@pytest.mark.parametrize("staleness", [0, 4])
def test_fedasync_mixes_in_the_sites_model_which_began_at_an_older_theta(staleness: int) -> None:
    start, delta = NamedTensors.of(initial()), noise(NamedTensors.of(initial()), 7)
    theta = folded(FedAsync(FedAsync.Options(alpha=0.5, exponent=0.8)), start, [(staleness, delta)])
    share = 0.5 * (1 + staleness) ** -0.8
    older = shifted(start)
    for name, entry in start.layout.by_name.items():
        if entry.dtype.is_floating_point:
            expected = (1 - share) * as_array(start[name]) + share * (as_array(older[name]) + as_array(delta[name]))
            np.testing.assert_allclose(as_array(theta[name]), expected, rtol=0, atol=ATOL[entry.dtype])
    assert torch.equal(theta["ids"], start["ids"])


def test_what_is_kept_of_an_update_does_not_change_when_its_memory_is_used_again() -> None:
    start, delta = NamedTensors.of(initial()), noise(NamedTensors.of(initial()), 7)
    for strategy in (FedBuff(), FedAsync()):
        kept = strategy.kept(start, update_of(delta)).channels[strategy.keeps]
        before = kept.digest()
        for flat in delta.flats.values():
            flat.zero_()
        assert kept.digest() == before


def test_a_version_without_updates_or_with_two_for_fedasync_or_an_infinite_result_is_refused() -> None:
    start = NamedTensors.of(initial())
    for strategy in (FedBuff(), FedAsync()):
        with pytest.raises(ValueError, match="no update"):
            folded(strategy, start, [])
    with pytest.raises(ValueError, match="one at a time"):
        folded(FedAsync(), start, [(0, noise(start, 1)), (0, noise(start, 2))])
    large = start.clone()
    for flat in large.flats.values():
        flat.fill_(3e38 if flat.is_floating_point() else 0)
    with pytest.raises(RoundError, match="NaN or infinity"):
        folded(FedBuff(FedBuff.Options(buffer=1, lr=100)), start, [(0, large)])


def test_options_out_of_range_are_refused() -> None:
    for kind, options in ((FedBuff, {"buffer": 0}), (FedBuff, {"lr": 0}), (FedAsync, {"alpha": 1.1})):
        with pytest.raises(ValidationError):
            kind.Options(**options)
    assert resolve("strategy", "fedbuff") is FedBuff
    assert resolve("strategy", "fedasync") is FedAsync


# --- the loop, over an engine that computes in NumPy ---------------------------------------------------------------

STEPS = {"a": 6, "b": 4, "c": 9, "d": 5, "e": 3}
SPEEDS = {"a": 1.0, "b": 10.0, "c": 3.0, "d": 7.0, "e": 2.0}


class NumpyEngine:
    """Δᵢ = −θ/2 + noise of (site, round); sites in `broken` always fail."""

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.broken, self.runs = broken, []  # type: tuple[Any, list[list[str]]]

    def broadcast(self, theta: NamedTensors, further: Mapping[str, NamedTensors]) -> None:
        self.theta = theta.clone()

    def run(self, tasks: Sequence[Task], *, deadline_s: float | None = None) -> Iterator[Outcome]:
        self.runs.append([task.site for task in tasks if isinstance(task, TrainTask)])
        for task in tasks:
            assert isinstance(task, TrainTask)
            if task.site in self.broken:
                yield Dropped(task, "its disk is full")
                continue
            delta = noise(self.theta, NAMES.index(task.site), task.round)
            for name, tensor in delta.items():
                if tensor.is_floating_point():
                    tensor.sub_(self.theta[name] / 2)
            yield Completed(task, update_of(delta, task.site, task.round))


class NoEvaluation:
    def due(self, round: int) -> list[Task]:
        return []

    def final(self) -> None:
        pass


Held = dict[str, Any]


def looped(
    folder: Path, options: Mapping[str, Any], *, rounds: int = 8, cohort: Any = "all", broken: Sequence[str] = ()
) -> tuple[dict[str, Array], dict[int, Held], NumpyEngine]:
    """The float64 and float32 tensors after the run, its commits, and its engine."""
    recipe = Recipe.model_validate(
        {
            "name": "loop",
            "federation": {"rounds": rounds, "strategy": dict(options), "cohort": cohort, "clock": {"speeds": [1]}},
        }
    )
    sites = Sites(NAMES, STEPS, {})
    chosen = {key: value for key, value in options.items() if key != "name"}
    kind = resolve("strategy", options["name"])
    strategy = kind(kind.Options(**chosen), num_sites=len(NAMES))
    place = RunFolder(folder, resume=False)
    events, journal = Events(folder / "events.jsonl"), Journal(folder / "state.sqlite")
    theta = NamedTensors.of({k: v for k, v in initial().items() if k != "half"})
    model = MemoryModel(strategy, theta.clone(), place, lambda theta, folder: None)
    shelf = FolderShelf(place, journal, sites, theta.layout, site_state=False, keep_rounds="all")
    engine, clock = NumpyEngine(broken), VirtualClock(0, SPEEDS, STEPS)
    try:
        AsynchronousRun(
            recipe,
            sites,
            clock,
            strategy,
            model,
            engine,
            journal,
            shelf,
            place,
            events,
            NoEvaluation(),  # type: ignore[arg-type]
        ).run()
        found = {name: as_array(t) for name, t in model.state.theta.items() if t.is_floating_point()}
        return found, journal.commits(), engine
    finally:
        events.close()
        journal.close()
        place.close()


def by_hand(
    versions: int, buffer: int, mix: Callable[[Array, list[tuple[int, Array, Array]]], Array], missing: str = ""
) -> tuple[dict[str, Array], list[list[tuple[str, int, float]]]]:
    """Second by second in event order, in float64: θ, and of each version (site, version started, arrival)."""
    layout = NamedTensors.of({k: v for k, v in initial().items() if k != "half"})
    history = [{name: as_array(t) for name, t in layout.items() if t.is_floating_point()}]
    working = {site: (0, STEPS[site] / SPEEDS[site]) for site in NAMES}
    told: list[list[tuple[str, int, float]]] = []
    while len(told) < versions:
        heard: list[tuple[str, int, float]] = []
        waiting = []
        while len(heard) < buffer:
            site = min(working, key=lambda s: (working[s][1], s))
            started, now = working.pop(site)
            waiting.append(site)
            if site != missing:
                heard.append((site, started, now))
        theta: dict[str, Array] = {}
        for name, present in history[-1].items():
            arrivals = []
            for site, started, _ in heard:
                began = history[started][name]
                delta = as_array(noise(layout, NAMES.index(site), started + 1)[name]) - began / 2
                arrivals.append((len(told) - started, began, delta))
            theta[name] = mix(present, arrivals)
        history.append(theta)
        told.append(heard)
        working |= {site: (len(told), now + STEPS[site] / SPEEDS[site]) for site in waiting}
    return history[-1], told


def buffered(theta: Array, arrivals: list[tuple[int, Array, Array]]) -> Array:
    return theta + 0.9 / len(arrivals) * sum(delta / math.sqrt(1 + tau) for tau, _, delta in arrivals)


def mixed(theta: Array, arrivals: list[tuple[int, Array, Array]]) -> Array:
    ((tau, began, delta),) = arrivals
    share = 0.6 / math.sqrt(1 + tau)
    return theta + share * (began + delta - theta)


def told_by(commits: Mapping[int, Held]) -> list[list[tuple[str, int, float]]]:
    return [
        [(u["site"], u["version"], u["virtual_s"]) for u in record["updates"]]
        for number, record in commits.items()
        if number > 0
    ]


def assert_close(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12 if "lora_A" in name else 1e-5, err_msg=name)


@pytest.mark.parametrize("missing", ["", "d"])
def test_a_buffered_run_of_unequal_sites_is_what_numpy_makes_of_it(tmp_path: Path, missing: str) -> None:
    options = {"name": "fedbuff", "buffer": 3, "lr": 0.9}
    theta, commits, _ = looped(tmp_path / "run", options, broken=[missing] if missing else [])
    expected, told = by_hand(8, 3, buffered, missing)
    assert told_by(commits) == told
    assert max(version - started for version, heard in enumerate(told) for _, started, _ in heard) > 1
    assert_close(theta, expected)
    assert any("d" in record.get("failed", {}) for record in commits.values()) == bool(missing)


@pytest.mark.parametrize("missing", ["", "b"])
def test_a_run_of_fedasync_is_what_numpy_makes_of_it(tmp_path: Path, missing: str) -> None:
    options = {"name": "fedasync", "alpha": 0.6, "exponent": 0.5}
    theta, commits, _ = looped(tmp_path / "run", options, rounds=12, broken=[missing] if missing else [])
    expected, told = by_hand(12, 1, mixed, missing)
    assert told_by(commits) == told
    assert_close(theta, expected)


def test_a_buffer_holds_distinct_sites_and_a_commit_says_what_it_holds(tmp_path: Path) -> None:
    _, commits, _ = looped(tmp_path / "run", {"name": "fedbuff", "buffer": 3}, cohort=4)
    started = []
    for number, record in commits.items():
        if number == 0:
            continue
        sites = [update["site"] for update in record["updates"]]
        assert len(set(sites)) == 3
        assert sites == record["answered"]
        assert all(update["staleness"] == number - 1 - update["version"] for update in record["updates"])
        times = [update["virtual_s"] for update in record["updates"]]
        assert times == sorted(times)
        assert record["virtual_s"] == times[-1]
        started += [(update["site"], update["version"]) for update in record["updates"]]
        assert len(record["state"]["under_way"]) <= 4
    assert len(set(started)) == len(started) == 24


def test_sites_that_start_together_are_computed_together(tmp_path: Path) -> None:
    _, _, engine = looped(tmp_path / "run", {"name": "fedbuff", "buffer": 3})
    assert engine.runs[0] == list(NAMES)


def test_an_update_too_many_versions_behind_is_refused_and_its_site_gets_new_work(tmp_path: Path) -> None:
    options = {"name": "fedbuff", "buffer": 3, "max_staleness": 1}
    _, commits, engine = looped(tmp_path / "run", options, rounds=20)
    staleness = {update["staleness"] for n, record in commits.items() if n for update in record["updates"]}
    assert staleness == {0, 1}
    late = [site for n, record in commits.items() if n for site in record["late"]]
    assert "a" in late
    assert sum("a" in sites for sites in engine.runs) > 1


def test_a_run_whose_buffer_cannot_fill_is_abandoned_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(QuorumError, match=r"2 sites answered, the buffer takes 3.*a: its disk is full") as caught:
        looped(tmp_path / "run", {"name": "fedbuff", "buffer": 3}, broken=["a", "b", "c"])
    assert "smaller buffer" in caught.value.hint


# --- the clock ----------------------------------------------------------------------------------------------------


def sites_of(count: int, steps: int = 6) -> Sites:
    names = tuple(f"s{place}" for place in range(count))
    return Sites(names, dict.fromkeys(names, steps), {})


def test_a_task_takes_its_steps_over_the_sites_speed() -> None:
    clock = VirtualClock.of(ClockSpec(speeds=[2.0, 0.5]), sites_of(2), seed=0)
    assert [clock.duration(site, 3) for site in ("s0", "s1")] == [3.0, 12.0]


def test_even_speeds_are_dealt_by_the_seed_and_log_normal_ones_lie_between_their_bounds() -> None:
    spec = ClockSpec(slowest=1, fastest=10)
    dealt = [tuple(VirtualClock.of(spec, sites_of(10), seed=seed).speeds.values()) for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]
    assert sorted(dealt[2]) == pytest.approx(list(range(1, 11)))
    wide = ClockSpec(slowest=1, fastest=100, spread="lognormal")
    drawn = np.array(list(VirtualClock.of(wide, sites_of(2000), seed=0).speeds.values()))
    assert drawn.min() >= 1
    assert drawn.max() <= 100
    assert np.median(drawn) == pytest.approx(10, rel=0.1)  # the bounds' geometric mean
    assert np.log(drawn).std() == pytest.approx(math.log(100) / 4, rel=0.1)


def test_tries_that_break_off_cost_their_time_in_the_mean_one_over_availability() -> None:
    clock = VirtualClock.of(ClockSpec(speeds=[6.0], availability=0.25), sites_of(1), seed=0)
    tries = np.array([clock.duration("s0", round) for round in range(4000)])
    assert set(tries) >= {1.0, 2.0, 3.0}
    assert tries.mean() == pytest.approx(4, rel=0.1)
    assert (tries == 1).mean() == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize(
    ("clock", "words"),
    [
        ("{slowest: 1}", "`slowest` and `fastest` go together"),
        ("{slowest: 3, fastest: 2}", "slowest 3 is above fastest 2"),
        ("{speeds: [1, 2], slowest: 1, fastest: 2}", "not both"),
        ("{speeds: [1, 0]}", "numbers above 0"),
        ("{speeds: []}", "numbers above 0"),
        ("{availability: 0.5}", "a clock needs `speeds`"),
        ("{speeds: [1], availability: 0}", "federation.clock.availability"),
        ("{speed: 3}", "federation.clock.speed"),
    ],
)
def test_a_bad_clock_is_refused_in_words(clock: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"name: a\nfederation: {{clock: {clock}}}\n", "recipe.yaml")
    assert words in caught.value.message + caught.value.hint


@pytest.mark.parametrize("clock", ["{}", "{slowest: 1, fastest: 10, spread: lognormal}", "{speeds: [1, 2.5]}"])
def test_a_recipe_with_a_clock_is_the_same_when_it_is_written_and_read(clock: str) -> None:
    recipe = parse_recipe(f"name: a\nfederation: {{clock: {clock}}}\n", "recipe.yaml")
    assert parse_recipe(recipe_text(recipe), "resolved.yaml") == recipe


# --- whole runs ---------------------------------------------------------------------------------------------------

FEDBUFF = {
    "model": {"adapter": {"dropout": 0.1}},
    "federation": {
        "rounds": 4,
        "strategy": {"name": "fedbuff", "buffer": 2},
        "clock": {"speeds": [1.0, 5.0, 4.0], "availability": 0.8},
    },
    "training": {"steps": 2},
}
FEDASYNC = {
    "federation": {
        "rounds": 5,
        "strategy": {"name": "fedasync"},
        "cohort": 2,
        "clock": {"slowest": 1, "fastest": 4, "spread": "lognormal"},
    },
    "training": {"steps": 2},
    "evaluation": {"every": 2},
    "output": {"keep_rounds": 1},
}


@pytest.mark.parametrize(
    ("federation", "words"),
    [
        ({"strategy": {"name": "fedbuff", "buffer": 2}}, "does not go with runs without a virtual clock"),
        ({"strategy": "fedasync"}, "does not go with runs without a virtual clock"),
        ({"strategy": {"name": "fedbuff", "buffer": 4}, "clock": {"speeds": [1, 1, 1]}}, "only 3 of 3 work at once"),
        (
            {"strategy": {"name": "fedbuff", "buffer": 2}, "cohort": 1, "clock": {"speeds": [1, 1, 1]}},
            "only 1 of 3 work at once",
        ),
        ({"clock": {"speeds": [1, 1]}}, "has 2 numbers, but the data has 3 sites"),
        (
            {"strategy": {"name": "fedbuff", "buffer": 2}, "clock": {"speeds": [1, 1, 1]}, "min_sites": 3},
            "min_sites is 3, but a version of fedbuff takes in the updates of 2",
        ),
        (
            {"strategy": "fedasync", "clock": {"speeds": [1, 1, 1]}, "deadline_s": 9.0},
            "does not go with deadlines, over-selection",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_trained(
    make_recipe: MakeRecipe, tmp_path: Path, federation: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        run(make_recipe(federation=federation), tmp_path / "run")
    assert caught.value.hint


@pytest.mark.parametrize("strategy", [{"name": "fedbuff", "buffer": 2}, "fedasync"])
def test_only_a_simulation_needs_a_clock(make_recipe: MakeRecipe, strategy: Any) -> None:
    without = make_recipe(federation={"strategy": strategy})
    check_pairings(without, network=True)
    with pytest.raises(RecipeError, match=r"does not go with runs without a virtual clock: .* in a simulation only"):
        check_pairings(without, network=False)
    with_one = make_recipe(federation={"strategy": strategy, "clock": {"speeds": [1, 1, 1]}})
    check_pairings(with_one, network=False)
    with pytest.raises(RecipeError, match=r"over a network sites are as fast as they are"):
        networked(with_one)


def test_a_synchronous_run_with_a_clock_says_how_long_its_rounds_would_take(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    federation = {"rounds": 2, "clock": {"speeds": [1.0, 8.0, 0.5]}}
    metrics = run(make_recipe(federation=federation), tmp_path / "with")
    # 20, 14 and 8 rows in batches of 4: 5, 4 and 2 steps
    assert metrics["clock"]["virtual_s"] == [5.0, 10.0]
    without = run(make_recipe(federation={"rounds": 2}), tmp_path / "without")
    assert "clock" not in without
    assert without["adapter"] == metrics["adapter"]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        times = ("seconds", "started", "finished", "workers")
        return {key: without_times(item) for key, item in value.items() if key not in times}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def without_times_of(folder: Path) -> Any:
    return without_times(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("sections", [FEDBUFF, FEDASYNC], ids=["fedbuff", "fedasync"])
def test_the_result_does_not_depend_on_the_number_of_workers(
    make_recipe: MakeRecipe, tmp_path: Path, sections: dict[str, Any]
) -> None:
    for workers in (1, 2):
        run(make_recipe(**sections, engine={"workers": workers, "device": "cpu"}), tmp_path / str(workers))
    one, two = without_times_of(tmp_path / "1"), without_times_of(tmp_path / "2")
    assert one == two
    last = one["arms"]["federated"]["rounds"]
    assert last[-1]["macro_loss"] < last[0]["macro_loss"]
    assert [point["round"] for point in last][-1] == sections["federation"]["rounds"]


DEATHS = [
    ("journal.commit", "before", 1),  # the initial state is written, not committed
    ("journal.commit", "after", 1),
    ("journal.keep_update", "before", 2),
    ("journal.keep_update", "after", 1),
    ("fold.add", "after", 1),
    ("rename", "before", 2),
    ("write_state", "before", 1),  # updates under way are written, the version is not
    ("write_state", "after", 1),
    ("journal.commit", "before", 1),
    ("journal.commit", "after", 1),  # committed, nothing tidied up
    ("forget", "after", 2),  # of the resumed process: tidied at its beginning, then after its commit
    ("journal.keep_update", "after", 1),
    ("fold.add", "after", 1),
    ("forget_before", "before", 2),
    ("journal.put", "after", 1),
    ("evaluation.final", "before", 1),
]


@pytest.mark.parametrize("sections", [FEDBUFF, FEDASYNC], ids=["fedbuff", "fedasync"])
@pytest.mark.kills
def test_a_run_killed_at_every_step_ends_with_the_same_bits_and_each_update_in_one_commit(
    make_recipe: MakeRecipe, tmp_path: Path, sections: dict[str, Any]
) -> None:
    recipe, folder = make_recipe(**sections), tmp_path / "run"
    run(recipe, tmp_path / "undisturbed")
    killed = 0
    with Nursery(tmp_path / "log") as nursery:
        for death in (*(Death(*place) for place in DEATHS), None):
            begun = (folder / "state.sqlite").exists()
            if (folder / "metrics.json").exists():
                break  # a place that this run no longer came to
            pid = nursery.start(recipe, folder, resume=begun, death=death, keep_updates_over_s=0.0)
            code = nursery.wait(pid)
            assert code in (0, -9), nursery.log.read_text()
            killed += code == -9
    assert killed >= 10
    assert without_times_of(folder) == without_times_of(tmp_path / "undisturbed")
    rounds = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["rounds"]
    folded = [(update["site"], update["version"]) for one in rounds for update in one["updates"]]
    assert len(folded) == len(set(folded)) == sum(len(one["answered"]) for one in rounds)
    for part in ("state", "updates"):
        expected = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed" / part).iterdir()}
        assert {path.name: path.read_bytes() for path in (folder / part).iterdir()} == expected

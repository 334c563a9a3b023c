"""Parts and models that stay at their sites: FedSA-LoRA, personal parts (FedPer), Ditto, interpolation.

The account of each rule is NumPy in float64, written from the formula; layers are not square, sites weigh unequally,
and one of them misses a round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from commonweight.data.sites import keep_aside
from commonweight.engines.bench import Bench, build_bench
from commonweight.engines.handshake import handshake
from commonweight.engines.work import ALPHAS, TaskWork
from commonweight.errors import DataError, ModelError, RecipeError, SiteError
from commonweight.evaluate.scoring import score_tokens
from commonweight.evaluate.summary import plain_summary
from commonweight.federation.folder import read_tensors, write_tensors
from commonweight.federation.messages import EvaluateTask, TrainTask
from commonweight.launch import run
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.model.trainables import Trainables, has_part
from commonweight.recipe import Recipe
from commonweight.recipe.load import check_methods
from commonweight.recipe.schema import TrainingSpec
from commonweight.registry import resolve
from commonweight.site.workshop import Cancelled
from commonweight.strategies.ditto import Ditto
from commonweight.strategies.interpolation import Interpolation
from commonweight.strategies.lora.fedsa_lora import FedSALoRA
from commonweight.train.corrections import Own, correction
from commonweight.train.local import LocalWork, Participant
from commonweight.wire.frames import Channel, frame_of, plan_for
from tests.processes import Death, Nursery
from tests.unit.command_line import call
from tests.unit.test_frozen_lora import LAYERS, WEIGHTS, Pair, Slope, a_of, average, pairs
from tests.unit.test_train import examples
from tests.unit.test_workshop import engine_over, job_of, one_round, workshop_of

MakeRecipe = Callable[..., Recipe]
SITES = ("north", "south", "west")
ADAPTER = "adapter_model.safetensors"

# --- what is shared is a prefix -----------------------------------------------------------------------------------


def test_personal_tensors_lie_behind_the_shared_ones_without_a_copy() -> None:
    tensors = {name: torch.randn(shape) for name, shape in {"b": (2, 3), "a": (4,), "c": (5,), "d": (1, 2)}.items()}
    tensors["half"] = torch.randn(3).half()
    laid = NamedTensors.of(tensors, last={"a", "half"})
    shared, own = laid.split({"a", "half"})
    assert list(laid) == ["b", "c", "d", "a", "half"]
    assert (list(shared), list(own)) == (["b", "c", "d"], ["a", "half"])
    assert shared.layout == Layout.of({name: tensors[name] for name in "bcd"}), "as if the others were not there"
    assert own.layout == Layout.of({name: tensors[name] for name in ("a", "half")})
    assert set(shared.flats) == {torch.float32}
    assert shared.flats[torch.float32].data_ptr() == laid.flats[torch.float32].data_ptr()
    own["a"].zero_()
    shared["c"].fill_(7)
    assert not laid["a"].any()
    assert bool((laid["c"] == 7).all())
    assert laid.split(())[0] is laid


def test_parts_of_names() -> None:
    name = "model.layers.13.q_proj.lora_B.default.weight"
    assert all(has_part(name, part) for part in ("lora_B", "layers.13", "13", "q_proj.lora_B", name))
    assert not any(has_part(name, part) for part in ("lora", "layers.1", "layers.3", "proj", "layers..13", "weight.x"))


# --- FedSA-LoRA ---------------------------------------------------------------------------------------------------


def test_fedsa_averages_every_a_exactly() -> None:
    theta = {name: value for name, value in pairs(0).items() if has_part(name, "lora_A")}
    assert not any(has_part(name, part) for name in theta for part in FedSALoRA.personal)
    for number, absent in ((1, None), (2, 2), (3, 0)):
        present = [site for site in range(len(WEIGHTS)) if site != absent]
        sites = {site: {n: v + pairs(100 * number + site)[n] for n, v in theta.items()} for site in present}
        after = average(FedSALoRA(), theta, sites)
        total = sum(WEIGHTS[site] for site in present)
        for layer in LAYERS:
            expected = sum(WEIGHTS[site] / total * sites[site][a_of(layer)] for site in present)
            np.testing.assert_allclose(after[a_of(layer)], expected, rtol=1e-12)
        theta = after


def bench_of(make_recipe: MakeRecipe, strategy: Any, **sections: Any) -> Bench:
    federation = {"rounds": 2, "strategy": strategy, **sections.pop("federation", {})}
    return build_bench(make_recipe(federation=federation, **sections))


def test_no_b_is_in_what_is_sent(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Neither in the layout of the global tensors, nor in an update's, nor in the frame's header that announces it."""
    bench = bench_of(make_recipe, "fedsa-lora")
    trained = [name for name, p in bench.model.named_parameters() if p.requires_grad]
    assert set(bench.theta) == {name for name in trained if has_part(name, "lora_A")}
    assert set(bench.personal) == {name for name in trained if has_part(name, "lora_B")}
    assert not any(tensor.any() for tensor in bench.personal.values()), "peft starts B at zero"
    delta = NamedTensors.empty(bench.theta.layout)
    done = TaskWork(bench, tmp_path, lambda _: None).train(
        TrainTask(1, "north", 0.01, 3), {"theta": bench.theta}, delta, {}
    )
    assert all(tensor.any() for tensor in done.state["personal"].values())
    assert done.further == {}
    frame = frame_of({"delta": delta}, plan_for(bench.theta.layout, (Channel("delta"),), 1 << 16))
    assert b"lora_A" in frame.header
    assert b"lora_B" not in frame.header
    assert frame.plan.num_bytes == 4 * sum(t.numel() for t in bench.theta.values())


# --- personal parts -----------------------------------------------------------------------------------------------


def test_corrections_see_the_shared_part_alone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """SCAFFOLD's control and FedProx's pull are of what is shared, also where a block is a site's own."""
    for strategy in ("scaffold", "fedprox"):
        bench = bench_of(make_recipe, strategy, federation={"personal": ["layers.1"]})
        method, delta = resolve("strategy", strategy)(), NamedTensors.empty(bench.theta.layout)
        broadcast = {"theta": bench.theta, "control": NamedTensors.zeros(bench.theta.layout)}
        task = TrainTask(1, "north", 0.01, 3, correction=method.correction())
        done = TaskWork(bench, tmp_path, lambda _: None).train(task, broadcast, delta, {})
        assert all("layers.0." in name for name in delta)
        assert all("layers.1." in name for name in done.state["personal"])
        path = tmp_path / f"{strategy}.safetensors"
        write_tensors(path, done.state)
        found = read_tensors(path, bench.theta.layout, others=bench.state_layouts)
        assert {name: tensors.digest() for name, tensors in found.items()} == {
            name: tensors.digest() for name, tensors in done.state.items()
        }


def test_what_cannot_stay_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ModelError, match=r"no trainable tensor has 'layers\.9' in its name") as refused:
        bench_of(make_recipe, "fedavg", federation={"personal": ["layers.9"]})
    assert "lora_A" in refused.value.hint
    with pytest.raises(ModelError, match="nothing is left to share"):
        bench_of(make_recipe, "fedavg", federation={"personal": ["lora_A", "lora_B"]})
    with pytest.raises(ModelError, match="nothing is left to share"):
        bench_of(make_recipe, "fedavg", model={"adapter": {"kind": "prompt"}}, federation={"personal": ["embedding"]})
    with pytest.raises(ModelError, match="whose halves cannot be shared apart"):
        bench_of(make_recipe, "fedsa-lora", model={"adapter": {"r": 2, "targets": ["embed_tokens", "q_proj"]}})
    for part in ("", "layers..1", ".x", "a b"):
        with pytest.raises(ValueError, match="personal"):
            make_recipe(federation={"personal": [part]})


@pytest.mark.parametrize("strategy", ["fedsa-lora", "ffa-lora", "flexlora", "ditto", "interpolation"])
def test_strategies_that_keep_personal_parts_out(make_recipe: MakeRecipe, strategy: str) -> None:
    with pytest.raises(RecipeError, match="does not go with personal parts") as refused:
        check_methods(make_recipe(federation={"strategy": strategy, "personal": ["layers.1"]}))
    assert "fedavg" in refused.value.hint
    check_methods(make_recipe(federation={"strategy": "scaffold", "personal": ["layers.1"]}), network=True)


# --- Ditto and interpolation: the algebra -------------------------------------------------------------------------


def test_dittos_step_in_float64() -> None:
    """v ← v − η(g + λ(v − θ)), with a gradient of its own for each tensor, weight decay and clipping left out."""
    theta = Trainables(Pair()).values
    module = Pair()
    who = Participant(
        SimpleNamespace(model=module, device=torch.device("cpu")),  # type: ignore[arg-type]
        Trainables(module),
    )
    start = {name: tensor + torch.linspace(-2, 3, tensor.numel()).view(tensor.shape) for name, tensor in theta.items()}
    who.trainables.values.copy_(NamedTensors.of(start))
    lam, lr, steps = 0.7, 0.05, 6
    change = correction(Ditto(Ditto.Options(pull=lam)).correction(), theta, {}, {})
    assert isinstance(change, Own)
    spec = TrainingSpec(optimizer="sgd", batch_size=2, micro_batch_size=1, clip_norm=None)
    work = LocalWork(examples((2, 1), (2, 4)), spec, lr=lr, steps=steps, seed=0, correction=change.pull)
    Slope(who.trainables).work(who, work)
    for name, tensor in theta.items():
        draw = torch.Generator().manual_seed(len(name) + ord(name[-1]))
        gradient = torch.randn(tensor.shape, generator=draw, dtype=torch.float64).numpy()
        expected, centre = start[name].numpy().astype(np.float64), tensor.numpy()
        for _ in range(steps):
            expected = expected - lr * (gradient + lam * (expected - centre))
        np.testing.assert_allclose(who.trainables.values[name].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("effort", "steps"), [(1.0, 7), (0.5, 3), (0.01, 1), (2.0, 14)])
def test_effort_is_in_steps_of_the_global_model(effort: float, steps: int) -> None:
    change = correction({"kind": "own", "pull": 0.0, "effort": effort}, Trainables(Pair()).values, {}, {})
    assert isinstance(change, Own)
    assert change.steps(7) == steps


def trained(bench: Bench, folder: Path, strategy: Any, state: Any, theta: NamedTensors) -> tuple[NamedTensors, Any]:
    delta = NamedTensors.empty(bench.theta.layout)
    task = TrainTask(1, "north", 0.01, 3, correction=strategy.correction())
    return delta, TaskWork(bench, folder, lambda _: None).train(task, {"theta": theta}, delta, state).state


def moved(theta: NamedTensors, scale: float) -> NamedTensors:
    draw = torch.Generator().manual_seed(5)
    steps = {n: scale * torch.randn(t.shape, generator=draw) for n, t in theta.items()}
    return NamedTensors.of({name: tensor + steps[name] for name, tensor in theta.items()})


def test_the_global_model_is_trained_as_by_fedavg_and_the_own_one_goes_on_from_the_private_state(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    plain = bench_of(make_recipe, "fedavg")
    expected, nothing = trained(plain, tmp_path, resolve("strategy", "fedavg")(), {}, plain.theta)
    assert nothing == {}
    bench, start = bench_of(make_recipe, "ditto"), moved(plain.theta, 0.05)
    free, held = Ditto(Ditto.Options(pull=0.0)), Ditto(Ditto.Options(pull=30.0))
    first, begun = trained(bench, tmp_path, free, {}, bench.theta)
    again, gone_on = trained(bench, tmp_path, free, {"own": start}, bench.theta)
    assert first.digest() == again.digest() == expected.digest()
    assert begun["own"].digest() != gone_on["own"].digest()
    _, pulled = trained(bench, tmp_path, held, {"own": start}, bench.theta)
    for name, tensor in bench.theta.items():
        far, near = (float((state["own"][name] - tensor).norm()) for state in (gone_on, pulled))
        assert near < far, name


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_a_mixture_in_float64(make_recipe: MakeRecipe, tmp_path: Path, alpha: float) -> None:
    bench = bench_of(make_recipe, {"name": "interpolation", "alpha": alpha})
    own = moved(bench.theta, 1.0)
    work = TaskWork(bench, tmp_path, lambda _: None)
    work.mix(bench.theta, own, alpha)
    for name, tensor in bench.participant.trainables.values.items():
        v, theta = own[name].double().numpy(), bench.theta[name].double().numpy()
        np.testing.assert_allclose(tensor.detach().double().numpy(), alpha * v + (1 - alpha) * theta, atol=3e-7)
    if alpha in (0.0, 1.0):
        assert bench.participant.trainables.values.digest() == (own if alpha else bench.theta).digest()


def test_alpha_is_the_best_on_the_rows_kept_aside_and_on_no_others(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    bench = bench_of(make_recipe, {"name": "interpolation", "keep_aside": 0.3})
    plain = build_bench(make_recipe())
    for name, site in bench.sites.items():
        whole, aside = plain.sites[name], site.aside
        assert aside is not None
        assert len(site.train) + len(aside) == len(whole.train)
        texts = [{tuple(t.ids_of(i)) for i in range(len(t))} for t in (site.train, aside, whole.train, site.heldout)]
        assert texts[0] | texts[1] == texts[2]
        assert not texts[1] & texts[3]
        assert len(aside) == pytest.approx(0.3 * len(whole.train), abs=2)
        assert bench.sites[name].heldout is site.heldout
    _, state = trained(bench, tmp_path, Interpolation(), {}, bench.theta)
    work = TaskWork(bench, tmp_path, lambda _: None)
    found = work.evaluate(EvaluateTask(("north",), "personal", alpha=None), {"theta": bench.theta}, state)["north"]
    losses = []
    for alpha in ALPHAS:
        values = {n: alpha * v.double() + (1 - alpha) * bench.theta[n].double() for n, v in state["own"].items()}
        bench.participant.trainables.values.copy_(NamedTensors.of({n: t.float() for n, t in values.items()}))
        aside = bench.sites["north"].aside
        assert aside is not None
        losses.append(score_tokens(bench.participant.language_model, aside)[0].sum())
    assert losses[ALPHAS.index(found["alpha"])] == pytest.approx(min(losses), rel=1e-6)
    fixed = work.evaluate(EvaluateTask(("north",), "personal", alpha=found["alpha"]), {"theta": bench.theta}, state)[
        "north"
    ]
    assert "alpha" not in fixed
    assert fixed["nll"] == found["nll"]
    # worse tensors of its own than the global ones: it takes none of them
    assert work.choose("north", state["own"], moved(state["own"], 50.0)) == 0.0


def test_whole_groups_are_kept_aside_as_long_as_some_are_left(make_recipe: MakeRecipe) -> None:
    site = build_bench(make_recipe()).sites["north"]
    assert len(site.train_groups) == len(site.train)
    apart = keep_aside(site, 0.3, seed=0)
    aside = len(site.train) - len(apart.train)
    assert not {g for g in site.train_groups if site.train_groups.count(g) > apart.train_groups.count(g)} & set(
        apart.train_groups
    )
    assert aside >= 0.3 * len(site.train) - 1
    one = SimpleNamespace(**{**vars(site), "train_groups": ("x",) * len(site.train)})
    single = keep_aside(type(site)(**vars(one)), 0.5, seed=0)
    assert 0 < len(single.train) < len(site.train)
    alone = type(site)(**{**vars(site), "train": site.train.subset([0]), "train_groups": ("x",)})
    with pytest.raises(DataError, match="one training example"):
        keep_aside(alone, 0.1, seed=0)


def test_a_site_that_was_never_invited_uses_the_global_model(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    bench = bench_of(make_recipe, "ditto")
    work, theta = TaskWork(bench, tmp_path, lambda _: None), moved(bench.theta, 0.1)
    arms = [work.evaluate(EvaluateTask(("south",), arm), {"theta": theta}, {}) for arm in ("global", "personal")]
    assert arms[0] == arms[1]
    shared = bench_of(make_recipe, "fedsa-lora")
    TaskWork(shared, tmp_path, lambda _: None).train(
        TrainTask(1, "north", 0.01, 3), {"theta": shared.theta}, NamedTensors.empty(shared.theta.layout), {}
    )
    with_initial = TaskWork(shared, tmp_path, lambda _: None).evaluate(
        EvaluateTask(("south",)), {"theta": shared.theta}, {}
    )
    untouched = bench_of(make_recipe, "fedsa-lora")
    again = TaskWork(untouched, tmp_path, lambda _: None).evaluate(
        EvaluateTask(("south",)), {"theta": untouched.theta}, {}
    )
    assert with_initial == again, "nothing of north's is left in the model"


def test_options_out_of_range_are_refused(make_recipe: MakeRecipe) -> None:
    for strategy in (
        {"name": "ditto", "pull": -0.1},
        {"name": "ditto", "effort": 0},
        {"name": "interpolation", "alpha": 1.5},
        {"name": "interpolation", "keep_aside": 1.0},
        {"name": "fedsa-lora", "personal": ["x"]},
    ):
        with pytest.raises(RecipeError):
            check_methods(make_recipe(federation={"strategy": strategy}))


# --- whole runs ---------------------------------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedsa-lora": {"strategy": "fedsa-lora"},
    "personal parts": {"strategy": "fedadam", "personal": ["layers.1"]},
    "ditto": {"strategy": {"name": "ditto", "pull": 0.5}},
    "interpolation": {"strategy": {"name": "interpolation", "keep_aside": 0.3}},
}
SECTIONS: dict[str, Any] = {"training": {"steps": 3}, "evaluation": {"controls": ["base", "local"], "samples": 1}}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        times = ("seconds", "started", "finished", "machine")
        return {key: without_times(item) for key, item in value.items() if key not in times}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def states_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "sites").rglob("*.saf*"))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    return {}


@pytest.fixture
def finished(
    make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory, runs: dict[str, tuple[Path, dict[str, Any]]]
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A run of three rounds, of two sites each, and its metrics."""

    def carried_out(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in runs:
            folder = tmp_path_factory.mktemp("run") / "run"
            recipe = make_recipe(federation={"rounds": 3, "cohort": 2, **STRATEGIES[name]}, **SECTIONS)
            runs[name] = folder, run(recipe, folder)
        return runs[name]

    return carried_out


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery") / "log") as nursery:
        yield nursery


@pytest.mark.parametrize("name", ["personal parts", "interpolation"])
@pytest.mark.kills
def test_a_killed_run_ends_with_the_same_bits_whatever_the_workers(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    nursery: Nursery,
    finished: Callable[[str], tuple[Path, dict[str, Any]]],
    name: str,
) -> None:
    undisturbed, expected = finished(name)
    folder = tmp_path / "run"
    recipe = make_recipe(
        federation={"rounds": 3, "cohort": 2, **STRATEGIES[name]}, engine={"workers": 1, "device": "cpu"}, **SECTIONS
    )
    for death in (
        Death("journal.commit", "after", 2),  # states of round 1 beside nothing tidied up
        Death("write_tensors", "after"),  # a site has written its next state, nobody has heard of it
        Death("journal.put", "after"),  # the curve of one arm is kept, and not the other's
        Death("forget", "before", 2),
        None,
    ):
        pid = nursery.start(recipe, folder, resume=(folder / "state.sqlite").exists(), death=death)
        assert nursery.wait(pid) == (-9 if death else 0), nursery.log.read_text()
    found = json.loads((folder / "metrics.json").read_text())
    assert without_times(found) == without_times(json.loads(json.dumps(expected)))
    assert states_of(folder) == states_of(undisturbed)
    assert (folder / "adapter" / ADAPTER).read_bytes() == (undisturbed / "adapter" / ADAPTER).read_bytes()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_is_evaluated_as_its_sites_use_it_and_commands_open_it_so(
    tmp_path: Path, finished: Callable[[str], tuple[Path, dict[str, Any]]], name: str
) -> None:
    folder, metrics = finished(name)
    own_model = name in ("ditto", "interpolation")
    arm = metrics["arms"]["personal" if own_model else "federated"]
    assert ("personal" in metrics["arms"]) is own_model
    assert [point["round"] for point in arm["rounds"]] == [0, 1, 2, 3]
    answered = {site for one in metrics["rounds"] for site in one["answered"]}
    assert len(states_of(folder)) == len(answered)
    assert len(set(states_of(folder).values())) == len(answered), "no two sites' are alike"
    exported = {}
    for site in SITES:
        scored = call("evaluate", folder, "--site", site, "--json")
        assert scored.code == 0, scored.err
        assert set(scored.json["sites"]) == {site}
        assert scored.json["sites"][site]["loss"] == pytest.approx(arm["sites"][site]["loss"], rel=1e-6)
        assert call("export", folder, tmp_path / site, "--site", site).code == 0
        exported[site] = load_file(tmp_path / site / ADAPTER)
    if name == "fedsa-lora":
        global_ = load_file(folder / "adapter" / ADAPTER)
        for own in exported.values():
            assert all(torch.equal(t, global_[n]) for n, t in own.items() if "lora_A" in n)
        assert not any(t.any() for n, t in global_.items() if "lora_B" in n)
        assert not same_b(exported["north"], exported["south"])
    if own_model:
        says = " ".join(plain_summary(metrics))
        assert "With a model of its own beside the shared one, a site’s mean loss is" in says
        assert "compared with the shared model" in says
        report = (folder / "report.html").read_text()
        assert 'id="personal"' in report
        assert set(metrics["personal"]) == set(SITES)
        assert all(
            ("alpha" in one) is (name == "interpolation" and site in answered)
            for site, one in metrics["personal"].items()
        )
    assert call("chat", folder, "--site", "north", "-p", "what helps", "--max-new-tokens", 2).code == 0
    assert call("export", folder, tmp_path / "merged", "--site", "west", "--merge").code == 0


def same_b(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items() if "lora_B" in name)


def test_what_is_asked_of_a_site_that_is_not_there(
    make_recipe: MakeRecipe, tmp_path: Path, finished: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    folder, _ = finished("ditto")
    unknown = call("evaluate", folder, "--site", "east")
    assert (unknown.code, "no site called 'east'" in unknown.err) == (6, True)
    assert "north, south, west" in unknown.err
    both = call("chat", folder, "--site", "north", "--round", 1, "-p", "x")
    assert (both.code, "--site excludes --round" in both.err) == (2, True)
    run(make_recipe(federation={"rounds": 1}), tmp_path / "plain")
    plain = call("export", tmp_path / "plain", tmp_path / "out", "--site", "north")
    assert (plain.code, "one model for all sites" in plain.err) == (2, True)


def test_a_damaged_private_state_costs_its_site_alone_and_says_so(
    make_recipe: MakeRecipe, tmp_path: Path, nursery: Nursery
) -> None:
    recipe = make_recipe(federation={"rounds": 3, "strategy": "ditto"}, training={"steps": 2})
    pid = nursery.start(recipe, tmp_path / "run", death=Death("journal.commit", "after", 3))
    assert nursery.wait(pid) == -9, nursery.log.read_text()
    damaged = tmp_path / "run" / "sites" / "001" / "0002.safetensors"
    damaged.write_bytes(b"half")
    metrics = run(recipe, tmp_path / "run", resume=True)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    reasons = {(e["event"], *e.get("sites", [e.get("site")])) for e in events if "is damaged" in e.get("reason", "")}
    assert reasons == {("site_failed", "south"), ("evaluation_missing", "south")}
    assert metrics["not_evaluated"] == ["south"]
    assert set(metrics["arms"]["personal"]["sites"]) == {"north", "west"}
    assert [one["answered"] for one in metrics["rounds"]][-1] == ["north", "west"]


# --- over a network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_sites_of_their_own_have_the_bits_of_the_in_process_engine_and_keep_their_model(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path, name: str
) -> None:
    recipe = make_recipe(federation=STRATEGIES[name], training={"steps": 2})
    bench, method = build_bench(recipe), resolve("strategy", recipe.federation.strategy.name)
    strategy = method(method.Options(**recipe.federation.strategy.options), num_sites=3)
    job = job_of(recipe, must_match={**handshake(bench), **bench.must_match_too})
    sites = {site: workshop_of(tmp_path / f"at-{site}", small_data, name=site, partition=site) for site in SITES}
    for site in sites.values():
        assert site.join(job)["layout"] == bench.theta.layout.digest
    with engine_over(bench, strategy, tmp_path / "run") as engine:
        state = strategy.init(bench.theta.clone())
        state = one_round(1, state, strategy, engine, sites, bench)
        arm = "personal" if strategy.own_model else "global"
        (tmp_path / "run").mkdir(exist_ok=True)
        for place, (site, workshop) in enumerate(sites.items()):
            task = EvaluateTask((site,), arm, state_in=f"sites/{place:03d}/0001.safetensors", alpha=strategy.alpha)
            answer = workshop.answer("run-1", task, {"theta": state.theta})
            assert set(answer[site]) == {"nll", "tokens", "correct"}, "no share that it has chosen"
            engine.broadcast(state.theta, {})
            (expected,) = engine.run([task])
            here = {key: value for key, value in expected.result[site].items() if key != "alpha"}  # type: ignore[union-attr]
            assert answer[site] == here
            kept = tmp_path / f"at-{site}" / "runs" / "run-1"
            assert (kept / "personal" / ADAPTER).exists()
            workshop.forget("run-1")
            assert [path.name for path in kept.iterdir()] == ["personal"]


@pytest.mark.parametrize("dies_at", [2, 6])
def test_work_that_was_killed_in_either_model_goes_on_from_its_checkpoint(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path, dies_at: int
) -> None:
    """Four steps for the global model, four for the site's own; stopped before one of them, and begun again."""
    recipe = make_recipe(federation={"strategy": "ditto"}, training={"steps": 4})
    theta, asked = build_bench(recipe).theta, count()
    task = TrainTask(1, "clinic", 0.01, 4, correction=Ditto().correction(), state_out="sites/000/0001.safetensors")

    def begin(folder: str) -> Callable[..., Any]:
        site = workshop_of(tmp_path / folder, small_data, partition="north", checkpoint_s=0.0)
        site.join(job_of(recipe))
        return partial(site.train, "run-1", task, {"theta": theta})

    with pytest.raises(Cancelled):
        begin("killed")(cancelled=lambda: next(asked) == dies_at)
    steps: list[str] = []
    works = [begin("undisturbed")(), begin("killed")(progress=steps.append)]
    assert works[0].channels["delta"].digest() == works[1].channels["delta"].digest()
    states = [tmp_path / f / "runs" / "run-1" / "state" / "0001.safetensors" for f in ("undisturbed", "killed")]
    assert states[0].read_bytes() == states[1].read_bytes()
    assert len([note for note in steps if note.startswith("step ")]) < 8, "not from the beginning"


def test_a_task_that_asks_for_an_impossible_share_is_refused(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(federation={"strategy": "ditto"})
    site = workshop_of(tmp_path / "site", small_data, partition="north")
    site.join(job_of(recipe))
    theta = build_bench(recipe).theta
    with pytest.raises(SiteError, match="a share of 2"):
        site.answer("run-1", EvaluateTask(("clinic",), "personal", alpha=2.0), {"theta": theta})
    with pytest.raises(SiteError, match="private state after round 4 of run run-1 is missing"):
        site.answer("run-1", EvaluateTask(("clinic",), "personal", state_in="x/0004.safetensors"), {"theta": theta})

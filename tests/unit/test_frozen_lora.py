"""FFA-LoRA and RoLoRA: exact averages of LoRA's products, and a half that keeps its bits while it rests.

The account of each average is NumPy in float64, written from the products BA; layers are not square, sites weigh
unequally, and one of them misses a round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from commonweight.data.tokens import Tokens
from commonweight.engines.bench import Bench, build_bench
from commonweight.engines.handshake import handshake
from commonweight.engines.work import TaskWork
from commonweight.errors import ModelError, RecipeError, SiteError
from commonweight.federation.messages import ChainTask
from commonweight.launch import run
from commonweight.model.adapters import adapter_off
from commonweight.model.base import load_base
from commonweight.model.tensors import NamedTensors
from commonweight.model.trainables import Trainables, has_part
from commonweight.recipe import Recipe
from commonweight.recipe.load import check_methods
from commonweight.recipe.schema import TrainingSpec
from commonweight.registry import resolve
from commonweight.strategies.base import ServerState, Strategy
from commonweight.strategies.fedavg import FedAvg
from commonweight.strategies.ffa_lora import FFALoRA
from commonweight.strategies.rolora import RoLoRA
from commonweight.strategies.update import Update, check
from commonweight.train import batches
from commonweight.train.corrections import Freeze, NoCorrection, Prox, Scaffold, correction
from commonweight.train.local import GradientObjective, LocalWork, Participant
from commonweight.train.loss import LanguageModel
from tests.processes import Death, Nursery
from tests.unit.command_line import call
from tests.unit.test_train import examples
from tests.unit.test_workshop import engine_over, job_of, one_round, workshop_of

MakeRecipe = Callable[..., Recipe]
Array = NDArray[np.float64]
SITES = ("north", "south", "west")
ADAPTER = "adapter_model.safetensors"

# --- the algebra of the average -----------------------------------------------------------------------------------

SCALE = 16 / 3  # α/r
WEIGHTS = (3.0, 1.0, 7.5, 20.0)
LAYERS = {"up.q_proj": (7, 5, 3), "down.k_proj": (4, 11, 3)}  # out, in, rank


def a_of(layer: str) -> str:
    return f"{layer}.lora_A.default.weight"


def b_of(layer: str) -> str:
    return f"{layer}.lora_B.default.weight"


def pairs(seed: int, *, b: bool = True) -> dict[str, Array]:
    """A pair for each layer, in float64; without `b` every B is zero, as at the start."""
    draw, found = np.random.default_rng(seed), {}
    for layer, (rows, columns, rank) in LAYERS.items():
        found[a_of(layer)] = draw.normal(size=(rank, columns))
        found[b_of(layer)] = draw.normal(size=(rows, rank)) * b
    return found


def tensors_of(arrays: Mapping[str, Array]) -> NamedTensors:
    return NamedTensors.of({name: torch.from_numpy(array) for name, array in arrays.items()})


def arrays_of(tensors: NamedTensors) -> dict[str, Array]:
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def average(strategy: Strategy, theta: dict[str, Array], sites: dict[int, dict[str, Array]]) -> dict[str, Array]:
    """θ after a round of a strategy in which these sites' tensors came back."""
    state = strategy.init(tensors_of(theta))
    fold = strategy.open(state)
    for site, own in sites.items():
        delta = tensors_of({name: own[name] - theta[name] for name in theta})
        update = Update(f"site{site}", 1, {"delta": delta}, WEIGHTS[site], 1, 1, 1)
        check(update, round=1, layout=state.theta.layout, channels=strategy.update_channels)
        fold.add(update)
    closed: ServerState = strategy.close(state, fold)
    return arrays_of(closed.theta)


def product(tensors: Mapping[str, Array], layer: str) -> Array:
    return SCALE * tensors[b_of(layer)] @ tensors[a_of(layer)]


def mean_of_products(sites: dict[int, dict[str, Array]], layer: str) -> Array:
    """Σ pᵢ·s·BᵢAᵢ."""
    total = sum(WEIGHTS[site] for site in sites)
    return np.sum([WEIGHTS[site] / total * product(own, layer) for site, own in sites.items()], axis=0)


def error(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def trained(theta: dict[str, Array], part: str, number: int, *, absent: int | None) -> dict[int, dict[str, Array]]:
    """Sites' tensors after a round in which only the tensors of this part moved, each by a draw of its own."""
    sites = {}
    for site in range(len(WEIGHTS)):
        if site != absent:
            step = pairs(100 * number + site)
            sites[site] = {n: value + step[n] * has_part(n, part) for n, value in theta.items()}
    return sites


def test_ffa_lora_averages_the_products_exactly() -> None:
    theta = pairs(0, b=False)
    frozen = {name: value for name, value in theta.items() if has_part(name, FFALoRA.frozen)}
    assert len(frozen) == len(LAYERS)
    for number in (1, 2, 3):
        sites = trained(theta, "lora_B", number, absent=2 if number == 2 else None)
        sent = {name: value for name, value in theta.items() if name not in frozen}
        after = average(FFALoRA(), sent, sites)
        assert after.keys() == sent.keys()
        theta = {**frozen, **after}
        for layer in LAYERS:
            assert error(product(theta, layer), mean_of_products(sites, layer)) < 1e-12


def test_rolora_averages_the_products_exactly_in_every_round_and_both_halves_learn() -> None:
    start = theta = pairs(0, b=False)
    for number in (1, 2, 3, 4):
        part = ("lora_B", "lora_A")[(number - 1) % 2]
        sites = trained(theta, part, number, absent=2 if number == 2 else None)
        before, theta = theta, average(RoLoRA(), theta, sites)
        for layer in LAYERS:
            assert error(product(theta, layer), mean_of_products(sites, layer)) < 1e-12
        for name, value in theta.items():
            assert np.array_equal(value, before[name]) is not has_part(name, part)
    assert all(error(theta[a_of(layer)], start[a_of(layer)]) > 0.1 for layer in LAYERS)


def test_the_plain_average_of_both_halves_is_another_matrix() -> None:
    theta = pairs(0)
    sites = {site: {n: v + pairs(100 + site)[n] for n, v in theta.items()} for site in (0, 1, 3)}
    after = average(FedAvg(), theta, sites)
    for layer in LAYERS:
        assert error(product(after, layer), mean_of_products(sites, layer)) > 0.05


# --- a half that rests --------------------------------------------------------------------------------------------


class Slope(GradientObjective):
    """A gradient of its own for each tensor, the same in every step, whatever the data."""

    name = "slope"

    def __init__(self, trainables: Trainables) -> None:
        super().__init__()
        self.trainables = trainables

    def backward(self, language_model: LanguageModel, batch: batches.Batch, scale: float) -> float:
        for name, gradient in self.trainables.gradients.items():
            draw = torch.Generator().manual_seed(len(name) + ord(name[-1]))
            slope = torch.randn(gradient.shape, generator=draw, dtype=torch.float64)
            gradient.add_(slope * (scale * batch.num_label_tokens))
        return 1.0


class Pair(nn.Module):
    """Parameters named as peft names them: `lora_A` 3 × 5 and `lora_B` 7 × 3, in float64, or one of them."""

    def __init__(self, parts: str = "AB") -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = {"A": (3, 5), "B": (7, 3)}
        values = {letter: torch.randn(shape, generator=draw, dtype=torch.float64) for letter, shape in shapes.items()}
        for letter in parts:
            setattr(self, f"lora_{letter}", nn.ParameterDict({"x": nn.Parameter(values[letter])}))


def trained_pair(parts: str, change: Callable[[NamedTensors], Any], **settings: Any) -> tuple[NamedTensors, Any]:
    """θᵢ after five steps along the slopes, and the correction that was used."""
    module = Pair(parts)
    language_model: Any = SimpleNamespace(model=module, device=torch.device("cpu"))
    who = Participant(language_model, Trainables(module))
    used = change(who.trainables.values.clone())
    spec = TrainingSpec(batch_size=2, micro_batch_size=1, **settings)
    tokens: Tokens = examples((2, 1), (2, 4))
    Slope(who.trainables).work(who, LocalWork(tokens, spec, lr=0.05, steps=5, seed=0, correction=used))
    return who.trainables.values, used


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "clip_norm": 0.5},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "clip_norm": 0.5},
    "adamw, no clipping": {"optimizer": "adamw", "weight_decay": 0.1, "clip_norm": None},
}


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize(("round", "moves", "rests"), [(1, "B", "A"), (2, "A", "B"), (3, "B", "A")])
def test_a_half_rests_without_moving_a_bit_and_the_other_moves_as_if_it_were_alone(
    settings: dict[str, Any], round: int, moves: str, rests: str
) -> None:
    spec = RoLoRA().correction()
    start = Trainables(Pair()).values
    both, used = trained_pair("AB", lambda theta: correction(spec, theta, {}, {}, round=round), **settings)
    alone, _ = trained_pair(moves, lambda theta: None, **settings)
    moving, resting = f"lora_{moves}.x", f"lora_{rests}.x"
    assert torch.equal(both[resting], start[resting])
    # clipping sums the squares in another order where zeros stand between them
    torch.testing.assert_close(both[moving], alone[moving], rtol=1e-12, atol=0)
    assert not torch.allclose(both[moving], start[moving], rtol=1e-2)
    delta = NamedTensors(start.layout, {d: both.flats[d] - start.flats[d] for d in start.flats})
    assert used.finish(delta, lr=0.05, steps=5) == ({}, {})
    assert not delta[resting].any()


def test_weight_decay_would_move_the_resting_half() -> None:
    """What `settle` is for: a zero gradient alone does not keep a tensor where it is."""

    class Forgetful(Freeze):
        def settle(self, values: NamedTensors) -> None:
            pass

    start = Trainables(Pair()).values
    values, used = trained_pair("AB", lambda t: Forgetful(t, ["lora_A", "lora_B"], 1), **OPTIMIZERS["adamw"])
    assert not torch.equal(values["lora_A.x"], start["lora_A.x"])
    delta = NamedTensors(start.layout, {d: values.flats[d] - start.flats[d] for d in start.flats})
    with pytest.raises(SiteError, match=r"trained 'lora_A.x', which rests") as refused:
        used.finish(delta, lr=0.05, steps=5)
    assert "settle" in refused.value.hint


def test_what_rests_must_be_half_of_every_pair_in_rounds_from_one_on() -> None:
    theta = NamedTensors.of({"x.lora_A.w": torch.zeros(2, 3), "x.lora_magnitude_vector.w": torch.zeros(3)})
    with pytest.raises(SiteError, match=r"'x\.lora_magnitude_vector\.w' is not one of them"):
        correction(RoLoRA().correction(), theta, {}, {}, round=1)
    with pytest.raises(ValueError, match="round 0"):
        correction(RoLoRA().correction(), Trainables(Pair()).values, {}, {})
    with pytest.raises(SiteError, match="not one of them"):
        correction({"kind": "freeze", "in_turn": []}, Trainables(Pair()).values, {}, {}, round=1)


@pytest.mark.parametrize("spec", [{"kind": "ditto"}, {"kind": ""}, {"kind": None}, {}])
def test_an_unknown_correction_is_refused(spec: dict[str, Any]) -> None:
    theta = Trainables(Pair()).values
    with pytest.raises(SiteError, match=f"correction {spec.get('kind')!r}, which is not known here") as refused:
        correction(spec, theta, {}, {}, round=1)
    assert "version" in refused.value.hint


def test_known_corrections_are_found_by_their_kind() -> None:
    theta = Trainables(Pair()).values
    specs = {"none": {}, "prox": {"mu": 0.1}, "scaffold": {}, "freeze": {"in_turn": ["lora_A", "lora_B"]}}
    kinds = {
        kind: type(correction({"kind": kind, **more}, theta, {"control": theta}, {}, round=1))
        for kind, more in specs.items()
    }
    assert kinds == {"none": NoCorrection, "prox": Prox, "scaffold": Scaffold, "freeze": Freeze}


# --- the bench ----------------------------------------------------------------------------------------------------


def bench_of(make_recipe: MakeRecipe, strategy: str, **sections: Any) -> Bench:
    return build_bench(make_recipe(federation={"rounds": 2, "strategy": strategy}, **sections))


def halves(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of every A and of every B, by parameter name."""
    copies = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}
    found = tuple({n: t for n, t in copies.items() if has_part(n, f"lora_{letter}")} for letter in "AB")
    return found[0], found[1]


def same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def test_the_frozen_half_is_not_in_the_layout_and_is_what_plain_lora_starts_from(make_recipe: MakeRecipe) -> None:
    frozen, plain = bench_of(make_recipe, "ffa-lora"), bench_of(make_recipe, "fedavg")
    a, b = halves(frozen.model)
    assert set(frozen.theta) == set(b)
    assert set(plain.theta) == {*a, *b}
    assert same(frozen.frozen, a)
    assert same(a, {name: plain.theta[name] for name in a})
    assert frozen.theta.layout.num_bytes == 4 * sum(tensor.numel() for tensor in b.values())
    assert not plain.frozen
    assert not plain.must_match_too
    assert {n for n, p in frozen.model.named_parameters() if p.requires_grad} == set(b)


def test_no_arm_trains_the_frozen_half(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Weight decay and the base arm, behind which peft would make the whole adapter trainable again."""
    bench = bench_of(make_recipe, "ffa-lora", training={"weight_decay": 0.5})
    a, b = halves(bench.model)
    with adapter_off(bench.model):
        pass
    assert {n for n, p in bench.model.named_parameters() if p.requires_grad} == set(b)
    task = ChainTask("c", "centralised", SITES, ((1, 0.01, 2), (2, 0.01, 2)), SITES, SITES, "chain")
    TaskWork(bench, tmp_path, lambda _: None).chain(task)
    after_a, after_b = halves(bench.model)
    assert same(after_a, a)
    assert not any(torch.equal(after_b[name], b[name]) for name in b)
    assert all(parameter.grad is None for name, parameter in bench.model.named_parameters() if name in a)


def test_an_adapter_on_an_embedding_cannot_be_frozen_by_halves(make_recipe: MakeRecipe) -> None:
    model = {"adapter": {"r": 2, "targets": ["embed_tokens", "q_proj"]}}
    with pytest.raises(ModelError, match="a pair on an embedding") as refused:
        bench_of(make_recipe, "ffa-lora", model=model)
    assert "fedavg" in refused.value.hint
    with pytest.raises(SiteError, match=r"'[^']*lora_embedding_A[^']*' is not one of them"):
        correction(RoLoRA().correction(), bench_of(make_recipe, "rolora", model=model).theta, {}, {}, round=1)


@pytest.mark.parametrize("kind", ["dora", "ia3", "prompt", "full"])
@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_adapters_that_are_not_pairs_are_refused_before_anything_starts(
    make_recipe: MakeRecipe, strategy: str, kind: str
) -> None:
    recipe = make_recipe(federation={"strategy": strategy}, model={"adapter": {"kind": kind}})
    with pytest.raises(RecipeError, match=f"{strategy!r} does not go with adapters other than lora") as refused:
        check_methods(recipe)
    assert "rslora, or the strategy fedavg" in refused.value.hint


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_adapters_of_pairs_are_accepted(make_recipe: MakeRecipe, strategy: str, kind: str) -> None:
    check_methods(make_recipe(federation={"strategy": strategy}, model={"adapter": {"kind": kind}}), network=True)


def test_a_part_that_the_adapter_does_not_have_is_named(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ModelError, match="freezes lora_A, which this adapter does not have") as refused:
        bench_of(make_recipe, "ffa-lora", model={"adapter": {"kind": "ia3"}})
    assert "lora" in refused.value.hint


# --- whole runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """A finished run of two rounds or three, with weight decay and clipping."""

    recipe: Recipe
    folder: Path
    metrics: dict[str, Any]

    def adapter(self, round: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every A and every B that the run kept of a round, under the names of the model's parameters."""
        raw = load_file(self.folder / "rounds" / f"{round:04d}" / ADAPTER)
        named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in raw.items()}
        return {n: t for n, t in named.items() if has_part(n, "lora_A")}, {
            n: t for n, t in named.items() if has_part(n, "lora_B")
        }


SECTIONS: dict[str, Any] = {
    "training": {"weight_decay": 0.1, "clip_norm": 0.5},
    "evaluation": {"controls": ["base", "local"]},
}


@pytest.fixture
def done(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Done]:
    def carried_out(strategy: str, rounds: int = 2, **sections: Any) -> Done:
        recipe = make_recipe(**{**SECTIONS, **sections, "federation": {"rounds": rounds, "strategy": strategy}})
        folder = tmp_path / strategy
        return Done(recipe, folder, run(recipe, folder))

    return carried_out


def test_a_run_of_ffa_lora_leaves_a_whole_adapter_with_the_first_a_and_sends_b_alone(
    done: Callable[..., Done],
) -> None:
    from peft import PeftModel

    found = done("ffa-lora")
    bench = build_bench(found.recipe)
    start_a, start_b = halves(bench.model)
    for number in (1, 2):
        a, b = found.adapter(number)
        assert same(a, start_a)
        assert b.keys() == start_b.keys()
        assert all(tensor.any() for tensor in b.values())
    b_bytes = sum(4 * tensor.numel() for tensor in start_b.values())
    assert [one["bytes_up"] for one in found.metrics["rounds"]] == [len(SITES) * b_bytes] * 2
    assert [one["bytes_down"] for one in found.metrics["rounds"]] == [len(SITES) * b_bytes] * 2
    losses = [sum(p["sites"].values()) for p in found.metrics["arms"]["federated"]["rounds"]]
    assert losses[-1] < losses[0] - 0.05

    base = load_base(found.recipe.model, torch.device("cpu")).model
    opened = PeftModel.from_pretrained(base, str(found.folder / "adapter")).eval()
    bench.participant.trainables.values.copy_(NamedTensors.of(found.adapter(2)[1]))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        outputs, expected = opened(input_ids=ids).logits, bench.model.eval()(input_ids=ids).logits
        with bench.model.disable_adapter():
            without = bench.model(input_ids=ids).logits
    assert torch.equal(outputs, expected)
    assert not torch.allclose(outputs, without, atol=1e-3)


def test_commands_open_the_result_of_a_run_with_a_frozen_half(done: Callable[..., Done], tmp_path: Path) -> None:
    found = done("ffa-lora")
    scored = call("evaluate", found.folder, "--json")
    assert scored.code == 0, scored.err
    final = found.metrics["arms"]["federated"]["sites"]
    for site, one in scored.json["sites"].items():
        assert one["loss"] == pytest.approx(final[site]["loss"], rel=1e-6)
    answered = call("chat", found.folder, "-p", "what helps", "--max-new-tokens", 2)
    assert answered.code == 0, answered.err
    exported = call("export", found.folder, tmp_path / "exported")
    assert exported.code == 0, exported.err
    assert (tmp_path / "exported" / ADAPTER).read_bytes() == (found.folder / "adapter" / ADAPTER).read_bytes()
    merged = call("export", found.folder, tmp_path / "merged", "--merge")
    assert merged.code == 0, merged.err


def test_a_run_of_rolora_moves_the_halves_in_turn(done: Callable[..., Done]) -> None:
    found = done("rolora", rounds=3)
    before = halves(build_bench(found.recipe).model)
    for number in (1, 2, 3):
        after = found.adapter(number)
        moves, rests = (1, 0) if number % 2 else (0, 1)
        assert same(after[rests], before[rests]), number
        assert not any(torch.equal(tensor, before[moves][name]) for name, tensor in after[moves].items()), number
        before = after
    both = sum(4 * tensor.numel() for half in before for tensor in half.values())
    assert [one["bytes_up"] for one in found.metrics["rounds"]] == [len(SITES) * both] * 3


def test_the_first_round_of_rolora_is_that_of_ffa_lora(done: Callable[..., Done]) -> None:
    training = {"weight_decay": 0.1, "clip_norm": None}
    (a, b), (other_a, other_b) = (done(name, training=training).adapter(1) for name in ("rolora", "ffa-lora"))
    assert same(a, other_a)
    assert b.keys() == other_b.keys()
    for name, tensor in b.items():
        torch.testing.assert_close(tensor, other_b[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
@pytest.mark.kills
def test_a_killed_run_goes_on_to_the_same_bits(make_recipe: MakeRecipe, tmp_path: Path, strategy: str) -> None:
    recipe = make_recipe(
        federation={"rounds": 3, "strategy": strategy}, training={"weight_decay": 0.1}, engine={"workers": 2}
    )
    folders = tmp_path / "killed", tmp_path / "undisturbed"
    run(recipe, folders[1])
    with Nursery(tmp_path / "log") as nursery:
        for death in (
            Death("fold.add", "after", 2),
            Death("journal.commit", "after"),
            Death("fold.add", "before"),
            None,
        ):
            pid = nursery.start(recipe, folders[0], resume=(folders[0] / "state.sqlite").exists(), death=death)
            assert nursery.wait(pid) == (-9 if death else 0), nursery.log.read_text()
    for part in ("rounds/0001", "rounds/0002", "rounds/0003", "adapter"):
        killed, undisturbed = ((folder / part / ADAPTER).read_bytes() for folder in folders)
        assert killed == undisturbed, part
    digests = [json.loads((folder / "metrics.json").read_text())["adapter"]["digest"] for folder in folders]
    assert digests[0] == digests[1]


# --- over a network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_sites_of_their_own_have_the_bits_of_the_in_process_engine(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path, strategy: str
) -> None:
    recipe = make_recipe(federation={"strategy": strategy}, training={"weight_decay": 0.1, "steps": 2})
    bench, method = build_bench(recipe), resolve("strategy", strategy)(num_sites=3)
    job = job_of(recipe, must_match={**handshake(bench), **bench.must_match_too})
    sites = {name: workshop_of(tmp_path / f"at-{name}", small_data, name=name, partition=name) for name in SITES}
    for site in sites.values():
        assert site.join(job)["layout"] == bench.theta.layout.digest
    with engine_over(bench, method, tmp_path / "run") as engine:
        state = method.init(bench.theta.clone())
        for number in (1, 2):
            state = one_round(number, state, method, engine, sites, bench)


def test_a_site_that_draws_another_frozen_half_is_refused(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(federation={"strategy": "ffa-lora"})
    expected = bench_of(make_recipe, "ffa-lora", seed=1)
    here = build_bench(recipe)
    job = job_of(recipe, must_match={**handshake(expected), **expected.must_match_too})
    site = workshop_of(tmp_path / "site", small_data, partition="north")
    with pytest.raises(SiteError, match="what the job was made with; frozen tensors: the job has ") as refused:
        site.join(job)
    assert expected.frozen.digest() in refused.value.message
    assert here.frozen.digest() in refused.value.message


def test_a_site_need_not_have_the_code_of_a_strategy_that_freezes_nothing(make_recipe: MakeRecipe) -> None:
    bench = bench_of(make_recipe, "not_installed_here:Strategy")
    assert bench.theta.layout == bench_of(make_recipe, "fedavg").theta.layout

"""Each method against a few lines of NumPy written from its formula, and what an update must be to reach it.

The rounds: four sites with unequal weights, one of them missing in the second round; float32, bfloat16, float16,
float64 and int64 tensors, among them non-square matrices and a scalar.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from commonweight import registry
from commonweight.errors import RecipeError, RoundError, UpdateRefused
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.strategies.base import ServerState, Strategy, SumStrategy, WeightedSum
from commonweight.strategies.diloco import DiLoCo
from commonweight.strategies.fedadagrad import FedAdagrad
from commonweight.strategies.fedadam import FedAdam
from commonweight.strategies.fedavg import FedAvg
from commonweight.strategies.fedavgm import FedAvgM
from commonweight.strategies.fedprox import FedProx
from commonweight.strategies.fedyogi import FedYogi
from commonweight.strategies.scaffold import Scaffold
from commonweight.strategies.update import Update, check

Array = NDArray[np.float64]
Seen = list[tuple[float, Array, Array]]  # a round: (weight, Δᵢ, cᵢ⁺ − cᵢ) of the sites that answered

NUM_ROUNDS = 4
WEIGHTS = (3.0, 1.0, 7.5, 20.0)
NUM_SITES = 6  # two of them are never invited
BUILT_IN = ["diloco", "fedadagrad", "fedadam", "fedavg", "fedavgm", "fedprox", "fedyogi", "scaffold"]

# θ is rounded to its own dtype once a round, by half a unit in the last place (2⁻⁹ of the value in bfloat16, 2⁻¹² in
# float16); float32 arithmetic over 4 rounds of 4 sites is some 20 roundings of 2⁻²⁴
THETA_RTOL = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: NUM_ROUNDS * 2.0**-12,
    torch.bfloat16: NUM_ROUNDS * 2.0**-9,
}
# moments and sums are never narrower than float32
SLOT_RTOL = {dtype: 1e-13 if dtype is torch.float64 else 2e-6 for dtype in THETA_RTOL}


def initial() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "a.lora_A.weight": torch.randn(3, 5, generator=draw),
        "a.lora_B.weight": torch.randn(7, 3, generator=draw).to(torch.bfloat16),
        "scale": torch.randn((), generator=draw),
        "half": torch.randn(6, generator=draw).to(torch.float16),
        "double": torch.randn(2, 3, 2, generator=draw, dtype=torch.float64),
        "ids": torch.tensor([3, -1, 2**40]),
    }


def random_like(layout: Layout, seed: int) -> NamedTensors:
    """About as large as θ, so that an error in a rule is not lost in bfloat16's rounding."""
    draw = torch.Generator().manual_seed(seed)
    made = NamedTensors.zeros(layout)
    for tensor in made.values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64) * 0.5 + 0.1)
    return made


def update_of(
    delta: NamedTensors, *, weight: float = 1.0, round: int = 1, site: str = "s", **channels: NamedTensors
) -> Update:
    return Update(site, round, {"delta": delta, **channels}, weight, num_examples=1, num_label_tokens=1, num_steps=1)


def rounds_of(strategy: Strategy, layout: Layout) -> Iterator[list[Update]]:
    for number in range(1, NUM_ROUNDS + 1):
        cohort = []
        for site, weight in enumerate(WEIGHTS):
            if (number, site) == (2, 2):
                continue
            parts = {
                channel: random_like(layout, 1000 * number + 10 * site + index)
                for index, channel in enumerate(strategy.update_channels)
            }
            cohort.append(update_of(parts.pop("delta"), weight=weight, round=number, site=f"site{site}", **parts))
        yield cohort


def run(strategy: Strategy, state: ServerState, rounds: Sequence[Sequence[Update]]) -> ServerState:
    for number, cohort in enumerate(rounds, 1):
        fold = strategy.open(state)
        for update in cohort:
            check(update, round=number, layout=state.theta.layout, channels=strategy.update_channels)
            fold.add(update)
        state = strategy.close(state, fold)
    return state


def as_array(tensor: Tensor) -> Array:
    return tensor.to(torch.float64).numpy().copy()


def seen_of(rounds: Sequence[Sequence[Update]], name: str) -> list[Seen]:
    return [
        [(u.weight, as_array(u.delta[name]), as_array(u.channels.get("control", u.delta)[name])) for u in cohort]
        for cohort in rounds
    ]


def mean(seen: Seen) -> Array:
    total: Array = np.sum([w * d for w, d, _ in seen], axis=0)
    return total / sum(w for w, _, _ in seen)


# the rules, each from its formula: (θ₀, rounds, options) → (θ, slots)


def numpy_fedavg(x: Array, rounds: list[Seen], o: Mapping[str, float]) -> tuple[Array, dict[str, Array]]:
    for seen in rounds:
        x = x + mean(seen)
    return x, {}


def numpy_fedavgm(x: Array, rounds: list[Seen], o: Mapping[str, float]) -> tuple[Array, dict[str, Array]]:
    m = np.zeros_like(x)
    for seen in rounds:
        m = o["momentum"] * m + mean(seen)
        x = x + o["lr"] * m
    return x, {"m": m}


def numpy_fedadagrad(x: Array, rounds: list[Seen], o: Mapping[str, float]) -> tuple[Array, dict[str, Array]]:
    v = np.full_like(x, o["tau"] ** 2)
    for seen in rounds:
        d = mean(seen)
        v = v + d**2
        x = x + o["lr"] * d / (np.sqrt(v) + o["tau"])
    return x, {"v": v}


def numpy_fedadam(x: Array, rounds: list[Seen], o: Mapping[str, float]) -> tuple[Array, dict[str, Array]]:
    m, v = np.zeros_like(x), np.full_like(x, o["tau"] ** 2)
    for seen in rounds:
        d = mean(seen)
        m = o["beta1"] * m + (1 - o["beta1"]) * d
        v = o["beta2"] * v + (1 - o["beta2"]) * d**2
        x = x + o["lr"] * m / (np.sqrt(v) + o["tau"])
    return x, {"m": m, "v": v}


def numpy_fedyogi(x: Array, rounds: list[Seen], o: Mapping[str, float]) -> tuple[Array, dict[str, Array]]:
    m, v = np.zeros_like(x), np.full_like(x, o["tau"] ** 2)
    for seen in rounds:
        d = mean(seen)
        m = o["beta1"] * m + (1 - o["beta1"]) * d
        v = v - (1 - o["beta2"]) * d**2 * np.sign(v - d**2)
        x = x + o["lr"] * m / (np.sqrt(v) + o["tau"])
    return x, {"m": m, "v": v}


def numpy_diloco(x: Array, rounds: list[Seen], o: Mapping[str, float]) -> tuple[Array, dict[str, Array]]:
    b = np.zeros_like(x)
    for seen in rounds:
        g = -mean(seen)
        b = o["momentum"] * b + g
        x = x - o["lr"] * (g + o["momentum"] * b)
    return x, {"m": -b}


def numpy_scaffold(x: Array, rounds: list[Seen], o: Mapping[str, float]) -> tuple[Array, dict[str, Array]]:
    c = np.zeros_like(x)
    for seen in rounds:
        x = x + o["lr"] * mean(seen)
        c = c + sum(change for _, _, change in seen) / NUM_SITES
    return x, {"control": c}


Rule = Callable[[Array, list[Seen], Mapping[str, float]], tuple[Array, dict[str, Array]]]
ADAPTIVE = {"lr": 0.3, "beta1": 0.8, "beta2": 0.9, "tau": 0.05}
CASES: list[tuple[type[Strategy], dict[str, float], Rule]] = [
    (FedAvg, {}, numpy_fedavg),
    (FedProx, {"mu": 0.1}, numpy_fedavg),
    (FedAvgM, {"lr": 0.8, "momentum": 0.6}, numpy_fedavgm),
    (FedAdagrad, {"lr": 0.3, "tau": 0.05}, numpy_fedadagrad),
    (FedAdam, ADAPTIVE, numpy_fedadam),
    (FedYogi, ADAPTIVE, numpy_fedyogi),
    (DiLoCo, {"lr": 0.7, "momentum": 0.9}, numpy_diloco),
    (Scaffold, {"lr": 0.5}, numpy_scaffold),
]


def built(kind: type[Strategy], options: Mapping[str, Any]) -> Strategy:
    return kind(kind.Options(**options), num_sites=NUM_SITES)


@pytest.mark.parametrize(("kind", "options", "rule"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_rule_against_numpy(kind: type[Strategy], options: dict[str, float], rule: Rule) -> None:
    strategy = built(kind, options)
    start = NamedTensors.of(initial())
    rounds = list(rounds_of(strategy, start.layout))
    state = run(strategy, strategy.init(start.clone()), rounds)

    for name, entry in start.layout.by_name.items():
        if not entry.dtype.is_floating_point:
            continue
        theta, slots = rule(as_array(start[name]), seen_of(rounds, name), options)
        largest = np.abs(theta).max() + np.abs(as_array(start[name])).max()
        np.testing.assert_allclose(as_array(state.theta[name]), theta, rtol=0, atol=THETA_RTOL[entry.dtype] * largest)
        assert set(state.slots) == set(slots)
        for slot, expected in slots.items():
            atol = SLOT_RTOL[entry.dtype] * np.abs(expected).max()
            np.testing.assert_allclose(as_array(state.slots[slot][name]), expected, rtol=0, atol=atol, err_msg=slot)


@pytest.mark.parametrize(("kind", "options", "rule"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_dtypes_and_integers_stay(kind: type[Strategy], options: dict[str, float], rule: Rule) -> None:
    strategy = built(kind, options)
    start = NamedTensors.of(initial())
    state = run(strategy, strategy.init(start.clone()), list(rounds_of(strategy, start.layout)))
    assert state.theta.layout == start.layout
    assert {dtype: flat.dtype for dtype, flat in state.theta.flats.items()} == {d: d for d in start.layout.numels}
    assert torch.equal(state.theta["ids"], start["ids"])
    for slot in state.slots.values():
        assert not slot["ids"].any()
        assert slot["a.lora_B.weight"].dtype == torch.float32
        assert slot["double"].dtype == torch.float64


@pytest.mark.parametrize(("kind", "options", "rule"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_resuming_from_a_copied_state_gives_the_same_bits(
    kind: type[Strategy], options: dict[str, float], rule: Rule
) -> None:
    strategy = built(kind, options)
    start = NamedTensors.of(initial())
    rounds = [[as_first_round(update) for update in cohort] for cohort in rounds_of(strategy, start.layout)]
    straight = strategy.init(start.clone())
    for cohort in rounds:
        straight = run(strategy, straight, [cohort])

    resumed = strategy.init(start.clone())
    for cohort in rounds:
        copied = ServerState(resumed.theta.clone(), {name: slot.clone() for name, slot in resumed.slots.items()})
        resumed = run(built(kind, options), copied, [cohort])
    assert resumed.theta.digest() == straight.theta.digest()
    assert {n: s.digest() for n, s in resumed.slots.items()} == {n: s.digest() for n, s in straight.slots.items()}


def as_first_round(update: Update) -> Update:
    return dataclasses.replace(update, round=1)


@pytest.mark.parametrize("kind", [FedAdagrad, FedAdam, FedYogi])
def test_second_moments_start_at_tau_squared(kind: type[Strategy]) -> None:
    state = built(kind, {"tau": 0.05}).init(NamedTensors.of(initial()))
    for name in ("a.lora_A.weight", "a.lora_B.weight", "half"):
        assert torch.equal(state.slots["v"][name], torch.full_like(state.slots["v"][name], 0.05**2))
    assert not state.slots["v"]["ids"].any()


def test_diloco_is_torch_sgd_with_nesterov_momentum() -> None:
    start = torch.randn(1003, generator=torch.Generator().manual_seed(3))
    parameter = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    strategy = DiLoCo()
    state = strategy.init(NamedTensors.of({"w": start}))
    for number in range(1, 7):
        delta = random_like(state.theta.layout, number)
        parameter.grad = -delta["w"]
        sgd.step()
        state = run(strategy, state, [[update_of(delta)]])
        assert torch.equal(state.theta["w"], parameter.detach())


def test_fedprox_is_fedavg_at_the_server() -> None:
    start = NamedTensors.of(initial())
    rounds = list(rounds_of(FedAvg(), start.layout))
    average = run(FedAvg(), FedAvg().init(start.clone()), rounds)
    proximal = run(FedProx(), FedProx().init(start.clone()), rounds)
    assert average.theta.digest() == proximal.theta.digest()


def test_corrections() -> None:
    assert FedProx().correction() == {"kind": "prox", "mu": 0.01}
    assert FedProx(FedProx.Options(mu=0.3)).correction() == {"kind": "prox", "mu": 0.3}
    assert Scaffold().correction() == {"kind": "scaffold"}
    assert FedAdam().correction() == {"kind": "none"}


def test_scaffold_divides_by_all_sites() -> None:
    strategy = Scaffold(num_sites=10)
    state = strategy.init(NamedTensors.of({"w": torch.zeros(2)}))
    ones = NamedTensors.of({"w": torch.ones(2)})
    cohort = [update_of(ones, weight=weight, control=ones) for weight in (1.0, 99.0)]
    state = run(strategy, state, [cohort])
    torch.testing.assert_close(state.slots["control"]["w"], torch.full((2,), 0.2))
    assert strategy.broadcast_channels == ("control",)
    assert strategy.update_channels == ("delta", "control")


def test_scaffold_control_stays_the_mean_of_the_sites_own() -> None:
    """With partial participation: Σ of what was sent, over N, is the mean of all cᵢ."""
    strategy = Scaffold(num_sites=5)
    state = strategy.init(NamedTensors.of({"w": torch.zeros(3, 2)}))
    own = torch.zeros(5, 3, 2)
    for number, cohort in enumerate([(0, 1, 2), (3,), (1, 4), (0, 2, 3, 4)], 1):
        updates = []
        for site in cohort:
            change = random_like(state.theta.layout, 10 * number + site)
            own[site] += change["w"]
            updates.append(update_of(change, weight=site + 1.0, control=change))
        state = run(strategy, state, [updates])
    torch.testing.assert_close(state.slots["control"]["w"], own.mean(0))


def test_scaffold_refuses_more_updates_than_sites() -> None:
    strategy = Scaffold(num_sites=1)
    ones = NamedTensors.of({"w": torch.ones(2)})
    state = strategy.init(NamedTensors.of({"w": torch.zeros(2)}))
    with pytest.raises(ValueError, match="num_sites=1"):
        run(strategy, state, [[update_of(ones, control=ones)] * 2])
    assert not state.theta["w"].any()


@pytest.mark.parametrize(("kind", "options", "rule"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_an_empty_round_is_refused_and_changes_nothing(
    kind: type[Strategy], options: dict[str, float], rule: Rule
) -> None:
    strategy = built(kind, options)
    state = strategy.init(NamedTensors.of(initial()))
    before = [tensors.digest() for tensors in (state.theta, *state.slots.values())]
    with pytest.raises(ValueError, match="no update"):
        strategy.close(state, strategy.open(state))
    assert [tensors.digest() for tensors in (state.theta, *state.slots.values())] == before


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 6e4)])
def test_a_result_that_overflows_is_refused_by_name(dtype: torch.dtype, value: float) -> None:
    strategy = FedAvg()
    state = strategy.init(NamedTensors.of({"calm": torch.zeros(2), "wild": torch.full((2,), value, dtype=dtype)}))
    delta = NamedTensors.of({"calm": torch.zeros(2), "wild": torch.full((2,), value, dtype=dtype)})
    with pytest.raises(RoundError, match="'wild'"):
        run(strategy, state, [[update_of(delta, weight=10.0)]])


def test_a_moment_that_overflows_is_refused_by_name() -> None:
    """Δ² = 10⁵⁰ is not a float32: v would stay infinite and the coordinate would never move again."""
    strategy = FedAdam()
    state = strategy.init(NamedTensors.of({"w": torch.zeros(2)}))
    with pytest.raises(RoundError, match=r"'w' \(v\)"):
        run(strategy, state, [[update_of(NamedTensors.of({"w": torch.full((2,), 1e25)}))]])


def test_trainables_without_a_floating_tensor() -> None:
    state = FedAvg().init(NamedTensors.of({"ids": torch.tensor([1, 2])}))
    state = run(FedAvg(), state, [[update_of(NamedTensors.of({"ids": torch.tensor([5, 5])}))]])
    assert state.theta["ids"].tolist() == [1, 2]


def test_mean_of_equal_updates_is_that_update() -> None:
    """Exact while wᵢΔᵢ and the sum of the weights fit in 24 bits: bfloat16 deltas (8 bits), whole weights below 2¹⁶."""
    delta = NamedTensors.of({"w": torch.randn(999, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)})
    fold = WeightedSum(delta.layout, ("delta",))
    for weight in (3, 5, 7, 1000, 64_000):
        fold.add(update_of(delta, weight=weight))
    assert torch.equal(fold.mean()["w"], delta["w"].float())


def test_mean_of_equal_float32_updates_is_within_a_rounding_each() -> None:
    delta = NamedTensors.of({"w": torch.randn(999, generator=torch.Generator().manual_seed(0))})
    weights = (3.3, 5.1, 1e-3, 1e6, 17.0)
    fold = WeightedSum(delta.layout, ("delta",))
    for weight in weights:
        fold.add(update_of(delta, weight=weight))
    torch.testing.assert_close(fold.mean()["w"], delta["w"], rtol=(len(weights) + 2) * 2.0**-24, atol=0)


# the registry and the options


def test_every_name_resolves_to_a_strategy_of_that_name() -> None:
    assert set(BUILT_IN) <= set(registry.names("strategy"))
    for name in BUILT_IN:
        kind = registry.resolve("strategy", name)
        assert issubclass(kind, SumStrategy)
        assert kind.name == name
        assert kind.needs == "sum"
        assert kind.rule
        assert re.search(r"(19|20)\d\d, arXiv:\d{4}\.\d{5}$", kind.source)
        assert kind() is not None


def test_an_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(RecipeError) as caught:
        registry.resolve("strategy", "fedadagard")
    assert "'fedadagrad'" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "defaults"),
    [
        (FedAvg, {}),
        (FedAvgM, {"lr": 1.0, "momentum": 0.9}),
        (FedAdagrad, {"lr": 1e-2, "tau": 1e-3}),
        (FedAdam, {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "tau": 1e-4}),
        (FedYogi, {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "tau": 1e-4}),
        (FedProx, {"mu": 0.01}),
        (Scaffold, {"lr": 1.0}),
        (DiLoCo, {"lr": 0.7, "momentum": 0.9}),
    ],
)
def test_default_options(kind: type[Strategy], defaults: dict[str, float]) -> None:
    assert kind.Options().model_dump() == defaults
    assert kind().options == kind.Options()


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (FedAvg, {"lr": 1.0}),
        (FedAvgM, {"lr": 0}),
        (FedAvgM, {"lr": math.inf}),
        (FedAvgM, {"lr": math.nan}),
        (FedAvgM, {"momentum": 1.0}),
        (FedAvgM, {"momentum": -0.1}),
        (FedAvgM, {"momentum": math.nan}),
        (FedAvgM, {"beta": 0.9}),
        (FedAdagrad, {"tau": 0}),
        (FedAdagrad, {"tau": -1e-3}),
        (FedAdagrad, {"beta1": 0.9}),
        (FedAdam, {"beta1": 1.0}),
        (FedAdam, {"beta2": 1.0}),
        (FedAdam, {"beta2": -0.1}),
        (FedAdam, {"tau": 0}),
        (FedAdam, {"tau": math.nan}),
        (FedAdam, {"lr": "fast"}),
        (FedYogi, {"lr": -1.0}),
        (FedYogi, {"eps": 1e-8}),
        (FedProx, {"mu": -0.01}),
        (FedProx, {"mu": math.inf}),
        (FedProx, {"lr": 1.0}),
        (Scaffold, {"lr": 0}),
        (Scaffold, {"mu": 0.1}),
        (DiLoCo, {"momentum": 0}),
        (DiLoCo, {"momentum": 1}),
        (DiLoCo, {"lr": -0.7}),
    ],
)
def test_bad_options_are_refused(kind: type[Strategy], bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        kind.Options(**bad)


@pytest.mark.parametrize("name", BUILT_IN)
def test_options_are_frozen_and_described(name: str) -> None:
    options = registry.resolve("strategy", name).Options
    assert options.model_config.get("frozen")
    assert options.model_config.get("extra") == "forbid"
    for field in options.model_fields.values():
        assert field.description


# what an update must be


def layout_and_delta() -> tuple[Layout, NamedTensors]:
    theta = NamedTensors.of(initial())
    return theta.layout, random_like(theta.layout, 0)


def refuse(update: Update, layout: Layout, *words: str, round: int = 1, channels: tuple[str, ...] = ("delta",)) -> None:
    with pytest.raises(UpdateRefused) as caught:
        check(update, round=round, layout=layout, channels=channels)
    for word in ("'s'", *words):
        assert word in caught.value.message


def test_a_good_update_passes() -> None:
    layout, delta = layout_and_delta()
    check(update_of(delta), round=1, layout=layout, channels=("delta",))
    check(update_of(delta, control=delta), round=1, layout=layout, channels=("control", "delta"))


def test_another_layout_object_of_the_same_content_passes() -> None:
    _, delta = layout_and_delta()
    check(update_of(delta), round=1, layout=Layout.of(initial()), channels=("delta",))


@pytest.mark.parametrize("other", [0, 2, -1])
def test_another_round_is_refused(other: int) -> None:
    layout, delta = layout_and_delta()
    refuse(update_of(delta, round=other), layout, f"round {other} ", "round 1 is open")


def test_missing_and_unknown_channels_are_refused() -> None:
    layout, delta = layout_and_delta()
    refuse(update_of(delta), layout, "['delta']", "['control', 'delta']", channels=("delta", "control"))
    refuse(update_of(delta, control=delta), layout, "['control', 'delta']", "['delta']")


@pytest.mark.parametrize("weight", [0.0, -1.0, -0.0, math.nan, math.inf, -math.inf, 1e300, 1e-300])
def test_a_weight_that_is_no_weight_is_refused(weight: float) -> None:
    layout, delta = layout_and_delta()
    refuse(update_of(delta, weight=weight), layout, f"weight {weight}")


@pytest.mark.parametrize("weight", [1e-6, 1e15])
def test_extreme_weights_that_pass_can_be_folded(weight: float) -> None:
    layout, delta = layout_and_delta()
    check(update_of(delta, weight=weight), round=1, layout=layout, channels=("delta",))
    fold = WeightedSum(layout, ("delta",))
    fold.add(update_of(delta, weight=weight))
    torch.testing.assert_close(fold.mean()["scale"], delta["scale"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": None}, ("missing tensors ['scale']",)),
        ({"stranger": torch.zeros(2)}, ("unknown tensors ['stranger']",)),
        ({"a.lora_A.weight": torch.zeros(5, 3)}, ("'a.lora_A.weight'", "[5, 3]", "[3, 5]")),
        ({"scale": torch.zeros(1)}, ("'scale'", "[1]", "[]")),
        ({"half": torch.zeros(6, dtype=torch.bfloat16)}, ("'half'", "torch.bfloat16", "torch.float16")),
        ({"ids": torch.zeros(3)}, ("'ids'", "torch.float32", "torch.int64")),
    ],
)
def test_other_names_shapes_and_dtypes_are_refused(change: dict[str, Tensor | None], words: tuple[str, ...]) -> None:
    changed = {name: tensor for name, tensor in (initial() | change).items() if tensor is not None}
    refuse(update_of(NamedTensors.of(changed)), Layout.of(initial()), "'delta'", *words)


def test_a_mismatch_in_another_channel_names_it() -> None:
    layout, delta = layout_and_delta()
    control = NamedTensors.of({"scale": torch.zeros(())})
    refuse(update_of(delta, control=control), layout, "'control'", "missing", channels=("delta", "control"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["a.lora_A.weight", "a.lora_B.weight", "scale", "half", "double"])
def test_nan_and_infinity_are_refused_by_name(name: str, bad: float) -> None:
    layout, delta = layout_and_delta()
    delta[name].view(-1)[-1] = bad
    refuse(update_of(delta), layout, f"{name!r} (delta)")
    clean = random_like(layout, 1)
    refuse(update_of(clean, control=delta), layout, f"{name!r} (control)", channels=("delta", "control"))


def test_large_finite_values_whose_sum_overflows_are_accepted() -> None:
    layout, delta = layout_and_delta()
    for dtype, flat in delta.floating():
        flat.fill_(torch.finfo(dtype).max)
    check(update_of(delta), round=1, layout=layout, channels=("delta",))

"""Noise that sites add themselves: its distribution, its rounding, what it costs, and runs with it."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from commonweight.engines.noise_secret import SECRET_FILE
from commonweight.errors import RecipeError, SiteError
from commonweight.federation.ledger_file import LedgerFile
from commonweight.federation.secure_rounds import check_sums
from commonweight.launch import run
from commonweight.lead.submit import with_sums_decided
from commonweight.leaks.audit import claim
from commonweight.model.tensors import NamedTensors
from commonweight.privacy import distributed
from commonweight.privacy.accounting import (
    Releases,
    concentrated_epsilon,
    epsilon,
    epsilon_by_rdp,
    epsilons,
    noise_multiplier,
)
from commonweight.privacy.discrete_gaussian import PIECE, DiscreteGaussian
from commonweight.privacy.distributed import DistributedNoise
from commonweight.privacy.secure_aggregation.graph import majority
from commonweight.privacy.secure_aggregation.rows import Most, RowCode
from commonweight.privacy.site_level import clip_, planned_noise
from commonweight.privacy.spending import Budget, Spend, cost
from commonweight.recipe import Recipe
from commonweight.site.policy import JobFacts
from tests.processes import Death, Nursery
from tests.unit.command_line import call
from tests.unit.test_private_runs import theta_of

MakeRecipe = Callable[..., Recipe]
Floats = NDArray[np.float64]
OWN: dict[str, Any] = {
    "dp": "site",
    "clip": 0.5,
    "delta": 1e-5,
    "noise_multiplier": 0.3,
    "mechanism": "distributed-discrete",
    "secure_aggregation": "on",
}
FEDERATION = {"rounds": 2, "weighting": "uniform"}


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def noise(**changes: Any) -> DistributedNoise:
    return DistributedNoise.of(
        **{"bound": 0.5, "noise_multiplier": 2.0, "num_sites": 10, "colluding": 0.0, "length": 1000, **changes}
    )


def pmf(sigma: float, most: int) -> Floats:
    """Of the discrete Gaussian, from −most to most."""
    weights = np.exp(-(np.arange(-most, most + 1) ** 2) / (2 * sigma**2))
    found: Floats = weights / weights.sum()
    return found


# ---- the discrete Gaussian


@pytest.mark.parametrize("bits", [3, 22])
def test_a_million_draws_have_the_variance_and_the_tails_that_they_should(bits: int) -> None:
    draws = DiscreteGaussian(key(1), bits).values(10**6) / 2.0**bits
    assert draws.var() == pytest.approx(1, rel=0.005)
    assert abs(draws.mean()) < 0.004
    assert (draws**4).mean() == pytest.approx(3, rel=0.02)
    beyond = math.erfc((3 + 0.5 / 2**bits) / math.sqrt(2))
    assert (np.abs(draws) > 3).mean() == pytest.approx(beyond, rel=0.05)


@pytest.mark.parametrize("bits", [0, 1, 3])
def test_single_numbers_come_as_often_as_they_should(bits: int) -> None:
    draws, sigma = DiscreteGaussian(key(2), bits).values(1 << 19), 2**bits
    most = 4 * sigma
    found = np.asarray([(draws == k).mean() for k in range(-most, most + 1)])
    expected = pmf(sigma, 20 * sigma)[20 * sigma - most : 20 * sigma + most + 1]
    assert (np.abs(found - expected) < 5 * np.sqrt(expected / len(draws))).all()


def test_the_same_key_gives_the_same_noise_modulo_the_ring_and_another_key_other_noise() -> None:
    length = PIECE + 17
    row = np.full(length, 2**32 - 1, dtype=np.uint32)
    DiscreteGaussian(key(3), 5).add_(row)
    values = DiscreteGaussian(key(3), 5).values(length)
    assert (row == (values - 1).astype(np.uint32)).all()
    other = DiscreteGaussian(key(4), 5).values(length)
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(values[:17], values[PIECE:])[0, 1]) < 0.9, "each piece has words of its own"


def test_sigmas_and_keys_that_cannot_be_are_refused() -> None:
    for bits in (-1, 32):
        with pytest.raises(ValueError, match="σ"):
            DiscreteGaussian(key(1), bits)
    with pytest.raises(ValueError, match="32"):
        DiscreteGaussian(b"short", 3).values(1)


# ---- what it costs: by brute force, in few dimensions


@pytest.mark.parametrize(("sigma", "shift"), [(1.0, 1), (1.5, 4), (8.0, 3), (8.0, 17)])
def test_divergences_of_the_discrete_gaussian_are_at_most_the_gaussians(sigma: float, shift: int) -> None:
    """Rényi divergences from the shifted one, summed up in float64; they add up over coordinates."""
    k = np.arange(-40 * int(sigma) - 60, 40 * int(sigma) + 61)
    log_p = -(k**2) / (2 * sigma**2)
    log_q = -((k - shift) ** 2) / (2 * sigma**2)
    total = math.log(np.exp(log_p).sum())
    for order in (1.25, 1.5, 2, 3.7, 8):
        terms = order * log_p + (1 - order) * log_q
        top = terms.max()
        exact = (top + math.log(np.exp(terms - top).sum()) - total) / (order - 1)
        bound = order * shift**2 / (2 * sigma**2)
        assert exact <= bound * (1 + 1e-9)
        if float(order).is_integer():
            assert exact == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize(("sigma", "count"), [(1.0, 2), (1.0, 5), (1.25, 3)])
def test_a_sum_of_discrete_gaussians_is_nearly_one(sigma: float, count: int) -> None:
    """The exact sum, by convolution, against the discrete Gaussian of its variance: within the factor that is claimed,
    at σ so small that it can be seen."""
    most = 30
    one = pmf(sigma, most)
    total = one
    for _ in range(count - 1):
        total = np.convolve(total, one)
    ideal = pmf(sigma * math.sqrt(count), most * count)
    middle = len(total) // 2
    near = slice(middle - 12, middle + 13)
    off = np.abs(np.log(total[near] / ideal[near])).max()
    claimed = 5 * count * math.exp(-(math.pi**2) * sigma**2)
    assert off <= claimed
    assert off > claimed / 1000, "not by far too much"
    assert 5 * 1e6 * math.exp(-(math.pi**2) * 8**2) < 1e-260


@pytest.mark.parametrize(("z", "count"), [(0.8, 1), (2.7, 4)])
def test_the_exact_delta_in_one_dimension_is_within_the_claim(z: float, count: int) -> None:
    """Sums of three sites at σ = 8, released `count` times: the privacy loss by convolution, δ(ε) of its tail."""
    tau = 8 * math.sqrt(3)
    shift = round(tau / z)
    z = tau / shift
    k = np.arange(-30 * 14, 30 * 14 + 1)
    p = np.exp(-(k**2) / (2 * tau**2))
    p /= p.sum()
    # the loss is linear in k: ln p(k)/p(k − shift) = shift·(shift − 2k)/2τ²
    total = p
    for _ in range(count - 1):
        total = np.convolve(total, p)
    sums = np.arange(len(total)) - len(total) // 2
    loss = shift * (count * shift - 2 * sums) / (2 * tau**2)
    for delta in (1e-3, 1e-5, 1e-7):
        claimed = epsilon(Releases(z, count, discrete=True), delta)
        exact = float((total * np.maximum(0, -np.expm1(claimed - loss))).sum())
        assert exact <= delta
        assert exact > delta / 1000


def test_it_costs_a_little_more_than_the_continuous_gaussian() -> None:
    """There the exact closed form is known, here the Rényi divergences alone; the library's accountant agrees."""
    for z, count in ((16.7, 20), (2.7, 20), (1.0, 5), (0.5, 1)):
        plan = Releases(z, count, discrete=True)
        found, continuous = epsilon(plan, 1e-5), epsilon(Releases(z, count), 1e-5)
        assert continuous < found < 1.15 * continuous
        assert found <= epsilon_by_rdp(plan, 1e-5) < 1.01 * found
        assert epsilons(plan, 2, 1e-5)[1] == pytest.approx(epsilon(Releases(z, 2 * count, discrete=True), 1e-5))
    assert epsilon(Releases(0.0, 1, discrete=True), 1e-5) == math.inf
    assert epsilon(Releases(1.0, 0, discrete=True), 1e-5) == 0.0


@settings(max_examples=25, deadline=None)
@given(rho=st.floats(1e-6, 100), delta=st.floats(1e-12, 0.1))
def test_no_order_gives_a_smaller_epsilon(rho: float, delta: float) -> None:
    orders = 1 + np.geomspace(1e-3, 1e5, 2000)
    bounds = orders * rho + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    least = max(0.0, float(bounds.min()))
    assert concentrated_epsilon(rho, delta) <= least + 1e-9
    assert concentrated_epsilon(rho, delta) == pytest.approx(least, rel=1e-3, abs=1e-6)


def test_noise_for_a_target_meets_it_just() -> None:
    for target in (1.0, 3.0, 8.0):
        z = noise_multiplier(target, 1e-5, count=20, discrete=True)
        assert epsilon(Releases(z, 20, discrete=True), 1e-5) <= target
        assert epsilon(Releases(z - 1e-3, 20, discrete=True), 1e-5) > target
        assert z > noise_multiplier(target, 1e-5, count=20)


def test_a_ledger_adds_up_what_has_closed_forms_and_what_has_not() -> None:
    own, central = Spend("site", "distributed-discrete", 2.0, count=3), Spend("site", "gaussian", 4.0, count=5)
    assert own.adjacency == "one site whose update is in the sums, or zeros in its place"
    both = cost([own, central], "site", 1e-5)
    assert both == pytest.approx(concentrated_epsilon(3 / 8 + 5 / 32, 1e-5))
    assert both > cost([Spend("site", "gaussian", 2.0, count=3), central], "site", 1e-5)
    assert cost([own], "example", 1e-5) == pytest.approx(epsilon(Releases(1.0, 3, discrete=True), 1e-5))
    # sampled steps, of which other things are known: a half of δ for each
    for steps in (Spend("example", "noisy steps", 1.0, 0.1, 10), Spend("group by p", "noisy steps", 1.0, 0.1, 10)):
        apart = cost([own], "example", 5e-6) + cost([steps], "example", 5e-6)
        assert cost([own, steps], "example", 1e-5) == pytest.approx(apart)


# ---- rounding and scale


@pytest.mark.parametrize("num_sites", [3, 10, 50, 1000])
@pytest.mark.parametrize("z", [0.3, 1.0, 16.0])
def test_the_fewest_survivors_have_the_noise_that_is_claimed_and_nothing_wraps(num_sites: int, z: float) -> None:
    code = noise(num_sites=num_sites, noise_multiplier=z, length=10**6)
    assert code.sigma * math.sqrt(majority(num_sites)) == pytest.approx(z * code.sensitivity, rel=1e-12)
    most = num_sites * (code.levels + 1) + 12 * code.sigma * math.sqrt(num_sites)
    assert most < 2**31
    assert 2 * most > 2**29, "and room is not wasted"
    assert 0.99 < code.levels / code.sensitivity < 1
    # subgaussian: in 10¹⁰ elements, 10⁴ rounds
    assert 1e14 * 2 * math.exp(-(12**2) / 2) < 1e-16


def test_whoever_may_not_add_noise_is_made_up_for() -> None:
    code, fewer = noise(), noise(colluding=0.25)
    assert (code.adding, fewer.adding) == (7, 4)
    assert fewer.sigma / fewer.sensitivity == pytest.approx(2.0 / math.sqrt(4))
    with pytest.raises(RecipeError, match="colluding"):
        DistributedNoise(0.5, 2.0, 10, 0, 1000)


@pytest.mark.parametrize("changes", [{"noise_multiplier": 1e8}, {"num_sites": 10**7}, {"length": 10**17}])
def test_a_ring_that_is_too_small_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="too small"):
        noise(**changes)


def rounded(code: DistributedNoise, values: torch.Tensor, number: int) -> tuple[bool, NDArray[np.int64]]:
    out = np.empty(len(values), dtype=np.uint32)
    fits = code._rounded([(0, values[:300]), (300, values[300:])], out, key(number))
    return fits, out.view(np.int32).astype(np.int64)


def test_rounding_is_right_in_the_mean_and_to_a_neighbour() -> None:
    code, draw = noise(num_sites=10**5, length=500), torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=draw, dtype=torch.float64)
    values *= 0.45 / values.norm()
    exact, total = values.numpy() / code.step, np.zeros(500)
    for number in range(2000):
        _, whole = rounded(code, values, number)
        assert (np.abs(whole - exact) < 1).all()
        total += whole
    share = exact - np.floor(exact)
    deviation = np.sqrt(np.maximum(share * (1 - share), 1e-3) / 2000)
    assert (np.abs(total / 2000 - exact) < 5 * deviation).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_rounded_norm_is_above_the_sensitivity(data: st.DataObject) -> None:
    """Whatever is rounded: also where rounding by chance often comes to nothing, and is done toward zero."""
    length = data.draw(st.integers(1, 600))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_SELDOM", data.draw(st.sampled_from([1e-9, 0.5, 0.999])))
        patch.setattr(distributed, "_LEAST_SHARE", 0.1)
        patch.setattr(distributed.DiscreteGaussian, "add_", lambda self, row: None)
        sites = data.draw(st.sampled_from([3, 10**4, 10**5]))
        code = noise(num_sites=sites, noise_multiplier=data.draw(st.sampled_from([0.5, 4.0])), length=length)
        draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        flat = torch.randn(length, generator=draw, dtype=torch.float64)
        if data.draw(st.booleans()):  # halves of a step, which rounding moves most
            flat = torch.ones(length, dtype=torch.float64)
        update = NamedTensors.of({"w": flat * (10 if data.draw(st.booleans()) else 1e-3)})
        clip_(update, code.bound)
        out = np.empty(length, dtype=np.uint32)
        code.encode([(0, update["w"])], out, key(data.draw(st.integers(0, 99))))
        whole = out.view(np.int32).astype(object)
        assert sum(int(k) ** 2 for k in whole) <= code.sensitivity**2


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_an_update_that_was_not_clipped_gets_no_noise_but_an_error(value: float) -> None:
    code = noise(length=3)
    with pytest.raises(SiteError, match=r"above privacy\.clip"):
        code.encode([(0, torch.tensor([value, 0.0, 0.0]))], np.zeros(3, dtype=np.uint32), key(1))


def test_a_sum_of_rows_is_that_of_updates_with_the_noise_of_all_and_tells_no_counts() -> None:
    """Independently: rows less their sites' noise, in float64, are the updates to a step each."""
    draw = torch.Generator().manual_seed(5)
    updates = [
        NamedTensors.of(
            {
                "a": torch.randn(3, 37, generator=draw) * 0.02,
                "b": torch.randn(17, 3, generator=draw).bfloat16() / 64,
                "c": torch.randn(11, generator=draw, dtype=torch.float64) * 0.02,
                "n": torch.randint(-9, 9, (4,), generator=draw),
            }
        )
        for _ in range(4)
    ]
    layout, length = updates[0].layout, 3 * 37 + 17 * 3 + 11
    for update in updates:
        clip_(update, 0.25)
    private = {**OWN, "clip": 0.25, "noise_multiplier": 1.5}
    recipe = Recipe.model_validate({"name": "x", "privacy": private, "federation": {"weighting": "uniform"}})
    code = RowCode.of(recipe, layout, 5, Most(8, 100))
    assert code.noise is not None
    assert (code.noise.length, code.noise.adding) == (length, 4)
    total, added = np.zeros(code.length, dtype=np.uint32), np.zeros(length)
    for number, update in enumerate(updates):
        row = np.empty_like(total)
        assert code.encode(update, examples=8, label_tokens=90, loss=2.0, out=row, key=key(number)) == 0
        total += row
        added += DiscreteGaussian(distributed.derived(key(number), "noise"), code.noise.bits).values(length)
    totals = code.totals(total[-4:], 4)
    assert (totals.weight, totals.examples, totals.label_tokens, totals.nats) == (4, 0, 0, 0.0)
    start = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        exact = sum(u.flats[dtype].double().numpy() for u in updates)
        out = torch.empty(len(exact), dtype=torch.float64)
        code.decode(total[start : start + len(exact)], out)
        less = out.numpy() - added[start : start + len(exact)] * code.noise.step
        assert np.abs(less - exact).max() <= 4 * code.noise.step
        start += len(exact)
    assert start == length
    # four sites' noise, of which ε counts four: z·C on the sum
    assert math.sqrt(4) * code.noise.sigma * code.noise.step == pytest.approx(1.5 * 0.25, rel=1e-4)


def test_other_updates_rounds_sites_and_scales_have_other_noise() -> None:
    code = noise()
    said = {"site": "north", "round": 1, "digest": "d"}
    purposes = {code.purpose(**{**said, **change}) for change in ({}, {"site": "south"}, {"round": 2}, {"digest": "e"})}
    purposes |= {noise(num_sites=5).purpose(**said), noise(bound=0.25).purpose(**said)}
    assert len(purposes) == 6
    assert code.purpose(**said) == noise().purpose(**said)


# ---- runs


def own(make_recipe: MakeRecipe, **changes: Any) -> Recipe:
    return make_recipe(federation=FEDERATION, privacy={**OWN, **changes})


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for _, tensor in sorted(tensors.items())])


def test_a_run_has_the_noise_of_its_sites_and_says_what_it_costs(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Against the same run with noise that nobody sees: after a round the models differ by zC/m in each element, since
    all three sites that are invited are needed."""
    metrics = run(own(make_recipe), tmp_path / "run", ledger=_ledger(tmp_path))
    run(own(make_recipe, noise_multiplier=1e-5), tmp_path / "twin")
    difference = flat(theta_of(tmp_path / "run", 1)) - flat(theta_of(tmp_path / "twin", 1))
    assert len(difference) > 500
    assert float(difference.std()) == pytest.approx(0.3 * 0.5 / 3, rel=0.15)
    assert abs(float(difference.mean())) < 0.01
    told = metrics["privacy"]
    assert (told["mechanism"], told["releases"], told["secure_sums"]) == ("distributed-discrete", 2, True)
    assert told["adjacency"] == "one site whose update is in the sums, or zeros in its place"
    assert told["epsilon"] == pytest.approx(epsilon(Releases(0.3, 2, discrete=True), 1e-5))
    assert told["assumed"].startswith("more than two thirds of the sites")
    assert claim(told)["epsilon"] == pytest.approx(epsilon(Releases(0.15, 2, discrete=True), 1e-5))
    for number, record in enumerate(metrics["rounds"], 1):
        assert (record["round"], record["train_loss"], record["label_tokens"]) == (number, None, 0)
    assert not (tmp_path / "run" / SECRET_FILE).exists(), "gone with the run's end"
    with LedgerFile(tmp_path / "ledger") as file:
        lines = file.lines()
    assert {(line.site, line.spend.mechanism, line.spend.count) for line in lines} == {
        (site, "distributed-discrete", 2) for site in ("north", "south", "west")
    }
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "with the noise of the sites in it" in report
    assert "It counts on this: more than two thirds" in report


def _ledger(folder: Path) -> Path:
    """One whose budget is just what two rounds cost."""
    with LedgerFile(folder / "ledger") as file:
        file.set_budget(Budget(unit="site", epsilon=epsilon(Releases(0.3, 2, discrete=True), 1e-5) + 1e-9, delta=1e-5))
    return folder / "ledger"


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery") / "log") as nursery:
        yield nursery


@pytest.mark.kills
def test_a_killed_round_is_summed_with_the_same_noise(
    make_recipe: MakeRecipe, tmp_path: Path, nursery: Nursery
) -> None:
    """Killed before the mean is made, and with it on the disk. Two copies of what is left come to the same model, of
    the very mean that was written."""
    recipe = make_recipe(federation={**FEDERATION, "rounds": 1}, privacy=OWN, training={"steps": 1})
    folder = tmp_path / "run"
    for place, death in enumerate((Death("private.mean", "before"), Death("write_state", "after"))):
        pid = nursery.start(recipe, folder, resume=place > 0, death=death, keep_updates_over_s=0.0)
        assert nursery.wait(pid) == -signal.SIGKILL, nursery.log.read_text()
        assert (folder / SECRET_FILE).stat().st_mode & 0o077 == 0
    (written,) = folder.glob("state/0001*")
    before = written.read_bytes()
    shutil.copytree(folder, tmp_path / "twin")
    for name in ("run", "twin"):
        assert nursery.wait(nursery.start(recipe, tmp_path / name, resume=True)) == 0, nursery.log.read_text()
    assert written.read_bytes() == before
    assert torch.equal(flat(theta_of(folder, 1)), flat(theta_of(tmp_path / "twin", 1)))


def test_a_plan_says_what_is_assumed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    target = {key: value for key, value in OWN.items() if key not in ("noise_multiplier", "secure_aggregation")}
    recipe = tmp_path / "recipe.yaml"
    values = {
        "name": "small",
        "privacy": {**target, "epsilon": 8.0, "mechanism": {"name": "distributed-discrete", "colluding": 0.1}},
        "federation": {**FEDERATION, "cohort": 10},
    }
    recipe.write_text(json.dumps(values), encoding="utf-8")
    planned = call("plan", recipe, "--json").json
    z = noise_multiplier(8.0, 1e-5, count=2, discrete=True)
    assert (planned["mechanism"], planned["noise_multiplier"]) == ("distributed-discrete", z)
    assert planned["epsilon"] == pytest.approx(8.0, rel=1e-3)
    assert planned["secure_sums"]
    assert planned["assumed"].startswith("at least 7 of 10 sites that a round invites, less 10% of those invited,")
    said = call("plan", recipe).out
    assert "add their noise and tell nobody" in said
    assert "the coordinator itself" not in said
    assert planned_noise(Recipe.model_validate(values)) == z


def test_a_site_knows_whose_noise_it_is(make_recipe: MakeRecipe) -> None:
    assert own(make_recipe).privacy.own_noise
    assert not own(make_recipe, mechanism="gaussian").privacy.own_noise
    assert JobFacts.__dataclass_fields__["own_noise"].default is False


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"secure_aggregation": "off"}, "must not be off"),
        ({"noise_multiplier": 0.0}, "needs noise"),
        ({"secure_bound": 1.0}, "`secure_bound` does nothing"),
        ({"adaptive_clip": {}}, "leave that out"),
        ({"mechanism": {"name": "distributed-discrete", "band": 2}}, "`band` does nothing with distributed-discrete"),
        ({"mechanism": {"name": "gaussian", "colluding": 0.1}}, "`colluding` does nothing with gaussian"),
        ({"mechanism": {"name": "distributed-discrete", "colluding": 0.5}}, "colluding"),
        ({"dp": "none", "clip": None, "delta": None, "noise_multiplier": None}, "`mechanism` does nothing"),
        ({"dp": "example"}, "`mechanism` is of the noise on sums"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(make_recipe: MakeRecipe, change: dict[str, Any], says: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=says):
        own(make_recipe, **change)


def test_what_does_not_go_with_it_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, ValueError), match="weighting"):
        make_recipe(privacy=OWN, federation={"weighting": "examples"})
    alone = own(make_recipe, secure_aggregation="auto")
    with pytest.raises(RecipeError, match="would not be summed securely"):
        run(alone, tmp_path / "run")
    assert with_sums_decided(alone, 3).privacy.secure_aggregation == "on"
    with pytest.raises(RecipeError, match=r"needs secure sums.*fewer than 3 sites"):
        with_sums_decided(alone, 2)
    with pytest.raises(RecipeError, match="scaffold"):
        run(make_recipe(privacy=OWN, federation={**FEDERATION, "strategy": "scaffold"}), tmp_path / "other")
    with pytest.raises(RecipeError, match="too small"):
        check_sums(own(make_recipe, noise_multiplier=1e8), 3, NamedTensors.of({"w": torch.zeros(99)}).layout)

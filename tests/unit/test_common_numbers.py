"""The same numbers of every site's update under secure sums: their algebra, their runs, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from commonweight.codec.common import CommonNumbers, common_numbers
from commonweight.codec.feedback import Coder, coder_of
from commonweight.engines.forecast import forecast, sites_of
from commonweight.federation.groups import Groups
from commonweight.federation.journal import Journal
from commonweight.federation.secure_rounds import Terms
from commonweight.federation.simulated_sums import SimulatedSums
from commonweight.launch import run
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.privacy.secure_aggregation.rows import Most, RowCode, row_layout
from commonweight.recipe import Recipe
from commonweight.recipe.compatibility import secure_sums
from commonweight.strategies.base import WeightedSum
from commonweight.strategies.update import Update

MakeRecipe = Callable[..., Recipe]
ON = {"secure_aggregation": "on"}
WEIGHTS = {"north": 3, "south": 40, "west": 8}
MOST = Most(40, 4000)


def tensors(seed: int, scale: float = 0.01) -> NamedTensors:
    """Non-square, of several dtypes, one of which is not averaged."""
    draw = torch.Generator().manual_seed(seed)
    return NamedTensors.of(
        {
            "a.lora_A": torch.randn(3, 37, generator=draw) * scale,
            "a.lora_B": torch.randn(17, 3, generator=draw) * scale,
            "b.narrow": (torch.randn(5, 9, generator=draw) * scale).bfloat16(),
            "c.wide": torch.randn(11, generator=draw, dtype=torch.float64) * scale,
            "n.ids": torch.randint(-9, 9, (4,), generator=draw),
        }
    )


def drawn(*, keep: float = 0.1, feedback: bool = True) -> dict[str, Any]:
    return {"shorten": {"name": "random-k", "keep": keep}, "error_feedback": feedback}


def recipe_of(**sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "x", "privacy": ON, "compression": drawn(), **sections})


def coder(recipe: Recipe, layout: Layout) -> Coder:
    found = coder_of(recipe.compression, layout, recipe.seed, common=True)
    assert found is not None
    return found


def numbers_of(recipe: Recipe, layout: Layout, round: int) -> CommonNumbers:
    found = common_numbers(recipe, layout, round)
    assert found is not None
    return found


def masked_sum(recipe: Recipe, round: int, sent: dict[str, NamedTensors], lost: str = "") -> NamedTensors:
    """Σ wᵢ·C(uᵢ), as a coordinator decodes it."""
    layout = next(iter(sent.values())).layout
    sums = SimulatedSums(recipe, layout)
    sums.begin(round, Groups((tuple(WEIGHTS),)), Terms(0.1, {"kind": "none"}, MOST))
    for site, delta in sent.items():
        update = Update(site, round, {"delta": delta}, WEIGHTS[site], WEIGHTS[site], 100, 2, {"loss": 1.0})
        sums.add(update)
        assert sums.num_bytes(site) == 4 * (numbers_of(recipe, layout, round).length + 4)
    sums.open(round, list(sent))
    fold = WeightedSum(layout, ("delta",))
    sums.opened[0][1].into(fold)
    assert fold.total_weight == sum(WEIGHTS[site] for site in sent)
    return fold.sums["delta"]


# ---- which numbers


def test_places_are_those_that_every_site_keeps_and_new_ones_each_round() -> None:
    """Whatever the site and its update, what the codec leaves stands at the places that the row is read by."""
    recipe, layout = recipe_of(), tensors(0).layout
    seen = []
    for round in (1, 2):
        places = {}
        for dtype, numel in layout.numels.items():
            found = [stretch for _, stretch in numbers_of(recipe, layout, round).over(dtype, 0, numel)]
            places[dtype] = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
        for site, seed in (("north", 1), ("south", 2)):
            delta, made = tensors(seed), coder(recipe, layout)
            list(made.encode({"delta": delta}, {}, made.update_seed(site, round)))
            for dtype, flat in delta.floating():
                assert flat.double().numpy().nonzero()[0].tolist() == places[dtype].tolist()
        seen.append(places[torch.float32].tolist())
    assert seen[0] != seen[1]
    assert len(seen[0]) == 17  # ⌈0.1 · 162⌉
    other = numbers_of(recipe_of(seed=1), layout, 1).over(torch.float32, 0, 162)
    assert next(other)[1].tolist() != seen[0]


def test_a_row_has_a_number_for_each_place_and_the_totals() -> None:
    recipe, layout = recipe_of(), tensors(0).layout
    length = 17 + 5 + 2  # of 162, 45 and 11
    numbers = numbers_of(recipe, layout, 1)
    assert numbers.length == length
    assert row_layout(layout, numbers).num_bytes == 4 * (length + 4)
    assert common_numbers(recipe_of(compression="none"), layout, 1) is None
    assert common_numbers(recipe_of(privacy={}), layout, 1) is None


def test_any_stretch_of_the_sum_is_the_whole_ones() -> None:
    """Read in pieces of any size, as a coordinator that combines from files does; empty ones read nothing."""
    recipe, delta = recipe_of(), tensors(1)
    code = RowCode.of(recipe, delta.layout, 3, MOST, numbers_of(recipe, delta.layout, 1))
    row = np.empty(code.length, dtype=np.uint32)
    code.encode(delta, examples=40, label_tokens=5, loss=0.0, out=row)

    def read(first: int, length: int) -> Any:
        assert length > 0
        return row[first : first + length]

    for dtype, flat in delta.floating():
        whole = torch.empty(flat.numel(), dtype=torch.float64)
        code.spread(read, dtype, 0, whole)
        for size in (1, 7, 50):
            for start in range(0, flat.numel(), size):
                piece = torch.full((min(size, flat.numel() - start),), 9.0, dtype=torch.float64)
                code.spread(read, dtype, start, piece)
                assert torch.equal(piece, whole[start : start + size])
        kept = whole.nonzero()[:, 0]
        torch.testing.assert_close(whole[kept], 40 * flat.double()[kept], rtol=0, atol=1e-6)


def test_spans_of_a_large_layout_are_read_across_their_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commonweight.codec.chain.spans.__defaults__", (40,))
    recipe, layout = recipe_of(), tensors(0).layout
    numbers = numbers_of(recipe, layout, 3)
    assert len(coder(recipe, layout).spans) > 6
    stretches = list(numbers.over(torch.float32, 0, 162))
    begins = [at for at, _ in stretches]
    assert begins == list(np.cumsum([0, *(len(places) for _, places in stretches[:-1])]))
    places = np.concatenate([places for _, places in stretches])
    assert (np.diff(places) > 0).all()
    (at, one), *more = numbers.over(torch.float32, 30, 100)
    found = np.concatenate([one, *(places for _, places in more)])
    assert found.tolist() == places[(places >= 30) & (places < 100)].tolist()
    assert at == int((places < 30).sum())


# ---- sums


def test_a_sum_is_that_of_what_sites_send_with_nothing_elsewhere() -> None:
    """In float64, beside the code: unequal weights, and a site that is away."""
    recipe, layout = recipe_of(), tensors(0).layout
    updates = {site: tensors(place) for place, site in enumerate(("north", "south", "west"))}
    for there in (list(WEIGHTS), ["north", "west", "south"]):
        found = masked_sum(recipe, 4, {site: updates[site] for site in there})
        for dtype, numel in layout.numels.items():
            if dtype.is_floating_point:
                exact = np.zeros(numel)
                for _, places in numbers_of(recipe, layout, 4).over(dtype, 0, numel):
                    for site in there:
                        exact[places] += WEIGHTS[site] * updates[site].flats[dtype].double().numpy()[places]
                np.testing.assert_allclose(found.flats[dtype].double().numpy(), exact, rtol=1e-6, atol=1e-5)


def test_without_feedback_the_mean_over_rounds_is_the_updates() -> None:
    """E = Σ wᵢΔᵢ: the mean of n rounds lies within five standard deviations, √((d/k − 1)/n)·|Σ wᵢΔᵢ|."""
    recipe, rounds = recipe_of(compression=drawn(keep=0.25, feedback=False)), 200
    layout = tensors(0).layout
    made = coder(recipe, layout)
    code = RowCode.of(recipe, layout, 3, MOST, numbers_of(recipe, layout, 1))
    assert code.bound == pytest.approx(8 * 162 / 41), "the bound is of what a site has trained, not of d/k times that"
    total = np.zeros(162)
    exact = sum(w * tensors(place)["a.lora_A"].double().numpy() for place, w in enumerate(WEIGHTS.values())).ravel()
    for round in range(1, rounds + 1):
        code = RowCode.of(recipe, layout, 3, MOST, numbers_of(recipe, layout, round))
        row = np.zeros(code.length, dtype=np.uint32)
        for place, weight in enumerate(WEIGHTS.values()):
            delta, one = tensors(place), np.empty_like(row)
            list(made.encode({"delta": delta}, {}, made.update_seed(str(place), round)))
            code.encode(delta, examples=weight, label_tokens=1, loss=0.0, out=one)
            row += one
        out = torch.empty(162, dtype=torch.float64)
        code.spread(lambda first, length, row=row: row[first : first + length], torch.float32, 0, out)  # type: ignore[misc]
        total += out.numpy()
    ratio = 162 / 41
    off = np.abs(total[:111] / rounds - exact)
    assert (off <= 5 * np.sqrt((ratio - 1) / rounds) * np.abs(exact) + 1e-4).all()


def test_with_feedback_what_was_sent_and_what_is_late_is_what_was_trained() -> None:
    """Σ sums + Σ wᵢeᵢ = Σ wᵢΔᵢ over rounds, to the ring's rounding; a site that sits a round out keeps its e."""
    recipe, layout = recipe_of(), tensors(0).layout
    made = coder(recipe, layout)
    late = {site: NamedTensors.zeros(layout, wide=True) for site in WEIGHTS}
    summed, trained = np.zeros(162), np.zeros(162)
    for round in range(1, 13):
        sent = {}
        for place, site in enumerate(WEIGHTS):
            delta = tensors(100 * round + place)
            trained += WEIGHTS[site] * delta.flats[torch.float32].double().numpy()
            list(made.encode({"delta": delta}, {"delta": late[site]}, made.update_seed(site, round)))
            sent[site] = delta
        summed += masked_sum(recipe, round, sent).flats[torch.float32].double().numpy()
    kept = sum(WEIGHTS[site] * tensors.flats[torch.float32].double().numpy() for site, tensors in late.items())
    assert np.abs(summed).max() > 0.1
    np.testing.assert_allclose(summed + kept, trained, rtol=0, atol=2e-5)


# ---- runs


def theta_of(folder: Path, round: int = 2) -> dict[str, torch.Tensor]:
    return load_file(folder / "rounds" / f"{round:04d}" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = theta_of(one), theta_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("feedback", [True, False])
def test_a_run_sends_what_was_planned_and_moves_these_numbers_alone(
    make_recipe: MakeRecipe, tmp_path: Path, feedback: bool
) -> None:
    recipe = make_recipe(privacy=ON, compression=drawn(feedback=feedback), training={"steps": 1})
    found = run(recipe, tmp_path / "run")
    numel = found["model"]["adapter_bytes"] // 4
    kept = -(-numel // 10)
    assert found["bytes"]["up"] == 2 * 3 * 4 * (kept + 4)
    assert forecast(recipe, secure=True, sites=sites_of(recipe)).moved_up == found["bytes"]["up"]
    before, after = theta_of(tmp_path / "run", 1), theta_of(tmp_path / "run", 2)
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    assert 0 < moved <= kept
    assert found["privacy"]["secure_sums"]
    assert len(list((tmp_path / "run").glob("sites/*/*.safetensors"))) == (3 if feedback else 0)


def test_any_number_of_workers_and_encryption_give_the_same_bits(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"compression": drawn(), "training": {"steps": 1}}
    run(make_recipe(privacy=ON, **sections), tmp_path / "masked")
    run(make_recipe(privacy=ON, engine={"workers": 1}, **sections), tmp_path / "one")
    assert same(tmp_path / "masked", tmp_path / "one")
    pytest.importorskip("tenseal")
    encrypted = make_recipe(privacy={"secure_aggregation": "homomorphic"}, **sections)
    found = run(encrypted, tmp_path / "encrypted")
    assert same(tmp_path / "masked", tmp_path / "encrypted")
    assert forecast(encrypted, secure=False, num_sites=3).moved_up == found["bytes"]["up"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.kills
def test_a_run_that_is_killed_ends_with_the_same_bits(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Between two rounds what is late lies at the sites, and the round's number says which numbers are next."""
    recipe = make_recipe(privacy=ON, compression=drawn(), training={"steps": 1})
    run(recipe, tmp_path / "whole")
    original, calls = Journal.commit, []

    def dies(journal: Journal, *arguments: Any) -> Any:
        calls.append(arguments)
        fatal = len(calls) == 2
        if fatal and not after:
            raise Killed
        found = original(journal, *arguments)
        if fatal:
            raise Killed
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "commit", dies)
        with pytest.raises(Killed):
            run(recipe, tmp_path / "cut")
    run(recipe, tmp_path / "cut", resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")


# ---- what is refused


@pytest.mark.parametrize(
    ("compression", "words"),
    [
        ({"shorten": "top-k"}, "top-k keeps numbers at other places, which would tell what it trained on"),
        ({"shorten": "low-rank"}, "their sum is not that of the products"),
        ({"shorten": "own.module:Mine"}, "at the same places of every site's update"),
        ({"shorten": "random-k", "round": "int8"}, "rounded already, to the fixed point of the ring"),
        ("auto", "rounded already, to the fixed point of the ring"),
        ({"shorten": "random-k", "pack": "huffman"}, "uniformly random"),
        ({"budget_mb": 1.0}, "each site chooses a codec for itself"),
    ],
)
@pytest.mark.parametrize("kind", ["on", "homomorphic"])
def test_other_codecs_are_refused_and_this_one_is_named(compression: Any, words: str, kind: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        recipe_of(compression=compression, privacy={"secure_aggregation": kind})
    assert ("random-k}" in str(error.value)) == ("budget" not in words and "for itself" not in words)


def test_groups_and_clipped_sites_are_refused() -> None:
    with pytest.raises(ValueError, match="rules over groups compare whole updates"):
        recipe_of(privacy={**ON, "secure_group_size": 3}, federation={"strategy": "median"})
    private = {**ON, "dp": "site", "clip": 1.0, "delta": 1e-5, "noise_multiplier": 1.0}
    with pytest.raises(ValueError, match="changes an update after it was clipped"):
        recipe_of(privacy=private, federation={"weighting": "uniform"})


def test_auto_is_off_with_it_and_says_how_to_turn_sums_on() -> None:
    on, why = secure_sums(recipe_of(privacy={}), 9)
    assert not on
    assert "only where privacy.secure_aggregation is on" in why
    assert secure_sums(recipe_of(), 9) == (True, "")

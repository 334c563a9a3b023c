"""Global tensors made small on their way to the sites: the algebra, what is late, who is sent what."""

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

from commonweight.codec.coded import CHOICES, LENGTHS, PAYLOADS, Packer, Payloads
from commonweight.codec.down import THETA, Down, add_to, down_of, num_bytes
from commonweight.errors import RecipeError, RoundError
from commonweight.federation.catch_up import bytes_to_catch_up, chain, still_of_use
from commonweight.launch import run
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.recipe.load import check_methods, parse_recipe
from commonweight.recipe.resolved import recipe_text
from commonweight.recipe.schema import DownSpec

MakeRecipe = Callable[..., Recipe]
STEPS: dict[str, dict[str, Any]] = {
    "sign": {"round": "sign"},
    "int8": {"round": "int8"},
    "auto": {"round": {"name": "uniform", "bits": 4, "rounding": "nearest"}, "pack": "huffman"},
    "top-k": {"shorten": {"name": "top-k", "keep": 0.1}, "round": {"name": "uniform", "bits": 4}},
    "random-k": {"shorten": {"name": "random-k", "keep": 0.3}, "round": "nf4"},
    "packed": {"pack": "huffman"},
}


def tensors(seed: int, scale: float = 1.0, *, mixed: bool = False) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    made = {"a": torch.randn(7, 13, generator=draw), "b": torch.randn(11, generator=draw), "c": torch.zeros(0, 3)}
    if mixed:
        made |= {"n": torch.randn(5, 9, generator=draw).bfloat16(), "w": torch.randn(6, generator=draw).double()}
        made["i"] = torch.randint(-9, 9, (4,), generator=draw)
    return NamedTensors.of({name: (tensor * scale).to(tensor.dtype) for name, tensor in made.items()})


def down(codec: dict[str, Any], like: NamedTensors) -> Down:
    found = down_of(DownSpec.model_validate(codec), like.layout, seed=5)
    assert found is not None
    return found


def moved(theta: NamedTensors, step: NamedTensors) -> NamedTensors:
    after = theta.clone()
    for dtype, flat in after.floating():
        flat.add_(step.flats[dtype])
    return after


def numbers(held: NamedTensors) -> np.ndarray[Any, Any]:
    return np.concatenate([flat.double().numpy() for _, flat in held.floating()])


# --- the algebra ---


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_lost_only_late(name: str, mixed: bool) -> None:
    """θ̂ + e is what the model would be by the rounds' changes alone, in NumPy; a site that adds up what it is sent has
    the bits of θ̂."""
    theta = tensors(0, mixed=mixed)
    late, way, there = NamedTensors.zeros(theta.layout, wide=True), down(STEPS[name], theta), theta.clone()
    expected = numbers(theta)
    for round in range(1, 9):
        after = moved(theta, tensors(round, 0.1, mixed=mixed))
        expected = expected + (numbers(after) - numbers(theta))
        coded, packer = list(way.follow(round, theta, after, late)), Packer(way.coder)
        for one in coded:
            packer.add(one)
        sent = packer.packed(way.seed(round))
        assert sent.layout.num_bytes == num_bytes([len(one.payload) for one in coded])
        add_to(there, way.coder, read(way, sent))
        assert there.digest() == after.digest()
        theta = after
    np.testing.assert_allclose(numbers(theta) + numbers(late), expected, rtol=2e-6, atol=2e-6)


def read(way: Down, sent: NamedTensors) -> Payloads:
    body = sent[PAYLOADS].numpy().tobytes()
    fetch = lambda start, stop: body[start:stop]  # noqa: E731
    return Payloads(way.coder, (THETA,), sent[LENGTHS].tolist(), sent[CHOICES].tolist(), len(body), fetch)


def test_what_is_late_stays_bounded() -> None:
    """Top-k leaves at most q = √(1 − k/n) of what it is given, so that of steps of norm s at most s·q/(1 − q) is late
    for ever, however many there are."""
    theta = tensors(0)
    way, late = down({"shorten": {"name": "top-k", "keep": 0.25}}, theta), NamedTensors.zeros(theta.layout, wide=True)
    largest = 0.0
    for round in range(1, 60):
        step = tensors(round, 0.1)
        largest = max(largest, float(np.linalg.norm(numbers(step))))
        after = moved(theta, step)
        for _ in way.follow(round, theta, after, late):
            pass
        theta, kept = after, math.sqrt(1 - 0.25)
        assert float(np.linalg.norm(numbers(late))) <= 1.001 * largest * kept / (1 - kept)
    standing = theta.clone()
    for round in range(60, 90):  # nothing moves any more: what is late comes in
        after = standing.clone()
        for _ in way.follow(round, standing, after, late):
            pass
        standing = after
    assert float(np.linalg.norm(numbers(late))) < 1e-3 * largest


def test_what_cannot_be_held_is_refused() -> None:
    theta = NamedTensors.of({"a": torch.full((64,), 3.3e38)})
    after = NamedTensors.of({"a": torch.full((64,), 3.4e38)})
    late = NamedTensors.zeros(theta.layout)
    late.flats[torch.float32].fill_(1e38)
    with pytest.raises(RoundError, match=r"round 3: the global tensors, as compression\.down makes them small"):
        list(down({"round": "int8"}, theta).follow(3, theta, after, late))


# --- who is sent what ---


def test_the_shortest_way_to_the_present() -> None:
    sizes = {1: 40, 2: 30, 3: 20, 4: 10}
    assert chain(sizes, 100, 4, 4) == []
    assert chain(sizes, 100, 3, 4) == [4]
    assert chain(sizes, 100, 1, 4) == [2, 3, 4]
    assert chain(sizes, 100, 0, 4) is None, "as many bytes as the whole"
    assert chain(sizes, 101, 0, 4) == [1, 2, 3, 4]
    assert chain(sizes, 100, None, 4) is None
    assert chain({1: 40, 3: 20, 4: 10}, 100, 1, 4) is None, "a difference is gone"
    assert chain(sizes, 100, 5, 4) is None, "it holds a later one"
    assert still_of_use(sizes, 100) == {2, 3, 4}
    assert still_of_use(sizes, 101) == {1, 2, 3, 4}
    assert still_of_use(sizes, 10) == set()


def test_bytes_follow_from_who_was_invited_when() -> None:
    commits: dict[int, Any] = {0: {"state": {}}}
    assert bytes_to_catch_up(commits, {"a": 100}, small=True) == {"a": 0}, "the initial tensors it makes by itself"
    cohorts = {1: "ab", 2: "a", 3: "ac", 4: "a", 5: "a", 6: "a", 7: "a"}
    for number, cohort in cohorts.items():
        commits[number] = {"state": {"down": {"bytes": 10 + number}}, "cohort": list(cohort)}
    # round 8: a holds version 6 and lacks 7's; c holds 2 and lacks 3 to 7: 75; b holds 0, as does d: 98 and no more
    assert bytes_to_catch_up(commits, dict.fromkeys("abcd", 99), small=True) == {"a": 17, "b": 98, "c": 75, "d": 98}
    assert bytes_to_catch_up(commits, dict.fromkeys("abcd", 98), small=True) == {"a": 17, "b": 98, "c": 75, "d": 98}
    assert bytes_to_catch_up(commits, dict.fromkeys("abcd", 50), small=True) == {"a": 17, "b": 50, "c": 50, "d": 50}


# --- runs ---


def events_of(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


def test_a_run_counts_what_each_site_fetched(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Cohorts of two of three sites: one misses rounds, and is sent what it has missed."""
    federation = {"rounds": 6, "cohort": 2}
    metrics = run(make_recipe(federation=federation, compression={"down": STEPS["int8"]}), tmp_path / "run")
    plain = run(make_recipe(federation=federation), tmp_path / "plain")
    size = plain["model"]["adapter_bytes"]
    assert {event["bytes_down"] for event in events_of(tmp_path / "plain", "update_accepted")} == {size}
    numbers = size // 4
    each = numbers + 2 * -(-numbers // 64) + 4 + 16  # a byte a number, two for each 64, the span's length, the choices
    held, fetched = dict.fromkeys(("north", "south", "west"), 0), []
    for one in metrics["rounds"]:
        missed = {site: one["round"] - 1 - held[site] for site in one["cohort"]}
        fetched.append({site: min(size, count * each) for site, count in missed.items()})
        held.update(dict.fromkeys(one["cohort"], one["round"] - 1))
    assert max(max(one.values()) for one in fetched) > each, "nobody missed a round"
    assert [one["bytes_down"] for one in metrics["rounds"]] == [sum(one.values()) for one in fetched]
    accepted = events_of(tmp_path / "run", "update_accepted")
    assert all(event["bytes_down"] == fetched[event["round"] - 1][event["site"]] for event in accepted)
    assert metrics["bytes"]["down"] == sum(sum(one.values()) for one in fetched)
    assert metrics["bytes"]["up"] == plain["bytes"]["up"]
    assert metrics["arms"]["federated"]["macro_loss"] == pytest.approx(plain["arms"]["federated"]["macro_loss"], 1e-3)


@pytest.mark.parametrize("strategy", ["lora-fair", "rolora"])
def test_packing_alone_loses_nothing(make_recipe: MakeRecipe, tmp_path: Path, strategy: str) -> None:
    """But for the rounding of a sum."""
    federation = {"strategy": strategy}
    run(make_recipe(federation=federation), tmp_path / "plain")
    run(make_recipe(federation=federation, compression={"down": {"pack": "huffman"}}), tmp_path / "packed")
    plain, packed = adapter(tmp_path / "plain"), adapter(tmp_path / "packed")
    for name, expected in plain.items():
        torch.testing.assert_close(packed[name], expected, rtol=1e-3, atol=2e-5)


def test_the_result_is_what_sites_hold(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Whatever the number of workers; with secure sums; what is late lies in the coordinator's state alone."""
    recipe = make_recipe(compression={"down": STEPS["sign"]}, privacy={"secure_aggregation": "on"})
    found = [
        run(recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"workers": n})}), tmp_path / str(n))
        for n in (1, 2)
    ]
    assert found[0]["adapter"] == found[1]["adapter"]
    (file,) = (tmp_path / "1" / "state").glob("*.safetensors")
    state = load_file(file)
    assert set(state) == {"theta/float32", "slot/late-theta/float32"}
    held = torch.cat([tensor.reshape(-1) for _, tensor in sorted(adapter(tmp_path / "1").items())])
    assert torch.equal(held.sort().values, state["theta/float32"].sort().values)
    assert float(state["slot/late-theta/float32"].abs().max()) > 0
    assert not list((tmp_path / "1").glob("sites/*/*"))


# --- recipes ---


def test_the_codec_is_in_the_recipe_that_a_run_keeps(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(compression={"round": "sign", "down": STEPS["top-k"]})
    again = parse_recipe(recipe_text(recipe), "recipe.yaml")
    assert again.compression == recipe.compression
    assert again.compression.down.shorten.options == {"keep": 0.1}
    auto = parse_recipe("name: a\ncompression: {down: auto}\n", "a").compression
    assert auto.down.round.options == {"bits": 4, "rounding": "nearest"}
    assert not auto.active, "updates are sent as they are"
    assert not parse_recipe("name: a\ncompression: {down: none}\n", "a").compression.down.has_stages


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ({"round": "int7"}, r"compression\.down\.round.*no rounding is called 'int7'"),
        ({"shorten": {"name": "top-k", "keep": 2}}, r"compression\.down\.shorten\.keep"),
    ],
)
def test_what_is_no_codec_is_refused(make_recipe: MakeRecipe, codec: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_methods(make_recipe(compression={"down": codec}))


@pytest.mark.parametrize("strategy", ["scaffold", "ifca", "fedbuff", "flexlora", "flora", "fedex-lora", "hetlora"])
def test_what_has_more_than_one_model_to_send_is_refused(make_recipe: MakeRecipe, strategy: str) -> None:
    recipe = make_recipe(
        compression={"down": "auto"}, federation={"strategy": strategy, "clock": {"slowest": 1, "fastest": 2}}
    )
    with pytest.raises(RecipeError, match=f"'{strategy}' does not go with small downloads"):
        check_methods(recipe)


def test_a_class_of_ones_own_must_be_a_stage(make_recipe: MakeRecipe) -> None:
    spec = make_recipe(compression={"down": {"round": "commonweight.codec.sparse:TopK"}}).compression.down
    with pytest.raises(RecipeError, match=r"compression\.down\.round: .* is no rounding"):
        down_of(spec, tensors(0).layout, 0)

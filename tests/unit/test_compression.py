"""Runs whose updates are made small: what they count, what sites keep, what goes with what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commonweight.codec.chain import codec_of
from commonweight.errors import RecipeError
from commonweight.launch import run
from commonweight.recipe import Recipe
from commonweight.recipe.load import check_methods, parse_recipe
from commonweight.recipe.resolved import recipe_text

MakeRecipe = Callable[..., Recipe]
TOP_K = {"shorten": {"name": "top-k", "keep": 0.1}, "round": {"name": "uniform", "bits": 4}, "pack": "huffman"}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


def same(one: Path, other: Path) -> bool:
    first, second = adapter(one), adapter(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_counts_the_bytes_of_its_payloads(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    plain = run(make_recipe(), tmp_path / "plain")
    int8 = run(make_recipe(compression={"round": {"name": "int8", "block": 64}}), tmp_path / "int8")
    assert int8["bytes"]["down"] == plain["bytes"]["down"]
    # six updates, each of a span: a byte a number, two for each 64, four for the span's length, sixteen for the choices
    numbers = plain["bytes"]["up"] / 4 / 6
    assert int8["bytes"]["up"] == 6 * (numbers + 2 * -(-numbers // 64) + 4 + 16)
    small = run(make_recipe(compression=TOP_K), tmp_path / "small")
    assert small["bytes"]["up"] < plain["bytes"]["up"] / 20
    assert small["arms"]["federated"]["macro_loss"] == pytest.approx(plain["arms"]["federated"]["macro_loss"], rel=0.1)


def test_bytes_are_told_by_codec_and_by_site(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    found = run(make_recipe(compression=TOP_K), tmp_path / "top-k")["bytes"]
    assert list(found["codecs"]) == ["top-k keep=0.1, uniform bits=4, huffman"]
    assert found["codecs"]["top-k keep=0.1, uniform bits=4, huffman"] == {"updates": 6, "bytes": found["up"]}
    assert sum(site["up"] for site in found["sites"].values()) == found["up"]
    assert sum(site["down"] for site in found["sites"].values()) == found["down"]
    events = map(json.loads, (tmp_path / "top-k" / "events.jsonl").read_text().splitlines())
    assert {e["codec"] for e in events if e["event"] == "update_accepted"} == set(found["codecs"])
    page = (tmp_path / "top-k" / "report.html").read_text()
    assert "Bytes by codec" in page
    assert "top-k keep=0.1, uniform bits=4, huffman" in page
    budget = run(make_recipe(compression={"budget_mb": 0.001}), tmp_path / "budget")["bytes"]
    assert sum(one["bytes"] for one in budget["codecs"].values()) == budget["up"]
    assert run(make_recipe(), tmp_path / "plain")["bytes"]["codecs"].keys() == {"none"}
    secure = make_recipe(privacy={"secure_aggregation": "on"})
    assert run(secure, tmp_path / "secure")["bytes"]["codecs"].keys() == {"masked"}


def test_an_asynchronous_run_counts_what_was_sent(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    federation = {"strategy": {"name": "fedbuff", "buffer": 2}, "rounds": 3, "clock": {"slowest": 1, "fastest": 2}}
    coding = {"round": "int8", "error_feedback": False}
    plain = run(make_recipe(federation=federation), tmp_path / "plain")["bytes"]
    small = run(make_recipe(federation=federation, compression=coding), tmp_path / "small")["bytes"]
    assert plain["up"] / 4.1 < small["up"] < plain["up"] / 3
    (counted,) = small["codecs"].values()
    assert counted == {"updates": 6, "bytes": small["up"]}


def test_packing_alone_changes_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(), tmp_path / "plain")
    run(make_recipe(compression={"pack": "huffman"}), tmp_path / "packed")
    assert same(tmp_path / "plain", tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("sites/*/*"))


def test_any_number_of_workers_gives_the_same_bits(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for workers in (1, 2):
        run(make_recipe(compression=TOP_K, engine={"workers": workers}), tmp_path / str(workers))
    assert same(tmp_path / "1", tmp_path / "2")


def test_what_is_late_lies_at_its_site(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(compression=TOP_K, federation={"rounds": 3, "cohort": 2}), tmp_path / "run")
    files = sorted((tmp_path / "run").glob("sites/*/*.safetensors"))
    assert len(files) == 3  # each site has taken part, and keeps what is true now
    for file in files:
        (name,) = load_file(file)
        assert name == "slot/late-delta/float32"


def test_without_feedback_sites_keep_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(compression={**TOP_K, "error_feedback": False}), tmp_path / "run")
    assert not list((tmp_path / "run").glob("sites/*/*"))


def test_every_channel_is_made_small(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    training = {"optimizer": "sgd", "lr": 0.1, "steps": 2}
    scaffold = {"rounds": 2, "strategy": "scaffold"}
    plain = run(make_recipe(federation=scaffold, training=training), tmp_path / "plain")
    small = run(make_recipe(federation=scaffold, training=training, compression={"round": "bf16"}), tmp_path / "small")
    assert small["bytes"]["up"] == plain["bytes"]["up"] / 2 + 6 * (2 * 4 + 16)
    state = load_file(next((tmp_path / "small").glob("sites/000/*.safetensors")))
    assert {name.rpartition("/")[0] for name in state} == {"control", "slot/late-delta", "slot/late-control"}


def test_the_codec_is_in_the_recipe_that_a_run_keeps(make_recipe: MakeRecipe) -> None:
    written = recipe_text(make_recipe(compression=TOP_K))
    again = parse_recipe(written, "recipe.yaml")
    assert again.compression == make_recipe(compression=TOP_K).compression
    assert again.compression.shorten.options == {"keep": 0.1}
    assert parse_recipe("name: a\ncompression: auto\n", "a").compression.round.name == "sign"
    assert not parse_recipe("name: a\ncompression: none\n", "a").compression.active


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"compression": {"round": "int7"}}, "no rounding is called 'int7'"),
        ({"compression": {"round": "top-k"}}, "no rounding is called 'top-k'"),
        ({"compression": {"shorten": {"name": "top-k", "keep": 2}}}, "keep"),
        ({"compression": {"round": {"name": "uniform", "bits": 7}}}, "bits"),
        ({"compression": "auto", "federation": {"strategy": "rolora"}}, "error feedback"),
        ({"compression": "auto", "federation": {"strategy": "ifca"}}, "error feedback"),
    ],
)
def test_what_cannot_be_is_refused(make_recipe: MakeRecipe, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_methods(make_recipe(**sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"federation": {"relays": {"r": ["north", "south"]}}}, "a relay adds up"),
        ({"model": {"adapter": {"budget": {"north": 0.5}}}, "federation": {"strategy": "flexlora"}}, "a part"),
    ],
)
def test_what_needs_whole_updates_is_refused(make_recipe: MakeRecipe, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(compression="auto", **sections)


def test_a_budget_bounds_what_each_site_sends(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(compression={"budget_mb": 0.001}), tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    sent = [event["bytes_up"] for event in events if event["event"] == "update_accepted"]
    assert len(sent) == 6
    assert all(500 < size <= 1000 + 100 for size in sent)  # beside the payloads, their lengths


def test_stages_and_a_budget_are_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match="`budget_mb` chooses the stages by itself; remove it, or `round`"):
        make_recipe(compression={"budget_mb": 1.0, "round": "int8"})


def test_a_class_of_ones_own_must_be_a_stage(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(compression={"round": "commonweight.codec.sparse:TopK"})
    with pytest.raises(RecipeError, match="is no rounding"):
        codec_of(recipe.compression)


def test_events_and_metrics_say_what_each_site_sent(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    metrics = run(make_recipe(compression=TOP_K), tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    sent = [event["bytes_up"] for event in events if event["event"] == "update_accepted"]
    assert sum(sent) == metrics["bytes"]["up"]
    assert all(0 < size < 2000 for size in sent)

"""What `plan` foresees, beside what then happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from commonweight.engines.bench import build_bench, without_data
from commonweight.engines.forecast import Line, alike, forecast, sites_of
from commonweight.engines.skeleton import Skeleton
from commonweight.errors import RecipeError
from commonweight.launch import run
from commonweight.recipe import Recipe

from .command_line import call

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"federation": {"strategy": "scaffold"}},
        {"federation": {"strategy": "ffa-lora"}},
        {"compression": {"round": "sign"}},
        {"compression": {"down": {"round": "int8"}}},
        {"privacy": {"secure_aggregation": "on"}},
        {"model": {"adapter": {"kind": "full"}}},
    ],
    ids=["plain", "two channels", "half of it", "signs", "small downloads", "masked", "the whole model"],
)
def test_bytes_are_those_that_a_run_counts(changes: dict[str, Any], make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(**changes)
    secure = recipe.privacy.secure_aggregation == "on"
    found = forecast(recipe, secure=secure, sites=sites_of(recipe))
    counted = run(recipe, tmp_path / "run")
    assert (found.moved_up, found.moved_down) == (counted["bytes"]["up"], counted["bytes"]["down"])
    assert not found.up_at_most
    assert found.trained == counted["model"]["trainable"]
    assert found.num_parameters == counted["model"]["parameters"]


def test_bytes_of_what_is_packed_are_a_bound(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    coding = {"shorten": {"name": "top-k", "keep": 0.1}, "round": {"name": "uniform", "bits": 4}, "pack": "huffman"}
    recipe = make_recipe(compression={**coding, "down": coding}, federation={"rounds": 4, "cohort": 2})
    found = forecast(recipe, secure=False, sites=sites_of(recipe))
    assert found.up_at_most
    assert found.down_at_most
    assert found.moved_up is not None
    assert found.moved_down is not None
    counted = run(recipe, tmp_path / "run")["bytes"]
    assert counted["up"] <= found.moved_up < found.plain_up * found.moved_up / found.up
    assert counted["down"] <= found.moved_down < found.plain_down * 2 * 4


def kept_by_autograd(recipe: Recipe, size: tuple[int, int]) -> int:
    """Bytes that a real forward pass keeps, parameters not."""
    model = build_bench(recipe, gather=without_data).model
    model.train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in parameters:
            kept[memory.data_ptr()] = memory.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        model.get_base_model().model(input_ids=torch.zeros(size, dtype=torch.long), use_cache=False)
    return sum(num_bytes for num_bytes, _ in kept.values())


def test_activations_are_those_that_autograd_keeps(make_recipe: MakeRecipe) -> None:
    training = {"max_tokens": 24, "batch_size": 4, "micro_batch_size": 2}
    recipe = make_recipe(training=training)
    found = kept_by_autograd(recipe, (2, 24))
    # a pass over tensors without contents forms the causal masks that a real one does without
    blocks = 2
    masks = (blocks + 1) * 2 * 24 * 24 * 4 * 2
    assert found <= Skeleton.of(recipe).activation_bytes <= found + masks
    recomputed = make_recipe(training=training | {"gradient_checkpointing": True})
    least = kept_by_autograd(recomputed, (2, 24)) + found // blocks
    assert least <= Skeleton.of(recomputed).activation_bytes <= least + masks


def test_a_large_model_is_foreseen_from_its_configuration_alone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "seven-billion")
    model = {"name": str(tmp_path / "seven-billion"), "dtype": "bfloat16", "adapter": {"r": 16}}
    recipe = make_recipe(model=model)
    found = forecast(recipe, secure=False, sites=alike(recipe, 10, 100), line=Line.parse("10mbit"), step_s=2.0)
    # 32 blocks; q, k, v, o of 4096 × 4096, gate and up to 11008, down from it
    sent = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert (found.sent, found.num_parameters) == (sent, 6_738_415_616)
    assert found.up == found.down == 4 * sent
    assert found.memory["a site"]["base model"] == 2 * 6_738_415_616
    assert sum(found.memory["the coordinator"].values()) < 1 << 30
    assert found.transfer_s == pytest.approx(2 * 8 * 4 * sent / 10e6)
    steps = found.steps
    assert steps is not None
    assert found.hours == pytest.approx(recipe.federation.rounds * (found.transfer_s + 2.0 * steps) / 3600)


def test_quantized_weights_are_smaller(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "large")
    base = {}
    for kind in ("none", "8bit", "4bit"):
        model = {"name": str(tmp_path / "large"), "dtype": "bfloat16", "quantization": kind}
        base[kind] = Skeleton.of(make_recipe(model=model)).base_bytes
    unquantized = 2 * 2 * 32000 * 4096  # embeddings and output layer
    assert base["8bit"] - unquantized == pytest.approx((base["none"] - unquantized) / 2, rel=1e-3)
    assert base["4bit"] - unquantized == pytest.approx((base["none"] - unquantized) * 0.258, rel=1e-2)


@pytest.mark.parametrize(
    ("text", "up", "down"),
    [("10mbit", 1e7, 1e7), ("2mbit/20Mbit", 2e6, 2e7), ("1.5gbit/s", 1.5e9, 1.5e9), ("800 kbit", 8e5, 8e5)],
)
def test_lines(text: str, up: float, down: float) -> None:
    assert Line.parse(text) == Line(up, down)


@pytest.mark.parametrize("text", ["", "10", "10MB", "fast", "0mbit", "1mbit/2mbit/3mbit", "-1mbit", "1e400mbit"])
def test_no_lines(text: str) -> None:
    with pytest.raises(RecipeError, match="bandwidth"):
        Line.parse(text)


def test_asynchronous_versions_take_a_share_of_the_sites_time(make_recipe: MakeRecipe) -> None:
    federation = {"strategy": {"name": "fedbuff", "buffer": 2}, "rounds": 12, "clock": {"slowest": 1, "fastest": 2}}
    recipe = make_recipe(federation=federation)
    found = forecast(recipe, secure=False, sites=alike(recipe, 6, 10), step_s=1.0)
    assert found.asynchronous
    assert found.cohort == 2
    assert found.moved_up == 12 * 2 * found.up
    assert found.hours == pytest.approx(12 * 2 / 6 * (found.steps or 0) / 3600)


def test_the_command(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    told = call("plan", "demo", "--bandwidth", "2mbit/20mbit", "--measure", "--json")
    assert (told.code, told.err) == (0, "")
    found = told.json["forecast"]
    assert found["bytes"]["all_up"] == found["bytes"]["up"] * found["cohort"] * found["rounds"]
    assert found["seconds"]["train"] > 0
    expected = found["rounds"] * (found["seconds"]["train"] + found["seconds"]["transfer"]) / 3600
    assert found["hours"] == pytest.approx(expected)
    text = call("plan", "demo", "--sites", 40, "--examples", 100, "--step-seconds", 2).out
    assert "40 updates" in text
    assert "Memory of a site: about" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bandwidth", "quick"], "a bandwidth of 'quick'"),
        (["--measure", "--step-seconds", "2"], "both say how long"),
        (["--step-seconds", "0"], "--step-seconds"),
        (["--step-seconds", "nan"], "--step-seconds"),
        (["--sites", "0"], "--sites"),
        (["--bandwidth", "1mbit", "--set", "model.name=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], message: str) -> None:
    answer = call("plan", "demo", *arguments)
    assert answer.code in (2, 4)
    assert message in answer.err
    assert "Traceback" not in answer.err


def test_without_its_model_a_plan_says_what_it_does_not_know() -> None:
    answer = call("plan", "demo", "--set", "model.name=/nowhere")
    assert answer.code == 0
    assert "Bytes and memory are not known" in answer.out
    assert json.loads(call("plan", "demo", "--set", "model.name=/nowhere", "--json").out)["forecast"] is None


def test_without_its_data_a_plan_says_what_it_does_not_know() -> None:
    answer = call("plan", "demo", "--set", "data.path=/nowhere.jsonl", "--set", "data.format=jsonl")
    assert "say --sites N and --examples N" in answer.out, answer
    assert "a site sends" in answer.out

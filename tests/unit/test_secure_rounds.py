"""Runs whose updates are summed securely: their algebra, sites that are lost, kills, what is refused, what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from safetensors.torch import load_file

from commonweight.engines.work import TaskWork, Trained
from commonweight.errors import QuorumError, RecipeError, RoundError, SiteError
from commonweight.federation.groups import Groups
from commonweight.federation.journal import Journal
from commonweight.federation.messages import TrainTask
from commonweight.federation.secure_rounds import Terms, check_sums
from commonweight.federation.simulated_sums import SimulatedSum, SimulatedSums
from commonweight.launch import run
from commonweight.model.tensors import NamedTensors, l2_norm
from commonweight.privacy.secure_aggregation.masks import Expander
from commonweight.privacy.secure_aggregation.rows import Most, RowCode, row_layout
from commonweight.privacy.site_level import clip_
from commonweight.recipe import Recipe
from commonweight.recipe.compatibility import secure_sums
from commonweight.strategies.base import WeightedSum
from commonweight.strategies.update import Update

MakeRecipe = Callable[..., Recipe]
SECURE = {"secure_aggregation": "on"}
SITES = ("north", "south", "west", "east", "isles")


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


def recipe_of(**sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "x", "privacy": SECURE, **sections})


def update_of(site: str, seed: int, examples: int, tokens: int) -> Update:
    return Update(site, 1, {"delta": tensors(seed)}, float(examples), examples, tokens, 2, {"loss": 0.5 + seed})


# ---- rows


def test_a_stretch_of_a_mask_is_the_masks_own() -> None:
    key = bytes(range(16))
    whole = np.frombuffer(Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4000)), np.uint32)
    for first, length in ((0, 1000), (1, 7), (2, 500), (3, 3), (4, 4), (999, 1), (517, 101)):
        row = np.zeros(length, dtype=np.uint32)
        Expander().add(row, key, first=first)
        assert (row == whole[first : first + length]).all()
    far = (1 << 18) + 5
    row = np.zeros(far + 9, dtype=np.uint32)
    Expander().add(row, key)
    tail = np.zeros(9, dtype=np.uint32)
    Expander().add(tail, key, first=far)
    assert (tail == row[far:]).all()


@pytest.mark.parametrize("weighting", ["examples", "tokens", "uniform"])
def test_a_sum_of_rows_is_the_sum_of_weighted_updates(weighting: str) -> None:
    """Independently, in float64: Σ wᵢΔᵢ to n half steps, and the totals exactly."""
    layout, most = tensors(0).layout, Most(24, 900)
    code = RowCode(layout, 3, weighting, most, bound=0.25)
    updates = [(tensors(1), 24, 301, 2.5), (tensors(2), 7, 900, 1.25), (tensors(3), 1, 3, 9.0)]
    total = np.zeros(code.length, dtype=np.uint32)
    for delta, examples, tokens, loss in updates:
        row = np.empty_like(total)
        assert code.encode(delta, examples=examples, label_tokens=tokens, loss=loss, out=row) == 0
        total += row
    weights = {"examples": [24, 7, 1], "tokens": [301, 900, 3], "uniform": [1, 1, 1]}[weighting]
    found = code.totals(total[-4:], 3)
    assert (found.weight, found.examples, found.label_tokens) == (sum(weights), 32, 1204)
    assert found.nats == pytest.approx(301 * 2.5 + 900 * 1.25 + 3 * 9.0, rel=1e-5)
    start = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        exact = sum(w * u[0].flats[dtype].double().numpy() for w, u in zip(weights, updates, strict=True))
        out = torch.empty(len(exact), dtype=torch.float64)
        code.decode(total[start : start + len(exact)], out)
        assert np.abs(out.numpy() - exact).max() <= 3 / 2 * code.elements.step * most.weight(weighting) * (1 + 1e-9)
        start += len(exact)
    assert start == code.length - 4 == row_layout(layout).by_name["row"].numel


def test_elements_beyond_the_bound_are_clipped_and_counted() -> None:
    code = RowCode(tensors(0).layout, 3, "uniform", Most(5, 5), bound=0.25)
    delta = tensors(1)
    delta["a.lora_A"][0, :2] = torch.tensor([7.0, -7.0])
    row = np.empty(code.length, dtype=np.uint32)
    assert code.encode(delta, examples=1, label_tokens=1, loss=0.0, out=row) == 2
    out = torch.empty(2)
    code.decode(row[:2], out)
    assert out.tolist() == pytest.approx([0.25, -0.25], rel=1e-6)


def test_encoding_does_not_make_a_clipped_norm_larger() -> None:
    """What differential privacy counts on: rounding is toward zero there."""
    recipe = recipe_of(
        privacy={**SECURE, "dp": "site", "clip": 1e-6, "delta": 1e-5, "noise_multiplier": 1.0},
        federation={"weighting": "uniform"},
    )
    delta = tensors(4)
    clip_(delta, 1e-6)
    code = RowCode.of(recipe, delta.layout, 1000, Most(1, 1))
    assert code.bound == 1e-6
    row = np.empty(code.length, dtype=np.uint32)
    code.encode(delta, examples=1, label_tokens=1, loss=0.0, out=row)
    encoded = row[:-4].view(np.int32).astype(np.float64) * code.elements.step
    assert 0.9e-6 < np.linalg.norm(encoded) <= l2_norm(delta)


@pytest.mark.parametrize(("examples", "tokens"), [(25, 10), (1, 901), (-1, 1)])
def test_counts_above_what_the_steps_allow_are_refused(examples: int, tokens: int) -> None:
    code = RowCode(tensors(0).layout, 3, "examples", Most(24, 900), bound=1.0)
    row = np.empty(code.length, dtype=np.uint32)
    with pytest.raises(SiteError, match="at most 24 and 900"):
        code.encode(tensors(1), examples=examples, label_tokens=tokens, loss=0.0, out=row)


def test_totals_that_no_honest_sites_come_to_are_refused() -> None:
    code = RowCode(tensors(0).layout, 3, "examples", Most(24, 900), bound=1.0)
    for weight, examples in ((0, 5), (73, 5), (5, 73), (2**32 - 1, 5)):
        with pytest.raises(RoundError, match="nobody can tell which"):
            code.totals(np.asarray([weight, examples, 5, 5], dtype=np.uint32), 3)


def test_a_fold_of_an_opened_sum_is_that_of_its_updates() -> None:
    """With two sites lost after they had handed out their shares, against a plain fold of the others."""
    sites = (*SITES, "coast", "fen")
    recipe, layout = recipe_of(), tensors(0).layout
    sums = SimulatedSums(recipe, layout)
    sums.begin(1, Groups((sites,)), Terms(0.1, {"kind": "none"}, Most(40, 4000)))
    plain = WeightedSum(layout, ("delta",))
    there = [site for site in sites if site not in ("south", "fen")]
    for place, site in enumerate(there):
        update = update_of(site, place, 3 + 7 * place, 100 + place)
        sums.add(update)
        plain.add(update)
    sums.open(1, there)
    fold = WeightedSum(layout, ("delta",))
    ((_, opened),) = sums.opened
    totals = opened.into(fold)
    assert (fold.num_updates, fold.total_weight) == (plain.num_updates, plain.total_weight) == (5, totals.weight)
    for dtype, found in fold.mean().floating():
        torch.testing.assert_close(found, plain.sums["delta"].flats[dtype] / plain.total_weight, rtol=1e-6, atol=1e-6)


# ---- runs


def theta_of(folder: Path, round: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "rounds" / f"{round:04d}" / "adapter_model.safetensors")


class Unmasked(SimulatedSum):
    """The same sum, of rows that nobody masks, in another order."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rows: dict[str, np.ndarray[Any, Any]] = {}

    def _send(self, site: str, row: np.ndarray[Any, Any]) -> int:
        self.rows[site] = row.copy()
        return row.nbytes

    def open(self) -> None:
        for site in reversed(self.rows):
            self._total += self.rows[site]


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "rolora"])
def test_masks_change_no_bit(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    recipe = make_recipe(privacy=SECURE, federation={"strategy": strategy, "rounds": 2})
    found = run(recipe, tmp_path / "masked")
    run(recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"workers": 1})}), tmp_path / "again")
    monkeypatch.setattr("commonweight.federation.simulated_sums.MaskedSum", Unmasked)
    plain = run(recipe, tmp_path / "plain")
    for name, tensor in theta_of(tmp_path / "masked", 2).items():
        assert torch.equal(tensor, theta_of(tmp_path / "plain", 2)[name]), name
        assert torch.equal(tensor, theta_of(tmp_path / "again", 2)[name]), name
    assert [r["train_loss"] for r in found["rounds"]] == [r["train_loss"] for r in plain["rounds"]]


def test_a_secure_run_ends_where_a_plain_one_does(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """To the encoding's rounding; its record has the sums, and shows nothing of a site's training."""
    plain = run(make_recipe(), tmp_path / "plain")
    secure = run(make_recipe(privacy=SECURE), tmp_path / "secure")
    for name, tensor in theta_of(tmp_path / "plain", 2).items():
        torch.testing.assert_close(theta_of(tmp_path / "secure", 2)[name], tensor, rtol=0, atol=2e-5)
    for one, other in zip(plain["rounds"], secure["rounds"], strict=True):
        assert one["examples"] == other["examples"]
        assert one["label_tokens"] == other["label_tokens"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
        assert other["bytes_up"] == 3 * (plain["model"]["adapter_bytes"] + 16)
    events = [json.loads(line) for line in (tmp_path / "secure" / "events.jsonl").read_text().splitlines()]
    accepted = [e for e in events if e["event"] == "update_accepted"]
    assert len(accepted) == 6
    assert not any({"loss", "first_loss", "examples", "label_tokens"} & set(event) for event in accepted)
    assert (plain["privacy"]["secure_sums"], secure["privacy"]["secure_sums"]) == (False, True)
    assert "Secure sums: on" in (tmp_path / "secure" / "report.html").read_text()
    assert "Secure sums: off" in (tmp_path / "plain" / "report.html").read_text()


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["keep_update", "commit"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.kills
def test_a_run_killed_within_a_secure_round_ends_with_the_same_bits(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    monkeypatch.setattr("commonweight.federation.shelf.KEEP_UPDATES_OVER_S", 0.0)
    recipe = make_recipe(privacy=SECURE, training={"steps": 1})
    run(recipe, tmp_path / "whole")
    original, calls = getattr(Journal, method), []

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
        patched.setattr(Journal, method, dies)
        with pytest.raises(Killed):
            run(recipe, tmp_path / "cut")
    run(recipe, tmp_path / "cut", resume=True)
    for name, tensor in theta_of(tmp_path / "whole", 2).items():
        assert torch.equal(tensor, theta_of(tmp_path / "cut", 2)[name]), (method, name)


def failing(monkeypatch: pytest.MonkeyPatch, *places: tuple[int, str]) -> None:
    """Sites that cannot train in these rounds."""
    train = TaskWork.train

    def broken(work: TaskWork, task: TrainTask, *arguments: Any, **options: Any) -> Trained:
        if (task.round, task.site) in places:
            raise SiteError("out of order")
        return train(work, task, *arguments, **options)

    monkeypatch.setattr(TaskWork, "train", broken)


def test_a_site_lost_after_it_has_shared_is_not_in_the_sum(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"sites": {"scheme": "iid", "count": 5}}
    failing(monkeypatch, (2, "site-02"))
    secure = run(make_recipe(data=data, privacy=SECURE, training={"steps": 1}), tmp_path / "secure")
    plain = run(make_recipe(data=data, training={"steps": 1}), tmp_path / "plain")
    assert secure["rounds"][1]["failed"] == plain["rounds"][1]["failed"] == {"site-02": "out of order"}
    for name, tensor in theta_of(tmp_path / "plain", 2).items():
        torch.testing.assert_close(theta_of(tmp_path / "secure", 2)[name], tensor, rtol=0, atol=2e-5)


def test_fewer_than_two_thirds_open_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(privacy=SECURE, training={"steps": 1})
    with monkeypatch.context() as patched:
        failing(patched, (2, "south"))
        with pytest.raises(QuorumError, match="1 of 3 sites answered, 3 are needed"):
            run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run", resume=True)
    run(recipe, tmp_path / "whole")
    for name, tensor in theta_of(tmp_path / "whole", 2).items():
        assert torch.equal(tensor, theta_of(tmp_path / "run", 2)[name])


def test_noise_is_added_to_the_opened_sum(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """With the same noise, a private run with secure sums is the one without, to the encoding's rounding."""
    private = {"dp": "site", "clip": 0.5, "delta": 1e-5, "noise_multiplier": 0.3}
    federation = {"rounds": 1, "weighting": "uniform"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("commonweight.federation.private_rounds.new_key", lambda: bytes(32))
        run(make_recipe(privacy=private, federation=federation), tmp_path / "plain")
        found = run(make_recipe(privacy={**private, **SECURE}, federation=federation), tmp_path / "secure")
    assert found["privacy"]["releases"] == 1
    for name, tensor in theta_of(tmp_path / "plain", 1).items():
        torch.testing.assert_close(theta_of(tmp_path / "secure", 1)[name], tensor, rtol=0, atol=1e-6)


def test_batches_that_are_drawn_by_coins_fit_too(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Differential privacy of examples, whose sites' counts vary, in a secure sum."""
    private = {"dp": "example", "clip": 1.0, "delta": 1e-3, "noise_multiplier": 1.0}
    recipe = make_recipe(privacy={**private, **SECURE}, federation={"rounds": 1}, training={"steps": 2})
    found = run(recipe, tmp_path / "run")
    assert found["rounds"][0]["answered"] == ["north", "south", "west"]
    assert (found["privacy"]["dp"], found["privacy"]["secure_sums"]) == ("example", True)


# ---- what is refused, and what `auto` means


@pytest.mark.parametrize(
    ("federation", "num_sites", "words"),
    [
        ({}, 2, "a cohort of 2 sites"),
        ({"cohort": 2}, 9, "a cohort of 2 sites"),
        ({"over_selection": 1.6, "cohort": 10}, 40, "16 sites are invited and 10 are enough"),
    ],
)
def test_sums_that_no_round_can_make_are_refused(federation: dict[str, Any], num_sites: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_sums(recipe_of(federation=federation), num_sites)
    check_sums(recipe_of(federation=federation, privacy={}), num_sites)


def test_a_run_with_two_sites_is_refused_before_it_starts(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(privacy=SECURE, data={"sites": {"scheme": "iid", "count": 2}})
    with pytest.raises(RecipeError, match="fewer than 3"):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"federation": {"relays": {"r": ["s"]}}}, "a relay of federation.relays sees"),
        ({"model": {"adapter": {"budget": {"s": 0.5}}}}, "some sites a part of it"),
        ({"compression": {"round": "int8"}}, "cannot be added"),
    ],
)
def test_recipes_that_speak_against_it_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe_of(**sections)
    assert words in secure_sums(recipe_of(**sections, privacy={}), 9)[1]


@pytest.mark.parametrize(
    ("federation", "num_sites", "words"),
    [
        ({}, 3, ""),
        ({}, 2, "fewer than 3 sites"),
        ({}, None, "fewer than 3 sites"),
        ({"min_sites": 3}, None, ""),
        ({"cohort": 3}, None, ""),
        ({"cohort": 0.5}, 4, "fewer than 3 sites"),
        ({"strategy": "scaffold"}, 9, "scaffold needs more"),
        ({"strategy": {"name": "median"}}, 9, "median needs more"),
        ({"over_selection": 1.5, "cohort": 4}, 9, "over_selection"),
    ],
)
def test_what_auto_means(federation: dict[str, Any], num_sites: int | None, words: str) -> None:
    on, why = secure_sums(recipe_of(federation=federation, privacy={}), num_sites)
    assert on == (not words)
    assert words in why


def test_a_recipe_that_says_so_is_taken_at_its_word() -> None:
    assert secure_sums(recipe_of(), 2) == (True, "")
    off = recipe_of(privacy={"secure_aggregation": "off"})
    assert secure_sums(off, 9) == (False, "the recipe turns them off")

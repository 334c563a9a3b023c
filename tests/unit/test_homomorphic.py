"""Sums of encrypted rows: exact, with the bits of masks; what opens them and what does not; runs; what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commonweight.engines.forecast import forecast
from commonweight.errors import RecipeError, RoundError
from commonweight.launch import run
from commonweight.recipe import Recipe
from commonweight.recipe.compatibility import secure_sums
from commonweight.recipe.load import check_methods
from tests.unit.test_secure_rounds import recipe_of, theta_of

MakeRecipe = Callable[..., Recipe]
ENCRYPTED = {"secure_aggregation": "homomorphic"}
Ring = np.ndarray[Any, np.dtype[np.uint32]]


def without_tenseal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)


def rows(num_sites: int, length: int) -> list[Ring]:
    """Whole numbers whose sum just fits, some of them all as large as they may be."""
    draw, most = np.random.default_rng(0), (2**31 - 1) // num_sites
    found = [draw.integers(-most, most, length, endpoint=True) for _ in range(num_sites)]
    for row in found:
        row[:5], row[-5:] = most, -most
    return [row.astype(np.uint32) for row in found]


@pytest.mark.parametrize(("num_sites", "length"), [(3, 5), (10, 2048), (7, 5000)])
def test_the_sum_is_exact(num_sites: int, length: int) -> None:
    """Against integers modulo 2³², with rows that end within a ciphertext, and a coordinator that has no key."""
    pytest.importorskip("tenseal")
    from commonweight.privacy.homomorphic import SLOTS, Adder, Keyholder

    first, adder = Keyholder(), Adder()
    sites = [first, *(Keyholder(first.secret()) for _ in range(num_sites - 1))]
    given = rows(num_sites, length)
    for site, row in zip(sites, given, strict=True):
        ciphertexts = site.encrypt(row)
        assert len(ciphertexts) == -(-length // SLOTS)
        assert all(32.0 < len(one) / SLOTS < 32.2 for one in ciphertexts), "the cost that the docs state"
        adder.add(ciphertexts)
    found = sites[-1].decrypt(adder.total())
    assert found.dtype == np.uint32
    np.testing.assert_array_equal(found, np.sum(given, axis=0, dtype=np.uint32))


def test_no_noise_is_left_by_which_the_key_could_be_worked_out() -> None:
    """CKKS's own result differs from the sum; by far less than what rounding takes off."""
    package = pytest.importorskip("tenseal")
    from commonweight.privacy.homomorphic import Adder, Keyholder

    holder, adder, given = Keyholder(), Adder(), rows(10, 2048)
    for row in given:
        adder.add(holder.encrypt(row))
    (total,) = adder.total()
    raw = np.asarray(package.ckks_vector_from(holder._context, total).decrypt())
    exact = np.sum(given, axis=0, dtype=np.uint32).view(np.int32).astype(np.float64)
    assert 0 < np.abs(raw - exact).max() < 1e-3


def test_another_key_opens_nothing() -> None:
    pytest.importorskip("tenseal")
    from commonweight.privacy.homomorphic import Adder, Keyholder

    holder, adder = Keyholder(), Adder()
    for row in rows(3, 100):
        adder.add(holder.encrypt(row))
    with pytest.raises(RoundError, match="not under the sites' key"):
        Keyholder().decrypt(adder.total())
    with pytest.raises(RoundError, match="not under the sites' key"):
        Keyholder(b"".join([Keyholder().secret()])).decrypt(adder.total())


def test_a_row_of_another_length_is_an_error() -> None:
    pytest.importorskip("tenseal")
    from commonweight.privacy.homomorphic import Adder, Keyholder

    holder, adder = Keyholder(), Adder()
    adder.add(holder.encrypt(rows(3, 3000)[0]))
    for length, words in ((2048, "shorter"), (2999, "different sizes")):
        with pytest.raises(ValueError, match=words):
            adder.add(holder.encrypt(rows(3, length)[0]))


def test_a_run_has_the_bits_of_masks(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    pytest.importorskip("tenseal")
    training = {"steps": 1}
    masked = run(make_recipe(privacy={"secure_aggregation": "on"}, training=training), tmp_path / "masked")
    found = run(make_recipe(privacy=ENCRYPTED, training=training), tmp_path / "encrypted")
    for name, tensor in theta_of(tmp_path / "masked", 2).items():
        assert torch.equal(tensor, theta_of(tmp_path / "encrypted", 2)[name]), name
    for one, other in zip(masked["rounds"], found["rounds"], strict=True):
        assert (one["train_loss"], one["examples"]) == (other["train_loss"], other["examples"])
        assert other["bytes_up"] > 7.9 * one["bytes_up"], "the ciphertexts' bytes are counted"
    assert (found["privacy"]["secure_sums"], found["privacy"]["homomorphic"]) == (True, True)
    planned = forecast(make_recipe(privacy=ENCRYPTED, training=training), secure=False, num_sites=3)
    assert (planned.hidden, planned.moved_up) == ("encrypted", found["bytes"]["up"])
    assert "of encrypted updates" in (tmp_path / "encrypted" / "report.html").read_text()


def test_without_the_package_a_run_says_what_to_install(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tenseal(monkeypatch)
    with pytest.raises(RecipeError, match="needs the package tenseal") as error:
        run(make_recipe(privacy=ENCRYPTED), tmp_path / "run")
    assert "pip install 'commonweight[homomorphic]'" in error.value.hint
    run(make_recipe(privacy={"secure_aggregation": "on"}, training={"steps": 1}), tmp_path / "masks")


def test_over_a_network_it_is_refused_and_masks_are_named() -> None:
    recipe = recipe_of(privacy=ENCRYPTED)
    check_methods(recipe)
    with pytest.raises(RecipeError, match="could not tell a sum from a single site's update") as error:
        check_methods(recipe, network=True)
    assert "set it to on: masks" in error.value.hint
    on, why = secure_sums(recipe, 9)
    assert not on
    assert "simulations alone" in why


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"privacy": {**ENCRYPTED, "secure_group_size": 3}}, "secure_aggregation is homomorphic; set it to on"),
        ({"privacy": ENCRYPTED, "federation": {"relays": {"r": ["s"]}}}, "secure_aggregation homomorphic: a relay"),
    ],
)
def test_settings_that_clash_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate({"name": "x", **sections})


def test_strategies_that_need_more_than_a_sum_are_refused() -> None:
    with pytest.raises(RecipeError, match="does not go with secure sums"):
        check_methods(recipe_of(privacy=ENCRYPTED, federation={"strategy": "median"}))

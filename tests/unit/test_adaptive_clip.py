"""Clipping norms that follow a quantile: the paper's algebra, what it costs, and runs that are killed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commonweight.errors import RecipeError
from commonweight.federation import private_rounds
from commonweight.federation.global_model import MemoryModel
from commonweight.federation.journal import Journal
from commonweight.launch import run
from commonweight.model.tensors import l2_norm
from commonweight.privacy.accounting import Releases, epsilon
from commonweight.privacy.adaptive_clip import UNDER_CLIP, AdaptiveClip
from commonweight.privacy.noise import GaussianNoise
from commonweight.recipe import Recipe
from commonweight.recipe.schema import AdaptiveClipSpec
from commonweight.strategies.update import Update
from tests.unit.command_line import call
from tests.unit.test_private_runs import PRIVATE, Killed, dying, private, theta_of

MakeRecipe = Callable[..., Recipe]
ADAPTIVE = {**PRIVATE, "clip": 0.05, "adaptive_clip": {"quantile": 0.4, "lr": 0.7}}


def test_the_papers_split_of_the_noise() -> None:
    clip = AdaptiveClip.of(AdaptiveClipSpec(), 1.0, 100)
    assert (clip.quantile, clip.lr, clip.count_noise) == (0.5, 0.2, 5.0)
    assert clip.sum_noise == pytest.approx(1.005, abs=1e-4)
    assert AdaptiveClip.of(AdaptiveClipSpec(), 3.0, 8).count_noise == 3.0
    assert AdaptiveClip.of(AdaptiveClipSpec(), 3.0, 8).sum_noise == pytest.approx(3 * math.sqrt(4 / 3))


@settings(max_examples=30, deadline=None)
@given(z=st.floats(0.4, 8), wider=st.floats(1.02, 20))
def test_the_two_releases_together_cost_what_one_with_a_fixed_norm_costs(z: float, wider: float) -> None:
    """Independently: a site moves the sum by C and the count, its bits centred, by ½; a vector of both, each in units
    of its noise, is moved by a vector whose length is 1/z."""
    clip = AdaptiveClip(0.5, 0.2, wider * z / 2, z, 100)
    moved = np.linalg.norm([1 / clip.sum_noise, 0.5 / clip.count_noise])
    assert moved == pytest.approx(1 / z, rel=1e-12)


def test_the_accountant_agrees() -> None:
    from dp_accounting.dp_event import ComposedDpEvent, GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    clip, accountant = AdaptiveClip(0.5, 0.2, 1.5, 1.3, 20), PLDAccountant()
    both = ComposedDpEvent([GaussianDpEvent(clip.sum_noise), GaussianDpEvent(2 * clip.count_noise)])
    accountant.compose(both, 10)
    assert accountant.get_epsilon(1e-5) == pytest.approx(epsilon(Releases(1.3, 10), 1e-5), abs=0.01)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_norm_ends_at_the_quantile(quantile: float) -> None:
    draw, sites = np.random.default_rng(3), 400
    norms = draw.lognormal(sigma=1.0, size=sites)
    clip, bound = AdaptiveClip(quantile, 0.2, sites / 20, 1.0, sites), 1e-3
    for _ in range(200):
        centred = float(np.sum(norms <= bound) - sites / 2)
        bound = clip.after(bound, clip.share(centred, float(draw.normal())))
    assert np.mean(norms <= bound) == pytest.approx(quantile, abs=0.08)


def test_a_count_that_costs_more_than_the_round_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"count_noise 0\.5: the noisy count alone") as caught:
        AdaptiveClip.of(AdaptiveClipSpec(count_noise=0.5), 1.0, 100)
    assert "above 0.5" in caught.value.hint


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count()
    monkeypatch.setattr(private_rounds, "new_key", lambda: next(numbers).to_bytes(32, "big"))


def released(folder: Path) -> list[dict[str, Any]]:
    journal = Journal(folder / "state.sqlite")
    found = [record["privacy"] for number, record in journal.commits().items() if number]
    journal.close()
    return found


@pytest.mark.usefixtures("keys")
def test_a_runs_norms_follow_the_formula(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independently, from the clipped norms that arrive and the keys: those below C were not clipped."""
    arrived: dict[int, list[float]] = {}
    fold = MemoryModel.fold

    def noting(model: MemoryModel, update: Update) -> None:
        arrived.setdefault(update.round, []).append(l2_norm(update.delta))
        fold(model, update)

    monkeypatch.setattr(MemoryModel, "fold", noting)
    metrics = run(
        private(make_recipe, federation={"rounds": 3, "weighting": "uniform"}, privacy=ADAPTIVE), tmp_path / "run"
    )
    bound, z, sigma = 0.05, 0.3, 0.3
    for number, said in enumerate(released(tmp_path / "run"), start=1):
        assert said["clip"] == pytest.approx(bound, rel=1e-12)
        assert max(arrived[number]) <= bound * (1 + 1e-6)
        under = sum(norm < bound * (1 - 1e-6) for norm in arrived[number])
        noise = GaussianNoise((number - 1).to_bytes(32, "big")).values(4, 0, 1)[0]
        share = (under - 1.5 + sigma * noise) / 3 + 0.5
        assert said["share"] == pytest.approx(share, rel=1e-9)
        assert said["sum_noise"] == pytest.approx((z**-2 - (2 * sigma) ** -2) ** -0.5)
        bound *= math.exp(-0.7 * (share - 0.4))
        assert said["next_clip"] == pytest.approx(bound, rel=1e-9)
    assert metrics["privacy"]["epsilon"] == pytest.approx(epsilon(Releases(z, 3), 1e-5))
    assert UNDER_CLIP not in (tmp_path / "run" / "events.jsonl").read_text()


@pytest.mark.usefixtures("keys")
def test_the_sum_has_the_noise_that_the_count_leaves_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from tests.unit.test_private_runs import _theta

    federation = {"rounds": 1, "weighting": "uniform"}
    for name, z in (("quiet", 0.0), ("loud", 0.3)):
        recipe = private(make_recipe, federation=federation, privacy={**ADAPTIVE, "noise_multiplier": z})
        run(recipe, tmp_path / name)
    quiet, loud = (_theta(tmp_path / name).double().numpy() for name in ("quiet", "loud"))
    noise = GaussianNoise((1).to_bytes(32, "big")).values(0, 0, len(quiet))
    z_sum = (0.3**-2 - 0.6**-2) ** -0.5
    np.testing.assert_allclose(loud, quiet + noise * z_sum * 0.05 / 3, atol=2e-6)


@pytest.mark.usefixtures("keys")
@pytest.mark.kills
def test_a_killed_run_goes_on_with_the_same_norms(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = private(make_recipe, privacy=ADAPTIVE)
    run(recipe, tmp_path / "whole")
    for method, before in (("put", False), ("commit", True), ("commit", False), ("drop", False)):
        folder, keys_again = tmp_path / f"{method}-{before}", count()
        monkeypatch.setattr(private_rounds, "new_key", lambda numbers=keys_again: next(numbers).to_bytes(32, "big"))
        with monkeypatch.context() as patched:
            patched.setattr(Journal, method, dying(method, before=before))
            with pytest.raises(Killed):
                run(recipe, folder)
        run(recipe, folder, resume=True)
        assert released(folder) == released(tmp_path / "whole")
        whole = theta_of(tmp_path / "whole", 2)
        assert all((tensor == whole[name]).all() for name, tensor in theta_of(folder, 2).items())


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({"adaptive_clip": {}}, "`adaptive_clip` does nothing with dp: none"),
        ({**ADAPTIVE, "adaptive_clip": {"quantile": 1.0}}, "adaptive_clip.quantile"),
        ({**ADAPTIVE, "adaptive_clip": {"lr": 0}}, "adaptive_clip.lr"),
        ({**ADAPTIVE, "secure_aggregation": "on"}, "a sum has no place for that"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, privacy: dict[str, Any], words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"name": "small", "federation": {"weighting": "uniform"}, "privacy": privacy}))
    answer = call("validate", str(file))
    assert answer.code == 2
    assert words in answer.err

"""Canaries: where they are planted, what they look like, and where they never are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from commonweight.data.canaries import Canaries, plant
from commonweight.data.sites import Site
from commonweight.data.tokens import Tokens
from commonweight.engines.bench import build_bench
from commonweight.errors import CommonweightError, DataError, RecipeError
from commonweight.recipe import Recipe
from commonweight.recipe.load import check_methods
from commonweight.recipe.schema import CanariesSpec
from tests.conftest import SITES
from tests.unit.tiny_tokenizers import bpe

Make = Callable[..., Recipe]
SPECIAL = set(bpe().all_special_ids)


def site(name: str, lengths: tuple[int, ...] = (12, 20, 9)) -> Site:
    rows = [(np.array([0, *range(10, 9 + n)], np.int32), np.arange(n) >= 3) for n in lengths]
    return Site(name, Tokens.of(rows), Tokens.of(rows[:1]), [], ["x"], tuple("abc"[: len(lengths)]))


def planted(count: int = 40, **spec: Any) -> tuple[list[Site], Canaries]:
    sites = [site("north"), site("south"), site("west")]
    return plant(sites, CanariesSpec(count=count, **spec), seed=3, tokenizer=bpe())


def test_a_canary_is_among_its_sites_rows_exactly_if_its_coin_says_so() -> None:
    sites, canaries = planted(repeat=2)
    assert canaries.sites[:4] == ("north", "south", "west", "north")
    for i, (owner, inside) in enumerate(zip(canaries.sites, canaries.planted, strict=True)):
        ids = canaries.tokens.ids_of(i).tolist()
        for one in sites:
            copies = sum(one.train.ids_of(k).tolist() == ids for k in range(len(one.train)))
            assert copies == (2 if inside and one.name == owner else 0)
            assert all(one.heldout.ids_of(k).tolist() != ids for k in range(len(one.heldout)))
    assert 8 < sum(canaries.planted) < 32


def test_real_rows_stay_as_they_are_and_come_first() -> None:
    before = site("north")
    after = planted()[0][0]
    assert after.train.subset(range(3)).ids.tolist() == before.train.ids.tolist()
    assert len(after.train_groups) == len(after.train)
    assert after.train_groups[3].startswith("canary/")
    assert after.heldout.ids.tolist() == before.heldout.ids.tolist()


def test_a_canary_has_a_rows_length_labels_and_special_tokens_and_others_words() -> None:
    _, canaries = planted()
    rows = {len(one): one for one in (site("north").train.ids_of(k) for k in range(3))}
    for i in range(len(canaries)):
        ids = canaries.tokens.ids_of(i)
        like = rows[len(ids)]
        assert ids[0] == 0
        assert not SPECIAL & set(ids[1:].tolist())
        assert (ids[1:] != like[1:]).any()
        assert canaries.tokens.labelled_of(i).tolist() == (np.arange(len(ids)) >= 3).tolist()


def test_coins_are_fair_and_the_same_for_the_same_seed() -> None:
    first, again = planted(1000)[1], planted(1000)[1]
    assert first.planted == again.planted
    assert first.tokens.ids.tolist() == again.tokens.ids.tolist()
    assert abs(sum(first.planted) - 500) < 70
    words = np.unique(first.tokens.ids)
    assert len(words) > 200  # of a vocabulary of some hundreds


def test_they_can_be_planted_at_some_sites_only() -> None:
    sites, canaries = planted(sites=["south"])
    assert set(canaries.sites) == {"south"}
    assert [len(one.train) > 3 for one in sites] == [False, True, False]


def test_the_list_survives_being_written_down() -> None:
    _, canaries = planted(repeat=3)
    again = Canaries.from_json(canaries.to_json(bpe()))
    assert (again.sites, again.planted, again.repeat) == (canaries.sites, canaries.planted, canaries.repeat)
    assert again.tokens.ids.tolist() == canaries.tokens.ids.tolist()
    assert again.tokens.labelled.tolist() == canaries.tokens.labelled.tolist()


def test_unknown_sites_and_rows_that_are_too_short_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"privacy\.canaries\.sites names 'east'"):
        planted(sites=["east"])
    short = replace(site("north", (5, 6)), train_groups=())
    with pytest.raises(DataError, match="'north' has 4 learned tokens"):
        plant([short], CanariesSpec(count=8), seed=0, tokenizer=bpe())


def test_a_bench_plants_them_and_reports_the_real_rows_alone(make_recipe: Make) -> None:
    plain = build_bench(make_recipe())
    bench = build_bench(make_recipe(privacy={"canaries": {"count": 30}}))
    assert plain.canaries is None
    assert bench.canaries is not None
    more = sum(len(bench.sites[name].train) - len(plain.sites[name].train) for name in SITES)
    assert more == sum(bench.canaries.planted)
    assert bench.partition == plain.partition


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"count": 4}, "too few to show anything"),
        ({"count": 8, "sites": []}, "sites is empty"),
        ({"number": 8}, "number"),
        ({"repeat": 2}, "do nothing without"),
    ],
)
def test_a_recipe_that_asks_for_nonsense_is_refused(make_recipe: Make, spec: Any, words: str) -> None:
    with pytest.raises((CommonweightError, ValueError), match=words):
        make_recipe(privacy={"canaries": spec})


def test_a_canary_that_is_there_twice_is_no_single_example(make_recipe: Make) -> None:
    privacy = {"dp": "example", "clip": 0.5, "delta": 1e-5, "epsilon": 8, "canaries": {"count": 8, "repeat": 2}}
    with pytest.raises(ValueError, match="covers a single example"):
        make_recipe(privacy=privacy)
    make_recipe(privacy={**privacy, "canaries": {"count": 8}})


def test_over_a_network_they_are_refused(make_recipe: Make) -> None:
    recipe = make_recipe(privacy={"canaries": {"count": 8}})
    check_methods(recipe)
    with pytest.raises(RecipeError, match=r"privacy\.canaries.*over a network"):
        check_methods(recipe, network=True)

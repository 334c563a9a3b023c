"""Partition and hold-out: who owns which rows, and which are tested on."""

from __future__ import annotations

from typing import Any

import pytest

from commonweight.data.draws import rank, sample
from commonweight.data.formats import Row
from commonweight.data.holdout import Split, group_names, grouped_rows, hold_out
from commonweight.data.partition import partition, site_names
from commonweight.errors import CommonweightError, DataError, RecipeError
from commonweight.recipe.schema import HoldoutSpec, SitesSpec


def rows(values: list[Any], field: str = "by", file: str = "a.jsonl") -> list[Row]:
    return [Row({field: value, "n": i}, file, i + 1, "line") for i, value in enumerate(values)]


def numbers(sites: dict[str, list[Row]]) -> dict[str, list[int]]:
    return {name: [row.fields["n"] for row in owned] for name, owned in sites.items()}


def refused(kind: type[CommonweightError], data: list[Row], seed: int = 0, **options: Any) -> CommonweightError:
    spec = SitesSpec(**options)
    with pytest.raises(kind) as caught:
        partition(data, spec, seed)
    assert caught.value.hint
    return caught.value


def test_field_sites_come_in_natural_order_with_rows_in_file_order() -> None:
    sites = partition(rows(["10_b", "2_a", "10_b", " 2_a"[1:], "x"]), SitesSpec(by="by"), 0)
    assert list(sites) == ["2_a", "10_b", "x"]
    assert numbers(sites) == {"2_a": [1, 3], "10_b": [0, 2], "x": [4]}


def test_numbers_and_truths_name_sites() -> None:
    assert list(partition(rows([3, 20, 3]), SitesSpec(by="by"), 0)) == ["3", "20"]
    assert list(partition(rows([False, True]), SitesSpec(by="by"), 0)) == ["False", "True"]
    assert site_names(rows([0, None, "a "]), SitesSpec(by="by")) == ["0", "", "a"]


def test_very_long_digits_still_sort() -> None:
    names = ["9" * 5000, "1" * 5000, "07", "7"]
    assert list(partition(rows(names), SitesSpec(by="by"), 0)) == ["07", "7", "1" * 5000, "9" * 5000]


def test_file_sites_are_called_after_the_file() -> None:
    data = rows([1], file="ward.v2.jsonl.gz") + rows([1], file="b.csv") + rows([1], file="b.json")
    assert list(partition(data, SitesSpec(scheme="file"), 0)) == ["b.csv", "b.json", "ward.v2"]


def test_iid_deals_evenly() -> None:
    sites = partition(rows(["x"] * 11), SitesSpec(scheme="iid", count=3), 0)
    assert list(sites) == ["site-01", "site-02", "site-03"]
    assert sorted(len(owned) for owned in sites.values()) == [3, 4, 4]
    assert all(owned == sorted(owned) for owned in numbers(sites).values())


def test_another_seed_deals_otherwise() -> None:
    spec = SitesSpec(scheme="iid", count=3)
    assert numbers(partition(rows(["x"] * 30), spec, 0)) != numbers(partition(rows(["x"] * 30), spec, 1))


def test_a_hundred_sites_keep_their_order() -> None:
    sites = partition(rows(["x"] * 100), SitesSpec(scheme="iid", count=100), 0)
    assert list(sites) == sorted(sites)
    assert next(iter(sites)) == "site-001"


def test_shards_give_each_site_few_values() -> None:
    data = rows([label for label in "abcd" for _ in range(10)])
    sites = partition(data, SitesSpec(scheme="shards", by="by", count=4, shards_per_site=1), 0)
    assert all(len({row.fields["by"] for row in owned}) == 1 for owned in sites.values())


def test_small_alpha_concentrates_and_large_alpha_evens_out() -> None:
    data = rows([label for label in "abcd" for _ in range(250)])

    def largest_share(alpha: float) -> float:
        sites = partition(data, SitesSpec(scheme="dirichlet", by="by", count=4, alpha=alpha), 0)
        shares = [max([row.fields["by"] for row in owned].count(v) for v in "abcd") / 250 for owned in sites.values()]
        return max(shares)

    assert largest_share(0.01) > 0.95
    assert largest_share(1000.0) < 0.35


@pytest.mark.parametrize("scheme", ["dirichlet", "quantity"])
def test_a_vanishing_alpha_leaves_no_site_empty(scheme: Any) -> None:
    sites = partition(rows(["x"] * 20), SitesSpec(scheme=scheme, by="by", count=10, alpha=1e-9), 0)
    assert sorted(len(owned) for owned in sites.values()) == [1] * 9 + [11]


def test_only_min_rows_and_largest_select_in_turn() -> None:
    data = rows(list("aaaabbbcccdde"))
    assert list(partition(data, SitesSpec(by="by", only=["b", "a"]), 0)) == ["a", "b"]
    assert list(partition(data, SitesSpec(by="by", min_rows=3), 0)) == ["a", "b", "c"]
    assert list(partition(data, SitesSpec(by="by", largest=2), 0)) == ["a", "b"]
    assert list(partition(data, SitesSpec(by="by", largest=1, only=["d", "e"]), 0)) == ["d"]


def test_no_rows() -> None:
    assert "no rows" in refused(DataError, [], scheme="iid", count=1).message


@pytest.mark.parametrize("scheme", ["field", "dirichlet", "shards"])
def test_a_field_that_no_row_has(scheme: Any) -> None:
    count = None if scheme == "field" else 2
    error = refused(RecipeError, rows(["a", "b"], "ward"), scheme=scheme, by="wards", count=count)
    assert error.message == "data.sites.by names the field 'wards', which no row has"
    assert "did you mean 'ward'?" in error.hint


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_rows_without_a_site_are_counted(value: Any) -> None:
    error = refused(DataError, rows(["a", value, "b", value]), by="by")
    assert "2 of 4 rows" in error.message
    assert "a.jsonl, line 2" in error.message


@pytest.mark.parametrize("pair", [(1, "1"), (True, "True"), (1, 1.0), ("a", "a ")])
def test_different_values_of_one_name(pair: tuple[Any, Any]) -> None:
    data = rows([1.0, "1.0"] if pair == (1, 1.0) else list(pair))
    assert "both of which name" in refused(DataError, data, by="by").message


@pytest.mark.parametrize("value", [["a"], {"k": 1}])
def test_a_site_is_a_single_value(value: Any) -> None:
    assert "not one value" in refused(DataError, rows([value]), by="by").message


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards", "quantity"])
def test_more_sites_than_rows(scheme: Any) -> None:
    error = refused(DataError, rows(["a", "b"]), scheme=scheme, by="by", count=3)
    assert "3 sites cannot share 2 rows" in error.message


def test_more_shards_than_rows() -> None:
    error = refused(DataError, rows(["a"] * 5), scheme="shards", by="by", count=3)
    assert "5 rows cannot be cut into 6 shards" in error.message


def test_unknown_name_in_only() -> None:
    error = refused(DataError, rows(["GARD", "CDC"]), by="by", only=["CDC", "gard"])
    assert "'gard'" in error.message
    assert "did you mean 'GARD'?" in error.hint


@pytest.mark.parametrize("options", [{"only": []}, {"min_rows": 3}])
def test_no_site_left_lists_the_sites(options: Any) -> None:
    error = refused(DataError, rows(["a", "a", "b"]), by="by", **options)
    assert "no site of 2 is left" in error.message
    assert "a (2), b (1)" in error.hint


def held(groups: dict[str, list[str]], seed: int = 0, **options: Any) -> dict[str, Split]:
    return hold_out(groups, HoldoutSpec(**options), seed=seed)


def test_exactly_so_many_examples_and_a_fifth_by_default() -> None:
    groups = {"a": [f"a{i}" for i in range(20)], "b": [f"b{i}" for i in range(11)]}
    assert [len(split.heldout) for split in held(groups, examples=4).values()] == [4, 4]
    assert [len(split.heldout) for split in held(groups).values()] == [4, 3]
    assert [len(split.heldout) for split in held(groups, fraction=0.5).values()] == [10, 6]


def test_rows_of_a_group_beyond_the_examples_are_withheld() -> None:
    split = held({"a": ["g"] * 5 + ["h"] * 5}, examples=3)["a"]
    assert (len(split.heldout), len(split.withheld), len(split.train)) == (3, 2, 5)


def test_a_group_held_out_anywhere_is_trained_on_nowhere() -> None:
    groups = {"a": ["g1", "g2", "g3"], "b": ["g1", "g2", "g3", "g4", "g4", "g5"]}
    splits = held(groups, examples=2)
    tested = {groups[name][i] for name, split in splits.items() for i in split.heldout}
    trained = {groups[name][i] for name, split in splits.items() for i in split.train}
    assert not tested & trained


def test_new_groups_do_not_move_the_old_ones_in_the_order() -> None:
    names = [f"patient {i}" for i in range(40)]
    before = held({"a": names[:20]}, fraction=0.25)["a"].heldout
    after = held({"a": names}, fraction=0.25)["a"].heldout
    order = sorted(range(40), key=lambda i: rank(0, "holdout", names[i]))
    assert [i for i in order if i < 20][:5] == [i for i in order if i in before]
    assert sorted(order[:10]) == after


def test_a_group_that_is_all_of_a_site_is_passed_over() -> None:
    for seed in range(5):
        split = held({"a": ["g"] * 9 + ["h"]}, seed=seed, examples=1)["a"]
        assert split.train


@pytest.mark.parametrize(
    ("groups", "options", "words"),
    [
        (["x"], {}, "site 'a' has 1 row: too few for a held-out part"),
        (["x", "y"], {"examples": 2}, "site 'a' has 2 rows: too few for 2 held-out examples"),
        (["x", "x"], {"examples": 1, "by": "p"}, "2 rows in 1 group of 'p'"),
    ],
)
def test_a_site_too_small_to_hold_out(groups: list[str], options: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        held({"a": groups}, **options)
    assert words in caught.value.message
    assert "data.sites.min_rows" in caught.value.hint


def test_a_site_whose_groups_are_all_held_out_elsewhere() -> None:
    names = [f"g{i}" for i in range(20)]
    first = sorted(names, key=lambda name: rank(0, "holdout", name))
    with pytest.raises(DataError, match="site 'b' has nothing to train on"):
        held({"a": names, "b": first[:3]}, fraction=0.4)


def test_sizes_hold_out_until_they_amount_to_the_examples() -> None:
    sizes = {"a": [10, 10, 10, 10]}
    split = hold_out({"a": list("wxyz")}, HoldoutSpec(examples=2), seed=0, sizes=sizes, size_of_example=8)["a"]
    assert (len(split.heldout), len(split.train)) == (2, 2)


def test_groups_by_field() -> None:
    data = rows(["p1", ["x", "y"], 3, None, " "], "patient")
    grouped = grouped_rows(data, "patient")
    assert group_names(grouped, "patient") == ["p1", '["x", "y"]', "3"]
    with pytest.raises(DataError, match="2 of 5 rows"):
        group_names(data, "patient")
    with pytest.raises(RecipeError, match=r"data\.holdout\.by names the field 'patent'"):
        grouped_rows(data, "patent")
    with pytest.raises(DataError, match="none of the 2 rows"):
        grouped_rows(data[3:], "patient")


def test_sample_keeps_order_and_takes_all_when_there_are_no_more() -> None:
    drawn = sample(range(100), 10, seed=0, purpose=("p",))
    assert drawn == sorted(drawn)
    assert len(set(drawn)) == 10
    assert drawn != sample(range(100), 10, seed=0, purpose=("q",))
    assert sample([5, 3], 7, seed=0, purpose=("p",)) == [5, 3] == sample([5, 3], None, seed=0, purpose=("p",))

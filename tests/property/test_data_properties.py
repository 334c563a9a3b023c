"""Properties of partition, hold-out and tokens, for any data that Hypothesis can think of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commonweight.data.chunks import cut
from commonweight.data.formats import Row, parse
from commonweight.data.holdout import hold_out
from commonweight.data.names import natural_key
from commonweight.data.partition import partition
from commonweight.data.templates import Places
from commonweight.data.tokens import Tokens, concatenate
from commonweight.errors import CommonweightError, DataError
from commonweight.recipe.schema import DataSpec, HoldoutSpec, SitesSpec

LABELS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**63 - 1)


def rows(labels: list[str]) -> list[Row]:
    return [Row({"by": label, "n": i}, "a.jsonl", i + 1) for i, label in enumerate(labels)]


def check_words(error: CommonweightError, place: str = "") -> None:
    """An error for a person: one sentence that names the place, and what to do."""
    assert error.hint
    assert place in error.message
    assert "\n" not in error.message


def owned(sites: dict[str, list[Row]]) -> dict[str, list[int]]:
    return {name: [row.fields["n"] for row in part] for name, part in sites.items()}


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards", "quantity"])
@given(labels=LABELS, data=st.data(), seed=SEEDS, alpha=st.floats(1e-12, 1e6))
@settings(max_examples=60, deadline=None)
def test_each_row_falls_to_exactly_one_site(scheme: Any, labels: list[str], data: Any, seed: int, alpha: float) -> None:
    count = data.draw(st.integers(1, len(labels)))
    spec = SitesSpec(scheme=scheme, by="by", count=count, alpha=alpha, shards_per_site=1)
    sites = owned(partition(rows(labels), spec, seed))
    assert sorted(n for part in sites.values() for n in part) == list(range(len(labels)))
    assert len(sites) == count
    assert all(part and part == sorted(part) for part in sites.values())
    assert sites == owned(partition(rows(labels), spec, seed))


@given(labels=LABELS, seed=SEEDS)
def test_field_sites_are_the_values(labels: list[str], seed: int) -> None:
    sites = partition(rows(labels), SitesSpec(by="by"), seed)
    assert {name: len(part) for name, part in sites.items()} == Counter(labels)
    assert list(sites) == sorted(sites)


@st.composite
def grouped_sites(draw: Any) -> dict[str, list[str]]:
    names = draw(st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=4, unique=True))
    group = st.integers(0, draw(st.integers(1, 30))).map(str)
    return {name: draw(st.lists(group, min_size=1, max_size=30)) for name in names}


HOLDOUTS = st.one_of(
    st.integers(1, 6).map(lambda n: HoldoutSpec(examples=n)),
    st.floats(0.01, 0.9).map(lambda share: HoldoutSpec(fraction=share)),
)


@given(groups=grouped_sites(), spec=HOLDOUTS, seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_held_out_groups_are_trained_on_nowhere(groups: dict[str, list[str]], spec: HoldoutSpec, seed: int) -> None:
    try:
        splits = hold_out(groups, spec, seed=seed)
    except DataError as error:
        check_words(error)
        return
    tested = {groups[site][i] for site, split in splits.items() for i in split.heldout}
    trained = {groups[site][i] for site, split in splits.items() for i in split.train}
    assert not tested & trained
    for site, split in splits.items():
        assert split.train
        assert split.heldout
        assert sorted(split.train + split.heldout + split.withheld) == list(range(len(groups[site])))
        assert spec.examples is None or len(split.heldout) == spec.examples
    assert splits == hold_out(groups, spec, seed=seed)


@given(num_rows=st.integers(2, 40), spec=HOLDOUTS, seed=SEEDS)
def test_single_rows_can_always_be_held_out_when_enough(num_rows: int, spec: HoldoutSpec, seed: int) -> None:
    wanted = spec.examples or 1
    if num_rows > max(wanted, num_rows * (spec.fraction or 0) + 1):
        split = hold_out({"a": [str(i) for i in range(num_rows)]}, spec, seed=seed)["a"]
        assert not split.withheld


PIECES = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=9)


def tokens_of(pieces: list[list[int]]) -> Tokens:
    return Tokens.of([(np.array(piece, np.int32), np.array([n % 2 == 0 for n in piece], np.bool_)) for piece in pieces])


@given(left=PIECES, right=PIECES)
def test_concatenate_and_subset_take_apart_what_they_put_together(
    left: list[list[int]], right: list[list[int]]
) -> None:
    whole = concatenate([tokens_of(left), tokens_of(right)])
    assert [whole.ids_of(i).tolist() for i in range(len(whole))] == left + right
    back = whole.subset(range(len(left)))
    assert np.array_equal(back.ids, tokens_of(left).ids)
    assert np.array_equal(back.labelled, tokens_of(left).labelled)
    assert np.array_equal(back.bounds, tokens_of(left).bounds)


@given(pieces=PIECES, prefix=st.lists(st.just(7), max_size=2), length=st.integers(3, 12))
def test_pieces_are_the_stream(pieces: list[list[int]], prefix: list[int], length: int) -> None:
    encoded = [(np.array(piece, np.int32), np.ones(len(piece), np.bool_)) for piece in pieces]
    cuts, starts = cut(encoded, prefix, length)
    stream = [n for piece in pieces for n in piece]
    joined = [n for i in range(len(cuts)) for n in cuts.ids_of(i)[len(prefix) :].tolist()]
    assert joined == stream[: len(joined)]
    assert len(stream) - len(joined) <= (0 if prefix else 1)
    assert all(pieces[start] for start in starts)
    assert not any(cuts.labelled_of(i)[: max(1, len(prefix))].any() for i in range(len(cuts)))


@given(names=st.lists(st.text(max_size=8), max_size=12), data=st.data())
def test_natural_order_is_an_order(names: list[str], data: Any) -> None:
    shuffled = data.draw(st.permutations(names))
    assert sorted(names, key=natural_key) == sorted(shuffled, key=natural_key)


@given(template=st.text(alphabet="ab{}!:[. ", max_size=12))
def test_a_template_is_read_or_refused_in_words(template: str) -> None:
    try:
        places = Places(template, "data.text")
    except CommonweightError as error:
        check_words(error)
        return
    assert isinstance(places.fill(dict.fromkeys(places.fields, "x")), str)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "text"])
@pytest.mark.parametrize("zipped", [False, True])
@given(content=st.binary(max_size=200) | st.text(alphabet='ab,"{}[]:1\n\r \\u', max_size=60).map(str.encode))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_rows_or_an_error_in_words(
    tmp_path_factory: pytest.TempPathFactory, kind: str, zipped: bool, content: bytes
) -> None:
    path: Path = tmp_path_factory.getbasetemp() / ("a.x.gz" if zipped else "a.x")
    path.write_bytes(content)
    try:
        found, _ = parse(path, path.name, kind, DataSpec())
    except DataError as error:
        check_words(error, str(path))
        return
    assert all(isinstance(row.fields, dict) and row.number >= 1 for row in found)

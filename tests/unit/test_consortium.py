"""The demo's data: the same for a seed, unlike from site to site, and learnable only in part at any one site."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from commonweight.data.consortium import KINDS, PROTOCOL, ROWS_PER_PATIENT, SITES, Condition, rows

Row = dict[str, str]


@pytest.fixture(scope="module")
def by_site() -> dict[str, list[Row]]:
    sites: dict[str, list[Row]] = defaultdict(list)
    for row in rows():
        sites[row["site"]].append(row)
    return sites


def test_same_seed_same_rows() -> None:
    assert rows(3) == rows(3)


def test_other_seed_other_rows() -> None:
    first, second = ({row["question"] for row in rows(seed)} for seed in (0, 1))
    assert len(first & second) < 0.1 * len(first)


def test_every_row_is_whole() -> None:
    for row in rows():
        assert list(row) == ["site", "subject", "question", "answer"]
        assert all(value == value.strip() and value for value in row.values())
        assert row["subject"] in row["question"]
        assert row["subject"] in row["answer"]
        assert "{" not in row["question"] + row["answer"]


def test_no_question_is_asked_twice() -> None:
    questions = [row["question"] for row in rows()]
    assert len(set(questions)) == len(questions)


def test_six_small_sites(by_site: dict[str, list[Row]]) -> None:
    assert set(by_site) == {site.name for site in SITES}
    assert len(by_site) == 6
    assert all(64 <= len(mine) <= 120 for mine in by_site.values())


def test_a_subject_has_several_rows_at_one_site() -> None:
    where = defaultdict(list)
    for row in rows():
        where[row["subject"]].append(row["site"])
    assert all(len(sites) == ROWS_PER_PATIENT and len(set(sites)) == 1 for sites in where.values())


def test_sites_differ_in_vocabulary_more_than_halves_of_one_site(by_site: dict[str, list[Row]]) -> None:
    words = {site: _words(mine) for site, mine in by_site.items()}
    between = [_divergence(words[a], words[b]) for a in words for b in words if a < b]
    within = [_divergence(_words(mine[::2]), _words(mine[1::2])) for mine in by_site.values()]
    assert min(between) > 2 * max(within)


def test_each_site_sees_its_own_conditions_most_and_misses_part_of_the_protocol(by_site: dict[str, list[Row]]) -> None:
    for site in SITES:
        seen = Counter(condition.field for row in by_site[site.name] for condition in _conditions(row))
        assert 0.25 < seen[site.field] / sum(seen.values()) < 0.45
        assert len(_facts(by_site[site.name])) < 0.95 * len(_facts(rows()))


def test_together_the_sites_see_the_whole_protocol() -> None:
    assert len(_facts(rows())) == 4 * len(PROTOCOL)


def test_the_base_model_was_told_nothing_of_the_protocol() -> None:
    corpus = _module(Path(__file__).parents[2] / "scripts" / "tiny_corpus.py")
    for condition in PROTOCOL:
        told = " ".join(["", *(corpus.HANDBOOK[condition.name, kind] for kind in KINDS)])
        test = condition.review.partition(" in ")[0]
        ours = (condition.drug, condition.dose, condition.advice, condition.sign, test)
        assert not [part for part in ours if f" {part}" in told], condition.name
        assert not told.startswith(f" {condition.level},")


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _conditions(row: Row) -> list[Condition]:
    return [condition for condition in PROTOCOL if condition.name in row["question"]]


def _facts(some: list[Row]) -> set[tuple[str, str]]:
    """The conditions and kinds of question that these rows answer as the protocol says."""
    return {
        (condition.name, kind)
        for row in some
        for condition in _conditions(row)
        for kind in KINDS
        if condition.fact(kind) in row["answer"]
    }


def _words(some: list[Row]) -> Counter[str]:
    return Counter(re.findall(r"[a-z]+", " ".join(row["question"] + " " + row["answer"] for row in some).lower()))


def _divergence(a: Counter[str], b: Counter[str]) -> float:
    """Jensen-Shannon divergence of two word counts, in bits: 0 alike, 1 without a word in common."""
    total = 0.0
    for word in a | b:
        p, q = a[word] / a.total(), b[word] / b.total()
        middle = (p + q) / 2
        total += sum(x / 2 * math.log2(x / middle) for x in (p, q) if x)
    return total

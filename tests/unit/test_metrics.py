"""Figures and intervals: against hand-made numbers, a plain loop, and simulations whose truth is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commonweight.errors import DataError
from commonweight.evaluate import Scores, bootstrap, compare, macro, macro_interval, summarise
from commonweight.evaluate.metrics import perplexity, verdict


def scores_of(nll: Any, tokens: Any, correct: Any = None, **more: Any) -> Scores:
    return Scores(nll=nll, tokens=tokens, correct=np.zeros(len(tokens), int) if correct is None else correct, **more)


def simulated(rng: np.random.Generator, num_groups: int, *, rate: float = 2.5) -> tuple[Scores, list[int]]:
    """Groups of one to three rows; a group's loss per token is skewed, its mean `rate`."""
    groups = np.repeat(np.arange(num_groups), rng.integers(1, 4, num_groups))
    tokens = rng.integers(5, 150, len(groups))
    return scores_of(tokens * rate * rng.gamma(4, 0.25, num_groups)[groups], tokens), groups.tolist()


def width(interval: list[float]) -> float:
    return interval[1] - interval[0]


def test_figures_by_hand() -> None:
    scores = scores_of([2.0, 3.0, 1.0], [1, 4, 1], [0, 3, 0], exact=[True, False, True], choice=[0, 1, 1])
    summary = summarise(scores, ["a", "b", "c"])
    assert summary["loss"] == 1.0
    assert summary["perplexity"] == math.e
    assert summary["token_accuracy"] == 0.5
    assert summary["exact_match"] == summary["choice_accuracy"] == pytest.approx(2 / 3)
    assert (summary["examples"], summary["tokens"], summary["groups"]) == (3, 6, 3)


def test_optional_figures_are_left_out() -> None:
    summary = summarise(scores_of([1.0] * 8, [1] * 8), range(8))
    assert not {"exact_match", "exact_match_ci95", "choice_accuracy"} & set(summary)
    assert set(summary) >= {"loss", "ci95", "token_accuracy", "token_accuracy_ci95"}


def test_a_summary_is_json_even_when_training_diverged() -> None:
    summary = summarise(scores_of([1e6] * 8, [1] * 8), range(8))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert perplexity(1e6) == math.exp(700)


def test_the_interval_equals_a_plain_loop_over_the_same_resamples() -> None:
    rng = np.random.default_rng(3)
    scores, groups = simulated(rng, 9)
    loop = []
    for drawn in np.concatenate(list(bootstrap.resample_indices(9, 200, 7))):
        nll = tokens = 0.0
        for group in drawn:
            for row, label in enumerate(groups):
                if label == group:
                    nll += float(scores.nll[row])
                    tokens += float(scores.tokens[row])
        loop.append(nll / tokens)
    assert len(drawn) == 8
    tail = NormalDist().cdf(-bootstrap.student_quantile(8))
    expected = np.quantile(loop, [tail, 1 - tail])
    assert summarise(scores, groups, resamples=200, seed=7)["ci95"] == pytest.approx(expected, rel=1e-12)


def test_chunks_do_not_change_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, groups = simulated(np.random.default_rng(0), 17)
    whole = summarise(scores, groups, resamples=333)
    monkeypatch.setattr(bootstrap, "CHUNK_ELEMENTS", 50)
    chunks = list(bootstrap.resample_indices(17, 333, 0))
    assert len(chunks) == 111
    assert all(chunk.size <= 50 for chunk in chunks)
    assert summarise(scores, groups, resamples=333) == whole


def test_the_seed_decides_the_interval_and_nothing_else() -> None:
    scores, groups = simulated(np.random.default_rng(0), 12)
    assert summarise(scores, groups, seed=1) == summarise(scores, groups, seed=1)
    assert summarise(scores, groups, seed=1)["ci95"] != summarise(scores, groups, seed=2)["ci95"]
    assert summarise(scores, groups, seed=1)["loss"] == summarise(scores, groups, seed=2)["loss"]


@pytest.mark.parametrize(("num_groups", "low", "high"), [(6, 0.88, 0.96), (10, 0.90, 0.97), (24, 0.92, 0.98)])
def test_the_interval_covers_the_truth(num_groups: int, low: float, high: float) -> None:
    rng = np.random.default_rng(num_groups)
    hits = 0
    for k in range(600):
        scores, groups = simulated(rng, num_groups)
        interval = summarise(scores, groups, resamples=300, seed=k)["ci95"]
        hits += interval[0] <= 2.5 <= interval[1]
    assert low <= hits / 600 <= high


def test_the_mean_over_sites_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    truth = [2.0, 2.5, 4.0, 3.0]
    hits = 0
    for k in range(400):
        sites = {f"site {s}": simulated(rng, 12, rate=rate) for s, rate in enumerate(truth)}
        interval = macro_interval(sites, resamples=300, seed=k)
        assert interval is not None
        hits += interval[0] <= np.mean(truth) <= interval[1]
    assert 0.91 <= hits / 400 <= 0.98


@pytest.mark.parametrize("num_groups", [6, 24])
def test_two_equal_arms_are_seldom_told_apart(num_groups: int) -> None:
    rng = np.random.default_rng(num_groups)
    wrong = 0
    for k in range(500):
        scores, groups = simulated(rng, num_groups)
        nll = [scores.nll + scores.tokens * rng.normal(0, 0.1, num_groups)[groups] for _ in range(2)]
        arms = [scores_of(one, scores.tokens) for one in nll]
        wrong += compare(*arms, groups, resamples=300, seed=k)["verdict"] != "unclear"
    assert wrong / 500 <= 0.10


def test_rows_of_one_group_are_no_independent_evidence() -> None:
    rng = np.random.default_rng(5)
    nll, tokens = rng.gamma(4, 10, 20), rng.integers(10, 30, 20)
    once = summarise(scores_of(nll, tokens), range(20))
    fivefold = scores_of(np.repeat(nll, 5), np.repeat(tokens, 5))
    groups = np.repeat(np.arange(20), 5)
    assert summarise(fivefold, groups)["ci95"] == pytest.approx(once["ci95"])
    assert width(summarise(fivefold, range(100))["ci95"]) < 0.6 * width(once["ci95"])


@settings(max_examples=30, deadline=None)
@given(st.floats(-1.5, 5), st.integers(6, 12), st.integers(0, 2**31))
def test_a_constant_loss_a_token_shifts_the_interval_by_as_much(shift: float, num_groups: int, seed: int) -> None:
    scores, groups = simulated(np.random.default_rng(seed), num_groups)
    moved = scores_of(scores.nll + shift * scores.tokens, scores.tokens)
    before, after = (summarise(one, groups, resamples=100) for one in (scores, moved))
    assert after["loss"] == pytest.approx(before["loss"] + shift)
    assert after["ci95"] == pytest.approx([end + shift for end in before["ci95"]])


def test_pairs_are_told_apart_more_finely_than_two_intervals() -> None:
    rng = np.random.default_rng(2)
    scores, groups = simulated(rng, 24)
    better = scores_of(scores.nll - 0.05 * scores.tokens + rng.normal(0, 0.5, len(scores)), scores.tokens)
    paired = compare(better, scores, groups)
    alone = [summarise(one, groups)["ci95"] for one in (better, scores)]
    assert paired["verdict"] == "gains"
    assert paired["difference"] == pytest.approx(-0.05, abs=0.02)
    assert alone[0][1] > alone[1][0]
    assert width(paired["ci95"]) < 0.2 * min(width(one) for one in alone)


def test_a_comparison_turned_round_changes_its_sign() -> None:
    rng = np.random.default_rng(4)
    scores, groups = simulated(rng, 10)
    other = scores_of(scores.nll * rng.uniform(0.9, 1.3, len(scores)), scores.tokens)
    forth, back = compare(other, scores, groups), compare(scores, other, groups)
    assert forth["difference"] == pytest.approx(-back["difference"])
    assert forth["ci95"] == pytest.approx([-end for end in reversed(back["ci95"])])
    assert {forth["verdict"], back["verdict"]} in ({"gains", "loses"}, {"unclear"})


def test_an_arm_compared_with_itself_is_unclear() -> None:
    scores, groups = simulated(np.random.default_rng(0), 8)
    assert compare(scores, scores, groups) == {"difference": 0.0, "ci95": [0.0, 0.0], "verdict": "unclear"}


def test_arms_on_different_examples_are_not_compared() -> None:
    with pytest.raises(DataError, match="same examples"):
        compare(scores_of([1.0, 1.0], [2, 3]), scores_of([1.0, 1.0], [3, 2]), "ab")


@pytest.mark.parametrize(
    ("ci95", "expected"),
    [([-2, -1], "gains"), ([1, 2], "loses"), ([-1, 1], "unclear"), ([-1, 0], "unclear"), (None, "unclear")],
)
def test_verdicts(ci95: list[float] | None, expected: str) -> None:
    assert verdict(ci95) == expected


@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_too_few_groups_give_no_interval_and_no_verdict(num_groups: int) -> None:
    rows = 20
    groups = [k % num_groups for k in range(rows)]
    good, bad = scores_of([1.0] * rows, [1] * rows), scores_of([9.0] * rows, [1] * rows)
    assert summarise(good, groups)["ci95"] is None
    assert summarise(good, groups)["token_accuracy_ci95"] is None
    found = compare(good, bad, groups)
    assert (found["difference"], found["ci95"], found["verdict"]) == (-8.0, None, "unclear")


def test_none_right_of_24_is_not_certainly_none() -> None:
    rows = 24
    summary = summarise(scores_of([1.0] * rows, [2] * rows, [2] * rows, exact=[False] * rows), range(rows))
    assert summary["exact_match_ci95"] == pytest.approx([0, 0.1425], abs=1e-4)
    assert summary["token_accuracy_ci95"] == pytest.approx([0.8575, 1], abs=1e-4)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(4, 2.7764), (5, 2.5706), (10, 2.2281), (23, 2.0687), (100, 1.9840), (10_000, 1.9602)]
)
def test_student_quantiles_match_the_tables(degrees: int, quantile: float) -> None:
    assert bootstrap.student_quantile(degrees) == pytest.approx(quantile, abs=1e-3)


def test_the_macro_mean_counts_every_site_alike() -> None:
    assert macro({"small": {"loss": 1.0}, "large": {"loss": 3.0}}) == 2.0
    assert macro({"a": {"token_accuracy": 0.25}, "b": {"token_accuracy": 0.75}}, "token_accuracy") == 0.5
    with pytest.raises(DataError, match="at least one site"):
        macro({})


def test_the_macro_interval_does_not_depend_on_the_order_of_sites() -> None:
    rng = np.random.default_rng(0)
    sites = {name: simulated(rng, 8) for name in "abcd"}
    assert macro_interval(sites) == macro_interval(dict(reversed(sites.items())))


def test_the_macro_interval_of_one_site_is_that_sites() -> None:
    scores, groups = simulated(np.random.default_rng(8), 40)
    own = summarise(scores, groups, resamples=4000)["ci95"]
    assert macro_interval({"only": (scores, groups)}, resamples=4000) == pytest.approx(own, rel=0.01)


def test_the_macro_interval_narrows_with_the_number_of_sites() -> None:
    rng = np.random.default_rng(0)
    sites = {f"{k}": simulated(rng, 10) for k in range(64)}
    few, many = macro_interval(dict(list(sites.items())[:4])), macro_interval(sites)
    assert few is not None
    assert many is not None
    assert width(many) < 0.5 * width(few)


def test_sites_of_a_single_group_are_resampled_among_each_other_or_give_no_interval() -> None:
    rng = np.random.default_rng(0)
    sites = {f"{k}": simulated(rng, 10) for k in range(4)}
    lone = (scores_of([30.0, 20.0], [10, 10]), ["x", "x"])
    assert macro_interval(sites | {"lone": lone}) is None
    pair = macro_interval(sites | {"lone": lone, "other": (scores_of([10.0], [10]), ["y"])})
    assert pair is not None
    assert width(pair) > width(macro_interval(sites) or [0, 0]) * 4 / 6


def test_too_few_groups_over_all_sites_give_no_macro_interval() -> None:
    sites = {name: simulated(np.random.default_rng(0), 2) for name in "ab"}
    assert macro_interval(sites) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scores_of([1.0, math.nan], [1, 1]), "not finite"),
        (lambda: scores_of([1.0, math.inf], [1, 1]), "row 1"),
        (lambda: scores_of([1.0, 1.0], [1, 0]), "no label token"),
        (lambda: scores_of([1.0], [1], [2]), "correct"),
        (lambda: scores_of([1.0], [1], [-1]), "correct"),
        (lambda: scores_of([1.0, 2.0], [1]), "length"),
        (lambda: scores_of([1.0], [1.5]), "tokens"),
        (lambda: scores_of([1.0], [math.nan]), "tokens"),
        (lambda: scores_of([[1.0]], [1]), "flat list"),
        (lambda: scores_of(["x"], [1]), "nll"),
        (lambda: scores_of([1.0], [1], exact=[0.5]), "exact"),
        (lambda: scores_of([1.0], [1], choice=[True, False]), "length"),
        (lambda: summarise(scores_of([], []), []), "no held-out example"),
        (lambda: summarise(scores_of([1.0], [1]), ["a", "b"]), "2 group labels for 1 rows"),
        (lambda: macro_interval({}), "at least one site"),
        (lambda: Scores.from_json({"nll": [1.0], "tokens": [1]}), "correct"),
        (lambda: Scores.from_json({"nll": [], "tokens": [], "correct": [], "bleu": []}), "bleu"),
    ],
)
def test_impossible_scores_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**6), st.booleans()), max_size=20),
    st.booleans(),
)
def test_scores_survive_json(rows: list[tuple[float, int, bool]], with_exact: bool) -> None:
    nll, tokens, right = ([row[k] for row in rows] for k in range(3))
    scores = scores_of(nll, tokens, tokens, exact=right if with_exact else None)
    again = Scores.from_json(json.loads(json.dumps(scores.to_json())))
    assert again.to_json() == scores.to_json()
    assert again.nll.dtype == np.float64
    assert again.tokens.dtype == again.correct.dtype == np.int64
    assert (again.exact is None) is not with_exact
    assert again.choice is None
    assert len(again) == len(rows)

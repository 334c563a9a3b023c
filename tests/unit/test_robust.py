"""Robust rules against a few lines of NumPy written from their formulas, and against byzfl where it is installed.

The rows: unequal sizes, ties, rows that all agree, and hostile ones of 10⁶. The rounds of whole strategies: updates of
non-square float32, bfloat16, float64 and int64 tensors with unequal weights, one site missing in the second round.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from commonweight import registry
from commonweight.errors import RecipeError, RoundError
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.recipe.load import check_methods
from commonweight.recipe.schema import Recipe
from commonweight.seeding import derive_seed
from commonweight.strategies import side_by_side
from commonweight.strategies.base import ServerState
from commonweight.strategies.robust import bulyan as bulyan_file
from commonweight.strategies.robust import centered_clipping as clipping_file
from commonweight.strategies.robust import coordinatewise
from commonweight.strategies.robust import dnc as dnc_file
from commonweight.strategies.robust import geometric_median as geometric_file
from commonweight.strategies.robust import krum as krum_file
from commonweight.strategies.robust import rows as shared
from commonweight.strategies.robust.bulyan import Bulyan
from commonweight.strategies.robust.centered_clipping import CenteredClipping
from commonweight.strategies.robust.coordinatewise import Median, TrimmedMean
from commonweight.strategies.robust.dnc import DnC
from commonweight.strategies.robust.geometric_median import GeometricMedian
from commonweight.strategies.robust.krum import Krum, MultiKrum
from commonweight.strategies.robust.strategy import Combine, RobustStrategy
from commonweight.strategies.side_by_side import InMemory
from commonweight.strategies.update import Update

Array = NDArray[np.float64]

N, D = 11, 157  # 11 = 4·2 + 3: enough for every rule with f = 2


def drawn(n: int = N, d: int = D, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5).to(dtype)


def hostile(n: int = N, f: int = 2, value: float = 1e6) -> Tensor:
    """Rows of which f, not the last, are huge."""
    rows = drawn(n)
    rows[1 : 1 + f] = value
    return rows


def near(found: Tensor, expected: Array, rtol: float = 1e-6) -> None:
    scale = max(1e-30, float(np.abs(expected).max()))
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=rtol * scale)


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several stretches of columns in each test, the last one shorter."""
    monkeypatch.setattr(side_by_side, "_ELEMENTS", 500)


# the rules as strategies apply them: planned from one pass over the rows, then a stretch of columns at a time


def applied(
    rows: Tensor, plan: Callable[[shared.Survey], Combine], *, center: Tensor | None = None, columns: Any = ()
) -> Tensor:
    """What a plan makes of rows, n × d, and of the center, which is one more row: (d,), in the rows' dtype."""
    table, slots = table_of(rows, center)
    combine = plan(shared.survey(table, slots, columns=columns))
    return torch.cat([combine(part).clone() for _, part in shared.all_rows(table, slots)]).to(rows.dtype)


def table_of(rows: Tensor, center: Tensor | None = None) -> tuple[InMemory, list[str]]:
    theta = NamedTensors.of({"x": torch.zeros_like(rows[0])})
    slots = {} if center is None else {"center": NamedTensors.of({"x": center})}
    updates = [Update(str(i), 1, {"delta": NamedTensors.of({"x": row})}, 1.0, 1, 1, 1) for i, row in enumerate(rows)]
    return InMemory(ServerState(theta, slots), updates), list(slots)


def inner_products(rows: Tensor, *, pairwise: bool = True) -> Tensor:
    return shared.survey(table_of(rows)[0], pairwise=pairwise).products


def norms(rows: Tensor) -> Tensor:
    return inner_products(rows, pairwise=False).diagonal().sqrt()


def prepared(rows: Tensor, how: shared.Prepared) -> Tensor:
    """The rows after it, whose inner products must be those that it foretells."""
    found = how.rows_(rows.to(torch.float64, copy=True))
    torch.testing.assert_close(how.products(inner_products(rows)), found @ found.T, rtol=1e-9, atol=1e-9)
    return found.to(rows.dtype)


def mixed_with_nearest(rows: Tensor, f: int) -> Tensor:
    nearest = shared.nearest_rows(inner_products(rows), f)
    return prepared(rows, shared.Prepared(torch.ones(len(rows), dtype=torch.float64), nearest))


def clipped(rows: Tensor, bound: float) -> Tensor:
    return prepared(rows, shared.Prepared(shared.scales_within(inner_products(rows), bound)))


def median(rows: Tensor) -> Tensor:
    return applied(rows, lambda seen: coordinatewise.median)


def trimmed_mean(rows: Tensor, f: int) -> Tensor:
    return applied(rows, lambda seen: lambda part: coordinatewise.trimmed_mean(part, f))


def geometric_median(rows: Tensor, weights: Sequence[float], **options: Any) -> Tensor:
    def plan(seen: shared.Survey) -> Combine:
        coefficients = geometric_file.geometric_median(seen.products, weights, **options)
        return lambda part: coefficients @ part

    return applied(rows, plan)


def multi_krum(rows: Tensor, f: int, m: int) -> Tensor:
    def plan(seen: shared.Survey) -> Combine:
        chosen = krum_file.multi_krum(seen.products, f, m)
        return lambda part: shared.mean_of(part, chosen)

    return applied(rows, plan)


def centered_clipping(rows: Tensor, center: Tensor, **options: Any) -> Tensor:
    def plan(seen: shared.Survey) -> Combine:
        coefficients = clipping_file.centered_clipping(seen.products, **options)
        return lambda part: coefficients @ part

    return applied(rows, plan, center=center)


def bulyan(rows: Tensor, f: int) -> Tensor:
    def plan(seen: shared.Survey) -> Combine:
        chosen = bulyan_file.bulyan_choice(seen.products, f)
        return lambda part: bulyan_file.mean_near_median([part[place] for place in chosen], len(rows) - 4 * f)

    return applied(rows, plan)


def dnc(rows: Tensor, f: int, *, seed: int, c: float = 1.0, num_columns: int = 10_000, iterations: int = 5) -> Tensor:
    def plan(seen: shared.Survey) -> Combine:
        kept = dnc_file.dnc(seen.samples, f, c=c)
        return lambda part: shared.mean_of(part, kept)

    drawn_columns = dnc_file.draw_columns(rows.shape[1], seed=seed, size=num_columns, iterations=iterations)
    return applied(rows, plan, columns=drawn_columns)


# the rules, each from its formula, in float64


def numpy_sorted_distances(x: Array) -> list[list[tuple[float, int]]]:
    """For each row: (squared distance, index) of the others, the nearest first."""
    return [sorted((float(((x[i] - x[j]) ** 2).sum()), j) for j in range(len(x)) if j != i) for i in range(len(x))]


def numpy_trimmed(x: Array, f: int) -> Array:
    result: Array = np.sort(x, axis=0)[f : len(x) - f].mean(0)
    return result


def numpy_geometric_median(x: Array, w: Array, nu: float = 1e-6, turns: int = 32) -> Array:
    far = np.array([np.median(np.linalg.norm(x - row, axis=1)) for row in x])
    for _ in range(turns + 1):
        b = w / np.maximum(nu, far)
        v: Array = (b[:, None] * x).sum(0) / b.sum()
        far = np.linalg.norm(x - v, axis=1)
    return v


def numpy_krum_order(x: Array, f: int) -> list[int]:
    scores = [sum(d for d, _ in others[: max(1, len(x) - f - 2)]) for others in numpy_sorted_distances(x)]
    return sorted(range(len(x)), key=lambda i: (scores[i], i))


def numpy_centered_clipping(x: Array, v: Array, tau: float | None, turns: int) -> Array:
    for _ in range(turns):
        lengths = np.array([np.sqrt(((row - v) ** 2).sum()) for row in x])
        radius = np.median(lengths) if tau is None else tau
        v = v + np.mean([(row - v) * min(1.0, radius / n) for row, n in zip(x, lengths, strict=True)], axis=0)
    return v


def numpy_bulyan(x: Array, f: int) -> Array:
    left = list(range(len(x)))
    chosen: list[int] = []
    while len(chosen) < len(x) - 2 * f:
        chosen.append(left.pop(numpy_krum_order(x[left], f)[0]))
    columns = []
    for column in x[chosen].T:
        center = np.median(column)
        columns.append(np.mean(sorted(column, key=lambda value: (abs(value - center), value))[: len(x) - 4 * f]))
    return np.array(columns)


def numpy_nearest_mixing(x: Array, f: int) -> Array:
    distances = numpy_sorted_distances(x)
    return np.stack([x[[i, *[j for _, j in distances[i][: len(x) - f - 1]]]].mean(0) for i in range(len(x))])


def numpy_dnc(x: Array, drop: int) -> Array:
    """One iteration over all columns."""
    centered = x - x.mean(0)
    direction = np.linalg.svd(centered, full_matrices=False)[2][0]
    scores = (centered @ direction) ** 2
    result: Array = x[np.argsort(scores)[: len(x) - drop]].mean(0)
    return result


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11, 20, 33, 100])
def test_the_network_sorts_every_column(n: int) -> None:
    rows = drawn(n, 97).round(decimals=1)  # rounded: with ties
    assert torch.equal(torch.stack(shared.sort_columns_(rows.clone())), rows.sort(0).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_median_against_numpy(n: int, dtype: torch.dtype) -> None:
    rows = drawn(n, dtype=dtype)
    found = median(rows)
    assert found.dtype == dtype
    near(found, np.median(rows.double().numpy(), axis=0), 1e-7)


@pytest.mark.parametrize(("n", "f"), [(1, 0), (4, 0), (3, 1), (10, 2), (11, 5), (12, 5)])
def test_trimmed_mean_against_numpy(n: int, f: int) -> None:
    rows = drawn(n)
    near(trimmed_mean(rows, f), numpy_trimmed(rows.double().numpy(), f), 1e-7)


@pytest.mark.parametrize("weights", [[1.0] * N, [3.0, 1.0, 7.5, 20.0, 1, 2, 3, 4, 5, 6, 7]])
def test_geometric_median_against_numpy(weights: list[float]) -> None:
    rows = hostile()
    found = geometric_median(rows, weights, max_iterations=32, tolerance=0)
    near(found, numpy_geometric_median(rows.double().numpy(), np.array(weights)))


def test_geometric_median_is_where_unit_vectors_to_the_rows_cancel() -> None:
    rows = drawn(dtype=torch.float64)
    found = geometric_median(rows, [1.0] * N, max_iterations=10_000, tolerance=0)
    towards = rows - found
    assert float((towards / towards.norm(dim=1, keepdim=True)).sum(0).norm()) < 1e-6


def test_geometric_median_of_a_line_is_its_weighted_median() -> None:
    rows = torch.tensor([[0.0], [1.0], [10.0]])
    assert geometric_median(rows, [1, 5, 2], max_iterations=1000, tolerance=0).item() == pytest.approx(1, abs=1e-5)
    assert geometric_median(rows, [1, 2, 5], max_iterations=1000, tolerance=0).item() == pytest.approx(10, abs=1e-4)


def test_geometric_median_stops_early_only_when_it_gains_nothing() -> None:
    rows, weights = hostile(), [1.0] * N
    stopped = geometric_median(rows, weights, max_iterations=10_000, tolerance=1e-10)
    near(stopped, numpy_geometric_median(rows.double().numpy(), np.ones(N), turns=500), 1e-3)
    once = geometric_median(rows, weights, max_iterations=10_000, tolerance=0.999_999)
    near(once, numpy_geometric_median(rows.double().numpy(), np.ones(N), turns=1))


@pytest.mark.parametrize(("n", "f"), [(3, 0), (5, 1), (7, 2), (12, 2), (6, 3)])
def test_krum_and_multi_krum_against_numpy(n: int, f: int) -> None:
    for seed in range(5):
        rows = drawn(n, seed=seed)
        order = numpy_krum_order(rows.double().numpy(), f)
        assert torch.equal(multi_krum(rows, f, 1), rows[order[0]])
        for m in (2, n - f, n):
            near(multi_krum(rows, f, m), rows.double().numpy()[order[:m]].mean(0), 1e-7)


def test_krum_takes_the_first_of_equal_scores() -> None:
    apart = drawn(1, 6)[0]
    rows = torch.stack([apart + 50, apart, apart, apart, apart - 50])
    assert torch.equal(multi_krum(rows, 1, 1), apart)
    square = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])  # every row has the same two nearest
    assert torch.equal(multi_krum(square, 0, 1), square[0])
    assert torch.equal(multi_krum(square, 0, 2), torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("tau", [0.01, 3.0, 12.0, 1e9, None])
@pytest.mark.parametrize("turns", [1, 4])
def test_centered_clipping_against_numpy(tau: float | None, turns: int) -> None:
    rows, center = drawn(), drawn(1, seed=9)[0]
    found = centered_clipping(rows, center, tau="median" if tau is None else tau, iterations=turns)
    near(found, numpy_centered_clipping(rows.double().numpy(), center.double().numpy(), tau, turns))


def test_centered_clipping_moves_by_tau_at_most() -> None:
    center = drawn(1, seed=9)[0]
    moved = centered_clipping(hostile(), center, tau=0.3, iterations=1) - center
    assert 0 < float(moved.norm()) <= 0.3 + 1e-5


@pytest.mark.parametrize(("n", "f"), [(3, 0), (8, 0), (7, 1), (9, 1), (11, 2), (16, 3)])
def test_bulyan_against_numpy(n: int, f: int) -> None:
    for seed in range(3):
        rows = drawn(n, seed=seed)
        near(bulyan(rows, f), numpy_bulyan(rows.double().numpy(), f), 1e-7)


def test_bulyan_keeps_the_smaller_of_two_values_equally_near() -> None:
    # all agree but for one row each side, equally far: 5 are chosen, 3 kept
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [1e3], [-1e3]])
    near(bulyan(rows, 1), numpy_bulyan(rows.double().numpy(), 1), 1e-7)


@pytest.mark.parametrize(("n", "f"), [(1, 0), (5, 0), (5, 1), (11, 2), (11, 10)])
def test_mixing_against_numpy(n: int, f: int) -> None:
    rows = drawn(n)
    near(mixed_with_nearest(rows, f).flatten(), numpy_nearest_mixing(rows.double().numpy(), f).ravel(), 1e-7)


def test_mixing_nothing_away_gives_the_mean_everywhere() -> None:
    rows = drawn()
    mixed = mixed_with_nearest(rows, 0)
    assert torch.equal(mixed, shared.mean_of(rows.double()).float().expand_as(mixed))


@pytest.mark.parametrize("c", [0.5, 1.0, 1.5])
def test_dnc_over_all_columns_against_numpy(c: float) -> None:
    rows = drawn()
    rows[3:5] += 2
    found = dnc(rows, 2, seed=1, c=c, num_columns=10**9, iterations=3)
    near(found, numpy_dnc(rows.double().numpy(), int(np.ceil(c * 2))), 1e-7)


def test_dnc_drops_what_stands_out_in_the_columns_that_it_drew() -> None:
    rows = hostile(value=3.0)
    for seed in range(5):
        near(dnc(rows, 2, seed=seed, num_columns=20), rows.double().numpy()[[0, *range(3, N)]].mean(0), 1e-7)


def test_dnc_draws_by_its_seed_alone() -> None:
    rows = drawn(21)  # nobody stands out: which ones are dropped depends on the columns
    found = [dnc(rows, 5, seed=seed, num_columns=3, iterations=1) for seed in range(6)]
    assert len({tuple(row.tolist()) for row in found}) > 1
    assert all(torch.equal(dnc(rows, 5, seed=s, num_columns=3, iterations=1), found[s]) for s in range(6))


def test_dnc_that_dropped_every_row_takes_those_dropped_least_often() -> None:
    rows = drawn(5, 1000)
    found = dnc(rows, 4, seed=0, num_columns=2, iterations=50)
    options = [rows.double().numpy()[list(chosen)].mean(0) for chosen in subsets(5)]
    assert any(np.abs(found.double().numpy() - option).max() < 1e-6 for option in options)


def subsets(n: int) -> list[list[int]]:
    return [[i for i in range(n) if bits >> i & 1] for bits in range(1, 2**n)]


@pytest.mark.parametrize("bound", [1e-3, 14.0, 1e9])
def test_clipping_against_numpy(bound: float) -> None:
    rows = hostile()
    x = rows.double().numpy().copy()
    lengths = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(norms(rows).numpy(), lengths, rtol=1e-12)
    expected = x * np.minimum(1, bound / lengths)[:, None]
    short = torch.tensor(lengths <= bound)
    found = clipped(rows, bound)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=3e-7)
    assert torch.equal(found[short], rows[short])


def test_a_row_of_zeros_is_clipped_to_zeros() -> None:
    assert not clipped(torch.zeros(2, 3), 0.0).any()


def test_distances_against_numpy_beside_a_huge_row() -> None:
    rows = hostile(f=1, value=1e30)
    found = shared.squared_distances(inner_products(rows)).numpy()
    x = rows.double().numpy()
    expected = ((x[:, None] - x) ** 2).sum(2)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=0)


def test_equal_rows_are_at_distance_nought() -> None:
    rows = drawn()
    rows[7] = rows[2]
    distances = shared.squared_distances(inner_products(rows))
    assert (distances == 0).nonzero().tolist() == sorted([[i, i] for i in range(N)] + [[2, 7], [7, 2]])


# what all rules have in common

RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "median": median,
    "trimmed-mean": lambda rows: trimmed_mean(rows, 2),
    "geometric-median": lambda rows: geometric_median(rows, [1.0] * len(rows), max_iterations=1000, tolerance=1e-12),
    "krum": lambda rows: multi_krum(rows, 2, 1),
    "multi-krum": lambda rows: multi_krum(rows, 2, len(rows) - 4),
    "centered-clipping": lambda rows: centered_clipping(
        rows, torch.full_like(rows[0], 0.5), tau="median", iterations=10
    ),
    "bulyan": lambda rows: bulyan(rows, 2),
    "dnc": lambda rows: dnc(rows, 2, seed=3, num_columns=50),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@each_rule
def test_the_order_of_the_rows_does_not_matter(rule: Callable[[Tensor], Tensor]) -> None:
    for seed in range(3):
        rows = drawn(seed=seed)
        rows[4:6] += 1
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(rule(rows[order]), rule(rows), rtol=0, atol=1e-6)


@each_rule
def test_rows_that_all_agree_are_the_result(rule: Callable[[Tensor], Tensor]) -> None:
    """To the bit; centered clipping, which begins elsewhere, gets there because none is further than the median."""
    row = drawn(1, seed=5)[0]
    found = rule(row.expand(N, D).clone())
    torch.testing.assert_close(found, row, rtol=0, atol=1e-6 if rule is RULES["centered-clipping"] else 0)


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rows_are_left_as_they_were(rule: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    rows = hostile().to(dtype)
    before = rows.clone()
    assert rule(rows).dtype == dtype
    norms(rows)
    assert torch.equal(rows, before)


@each_rule
@pytest.mark.parametrize("value", [1e6, -1e6, 1e30])
def test_f_huge_rows_do_not_carry_the_result_away(rule: Callable[[Tensor], Tensor], value: float) -> None:
    """The honest mean is 0.5 ± 1 at each coordinate; a mean of all would be at 2/11 of the huge value."""
    found, honest = rule(hostile(value=value)), hostile()[[0, *range(3, N)]]
    assert float((found - honest.mean(0)).norm()) <= float((honest - honest.mean(0)).norm(dim=1).max())


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "bulyan"])
@pytest.mark.parametrize("values", [(1e6, 1e6), (-1e6, 1e6), (3e38, -3e38)])
def test_coordinates_stay_within_the_honest_range(name: str, values: tuple[float, float]) -> None:
    rows = drawn()
    rows[1], rows[6] = values
    honest = rows[[0, 2, 3, 4, 5, 7, 8, 9, 10]]
    found = RULES[name](rows)
    assert bool((found >= honest.min(0).values).all())
    assert bool((found <= honest.max(0).values).all())


def test_with_nobody_hostile_the_selecting_rules_are_the_mean_of_what_they_select() -> None:
    rows = drawn()
    plain = rows.double().numpy().mean(0)
    near(trimmed_mean(rows, 0), plain, 1e-7)
    near(multi_krum(rows, 0, N), plain, 1e-7)
    near(bulyan(rows, 0), plain, 1e-7)
    near(dnc(rows, 0, seed=0), plain, 1e-7)
    near(centered_clipping(rows, torch.zeros(D), tau=1e9, iterations=1), plain, 1e-7)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: trimmed_mean(drawn(4), 2), "4 rows"),
        (lambda: trimmed_mean(drawn(4), -1), "f = -1"),
        (lambda: multi_krum(drawn(4), 2, 1), "n ≥ f \\+ 3"),
        (lambda: multi_krum(drawn(5), 1, 6), "m = 6"),
        (lambda: multi_krum(drawn(5), 1, 0), "m = 0"),
        (lambda: multi_krum(drawn(5), -1, 1), "f = -1"),
        (lambda: bulyan(drawn(10), 2), "n ≥ 4f \\+ 3"),
        (lambda: bulyan(drawn(10), -1), "f = -1"),
        (lambda: dnc(drawn(4), 4, seed=0), "would drop 4"),
        (lambda: dnc(drawn(4), 2, c=2.0, seed=0), "would drop 4"),
        (lambda: mixed_with_nearest(drawn(4), 4), "f = 4 of 4"),
        (lambda: mixed_with_nearest(drawn(4), -1), "f = -1"),
    ],
)
def test_a_rule_refuses_too_few_rows(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# whole strategies: the same formulas on updates of named tensors

WEIGHTS = (3.0, 1.0, 7.5, 20.0, 2.0, 2.5, 9.0, 4.0)
ROUNDS = 3


def initial() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "a.lora_A.weight": torch.randn(3, 5, generator=draw),
        "a.lora_B.weight": torch.randn(7, 3, generator=draw).to(torch.bfloat16),
        "scale": torch.randn((), generator=draw),
        "double": torch.randn(2, 3, 2, generator=draw, dtype=torch.float64),
        "ids": torch.tensor([3, -1, 2**40]),
    }


def random_like(layout: Layout, seed: int) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    made = NamedTensors.zeros(layout)
    for tensor in made.values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64) * 0.5 + 0.1)
    return made


def update_of(delta: NamedTensors, *, weight: float = 1.0, round: int = 1, site: str = "s") -> Update:
    return Update(site, round, {"delta": delta}, weight, num_examples=1, num_label_tokens=1, num_steps=1)


def rounds_of(layout: Layout) -> list[list[Update]]:
    """One of the eight sites is missing in the second round, and the fourth sends ten times as much as the others."""
    found = []
    for number in range(1, ROUNDS + 1):
        cohort = []
        for site, weight in enumerate(WEIGHTS):
            if (number, site) == (2, 2):
                continue
            delta = random_like(layout, 1000 * number + 10 * site)
            if site == 3:
                for _, flat in delta.floating():
                    flat.mul_(10)
            cohort.append(update_of(delta, weight=weight, round=number, site=f"site{site}"))
        found.append(cohort)
    return found


def play(strategy: RobustStrategy, state: ServerState, rounds: Sequence[Sequence[Update]]) -> ServerState:
    for cohort in rounds:
        fold = strategy.open(state)
        for update in cohort:
            fold.add(update)
        state = strategy.close(state, fold)
    return state


def flat_array(tensors: NamedTensors) -> Array:
    """All floating values, tensor after tensor by name, in float64."""
    return np.concatenate([t.double().numpy().ravel() for t in tensors.values() if t.is_floating_point()])


def bounded(x: Array, multiple: float) -> Array:
    lengths = np.linalg.norm(x, axis=1)
    result: Array = x * np.minimum(1, multiple * np.median(lengths) / lengths)[:, None]
    return result


NumpyRule = Callable[[Array, Array, Array], Array]  # rows, weights, the last aggregate → aggregate
CASES: list[tuple[type[RobustStrategy], dict[str, Any], NumpyRule]] = [
    (Median, {}, lambda x, w, v: np.median(x, axis=0)),
    (TrimmedMean, {"f": 2}, lambda x, w, v: numpy_trimmed(x, 2)),
    (GeometricMedian, {"tolerance": 0.0}, lambda x, w, v: numpy_geometric_median(x, w)),
    (Krum, {"f": 1}, lambda x, w, v: x[numpy_krum_order(x, 1)[0]]),
    (MultiKrum, {"f": 2}, lambda x, w, v: x[numpy_krum_order(x, 2)[: len(x) - 4]].mean(0)),
    (MultiKrum, {"f": 2, "m": 3}, lambda x, w, v: x[numpy_krum_order(x, 2)[:3]].mean(0)),
    (MultiKrum, {"f": 2, "m": 6}, lambda x, w, v: x[numpy_krum_order(x, 2)[: len(x) - 2]].mean(0)),
    (CenteredClipping, {}, lambda x, w, v: numpy_centered_clipping(x, v, None, 3)),
    (CenteredClipping, {"tau": 1.5, "iterations": 2}, lambda x, w, v: numpy_centered_clipping(x, v, 1.5, 2)),
    (Bulyan, {"f": 1}, lambda x, w, v: numpy_bulyan(x, 1)),
    (DnC, {"f": 2}, lambda x, w, v: numpy_dnc(x, 2)),
]
each_case = pytest.mark.parametrize(("kind", "options", "rule"), CASES, ids=lambda value: getattr(value, "name", ""))

THETA_RTOL = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: ROUNDS * 2.0**-9}


@each_case
@pytest.mark.parametrize("mixing", ["none", "nearest"])
@pytest.mark.parametrize("multiple", [2.0, 1e9])
def test_strategy_against_numpy(
    kind: type[RobustStrategy], options: dict[str, Any], rule: NumpyRule, mixing: str, multiple: float
) -> None:
    f = options.get("f", 2)
    given = {**options, "mixing": mixing, "f": f, "lr": 0.7, "norm_multiple": multiple}
    strategy = kind(kind.Options(**given), num_sites=len(WEIGHTS))
    start = NamedTensors.of(initial())
    rounds = rounds_of(start.layout)
    state = play(strategy, strategy.init(start.clone()), rounds)

    theta, last = flat_array(start), np.zeros_like(flat_array(start))
    largest = float(np.abs(theta).max())
    for cohort in rounds:
        rows = bounded(np.stack([flat_array(update.delta) for update in cohort]), multiple)
        if mixing == "nearest":
            rows = numpy_nearest_mixing(rows, f)
        last = rule(rows, np.array([update.weight for update in cohort]), last)
        theta = theta + 0.7 * last
        largest = max(largest, float(np.abs(theta).max()))
    # a distance taken from inner products is known to the square root of float64's rounding
    least = 1e-7 if kind in (GeometricMedian, CenteredClipping) else 0
    place = 0
    for name, entry in start.layout.by_name.items():
        if not entry.dtype.is_floating_point:
            assert torch.equal(state.theta[name], start[name])
            continue
        expected = theta[place : place + entry.numel]
        place += entry.numel
        atol = max(THETA_RTOL[entry.dtype], least) * largest
        np.testing.assert_allclose(state.theta[name].double().numpy().ravel(), expected, rtol=0, atol=atol)
    if kind is CenteredClipping:
        np.testing.assert_allclose(flat_array(state.slots["center"]), last, rtol=0, atol=1e-6 * np.abs(last).max())
        assert state.slots["center"]["a.lora_B.weight"].dtype == torch.float32
        assert not state.slots["center"]["ids"].any()


@each_case
def test_resuming_from_a_copied_state_gives_the_same_bits(
    kind: type[RobustStrategy], options: dict[str, Any], rule: NumpyRule
) -> None:
    start = NamedTensors.of(initial())
    strategy = kind(kind.Options(**options))
    straight = play(strategy, strategy.init(start.clone()), rounds_of(start.layout))
    resumed = strategy.init(start.clone())
    for cohort in rounds_of(start.layout):
        copied = ServerState(resumed.theta.clone(), {name: slot.clone() for name, slot in resumed.slots.items()})
        resumed = play(kind(kind.Options(**options)), copied, [cohort])
    assert resumed.theta.digest() == straight.theta.digest()
    assert {n: s.digest() for n, s in resumed.slots.items()} == {n: s.digest() for n, s in straight.slots.items()}


def test_weights_count_in_the_geometric_median_alone() -> None:
    start = NamedTensors.of(initial())
    cohort = rounds_of(start.layout)[0]
    heavy = [update_of(u.delta, weight=1e6 if i == 0 else 1.0) for i, u in enumerate(cohort)]
    even = [update_of(u.delta) for u in cohort]
    for kind, options, _ in CASES:
        strategy = kind(kind.Options(**options))
        results = [play(strategy, strategy.init(start.clone()), [c]).theta.digest() for c in (heavy, even)]
        assert (results[0] != results[1]) is (kind is GeometricMedian), kind.name


def test_an_absolute_norm_bound_holds_whatever_is_sent() -> None:
    strategy = GeometricMedian(GeometricMedian.Options(norm_bound=0.25))
    start = NamedTensors.of({"w": torch.zeros(6, 2)})
    huge = NamedTensors.of({"w": torch.full((6, 2), 1e6)})
    state = play(strategy, strategy.init(start.clone()), [[update_of(huge)] * 3])
    assert float(state.theta["w"].norm()) == pytest.approx(0.25, rel=1e-6)


@each_case
@pytest.mark.parametrize("mixing", ["none", "nearest"])
def test_a_row_whose_square_overflows_becomes_nothing(
    kind: type[RobustStrategy], options: dict[str, Any], rule: NumpyRule, mixing: str
) -> None:
    """A row longer than float64's largest number has squared length infinity, and any bound over it is 0."""
    strategy = kind(kind.Options(**{"f": 2, **options, "mixing": mixing}))
    start = NamedTensors.of({"w": torch.zeros(9, dtype=torch.float64)})
    rows = drawn(8, 9, dtype=torch.float64)
    rows[3] = 1e200
    cohort = [update_of(NamedTensors.of({"w": row})) for row in rows]
    found = play(strategy, strategy.init(start.clone()), [cohort]).theta["w"]
    assert float(found.norm()) < float(rows[[0, 1, 2, 4, 5, 6, 7]].norm(dim=1).max())


def test_dnc_draws_other_columns_in_another_round() -> None:
    strategy = DnC(DnC.Options(f=3, num_columns=2, iterations=1, seed=4, norm_multiple=1e9))
    rows = drawn(9, dtype=torch.float64)
    start = NamedTensors.of({"x": torch.zeros(D, dtype=torch.float64)})
    found = []
    for number in range(1, 9):
        cohort = [update_of(NamedTensors.of({"x": row}), round=number) for row in rows]
        found.append(play(strategy, strategy.init(start.clone()), [cohort]).theta["x"])
    assert len({tuple(row.tolist()) for row in found}) > 1
    expected = dnc(rows, 3, seed=derive_seed(4, "dnc", 8), num_columns=2, iterations=1)
    assert torch.equal(found[-1], expected)


ALL = [Median, TrimmedMean, GeometricMedian, Krum, MultiKrum, CenteredClipping, Bulyan, DnC]
LEAST_ANSWERS = [
    (Median, 2, 5),
    (TrimmedMean, 2, 5),
    (GeometricMedian, 1, 3),
    (CenteredClipping, 3, 7),
    (DnC, 2, 5),
    (Krum, 2, 7),
    (Krum, 0, 3),
    (MultiKrum, 1, 5),
    (Bulyan, 1, 7),
    (Bulyan, 0, 3),
]


@pytest.mark.parametrize(("kind", "f", "least"), LEAST_ANSWERS)
def test_too_few_answers_are_refused_and_change_nothing(kind: type[RobustStrategy], f: int, least: int) -> None:
    assert kind.least_answers(f) == least
    strategy = kind(kind.Options(f=f))
    state = strategy.init(NamedTensors.of(initial()))
    before = [tensors.digest() for tensors in (state.theta, *state.slots.values())]
    cohort = [update_of(random_like(state.theta.layout, i), round=7) for i in range(least)]
    with pytest.raises(RoundError) as caught:
        play(strategy, state, [cohort[:-1]])
    for words in (repr(kind.name), f"f = {f}", f"at least {least} ", f"{least - 1} answered in round 7"):
        assert words in caught.value.message
    assert "federation.min_sites" in caught.value.hint
    assert [tensors.digest() for tensors in (state.theta, *state.slots.values())] == before
    play(strategy, state, [cohort])
    assert state.theta.digest() != before[0]


@pytest.mark.parametrize(("kind", "f", "least"), LEAST_ANSWERS)
def test_a_run_with_too_few_sites_is_refused_before_it_begins(kind: type[RobustStrategy], f: int, least: int) -> None:
    options = kind.Options(f=f)
    assert kind(options, num_sites=least).num_sites == least
    with pytest.raises(RecipeError) as caught:
        kind(options, num_sites=least - 1).check(least - 1)
    for words in (repr(kind.name), f"f = {f}", f"at least {least} ", f"the run has {least - 1}"):
        assert words in caught.value.message


def test_the_hint_names_the_largest_f_that_would_do() -> None:
    with pytest.raises(RecipeError) as caught:
        Bulyan(Bulyan.Options(f=3), num_sites=12)
    assert "lower f to 2" in caught.value.hint
    with pytest.raises(RecipeError) as caught:
        Krum(Krum.Options(f=0), num_sites=2)
    assert "another strategy" in caught.value.hint


def test_multi_krum_refuses_more_updates_than_are_left_without_f() -> None:
    assert MultiKrum(MultiKrum.Options(f=2, m=6), num_sites=8).num_sites == 8
    with pytest.raises(RecipeError) as caught:
        MultiKrum(MultiKrum.Options(f=2, m=7), num_sites=8)
    assert "m = 7" in caught.value.message
    assert "lower m to 6" in caught.value.hint


@pytest.mark.parametrize("kind", ALL)
def test_one_site_stands_for_a_number_not_known_yet(kind: type[RobustStrategy]) -> None:
    assert kind(kind.Options(f=2)).num_sites == 1
    with pytest.raises(RecipeError, match="the run has 1"):
        kind(kind.Options(f=2)).check(1)


@pytest.mark.parametrize("kind", ALL)
def test_an_empty_round_is_refused(kind: type[RobustStrategy]) -> None:
    strategy = kind(kind.Options(f=0))
    state = strategy.init(NamedTensors.of(initial()))
    with pytest.raises(ValueError, match="no update"):
        strategy.close(state, strategy.open(state))


@pytest.mark.parametrize("kind", ALL)
def test_attributes(kind: type[RobustStrategy]) -> None:
    assert kind.needs == "individuals"
    assert kind.rule
    assert re.search(r"(19|20)\d\d, arXiv:\d{4}\.\d{5}$", kind.source)
    assert kind.Options.model_config.get("frozen")
    assert all(field.description for field in kind.Options.model_fields.values())


@pytest.mark.parametrize("kind", [TrimmedMean, Krum, MultiKrum, Bulyan, DnC])
def test_f_must_be_given_where_the_rule_works_with_it(kind: type[RobustStrategy]) -> None:
    for given in ({}, {"f": None}):
        with pytest.raises(ValidationError, match="f must be given"):
            kind.Options(**given)


def test_a_recipe_without_f_is_refused_at_validation() -> None:
    recipe = {"name": "a", "federation": {"strategy": "krum"}}
    with pytest.raises(RecipeError) as caught:
        check_methods(Recipe.model_validate(recipe))
    assert "`federation.strategy`" in caught.value.message
    assert "f must be given" in caught.value.message
    check_methods(Recipe.model_validate({"name": "a", "federation": {"strategy": {"name": "krum", "f": 1}}}))


@pytest.mark.parametrize("kind", ALL)
def test_every_name_resolves_to_its_class(kind: type[RobustStrategy]) -> None:
    assert registry.resolve("strategy", kind.name) is kind


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "bad",
    [
        {"f": -1},
        {"f": 1.5},
        {"mixing": "all"},
        {"norm_bound": 0},
        {"norm_bound": "mean"},
        {"norm_bound": float("inf")},
        {"norm_multiple": 0},
        {"lr": 0},
        {"stranger": 1},
    ],
)
def test_bad_options_are_refused(kind: type[RobustStrategy], bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        kind.Options(**({"f": 1} | bad))


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (GeometricMedian, {"nu": 0}),
        (GeometricMedian, {"max_iterations": 0}),
        (GeometricMedian, {"tolerance": -1}),
        (MultiKrum, {"m": 0}),
        (CenteredClipping, {"tau": 0}),
        (CenteredClipping, {"tau": "mean"}),
        (CenteredClipping, {"iterations": 0}),
        (DnC, {"c": 2.5}),
        (DnC, {"num_columns": 0}),
        (DnC, {"iterations": 0}),
        (DnC, {"seed": -1}),
    ],
)
def test_bad_options_of_one_rule_are_refused(kind: type[RobustStrategy], bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        kind.Options(**({"f": 1} | bad))


@pytest.mark.parametrize("kind", ALL)
def test_mixing_needs_to_know_how_many(kind: type[RobustStrategy]) -> None:
    with pytest.raises(ValidationError, match="mixing nearest with f = 0"):
        kind.Options(f=0, mixing="nearest")


# byzfl, written by others from the same papers. Its Krum sums over n − f − 1 neighbours where the paper has n − f − 2,
# so it is asked for f + 1; its Multi-Krum then averages n − f − 1 rows


@pytest.fixture(name="byzfl")
def _byzfl() -> Any:
    return pytest.importorskip("byzfl", exc_type=ImportError)


@pytest.mark.parametrize(("n", "f"), [(7, 1), (11, 2), (20, 4)])
def test_rules_against_byzfl(byzfl: Any, n: int, f: int) -> None:
    for seed in range(3):
        rows = drawn(n, 300, seed=seed)
        rows[1 : 1 + f] = -3 * rows[1 : 1 + f] + 5
        x = rows.double().numpy()
        mixed = mixed_with_nearest(rows, f)
        converged = geometric_median(rows, [1.0] * n, max_iterations=3000, tolerance=0)
        near(median(rows), byzfl.Median()(x), 1e-5)
        near(trimmed_mean(rows, f), byzfl.TrMean(f)(x), 1e-5)
        near(converged, byzfl.GeometricMedian(nu=1e-6, T=3000)(x), 1e-5)
        near(multi_krum(rows, f, 1), byzfl.Krum(f + 1)(x), 1e-5)
        near(multi_krum(rows, f, n - f - 1), byzfl.MultiKrum(f + 1)(x), 1e-5)
        near(mixed.flatten(), byzfl.NNM(f)(x).ravel(), 1e-5)
        near(trimmed_mean(mixed, f), byzfl.TrMean(f)(byzfl.NNM(f)(x)), 1e-5)
        clipped = byzfl.CenteredClipping(L=3, tau=4.0)(x)
        near(centered_clipping(rows, torch.zeros(300), tau=4.0, iterations=3), clipped, 1e-5)
        bound = 1.1 * float(np.median(np.linalg.norm(x, axis=1)))
        near(clipped(rows, bound).flatten(), byzfl.Clipping(bound)(x.copy()).ravel(), 1e-5)

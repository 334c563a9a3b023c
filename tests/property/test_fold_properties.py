"""What must hold of a fold whatever the tensors: it is linear, in order, and keeps nothing but the sum.

Many of these use whole numbers below 2⁶ as values and weights. Their sums and products are exact in float32, so that
equality is exact too, and a test that compares bits does not depend on the order of additions.
"""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commonweight.model.tensors import Layout, NamedTensors
from commonweight.strategies import base
from commonweight.strategies.base import WeightedSum
from commonweight.strategies.fedavg import FedAvg
from commonweight.strategies.update import Update, check

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]

layouts = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6
).map(lambda rows: Layout.of({f"t{i}": torch.empty(shape, dtype=dtype) for i, (dtype, shape) in enumerate(rows)}))
seeds = st.integers(0, 2**31)
whole_weights = st.lists(st.integers(1, 63).map(float), min_size=1, max_size=6)
weights = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=6)

quick = settings(max_examples=60, deadline=None)


def whole(layout: Layout, seed: int) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    made = NamedTensors.zeros(layout)
    for flat in made.flats.values():
        flat.copy_(torch.randint(-63, 64, flat.shape, generator=draw))
    return made


def real(layout: Layout, seed: int) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    made = NamedTensors.zeros(layout)
    for flat in made.flats.values():
        flat.copy_(torch.randn(flat.shape, generator=draw))
    return made


def update_of(delta: NamedTensors, weight: float) -> Update:
    return Update("s", 1, {"delta": delta}, weight, num_examples=1, num_label_tokens=1, num_steps=1)


def folded(layout: Layout, deltas: list[NamedTensors], weights: list[float]) -> WeightedSum:
    fold = WeightedSum(layout, ("delta",))
    for delta, weight in zip(deltas, weights, strict=True):
        fold.add(update_of(delta, weight))
    return fold


def drawn(layout: Layout, seed: int, count: int, *, of: str = "real") -> list[NamedTensors]:
    make = whole if of == "whole" else real
    return [make(layout, seed + index) for index in range(count)]


def assert_close(got: NamedTensors, expected: NamedTensors, rtol: float) -> None:
    """Relative to the size of standard normal numbers: sums may cancel to nothing."""
    for dtype, flat in got.floating():
        torch.testing.assert_close(flat, expected.flats[dtype], rtol=rtol, atol=8 * rtol)


@quick
@given(layouts, seeds, whole_weights, st.integers(1, 4))
def test_fold_is_linear(layout: Layout, seed: int, weights: list[float], factor: int) -> None:
    """fold(a·x + y) = a·fold(x) + fold(y), exactly for whole numbers."""
    xs = drawn(layout, seed, len(weights), of="whole")
    ys = drawn(layout, seed + 100, len(weights), of="whole")
    both = [NamedTensors.zeros(layout, wide=True) for _ in weights]
    for sums, x, y in zip(both, xs, ys, strict=True):
        for dtype, flat in sums.flats.items():
            flat.copy_(x.flats[dtype]).mul_(factor).add_(y.flats[dtype])
    left = folded(layout, both, weights).sums["delta"]
    x_sum, y_sum = folded(layout, xs, weights).sums["delta"], folded(layout, ys, weights).sums["delta"]
    for dtype, flat in left.floating():
        assert torch.equal(flat, factor * x_sum.flats[dtype] + y_sum.flats[dtype])


@quick
@given(layouts, seeds, weights, st.integers(-6, 6))
def test_scaling_all_weights_by_a_power_of_two_changes_no_bit(
    layout: Layout, seed: int, weights: list[float], exponent: int
) -> None:
    deltas = drawn(layout, seed, len(weights))
    scaled = [weight * 2.0**exponent for weight in weights]
    assert folded(layout, deltas, weights).mean().digest() == folded(layout, deltas, scaled).mean().digest()


@quick
@given(layouts, seeds, weights, st.floats(1e-2, 1e4))
def test_the_mean_does_not_depend_on_the_scale_of_the_weights(
    layout: Layout, seed: int, weights: list[float], factor: float
) -> None:
    deltas = drawn(layout, seed, len(weights))
    scaled = [weight * factor for weight in weights]
    assert_close(folded(layout, deltas, weights).mean(), folded(layout, deltas, scaled).mean(), rtol=16 * 2.0**-24)


@quick
@given(layouts, seeds, weights)
def test_streaming_equals_batch(layout: Layout, seed: int, weights: list[float]) -> None:
    """One at a time is `numpy.average` of all at once, to one rounding of 2⁻²⁴ an update."""
    deltas = drawn(layout, seed, len(weights))
    got = folded(layout, deltas, weights).mean()
    for dtype, flat in got.floating():
        rows = np.stack([delta.flats[dtype].double().numpy() for delta in deltas])
        expected = torch.from_numpy(np.average(rows, axis=0, weights=weights))
        torch.testing.assert_close(flat.double(), expected, rtol=0, atol=(len(weights) + 2) * 2.0**-24 * 6)


@quick
@given(layouts, seeds, weights)
def test_the_same_order_gives_the_same_bits(layout: Layout, seed: int, weights: list[float]) -> None:
    first = folded(layout, drawn(layout, seed, len(weights)), weights)
    second = folded(layout, drawn(layout, seed, len(weights)), weights)
    assert first.sums["delta"].digest() == second.sums["delta"].digest()
    assert first.total_weight == second.total_weight
    assert first.num_updates == second.num_updates == len(weights)


@quick
@given(layouts, seeds, whole_weights, st.randoms(use_true_random=False))
def test_order_does_not_matter_where_sums_are_exact(
    layout: Layout, seed: int, weights: list[float], random: Random
) -> None:
    pairs = list(zip(drawn(layout, seed, len(weights), of="whole"), weights, strict=True))
    shuffled = random.sample(pairs, len(pairs))
    straight = folded(layout, [d for d, _ in pairs], [w for _, w in pairs])
    other = folded(layout, [d for d, _ in shuffled], [w for _, w in shuffled])
    assert straight.mean().digest() == other.mean().digest()


@quick
@given(layouts, seeds, weights)
def test_inputs_are_not_modified(layout: Layout, seed: int, weights: list[float]) -> None:
    deltas = drawn(layout, seed, len(weights))
    before = [delta.digest() for delta in deltas]
    state = FedAvg().init(real(layout, seed + 1000))
    fold = FedAvg().open(state)
    for delta, weight in zip(deltas, weights, strict=True):
        update = update_of(delta, weight)
        check(update, round=1, layout=layout, channels=("delta",))
        fold.add(update)
    FedAvg().close(state, fold)
    assert [delta.digest() for delta in deltas] == before


@quick
@given(layouts, seeds, weights)
def test_the_fold_keeps_no_reference_to_an_update(layout: Layout, seed: int, weights: list[float]) -> None:
    """All updates arrive in one buffer that is overwritten after each, as a receiver may do."""
    deltas = drawn(layout, seed, len(weights))
    expected = folded(layout, deltas, weights).mean().digest()

    buffer = torch.empty(layout.arena_bytes, dtype=torch.uint8)
    fold = WeightedSum(layout, ("delta",))
    for delta, weight in zip(deltas, weights, strict=True):
        fold.add(update_of(NamedTensors.over(buffer, layout).copy_(delta), weight))
        buffer.fill_(255)  # NaN in every floating dtype
    assert fold.mean().digest() == expected


@quick
@given(layouts, seeds, weights)
def test_integers_are_left_alone(layout: Layout, seed: int, weights: list[float]) -> None:
    theta = real(layout, seed + 1000)
    before = {dtype: flat.clone() for dtype, flat in theta.flats.items() if not dtype.is_floating_point}
    state = FedAvg().init(theta)
    fold = FedAvg().open(state)
    for delta, weight in zip(drawn(layout, seed, len(weights)), weights, strict=True):
        fold.add(update_of(delta, weight))
    after = FedAvg().close(state, fold).theta
    assert all(torch.equal(after.flats[dtype], flat) for dtype, flat in before.items())
    assert all(flat.dtype == dtype for dtype, flat in after.flats.items())


@quick
@given(layouts, seeds, weights, st.integers(1, 7))
def test_pieces_change_no_bit(layout: Layout, seed: int, weights: list[float], piece: int) -> None:
    deltas = drawn(layout, seed, len(weights))
    whole_fold = folded(layout, deltas, weights).sums["delta"].digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_PIECE", piece)
        assert folded(layout, deltas, weights).sums["delta"].digest() == whole_fold


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    layout = Layout.of({"t": torch.empty(300_007, dtype=dtype)})
    deltas, before = drawn(layout, 0, 3), torch.get_num_threads()
    digests = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            digests.add(folded(layout, deltas, [3.7, 0.1, 11.3]).sums["delta"].digest())
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1

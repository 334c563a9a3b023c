"""Clipping and noise of site-level differential privacy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commonweight.model.tensors import NamedTensors, l2_norm
from commonweight.privacy.noise import GaussianNoise, new_key
from commonweight.privacy.site_level import NoisyMean, clip_

KEY = bytes(range(32))


def tensors(scale: float = 1.0, seed: int = 0) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    return NamedTensors.of(
        {
            "a": torch.randn(3, 5, generator=draw) * scale,
            "b": torch.randn(7, generator=draw, dtype=torch.float64) * scale,
            "c": torch.randn(4, generator=draw).bfloat16() * scale,
            "n": torch.arange(3),
        }
    )


def test_the_norm_is_that_of_all_tensors_together() -> None:
    found = tensors()
    flat = np.concatenate([t.double().numpy().reshape(-1) for name, t in found.items() if name != "n"])
    assert l2_norm(found) == pytest.approx(float(np.linalg.norm(flat)), rel=1e-12)
    assert l2_norm(NamedTensors.of({"x": torch.ones(3_000_000)})) == pytest.approx(math.sqrt(3_000_000), rel=1e-12)
    assert l2_norm(NamedTensors.of({"n": torch.arange(3)})) == 0


@settings(max_examples=60, deadline=None)
@given(scale=st.floats(1e-6, 1e6), bound=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_a_clipped_update_is_within_the_bound_and_keeps_its_direction(scale: float, bound: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    before = NamedTensors.of(
        {"a": torch.randn(40, generator=draw) * scale, "b": torch.randn(9, generator=draw) * scale}
    )
    after = before.clone()
    norm = clip_(after, bound)
    assert norm == pytest.approx(l2_norm(before), rel=1e-12)
    assert l2_norm(after) <= bound * (1 + 1e-6)
    factor = min(1.0, bound / norm)
    for name in before:
        torch.testing.assert_close(after[name], before[name] * factor, rtol=1e-5, atol=0)
    if norm <= bound:
        assert all((after[name] == before[name]).all() for name in before)


def test_narrow_dtypes_are_within_the_bound_too() -> None:
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        update = NamedTensors.of({"a": torch.randn(300, generator=draw).bfloat16()})
        clip_(update, 1.0)
        assert 0.98 < l2_norm(update) <= 1 + 1e-6


def test_noise_has_the_normal_distribution() -> None:
    """Over 10⁶ draws: mean, spread within half a percent, tails, and no correlation of neighbours."""
    values = GaussianNoise(KEY).values(0, 0, 1_000_000)
    assert abs(values.mean()) < 4e-3
    assert values.std() == pytest.approx(1.0, rel=5e-3)
    for z, above in ((1.0, 0.158655), (2.0, 0.022750), (3.0, 0.0013499)):
        assert (values > z).mean() == pytest.approx(above, rel=0.1)
        assert (values < -z).mean() == pytest.approx(above, rel=0.1)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4e-3
    assert abs((values**4).mean() - 3) < 0.05
    assert np.isfinite(values).all()


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 700_000), max_size=4))
def test_noise_is_the_same_in_stretches(cuts: list[int]) -> None:
    noise, whole = GaussianNoise(KEY), torch.zeros(700_000)
    noise.add_(whole, 2.0, number=1)
    places = sorted({0, 700_000, *cuts})
    parts = [
        noise.add_(torch.zeros(stop - start), 2.0, number=1, start=start) for start, stop in itertools.pairwise(places)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_each_key_and_row_has_noise_of_its_own() -> None:
    rows = [
        GaussianNoise(KEY).values(0, 0, 100),
        GaussianNoise(KEY).values(1, 0, 100),
        GaussianNoise(new_key()).values(0, 0, 100),
    ]
    assert len({row.tobytes() for row in rows}) == 3
    assert GaussianNoise(KEY).values(0, 0, 100).tobytes() == rows[0].tobytes()
    with pytest.raises(ValueError, match="32"):
        GaussianNoise(b"short")


def test_a_noisy_mean_is_the_sum_with_noise_over_a_fixed_number() -> None:
    """Independently: z·C times the noise, added in float64, and never divided by how many answered."""
    layout = NamedTensors.of({"a": torch.zeros(50), "b": torch.zeros(20, dtype=torch.float64)}).layout
    total = NamedTensors.zeros(layout, wide=True)
    for flat in total.flats.values():
        flat.fill_(3.0)
    released = NoisyMean(0.5, 2.0, 8, GaussianNoise(KEY)).release(total, {})
    for number, (name, length) in enumerate((("a", 50), ("b", 20))):
        exact = (3.0 + 1.0 * GaussianNoise(KEY).values(number, 0, length)) / 8
        np.testing.assert_allclose(released[name].double().numpy(), exact, rtol=1e-6)


def test_a_stretch_of_a_noisy_mean_has_the_bits_of_the_whole() -> None:
    layout = NamedTensors.of({"a": torch.zeros(1000)}).layout
    mean = NoisyMean(1.0, 1.0, 3, GaussianNoise(KEY))
    whole = mean.release(NamedTensors.zeros(layout), {})["a"]
    part = NamedTensors.of({"a": torch.zeros(300)})
    assert torch.equal(mean.release(part, {torch.float32: 600})["a"], whole[600:900])

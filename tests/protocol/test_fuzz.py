"""Broken messages by the hundred thousand: every one is refused by type, or is what its own encoding says it is."""

from __future__ import annotations

from random import Random

import pytest

from commonweight.wire import frames
from tests.protocol.fuzzing import TARGETS, Found, mutated, samples_of, try_one

CASES, SEEDS = 6000, 4  # times nine targets: 216,000


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_right_passes(name: str) -> None:
    assert all(try_one(name, raw) for raw in samples_of(name))


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_broken_is_refused_by_type(name: str, seed: int) -> None:
    draw = Random(f"{name} {seed}")
    passed = sum(try_one(name, mutated(name, draw)) for _ in range(CASES))
    assert 0 < passed < CASES  # some cases are left whole; and if none were refused, nothing would have been tested


def test_a_defect_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were headers taken in forms that are not canonical, this many cases would show it."""
    monkeypatch.setattr(frames, "_is_encoding_of", lambda header, frame: True)
    draw = Random(0)
    cases = [mutated("header", draw) for _ in range(CASES)]
    with pytest.raises(Found):
        sum(try_one("header", raw) for raw in cases)

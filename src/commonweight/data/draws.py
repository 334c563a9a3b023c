"""Seeded draws: each purpose has its own stream, so that a choice made in one place never shifts another.

A stream is NumPy's PCG64 from `derive_seed`. An order over named things sorts them by a seed derived from each name:
whatever else is in the data, a patient's place in the order stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from commonweight.seeding import derive_seed


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """A random stream that depends on nothing but the recipe's seed and what the numbers are for."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *purpose)))


def rank(seed: int, purpose: str, name: str) -> tuple[int, str]:
    """The place of `name` in a seeded order of names: compare two of these."""
    return derive_seed(seed, purpose, name), name


def sample(items: Sequence[int], count: int | None, *, seed: int, purpose: tuple[str, ...]) -> list[int]:
    """`count` of the items drawn without replacement, in their own order; all of them when there are no more."""
    if count is None or count >= len(items):
        return list(items)
    chosen = generator(seed, *purpose).permutation(len(items))[:count]
    return [items[i] for i in sorted(chosen.tolist())]

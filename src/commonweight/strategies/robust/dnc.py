"""DnC, divide and conquer: drop the updates that stand out along the direction of most variance.

Shejwalkar and Houmansadr 2021, Algorithm 2; a spectral filter after Diakonikolas et al. 2019, arXiv:1803.02815.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ...seeding import derive_seed
from ..update import Update
from .rows import Survey, mean_of
from .strategy import Combine, RobustStrategy, StatedOptions


def dnc(samples: Sequence[Tensor], f: int, *, c: float = 1.0) -> list[int]:
    """The rows that no iteration dropped.

    An iteration looks at one sample of the columns, subtracts their means, and drops the ⌈c·f⌉ rows with the largest
    squared projection on the first right singular vector; of equal ones the later. Where every row was dropped at
    some time, those that were dropped least often are taken.

    Args:
        samples: for each iteration its columns, n × k, float64.

    Raises:
        ValueError: f or c is negative, or ⌈c·f⌉ ≥ n.
    """
    n, num_dropped = len(samples[0]), math.ceil(c * f)
    if f < 0 or c < 0 or num_dropped >= n:
        raise ValueError(f"DnC of {n} rows with f = {f}, c = {c:g} would drop {num_dropped}: it must leave one")
    dropped = torch.zeros(n, dtype=torch.long)
    for sample in samples:
        dropped[_outlier_scores(sample).argsort(stable=True)[n - num_dropped :]] += 1
    kept: list[int] = (dropped == dropped.min()).nonzero().flatten().tolist()
    return kept


def draw_columns(num_columns: int, *, seed: int, size: int, iterations: int) -> list[list[int]]:
    """`iterations` draws of `size` columns, or of all if there are fewer; each in ascending order."""
    draw = random.Random(seed)
    return [sorted(draw.sample(range(num_columns), min(size, num_columns))) for _ in range(iterations)]


def _outlier_scores(part: Tensor) -> Tensor:
    """⟨xᵢ − mean, v⟩², v the first right singular vector of the centered rows: (n,).

    With rows X = U S Vᵀ the projections Xv are s·u, so u, the first eigenvector of the n × n matrix XXᵀ, is enough.
    """
    part = part - part.mean(0)
    values, vectors = torch.linalg.eigh(part @ part.T)
    scores: Tensor = values[-1] * vectors[:, -1].square()
    return scores


class DnC(RobustStrategy):
    """θ ← θ + η·mean of the Δᵢ that no spectral filter dropped (Shejwalkar and Houmansadr 2021). Sites count alike.

    The coordinates that a filter looks at are drawn from `seed` and the round, so a resumed run draws the same. Who
    knows the seed knows them: choose one that the sites do not see if they are to be surprised.
    """

    name = "dnc"
    rule = "θ ← θ + η·mean of the Δᵢ without the ⌈c·f⌉ that stand out along the first singular vector, several times"
    source = (
        "Shejwalkar and Houmansadr, Manipulating the Byzantine, NDSS 2021; the filter after Diakonikolas et al., "
        "Sever: A Robust Meta-Algorithm for Stochastic Optimization, ICML 2019, arXiv:1803.02815"
    )

    class Options(StatedOptions):
        """DnC's options."""

        c: float = Field(1.0, gt=0, le=2, description="How many times f updates are dropped in an iteration.")
        num_columns: int = Field(10_000, ge=1, description="Coordinates that an iteration looks at.")
        iterations: int = Field(5, ge=1, le=1000, description="Iterations, each with coordinates of its own.")
        seed: int = Field(0, ge=0, description="What the coordinates are drawn from, with the round's number.")

    options: Options

    def columns(self, num_columns: int, round: int) -> list[list[int]]:
        o = self.options
        return draw_columns(
            num_columns, seed=derive_seed(o.seed, "dnc", round), size=o.num_columns, iterations=o.iterations
        )

    def plan(self, seen: Survey, updates: Sequence[Update]) -> Combine:
        kept = dnc(seen.samples, self.options.f, c=self.options.c)
        return lambda rows: mean_of(rows, kept)

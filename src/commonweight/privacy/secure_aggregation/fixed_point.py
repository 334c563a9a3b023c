"""Real numbers as integers modulo 2³², so that sums are exact and masks hide them perfectly.

x in [−bound, bound] becomes ⌊x·levels/bound⌉ with `levels` = ⌊(2³¹ − 1)/n⌋: the sum of n such integers is less than
2³¹ in size, so that it never wraps. What lies outside is clipped, which bounds what one site can do to the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import RecipeError
from .masks import Ring

#: half the ring: sums lie in (−HALF, HALF)
HALF = 1 << 31
_PIECE = 1 << 16


@dataclass(frozen=True)
class FixedPoint:
    """An encoding for sums of at most `num_sites` numbers.

    Args:
        bound: the largest size of a number.
        num_sites: n.
        toward_zero: rounding never makes a number larger, so that a bound on many numbers together (a norm) holds for
            the encoded ones too; otherwise it is to nearest, which is closer.

    Raises:
        RecipeError: so many sites that fewer than 8 bits would be left for each, or the bound is not positive.
    """

    bound: float
    num_sites: int
    toward_zero: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.bound < float("inf"):
            raise RecipeError(
                f"a fixed-point bound of {self.bound}: it must be positive", hint="give the largest size of an element"
            )
        if self.num_sites < 1 or self.levels < 128:
            raise RecipeError(
                f"sums of {self.num_sites} sites leave fewer than 8 bits for each in a ring of 32",
                hint="use a smaller cohort",
            )

    @property
    def levels(self) -> int:
        """Steps between 0 and the bound."""
        return (HALF - 1) // self.num_sites

    @property
    def step(self) -> float:
        """The distance between neighbouring numbers; one rounding is off by half of it."""
        return self.bound / self.levels

    def encode(self, values: NDArray[np.floating], out: Ring, *, scale: float = 1.0) -> int:
        """Write the encoded values into `out`; returns how many were clipped.

        Rounded to nearest, ties to even, in float64: no random numbers, so that the same update has the same bits.

        Args:
            values: 1-D, float32 or float64.
            out: 1-D, uint32, of equal length.
            scale: by which they are multiplied before.

        Raises:
            ValueError: a value is NaN.
        """
        clipped, round = 0, np.trunc if self.toward_zero else np.rint
        for start in range(0, len(values), _PIECE):
            piece = values[start : start + _PIECE].astype(np.float64)
            piece *= scale
            piece /= self.step
            if np.isnan(piece).any():
                raise ValueError("NaN has no place in a sum")
            clipped += int((np.abs(piece) > self.levels).sum())
            np.clip(piece, -self.levels, self.levels, out=piece)
            round(piece, out=piece)
            out[start : start + _PIECE] = piece.astype(np.int64).astype(np.uint32)
        return clipped

    def decode(self, total: Ring) -> NDArray[np.float64]:
        """The sum of what was encoded, from the sum modulo 2³²."""
        return total.view(np.int32).astype(np.float64) * self.step

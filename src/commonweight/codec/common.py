"""The same numbers of every site's update: those that random-k draws from the run's seed and the round's number alone.

    row     u at the places of the first span, then at those of the second …     k numbers
    sum     Σ u at these places, 0 elsewhere

Rows of such numbers can be added without anybody's knowing one of them, and which places they are costs no bytes and
tells nothing of what a site trained on. Konečný et al. 2016, for one draw of all sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import torch

from ..model.tensors import Layout
from ..recipe.schema import Recipe
from .feedback import Coder, coder_of, draw_of
from .sparse import Index, RandomK


class CommonNumbers:
    """Where a round's numbers stand, worked out span by span as they are asked for.

    Args:
        coder: whose updates of a round all have one seed.

    Attributes:
        length: how many numbers there are.
        scale: the most that a number is multiplied by before it is sent.
    """

    def __init__(self, coder: Coder, round: int) -> None:
        shortening = coder.codecs[0].shortening
        assert coder.common
        assert isinstance(shortening, RandomK)
        self._coder, self._shortening = coder, shortening
        self._seed = coder.update_seed("", round)
        counts = [shortening.count(span.matrices) for span in coder.spans]
        *self._starts, self.length = accumulate(counts, initial=0)
        self.scale = 1.0
        if coder.codecs[0].unbiased:
            self.scale = max((s.numel / count for s, count in zip(coder.spans, counts, strict=True)), default=1.0)

    def over(self, dtype: torch.dtype, start: int, stop: int) -> Iterator[tuple[int, Index]]:
        """Of elements start … stop of a flat, those that are sent: where a stretch of them begins in a row, and their
        places in the flat, in rising order."""
        for number, span in enumerate(self._coder.spans):
            if span.dtype == dtype and span.start < stop and start < span.start + span.numel:
                draw = draw_of(self._seed, "delta", number)
                places = span.start + self._shortening.places(span.matrices, draw)
                first, last = np.searchsorted(places, [start, stop])
                yield self._starts[number] + int(first), places[first:last]


def common_numbers(recipe: Recipe, layout: Layout, round: int) -> CommonNumbers | None:
    """What the rows of a round's secure sum have of its updates; None: all.

    Raises:
        RecipeError: a stage's options are wrong.
    """
    if not recipe.privacy.summed:
        return None
    coder = coder_of(recipe.compression, layout, recipe.seed, common=True)
    return None if coder is None else CommonNumbers(coder, round)

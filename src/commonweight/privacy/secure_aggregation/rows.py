"""A site's update as one row of the ring, and a sum of rows as the sum of updates.

    row      ⌊wᵢ/W·Δᵢ⌉ for each element of the floating tensors, one dtype's after the other's
    totals   wᵢ, examples, label tokens, ⌊nats/T⌉

Legend: wᵢ a site's weight; W the most that it may be and T the most label tokens, which follow from the steps that
sites are asked for, so that everyone knows them before the round; nats: the loss over the site's label tokens. Counts
are whole numbers in the ring as long as their sum fits: then they are exact. As sums in the ring are exact whatever was
masked and in whatever order rows were added, the result has the same bits wherever it is computed.

Where all sites send the same numbers of their updates and no others (`codec/common.py`), a row has these alone.

Where sites add noise of their own (`privacy/distributed.py`) elements are rounded as that says, and of the totals only
wᵢ is told: counts and losses have no noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import RoundError, SiteError
from ...model.tensors import Entry, Layout, NamedTensors
from ...recipe.schema import Recipe
from ..distributed import DistributedNoise
from ..site_level import planned_noise
from .fixed_point import HALF, FixedPoint
from .masks import Ring

#: the one channel of an update that is masked, and its two tensors
MASKED, ROW, TOTALS = "masked", "row", "totals"
NUM_TOTALS = 4
#: nats a label token beyond which a site's loss is not told apart: an untrained model has ln(vocabulary), about 12
_MOST_NATS = 64.0
#: the largest size of an element of an update, where the recipe gives none. Our choice: a step of AdamW moves an
#: element by about its learning rate, so that even 1000 steps at 1e-3 stay far below; and the mean of 50 sites that
#: count alike is still exact to 8e-9 (one standard deviation)
DEFAULT_BOUND = 8.0
_PIECE = 1 << 18


class Numbers(Protocol):
    """Those numbers of an update that are in its row: see `codec.common.CommonNumbers`."""

    @property
    def length(self) -> int: ...

    @property
    def scale(self) -> float: ...

    def over(self, dtype: torch.dtype, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.int64]]]: ...


def row_layout(layout: Layout, numbers: Numbers | None = None) -> Layout:
    """Of a masked update: int32 stands for the ring, whose elements have as many bits.

    Args:
        numbers: that a row has of an update; None: all.
    """
    length = sum(numel for dtype, numel in layout.numels.items() if dtype.is_floating_point)
    if numbers is not None:
        length = numbers.length
    return Layout(
        (
            Entry(ROW, torch.int32, (length,), 0, length),
            Entry(TOTALS, torch.int32, (NUM_TOTALS,), length, NUM_TOTALS),
        )
    )


def row_starts(layout: Layout) -> dict[torch.dtype, int]:
    """Where each floating dtype's flat begins in a row."""
    starts, length = {}, 0
    for dtype, numel in layout.numels.items():
        if dtype.is_floating_point:
            starts[dtype] = length
            length += numel
    return starts


def as_ring(values: Tensor) -> Ring:
    """int32 elements as elements of the ring, without a copy."""
    ring: Ring = values.numpy().view(np.uint32)
    return ring


@dataclass(frozen=True)
class Most:
    """What no site's counts in a round exceed."""

    examples: int
    label_tokens: int

    @classmethod
    def of(cls, recipe: Recipe, steps: int) -> Self:
        """By the steps that are asked of the site that takes most of them."""
        spec = recipe.training
        sequences = examples = steps * spec.batch_size
        if recipe.privacy.noisy_steps:  # batches are drawn by coins; four times as many is beyond any chance
            sequences = examples = 4 * sequences + 64
        elif spec.packing:
            examples *= spec.max_tokens
        return cls(examples, sequences * spec.max_tokens)

    def weight(self, weighting: str) -> int:
        return {"examples": self.examples, "tokens": self.label_tokens, "uniform": 1}[weighting]


@dataclass(frozen=True)
class Totals:
    """What a round's sites have done together.

    Args:
        weight: Σ wᵢ.
        nats: the training losses of all, summed over label tokens.
    """

    weight: float
    examples: int
    label_tokens: int
    nats: float


@dataclass(frozen=True)
class RowCode:
    """How updates of one round become rows, and their sum a sum of updates.

    Args:
        layout: of the updates.
        num_sites: sites whose rows may be added.
        weighting: what a site weighs: `examples`, `tokens` or `uniform`.
        most: bounds of the counts.
        bound: the largest size of an element of an update; a larger one is clipped to it.
        toward_zero: see `FixedPoint`.
        noise: that each site adds; None: none.
        numbers: of an update that are in its row; None: all.
    """

    layout: Layout
    num_sites: int
    weighting: str
    most: Most
    bound: float
    toward_zero: bool = False
    noise: DistributedNoise | None = None
    numbers: Numbers | None = None

    @classmethod
    def of(cls, recipe: Recipe, layout: Layout, num_sites: int, most: Most, numbers: Numbers | None = None) -> Self:
        """As a recipe says it. Where updates are clipped to a norm for the privacy of sites, no element is larger than
        that norm, and encoding must not make the norm larger. Where numbers are multiplied for those that are left out,
        so is the bound."""
        spec = recipe.privacy
        clipped = spec.dp == "site"
        bound = spec.secure_bound or (spec.clip if clipped else None) or DEFAULT_BOUND
        noise = None
        if spec.mechanism.at_sites:
            length = sum(numel for dtype, numel in layout.numels.items() if dtype.is_floating_point)
            noise = DistributedNoise.of(
                bound=bound,
                noise_multiplier=planned_noise(recipe),
                num_sites=num_sites,
                colluding=spec.mechanism.colluding or 0.0,
                length=length,
            )
        if numbers is not None:
            bound *= numbers.scale
        weighting = recipe.federation.weighting
        return cls(layout, num_sites, weighting, most, bound, toward_zero=clipped, noise=noise, numbers=numbers)

    @property
    def length(self) -> int:
        """Elements of a row, totals included."""
        return sum(entry.numel for entry in row_layout(self.layout, self.numbers).entries)

    @property
    def elements(self) -> FixedPoint:
        return FixedPoint(self.bound, self.num_sites, self.toward_zero)

    def encode(
        self, delta: NamedTensors, *, examples: int, label_tokens: int, loss: float, out: Ring, key: bytes | None = None
    ) -> int:
        """Write an update's row and totals into `out`; returns how many of its elements were clipped.

        Args:
            key: of the noise, if the site adds any: 32 bytes, of this update alone.

        Raises:
            SiteError: as `check`; or noise is to be added to an update that was not clipped before.
        """
        self.check(examples, label_tokens)
        weight = {"examples": examples, "tokens": label_tokens, "uniform": 1}[self.weighting]
        scale, fixed, clipped = weight / self.most.weight(self.weighting), self.elements, 0
        if self.noise is not None:
            assert key is not None
            self.noise.encode(list(self._stretches(delta)), out[: self.length - NUM_TOTALS], key)
            examples, label_tokens, loss = 0, 0, 0.0
        else:
            for at, values in self._stretches(delta):
                piece = out[at : at + values.numel()]
                clipped += fixed.encode(values.double().numpy(), piece, scale=scale)
        totals = out[self.length - NUM_TOTALS :]
        counts = np.asarray([weight, examples, label_tokens], dtype=np.float64)
        for place, code in enumerate(self._counts):
            code.encode(counts[place : place + 1], totals[place : place + 1])
        share = np.asarray([loss * label_tokens / max(1, self.most.label_tokens)])
        self._nats.encode(share, totals[3:])
        return clipped

    def _stretches(self, delta: NamedTensors) -> Iterator[tuple[int, Tensor]]:
        """Of an update's floating elements, by where they begin in its row."""
        for dtype, start in row_starts(self.layout).items():
            flat = delta.flats[dtype]
            if self.numbers is not None:
                for at, places in self.numbers.over(dtype, 0, flat.numel()):
                    yield at, flat[torch.from_numpy(places)]
                continue
            for first in range(0, flat.numel(), _PIECE):
                yield start + first, flat[first : first + _PIECE]

    def check(self, examples: int, label_tokens: int) -> None:
        """Raises SiteError: an update's counts are above what the round's steps allow."""
        if not (0 <= examples <= self.most.examples and 0 <= label_tokens <= self.most.label_tokens):
            raise SiteError(
                f"the objective reports {examples:,} examples and {label_tokens:,} label tokens; with the round's "
                f"steps there are at most {self.most.examples:,} and {self.most.label_tokens:,}",
                hint="correct what the objective counts, or turn privacy.secure_aggregation off",
            )

    def decode(self, total: Ring, out: Tensor) -> None:
        """Σ wᵢΔᵢ over a stretch of elements, from the sum of its rows.

        Args:
            out: 1-D, floating, of equal length.
        """
        step = self.elements.step if self.noise is None else self.noise.step
        scale = step * self.most.weight(self.weighting)
        out.copy_(torch.from_numpy(total.view(np.int32).astype(np.float64) * scale))

    def spread(self, read: Callable[[int, int], Ring], dtype: torch.dtype, start: int, out: Tensor) -> None:
        """Σ wᵢΔᵢ over a stretch of a flat; 0 where its elements are in no row.

        Args:
            read: the sum of rows from an element on, so many.
            start: where the stretch begins in the flat.
            out: as `decode`.
        """
        if self.numbers is None:
            self.decode(read(row_starts(self.layout)[dtype] + start, out.numel()), out)
            return
        out.zero_()
        for first, places in self.numbers.over(dtype, start, start + out.numel()):
            if len(places):
                found = torch.empty(len(places), dtype=out.dtype)
                self.decode(read(first, len(places)), found)
                out[torch.from_numpy(places - start)] = found

    def totals(self, total: Ring, num_updates: int) -> Totals:
        """From the sum of totals.

        Raises:
            RoundError: no honest sites' counts come to this.
        """
        sums = [float(code.decode(total[place : place + 1])[0]) for place, code in enumerate(self._counts)]
        bounds = (self.most.weight(self.weighting), self.most.examples, self.most.label_tokens)
        if sums[0] <= 0 or any(not 0 <= s <= num_updates * b for s, b in zip(sums, bounds, strict=True)):
            raise RoundError(
                f"the round's masked sum has weight {sums[0]:g} for {num_updates} sites: a site did not send what it "
                "should have, and nobody can tell which",
                hint="the last committed round is untouched; submit again without a site that is not to be trusted",
            )
        nats = float(self._nats.decode(total[3:4])[0]) * self.most.label_tokens
        return Totals(sums[0], round(sums[1]), round(sums[2]), nats)

    @property
    def _counts(self) -> tuple[FixedPoint, ...]:
        """The codes of weight, examples and label tokens: of step 1 as long as their sum fits."""
        most = (self.most.weight(self.weighting), self.most.examples, self.most.label_tokens)
        exact = (HALF - 1) // self.num_sites
        return tuple(FixedPoint(float(max(count, exact)), self.num_sites) for count in most)

    @property
    def _nats(self) -> FixedPoint:
        return FixedPoint(_MOST_NATS, self.num_sites)

"""Error feedback: what a coding loses is added to the next update before that is coded.

    u = Δ + e;   sent: C(u);   e ← u − C(u)

so that Σ sent + e = Σ Δ, whatever C does: nothing is lost, only late. A site that takes no part in a round sends
nothing, and its e stays as it is. Stich et al. 2018; Karimireddy et al. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError, SiteError
from ..model.tensors import Layout, NamedTensors, first_non_finite
from ..recipe.schema import CompressionSpec
from ..seeding import derive_seed
from .chain import Codec, Span, codecs_of, spans
from .stage import Draw


@dataclass(frozen=True)
class Coded:
    """One span's payload, where it belongs, and by which of the coder's codecs it was made."""

    channel: str
    span: Span
    payload: bytes
    codec: int = 0


class Coder:
    """Codes the updates of one layout.

    Args:
        codecs: of which each update is coded by one.
        seed: of the run; each update has a seed of its own.
        budget: bytes that an update's payloads may have, all channels together, where there are several codecs.
        channels: how many an update has.
        common: whether all updates of a round have one seed, as those that are to be added unseen (`common.py`).

    Raises:
        RecipeError: no codec is sure to stay within the budget.
    """

    def __init__(
        self,
        codecs: Sequence[Codec],
        layout: Layout,
        seed: int,
        *,
        budget: int | None = None,
        channels: int = 1,
        common: bool = False,
    ) -> None:
        self.codecs, self.layout, self.seed, self.budget = tuple(codecs), layout, seed, budget
        self.channels, self.common = channels, common
        self.spans = tuple(spans(layout))
        most = [channels * self.most(place) for place in range(len(codecs))]
        self._surest = most.index(min(most))
        if budget is not None and min(most) > budget:
            raise RecipeError(
                f"compression.budget_mb is {budget / 1e6:g}, but the smallest coding of these updates may take "
                f"{min(most) / 1e6:g} MB",
                hint=f"set it to at least {math.ceil(min(most) / 1e4) / 100:g}",
            )

    def most(self, codec: int) -> int:
        """The largest number of bytes of a channel's payloads."""
        return sum(self.codecs[codec].most(span.matrices) for span in self.spans)

    def update_seed(self, site: str, round: int) -> int:
        if self.common:
            return derive_seed(self.seed, "common codec", round)
        return derive_seed(self.seed, "codec", site, round)

    @torch.no_grad()
    def choose(self, tensors: Mapping[str, NamedTensors], errors: Mapping[str, NamedTensors], seed: int) -> int:
        """Of the codecs whose payloads stay within the budget the one that loses least of this very update, measured
        on a few of its spans; its bytes are counted on all of them."""
        if self.budget is None:
            return 0
        loss = [self._lost(place, tensors, errors, seed) for place in range(len(self.codecs))]
        for place in sorted(range(len(loss)), key=loss.__getitem__):
            if self._num_bytes(place, tensors, errors, seed) <= self.budget:
                return place
        return self._surest

    def _lost(
        self, codec: int, tensors: Mapping[str, NamedTensors], errors: Mapping[str, NamedTensors], seed: int
    ) -> float:
        """‖u − C(u)‖² over some spans."""
        total, step = 0.0, max(1, len(self.spans) // _MEASURED_SPANS)
        for channel in tensors:
            for number in range(0, len(self.spans), step):
                span, draw = self.spans[number], draw_of(seed, channel, number)
                wanted = _wanted(tensors[channel], errors.get(channel), span)
                payload = self.codecs[codec].encode(wanted, span.matrices, draw)
                lost = wanted.double() - self.codecs[codec].decode(payload, span.matrices, draw)
                total += float((lost**2).sum())
        return total

    def _num_bytes(
        self, codec: int, tensors: Mapping[str, NamedTensors], errors: Mapping[str, NamedTensors], seed: int
    ) -> int:
        return sum(
            len(
                self.codecs[codec].encode(
                    _wanted(tensors[channel], errors.get(channel), span), span.matrices, draw_of(seed, channel, number)
                )
            )
            for channel in tensors
            for number, span in enumerate(self.spans)
        )

    @torch.no_grad()
    def encode(
        self, tensors: Mapping[str, NamedTensors], errors: Mapping[str, NamedTensors], seed: int
    ) -> Iterator[Coded]:
        """The payloads of an update, in order. Each span of `tensors` becomes, in place, what the other end will read.

        Args:
            tensors: the update, by channel.
            errors: what was lost before, by channel, float32, which becomes what is lost by now; a channel that has
                none is coded without error feedback.
            seed: of this update's random choices (`update_seed`), which the other end is told.

        Raises:
            SiteError: a tensor holds NaN or infinity, which is named.
        """
        for channel, values in tensors.items():
            bad = first_non_finite(values)
            if bad is not None:
                raise SiteError(f"there is NaN or infinity in {bad!r} ({channel})", hint="lower training.lr")
        place = self.choose(tensors, errors, seed)
        codec = self.codecs[place]
        for channel, values in tensors.items():
            error = errors.get(channel)
            for number, span in enumerate(self.spans):
                wanted, draw = _wanted(values, error, span), draw_of(seed, channel, number)
                payload = codec.encode(wanted, span.matrices, draw)
                held = _stretch(values, span)
                held.copy_(codec.decode(payload, span.matrices, draw))
                if error is not None:
                    torch.sub(wanted, held.float(), out=_stretch(error, span))
                yield Coded(channel, span, payload, place)


def coder_of(
    spec: CompressionSpec, layout: Layout, seed: int, channels: int = 1, *, common: bool = False
) -> Coder | None:
    """What makes a recipe's updates small; None: nothing.

    Args:
        layout: of the global tensors.
        seed: of the run.
        channels: of an update.
        common: see `Coder`.

    Raises:
        RecipeError: a stage is none, or the budget is too small for any codec.
    """
    codecs = codecs_of(spec)
    budget = None if spec.budget_mb is None else int(spec.budget_mb * 1e6)
    return Coder(codecs, layout, seed, budget=budget, channels=channels, common=common) if codecs else None


#: how many spans a codec is judged by
_MEASURED_SPANS = 4


def _stretch(tensors: NamedTensors, span: Span) -> Tensor:
    return tensors.flats[span.dtype][span.start : span.start + span.numel]


def _wanted(values: NamedTensors, error: NamedTensors | None, span: Span) -> Tensor:
    """u = Δ + e, float32, of its own memory."""
    held = _stretch(values, span).to(torch.float32, copy=True)
    return held if error is None else held.add_(_stretch(error, span))


def draw_of(seed: int, channel: str, span: int) -> Draw:
    """The random choices of one span of an update's channel."""
    return Draw(derive_seed(seed, channel), span)

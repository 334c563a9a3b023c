"""Error feedback: what a coding loses is added to the next update before that is coded.

    u = Δ + e;   sent: C(u);   e ← u − C(u)

so that Σ sent + e = Σ Δ, whatever C does: nothing is lost, only late. A site that takes no part in a round sends
nothing, and its e stays as it is. Stich et al. 2018; Karimireddy et al. 2019.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import SiteError
from ..model.tensors import Layout, NamedTensors, first_non_finite
from ..seeding import derive_seed
from .chain import Codec, Span, spans
from .stage import Draw


@dataclass(frozen=True)
class Coded:
    """One span's payload, and where it belongs."""

    channel: str
    span: Span
    payload: bytes


class Coder:
    """Codes the updates of one layout.

    Args:
        seed: of the run; each update has a seed of its own.
    """

    def __init__(self, codec: Codec, layout: Layout, seed: int) -> None:
        self.codec, self.layout, self.seed = codec, layout, seed
        self.spans = tuple(spans(layout))

    def update_seed(self, site: str, round: int) -> int:
        return derive_seed(self.seed, "codec", site, round)

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
            for number, span in enumerate(self.spans):
                stretch = slice(span.start, span.start + span.numel)
                held, late = values.flats[span.dtype][stretch], None
                wanted = held.float()
                if channel in errors:
                    late = errors[channel].flats[span.dtype][stretch]
                    wanted = wanted + late
                draw = draw_of(seed, channel, number)
                payload = self.codec.encode(wanted, span.matrices, draw)
                held.copy_(self.codec.decode(payload, span.matrices, draw))
                if late is not None:
                    torch.sub(wanted, held.float(), out=late)
                yield Coded(channel, span, payload)


def draw_of(seed: int, channel: str, span: int) -> Draw:
    """The random choices of one span of an update's channel."""
    return Draw(derive_seed(seed, channel), span)

"""The way down: sites are sent the coded difference from what they hold, and all of them hold the same.

    u = (θ' − θ̂) + e;   sent: C(u);   θ̂ ← θ̂ + C(u);   e ← u − (change of θ̂)

θ̂ is the model that sites hold, and start from; θ' what a round has made of it; e what is late. It is the coordinator
that knows what is late, and sites need not: they add up what they are sent. Σ C(u) + e = Σ (θ' − θ̂), whatever C does,
so nothing is lost, only late; and as the change is taken of θ̂ as it is held, neither is what the sum's own rounding
takes away. Where a strategy adds to θ what follows from the updates alone, θ̂ + e is the model that it would carry on
without a codec, which is EF21-P (Gruntkowska et al. 2022, arXiv:2209.15218); without it, sites that are sent C(θ' − θ̂)
alone would go astray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import RoundError
from ..model.tensors import Layout, NamedTensors
from ..recipe.schema import DownSpec
from ..seeding import derive_seed
from .chain import codec_of
from .coded import CHOICES_BYTES, LENGTH_BYTES, Payloads
from .feedback import Coded, Coder, draw_of

#: the channel that is coded
THETA = "theta"


class Down:
    """Codes what a round has changed.

    Args:
        coder: of one codec.
    """

    def __init__(self, coder: Coder) -> None:
        self.coder, self.layout = coder, coder.layout
        (self._codec,) = coder.codecs

    def seed(self, round: int) -> int:
        """Of a round's random choices."""
        return derive_seed(self.coder.seed, "down", round)

    @torch.no_grad()
    def step(self, number: int, round: int, before: Tensor, after: Tensor, late: Tensor) -> tuple[Coded, Tensor]:
        """One span's payload, and the span as sites will hold it.

        Args:
            number: the span's.
            before, after: θ̂ and θ', 1-D, in the flat's dtype.
            late: e, wide (`NamedTensors.zeros`), which becomes the new one.

        Raises:
            RoundError: what sites would hold is not finite.
        """
        span, draw = self.coder.spans[number], draw_of(self.seed(round), THETA, number)
        wanted = (after.to(late.dtype) - before).add_(late)
        payload = self._codec.encode(wanted.float(), span.matrices, draw)
        held = before + self._codec.decode(payload, span.matrices, draw).to(before.dtype)
        if not bool(held.isfinite().all()):
            raise RoundError(
                f"round {round}: the global tensors, as compression.down makes them small, are more than {span.dtype} "
                "can hold",
                hint="lower training.lr or the strategy's lr; the last committed round is untouched",
            )
        torch.sub(wanted, held.to(late.dtype) - before, out=late)
        return Coded(THETA, span, payload), held

    def follow(self, round: int, before: NamedTensors, after: NamedTensors, late: NamedTensors) -> Iterator[Coded]:
        """A round's payloads, in order; span by span `after` becomes what sites will hold, `late` what is late then.

        Raises:
            RoundError: as `step`.
        """
        for number, span in enumerate(self.coder.spans):
            stop = span.start + span.numel
            old, new, error = (tensors.flats[span.dtype][span.start : stop] for tensors in (before, after, late))
            coded, held = self.step(number, round, old, new, error)
            new.copy_(held)
            yield coded


def add_to(tensors: NamedTensors, coder: Coder, payloads: Payloads) -> None:
    """Make of the tensors that sites held before a round those that they hold after it.

    Raises:
        BadPayload: a payload is not what the codec writes.
    """
    for number, span in enumerate(coder.spans):
        tensors.flats[span.dtype][span.start : span.start + span.numel].add_(payloads.decode(THETA, number))


def num_bytes(lengths: Sequence[int]) -> int:
    """What payloads of these lengths take on the way."""
    return CHOICES_BYTES + sum(LENGTH_BYTES + length for length in lengths)


def down_of(spec: DownSpec, layout: Layout, seed: int) -> Down | None:
    """What makes a recipe's global tensors small; None: nothing.

    Args:
        layout: of the global tensors.
        seed: of the run.

    Raises:
        RecipeError: a stage is none.
    """
    codec = codec_of(spec)
    return None if codec is None else Down(Coder([codec], layout, seed))

"""A coded update as tensors that can be sent: its payloads end to end, how long each is, and how it was coded.

    lengths    int32 [channels · spans], in the order of the channels and of a layout's spans
    payloads   uint8 [their sum]
    choices    int64 [2]: the seed of its random choices, and which of the coder's codecs

Whoever reads an update decodes the spans that it wants, from any place, and holds one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..model.tensors import Entry, Layout, NamedTensors, Room, in_memory
from .chain import Span
from .feedback import Coded, Coder, draw_of
from .stage import BadPayload

#: the channel in which they travel
CODED = "coded"
LENGTHS, PAYLOADS, CHOICES = "lengths", "payloads", "choices"
#: what goes with each payload, and once with all
LENGTH_BYTES, CHOICES_BYTES = 4, 16
_SEEDS = 2**63

#: reads bytes start … stop of the payloads
Fetch = Callable[[int, int], bytes]
#: decodes a channel's span of a number
Decode = Callable[[str, int], Tensor]


class Packer:
    """Payloads as tensors, put where they belong as they are made: none is held beside.

    Args:
        room: where the tensors are held.
    """

    def __init__(self, coder: Coder, room: Room = in_memory) -> None:
        self._room, self._held = room, room(CODED, most_layout(coder, coder.channels))
        self._lengths: list[int] = []
        self._codec = self._size = 0

    def add(self, coded: Coded) -> None:
        """The next payload."""
        stop = self._size + len(coded.payload)
        if coded.payload:
            self._held[PAYLOADS][self._size : stop] = torch.frombuffer(bytearray(coded.payload), dtype=torch.uint8)
        self._size, self._codec = stop, coded.codec
        self._lengths.append(len(coded.payload))
        self._room.written(CODED, torch.uint8, stop)

    def packed(self, seed: int) -> NamedTensors:
        """An update's payloads, all of which were added; views of what the room holds."""
        self._held[LENGTHS].copy_(torch.tensor(self._lengths, dtype=torch.int32))
        self._held[CHOICES].copy_(torch.tensor([seed, self._codec], dtype=torch.int64))
        flats = {**self._held.flats, torch.uint8: self._held.flats[torch.uint8][: self._size]}
        return NamedTensors(layout_of(len(self._lengths), self._size), flats)


def layout_of(lengths: int, payloads: int) -> Layout:
    """The layout of so many payloads, of so many bytes together."""
    return Layout(
        (
            Entry(CHOICES, torch.int64, (2,), 0, 2),
            Entry(LENGTHS, torch.int32, (lengths,), 0, lengths),
            Entry(PAYLOADS, torch.uint8, (payloads,), 0, payloads),
        )
    )


def most_layout(coder: Coder, channels: int) -> Layout:
    """The layout of the largest update of so many channels. A smaller one begins as it does."""
    return layout_of(channels * len(coder.spans), _most(coder, channels))


def _most(coder: Coder, channels: int) -> int:
    """The largest number of bytes of an update's payloads."""
    return channels * max(coder.most(place) for place in range(len(coder.codecs)))


def check_layout(layout: Layout, coder: Coder, channels: Sequence[str]) -> None:
    """Whether tensors of this layout can be an update of these channels.

    Raises:
        BadPayload: other tensors than `Packer` makes, or more bytes than the codec could write.
    """
    most = _most(coder, len(channels))
    expected = {LENGTHS: (torch.int32, len(channels) * len(coder.spans)), CHOICES: (torch.int64, 2)}
    found = {entry.name: (entry.dtype, entry.numel) for entry in layout.entries if len(entry.shape) == 1}
    payloads = found.pop(PAYLOADS, None)
    if len(layout.entries) != 3 or found != expected or payloads is None or payloads[0] != torch.uint8:
        raise BadPayload(f"a coded update has {_told(layout.entries)}; expected lengths, payloads, choices")
    if payloads[1] > most:
        raise BadPayload(f"payloads of {payloads[1]} bytes; its codec writes {most} at most")


class Payloads:
    """A coded update, read a stretch at a time, by any number of threads.

    Args:
        channels: that it has, in order.
        lengths, choices: as they came.
        num_bytes: of all payloads.
        codec: as an attribute, the name of the one that made it small.

    Raises:
        BadPayload: the lengths are not those of `num_bytes` bytes, one is longer than the codec writes, or the choices
            are none.
    """

    def __init__(
        self,
        coder: Coder,
        channels: Sequence[str],
        lengths: Sequence[int],
        choices: Sequence[int],
        num_bytes: int,
        fetch: Fetch,
    ) -> None:
        self._coder, self._channels, self._fetch = coder, tuple(channels), fetch
        self._seed, codec = choices
        if not 0 <= self._seed < _SEEDS or not 0 <= codec < len(coder.codecs):
            raise BadPayload("a coded update with a seed, or by a codec, that there is not")
        self._codec = coder.codecs[codec]
        self.codec = self._codec.name
        self._most = [self._codec.most(span.matrices) for span in coder.spans] * len(channels)
        fits = len(lengths) == len(self._most) and all(
            0 <= length <= most for length, most in zip(lengths, self._most, strict=True)
        )
        if not fits or sum(lengths) != num_bytes:
            raise BadPayload("the lengths of a coded update's payloads do not fit what it holds")
        self._starts = [0, *accumulate(lengths)]

    def decode(self, channel: str, number: int) -> Tensor:
        """One span, 1-D, in the dtype of its flat.

        Raises:
            BadPayload: it is not what the codec writes.
        """
        span = self._coder.spans[number]
        place = self._channels.index(channel) * len(self._coder.spans) + number
        payload = self._fetch(self._starts[place], self._starts[place + 1])
        values = self._codec.decode(payload, span.matrices, draw_of(self._seed, channel, number)).to(span.dtype)
        if not bool(values.isfinite().all()):
            raise BadPayload(f"numbers that {span.dtype} cannot hold")
        return values

    def check(self) -> None:
        """Decode everything once. Raises BadPayload: something is not what the codec writes."""
        for channel in self._channels:
            for number in range(len(self._coder.spans)):
                self.decode(channel, number)

    def spans_over(self, dtype: torch.dtype, start: int, stop: int) -> Iterator[tuple[int, Span]]:
        """The spans that hold elements start … stop of a flat, with their numbers."""
        for number, span in enumerate(self._coder.spans):
            if span.dtype == dtype and span.start < stop and start < span.start + span.numel:
                yield number, span

    def read(self, channel: str, dtype: torch.dtype, start: int, stop: int, decode: Decode | None = None) -> Tensor:
        """Elements start … stop of a channel's flat. What is not floating was not sent, and is 0.

        Args:
            decode: in the place of `decode`; one that remembers, say.
        """
        values = torch.zeros(stop - start, dtype=dtype)
        for number, span in self.spans_over(dtype, start, stop):
            part = (decode or self.decode)(channel, number)
            first, last = max(start, span.start), min(stop, span.start + span.numel)
            values[first - start : last - start] = part[first - span.start : last - span.start]
        return values


def _told(entries: Sequence[Entry]) -> list[str]:
    return [f"{entry.name[:40]} {list(entry.shape)}" for entry in entries[:4]]

"""Accepted updates that a codec made small, in their sealed files: decoded span by span as they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec.coded import CHOICES, CODED, LENGTHS, PAYLOADS, Decode, Payloads
from ..codec.feedback import Coder
from ..codec.stage import BadPayload
from ..errors import StateError
from ..wire.frames import Frame
from .vault import SealedFile


class CodedFile:
    """One coded update. Several threads may read it.

    Args:
        what: it is, for a message.

    Raises:
        BadPayload: it holds no payloads of such an update.
        StateError: it is damaged.
    """

    def __init__(self, sealed: SealedFile, frame: Frame, coder: Coder, channels: tuple[str, ...], what: str) -> None:
        self._sealed, self._frame, self._what = sealed, frame, what
        lengths = self._read(LENGTHS, torch.int32).tolist()
        choices = self._read(CHOICES, torch.int64).tolist()
        entry = frame.plan.layout.by_name[PAYLOADS]
        self._first = entry.offset
        self.payloads = Payloads(coder, channels, lengths, choices, entry.numel, self._fetch)

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        entry = self._frame.plan.layout.by_name[name]
        return self._elements(dtype, entry.offset, entry.offset + entry.numel)

    def _fetch(self, start: int, stop: int) -> bytes:
        return self._elements(torch.uint8, self._first + start, self._first + stop).numpy().tobytes()

    def _elements(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        values = torch.empty(stop - start, dtype=dtype)
        for piece in self._frame.plan.pieces.over(CODED, dtype, start, stop) if stop > start else ():
            chunk = self._sealed.read(piece.index)
            if chunk is None or len(chunk) != piece.num_bytes:
                raise StateError(
                    f"{self._what} is damaged on this coordinator's disk",
                    hint="restore the blob store from a copy; the last committed round is untouched",
                )
            held = torch.frombuffer(bytearray(chunk), dtype=dtype)
            first, last = max(start, piece.start), min(stop, piece.start + piece.numel)
            values[first - start : last - start] = held[first - piece.start : last - piece.start]
        return values

    def read(self, channel: str, dtype: torch.dtype, start: int, stop: int, decode: Decode | None = None) -> Tensor:
        """Elements start … stop of a channel's flat; `decode` as in `Payloads.read`.

        Raises:
            StateError: it is damaged; it was read once before it was accepted.
        """
        try:
            return self.payloads.read(channel, dtype, start, stop, decode)
        except BadPayload as error:
            raise StateError(f"{self._what} can no longer be read: {error.message}") from error

    def close(self) -> None:
        self._sealed.close()

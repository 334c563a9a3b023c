"""Accepted updates in their sealed files, side by side with a global model in its own: read a stretch at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from ..codec.feedback import Coder
from ..errors import StateError
from ..model.tensors import Layout
from ..strategies.side_by_side import SideBySide, Stretch
from ..strategies.update import Update
from ..wire.frames import Frame, Piece
from .coded_updates import CodedFile
from .frame_files import FrameWriter, StoredFrame
from .vault import SealedFile

#: chunks in hand at once: enough to keep reading, decrypting and adding busy, few enough to stay small
WORKERS = min(2, os.cpu_count() or 1)


class Sealed:
    """Tensors that lie in a sealed file (`frame`, `path`, `key`)."""

    frame: Frame | None
    path: Path | None
    key: bytes

    @property
    def what(self) -> str:
        """What it is, for a message."""
        raise NotImplementedError

    def open(self) -> SealedFile:
        assert self.path is not None
        assert self.frame is not None
        return SealedFile(self.path, self.key, self.frame.plan.chunk_bytes, writable=False)

    def read(self, sealed: SealedFile, piece: Piece, out: Tensor) -> None:
        """Decrypt one chunk into `out`, 1-D.

        Raises:
            StateError: it is damaged.
        """
        into = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
        if sealed.read_into(piece.index, into) != piece.num_bytes:
            raise StateError(
                f"{self.what} is damaged on this coordinator's disk",
                hint="restore the blob store from a copy; the last committed round is untouched",
            )


@dataclass(frozen=True)
class StoredPartial(Sealed):
    """The accepted sum of a region's updates.

    Args:
        sites: whose updates are in it, in the order in which they were added up.
        frame: where each chunk belongs.
        path, key: the sealed file.
    """

    relay: str
    sites: tuple[str, ...]
    frame: Frame
    path: Path
    key: bytes

    @property
    def what(self) -> str:
        return f"the sum of relay {self.relay!r}"


@dataclass(frozen=True)
class StoredUpdate(Sealed, Update):
    """An accepted update whose tensors are in a sealed file; `channels` is empty.

    Args:
        frame: where each chunk belongs.
        path, key: the sealed file.
        base: the digest of the frame that its site started from.
        partial: the region's sum in which it came, in place of a file of its own.
        coder, coded_channels: what made it small, and of which channels; None: it is as it was.
    """

    frame: Frame | None = None
    path: Path | None = None
    key: bytes = b""
    base: str = ""
    partial: StoredPartial | None = None
    coder: Coder | None = None
    coded_channels: tuple[str, ...] = ()

    def opened(self) -> SealedFile | CodedFile:
        return self.open() if self.coder is None else self.coded(self.open())

    def coded(self, sealed: SealedFile) -> CodedFile:
        """What lies in its file, which a codec made small."""
        assert self.coder is not None
        assert self.frame is not None
        return CodedFile(sealed, self.frame, self.coder, self.coded_channels, self.what)

    def read_codec(self) -> str:
        """The name of the codec that made it small; of several, the file says which."""
        assert self.coder is not None
        if len(self.coder.codecs) == 1:
            return self.coder.codecs[0].name
        with closing(self.coded(self.open())) as file:
            return file.payloads.codec

    @property
    def what(self) -> str:
        return f"the update of site {self.site!r} for round {self.round}"


class Reader(Protocol):
    """An update, or what stands for one, read in stretches by one thread at a time."""

    def at_hand(self, channel: str, stretch: Stretch) -> bool:
        """Whether a stretch can be had without reading a file."""

    def read(self, channel: str, stretch: Stretch) -> Tensor: ...

    def close(self) -> None: ...


class InFiles(SideBySide):
    """A round's updates in sealed files, and a state in frames of which new ones are being written.

    The last chunk of each update stays decrypted, so that reading from front to back decrypts every chunk once:
    O(cohort × chunk) of memory, and that of one `sent`.

    Args:
        held: for each channel of the state the frame that it is in, and the one that is being made of it.
        readers: of what stands for the updates, where they are not in files of their own.
    """

    def __init__(
        self,
        layout: Layout,
        updates: Sequence[Update],
        held: Mapping[str, tuple[StoredFrame, FrameWriter]],
        readers: Sequence[Reader] = (),
    ) -> None:
        super().__init__(layout, updates)
        self._state = held
        for frame, writer in {id(pair[1]): pair for pair in held.values()}.values():
            writer.copy(frame)
        self._readers: Sequence[Reader] = readers or [
            _reader(update, layout) for update in updates if isinstance(update, StoredUpdate)
        ]
        self._pool = ThreadPoolExecutor(WORKERS)

    def sent(self, stretch: Stretch, channel: str = "delta") -> list[Tensor]:
        # updates of one layout are cut alike: the first one's chunk is at hand where everyone's is
        if self._readers[0].at_hand(channel, stretch):
            return [reader.read(channel, stretch) for reader in self._readers]
        return list(self._pool.map(lambda reader: reader.read(channel, stretch), self._readers))

    def held(self, name: str, stretch: Stretch) -> Tensor:
        return self._state[name][0].elements(name, stretch.dtype, stretch.start, stretch.stop)

    def held_as(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return self._state[name][0].frame.plan.held_as(name, dtype)

    def _hold(self, name: str, stretch: Stretch, values: Tensor) -> None:
        self._state[name][1].put(name, stretch.dtype, stretch.start, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        for reader in self._readers:
            reader.close()


class _Reader:
    """One update, read in stretches by one thread at a time."""

    def __init__(self, update: StoredUpdate) -> None:
        assert update.frame is not None
        self.update, self.pieces = update, update.frame.plan.pieces
        self.sealed = update.open()
        # one buffer for all its chunks: to allocate each would leave holes in the heap that are twice their size
        self._buffer = torch.empty(update.frame.plan.chunk_bytes, dtype=torch.uint8)
        self._index = -1

    def at_hand(self, channel: str, stretch: Stretch) -> bool:
        """Whether a stretch lies in the chunk that was read last."""
        parts = self.pieces.over(channel, stretch.dtype, stretch.start, stretch.stop)
        return [part.index for part in parts] == [self._index]

    def read(self, channel: str, stretch: Stretch) -> Tensor:
        pieces = self.pieces.over(channel, stretch.dtype, stretch.start, stretch.stop)
        found = [self._part(piece, stretch, copied=len(pieces) > 1) for piece in pieces]
        return found[0] if len(found) == 1 else torch.cat(found)

    def close(self) -> None:
        self.sealed.close()

    def _part(self, piece: Piece, stretch: Stretch, *, copied: bool) -> Tensor:
        values = self._buffer[: piece.num_bytes].view(piece.held)
        if piece.index != self._index:
            self._index = -1  # a chunk that turns out damaged is in no one's hand
            self.update.read(self.sealed, piece, values)
            self._index = piece.index
        part = values[max(stretch.start - piece.start, 0) : stretch.stop - piece.start]
        return part.clone() if copied else part


class _PartReader(_Reader):
    """The update of a site that holds a part of the adapter: read a whole tensor at a time, zero beyond the part."""

    def __init__(self, update: StoredUpdate, layout: Layout) -> None:
        super().__init__(update)
        assert update.frame is not None
        own = update.frame.plan.layout.by_name
        self._entries = {Stretch.of(entry): (entry, own.get(entry.name)) for entry in layout.entries}

    def at_hand(self, channel: str, stretch: Stretch) -> bool:
        _, own = self._entries[stretch]
        return own is None or super().at_hand(channel, Stretch.of(own))

    def read(self, channel: str, stretch: Stretch) -> Tensor:
        whole, own = self._entries[stretch]
        values = torch.zeros(whole.shape, dtype=stretch.dtype)
        if own is not None:
            part = super().read(channel, Stretch.of(own)).view(own.shape)
            values[tuple(slice(size) for size in own.shape)] = part
        return values.view(-1)


class _CodedReader(_Reader):
    """A coded update: the span that was decoded last is at hand."""

    def __init__(self, update: StoredUpdate) -> None:
        super().__init__(update)
        self._coded = update.coded(self.sealed)
        self._last: tuple[str, int] = ("", -1)
        self._values = torch.empty(0)

    def at_hand(self, channel: str, stretch: Stretch) -> bool:
        spans = self._coded.payloads.spans_over(stretch.dtype, stretch.start, stretch.stop)
        return [(channel, number) for number, _ in spans] == [self._last]

    def read(self, channel: str, stretch: Stretch) -> Tensor:
        return self._coded.read(channel, stretch.dtype, stretch.start, stretch.stop, self._decoded)

    def _decoded(self, channel: str, number: int) -> Tensor:
        if self._last != (channel, number):
            self._values, self._last = self._coded.payloads.decode(channel, number), (channel, number)
        return self._values


def _reader(update: StoredUpdate, layout: Layout) -> _Reader:
    assert update.frame is not None
    if update.coder is not None:
        return _CodedReader(update)
    return _Reader(update) if update.frame.plan.layout == layout else _PartReader(update, layout)

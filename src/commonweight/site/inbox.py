"""Tensors on the site's disk, as frames that are mapped into memory: nothing is read whole, nothing is copied.

runs/<run>/base-<digest>.header   the frame's header, as it travelled
runs/<run>/base-<digest>.part     its body while chunks arrive
runs/<run>/base-<digest>.bin      the body when every chunk is there

A killed process loses no chunk: what a `.part` already holds is known again by the chunks' digests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import StorageError
from ..federation.folder import replacing, storage_errors
from ..model.tensors import Layout, NamedTensors, accumulator_dtype
from ..wire.frames import Frame, Piece, chunk_digest, frame_of, header_digest, parse_header, piece_of
from ..wire.refusals import Refused

_ALIGN_BYTES = 64


@dataclass(frozen=True)
class _Place:
    """One flat's place in a body's file: bytes from `offset`, `numel` elements of `held`."""

    offset: int
    numel: int
    held: torch.dtype


class FrameFile:
    """A frame's body in a file: each flat begins at a multiple of 64 bytes, so that tensors are viewed where they lie.

    Args:
        path: the file.
        frame: what it is to hold.
    """

    def __init__(self, path: Path, frame: Frame) -> None:
        self.path, self.frame = path, frame
        self._places: dict[tuple[str, torch.dtype], _Place] = {}
        offset = 0
        for channel in frame.plan.channels:
            for dtype, numel in frame.plan.layout.numels.items():
                held = accumulator_dtype(dtype) if channel.wide else dtype
                self._places[channel.name, dtype] = _Place(offset, numel, held)
                offset += -(-numel * held.itemsize // _ALIGN_BYTES) * _ALIGN_BYTES
        self.num_bytes = offset

    def make(self) -> None:
        """Reserve the whole file, so that a full disk is an error here and not a signal when it is written.

        Raises:
            StorageError: no space, or no permission.
        """
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.exists() else "wb") as handle:
                handle.truncate(self.num_bytes)
                if self.num_bytes:
                    os.posix_fallocate(handle.fileno(), 0, self.num_bytes)

    def is_whole(self) -> bool:
        """Whether the file is there with its full size (says nothing of its content)."""
        return self.path.is_file() and self.path.stat().st_size == self.num_bytes

    def write(self, piece: Piece, data: bytes | memoryview) -> None:
        with storage_errors(self.path), self.path.open("rb+") as handle:
            handle.seek(self._start(piece))
            handle.write(data)

    def whole_chunks(self) -> bytearray:
        """For each chunk 1 if the file holds it, by its digest, else 0. One pass over the file, one chunk in memory."""
        held = bytearray(self.frame.plan.num_chunks)
        if not self.is_whole():
            return held
        buffer = memoryview(bytearray(self.frame.plan.chunk_bytes))
        with storage_errors(self.path), self.path.open("rb", buffering=0) as handle:
            for piece in self.frame.plan.pieces:
                handle.seek(self._start(piece))
                view = buffer[: piece.num_bytes]
                if handle.readinto(view) == piece.num_bytes:
                    held[piece.index] = chunk_digest(view) == self.frame.digests[piece.index]
        return held

    def tensors(self, *, shared: bool = False) -> dict[str, NamedTensors]:
        """The channels, as views of the mapped file.

        Args:
            shared: writing to them changes the file; by default it changes memory only.
        """
        if not self.is_whole():
            raise StorageError(f"{self.path} is missing or cut short", hint="it is fetched again when it is needed")
        with storage_errors(self.path):
            buffer = torch.empty(0, dtype=torch.uint8)
            if self.num_bytes:
                buffer = torch.from_file(str(self.path), shared=shared, size=self.num_bytes, dtype=torch.uint8)
        flats: dict[str, dict[torch.dtype, torch.Tensor]] = {channel.name: {} for channel in self.frame.plan.channels}
        for (channel, dtype), place in self._places.items():
            stop = place.offset + place.numel * place.held.itemsize
            flats[channel][dtype] = buffer[place.offset : stop].view(place.held)
        return {channel: NamedTensors(self.frame.plan.layout, held) for channel, held in flats.items()}

    def begins_as(self, other: FrameFile) -> bool:
        """Whether each flat begins where it begins in the other file."""
        theirs = {key: place.offset for key, place in other._places.items()}
        return all(theirs.get(key) == place.offset for key, place in self._places.items())

    def _start(self, piece: Piece) -> int:
        place = self._places[piece.channel, piece.dtype]
        return place.offset + piece.start * place.held.itemsize


def write_frame(path: Path, frame: Frame, tensors: Mapping[str, NamedTensors]) -> None:
    """Write tensors as a frame's body, whole and on disk, or not at all."""
    with replacing(path) as temporary:
        file = FrameFile(temporary, frame)
        file.make()
        for piece in frame.plan.pieces:
            file.write(piece, piece_of(tensors, piece))


@dataclass
class Arrival:
    """A frame on its way in.

    Args:
        file: where its chunks are put.
        held: for each chunk 1 if it is there.
    """

    file: FrameFile
    held: bytearray

    @property
    def frame(self) -> Frame:
        return self.file.frame

    def first_missing(self) -> int | None:
        index = self.held.find(0)
        return None if index < 0 else index

    def keep(self, index: int, chunk: bytes) -> bool:
        """Keep a chunk if it is what its digest says."""
        if chunk_digest(chunk) != self.frame.digests[index]:
            return False
        self.file.write(self.frame.plan.pieces[index], chunk)
        self.held[index] = 1
        return True


@dataclass
class _Held:
    round: int
    tensors: dict[str, NamedTensors]

    def is_of(self, layout: Layout) -> bool:
        return all(tensors.layout == layout for tensors in self.tensors.values())


@dataclass
class Inbox:
    """The global tensors that a site holds, by run and digest.

    Args:
        runs: the site's folder of runs.
    """

    runs: Path
    _open: dict[tuple[str, str], _Held] = field(default_factory=dict)

    def held(self, run: str, digest: str) -> dict[str, NamedTensors] | None:
        """The channels of a frame that arrived whole in this process's life."""
        found = self._open.get((run, digest))
        return None if found is None else found.tensors

    def resume(self, run: str, digest: str) -> Arrival | None:
        """What an earlier process left of a frame, each chunk checked by its digest; None if there is nothing."""
        header = self._header(run, digest)
        if not header.is_file():
            return None
        content = header.read_bytes()
        if header_digest(content) != digest:
            return None
        try:
            frame = parse_header(content)
        except Refused:
            return None
        for path in (self._body(run, digest), self._part(run, digest)):
            file = FrameFile(path, frame)
            if file.is_whole():
                return Arrival(file, file.whole_chunks())
        return None

    def begin(self, run: str, frame: Frame, *, wanted: Iterable[str] = ()) -> Arrival:
        """Make room for a frame: in the file of one that no task in hand names any more, if there is one, for writing
        over an old file is much quicker than writing a new one.

        Args:
            wanted: digests that tasks in hand name. Nobody may still look at the tensors of the others.

        Raises:
            StorageError: there is no room.
        """
        header = self._header(run, frame.digest)
        with storage_errors(header):  # a torn one is told by its digest, and the frame is fetched anew
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_bytes(frame.header)
        file = FrameFile(self._part(run, frame.digest), frame)
        for old in sorted(self._on_disk(run) - {frame.digest, *wanted}):
            body = self._body(run, old)
            if body.is_file() and not file.path.exists():
                with storage_errors(body):
                    body.replace(file.path)
            self._delete(run, old)
        file.make()
        return Arrival(file, bytearray(frame.plan.num_chunks))

    def finish(self, run: str, round: int, arrival: Arrival, *, wanted: Iterable[str] = ()) -> dict[str, NamedTensors]:
        """The channels of a frame whose last chunk has come; older rounds' frames of the run are deleted.

        Args:
            wanted: digests that tasks in hand still name: kept.
        """
        digest = arrival.frame.digest
        body = self._body(run, digest)
        if arrival.file.path != body:
            with storage_errors(body):
                arrival.file.path.replace(body)
        tensors = FrameFile(body, arrival.frame).tensors()
        self._open[run, digest] = _Held(round, tensors)
        self._tidy(run, round, {digest, *wanted})
        return tensors

    def latest(self, run: str, layout: Layout) -> str | None:
        """The digest of the frame of this layout that came last of those that lie here whole, whichever process fetched
        it; None: there is none."""
        held = [digest for (of, digest), found in self._open.items() if of == run and found.is_of(layout)]
        if held:
            return held[-1]
        bodies = [body for digest in self._on_disk(run) if (body := self._body(run, digest)).is_file()]
        for body in sorted(bodies, key=lambda body: body.stat().st_mtime_ns, reverse=True):
            digest = body.stem.removeprefix("base-")
            arrival = self.resume(run, digest)
            if arrival is not None and arrival.frame.plan.layout == layout and arrival.first_missing() is None:
                return digest
        return None

    def put(
        self, run: str, round: int, frame: Frame, tensors: Mapping[str, NamedTensors], *, wanted: Iterable[str] = ()
    ) -> dict[str, NamedTensors]:
        """Keep a frame that was made here as if it had been fetched; `wanted` as `finish` has it.

        Raises:
            StorageError: there is no room.
        """
        part = self._part(run, frame.digest)
        write_frame(part, frame, tensors)
        return self._made(run, round, FrameFile(part, frame), wanted)

    def move_on(
        self,
        run: str,
        round: int,
        held: str,
        digest: str,
        change: Callable[[Mapping[str, NamedTensors]], None],
        *,
        wanted: Iterable[str] = (),
    ) -> dict[str, NamedTensors] | None:
        """Make of a frame that lies here another of the same plan, in a copy of its file.

        Args:
            change: changes the channels in place.
            wanted: as `finish` has it.

        Returns:
            The channels; None: what came of it is not the frame of this digest, and is gone.

        Raises:
            StorageError: there is no room.
        """
        plan, part = self._frame(run, held).plan, self._part(run, digest)
        with storage_errors(part):
            shutil.copyfile(self._body(run, held), part)
        try:
            tensors = FrameFile(part, Frame(plan, ())).tensors(shared=True)
            change(tensors)
            frame = frame_of(tensors, plan)
            if frame.digest != digest:
                return None
            with storage_errors(part), part.open("rb+") as handle:
                os.fsync(handle.fileno())
            return self._made(run, round, FrameFile(part, frame), wanted)
        finally:
            part.unlink(missing_ok=True)

    def _made(self, run: str, round: int, file: FrameFile, wanted: Iterable[str]) -> dict[str, NamedTensors]:
        with replacing(self._header(run, file.frame.digest)) as temporary:
            temporary.write_bytes(file.frame.header)
        return self.finish(run, round, Arrival(file, bytearray()), wanted=wanted)

    def _frame(self, run: str, digest: str) -> Frame:
        with storage_errors(header := self._header(run, digest)):
            return parse_header(header.read_bytes())

    def forget(self, run: str) -> None:
        """Delete a run's frames."""
        for name in self._on_disk(run):
            self._delete(run, name)

    def _tidy(self, run: str, round: int, keep: set[str]) -> None:
        for digest in self._on_disk(run) - keep:
            held = self._open.get((run, digest))
            if held is None or held.round < round:
                self._delete(run, digest)

    def _on_disk(self, run: str) -> set[str]:
        return {path.stem.removeprefix("base-") for path in (self.runs / run).glob("base-*.*")}

    def _delete(self, run: str, digest: str) -> None:
        self._open.pop((run, digest), None)
        for path in (self._header(run, digest), self._part(run, digest), self._body(run, digest)):
            path.unlink(missing_ok=True)

    def _header(self, run: str, digest: str) -> Path:
        return self.runs / run / f"base-{digest}.header"

    def _part(self, run: str, digest: str) -> Path:
        return self.runs / run / f"base-{digest}.part"

    def _body(self, run: str, digest: str) -> Path:
        return self.runs / run / f"base-{digest}.bin"

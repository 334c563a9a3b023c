"""Global tensors as files: a frame's body in one blob, its header in another, read and written chunk by chunk."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

import torch

from ..errors import StateError
from ..federation.folder import storage_errors
from ..model.tensors import NamedTensors, bytes_of
from ..wire.frames import Frame, Piece, Plan, chunk_digest, parse_header, piece_of
from .blobs import Blobs
from .spares import Spares

#: open frames that are kept open; a coordinator reads the latest of each run
_KEPT_OPEN = 32
#: the kind of spare files that frames leave
SPARE = "frames"


def piece_offsets(plan: Plan) -> list[int]:
    """Where each chunk begins in a body that lies in one piece."""
    return [0, *accumulate(piece.num_bytes for piece in plan.pieces)]


def element_offset(plan: Plan, offsets: list[int], channel: str, dtype: torch.dtype, start: int) -> int:
    """Where an element of a flat lies in such a body; the next ones follow it, from chunk to chunk."""
    (piece,) = plan.pieces.over(channel, dtype, start, start + 1)
    return offsets[piece.index] + (start - piece.start) * piece.held.itemsize


class StoredFrame:
    """A frame whose body lies in a file of this machine. Chunks may be read by several threads at once.

    The file is closed when nobody holds the frame any more, and not before: another file that took over its descriptor
    would be read in its stead.
    """

    def __init__(self, frame: Frame, path: Path) -> None:
        self.frame, self.path = frame, path
        self._offsets = piece_offsets(frame.plan)
        with storage_errors(path):
            self._fd = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._fd)
            size = os.fstat(self._fd).st_size
        if size != self._offsets[-1]:
            raise StateError(
                f"{path} is damaged: {size:,} bytes where its header says {self._offsets[-1]:,}",
                hint="restore the blob store from a copy",
            )

    def chunk(self, index: int) -> bytes:
        """One chunk's bytes."""
        piece = self.frame.plan.pieces[index]
        return os.pread(self._fd, piece.num_bytes, self._offsets[index])

    def tensor(self, piece: Piece) -> torch.Tensor:
        """One chunk as a 1-D tensor that may be written to."""
        out = torch.empty(piece.numel, dtype=piece.held)
        self.read_into(piece, memoryview(out.view(torch.uint8).numpy()))  # type: ignore[arg-type]  # an array is a buffer
        return out

    def elements(self, channel: str, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        """Elements of one flat, whichever chunks they are in, as a 1-D tensor that may be written to."""
        plan = self.frame.plan
        out = torch.empty(stop - start, dtype=plan.held_as(channel, dtype))
        into = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
        _read(self._fd, self.path, into, element_offset(plan, self._offsets, channel, dtype, start))
        return out

    def read_into(self, piece: Piece, out: memoryview) -> None:
        _read(self._fd, self.path, out, self._offsets[piece.index])


def _read(fd: int, path: Path, out: memoryview, offset: int) -> None:
    if os.preadv(fd, [out], offset) != out.nbytes:
        raise StateError(f"{path} is damaged: it ends early", hint="restore the blob store from a copy")


class FrameWriter:
    """A frame in the making: chunks come in any order, from any thread; `finish` names it."""

    def __init__(self, files: FrameFiles, plan: Plan) -> None:
        self.files, self.plan = files, plan
        self._digests: list[bytes] = [b""] * len(plan.pieces)
        self._changed: set[int] = set()
        self._offsets = piece_offsets(plan)
        with storage_errors(files.scratch):
            files.scratch.mkdir(parents=True, exist_ok=True)
            self.path = files.scratch / f"frame-{uuid4().hex}"
            if files.spares is not None:
                files.spares.take(files.run, SPARE, self.path)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(self._fd, self._offsets[-1])

    def write(self, index: int, data: memoryview) -> None:
        """One chunk's bytes, hashed as they are written."""
        self._digests[index] = chunk_digest(data)
        self._write(data, self._offsets[index])

    def copy(self, frame: StoredFrame) -> None:
        """Begin with the chunks of a frame of the same plan."""
        assert frame.frame.plan == self.plan
        for piece in self.plan.pieces:
            self._write(memoryview(frame.chunk(piece.index)), self._offsets[piece.index])
        self._digests = list(frame.frame.digests)

    def put(self, channel: str, dtype: torch.dtype, start: int, values: torch.Tensor) -> None:
        """Elements of one flat over those that are there. Their chunks are hashed when all is written."""
        for piece in self.plan.pieces.over(channel, dtype, start, start + values.numel()):
            self._changed.add(piece.index)
        self._write(bytes_of(values), element_offset(self.plan, self._offsets, channel, dtype, start))

    def elements(self, channel: str, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        """Elements of one flat that were written."""
        out = torch.empty(stop - start, dtype=self.plan.held_as(channel, dtype))
        into = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
        _read(self._fd, self.path, into, element_offset(self.plan, self._offsets, channel, dtype, start))
        return out

    def _write(self, data: memoryview, offset: int) -> None:
        with storage_errors(self.path):
            written = os.pwrite(self._fd, data, offset)
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], offset + written)

    def finish(self) -> Frame:
        """Store the frame under its digest, on disk when this returns."""
        for index in sorted(self._changed):
            with storage_errors(self.path):
                chunk = os.pread(self._fd, self.plan.pieces[index].num_bytes, self._offsets[index])
            self._digests[index] = chunk_digest(chunk)
        assert all(self._digests), "a chunk was not written"
        frame = Frame(self.plan, tuple(self._digests))
        with storage_errors(self.path):
            os.fsync(self._fd)
        self.files.put(frame, self.path)
        return frame

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self.path.unlink(missing_ok=True)


class FrameFiles:
    """The frames of all runs, under `runs/<run>/frames/` of a blob store.

    Args:
        scratch: a folder for frames in the making, best on the file system of the store.
        spares: where deleted frames' files go, and new ones' come from.
    """

    def __init__(self, blobs: Blobs, scratch: Path, run: str, spares: Spares | None = None) -> None:
        self.blobs, self.scratch, self.run, self.spares = blobs, scratch, run, spares
        self._open: OrderedDict[str, StoredFrame] = OrderedDict()
        self._lock = threading.Lock()

    def _key(self, digest: str) -> str:
        return f"runs/{self.run}/frames/{digest}"

    def put(self, frame: Frame, body: Path) -> None:
        """Store a frame whose body is in a file, which is moved. The header comes last: with it the frame exists."""
        self.blobs.put(self._key(frame.digest), body)
        self.blobs.put_bytes(self._key(frame.digest) + ".header", frame.header)

    def write(self, tensors: Mapping[str, NamedTensors], plan: Plan) -> Frame:
        """Store tensors that are in memory."""
        with FrameWriter(self, plan) as writer:
            for piece in plan.pieces:
                writer.write(piece.index, piece_of(tensors, piece))
            return writer.finish()

    def open(self, digest: str) -> StoredFrame:
        """A stored frame.

        Raises:
            StorageError: there is none of this digest, or the store cannot be read.
            StateError: it is damaged.
        """
        with self._lock:
            found = self._open.get(digest)
            if found is None:
                frame = parse_header(self.blobs.get_bytes(self._key(digest) + ".header"))
                found = self._open[digest] = StoredFrame(frame, self.blobs.open_local(self._key(digest)))
                while len(self._open) > _KEPT_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(digest)
            return found

    def has(self, digest: str) -> bool:
        return self.blobs.exists(self._key(digest) + ".header")

    def digests(self) -> list[str]:
        """Every stored frame's name."""
        keys = self.blobs.keys(f"runs/{self.run}/frames")
        return [key.rpartition("/")[2].removesuffix(".header") for key in keys if key.endswith(".header")]

    def forget(self, digests: list[str]) -> None:
        """Delete frames."""
        for digest in digests:
            with self._lock:
                self._open.pop(digest, None)
            self.blobs.delete(self._key(digest) + ".header")
            if self.spares is None:
                self.blobs.delete(self._key(digest))
                continue
            place = self.spares.place(self.run, SPARE)
            if self.blobs.take_back(self._key(digest), place):
                self.spares.give(self.run, SPARE, place)

    def close(self) -> None:
        with self._lock:
            self._open.clear()

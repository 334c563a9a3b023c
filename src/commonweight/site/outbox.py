"""Finished updates that wait to be accepted, so that a site that is killed after training does not train again.

runs/<run>/outbox-<task>.bin        the update's tensors, as a frame's body (inbox.py)
runs/<run>/outbox-<task>.manifest   what goes with them; written last: without it there is no entry
runs/<run>/outbox-<task>-*.draft    tensors in the making, where they are large

(<task>: the first 32 hex digits of the SHA-256 of the task's id.)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..federation.folder import replacing
from ..model.tensors import Layout, NamedTensors, in_memory
from ..wire.decode import decode
from ..wire.frames import Channel, Frame, Plan, pack_chunk, parse_header, piece_of
from ..wire.protocol_pb2 import Manifest
from ..wire.refusals import Refused
from .inbox import FrameFile, write_frame

#: tensors that take more bytes are made in files
IN_MEMORY_BYTES = 32 << 20


@dataclass(frozen=True)
class Parcel:
    """A finished update: the manifest as it is signed, and the tensors that it announces."""

    manifest: bytes
    frame: Frame
    tensors: Mapping[str, NamedTensors]

    def packed(self, index: int) -> bytes:
        """A chunk as `Push` sends it."""
        return pack_chunk(index, piece_of(self.tensors, self.frame.plan.pieces[index]))


class Desk:
    """A `Room` for one task's work: what is large lies in files, mapped into memory, so that the system can take back
    the memory of what has been written. An update that was made in such a file need not be written to another.

    Args:
        stem: of the files' names.

    Attributes:
        finished: large tensors of which a part will not change any more, and their name.
        stops: up to where, for each of their flats.
        tell: called when there is more of that.
    """

    def __init__(self, stem: Path) -> None:
        self._stem = stem
        self._drafts: dict[str, tuple[FrameFile, NamedTensors]] = {}
        self.finished: tuple[str, NamedTensors] | None = None
        self.stops: dict[torch.dtype, int] = {}
        self.tell: Callable[[], None] = lambda: None

    def __call__(self, name: str, layout: Layout, *, wide: bool = False) -> NamedTensors:
        """See `Room`.

        Raises:
            StorageError: there is no room.
        """
        plan = Plan(layout, (Channel(name, wide),))
        if plan.num_bytes <= IN_MEMORY_BYTES:
            return in_memory(name, layout, wide=wide)
        file = FrameFile(self._stem.with_name(f"{self._stem.name}-{name}.draft"), Frame(plan, ()))
        file.path.unlink(missing_ok=True)
        file.make()
        tensors = file.tensors(shared=True)[name]
        self._drafts[name] = file, tensors
        return tensors

    def written(self, name: str, dtype: torch.dtype, stop: int) -> None:
        """See `Room`."""
        if name in self._drafts:
            self.finished = name, self._drafts[name][1]
            self.stops[dtype] = stop
            self.tell()

    def hand_over(self, parcel: Parcel, body: Path) -> bool:
        """Make the file in which a parcel's tensors were made its body, whole and on disk; False: there is no such
        file."""
        made = [self._drafts[name] for name in parcel.tensors if name in self._drafts]
        if len(made) != 1 or len(parcel.tensors) != 1:
            return False
        ((draft, tensors),) = made
        (sent,) = parcel.tensors.values()
        whole = FrameFile(body, parcel.frame)
        if not whole.begins_as(draft) or any(
            flat.data_ptr() != tensors.flats[dtype].data_ptr() for dtype, flat in sent.flats.items()
        ):
            return False
        with replacing(body) as temporary:
            draft.path.replace(temporary)
            os.truncate(temporary, whole.num_bytes)
        return True

    def clear(self) -> None:
        """Delete the files. What was made in them can be read for as long as somebody holds it."""
        for draft, _ in self._drafts.values():
            draft.path.unlink(missing_ok=True)
        self._drafts.clear()


class Outbox:
    """A site's finished updates.

    Args:
        runs: the site's folder of runs.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def desk(self, run: str, task: str) -> Desk:
        """A room for a task's work."""
        body, _ = self._files(run, task)
        return Desk(body.with_suffix(""))

    def keep(self, run: str, task: str, parcel: Parcel, desk: Desk | None = None) -> None:
        """Put an update on disk, whole or not at all.

        Args:
            desk: on which it may have been made.

        Raises:
            StorageError: there is no room.
        """
        body, manifest = self._files(run, task)
        if desk is None or not desk.hand_over(parcel, body):
            write_frame(body, parcel.frame, parcel.tensors)
        with replacing(manifest) as temporary:
            temporary.write_bytes(parcel.manifest)

    def find(self, run: str, task: str, *, base: str, site: str) -> Parcel | None:
        """The update that waits for this task, if it began from `base` and lies here undamaged; else None."""
        body, path = self._files(run, task)
        try:
            content = path.read_bytes()
            manifest = decode(Manifest, content)
            frame = parse_header(manifest.frame)
        except (OSError, Refused):
            return None
        if (manifest.run, manifest.task, manifest.base, manifest.site) != (run, task, base, site):
            return None
        file = FrameFile(body, frame)
        if not all(file.whole_chunks()) or not file.is_whole():
            return None
        return Parcel(content, frame, file.tensors())

    def delete(self, run: str, task: str) -> None:
        """The task is over."""
        for path in reversed(self._files(run, task)):
            path.unlink(missing_ok=True)

    def forget(self, run: str) -> None:
        """Delete what waits of a run."""
        for path in (self.runs / run).glob("outbox-*"):
            path.unlink(missing_ok=True)

    def _files(self, run: str, task: str) -> tuple[Path, Path]:
        name = f"outbox-{hashlib.sha256(task.encode()).hexdigest()[:32]}"
        return self.runs / run / f"{name}.bin", self.runs / run / f"{name}.manifest"

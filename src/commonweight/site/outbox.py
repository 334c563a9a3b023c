"""Finished updates that wait to be accepted, so that a site that is killed after training does not train again.

runs/<run>/outbox-<task>.bin        the update's tensors, as a frame's body (inbox.py)
runs/<run>/outbox-<task>.manifest   what goes with them; written last: without it there is no entry

(<task>: the first 32 hex digits of the SHA-256 of the task's id.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..federation.folder import replacing
from ..model.tensors import NamedTensors
from ..wire.decode import decode
from ..wire.frames import Frame, pack_chunk, parse_header, piece_of
from ..wire.protocol_pb2 import Manifest
from ..wire.refusals import Refused
from .inbox import FrameFile, write_frame


@dataclass(frozen=True)
class Parcel:
    """A finished update: the manifest as it is signed, and the tensors that it announces."""

    manifest: bytes
    frame: Frame
    tensors: Mapping[str, NamedTensors]

    def packed(self, index: int) -> bytes:
        """A chunk as `Push` sends it."""
        return pack_chunk(index, piece_of(self.tensors, self.frame.plan.pieces[index]))


class Outbox:
    """A site's finished updates.

    Args:
        runs: the site's folder of runs.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def keep(self, run: str, task: str, parcel: Parcel) -> None:
        """Put an update on disk, whole or not at all.

        Raises:
            StorageError: there is no room.
        """
        body, manifest = self._files(run, task)
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

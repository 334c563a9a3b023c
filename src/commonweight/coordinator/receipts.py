"""Uploads that are under way on a replica: where their chunks go, and which are there."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from ..wire.frames import Frame
from ..wire.manifest import check_chunk, refuse_non_finite
from .frame_files import FrameWriter
from .store import Upload
from .vault import SealedFile


@dataclass
class Receipt:
    """An upload that is under way on this replica.

    Args:
        sender: the only one who may push.
        present: indexes of the chunks that are there.
        is_over: it was accepted, refused or dropped; nothing may be written any more.
    """

    id: str
    sender: str
    run: str
    frame: Frame
    present: set[int] = field(default_factory=set)
    is_over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def missing(self) -> list[int]:
        return [index for index in range(self.frame.plan.num_chunks) if index not in self.present]

    def check(self, index: int, chunk: memoryview) -> None:
        """Whether a chunk is what was promised.

        Raises:
            Refused: it is not (it may be sent again), or not finite (final).
        """
        check_chunk(self.frame, index, chunk)
        refuse_non_finite(self.frame, index, chunk)

    def write(self, index: int, chunk: memoryview) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


@dataclass
class UpdateReceipt(Receipt):
    """An update, or a region's sum of some (`members`), sealed as it comes."""

    sealed: SealedFile | None = None
    path: Path = Path()
    blob: str = ""
    members: tuple[Upload, ...] = ()

    def write(self, index: int, chunk: memoryview) -> None:
        assert self.sealed is not None
        self.sealed.write(index, chunk)

    def close(self) -> None:
        if self.sealed is not None:
            self.sealed.close()


@dataclass
class InitialReceipt(Receipt):
    """A run's initial global tensors."""

    writer: FrameWriter | None = None

    def write(self, index: int, chunk: memoryview) -> None:
        assert self.writer is not None
        self.writer.write(index, chunk)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.__exit__(None, None, None)

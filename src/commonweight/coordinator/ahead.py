"""Chunks of an update that come before its manifest, while its site still makes the rest of it.

Nothing counts on them. They are checked as far as they can be, sealed and written under the key and to the file that
the update will have; what their digests are is remembered in this process alone. Once the manifest is there, chunks
whose digests it names are there too, and all others are missing, as they are without any of this: after a restart, at
another replica, or if the site never asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..codec.coded import CODED, most_layout
from ..wire.frames import LIMITS, Channel, Frame, Plan, chunk_digest
from ..wire.manifest import malformed, refuse_non_finite
from ..wire.refusals import Refusal, Refused
from .plans import RunPlan
from .receipts import Receipt
from .vault import SealedFile


def frame_ahead(plan: RunPlan, site: str, chunk_bytes: int) -> Frame:
    """The frame of a site's update without its digests. Of a coded one it is the largest that there can be, which the
    true one begins as.

    Raises:
        Refused (malformed, wrong-shape): the run's updates are not cut so.
    """
    whole = plan.initial.plan.chunk_bytes
    if plan.coder is None:
        if chunk_bytes != whole:
            raise Refused(Refusal.WRONG_SHAPE, f"its chunks are of {chunk_bytes} bytes, expected {whole}")
        channels = tuple(Channel(name) for name in plan.update_channels)
        return Frame(Plan(plan.update_layout(site), channels, chunk_bytes), ())
    if not LIMITS.min_chunk_bytes <= chunk_bytes <= LIMITS.max_chunk_bytes or chunk_bytes % 8:
        raise malformed(f"an update with chunks of {chunk_bytes} bytes")
    layout = most_layout(plan.coder, len(plan.update_channels))
    return Frame(Plan(layout, (Channel(CODED),), chunk_bytes), ())


@dataclass(kw_only=True)
class AheadReceipt(Receipt):
    """Chunks without a manifest.

    Args:
        task: whose update they are of.
        wrapped: the key of the sealed file.
        digests: of the chunks that are there, by index.
    """

    task: str
    sealed: SealedFile
    path: Path
    wrapped: bytes
    digests: dict[int, bytes] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        return []

    def check(self, index: int, chunk: memoryview) -> None:
        """Only chunks of full size are taken: which is the last of a coded update, nobody knows yet."""
        pieces = self.frame.plan.pieces
        if not 0 <= index < len(pieces) or chunk.nbytes != pieces[index].num_bytes:
            raise malformed(f"a chunk {index} of {chunk.nbytes} bytes, of which there is none in the update")
        refuse_non_finite(self.frame, index, chunk)

    def write(self, index: int, chunk: memoryview) -> None:
        self.digests[index] = chunk_digest(chunk)
        self.sealed.write(index, chunk)

    def of(self, frame: Frame) -> set[int]:
        """The chunks that are there of a frame which its manifest has made known."""
        mine, theirs = self.frame.plan, frame.plan
        if mine.chunk_bytes != theirs.chunk_bytes or mine.channels != theirs.channels:
            return set()
        here = (index for index in sorted(self.digests) if index < theirs.num_chunks)
        return {
            index
            for index in here
            if frame.digests[index] == self.digests[index] and theirs.pieces[index] == mine.pieces[index]
        }

    def close(self) -> None:
        self.sealed.close()
        self.path.unlink(missing_ok=True)

"""Global tensors that are made small on their way down, in files: span by span, so that memory is O(span).

What a round has made of the model is read from the file in which it was written, what sites will hold is written into
the base's next frame, and what is late then into a frame that stays here. The coded difference is a frame of its own,
as coded updates are (`codec/coded.py`), which sites fetch that hold the version before.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

import torch

from ..codec.coded import CODED, layout_of
from ..codec.down import THETA, Down
from ..federation.folder import storage_errors
from ..model.tensors import accumulator_dtype, bytes_of
from ..wire.frames import Channel, Frame, Plan, plan_for
from .frame_files import FrameFiles, FrameWriter, StoredFrame

LATE = "late"


@dataclass(frozen=True)
class Followed:
    """Digests of the frames that a round leaves: the base's, that of what is late, and that of the difference, with its
    bytes."""

    base: str
    late: str
    sent: str
    sent_bytes: int

    @property
    def record(self) -> dict[str, Any]:
        """What the journal keeps of it beside the base."""
        return {"late": self.late, "down": {"frame": self.sent, "bytes": self.sent_bytes}}


class StoredDown:
    """Follows a run's model with what its sites hold.

    Args:
        plan: of the base's frames, whose one channel is θ.
    """

    def __init__(self, down: Down, files: FrameFiles, plan: Plan) -> None:
        self.down, self.files, self.plan = down, files, plan
        self._late_plan = Plan(plan.layout, (Channel(LATE, wide=True),), plan.chunk_bytes)

    def follow(self, round: int, before: StoredFrame, late: str, after: FrameWriter) -> Followed:
        """A round's frames.

        Args:
            before: what sites hold.
            late: the frame of what is late; "": nothing is.
            after: what the round has made of the model.

        Raises:
            RoundError: what sites would hold is not finite.
        """
        error = self.files.open(late) if late else None
        with FrameWriter(self.files, self.plan) as base, FrameWriter(self.files, self._late_plan) as new_late:
            _begin(base, before)
            _begin(new_late, error)
            with storage_errors(self.files.scratch), tempfile.TemporaryFile(dir=self.files.scratch) as body:
                lengths = []
                for number, span in enumerate(self.down.coder.spans):
                    where = (span.dtype, span.start, span.start + span.numel)
                    old, new = before.elements(THETA, *where), after.elements(THETA, *where)
                    missing = (
                        torch.zeros(span.numel, dtype=accumulator_dtype(span.dtype))
                        if error is None
                        else error.elements(LATE, *where)
                    )
                    coded, held = self.down.step(number, round, old, new, missing)
                    base.put(THETA, span.dtype, span.start, held)
                    new_late.put(LATE, span.dtype, span.start, missing)
                    body.write(coded.payload)
                    lengths.append(len(coded.payload))
                sent = self._packed(round, lengths, body)
            return Followed(base.finish().digest, new_late.finish().digest, sent.digest, sent.plan.num_bytes)

    def _packed(self, round: int, lengths: list[int], body: IO[bytes]) -> Frame:
        """The frame of the difference, whose payloads lie in a file (`codec.coded.Packer`)."""
        heads = (
            torch.tensor(lengths, dtype=torch.int32),
            torch.tensor([self.down.seed(round), 0], dtype=torch.int64),
        )
        plan = plan_for(layout_of(len(lengths), sum(lengths)), (Channel(CODED),), self.plan.chunk_bytes)
        body.seek(0)
        with FrameWriter(self.files, plan) as writer:
            for values in heads:
                writer.put(CODED, values.dtype, 0, values)
            for start, stop in _stretches(sum(lengths), self.plan.chunk_bytes):
                piece = torch.frombuffer(bytearray(body.read(stop - start)), dtype=torch.uint8)
                writer.put(CODED, torch.uint8, start, piece)
            return writer.finish()


def _begin(writer: FrameWriter, before: StoredFrame | None) -> None:
    """Write what no codec is for: tensors that are not floating stay as they were."""
    for piece in writer.plan.pieces:
        if not piece.dtype.is_floating_point:
            data = torch.zeros(piece.numel, dtype=piece.held) if before is None else before.tensor(piece)
            writer.write(piece.index, bytes_of(data))


def _stretches(total: int, most: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(0, total, most), total])) if total else []

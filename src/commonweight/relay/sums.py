"""Updates at rest added up, stretch by stretch, into a frame of sums: memory is O(chunk)."""

from __future__ import annotations

from collections.abc import Sequence

from ..coordinator.frame_files import FrameFiles, FrameWriter
from ..coordinator.stored_model import Stretches, stretch_of
from ..coordinator.stored_updates import StoredUpdate
from ..model.tensors import Layout, NamedTensors, bytes_of
from ..strategies.base import ServerState, SumStrategy
from ..wire.frames import Channel, Frame, Plan
from ..wire.partial import sum_channels


def add_up(
    strategy: SumStrategy, updates: Sequence[StoredUpdate], layout: Layout, chunk_bytes: int, files: FrameFiles
) -> Frame:
    """What the strategy's fold sums of these updates in this order, as a frame in `files`.

    The bits are those that the fold has when the same updates are folded whole (`federation/relays.py`). Tensors that
    are not floating are no part of a sum; zeros stand in their places.

    Args:
        layout, chunk_bytes: of the run's tensors, and how they are cut.
    """
    plan = Plan(layout, sum_channels(strategy.update_channels), chunk_bytes)
    stretches, sealed = Stretches(layout), [update.open() for update in updates]
    try:
        with FrameWriter(files, plan) as writer:
            for piece in Plan(layout, (Channel("theta"),), chunk_bytes).pieces:
                stretch = stretches.layout_of(piece)
                fold = strategy.open(ServerState(NamedTensors.zeros(stretch)))
                for update, file in zip(updates, sealed, strict=True):
                    fold.add(stretch_of(update, file, piece, stretch))
                for channel, sums in fold.sums.items():
                    for part in plan.pieces.over(channel, piece.dtype, piece.start, piece.start + piece.numel):
                        values = sums.flats[piece.dtype][part.start - piece.start :][: part.numel]
                        writer.write(part.index, bytes_of(values))
            return writer.finish()
    finally:
        for file in sealed:
            file.close()

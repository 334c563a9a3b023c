"""The global model of a networked run: files, combined piece by piece, so that memory is O(chunk).

Everything that a strategy with `needs = "sum"` does is done element by element, so it may be done to one stretch of
elements after the other: each piece of θ and of the slots is read, the same piece of every update is folded into it in
order (the cohort's, or in an asynchronous run that of acceptance), the strategy's step is taken, and the result is
written and hashed. The bits are those of doing it to the whole (`tests/unit/test_stored_model.py` compares them).

    base   the frame that sites start from: channel `theta`, and the slots that the strategy broadcasts
    slots  the frame of the other slots, which stay here
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..errors import StateError
from ..federation.messages import Engine
from ..model.tensors import Entry, Layout, NamedTensors, bytes_of
from ..strategies.asynchronous import AsynchronousStrategy
from ..strategies.base import ServerState, SumStrategy
from ..strategies.update import Update
from ..wire.frames import Channel, Frame, Piece, Plan
from .frame_files import FrameFiles, FrameWriter, StoredFrame
from .vault import SealedFile

#: pieces in hand at once: enough to keep reading, hashing and adding busy, few enough to stay small
_WORKERS = 2


@dataclass(frozen=True)
class StoredUpdate(Update):
    """An accepted update whose tensors are in a sealed file; `channels` is empty.

    Args:
        frame: where each chunk belongs.
        path, key: the file.
        base: the digest of the frame that its site started from.
    """

    frame: Frame | None = None
    path: Path | None = None
    key: bytes = b""
    base: str = ""


class _Announcing(Protocol):
    """An engine whose participants fetch the global tensors by their frame's name."""

    def announce(self, base: str) -> None: ...


class StoredModel:
    """A global model in files.

    Args:
        initial: the digest of the frame with the initial θ.
    """

    def __init__(self, strategy: SumStrategy | AsynchronousStrategy, files: FrameFiles, initial: str) -> None:
        self.strategy, self.files, self.initial = strategy, files, initial
        plan = files.open(initial).frame.plan
        slots = strategy.slot_names
        sent = [Channel("theta"), *(Channel(name, wide=True) for name in slots if name in strategy.broadcast_channels)]
        kept = [Channel(name, wide=True) for name in slots if name not in strategy.broadcast_channels]
        self._layout = plan.layout
        self._entries: dict[torch.dtype, tuple[list[Entry], list[int]]] = {}
        for entry in plan.layout.entries:
            entries, starts = self._entries.setdefault(entry.dtype, ([], []))
            entries.append(entry)
            starts.append(entry.offset)
        self.base_plan = Plan(plan.layout, tuple(sent), plan.chunk_bytes)
        self.slot_plan = Plan(plan.layout, tuple(kept), plan.chunk_bytes) if kept else None
        self.base, self.slots = initial, ""
        self._updates: list[StoredUpdate] = []

    @property
    def layout(self) -> Layout:
        return self._layout

    def first(self) -> dict[str, Any]:
        if not self.strategy.slot_names:
            return self.record()
        base = self.files.open(self.initial)
        with FrameWriter(self.files, self.base_plan) as new_base:
            if self.slot_plan is None:
                self._begin(base, new_base, None)
            else:
                with FrameWriter(self.files, self.slot_plan) as new_slots:
                    self._begin(base, new_base, new_slots)
                    self.slots = new_slots.finish().digest
            self.base = new_base.finish().digest
        return self.record()

    def _begin(self, base: StoredFrame, new_base: FrameWriter, new_slots: FrameWriter | None) -> None:
        """The strategy's state before round 1, one stretch of elements after the other."""
        places = _Places(base, None, new_base, new_slots)
        for piece in base.frame.plan.pieces:
            layout = self._layout_of(piece)
            places.put(piece, self.strategy.init(NamedTensors(layout, {piece.dtype: base.tensor(piece)})))

    def record(self) -> dict[str, Any]:
        """What the journal keeps of the state."""
        return {"base": self.base, "slots": self.slots}

    def restore(self, round: int, record: Mapping[str, Any]) -> None:
        self.base, self.slots = record["base"], record["slots"]
        self.files.open(self.base)  # missing or damaged: said before anything is asked of the sites

    def announce(self, engine: Engine) -> None:
        cast(_Announcing, engine).announce(self.base)

    def open(self) -> None:
        self._updates = []

    def check(self, update: Update) -> None:
        """An update was checked as it arrived (`receive.py`); nothing is left to check."""

    def fold(self, update: Update) -> None:
        assert isinstance(update, StoredUpdate)
        self._updates.append(update)

    def relay(self, update: Update) -> str:
        return ""

    def close(self, round: int) -> dict[str, Any]:
        if not self._updates:
            raise ValueError("a round was closed with no update in it")
        base = self.files.open(self.base)
        slots = self.files.open(self.slots) if self.slots else None
        with FrameWriter(self.files, self.base_plan) as new_base:
            if self.slot_plan is None or slots is None:
                self._combine(base, None, new_base, None)
            else:
                with FrameWriter(self.files, self.slot_plan) as new_slots:
                    self._combine(base, slots, new_base, new_slots)
                    self.slots = new_slots.finish().digest
            self.base = new_base.finish().digest
        self._updates = []
        return self.record()

    def _combine(
        self, base: StoredFrame, slots: StoredFrame | None, new_base: FrameWriter, new_slots: FrameWriter | None
    ) -> None:
        places = _Places(base, slots, new_base, new_slots)
        sealed = [
            SealedFile(u.path, u.key, u.frame.plan.chunk_bytes, writable=False)
            for u in self._updates
            if u.path and u.frame
        ]
        pieces = [piece for piece in self.base_plan.pieces if piece.channel == "theta"]
        try:
            if len(pieces) == 1:
                self._step(pieces[0], places, sealed)
                return
            with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
                for _ in pool.map(lambda piece: self._step(piece, places, sealed), pieces):
                    pass
        finally:
            for file in sealed:
                file.close()

    def _step(self, piece: Piece, places: _Places, sealed: list[SealedFile]) -> None:
        """The strategy's whole round, on one stretch of elements."""
        layout = self._layout_of(piece)
        theta = places.base.tensor(piece)
        slots = {name: places.read(name, piece) for name in self.strategy.slot_names}
        state = ServerState(
            NamedTensors(layout, {piece.dtype: theta}),
            {name: NamedTensors(layout, {piece.dtype: values}) for name, values in slots.items()},
        )
        if piece.dtype.is_floating_point:
            fold = self.strategy.open(state)
            for update, file in zip(self._updates, sealed, strict=True):
                fold.add(self._kept(update, _stretch(update, file, piece, layout), piece))
            state = self.strategy.close(state, fold)
        places.put(piece, state)

    def _kept(self, update: StoredUpdate, stretch: Update, piece: Piece) -> Update:
        """A stretch as the strategy keeps it: one that keeps models is shown the same stretch of the version that the
        site started from."""
        if not isinstance(self.strategy, AsynchronousStrategy) or self.strategy.keeps == "delta":
            return stretch
        theta = self.files.open(update.base).tensor(piece)
        return self.strategy.kept(NamedTensors(stretch.delta.layout, {piece.dtype: theta}), stretch)

    def _layout_of(self, piece: Piece) -> Layout:
        """The layout of a stretch of elements: the parts of tensors that lie in it, under the tensors' names."""
        entries, starts = self._entries[piece.dtype]
        first = max(0, bisect_right(starts, piece.start) - 1)
        end, parts = piece.start + piece.numel, []
        for entry in entries[first:]:
            if entry.offset >= end:
                break
            begin, stop = max(entry.offset, piece.start), min(entry.offset + entry.numel, end)
            if stop > begin:
                parts.append(Entry(entry.name, piece.dtype, (stop - begin,), begin - piece.start, stop - begin))
        return Layout(tuple(parts))

    def digest(self) -> str:
        """`NamedTensors.digest` of θ, read chunk by chunk."""
        base, sha = self.files.open(self.base), hashlib.sha256(self._layout.digest.encode())
        for piece in self.base_plan.pieces:
            if piece.channel == "theta":
                sha.update(base.chunk(piece.index))
        return sha.hexdigest()


class _Places:
    """Where stretches of θ and of the slots are read and written, whichever frame they are in."""

    def __init__(
        self, base: StoredFrame, slots: StoredFrame | None, new_base: FrameWriter, new_slots: FrameWriter | None
    ) -> None:
        self.base = base
        self._read: dict[str, StoredFrame] = {}
        self._write: dict[str, FrameWriter] = {}
        self._pieces: dict[tuple[str, torch.dtype], list[Piece]] = {}
        for frame, writer in ((base, new_base), (slots, new_slots)):
            if writer is None:
                continue
            for channel in writer.plan.channels:
                self._write[channel.name] = writer
                if frame is not None:
                    self._read[channel.name] = frame
            for piece in writer.plan.pieces:
                self._pieces.setdefault((piece.channel, piece.dtype), []).append(piece)

    def _stretch(self, channel: str, piece: Piece) -> Iterator[Piece]:
        """The chunks of a channel that hold the elements of a piece of θ: a wide one's hold fewer each."""
        end = piece.start + piece.numel
        for found in self._pieces[channel, piece.dtype]:
            if piece.start <= found.start < end:
                yield found

    def read(self, channel: str, piece: Piece) -> Tensor:
        parts = [self._read[channel].tensor(part) for part in self._stretch(channel, piece)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, piece: Piece, state: ServerState) -> None:
        """Write a strategy's state over the elements of a piece of θ."""
        self._put("theta", piece, state.theta.flats[piece.dtype])
        for name, slot in state.slots.items():
            self._put(name, piece, slot.flats[piece.dtype])

    def _put(self, channel: str, piece: Piece, values: Tensor) -> None:
        for part in self._stretch(channel, piece):
            start = part.start - piece.start
            self._write[channel].write(part.index, bytes_of(values[start : start + part.numel]))


def _stretch(update: StoredUpdate, sealed: SealedFile, piece: Piece, layout: Layout) -> Update:
    """One stretch of an update, decrypted."""
    assert update.frame is not None
    channels = {}
    for channel, part in _parts(update.frame.plan, piece).items():
        values = torch.empty(part.numel, dtype=part.held)
        into = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
        if sealed.read_into(part.index, into) != part.num_bytes:
            raise StateError(
                f"the update of site {update.site!r} for round {update.round} is damaged on this coordinator's disk",
                hint="restore the blob store from a copy; the last committed round is untouched",
            )
        channels[channel] = NamedTensors(layout, {piece.dtype: values})
    return Update(
        update.site,
        update.round,
        channels,
        weight=update.weight,
        num_examples=update.num_examples,
        num_label_tokens=update.num_label_tokens,
        num_steps=update.num_steps,
    )


def _parts(plan: Plan, piece: Piece) -> dict[str, Piece]:
    """An update's chunk of each channel over the elements of a piece of θ: they are cut alike."""
    per_channel = plan.num_chunks // len(plan.channels)
    found = {}
    for place, channel in enumerate(plan.channels):
        part = plan.pieces[place * per_channel + piece.index]
        assert (part.start, part.numel, part.dtype) == (piece.start, piece.numel, piece.dtype)
        found[channel.name] = part
    return found

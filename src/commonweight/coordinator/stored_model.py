"""The global model of a networked run: files, combined piece by piece.

Everything that a strategy with `needs = "sum"` does is done element by element, so it may be done to one stretch of
elements after the other: each piece of θ and of the slots is read, the same piece of every update is folded into it in
order (the cohort's, or in an asynchronous run that of acceptance), the strategy's step is taken, and the result is
written and hashed: memory is O(chunk). A strategy that needs individual updates reads them side by side as it likes
(`stored_updates.py`): O(cohort × chunk). The bits are those of doing it in memory (`tests/unit/test_stored_model.py`
compares them).

    base   the frame that sites start from: channel `theta`, and the slots that the strategy broadcasts
    slots  the frame of the other slots, which stay here

Where the way down is coded, the base is what sites hold, and there are two frames more (`stored_down.py`).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..codec.down import Down
from ..federation.messages import Engine
from ..federation.private_rounds import PrivateRounds
from ..federation.relays import merge_partials
from ..federation.secure_rounds import GroupTotals, mean_of_group
from ..model.clusters import channel_of
from ..model.tensors import Entry, Layout, NamedTensors, bytes_of
from ..privacy.secure_aggregation.rows import Totals
from ..strategies.asynchronous import AsynchronousStrategy
from ..strategies.base import ServerState, SumStrategy, WeightedSum
from ..strategies.clusters.sketch import sketches_of
from ..strategies.side_by_side import SideBySideStrategy, one_thread
from ..strategies.update import Update
from ..wire.frames import Channel, Piece, Plan
from .coded_updates import CodedFile
from .frame_files import FrameFiles, FrameWriter, StoredFrame
from .masked_updates import GroupReader, MaskedUpdates, OpenedSum
from .stored_down import Followed, StoredDown
from .stored_updates import WORKERS, InFiles, StoredPartial, StoredUpdate
from .vault import SealedFile

#: strategies that can be carried out on files
Combining = SumStrategy | AsynchronousStrategy | SideBySideStrategy


class Stretches:
    """Stretches of elements of a layout, as layouts of their own."""

    def __init__(self, layout: Layout) -> None:
        self._entries: dict[torch.dtype, tuple[list[Entry], list[int]]] = {}
        for entry in layout.entries:
            entries, starts = self._entries.setdefault(entry.dtype, ([], []))
            entries.append(entry)
            starts.append(entry.offset)

    def layout_of(self, piece: Piece) -> Layout:
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


class Opening(Protocol):
    """What opens a round's masked sums."""

    opened: list[OpenedSum]


class _Announcing(Protocol):
    """An engine whose participants fetch the global tensors by their frame's name."""

    def announce(self, base: str) -> None: ...


class StoredModel:
    """A global model in files.

    Args:
        initial: the digest of the frame with the initial θ.
        private: makes rounds' sums private; None: they are not.
        relays: in the order in which their sums are merged.
        secure: updates come masked, and this opens their sums; None: they come as they are.
        down: makes what a round has changed small on its way to the sites; None: it is sent as it is.
    """

    def __init__(
        self,
        strategy: Combining,
        files: FrameFiles,
        initial: str,
        private: PrivateRounds | None = None,
        relays: Sequence[str] = (),
        secure: Opening | None = None,
        down: Down | None = None,
    ) -> None:
        self.strategy, self.files, self.initial, self.private = strategy, files, initial, private
        self.secure = secure
        self.relays = tuple(relays)
        plan = files.open(initial).frame.plan
        slots = strategy.slot_names
        sent = [Channel("theta"), *(Channel(name, wide=True) for name in slots if name in strategy.broadcast_channels)]
        kept = [Channel(name, wide=True) for name in slots if name not in strategy.broadcast_channels]
        self._layout, self._stretches = plan.layout, Stretches(plan.layout)
        self.base_plan = Plan(plan.layout, tuple(sent), plan.chunk_bytes)
        self.slot_plan = Plan(plan.layout, tuple(kept), plan.chunk_bytes) if kept else None
        self.base, self.slots = initial, ""
        self.down = None if down is None else StoredDown(down, files, self.base_plan)
        self._followed: Followed | None = None
        self._late = ""
        self.clusters: dict[str, int] = {}
        self.totals: Totals | None = None
        self.spoilt: Mapping[int, str] = {}
        self._updates: list[StoredUpdate] = []

    @property
    def layout(self) -> Layout:
        return self._layout

    def first(self) -> dict[str, Any]:
        self.strategy.validate(self._layout)
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
            layout = self._stretches.layout_of(piece)
            places.put(piece, self.strategy.init(NamedTensors(layout, {piece.dtype: base.tensor(piece)})))

    def record(self) -> dict[str, Any]:
        """What the journal keeps of the state."""
        return {
            "base": self.base,
            "slots": self.slots,
            **(self._followed.record if self._followed is not None else {}),
        }

    def restore(self, round: int, record: Mapping[str, Any]) -> None:
        self.base, self.slots, self._late = record["base"], record["slots"], record.get("late", "")
        self.committed(round)  # a crash may have come between the commit and this
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
        assert isinstance(update, StoredUpdate)
        return update.partial.relay if update.partial is not None else ""

    def close(self, round: int) -> dict[str, Any]:
        if not self._updates:
            raise ValueError("a round was closed with no update in it")
        if self.private is not None:
            assert isinstance(self.strategy, SumStrategy)
            self.strategy.private = self.private.mean(round)
        if round == self.strategy.grouping_round:
            self._group()
        base, after = self.files.open(self.base), self.slots
        slots = self.files.open(self.slots) if self.slots else None
        with FrameWriter(self.files, self.base_plan) as new_base:
            if self.slot_plan is None or slots is None:
                self._combine(base, None, new_base, None)
            else:
                with FrameWriter(self.files, self.slot_plan) as new_slots:
                    self._combine(base, slots, new_base, new_slots)
                    after = new_slots.finish().digest
            if self.down is None:
                self.base = new_base.finish().digest
            else:
                self._followed = self.down.follow(round, base, self._late, new_base)
                self.base, self._late = self._followed.base, self._followed.late
            self.slots = after
        if 0 < self.strategy.grouping_round <= round:
            self.clusters.update({update.site: update.cluster for update in self._updates})
        self._updates = []
        return self.record()

    def committed(self, round: int) -> None:
        if self.private is not None:
            self.private.committed(round)

    def _group(self) -> None:
        """Put a round's updates into clusters by their sketches: one more pass over them, before they are combined."""
        with InFiles(self._layout, self._updates, {}) as table:
            clusters = self.strategy.grouped(sketches_of(table))
        self._updates = [replace(update, cluster=clusters[update.site]) for update in self._updates]

    def _combine(
        self, base: StoredFrame, slots: StoredFrame | None, new_base: FrameWriter, new_slots: FrameWriter | None
    ) -> None:
        places = _Places(base, slots, new_base, new_slots)
        if isinstance(self.strategy, SideBySideStrategy):
            with self._side_by_side(places) as table, one_thread():
                self.strategy.merge(table)
            return
        strategy = self.strategy
        if self.secure is not None:
            (opened,) = self.secure.opened
            with MaskedUpdates(self._updates, opened) as masked:
                self.totals = masked.totals
                self._each_piece(
                    lambda piece: self._step(strategy, piece, places, lambda _, *stretch: masked.into(*stretch))
                )
            return
        alone = [(update, update.opened()) for update in self._updates if update.partial is None]
        regions = self._regions()
        try:
            self._each_piece(
                lambda piece: self._step(strategy, piece, places, partial(self._fold, strategy, alone, regions))
            )
        finally:
            for file in [*(file for _, file in alone), *(region.file for region in regions)]:
                file.close()

    def _side_by_side(self, places: _Places) -> InFiles:
        """The round's updates, or where they come masked the means of the groups whose sums were opened."""
        if self.secure is None:
            return InFiles(self._layout, self._updates, places.frames)
        groups, means, readers = GroupTotals(), list[Update](), list[GroupReader]()
        for opened in self.secure.opened:
            masked = MaskedUpdates(self._updates, opened)
            totals = groups.read(opened.place, partial(getattr, masked, "totals"))
            means.append(mean_of_group(opened.place, self._updates[0].round, totals, {}))
            readers.append(GroupReader(masked, totals))
        self.totals, self.spoilt = groups.sum, groups.spoilt
        return InFiles(self._layout, means, places.frames, readers)

    def _each_piece(self, step: Callable[[Piece], None]) -> None:
        pieces = [piece for piece in self.base_plan.pieces if piece.channel == "theta"]
        if len(pieces) == 1:
            step(pieces[0])
            return
        with ThreadPoolExecutor(WORKERS) as pool:
            for _ in pool.map(step, pieces):
                pass

    def _regions(self) -> list[_Region]:
        """The sums of relays, in the order in which they are merged."""
        found = {update.partial.relay: update.partial for update in self._updates if update.partial is not None}
        by_site = {update.site: update for update in self._updates}
        return [
            _Region(found[relay], [by_site[site] for site in found[relay].sites], found[relay].open())
            for relay in self.relays
            if relay in found
        ]

    def _step(
        self,
        strategy: SumStrategy | AsynchronousStrategy,
        piece: Piece,
        places: _Places,
        fill: Callable[[ServerState, WeightedSum, Piece], None],
    ) -> None:
        """The strategy's whole round, on one stretch of elements; `fill` folds it."""
        layout = self._stretches.layout_of(piece)
        theta = places.base.tensor(piece)
        slots = {name: places.read(name, piece) for name in strategy.slot_names}
        state = ServerState(
            NamedTensors(layout, {piece.dtype: theta}),
            {name: NamedTensors(layout, {piece.dtype: values}) for name, values in slots.items()},
            first={piece.dtype: piece.start},
        )
        if piece.dtype.is_floating_point:
            fold = strategy.open(state)
            fill(state, fold, piece)
            state = strategy.close(state, fold)
        places.put(piece, state)

    def _fold(
        self,
        strategy: SumStrategy | AsynchronousStrategy,
        alone: Sequence[tuple[StoredUpdate, SealedFile | CodedFile]],
        regions: Sequence[_Region],
        state: ServerState,
        fold: WeightedSum,
        piece: Piece,
    ) -> None:
        """Fold a stretch of every update."""
        layout = self._stretches.layout_of(piece)
        for update, file in alone:
            fold.add(self._kept(update, stretch_of(update, file, piece, layout), piece))
        merge_partials(fold, (region.fold(strategy, state, piece, layout) for region in regions))

    def _kept(self, update: StoredUpdate, stretch: Update, piece: Piece) -> Update:
        """A stretch as the strategy keeps it: one that keeps models is shown the same stretch of the version that the
        site started from."""
        if not isinstance(self.strategy, AsynchronousStrategy) or self.strategy.keeps == "delta":
            return stretch
        theta = self.files.open(update.base).tensor(piece)
        return self.strategy.kept(NamedTensors(stretch.delta.layout, {piece.dtype: theta}), stretch)

    def digest(self, cluster: int = 0) -> str:
        """`NamedTensors.digest` of a cluster's model in the layout's own dtypes, read chunk by chunk."""
        base, sha = self.files.open(self.base), hashlib.sha256(self._layout.digest.encode())
        for piece in self.base_plan.pieces:
            if piece.channel == channel_of(cluster):
                sha.update(bytes_of(base.tensor(piece).to(piece.dtype)))
        return sha.hexdigest()


def frames_of(state: Mapping[str, Any]) -> set[str]:
    """The frames that a committed state names."""
    named = {state["base"], state["slots"], state.get("late", ""), state.get("down", {}).get("frame", "")}
    return named - {""}


@dataclass(frozen=True)
class _Region:
    """A region's sum, and what its sites said of the updates in it."""

    partial: StoredPartial
    updates: Sequence[StoredUpdate]
    file: SealedFile

    def fold(
        self, strategy: SumStrategy | AsynchronousStrategy, state: ServerState, piece: Piece, layout: Layout
    ) -> WeightedSum:
        """One stretch of the sum, as the fold that the relay made."""
        fold, pieces = strategy.open(state), self.partial.frame.plan.pieces
        for update in self.updates:
            fold.count(update)
        for channel, sums in fold.sums.items():
            for part in pieces.over(channel, piece.dtype, piece.start, piece.start + piece.numel):
                start = part.start - piece.start
                self.partial.read(self.file, part, sums.flats[piece.dtype][start : start + part.numel])
        return fold


class _Places:
    """Where stretches of θ and of the slots are read and written, whichever frame they are in."""

    def __init__(
        self, base: StoredFrame, slots: StoredFrame | None, new_base: FrameWriter, new_slots: FrameWriter | None
    ) -> None:
        self.base = base
        self.frames: dict[str, tuple[StoredFrame, FrameWriter]] = {}
        self._writers: dict[str, FrameWriter] = {}
        for frame, writer in ((base, new_base), (slots, new_slots)):
            for channel in writer.plan.channels if writer is not None else ():
                assert writer is not None
                self._writers[channel.name] = writer
                if frame is not None:
                    self.frames[channel.name] = frame, writer

    def read(self, channel: str, piece: Piece) -> Tensor:
        return self.frames[channel][0].elements(channel, piece.dtype, piece.start, piece.start + piece.numel)

    def put(self, piece: Piece, state: ServerState) -> None:
        """Write a strategy's state over the elements of a piece of θ."""
        self._put("theta", piece, state.theta.flats[piece.dtype])
        for name, slot in state.slots.items():
            self._put(name, piece, slot.flats[piece.dtype])

    def _put(self, channel: str, piece: Piece, values: Tensor) -> None:
        """Write the chunks of a channel that hold the elements of a piece of θ: a wide one's hold fewer each."""
        writer = self._writers[channel]
        for part in writer.plan.pieces.over(channel, piece.dtype, piece.start, piece.start + piece.numel):
            start = part.start - piece.start
            writer.write(part.index, bytes_of(values[start : start + part.numel]))


def stretch_of(update: StoredUpdate, file: SealedFile | CodedFile, piece: Piece, layout: Layout) -> Update:
    """One stretch of an update, decrypted and decoded."""
    assert update.frame is not None
    channels = {}
    if isinstance(file, CodedFile):
        for channel in update.coded_channels:
            values = file.read(channel, piece.dtype, piece.start, piece.start + piece.numel)
            channels[channel] = NamedTensors(layout, {piece.dtype: values})
    else:
        for channel, part in _parts(update.frame.plan, piece).items():
            values = torch.empty(part.numel, dtype=part.held)
            update.read(file, part, values)
            channels[channel] = NamedTensors(layout, {piece.dtype: values})
    return Update(
        update.site,
        update.round,
        channels,
        weight=update.weight,
        num_examples=update.num_examples,
        num_label_tokens=update.num_label_tokens,
        num_steps=update.num_steps,
        cluster=update.cluster,
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

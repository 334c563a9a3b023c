"""From tokens to batches: the order of examples, steps a round, micro-batches, packing.

Legend: B = sequences in a forward pass; T = positions of the longest of them; U = units in a forward pass: examples, or
groups of them, whose gradients are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.tokens import Tokens
from ..recipe.schema import TrainingSpec

Rows = list[list[int]]  # sequences, each the examples (one, or several packed) that it holds

_MICRO_BATCH_TOKENS = 1024  # on two cores' caches 768 to 1,536 tokens a pass were fastest; memory grows with it


@dataclass(frozen=True)
class Batch:
    """Sequences side by side, padded on the right.

    Padding is never seen by a real token (attention is causal) and never labelled, so no attention mask is needed.

    Args:
        ids: token ids, int64 [B, T].
        labelled: bool [B, T]; True where a token is to be predicted from those before it. Column 0 is False.
        examples: int64 [B, T]; which example of the site a token belongs to.
        positions: int64 [B, T], restarting with each packed example, or None where no sequence is packed.
    """

    ids: Tensor
    labelled: Tensor
    examples: Tensor
    positions: Tensor | None

    @property
    def num_label_tokens(self) -> int:
        return int(self.labelled.sum())


@dataclass(frozen=True)
class UnitBatch:
    """Sequences of some units, side by side.

    Args:
        pieces: (sequence, start, stop, unit) of each example: where its tokens are, and its unit's place among the
            batch's.
        weights: float64 [L]; what each label counts for in its unit's loss, the mean over its examples of each one's
            mean nats a label token.
        num_units: U.
        goes_on: the last unit has further examples in the next batch.
    """

    batch: Batch
    pieces: list[tuple[int, int, int, int]]
    weights: Tensor
    num_units: int
    goes_on: bool


def num_steps(spec: TrainingSpec, num_sequences: int) -> int:
    """Optimizer steps a round over a site's sequences, or over the units that private steps draw."""
    if spec.steps is not None:
        return spec.steps
    epochs = spec.epochs if spec.epochs is not None else 1.0
    passes = math.floor(epochs + 1e-9)  # each ends with a smaller batch, so a pass is a whole number of steps
    rest = math.ceil((epochs - passes) * num_sequences / spec.batch_size - 1e-9)
    return max(1, passes * math.ceil(num_sequences / spec.batch_size) + rest)


def sequences(tokens: Tokens, spec: TrainingSpec, seed: int) -> Rows:
    """The examples, one a sequence, or packed first-fit into sequences of at most `max_tokens` in a seeded order."""
    if not spec.packing:
        return [[i] for i in range(len(tokens))]
    lengths, order = tokens.lengths, np.random.default_rng(seed).permutation(len(tokens))
    rows: Rows = []
    room: list[int] = []
    for example in map(int, order):
        length = int(lengths[example])
        fit = next((k for k, free in enumerate(room) if free >= length), None)
        if fit is None:
            rows.append([example])
            room.append(spec.max_tokens - length)
        else:
            rows[fit].append(example)
            room[fit] -= length
    return rows


def order(rows: Rows, *, batch_size: int, steps: int, seed: int) -> Iterator[Rows]:
    """`steps` batches of sequences: pass after pass, each shuffled anew; a pass's last batch may be smaller."""
    generator = np.random.default_rng(seed)
    done = 0
    while True:
        shuffled = generator.permutation(len(rows))
        for start in range(0, len(rows), batch_size):
            if done == steps:
                return
            yield [rows[int(k)] for k in shuffled[start : start + batch_size]]
            done += 1


def micro_batches(tokens: Tokens, batch: Rows, size: int, device: torch.device) -> Iterator[Batch]:
    """Cut a batch into forward passes of at most `size` sequences, similar lengths together to save padding."""
    lengths = tokens.lengths
    by_length = sorted(batch, key=lambda row: (-sum(int(lengths[e]) for e in row), row))
    for start in range(0, len(by_length), size):
        yield collate(tokens, by_length[start : start + size], device)


def unit_batches(
    tokens: Tokens, units: Rows, size: int, device: torch.device, *, room: int = 0, most: int | None = None
) -> Iterator[UnitBatch]:
    """Cut units, each a number of examples, into forward passes of at most `size` sequences.

    A unit's examples follow each other, so that no more than one unit goes on from one pass to the next.

    Args:
        room: tokens of a sequence into which examples are packed, first-fit among those of the pass; 0: each example is
            a sequence, and similar lengths go together.
        most: examples in a pass.
    """
    lengths = tokens.lengths
    if not room:
        units = sorted(units, key=lambda unit: (-max(int(lengths[e]) for e in unit), unit))
    placed = [(number, example) for number, unit in enumerate(units) for example in unit]
    rows: Rows = []
    free: list[int] = []
    first = 0
    for place, (number, example) in enumerate(placed):
        length = int(lengths[example])
        fit = next((k for k, left in enumerate(free) if left >= length), None)
        if place - first == most or (fit is None and len(rows) == size):
            yield _unit_batch(tokens, units, placed[first:place], rows, device, goes_on=placed[place - 1][0] == number)
            rows, free, first, fit = [], [], place, None
        if fit is None:
            rows.append([example])
            free.append(room - length)
        else:
            rows[fit].append(example)
            free[fit] -= length
    if rows:
        yield _unit_batch(tokens, units, placed[first:], rows, device, goes_on=False)


def _unit_batch(
    tokens: Tokens, units: Rows, placed: list[tuple[int, int]], rows: Rows, device: torch.device, *, goes_on: bool
) -> UnitBatch:
    """Args:
    placed: (number of its unit, example) of all in these rows, in order.
    """
    number_of, first = {example: number for number, example in placed}, placed[0][0]
    pieces, weights = [], [np.zeros(0)]
    for b, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + int(tokens.lengths[example])
            pieces.append((b, start, stop, number_of[example] - first))
            labels = int(tokens.labelled_of(example).sum())
            weights.append(np.full(labels, 1.0 / len(units[number_of[example]]) / max(1, labels)))
            start = stop
    found = torch.from_numpy(np.concatenate(weights)).to(device)
    return UnitBatch(collate(tokens, rows, device), pieces, found, placed[-1][0] - first + 1, goes_on)


def micro_batch_size(spec: TrainingSpec, device: torch.device) -> int:
    """Sequences a forward pass; `auto` depends on the recipe and the kind of device only, never on its speed or
    size."""
    if spec.micro_batch_size != "auto":
        return spec.micro_batch_size
    if device.type != "cpu":
        return spec.batch_size
    at_most = max(1, _MICRO_BATCH_TOKENS // spec.max_tokens)
    return math.ceil(spec.batch_size / math.ceil(spec.batch_size / at_most))  # pieces of one size


def collate(tokens: Tokens, rows: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """Put sequences side by side."""
    lengths = tokens.lengths
    width = max(sum(int(lengths[e]) for e in row) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    labelled = np.zeros((len(rows), width), dtype=bool)
    examples = np.full((len(rows), width), -1, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + int(lengths[example])
            ids[b, start:stop] = tokens.ids_of(example)
            labelled[b, start:stop] = tokens.labelled_of(example)
            examples[b, start:stop] = example
            positions[b, start:stop] = np.arange(stop - start)
            start = stop
        positions[b, start:] = np.arange(width - start)
    packed = any(len(row) > 1 for row in rows)
    on_device = [torch.from_numpy(array).to(device) for array in (ids, labelled, examples, positions)]
    return Batch(on_device[0], on_device[1], on_device[2], on_device[3] if packed else None)

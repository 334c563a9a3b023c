"""A codec: a shortening, a rounding and a packing, of which each may be missing, over the tensors of an update.

    span ─► shorten ─► which, numbers ─► round ─► bytes ─► pack ─► payload

An update is coded span by span, so that neither end ever holds more of it than a span beside what it keeps anyway.
A payload, of a codec that shortens, is the length of its first part (4 bytes, little-endian), the part that says which
numbers were kept, and the numbers; of another, the numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..model.tensors import Entry, Layout
from ..recipe.problems import validate
from ..recipe.schema import NO_STAGE, STAGES, CodecSpec, CompressionSpec, Method
from ..recipe.source import Source
from ..registry import resolve
from .rounding import Plain
from .stage import BadPayload, Draw, Matrices, Packing, Rounding, Shortening, Stage

#: elements in a span
SPAN = 1 << 20
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Span:
    """A stretch of a flat that is coded by itself.

    Args:
        dtype: of the flat.
        start, numel: of the stretch, in elements.
        matrices: (rows, columns) of the tensors in it, in order; together `numel` elements.
    """

    dtype: torch.dtype
    start: int
    numel: int
    matrices: Matrices


def spans(layout: Layout, most: int = SPAN) -> Iterator[Span]:
    """The spans of a layout's floating tensors: whole tensors of at most `most` elements together, and parts of larger
    ones, cut between rows where a row is not longer than that."""
    for dtype, numel in layout.numels.items():
        if dtype.is_floating_point and numel:
            yield from _spans([entry for entry in layout.entries if entry.dtype == dtype], dtype, most)


def _spans(entries: Sequence[Entry], dtype: torch.dtype, most: int) -> Iterator[Span]:
    start = stop = entries[0].offset
    matrices: list[tuple[int, int]] = []
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if matrices and stop - start + entry.numel > most:
            yield Span(dtype, start, stop - start, tuple(matrices))
            start, matrices = stop, []
        if entry.numel > most:
            for rows, columns in _cut(*_matrix(entry), most):
                yield Span(dtype, start, rows * columns, ((rows, columns),))
                start += rows * columns
            stop = start
        elif entry.numel:
            matrices.append(_matrix(entry))
            stop += entry.numel
    if matrices:
        yield Span(dtype, start, stop - start, tuple(matrices))


def _matrix(entry: Entry) -> tuple[int, int]:
    if len(entry.shape) < 2:
        return entry.numel, 1
    return entry.shape[0], entry.numel // entry.shape[0] if entry.shape[0] else 0


def _cut(rows: int, columns: int, most: int) -> Iterator[tuple[int, int]]:
    if columns > most:
        rows, columns = rows * columns, 1
    step = most // columns
    for first in range(0, rows, step):
        yield min(step, rows - first), columns


class Codec:
    """Stages one after the other.

    Args:
        stages: at most one of each kind, in the order shortening, rounding, packing.
        unbiased: whether the mean of many codings is to be what was coded, where the stages can do that. Without it,
            single codings are as near as can be: right where error feedback sends later what was lost.

    Raises:
        RecipeError: two stages of a kind, or in another order.
    """

    def __init__(self, stages: Sequence[Stage], *, unbiased: bool = False) -> None:
        _check_order(stages)
        self.stages, self.unbiased = tuple(stages), unbiased
        self.shortening = next((stage for stage in stages if isinstance(stage, Shortening)), None)
        self.rounding = next((stage for stage in stages if isinstance(stage, Rounding)), Plain())
        self.packing = next((stage for stage in stages if isinstance(stage, Packing)), None)

    def encode(self, values: Tensor, matrices: Matrices, draw: Draw) -> bytes:
        """A span's payload.

        Args:
            values: 1-D, floating, on the CPU: finite.
        """
        values, which = values.float(), b""
        if self.shortening is not None:
            which, values = self.shortening.shorten(values, matrices, draw, unbiased=self.unbiased)
            which = self._packed(which)
            which = _LENGTH.pack(len(which)) + which
        return which + self._packed(self.rounding.encode(values, draw))

    def decode(self, payload: bytes, matrices: Matrices, draw: Draw) -> Tensor:
        """The span that a payload stands for: 1-D, float32, finite.

        Raises:
            BadPayload: it is not what this codec writes for such a span. What it holds is never larger than the span.
        """
        which, numel = b"", sum(rows * columns for rows, columns in matrices)
        if self.shortening is not None:
            if len(payload) < _LENGTH.size:
                raise BadPayload("a payload without its first part")
            cut = _LENGTH.size + _LENGTH.unpack_from(payload)[0]
            if cut > len(payload):
                raise BadPayload("a payload that is shorter than its first part")
            which = self._unpacked(payload[_LENGTH.size : cut], self.shortening.most(matrices))
            payload, numel = payload[cut:], self.shortening.count(matrices)
        size = self.rounding.num_bytes(numel)
        raw = self._unpacked(payload, size)
        if len(raw) != size:
            raise BadPayload(f"{len(raw)} bytes of numbers, {size} are needed")
        values = self.rounding.decode(raw, numel)
        return values if self.shortening is None else self.shortening.restore(which, values, matrices, draw)

    def most(self, matrices: Matrices) -> int:
        """The largest number of bytes that a span's payload may have."""
        numel = sum(rows * columns for rows, columns in matrices)
        if self.shortening is None:
            return self.rounding.num_bytes(numel) + self._overhead
        numbers = self.rounding.num_bytes(self.shortening.count(matrices))
        return _LENGTH.size + self.shortening.most(matrices) + numbers + 2 * self._overhead

    @cached_property
    def name(self) -> str:
        """Its stages, each with the options that are not as they are by default: `top-k keep=0.1, sign, huffman`."""
        return ", ".join(
            " ".join(
                [
                    stage.name,
                    *(f"{key}={value}" for key, value in stage.options.model_dump(exclude_defaults=True).items()),
                ]
            )
            for stage in self.stages
        )

    @cached_property
    def _overhead(self) -> int:
        return 0 if self.packing is None else 1

    def _packed(self, raw: bytes) -> bytes:
        return raw if self.packing is None else self.packing.pack(raw)

    def _unpacked(self, raw: bytes, most: int) -> bytes:
        if self.packing is not None:
            return self.packing.unpack(raw, most)
        if len(raw) > most:
            raise BadPayload(f"{len(raw)} bytes where at most {most} can be")
        return raw


def codec_of(spec: CodecSpec) -> Codec | None:
    """The codec of a recipe's own stages; None: it names none.

    Raises:
        RecipeError: a stage's options are wrong, or a class of somebody's own is no such stage.
    """
    if not spec.has_stages:
        return None
    stages = [_stage(kind, (*spec.loc, field), getattr(spec, field)) for field, kind in STAGES.items()]
    return Codec([stage for stage in stages if stage is not None], unbiased=spec.unbiased)


#: what `compression.budget_mb` chooses from
LADDER: tuple[dict[str, Any], ...] = (
    {"round": "bf16"},
    {"round": "int8"},
    {"round": {"name": "uniform", "bits": 6, "rounding": "nearest"}, "pack": "huffman"},
    {"round": {"name": "uniform", "bits": 4, "rounding": "nearest"}, "pack": "huffman"},
    {"round": {"name": "uniform", "bits": 3, "rounding": "nearest"}, "pack": "huffman"},
    {"round": {"name": "uniform", "bits": 2, "rounding": "nearest"}, "pack": "huffman"},
    {"round": "sign"},
    *(
        {"shorten": {"name": "top-k", "keep": keep}, "round": rounding, "pack": "huffman"}
        for keep in (0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
        for rounding in ("sign", {"name": "uniform", "bits": 4, "rounding": "nearest"})
    ),
)


def codecs_of(spec: CompressionSpec) -> list[Codec]:
    """The codecs by one of which each update is coded: that of the recipe's stages, or those among which its budget
    chooses; [] if it has neither.

    Raises:
        RecipeError: as `codec_of`.
    """
    if spec.budget_mb is None:
        codec = codec_of(spec)
        return [] if codec is None else [codec]
    feedback = {"error_feedback": spec.error_feedback}
    found = (codec_of(CompressionSpec.model_validate({**rung, **feedback})) for rung in LADDER)
    return [codec for codec in found if codec is not None]


def _stage(kind: str, loc: tuple[str, ...], method: Method) -> Stage | None:
    if method.name == NO_STAGE:
        return None
    found = resolve(kind, method.name)
    if not issubclass(found, _BY_KIND[kind]):
        raise RecipeError(
            f"{'.'.join(loc)}: {method.name!r} is no {kind}", hint=f"name a subclass of {_BY_KIND[kind].__name__}"
        )
    made: Stage = found(validate(found.Options, Source(method.options), loc))
    return made


_BY_KIND: dict[str, type[Stage]] = {"shortening": Shortening, "rounding": Rounding, "packing": Packing}
_KINDS = (Shortening, Rounding, Packing)


def _check_order(stages: Sequence[Stage]) -> None:
    kinds = [next(place for place, kind in enumerate(_KINDS) if isinstance(stage, kind)) for stage in stages]
    for one, other, first, second in zip(kinds, kinds[1:], stages, stages[1:], strict=False):
        if one >= other:
            raise RecipeError(
                f"compression: {second.name} cannot stand behind {first.name}",
                hint="at most one stage that leaves numbers out (top-k, random-k, low-rank), then one that rounds them "
                "(bf16, fp16, int8, uniform, nf4, sign), then huffman",
            )

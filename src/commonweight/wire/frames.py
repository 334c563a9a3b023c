"""Tensors as bytes: a typed header and a body that is cut into chunks, each named by its SHA-256.

    header  protobuf `FrameHeader`: names, dtypes, shapes, channels, chunk size, a digest for each chunk
    body    for each channel, for each dtype (in the order of first use by the sorted names): the flat's bytes

A chunk holds at most `chunk_bytes` and never crosses from one flat to the next, so that header and sizes alone say
where every byte lies: no offsets that could overlap, no holes. Values are little-endian. A frame is named by the
SHA-256 of its header, which covers the body through the chunks' digests. Nothing here is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import overload

import torch

from ..errors import ModelError
from ..model.tensors import Entry, Layout, NamedTensors, accumulator_dtype, bytes_of
from .decode import decode, fields, varint
from .protocol_pb2 import ChannelEntry, FrameHeader, TensorEntry
from .refusals import Refusal, Refused

VERSION = 1
CHUNK_BYTES = 4 << 20

#: dtypes that may travel; anything else in a header is refused
DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

if sys.byteorder != "little":
    raise ImportError("commonweight's frames are little-endian; this machine is not")


@dataclass(frozen=True)
class Limits:
    """Caps on what a header may declare, checked before anything of that size is allocated."""

    header_bytes: int = 16 << 20
    body_bytes: int = 1 << 42
    tensors: int = 1 << 16
    channels: int = 16
    name_bytes: int = 1024
    dimensions: int = 16
    min_chunk_bytes: int = 1 << 10
    max_chunk_bytes: int = 16 << 20


LIMITS = Limits()

NOTHING_KNOWN: Mapping[int, bytes] = MappingProxyType({})

#: what a tensor's entry may hold beside its name
_ENTRY_BYTES = 256
# a parameter's name in a module is an identifier with dots; printable ASCII leaves room for anyone's
_NAME = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Channel:
    """A group of tensors of the frame's layout; `wide`: floating dtypes narrower than float32 are held in float32."""

    name: str
    wide: bool = False


@dataclass(frozen=True)
class Piece:
    """One chunk's place: `numel` elements from `start` of a channel's flat of the layout's `dtype`, held as `held`."""

    index: int
    channel: str
    dtype: torch.dtype
    held: torch.dtype
    start: int
    numel: int

    @property
    def num_bytes(self) -> int:
        return self.numel * self.held.itemsize


@dataclass(frozen=True)
class Plan:
    """How tensors of a layout are cut into chunks."""

    layout: Layout
    channels: tuple[Channel, ...]
    chunk_bytes: int = CHUNK_BYTES

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self)

    def held_as(self, channel: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a channel holds what is of `dtype` in the layout."""
        wide = next(known.wide for known in self.channels if known.name == channel)
        return accumulator_dtype(dtype) if wide else dtype

    @property
    def num_chunks(self) -> int:
        return len(self.pieces)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the body."""
        return sum(run.numel * run.held.itemsize for run in self.pieces.runs)


@dataclass(frozen=True)
class _Run:
    """The chunks of one flat: the first has index `first`, each but the last holds `step` elements."""

    first: int
    channel: str
    dtype: torch.dtype
    held: torch.dtype
    step: int
    numel: int

    def piece(self, index: int) -> Piece:
        start = (index - self.first) * self.step
        return Piece(index, self.channel, self.dtype, self.held, start, min(self.step, self.numel - start))


class Pieces(Sequence[Piece]):
    """A plan's chunks in order. Worked out when asked for: a header may declare half a million."""

    def __init__(self, plan: Plan) -> None:
        self.runs: list[_Run] = []
        self._len = 0
        for channel in plan.channels:
            for dtype, numel in plan.layout.numels.items():
                held = plan.held_as(channel.name, dtype)
                step = plan.chunk_bytes // held.itemsize
                if numel:
                    self.runs.append(_Run(self._len, channel.name, dtype, held, step, numel))
                    self._len += -(-numel // step)
        self._firsts = [run.first for run in self.runs]

    def __len__(self) -> int:
        return self._len

    @overload
    def __getitem__(self, index: int) -> Piece: ...

    @overload
    def __getitem__(self, index: slice) -> list[Piece]: ...

    def __getitem__(self, index: int | slice) -> Piece | list[Piece]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(self._len))]
        place = index + self._len if index < 0 else index
        if not 0 <= place < self._len:
            raise IndexError(f"chunk {index} of {self._len}")
        return self.runs[bisect_right(self._firsts, place) - 1].piece(place)

    def over(self, channel: str, dtype: torch.dtype, start: int, stop: int) -> list[Piece]:
        """The chunks that hold elements `start` … `stop` of one flat, in order."""
        run = next(run for run in self.runs if (run.channel, run.dtype) == (channel, dtype))
        return [run.piece(run.first + place) for place in range(start // run.step, -(-stop // run.step))]

    def __iter__(self) -> Iterator[Piece]:
        for number, run in enumerate(self.runs):
            stop = self._firsts[number + 1] if number + 1 < len(self.runs) else self._len
            for index in range(run.first, stop):
                yield run.piece(index)


class Digests(Sequence[bytes]):
    """SHA-256 digests, one a chunk, over the 32·n bytes in which they travel."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    @classmethod
    def of(cls, digests: Iterable[bytes]) -> Digests:
        return digests if isinstance(digests, Digests) else cls(b"".join(digests))

    def __len__(self) -> int:
        return len(self.raw) // 32

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"digest {index} of {len(self)}")
        return self.raw[32 * place : 32 * place + 32]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digests) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)


@dataclass(frozen=True)
class Frame:
    """A frame without its body: where every byte belongs, and the digest of each chunk (32 bytes)."""

    plan: Plan
    digests: Sequence[bytes]

    def __post_init__(self) -> None:
        object.__setattr__(self, "digests", Digests.of(self.digests))

    @cached_property
    def header(self) -> bytes:
        """The header as it travels."""
        return b"".join(_encoded(self))

    @cached_property
    def digest(self) -> str:
        """The frame's name, in hex."""
        return header_digest(self.header)


def _encoded(frame: Frame) -> Iterator[bytes]:
    """A header bit by bit. Protobuf messages laid end to end are one message with the fields of all."""
    yield _bytes(FrameHeader(version=VERSION, chunk_bytes=frame.plan.chunk_bytes))
    for entry in frame.plan.layout.entries:
        yield _bytes(FrameHeader(tensors=[TensorEntry(name=entry.name, dtype=_NAMES[entry.dtype], shape=entry.shape)]))
    for channel in frame.plan.channels:
        yield _bytes(FrameHeader(channels=[ChannelEntry(name=channel.name, wide=channel.wide)]))
    raw = Digests.of(frame.digests).raw
    if raw:  # megabytes in a large frame, so without the copies that protobuf would make of them
        yield varint(FrameHeader.DIGESTS_FIELD_NUMBER << 3 | 2) + varint(len(raw))
        yield raw


def _bytes(message: FrameHeader) -> bytes:
    return message.SerializeToString(deterministic=True)


def header_digest(header: bytes) -> str:
    """The name of the frame with this header, in hex."""
    return hashlib.sha256(header).hexdigest()


def chunk_digest(chunk: bytes | memoryview) -> bytes:
    return hashlib.sha256(chunk).digest()


def plan_for(layout: Layout, channels: tuple[Channel, ...], chunk_bytes: int = CHUNK_BYTES) -> Plan:
    """A plan for tensors that this process holds.

    Raises:
        ModelError: a dtype or a name that cannot travel, named.
    """
    for entry in layout.entries:
        if not _is_name(entry.name, LIMITS):
            raise ModelError(
                f"a tensor is named {entry.name[:80]!a}, which cannot be sent",
                hint=f"names are 1 to {LIMITS.name_bytes} printable ASCII characters without spaces",
            )
        if entry.dtype not in _NAMES:
            raise ModelError(
                f"tensor {entry.name!r} is {entry.dtype}, which cannot be sent", hint=f"known: {', '.join(DTYPES)}"
            )
    return Plan(layout, channels, chunk_bytes)


def piece_of(tensors: Mapping[str, NamedTensors], piece: Piece) -> memoryview:
    """One chunk's bytes, without a copy (tensors in the CPU's memory)."""
    flat = tensors[piece.channel].flats[piece.dtype]
    return bytes_of(flat[piece.start : piece.start + piece.numel])


def frame_of(tensors: Mapping[str, NamedTensors], plan: Plan, known: Mapping[int, bytes] = NOTHING_KNOWN) -> Frame:
    """The frame of tensors in memory: one pass of hashing, nothing copied.

    Args:
        known: digests of chunks that were hashed before, by index.
    """
    digests = (known.get(piece.index) or chunk_digest(piece_of(tensors, piece)) for piece in plan.pieces)
    return Frame(plan, Digests.of(digests))


def pack_chunk(index: int, chunk: bytes | memoryview) -> bytes:
    """A chunk as `Push` sends it: its index, 4 bytes, big-endian, before it."""
    return b"".join((index.to_bytes(4, "big"), chunk))


def unpack_chunk(message: bytes) -> tuple[int, memoryview]:
    """(index, chunk) of a message of `Push`, without a copy; `manifest.check_chunk` says whether they are right.

    Raises:
        Refused (malformed): it is too short to hold an index.
    """
    if len(message) < 4:
        raise _malformed("a chunk without its index")
    return int.from_bytes(message[:4], "big"), memoryview(message)[4:]


def parse_header(header: bytes, limits: Limits = LIMITS) -> Frame:
    """Read a header that came from elsewhere. Time and memory are bounded by its own size, whatever it declares.

    Raises:
        Refused (malformed, too-large): it is no header of this version, or it declares more than `limits` allow,
            unknown fields or dtypes, unsorted or doubled names, or another number of digests than it has chunks.
    """
    if len(header) > limits.header_bytes:
        raise _too_large("a frame's header", len(header), limits.header_bytes)
    parts = _Parts.of(header, limits)
    if parts.version != VERSION:
        raise _malformed(f"a frame of version {parts.version}; this program reads version {VERSION}")
    if not limits.min_chunk_bytes <= parts.chunk_bytes <= limits.max_chunk_bytes or parts.chunk_bytes % 8:
        raise _malformed(f"a frame with chunks of {parts.chunk_bytes} bytes")
    plan = Plan(Layout(tuple(parts.entries)), _channels(parts.channels, limits), parts.chunk_bytes)
    if plan.num_bytes > limits.body_bytes:
        raise _too_large("a frame's body", plan.num_bytes, limits.body_bytes)
    if len(parts.digests) != 32 * plan.num_chunks:
        raise _malformed(f"a frame of {plan.num_chunks} chunks with {len(parts.digests)} bytes of digests")
    frame = Frame(plan, Digests(bytes(parts.digests)))
    if not _is_encoding_of(header, frame):
        raise _malformed("a frame's header is not in its one canonical form")
    return frame


class _Parts:
    """What the fields of a header say, each checked as it is read, so that nothing large is ever built of a bad one."""

    def __init__(self) -> None:
        self.version = self.chunk_bytes = 0
        self.entries: list[Entry] = []
        self.channels: list[Channel] = []
        self.digests: memoryview = memoryview(b"")
        self._used: dict[torch.dtype, int] = {}

    @classmethod
    def of(cls, header: bytes, limits: Limits) -> _Parts:
        parts, left = cls(), limits.tensors + limits.channels + 3
        try:
            for number, _, value in fields(memoryview(header)):
                left -= 1
                if left < 0:
                    raise _too_large("the number of tensors or channels", len(parts.entries), limits.tensors)
                parts._take(number, value, limits)
        except ValueError as error:
            raise _malformed(f"a frame's header cannot be read: {error}") from error
        return parts

    def _take(self, number: int, value: int | memoryview, limits: Limits) -> None:
        match number, value:
            case 1, int():
                self.version = value
            case 2, int():
                self.chunk_bytes = value
            case 3, memoryview():
                self._take_tensor(value, limits)
            case 4, memoryview() if len(value) <= limits.name_bytes + _ENTRY_BYTES:
                if len(self.channels) == limits.channels:
                    raise _too_large("the number of channels", limits.channels + 1, limits.channels)
                channel = decode(ChannelEntry, bytes(value))
                self.channels.append(Channel(channel.name, channel.wide))
            case 5, memoryview():
                self.digests = value
            case _:
                raise _malformed(f"a frame's header has a field {number} that this version does not know")

    def _take_tensor(self, value: memoryview, limits: Limits) -> None:
        if len(value) > limits.name_bytes + _ENTRY_BYTES:
            raise _malformed("a tensor's entry is too long")
        if len(self.entries) == limits.tensors:
            raise _too_large("the number of tensors", limits.tensors + 1, limits.tensors)
        tensor = decode(TensorEntry, bytes(value))
        name = tensor.name
        if not _is_name(name, limits):
            raise _malformed(f"a tensor is named {_told(name)}")
        if self.entries and name <= self.entries[-1].name:
            raise _malformed(f"the tensors' names are not in order at {_told(name)}")
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            raise _malformed(f"tensor {_told(name)} has dtype {_told(tensor.dtype)}")
        shape = tuple(tensor.shape)
        if len(shape) > limits.dimensions:
            raise _malformed(f"tensor {_told(name)} has {len(shape)} dimensions")
        # with zeros taken as ones: strides are counted even over no elements, and must not overflow
        span = math.prod(size or 1 for size in shape) * dtype.itemsize
        if span > limits.body_bytes:
            raise _too_large(f"tensor {_told(name)}", span, limits.body_bytes)
        offset, numel = self._used.get(dtype, 0), math.prod(shape)
        self.entries.append(Entry(name, dtype, shape, offset, numel))
        self._used[dtype] = offset + numel


def _channels(channels: list[Channel], limits: Limits) -> tuple[Channel, ...]:
    names = [channel.name for channel in channels]
    if not names or len(set(names)) != len(names) or not all(_is_name(name, limits) for name in names):
        raise _malformed("a frame without channels, or with a channel whose name is doubled or cannot be one")
    return tuple(channels)


def _is_name(name: str, limits: Limits) -> bool:
    return len(name) <= limits.name_bytes and _NAME.fullmatch(name) is not None


def _is_encoding_of(header: bytes, frame: Frame) -> bool:
    at = 0
    for part in _encoded(frame):
        if not header.startswith(part, at):
            return False
        at += len(part)
    return at == len(header)


def _told(text: str) -> str:
    return ascii(text[:80])


def _malformed(message: str) -> Refused:
    return Refused(Refusal.MALFORMED, message)


def _too_large(what: str, size: int, limit: int) -> Refused:
    return Refused(Refusal.TOO_LARGE, f"{what} is {size:,}, more than the {limit:,} that are allowed")

"""Tensors as bytes: a typed header and a body that is cut into chunks, each named by its SHA-256.

    header  protobuf `FrameHeader`: names, dtypes, shapes, channels, chunk size, a digest for each chunk
    body    for each channel, for each dtype (in the order of first use by the sorted names): the flat's bytes

A chunk holds at most `chunk_bytes` and never crosses from one flat to the next, so that header and sizes alone say where
every byte lies: no offsets that could overlap, no holes. Values are little-endian. A frame is named by the SHA-256 of
its header, which covers the body through the chunks' digests. Nothing here is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from google.protobuf.message import DecodeError

from ..errors import ModelError
from ..model.tensors import Entry, Layout, NamedTensors, accumulator_dtype, bytes_of
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
    tensors: int = 1 << 20
    channels: int = 16
    name_bytes: int = 1024
    dimensions: int = 16
    min_chunk_bytes: int = 1 << 10
    max_chunk_bytes: int = 16 << 20


LIMITS = Limits()


@dataclass(frozen=True)
class Channel:
    """A group of tensors of the frame's layout; `wide`: floating dtypes narrower than float32 are held in float32."""

    name: str
    wide: bool = False


@dataclass(frozen=True)
class Piece:
    """One chunk's place: `numel` elements from `start` of a channel's flat of `dtype` (the layout's), held as `held`."""

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
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        index = 0
        for channel in self.channels:
            for dtype, numel in self.layout.numels.items():
                held = accumulator_dtype(dtype) if channel.wide else dtype
                step = self.chunk_bytes // held.itemsize
                for start in range(0, numel, step):
                    yield Piece(index, channel.name, dtype, held, start, min(step, numel - start))
                    index += 1

    @cached_property
    def num_chunks(self) -> int:
        return sum(
            -(-numel // (self.chunk_bytes // held.itemsize)) for _, _, held, numel in self._flats()
        )

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the body."""
        return sum(numel * held.itemsize for _, _, held, numel in self._flats())

    def _flats(self) -> Iterator[tuple[Channel, torch.dtype, torch.dtype, int]]:
        for channel in self.channels:
            for dtype, numel in self.layout.numels.items():
                yield channel, dtype, accumulator_dtype(dtype) if channel.wide else dtype, numel


@dataclass(frozen=True)
class Frame:
    """A frame without its body: where every byte belongs, and the digest of each chunk (32 bytes)."""

    plan: Plan
    digests: tuple[bytes, ...]

    @cached_property
    def header(self) -> bytes:
        """The header as it travels."""
        message = FrameHeader(
            version=VERSION,
            chunk_bytes=self.plan.chunk_bytes,
            tensors=[TensorEntry(name=e.name, dtype=_NAMES[e.dtype], shape=e.shape) for e in self.plan.layout.entries],
            channels=[ChannelEntry(name=c.name, wide=c.wide) for c in self.plan.channels],
            digests=b"".join(self.digests),
        )
        return message.SerializeToString(deterministic=True)

    @cached_property
    def digest(self) -> str:
        """The frame's name, in hex."""
        return header_digest(self.header)


def header_digest(header: bytes) -> str:
    """The name of the frame with this header, in hex."""
    return hashlib.sha256(header).hexdigest()


def chunk_digest(chunk: bytes | memoryview) -> bytes:
    return hashlib.sha256(chunk).digest()


def plan_for(layout: Layout, channels: tuple[Channel, ...], chunk_bytes: int = CHUNK_BYTES) -> Plan:
    """A plan for tensors that this process holds.

    Raises:
        ModelError: a dtype that cannot travel, named.
    """
    for entry in layout.entries:
        if entry.dtype not in _NAMES:
            raise ModelError(
                f"tensor {entry.name!r} is {entry.dtype}, which cannot be sent", hint=f"known: {', '.join(DTYPES)}"
            )
    return Plan(layout, channels, chunk_bytes)


def piece_of(tensors: Mapping[str, NamedTensors], piece: Piece) -> memoryview:
    """One chunk's bytes, without a copy (tensors in the CPU's memory)."""
    flat = tensors[piece.channel].flats[piece.dtype]
    return bytes_of(flat[piece.start : piece.start + piece.numel])


def frame_of(tensors: Mapping[str, NamedTensors], plan: Plan) -> Frame:
    """The frame of tensors in memory: one pass of hashing, nothing copied."""
    return Frame(plan, tuple(chunk_digest(piece_of(tensors, piece)) for piece in plan.pieces))


def parse_header(header: bytes, limits: Limits = LIMITS) -> Frame:
    """Read a header that came from elsewhere.

    Raises:
        Refused (malformed, too-large): it is no header of this version, or it declares more than `limits` allow,
            unknown dtypes, unsorted or doubled names, or another number of digests than it has chunks.
    """
    if len(header) > limits.header_bytes:
        raise _too_large("a frame's header", len(header), limits.header_bytes)
    message = FrameHeader()
    try:
        message.ParseFromString(header)
    except DecodeError as error:
        raise _malformed("a frame's header cannot be read") from error
    if message.version != VERSION:
        raise _malformed(f"a frame of version {message.version}; this program reads version {VERSION}")
    if not limits.min_chunk_bytes <= message.chunk_bytes <= limits.max_chunk_bytes or message.chunk_bytes % 8:
        raise _malformed(f"a frame with chunks of {message.chunk_bytes} bytes")
    if len(message.tensors) > limits.tensors or len(message.channels) > limits.channels:
        raise _too_large("the number of tensors or channels", len(message.tensors), limits.tensors)
    plan = Plan(_layout(message, limits), _channels(message, limits), message.chunk_bytes)
    if plan.num_bytes > limits.body_bytes:
        raise _too_large("a frame's body", plan.num_bytes, limits.body_bytes)
    if len(message.digests) != 32 * plan.num_chunks:
        raise _malformed(f"a frame of {plan.num_chunks} chunks with {len(message.digests)} bytes of digests")
    frame = Frame(plan, tuple(message.digests[k : k + 32] for k in range(0, len(message.digests), 32)))
    if frame.header != header:
        raise _malformed("a frame's header is not in its one canonical form")
    return frame


def _layout(message: FrameHeader, limits: Limits) -> Layout:
    used: dict[torch.dtype, int] = {}
    entries: list[Entry] = []
    before = None
    for tensor in message.tensors:
        if not tensor.name or len(tensor.name.encode()) > limits.name_bytes:
            raise _malformed("a tensor's name is empty or too long")
        if before is not None and tensor.name <= before:
            raise _malformed(f"the tensors' names are not in order at {tensor.name[:80]!r}")
        before = tensor.name
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            raise _malformed(f"tensor {tensor.name[:80]!r} has dtype {tensor.dtype[:40]!r}")
        if len(tensor.shape) > limits.dimensions:
            raise _malformed(f"tensor {tensor.name[:80]!r} has {len(tensor.shape)} dimensions")
        numel = math.prod(tensor.shape)
        if numel * dtype.itemsize > limits.body_bytes:
            raise _too_large(f"tensor {tensor.name[:80]!r}", numel * dtype.itemsize, limits.body_bytes)
        offset = used.get(dtype, 0)
        entries.append(Entry(tensor.name, dtype, tuple(tensor.shape), offset, numel))
        used[dtype] = offset + numel
    return Layout(tuple(entries))


def _channels(message: FrameHeader, limits: Limits) -> tuple[Channel, ...]:
    names = [channel.name for channel in message.channels]
    if not names or len(set(names)) != len(names) or any(not n or len(n.encode()) > limits.name_bytes for n in names):
        raise _malformed("a frame without channels, or with an empty, long or doubled channel name")
    return tuple(Channel(channel.name, channel.wide) for channel in message.channels)


def _malformed(message: str) -> Refused:
    return Refused(Refusal.MALFORMED, message)


def _too_large(what: str, size: int, limit: int) -> Refused:
    return Refused(Refusal.TOO_LARGE, f"{what} is {size:,}, more than the {limit:,} that are allowed")

"""Control messages from bytes, within bounds: a hostile message may cost time and memory for its own size, not more.

Protobuf turns two bytes into a message of its own, a thousand times over; so the fields of a large message are counted
before it is parsed. Fields that this program does not know are ignored, as protobuf has it, except where `strict` says
otherwise: in what is signed, something that is not understood must not be waved through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from .refusals import Refusal, Refused

MAX_FIELDS = 1 << 16

#: below this size any content is cheap to parse
_SMALL = 4096

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
_WIRE = {  # of everything else: _VARINT
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_STRING: _BYTES,
    FieldDescriptor.TYPE_BYTES: _BYTES,
    FieldDescriptor.TYPE_MESSAGE: _BYTES,
}
#: bytes of packed numbers that count as one field
_PACKED = 32

M = TypeVar("M", bound=Message)


def decode(kind: type[M], raw: bytes, *, max_fields: int = MAX_FIELDS, strict: bool = False) -> M:
    """A message of one kind.

    Args:
        max_fields: how many fields it may have, those of the messages within included.
        strict: refuse fields that this program does not know, and fields that are said twice.

    Raises:
        Refused (malformed): it cannot be read. (too-large): it has too many fields.
    """
    name = kind.__name__
    if strict or len(raw) > _SMALL:
        try:
            _count(cast(Descriptor, kind.DESCRIPTOR), memoryview(raw), max_fields, strict)
        except ValueError as error:
            raise Refused(Refusal.MALFORMED, f"a {name} that cannot be read: {error}") from error
    message = kind()
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise Refused(Refusal.MALFORMED, f"a {name} that cannot be read") from error
    return message


def fields(raw: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """(number, wire type, value) of each field; of fixed-width ones the bytes.

    Raises:
        ValueError: it is no protobuf message.
    """
    at, end = 0, len(raw)
    while at < end:
        tag, at = _varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"field number {number}")
        if wire == _VARINT:
            value, at = _varint(raw, at)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(raw, at)
        elif wire in _WIDTHS:
            size = _WIDTHS[wire]
        else:
            raise ValueError(f"wire type {wire}")
        if size > end - at:
            raise ValueError("it ends early")
        yield number, wire, raw[at : at + size]
        at += size


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        if at >= len(raw):
            raise ValueError("it ends early")
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise ValueError("a number of more than 64 bits")


def _count(descriptor: Descriptor, raw: memoryview, left: int, strict: bool) -> int:
    """How many of the `left` fields that are allowed remain after this message."""
    known, said = descriptor.fields_by_number, set[int]()
    for number, wire, value in fields(raw):
        left -= 1
        field: FieldDescriptor | None = known.get(number)
        expected = None if field is None else _WIRE.get(field.type, _VARINT)
        packed = field is not None and field.is_repeated and expected != _BYTES == wire
        if strict and expected != wire and not packed:
            raise ValueError(f"it has a field {number} that this version does not know")
        if strict and field is not None and not field.is_repeated:
            if number in said:
                raise ValueError(f"it says {field.name} twice")
            said.add(number)
        if isinstance(value, memoryview):
            if packed:
                left -= len(value) // _PACKED
            elif wire == _BYTES and field is not None and field.message_type is not None:
                left = _count(field.message_type, value, left, strict)
        if left < 0:
            raise Refused(Refusal.TOO_LARGE, f"a {descriptor.name} with too many fields")
    return left

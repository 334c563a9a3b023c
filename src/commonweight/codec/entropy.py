"""What is left, without redundancy."""

from __future__ import annotations

import zlib

from .stage import BadPayload, Packing

_AS_IT_IS, _PACKED = b"\0", b"\1"


class Huffman(Packing):
    """Deflate without its search for repetitions: codes as short as the bytes are frequent. What would grow stays as it
    is, behind one byte that says so."""

    name, rule = "huffman", "bytes to Huffman codes, without loss"
    source = "zlib, Z_HUFFMAN_ONLY"

    def pack(self, raw: bytes) -> bytes:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        packed = packer.compress(raw) + packer.flush()
        return _PACKED + packed if len(packed) < len(raw) else _AS_IT_IS + raw

    def unpack(self, packed: bytes, most: int) -> bytes:
        head, rest = packed[:1], packed[1:]
        if head == _AS_IT_IS and len(rest) <= most:
            return rest
        if head != _PACKED:
            raise BadPayload("a packed part that is empty, too long, or of no known kind")
        unpacker = zlib.decompressobj(-15)
        try:
            raw = unpacker.decompress(rest, most + 1)
        except zlib.error as error:
            raise BadPayload(f"a packed part that is damaged: {error}") from error
        if len(raw) > most or not unpacker.eof or unpacker.unused_data or unpacker.unconsumed_tail:
            raise BadPayload("a packed part that is cut off, or longer than it may be")
        return raw

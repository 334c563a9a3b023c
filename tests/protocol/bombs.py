"""Messages of full size that are made to cost time and memory; run as a program it prints what each of them costs.

The program is a process of its own so that the process's own peak can be read, which protobuf's memory is part of.
"""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.decode import decode, varint
from commonweight.wire.frames import LIMITS, parse_header
from commonweight.wire.manifest import parse_manifest
from commonweight.wire.messages import JSON_BYTES, check_site_message, parse_job, parse_json
from commonweight.wire.refusals import Refused
from commonweight.wire.service import MAX_MESSAGE_BYTES
from tests.protocol.fuzzing import encoded, job, manifest

SIZE = LIMITS.header_bytes


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


START = encoded(pb.FrameHeader(version=1, chunk_bytes=1024))
CHANNEL = encoded(pb.FrameHeader(channels=[pb.ChannelEntry(name="delta")]))


def tensors(count: int, shape: list[int], name_bytes: int = 8) -> bytes:
    entries = (
        encoded(pb.FrameHeader(tensors=[pb.TensorEntry(name=f"{n:0{name_bytes}}", dtype="int8", shape=shape)]))
        for n in range(count)
    )
    return b"".join(entries)


def headers() -> Iterator[tuple[str, bytes]]:
    yield "tensors without content", START + field(3, b"") * ((SIZE - 20) // 2)
    yield "channels without content", START + field(4, b"") * ((SIZE - 20) // 2)
    yield "digests without content", START + field(5, b"") * ((SIZE - 20) // 2)
    yield "versions", b"\x08\x01" * (SIZE // 2)
    yield "a tensor of 16 million dimensions", START + field(3, field(1, b"a") + field(3, b"\1" * (SIZE - 50)))
    yield (
        "a tensor of 8 million dimensions, one by one",
        START + field(3, field(1, b"a") + b"\x18\1" * (SIZE // 2 - 50)),
    )
    yield "a name of 16 MiB", START + field(3, field(1, b"a" * (SIZE - 50)))
    yield "groups in groups", START + b"\x0b" * (SIZE - 20)
    yield "an unknown field of 16 MiB", START + field(9, bytes(SIZE - 50))
    yield "more tensors than are allowed", START + tensors(LIMITS.tensors + 1, [1] * 12 + [1000] * 4)
    yield "long names", START + tensors(SIZE // 1060, [0], 1024) + CHANNEL
    yield "as many chunks as fit", _full()
    yield "10¹² chunks", START + tensors(1, [1 << 42]) + CHANNEL
    yield "10¹⁸ elements and none", START + tensors(1, [0, 1 << 60]) + CHANNEL


def _full() -> bytes:
    chunks = (SIZE - 200) // 32
    return START + tensors(1, [chunks * 1024]) + CHANNEL + field(5, bytes(32 * chunks))


def metrics(count: int) -> bytes:
    return b"".join(field(10, field(1, f"{n:05}".encode()) + b"\x11" + bytes(8)) for n in range(count))


def bombs() -> Iterator[tuple[str, Callable[[bytes], object], bytes]]:
    for name, raw in headers():
        yield f"header: {name}", parse_header, raw
    small = encoded(manifest(START + CHANNEL))
    yield "manifest: metrics", _manifest, small + metrics(20_000)
    yield "manifest: metrics without content", _manifest, small + field(10, b"") * (SIZE // 2)
    yield "manifest: a policy of 16 MiB", _manifest, small + field(11, b"a" * SIZE)
    yield "manifest: the largest header", _manifest, encoded(manifest(_full()))
    small = encoded(job(START + CHANNEL))
    yield "job: sites", _job, small + field(6, b"") * (SIZE // 2)
    yield "job: things that must match", _job, small + field(7, b"") * (SIZE // 2)
    yield "job: a recipe of 17 MiB", _job, small + field(3, b"a" * (17 << 20))
    full = MAX_MESSAGE_BYTES // 2 - 10
    yield "site: progress", _site, field(2, field(1, b"") * full)
    yield "site: tasks in hand", _site, field(1, field(4, b"") * full)
    yield "site: hellos", _site, field(1, b"") * full
    yield "status: missing chunks", _status, field(3, b"\1" * 2 * full)
    yield "json: lists in lists", parse_json, b"[" * JSON_BYTES
    yield "json: empty lists", parse_json, b'{"a": [' + b"[]," * (JSON_BYTES // 3 - 4)
    yield "json: numbers", parse_json, b'{"a": [' + b"1," * (JSON_BYTES // 2 - 5) + b"1]}"
    yield "json: a long number", parse_json, b'{"a": ' + b"1" * (JSON_BYTES - 10) + b"}"
    yield "json: names", parse_json, b"{" + b'"":1,' * (JSON_BYTES // 5 - 2) + b'"":1}'


def _manifest(raw: bytes) -> object:
    return parse_manifest(pb.SignedManifest(manifest=raw))


def _job(raw: bytes) -> object:
    return parse_job(pb.SignedJob(job=raw))


def _site(raw: bytes) -> None:
    check_site_message(decode(pb.SiteMessage, raw))


def _status(raw: bytes) -> object:
    return decode(pb.UploadStatus, raw)


def _resident(key: str) -> int:
    """This process's memory in bytes, now (`VmRSS`) or at its most since it was reset (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def main() -> None:
    """A line for each bomb: what became of it, Python's own peak, and the growth of the whole process."""
    for name, call, raw in bombs():
        costs: list[int] = []
        for traced in (False, True):
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
            if traced:
                tracemalloc.start()
            try:
                kept: object = call(raw)
                outcome = "passed"
            except Refused as refused:
                kept, outcome = None, str(refused.code)
            costs.append(tracemalloc.get_traced_memory()[1] if traced else _resident("VmHWM") - before)
            tracemalloc.stop()
            del kept
        print(json.dumps({"name": name, "outcome": outcome, "process": costs[0], "python": costs[1]}), flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Broken messages, and what must become of them: each is refused by type, or is what its own encoding says it is.

Used by `test_fuzz.py` for a fixed number of cases, and by `scripts/fuzz.py` for as long as one likes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

import torch
from google.protobuf.message import Message

from commonweight.model.tensors import Layout, NamedTensors
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.decode import decode, fields, varint
from commonweight.wire.frames import (
    Channel,
    Frame,
    frame_of,
    pack_chunk,
    parse_header,
    piece_of,
    plan_for,
    unpack_chunk,
)
from commonweight.wire.manifest import ParsedManifest, check_chunk, check_frame, first_bad, parse_manifest
from commonweight.wire.messages import check_coordinator_message, check_site_message, parse_job, parse_json
from commonweight.wire.refusals import Refusal, Refused
from commonweight.wire.service import CONTROL, ENROLMENT, FEDERATION, TRANSFER

DIGEST = "0123456789abcdef" * 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)
#: numbers at which something may overflow or wrap around
_POWERS = [(1 << k) + d for k in (31, 32, 42, 63) for d in (-1, 0, 1)]
EDGES = (0, 1, 7, 8, 31, 32, 127, 128, 255, 1 << 10, 1 << 14, 1 << 24, *_POWERS, (1 << 64) - 1)


# ---- what is right


def tensors_of(draw: Random, num_tensors: int) -> NamedTensors:
    """Tensors of mixed dtypes: scalars, empty ones, and some that need several chunks."""
    made = {}
    for number in range(num_tensors):
        shape = [draw.choice((0, 1, 2, 3, 5, 40)) for _ in range(draw.randint(0, 3))]
        made[f"model.layers.{number}.{draw.choice('qkv')}_proj.lora_A.weight"] = torch.empty(
            shape, dtype=draw.choice(DTYPES)
        )
    values = NamedTensors.zeros(Layout.of(made))
    for flat in values.flats.values():
        flat.copy_(torch.tensor([draw.randint(0, 63) for _ in range(flat.numel())]))
    return values


@dataclass(frozen=True)
class Sent:
    """A frame with its chunks."""

    frame: Frame
    chunks: tuple[bytes, ...]


@cache
def sent_frames() -> tuple[Sent, ...]:
    draw, sent = Random(0), []
    for num_tensors in (0, 1, 3, 9):
        theta = tensors_of(draw, num_tensors)
        for channels in ((Channel("delta"),), (Channel("theta"), Channel("m", wide=True))):
            plan = plan_for(theta.layout, channels, 1024)
            held = {}
            for channel in channels:
                held[channel.name] = NamedTensors.zeros(theta.layout, wide=channel.wide)
                for dtype, flat in held[channel.name].flats.items():
                    flat.copy_(theta.flats[dtype])
            frame = frame_of(held, plan)
            sent.append(Sent(frame, tuple(bytes(piece_of(held, piece)) for piece in plan.pieces)))
    return tuple(sent)


def encoded(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def manifest(header: bytes) -> pb.Manifest:
    return pb.Manifest(
        run="a1b2c3",
        round=7,
        task="4f5e6d",
        site="north-clinic",
        base=DIGEST,
        frame=header,
        num_examples=64,
        num_label_tokens=4096,
        num_steps=12,
        metrics={"loss": 2.5, "seconds": 1.25},
        policy=DIGEST[::-1],
    )


def job(header: bytes) -> pb.Job:
    return pb.Job(
        id="a1b2c3",
        name="medquad, second try",
        recipe="name: medquad\nseed: 0\n",
        kind="train",
        purpose="research",
        sites=["north-clinic", "south-clinic"],
        must_match={"base weights": DIGEST, "adapter": "lora r=8"},
        initial=header,
        submitted_at=1.7e9,
    )


def site_messages() -> list[Message]:
    head = pb.AuditHead(sequence=5, hash=bytes(32), signature=bytes(64))
    return [
        pb.SiteMessage(
            hello=pb.Hello(
                protocol_min=1, protocol_max=1, software="commonweight 0.1", tasks=["4f", "5e"], audit_head=head
            )
        ),
        pb.SiteMessage(heartbeat=pb.Heartbeat(progress=[pb.Progress(task="4f", note="step 3 of 12")])),
        pb.SiteMessage(reply=pb.TaskReply(task="4f", state=pb.TaskReply.DONE, result=b'{"loss": 1.5}')),
        pb.SiteMessage(reply=pb.TaskReply(task="4f", state=pb.TaskReply.REFUSED, reason="the cohort is too small")),
    ]


def coordinator_messages() -> list[Message]:
    head = pb.AuditHead(sequence=5, hash=bytes(32), signature=bytes(64))
    task = pb.Task(id="4f", run="a1", round=3, kind="train", body=b'{"lr": 0.01}', base=DIGEST, seconds_left=60.0)
    return [
        pb.CoordinatorMessage(welcome=pb.Welcome(protocol=1, name="north", heartbeat_s=15.0, audit_head=head)),
        pb.CoordinatorMessage(task=task),
        pb.CoordinatorMessage(withdraw=pb.Withdraw(task="4f", reason="the round is closed")),
        pb.CoordinatorMessage(heartbeat=pb.Heartbeat()),
        pb.CoordinatorMessage(ended=pb.RunEnded(run="a1", state="finished")),
        pb.CoordinatorMessage(bye=pb.Bye(reason="revoked")),
        pb.CoordinatorMessage(audit_head=head),
    ]


# ---- what must hold of anything


def refusal(call: Callable[[], object]) -> Refusal | None:
    """The code with which a call refuses, or None."""
    try:
        call()
    except Refused as refused:
        return refused.code
    return None


def check_header(raw: bytes) -> None:
    frame = parse_header(raw)
    assert Frame(frame.plan, frame.digests).header == raw
    assert len(frame.digests) == frame.plan.num_chunks == len(frame.plan.pieces)
    assert frame.plan.num_bytes == sum(piece.num_bytes for piece in frame.plan.pieces)


def _again(parsed: ParsedManifest) -> bytes:
    values = {name: getattr(parsed, name) for name in parsed.__dataclass_fields__}
    return encoded(pb.Manifest(**{**values, "frame": parsed.frame.header}))


def check_manifest(raw: bytes) -> None:
    parsed = parse_manifest(pb.SignedManifest(manifest=raw))
    assert parse_manifest(pb.SignedManifest(manifest=_again(parsed))) == parsed
    for sent in sent_frames():
        layout = sent.frame.plan.layout
        fits = parsed.frame.plan == plan_for(layout, (Channel("delta"),), 1024)
        code = refusal(lambda layout=layout: check_frame(parsed.frame, layout, ("delta",), chunk_bytes=1024))
        assert code is (None if fits else Refusal.WRONG_SHAPE)


def check_signed_manifest(raw: bytes) -> None:
    signed = decode(pb.SignedManifest, raw)
    assert decode(pb.SignedManifest, encoded(signed)) == signed
    check_manifest(signed.manifest)


def check_job(raw: bytes) -> None:
    parsed = parse_job(pb.SignedJob(job=raw))
    assert parse_job(pb.SignedJob(job=encoded(parsed))) == parsed


def check_site(raw: bytes) -> None:
    message = decode(pb.SiteMessage, raw)
    assert decode(pb.SiteMessage, encoded(message)) == message
    check_site_message(message)


def check_coordinator(raw: bytes) -> None:
    message = decode(pb.CoordinatorMessage, raw)
    assert decode(pb.CoordinatorMessage, encoded(message)) == message
    check_coordinator_message(message)


def check_push(raw: bytes) -> None:
    """Only the very chunk passes, and it is finite by the exact test if it is by the quick one."""
    index, chunk = unpack_chunk(raw)
    assert pack_chunk(index, chunk) == raw
    for sent in sent_frames():
        is_it = index < len(sent.chunks) and sent.chunks[index] == chunk
        code = refusal(lambda frame=sent.frame: check_chunk(frame, index, chunk))
        assert code is (None if is_it else Refusal.CORRUPT_CHUNK)
        if index < len(sent.chunks) and len(sent.chunks[index]) == len(chunk):
            values = torch.frombuffer(bytearray(chunk), dtype=sent.frame.plan.pieces[index].held)
            assert (first_bad(sent.frame, index, chunk) is None) == bool(values.isfinite().all())


def check_json(raw: bytes) -> None:
    value = parse_json(raw)
    assert parse_json(json.dumps(value).encode()) == value


CONTROL_KINDS = tuple(
    {
        kind.DESCRIPTOR.name: kind
        for table in (ENROLMENT, FEDERATION, TRANSFER, CONTROL)
        for method in table.values()
        for kind in (method.request, method.reply)
        if kind is not None
    }.values()
)


def check_any(raw: bytes) -> None:
    """Every kind of control message, by its first byte."""
    kind = CONTROL_KINDS[raw[0] % len(CONTROL_KINDS)] if raw else CONTROL_KINDS[0]
    message = decode(kind, raw[1:], strict=bool(raw) and raw[0] >= 128)
    assert decode(kind, encoded(message)) == message


@dataclass(frozen=True)
class Target:
    """Something that receives bytes, with samples of what it should get."""

    samples: Callable[[], list[bytes]]
    check: Callable[[bytes], None]


def _headers() -> list[bytes]:
    return [sent.frame.header for sent in sent_frames()]


def _pushes() -> list[bytes]:
    return [pack_chunk(index, chunk) for sent in sent_frames() for index, chunk in enumerate(sent.chunks)]


def _any() -> list[bytes]:
    numbered = {kind.DESCRIPTOR.name: number for number, kind in enumerate(CONTROL_KINDS)}
    messages = [
        *site_messages(),
        *coordinator_messages(),
        pb.UploadStatus(state=pb.UploadStatus.OPEN, upload="u1", missing=[0, 1, 300]),
        pb.EnrolRequest(protocol=1, secret="s", csr=b"c", signing_key=bytes(32), possession=bytes(64)),
        pb.FetchRequest(run="a1", frame=DIGEST, first=3),
        pb.CatchUpRequest(run="a1", held=DIGEST, wanted=DIGEST),
        pb.CatchUpReply(frames=[DIGEST, DIGEST]),
    ]
    return [bytes([numbered[message.DESCRIPTOR.name]]) + encoded(message) for message in messages]


TARGETS = {
    "header": Target(_headers, check_header),
    "manifest": Target(lambda: [encoded(manifest(header)) for header in _headers()], check_manifest),
    "signed-manifest": Target(
        lambda: [
            encoded(pb.SignedManifest(manifest=encoded(manifest(header)), signature=bytes(64))) for header in _headers()
        ],
        check_signed_manifest,
    ),
    "job": Target(lambda: [encoded(job(header)) for header in _headers()], check_job),
    "site-message": Target(lambda: [encoded(message) for message in site_messages()], check_site),
    "coordinator-message": Target(lambda: [encoded(message) for message in coordinator_messages()], check_coordinator),
    "push": Target(_pushes, check_push),
    "json": Target(
        lambda: [b'{"loss": 1.5, "rows": [[1, 2.5e-3], [null, "\\u00e9"]], "more": {"a": true}}', b"{}"], check_json
    ),
    "any-message": Target(_any, check_any),
}


@cache
def samples_of(name: str) -> tuple[bytes, ...]:
    return tuple(TARGETS[name].samples())


# ---- what is wrong


def mutated(name: str, draw: Random) -> bytes:
    """A sample with one to three things wrong with it; now and then a sample as it is, or mere noise."""
    samples = samples_of(name)
    if draw.random() < 0.03:
        return draw.randbytes(draw.choice((0, 1, 2, 5, 40, 1000)))
    raw = draw.choice(samples)
    for _ in range(draw.choice((0, 1, 1, 1, 1, 1, 1, 1, 2, 3))):
        raw = draw.choice(_MUTATIONS)(raw, draw, samples)
    return raw


def _flip(raw: bytes, draw: Random, samples: tuple[bytes, ...]) -> bytes:
    out = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 8)) if out else 0):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _truncate(raw: bytes, draw: Random, samples: tuple[bytes, ...]) -> bytes:
    return raw[: draw.randint(0, len(raw))]


def _extend(raw: bytes, draw: Random, samples: tuple[bytes, ...]) -> bytes:
    return raw + draw.choice((draw.randbytes(draw.randint(1, 20)), b"\0", b"\x0b" * 200, _field(draw)))


def _insert(raw: bytes, draw: Random, samples: tuple[bytes, ...]) -> bytes:
    at = draw.randint(0, len(raw))
    return raw[:at] + draw.choice((draw.randbytes(draw.randint(1, 9)), _field(draw))) + raw[at:]


def _cut(raw: bytes, draw: Random, samples: tuple[bytes, ...]) -> bytes:
    at = draw.randint(0, len(raw))
    return raw[:at] + raw[at + draw.choice((1, 2, 8, 32)) :]


def _splice(raw: bytes, draw: Random, samples: tuple[bytes, ...]) -> bytes:
    other = draw.choice(samples)
    return raw[: draw.randint(0, len(raw))] + other[draw.randint(0, len(other)) :]


def _number_bomb(raw: bytes, draw: Random, samples: tuple[bytes, ...]) -> bytes:
    at = draw.randint(0, len(raw))
    number = draw.choice(EDGES)
    code = draw.choice((varint(number), varint(number), struct.pack("<Q", number), b"\xff" * 11))
    return raw[:at] + code + raw[at + draw.choice((0, 1, 1, len(code))) :]


def _text_bomb(raw: bytes, draw: Random, samples: tuple[bytes, ...]) -> bytes:
    at = draw.randint(0, len(raw))
    code = draw.choice(
        (b"\xed\xa0\x80", b"\xc0\x80", b"\0", b"\x1b[2J", b"../", "\u202e".encode(), b"[" * 3000, b"1e999")
    )
    return raw[:at] + code + raw[at + draw.choice((0, len(code))) :]


def _restructure(raw: bytes, draw: Random, samples: tuple[bytes, ...]) -> bytes:
    """Duplicate, drop, move or alter one field, at the top or deeper; lengths around it stay right."""
    try:
        parts = [(number, wire, value) for number, wire, value in fields(memoryview(raw))]
    except ValueError:
        return raw
    if not parts:
        return _field(draw)
    place = draw.randrange(len(parts))
    number, wire, value = parts[place]
    match draw.randrange(6):
        case 0:
            parts.insert(draw.randint(0, len(parts)), parts[place])
        case 1:
            parts.pop(place)
        case 2:
            parts.insert(draw.randint(0, len(parts)), parts.pop(place))
        case 3 if wire == 0:
            parts[place] = (number, wire, draw.choice(EDGES))
        case 4:
            parts[place] = (draw.choice((1, 2, 3, 4, 5, 12, 99, (1 << 29) - 1)), wire, value)
        case _ if wire == 2:
            inner = draw.choice(_MUTATIONS)(bytes(value), draw, samples)  # type: ignore[arg-type]
            parts[place] = (number, wire, memoryview(inner))
    return b"".join(_encode(*part) for part in parts)


def _encode(number: int, wire: int, value: int | memoryview) -> bytes:
    if isinstance(value, int):
        return varint(number << 3 | wire) + varint(value)
    return varint(number << 3 | wire) + (varint(len(value)) if wire == 2 else b"") + bytes(value)


def _field(draw: Random) -> bytes:
    number = draw.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1000))
    value = draw.choice((draw.choice(EDGES), memoryview(draw.randbytes(draw.choice((0, 1, 8, 32))))))
    return _encode(number, 0 if isinstance(value, int) else 2, value)


_MUTATIONS = (
    _flip,
    _flip,
    _truncate,
    _extend,
    _insert,
    _cut,
    _splice,
    _number_bomb,
    _text_bomb,
    _restructure,
    _restructure,
    _restructure,
)


class Found(AssertionError):
    """A message that was neither refused by type nor what its encoding says."""

    def __init__(self, name: str, raw: bytes) -> None:
        super().__init__(f"{name}: {raw[:200].hex()}{'…' if len(raw) > 200 else ''} ({len(raw)} bytes)")
        self.target, self.raw = name, raw


def try_one(name: str, raw: bytes) -> bool:
    """Whether the message passed; False: refused by type.

    Raises:
        Found: anything else happened.
    """
    try:
        TARGETS[name].check(raw)
    except Refused:
        return False
    except Exception as error:
        raise Found(name, raw) from error
    return True

"""What a header must not say, case by case, and what the worst messages may cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commonweight.errors import ModelError
from commonweight.model.tensors import Layout
from commonweight.wire.decode import decode
from commonweight.wire.frames import Channel, Limits, parse_header, plan_for
from commonweight.wire.protocol_pb2 import ChannelEntry, FrameHeader, SiteMessage, TensorEntry
from commonweight.wire.refusals import Refusal, Refused
from commonweight.wire.service import reader
from tests.protocol.fuzzing import encoded

MIB = 1 << 20


def header(**changes: object) -> FrameHeader:
    values: dict[str, object] = {
        "version": 1,
        "chunk_bytes": 1024,
        "tensors": [TensorEntry(name="a", dtype="float32", shape=[300]), TensorEntry(name="b", dtype="int8", shape=[])],
        "channels": [ChannelEntry(name="delta")],
        "digests": bytes(3 * 32),
    }
    return FrameHeader(**{**values, **changes})  # type: ignore[arg-type]


def tensor(name: str = "a", dtype: str = "float32", shape: tuple[int, ...] = (1,)) -> dict[str, object]:
    return {"tensors": [TensorEntry(name=name, dtype=dtype, shape=shape)], "digests": bytes(32)}


def test_the_plain_header_is_taken() -> None:
    frame = parse_header(encoded(header()))
    assert [(piece.start, piece.numel) for piece in frame.plan.pieces] == [(0, 256), (256, 44), (0, 1)]


BROKEN: dict[str, tuple[dict[str, object], str]] = {
    "no version": ({"version": 0}, "version 0"),
    "a later version": ({"version": 2}, "version 2"),
    "tiny chunks": ({"chunk_bytes": 8}, "chunks of 8 bytes"),
    "odd chunks": ({"chunk_bytes": 1028}, "chunks of 1028 bytes"),
    "huge chunks": ({"chunk_bytes": (1 << 32) - 8}, "chunks of 4294967288 bytes"),
    "no channel": ({"channels": []}, "without channels"),
    "a channel twice": ({"channels": [ChannelEntry(name="m"), ChannelEntry(name="m", wide=True)]}, "doubled"),
    "a channel without a name": ({"channels": [ChannelEntry(name="")]}, "cannot be one"),
    "seventeen channels": ({"channels": [ChannelEntry(name=f"c{n}") for n in range(17)]}, "number of channels"),
    "a digest too few": ({"digests": bytes(2 * 32)}, "3 chunks with 64 bytes"),
    "a digest too short": ({"digests": bytes(3 * 32 - 1)}, "3 chunks with 95 bytes"),
    "a digest too many": ({"digests": bytes(4 * 32)}, "3 chunks with 128 bytes"),
    "no name": (tensor(""), "named ''"),
    "a line end in a name": (tensor("a\nb"), r"named 'a\\nb'"),
    "an escape in a name": (tensor("\x1b[2J"), r"named '\\x1b\[2J'"),
    "a space in a name": (tensor("a b"), "named 'a b'"),
    "letters beyond ASCII in a name": (tensor("π"), r"named '\\u03c0'"),
    "a long name": (tensor("a" * 1025), "named 'aaa"),
    "an unknown dtype": (tensor(dtype="complex64"), "dtype 'complex64'"),
    "a dtype of Python's": (tensor(dtype="object"), "dtype 'object'"),
    "seventeen dimensions": (tensor(shape=(1,) * 17), "17 dimensions"),
    "a product beyond 64 bits": (tensor(shape=((1 << 64) - 1,) * 16), "more than"),
    "strides that overflow": (tensor(shape=(0, 1 << 40, 1 << 40)), "more than"),
    "a tensor beyond the cap": (tensor(shape=((1 << 40) + 1,)), "more than"),
    "unsorted names": (
        {"tensors": [TensorEntry(name=n, dtype="int8", shape=[1]) for n in "ba"], "digests": bytes(32)},
        "not in order at 'a'",
    ),
    "a name twice": (
        {"tensors": [TensorEntry(name="a", dtype=d, shape=[1]) for d in ("int8", "int16")], "digests": bytes(64)},
        "not in order at 'a'",
    ),
    "a body beyond the cap": (
        {"tensors": [TensorEntry(name=n, dtype="int8", shape=[1 << 42]) for n in "ab"]},
        "body is 8,796,093,022,208",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_refused_with_the_reason(case: str) -> None:
    changes, message = BROKEN[case]
    with pytest.raises(Refused, match=message) as caught:
        parse_header(encoded(header(**changes)))
    assert caught.value.code in (Refusal.MALFORMED, Refusal.TOO_LARGE)


PLAIN = encoded(header())
NOT_CANONICAL = {
    "an unknown field": PLAIN + b"\x30\x01",
    "an unknown field within": PLAIN.replace(b"\x1a\x09\x0a\x01b", b"\x1a\x0b\x0a\x01b\x20\x01"),
    "a version twice": PLAIN + b"\x08\x01",
    "a number longer than it need be": b"\x08\x81\x00" + PLAIN[2:],
    "digests twice": encoded(header(digests=b"")) + b"\x2a\x01a" + b"\x2a\x60" + bytes(96),
    "another order": encoded(header(channels=[])) + encoded(FrameHeader(channels=[ChannelEntry(name="delta")])),
    "a shape one by one": PLAIN.replace(b"\x1a\x02\xac\x02", b"\x18\xac\x02").replace(b"\x1a\x10", b"\x1a\x0f"),
    "cut short": PLAIN[:-1],
    "another wire type": b"\x0d" + PLAIN,
}


@pytest.mark.parametrize("case", NOT_CANONICAL)
def test_only_the_canonical_form_is_taken(case: str) -> None:
    """One content, one header, one digest: or a frame could be known by two names."""
    assert NOT_CANONICAL[case] != PLAIN
    with pytest.raises(Refused) as caught:
        parse_header(NOT_CANONICAL[case])
    assert caught.value.code is Refusal.MALFORMED


def test_caps_are_the_callers() -> None:
    raw = encoded(header())
    for limits in (Limits(header_bytes=len(raw) - 1), Limits(body_bytes=1200), Limits(tensors=1), Limits(channels=0)):
        with pytest.raises(Refused) as caught:
            parse_header(raw, limits)
        assert caught.value.code is Refusal.TOO_LARGE
    parse_header(raw, Limits(header_bytes=len(raw), body_bytes=1201, tensors=2, channels=1))


def test_names_and_dtypes_that_cannot_travel_are_said_before_anything_is_sent() -> None:
    for name, dtype, message in (("a b", torch.int8, "'a b'"), ("c", torch.complex64, "'c' is torch.complex64")):
        with pytest.raises(ModelError, match=message):
            plan_for(Layout.of({name: torch.empty(1, dtype=dtype)}), (Channel("theta"),))


def test_strict_messages_say_nothing_unknown_and_nothing_twice() -> None:
    decode(SiteMessage, b"\x7a\x01a")
    with pytest.raises(Refused, match="field 15"):
        decode(SiteMessage, b"\x7a\x01a", strict=True)
    with pytest.raises(Refused, match="protocol_min twice"):
        decode(SiteMessage, b"\x0a\x04\x08\x01\x08\x01", strict=True)
    with pytest.raises(Refused, match="field 1 "):
        decode(SiteMessage, b"\x08\x01", strict=True)


def test_unreadable_bytes_become_an_empty_message(caplog: pytest.LogCaptureFixture) -> None:
    """gRPC would give None to the reader of a stream, which nothing expects."""
    read = reader(SiteMessage)
    assert read is not None
    assert read(b"\xff") == SiteMessage()
    assert "SiteMessage that cannot be read" in caplog.text


def test_a_hostile_message_costs_its_own_size_and_little_more() -> None:
    """Python's own peak and the process's, for messages of the full 8 to 20 MiB, which are not counted."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.protocol.bombs"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    costs = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(costs) == 30
    assert {cost["outcome"] for cost in costs} == {"passed", "malformed", "too-large"}
    assert [cost["name"] for cost in costs if cost["outcome"] == "passed"] == [
        "header: long names",
        "header: as many chunks as fit",
        "manifest: the largest header",
    ]
    for cost in costs:
        assert cost["python"] < 64 * MIB, cost
        assert cost["process"] < 128 * MIB, cost

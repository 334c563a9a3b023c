"""What a manifest, a job and the messages of a stream must not say; each refusal says which of it, and its code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from google.protobuf.message import Message

from commonweight.model.tensors import Layout, NamedTensors
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import Channel, Limits, frame_of, pack_chunk, piece_of, plan_for, unpack_chunk
from commonweight.wire.manifest import MANIFEST_BYTES, check_frame, first_bad, parse_manifest
from commonweight.wire.messages import (
    check_coordinator_message,
    check_site_message,
    parse_job,
    parse_json,
)
from commonweight.wire.refusals import Refusal, Refused
from tests.protocol.fuzzing import (
    DIGEST,
    coordinator_messages,
    encoded,
    job,
    manifest,
    sent_frames,
    site_messages,
)

HEADER = sent_frames()[2].frame.header


def manifest_with(**changes: object) -> pb.SignedManifest:
    message = manifest(HEADER)
    for name, value in changes.items():
        if name == "metrics":
            message.metrics.clear()
            message.metrics.update(value)  # type: ignore[call-overload]
        else:
            setattr(message, name, value)
    return pb.SignedManifest(manifest=encoded(message), signature=bytes(64))


def test_a_manifest_is_read_as_it_was_written() -> None:
    parsed = parse_manifest(manifest_with())
    assert (parsed.run, parsed.round, parsed.task, parsed.site) == ("a1b2c3", 7, "4f5e6d", "north-clinic")
    assert (parsed.num_examples, parsed.num_label_tokens, parsed.num_steps) == (64, 4096, 12)
    assert (parsed.base, parsed.policy) == (DIGEST, DIGEST[::-1])
    assert parsed.metrics == {"loss": 2.5, "seconds": 1.25}
    assert parsed.frame == sent_frames()[2].frame


NAN, INF = float("nan"), float("inf")
BAD_MANIFESTS: list[tuple[str, object, Refusal, str]] = [
    ("run", "", Refusal.MALFORMED, "a manifest's run is ''"),
    ("run", "../other", Refusal.MALFORMED, "run is '../other'"),
    ("run", "a/b", Refusal.MALFORMED, "run is 'a/b'"),
    ("run", "a\n", Refusal.MALFORMED, r"run is 'a\\n'"),
    ("run", "a" * 129, Refusal.MALFORMED, "129 characters"),
    ("site", "North", Refusal.MALFORMED, "site is 'North'"),
    ("site", "nörd", Refusal.MALFORMED, r"site is 'n\\xf6rd'"),
    ("site", "a" * 64, Refusal.MALFORMED, "site is 'aaa"),
    ("task", "a b", Refusal.MALFORMED, "task is 'a b'"),
    ("task", "\x1b[2J", Refusal.MALFORMED, r"task is '\\x1b\[2J'"),
    ("base", DIGEST[1:], Refusal.MALFORMED, "base is"),
    ("base", DIGEST.upper(), Refusal.MALFORMED, "base is"),
    ("policy", "", Refusal.MALFORMED, "policy is ''"),
    ("frame", b"", Refusal.MALFORMED, "version 0"),
    ("num_examples", 0, Refusal.BAD_WEIGHT, "trained on 0 examples"),
    ("num_examples", 10**15 + 1, Refusal.BAD_WEIGHT, "1000000000000001 examples"),
    ("num_label_tokens", (1 << 64) - 1, Refusal.BAD_WEIGHT, "label tokens"),
    ("num_steps", 1 << 63, Refusal.BAD_WEIGHT, "steps"),
    ("metrics", {"loss": NAN}, Refusal.NON_FINITE, "metric 'loss' is nan"),
    ("metrics", {"loss": -INF}, Refusal.NON_FINITE, "metric 'loss' is -inf"),
    ("metrics", {"loss": 1e300}, Refusal.MALFORMED, "metric 'loss' is 1e\\+300"),
    ("metrics", {"": 1.0}, Refusal.MALFORMED, "metric's name is ''"),
    ("metrics", {"a" * 65: 1.0}, Refusal.MALFORMED, "metric's name is 'aaa"),
    ("metrics", {f"m{n}": 1.0 for n in range(65)}, Refusal.MALFORMED, "65 metrics"),
]


@pytest.mark.parametrize("number", range(len(BAD_MANIFESTS)))
def test_a_manifest_outside_its_bounds_is_refused(number: int) -> None:
    name, value, code, message = BAD_MANIFESTS[number]
    with pytest.raises(Refused, match=message) as caught:
        parse_manifest(manifest_with(**{name: value}))
    assert caught.value.code is code


def test_a_manifest_may_be_as_large_as_its_header_and_little_more() -> None:
    limits = Limits(header_bytes=len(HEADER))
    parse_manifest(manifest_with(), limits=limits)
    with pytest.raises(Refused) as caught:
        parse_manifest(manifest_with(task="a" * (MANIFEST_BYTES - 500)))
    assert caught.value.code is Refusal.MALFORMED
    for too_large in (manifest_with(task="a" * MANIFEST_BYTES), pb.SignedManifest(manifest=bytes(17 << 20))):
        with pytest.raises(Refused) as caught:
            parse_manifest(too_large)
        assert caught.value.code is Refusal.TOO_LARGE


def test_what_does_not_fit_is_named() -> None:
    layout = Layout.of({"a": torch.empty(2, 3), "b": torch.empty(4, dtype=torch.bfloat16)})
    frames = {
        "'a' is torch.float32 \\[3, 2\\], expected torch.float32 \\[2, 3\\]": {
            "a": torch.empty(3, 2),
            "b": torch.empty(4, dtype=torch.bfloat16),
        },
        "'b' is torch.float16 \\[4\\], expected torch.bfloat16 \\[4\\]": {
            "a": torch.empty(2, 3),
            "b": torch.empty(4, dtype=torch.float16),
        },
        "missing tensors \\['b'\\], unknown tensors \\['c'\\]": {"a": torch.empty(2, 3), "c": torch.empty(1)},
    }
    for message, tensors in frames.items():
        held = {"delta": NamedTensors.of(tensors)}
        frame = frame_of(held, plan_for(held["delta"].layout, (Channel("delta"),)))
        with pytest.raises(Refused, match=message):
            check_frame(frame, layout, ("delta",))
        with pytest.raises(Refused, match=r"it carries \['delta'\], expected \['delta', 'control'\]"):
            check_frame(frame, layout, ("delta", "control"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_tensor_that_is_not_finite_is_named(dtype: torch.dtype) -> None:
    """Also one that starts in an earlier chunk, and past whole numbers and empty tensors beside it."""
    tensors = {
        "a": torch.ones(300, dtype=dtype),
        "b": torch.ones(0, dtype=dtype),
        "c": torch.ones(400, dtype=dtype),
        "n": torch.full((300,), -1, dtype=torch.int16),
    }
    held = {"delta": NamedTensors.of(tensors)}
    frame = frame_of(held, plan_for(held["delta"].layout, (Channel("delta"),), 1024))

    def found() -> list[str | None]:
        messages = (pack_chunk(piece.index, piece_of(held, piece)) for piece in frame.plan.pieces)
        return [first_bad(frame, *unpack_chunk(message)) for message in messages]

    assert set(found()) == {None}
    held["delta"]["c"][399] = NAN
    chunks = [piece.index for piece in frame.plan.pieces if piece.dtype == dtype]
    assert [index for index, name in enumerate(found()) if name == "c"] == [chunks[-1]]
    held["delta"]["a"][0] = INF
    assert found()[chunks[0]] == "a"
    assert len([name for name in found() if name]) == 2


# ---- jobs


def job_with(change: Callable[[pb.Job], object]) -> pb.SignedJob:
    message = job(HEADER)
    change(message)
    return pb.SignedJob(job=encoded(message))


def test_a_job_is_read_as_it_was_written() -> None:
    assert parse_job(pb.SignedJob(job=encoded(job(HEADER)))) == job(HEADER)


BAD_JOBS: dict[str, Callable[[pb.Job], object]] = {
    "a job's id is '../x'": lambda j: setattr(j, "id", "../x"),
    "a job's name is 'a\\\\nb'": lambda j: setattr(j, "name", "a\nb"),
    "a job's kind is ''": lambda j: setattr(j, "kind", ""),
    "a job's purpose is 'aaa": lambda j: setattr(j, "purpose", "a" * 201),
    "a job's recipe is 1,048,577": lambda j: setattr(j, "recipe", "a" * ((1 << 20) + 1)),
    "one of them twice": lambda j: j.sites.append("north-clinic"),
    "name of a job's site is 'North'": lambda j: j.sites.append("North"),
    "66 things that must match": lambda j: j.must_match.update({f"k{n}": "v" for n in range(64)}),
    "must match is '\\\\x00'": lambda j: j.must_match.update({"\0": "v"}),
    "value of 'k' that": lambda j: j.must_match.update({"k": "\x1b[31m"}),
    "a job's time is nan": lambda j: setattr(j, "submitted_at", NAN),
    "a job's time is -1": lambda j: setattr(j, "submitted_at", -1.0),
    "version 0": lambda j: setattr(j, "initial", b""),
}


@pytest.mark.parametrize("message", BAD_JOBS)
def test_a_job_outside_its_bounds_is_refused(message: str) -> None:
    with pytest.raises(Refused, match=message):
        parse_job(job_with(BAD_JOBS[message]))


def test_a_job_with_a_demand_that_is_not_understood_is_refused() -> None:
    """A later version might ask for privacy that this one does not give."""
    with pytest.raises(Refused, match="field 12 that this version does not know") as caught:
        parse_job(pb.SignedJob(job=encoded(job(HEADER)) + b"\x60\x01"))
    assert caught.value.code is Refusal.MALFORMED
    with pytest.raises(Refused, match="certificate"):
        parse_job(pb.SignedJob(job=encoded(job(HEADER)), certificate=bytes(65 << 10)))


# ---- streams


@pytest.mark.parametrize(
    "message", [*site_messages(), *coordinator_messages()], ids=lambda m: str(m.WhichOneof("body"))
)
def test_right_messages_pass(message: Message) -> None:
    check = check_site_message if isinstance(message, pb.SiteMessage) else check_coordinator_message
    check(message)  # type: ignore[arg-type]


TASK = {"id": "4f", "run": "a1", "kind": "train", "base": DIGEST}
HEAD = {"sequence": 1, "hash": bytes(32), "signature": bytes(64)}
BAD_MESSAGES: dict[str, Message] = {
    "nothing in it": pb.SiteMessage(),
    "software is": pb.SiteMessage(hello=pb.Hello(software="\x1b]0;title\x07")),
    "task in hand is '../4f'": pb.SiteMessage(hello=pb.Hello(tasks=["../4f"])),
    "tasks in hand is 10,001": pb.SiteMessage(hello=pb.Hello(tasks=["a"] * 10_001)),
    "an audit head": pb.SiteMessage(hello=pb.Hello(audit_head=pb.AuditHead(hash=bytes(31)))),
    "task in progress is ''": pb.SiteMessage(heartbeat=pb.Heartbeat(progress=[pb.Progress()])),
    "task's progress is": pb.SiteMessage(heartbeat=pb.Heartbeat(progress=[pb.Progress(task="a", note="a\u202eb")])),
    "tasks in progress is 10,001": pb.SiteMessage(heartbeat=pb.Heartbeat(progress=[pb.Progress(task="a")] * 10_001)),
    "in state 0": pb.SiteMessage(reply=pb.TaskReply(task="4f")),
    "in state 9": pb.SiteMessage(reply=pb.TaskReply(task="4f", state=9)),  # type: ignore[arg-type]
    "answer's reason": pb.SiteMessage(reply=pb.TaskReply(task="4f", state=4, reason="\x07")),  # type: ignore[arg-type]
    "an answer is 8,388,609": pb.SiteMessage(reply=pb.TaskReply(task="4f", state=2, result=bytes((8 << 20) + 1))),  # type: ignore[arg-type]
    "nothing in it that": pb.CoordinatorMessage(),
    "name in a welcome": pb.CoordinatorMessage(welcome=pb.Welcome(name="a/b", heartbeat_s=1.0)),
    "without a time between": pb.CoordinatorMessage(welcome=pb.Welcome(name="a")),
    "heartbeats is nan": pb.CoordinatorMessage(welcome=pb.Welcome(name="a", heartbeat_s=NAN)),
    "heartbeats is -1": pb.CoordinatorMessage(welcome=pb.Welcome(name="a", heartbeat_s=-1.0)),
    "heartbeats is inf": pb.CoordinatorMessage(welcome=pb.Welcome(name="a", heartbeat_s=INF)),
    "task's run is '../../etc'": pb.CoordinatorMessage(task=pb.Task(**{**TASK, "run": "../../etc"})),
    "kind 'exec'": pb.CoordinatorMessage(task=pb.Task(**{**TASK, "kind": "exec"})),
    "task's base is ''": pb.CoordinatorMessage(task=pb.Task(**{**TASK, "base": ""})),
    "deadline is -3": pb.CoordinatorMessage(task=pb.Task(**TASK, seconds_left=-3.0)),
    "body is 8,388,609": pb.CoordinatorMessage(task=pb.Task(**TASK, body=bytes((8 << 20) + 1))),
    "withdrawn is": pb.CoordinatorMessage(withdraw=pb.Withdraw(task="")),
    "run that has ended is '/'": pb.CoordinatorMessage(ended=pb.RunEnded(run="/", state="finished")),
    "why the stream ends is": pb.CoordinatorMessage(bye=pb.Bye(reason="a" * 8001)),
    "whose hash": pb.CoordinatorMessage(audit_head=pb.AuditHead(**{**HEAD, "sequence": 1 << 63})),
}


@pytest.mark.parametrize("reason", BAD_MESSAGES)
def test_messages_outside_their_bounds_are_refused(reason: str) -> None:
    message = BAD_MESSAGES[reason]
    check = check_site_message if isinstance(message, pb.SiteMessage) else check_coordinator_message
    with pytest.raises(Refused, match=reason) as caught:
        check(message)  # type: ignore[arg-type]
    assert caught.value.code in (Refusal.MALFORMED, Refusal.TOO_LARGE)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "cannot be read"),
        (b"[1]", "not an object"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": "\xff"}', "cannot be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "cannot be read"),
        (b'{"a": "' + bytes(200) + b'"}', "cannot be read"),
        (b"{}" + b" " * (8 << 20), "8,388,610"),
        (b'{"a": [' + b"1," * (1 << 19) + b"1]}", "number of values"),
    ],
    ids=["nothing", "list", "nan", "infinity", "1e999", "utf-8", "digits", "deep", "nul", "long", "many"],
)
def test_json_that_could_do_harm_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        parse_json(raw)


def test_json_is_read() -> None:
    assert parse_json(b'{"rows": [[1, 2.5, null], "\\u00e9"]}') == {"rows": [[1, 2.5, None], "é"]}

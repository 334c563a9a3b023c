"""docs/protocol.md says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from commonweight.identity import keys, roles
from commonweight.model.tensors import NamedTensors
from commonweight.wire import manifest, messages, partial, refusals, service
from commonweight.wire.frames import LIMITS, Channel, Frame, frame_of, parse_header, piece_of, plan_for

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


def example() -> tuple[Frame, list[bytes]]:
    held = {"delta": NamedTensors.of({"a": torch.tensor([1.0, -2.0, 0.5]), "b": torch.tensor(7)})}
    frame = frame_of(held, plan_for(held["delta"].layout, (Channel("delta"),), 1024))
    return frame, [bytes(piece_of(held, piece)) for piece in frame.plan.pieces]


def block() -> list[str]:
    (found,) = re.findall(r"```\n(08 01 .*?)```", PAGE, re.DOTALL)
    return found.strip().splitlines()


def bytes_of(line: str) -> bytes:
    """The pairs of hex digits at the start of a line; what is explained follows after two spaces."""
    return bytes.fromhex(line.strip().partition("  ")[0])


def test_the_worked_example_is_what_the_code_writes() -> None:
    frame, chunks = example()
    lines = block()
    header = b"".join(bytes_of(line) for line in lines[: lines.index("")])
    assert header == frame.header
    assert parse_header(header) == frame
    said = dict(line.split("   ", 1) for line in lines[lines.index("") + 1 :])
    assert [bytes_of(said["chunk 0"]), bytes_of(said["chunk 1"])] == chunks
    assert said["name"].strip() == frame.digest


def test_lengths_in_the_example_are_explained() -> None:
    for line in block():
        if found := re.search(r"of (\d+) bytes$|(\d+) bytes of digests$", line):
            assert bytes_of(line)[1] == int(found.group(1) or found.group(2))


def test_tables_are_current() -> None:
    assert roles.markdown() in PAGE, "copy identity/roles.py's markdown() anew"
    assert refusals.markdown() in PAGE, "copy wire/refusals.py's markdown() anew"
    assert set(refusals.MEANING) == set(refusals.Refusal)


def test_domain_lines_are_current() -> None:
    lines = set(re.findall(r"^\| `(commonweight [a-z]+ \d+)\\n` \|", PAGE, re.MULTILINE))
    assert lines == {domain.decode().strip() for domain in keys.DOMAINS}


def test_versions_and_names_of_metadata_are_current() -> None:
    assert service.PROTOCOL_MIN == service.PROTOCOL_MAX
    assert f"this program speaks version {service.PROTOCOL_MAX} alone" in PAGE
    for key in (service.UPLOAD_KEY, service.HINT_KEY + "-bin", service.CODE_KEY):
        assert f"`{key}`" in PAGE
    keepalive = dict(service.channel_options())["grpc.keepalive_time_ms"] // 1000
    assert f"HTTP/2 pings every {keepalive} s" in PAGE


def limits() -> dict[str, str]:
    mib = 1 << 20
    return {
        "a message": f"{service.MAX_MESSAGE_BYTES // mib} MiB",
        "a frame's header": f"{LIMITS.header_bytes // mib} MiB",
        "a frame's body": f"{LIMITS.body_bytes >> 40} TiB, or what the coordinator's settings allow",
        "a frame's tensors, channels": f"{LIMITS.tensors:,}, {LIMITS.channels}",
        "a tensor's name": f"{LIMITS.name_bytes:,} printable ASCII characters, none of them a space",
        "a tensor's dimensions": f"{LIMITS.dimensions}",
        "a chunk": f"{LIMITS.max_chunk_bytes // mib} MiB, and no less than {LIMITS.min_chunk_bytes:,} bytes",
        "a manifest beside its header": f"{manifest.MANIFEST_BYTES >> 10} KiB, {manifest.MAX_METRICS} metrics",
        "an update's examples, label tokens, steps": "10¹⁵ each; at least one example",
        "a job's recipe": f"{messages.RECIPE_BYTES // mib} MiB",
        "the sites of a job": f"{messages.MAX_SITES:,}",
        "the sites in a region's sum": f"{partial.MAX_MEMBERS:,}",
        "the JSON of a task or an answer": f"{messages.JSON_BYTES // mib} MiB",
    }


def test_limits_are_current() -> None:
    rows = dict(re.findall(r"^\| ([^|`]+) \| ([^|]+) \|$", PAGE.partition("## Limits")[2], re.MULTILINE))
    rows.pop("what")
    assert rows == limits()
    assert manifest.MAX_COUNT == 10**15

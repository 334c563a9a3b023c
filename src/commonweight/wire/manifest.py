"""What a site says of its update, and the update's chunks: everything that is checked of them before they are used.

    parse_manifest  the signed bytes → typed values, each within its bounds
    check_frame     do the tensors' names, shapes, dtypes and channels fit the run?
    check_chunk     is this chunk the one that the manifest announced?
    first_bad       does it hold NaN or infinity? (`refuse_non_finite` refuses it)

Whose manifest it is (certificate, signature, cohort) is for the receiver to check: here is only what bytes can say.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..codec.coded import CODED, check_layout
from ..codec.feedback import Coder
from ..codec.stage import BadPayload
from ..model.tensors import Layout
from ..strategies.update import MAX_WEIGHT, mismatch
from .decode import decode
from .frames import LIMITS, Channel, Frame, Limits, Piece, chunk_digest, parse_header
from .protocol_pb2 import Manifest, SignedManifest
from .refusals import Refusal, Refused

#: what a manifest may hold beside its frame's header
MANIFEST_BYTES = 64 << 10
MAX_METRICS = 64
MAX_METRIC = 1e15
MAX_COUNT = int(MAX_WEIGHT)

#: names become parts of paths and of log lines: no separators, no leading dots, no control characters
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SITE = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,255}")
DIGEST = re.compile(r"[0-9a-f]{64}")
METRIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,63}")

with warnings.catch_warnings():  # torch says once in a process that a tensor over bytes must not be written to
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@dataclass(frozen=True)
class ParsedManifest:
    """A manifest whose every value is within its bounds.

    Args:
        run, round, task, site: what it answers, and whose it claims to be.
        base: hex digest of the frame that the work started from.
        frame: where the update's bytes belong, and their digests.
        num_examples, num_label_tokens, num_steps: what it trained on and for how long.
        metrics: figures for people, finite.
        policy: hex digest of the site's policy.
        cluster: of which cluster's model it claims to be an update.
    """

    run: str
    round: int
    task: str
    site: str
    base: str
    frame: Frame
    num_examples: int
    num_label_tokens: int
    num_steps: int
    metrics: Mapping[str, float]
    policy: str
    cluster: int = 0


def parse_manifest(signed: SignedManifest, *, limits: Limits = LIMITS) -> ParsedManifest:
    """Read a manifest that came from elsewhere. Its signature is not checked here.

    Raises:
        Refused (malformed, too-large, bad-weight, non-finite): it is no manifest, it has fields that this version does
            not know, or it holds a name, digest, count or metric outside its bounds; the reason says which.
    """
    raw = signed.manifest
    if len(raw) > (limit := limits.header_bytes + MANIFEST_BYTES):
        raise Refused(Refusal.TOO_LARGE, f"a manifest of {len(raw):,} bytes, more than the {limit:,} that are allowed")
    message = decode(Manifest, raw, max_fields=256, strict=True)
    header = message.frame
    if len(raw) - len(header) > MANIFEST_BYTES:
        raise Refused(
            Refusal.TOO_LARGE, f"a manifest with more than {MANIFEST_BYTES:,} bytes beside its frame's header"
        )
    check_text("a manifest's run", message.run, RUN)
    check_text("a manifest's task", message.task, TASK)
    check_text("a manifest's site", message.site, SITE)
    check_text("a manifest's base", message.base, DIGEST)
    check_text("a manifest's policy", message.policy, DIGEST)
    counts = (message.num_examples, message.num_label_tokens, message.num_steps)
    if message.num_examples == 0 or max(counts) > MAX_COUNT:
        raise Refused(
            Refusal.BAD_WEIGHT,
            f"an update trained on {counts[0]} examples and {counts[1]} label tokens in {counts[2]} steps",
            hint=f"there must be at least one example, and no count above {MAX_WEIGHT:g}",
        )
    return ParsedManifest(
        message.run,
        message.round,
        message.task,
        message.site,
        message.base,
        parse_header(header, limits),
        *counts,
        _metrics(message.metrics),
        message.policy,
        message.cluster,
    )


def check_frame(frame: Frame, layout: Layout, channels: tuple[str, ...], *, chunk_bytes: int | None = None) -> None:
    """Refuse an update whose tensors are not those that the run asks of its site.

    Args:
        layout: of the tensors that the site sends: the global ones', or that of its part.
        channels: the channels of the strategy's updates, in order; none is held wide.
        chunk_bytes: how the global tensors are cut; an update that is folded chunk by chunk must be cut alike.

    Raises:
        Refused (wrong-shape): names what differs.
    """
    plan = frame.plan
    if plan.channels != tuple(Channel(name) for name in channels):
        raise _wrong_shape(f"it carries {_told(plan.channels)}, expected {list(channels)}")
    if plan.layout != layout:
        raise _wrong_shape(mismatch(plan.layout, layout))
    if chunk_bytes is not None and plan.chunk_bytes != chunk_bytes:
        raise _wrong_shape(f"its chunks are of {plan.chunk_bytes} bytes, expected {chunk_bytes}")


def check_coded_frame(frame: Frame, coder: Coder, channels: tuple[str, ...]) -> None:
    """Refuse an update that its codec cannot have made small.

    Args:
        channels: the channels of the strategy's updates, in order.

    Raises:
        Refused (wrong-shape): says what differs.
    """
    if frame.plan.channels != (Channel(CODED),):
        raise _wrong_shape(f"it carries {_told(frame.plan.channels)}, expected ['{CODED}']")
    try:
        check_layout(frame.plan.layout, coder, channels)
    except BadPayload as error:
        raise _wrong_shape(error.message) from error


def check_chunk(frame: Frame, index: int, chunk: bytes | memoryview) -> Piece:
    """Whether these bytes are the frame's chunk `index`; where they belong.

    Raises:
        Refused (corrupt-chunk, may be sent again): no such chunk, another length, or another digest.
    """
    if not 0 <= index < frame.plan.num_chunks:
        raise _corrupt(f"there is no chunk {index}: the frame has {frame.plan.num_chunks}")
    piece = frame.plan.pieces[index]
    size = chunk.nbytes if isinstance(chunk, memoryview) else len(chunk)
    if size != piece.num_bytes:
        raise _corrupt(f"chunk {index} has {size} bytes, expected {piece.num_bytes}")
    if chunk_digest(chunk) != frame.digests[index]:
        raise _corrupt(f"chunk {index} is not what its digest says")
    return piece


def first_bad(frame: Frame, index: int, chunk: bytes | memoryview) -> str | None:
    """The name of the first tensor with NaN or infinity in a chunk of the right length, or None.

    One pass at the speed of a sum, without a copy; the search by name runs only when there is something to find.
    """
    piece = frame.plan.pieces[index]
    if not piece.held.is_floating_point:
        return None
    values = torch.frombuffer(chunk, dtype=piece.held)
    if _all_finite(values):
        return None
    place = piece.start + int(values.isfinite().logical_not().nonzero()[0])
    entries = (entry for entry in frame.plan.layout.entries if entry.dtype == piece.dtype)
    return next(entry.name for entry in entries if entry.offset <= place < entry.offset + entry.numel)


def refuse_non_finite(frame: Frame, index: int, chunk: bytes | memoryview) -> None:
    """Raises Refused (non-finite): a chunk of the right length holds NaN or infinity; names the tensor."""
    bad = first_bad(frame, index, chunk)
    if bad is not None:
        raise Refused(Refusal.NON_FINITE, f"the update holds NaN or infinity in {bad!r}")


def _all_finite(values: Tensor) -> bool:
    # as in model/tensors.py: NaN and infinity never leave a sum; only a sum that overflowed needs the exact test
    return math.isfinite(values.sum().item()) or all(math.isfinite(end.item()) for end in values.aminmax())


def _metrics(given: Mapping[str, float]) -> dict[str, float]:
    if len(given) > MAX_METRICS:
        raise malformed(f"a manifest with {len(given)} metrics; {MAX_METRICS} are allowed")
    for name, value in given.items():
        check_text("a metric's name", name, METRIC)
        if not math.isfinite(value):
            raise Refused(Refusal.NON_FINITE, f"metric {name!r} is {value}", hint="lower training.lr")
        if abs(value) > MAX_METRIC:
            raise malformed(f"metric {name!r} is {value:g}; its size may be {MAX_METRIC:g} at most")
    return dict(sorted(given.items()))


def check_text(what: str, text: str, pattern: re.Pattern[str]) -> None:
    """Raises Refused (malformed): the text is not what the pattern describes."""
    if not pattern.fullmatch(text):
        raise malformed(f"{what} is {_short(text)}")


def malformed(message: str) -> Refused:
    return Refused(Refusal.MALFORMED, message)


def _short(text: str) -> str:
    return ascii(text[:80]) + (f" … ({len(text)} characters)" if len(text) > 80 else "")


def _told(channels: tuple[Channel, ...]) -> list[str]:
    return [channel.name[:80] + (" (wide)" if channel.wide else "") for channel in islice(channels, 8)]


def _wrong_shape(message: str) -> Refused:
    return Refused(Refusal.WRONG_SHAPE, f"the update does not fit the run: {message}")


def _corrupt(message: str) -> Refused:
    return Refused(
        Refusal.CORRUPT_CHUNK, message, hint="send it again; only damage on the way or on disk explains it", retry=True
    )

"""What a relay says of its region's sum: the sites' signed manifests, their weight in all, and where its bytes belong.

The tensors are a frame like an update's, of the same channels, but wide: a sum of narrow numbers is held in float32.
Whose manifests they are is for the receiver to check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..model.tensors import Layout
from .decode import decode
from .frames import LIMITS, Channel, Frame, Limits, parse_header
from .manifest import DIGEST, RUN, SITE, TASK, ParsedManifest, check_text, malformed, parse_manifest
from .protocol_pb2 import Partial, SignedManifest, SignedPartial
from .refusals import Refusal, Refused
from .service import MAX_MESSAGE_BYTES

#: sites of one region in one round
MAX_MEMBERS = 1000


@dataclass(frozen=True)
class ParsedPartial:
    """A partial sum whose every value is within its bounds.

    Args:
        members: the manifests of the updates that were added up, each as it was signed and as it was read.
    """

    run: str
    round: int
    task: str
    relay: str
    base: str
    frame: Frame
    members: tuple[tuple[SignedManifest, ParsedManifest], ...]
    total_weight: float

    @property
    def site(self) -> str:
        """Who sends it, as an upload's row has it."""
        return self.relay

    @property
    def sites(self) -> tuple[str, ...]:
        """Whose updates are in it, in the order in which they were added."""
        return tuple(manifest.site for _, manifest in self.members)


def sum_channels(channels: tuple[str, ...]) -> tuple[Channel, ...]:
    """The channels of a sum of updates with these channels."""
    return tuple(Channel(name, wide=True) for name in channels)


def parse_partial(signed: SignedPartial, *, limits: Limits = LIMITS) -> ParsedPartial:
    """Read a partial sum that came from elsewhere. No signature is checked here.

    Raises:
        Refused (malformed, too-large, bad-weight, …): as `parse_manifest`, for the partial and for each manifest in it.
    """
    if len(signed.partial) > MAX_MESSAGE_BYTES:
        raise Refused(Refusal.TOO_LARGE, f"a partial sum's manifest of {len(signed.partial):,} bytes")
    message = decode(Partial, signed.partial, strict=True)
    check_text("a partial sum's run", message.run, RUN)
    check_text("a partial sum's task", message.task, TASK)
    check_text("a partial sum's relay", message.relay, SITE)
    check_text("a partial sum's base", message.base, DIGEST)
    if not 0 < len(message.members) <= MAX_MEMBERS:
        raise malformed(f"a partial sum of {len(message.members)} updates; 1 to {MAX_MEMBERS:,} are allowed")
    if not (math.isfinite(message.total_weight) and message.total_weight > 0):
        raise Refused(Refusal.BAD_WEIGHT, f"a partial sum of weight {message.total_weight}")
    members = tuple((member, parse_manifest(member, limits=limits)) for member in message.members)
    sites = [manifest.site for _, manifest in members]
    if len(set(sites)) != len(sites):
        raise malformed("a partial sum in which a site is twice")
    return ParsedPartial(
        message.run,
        message.round,
        message.task,
        message.relay,
        message.base,
        parse_header(message.frame, limits),
        members,
        message.total_weight,
    )


def check_sum_frame(frame: Frame, layout: Layout, channels: tuple[str, ...], *, chunk_bytes: int) -> None:
    """Raises Refused (wrong-shape): the sums are not those of the run's tensors."""
    plan = frame.plan
    if plan.layout != layout or plan.channels != sum_channels(channels) or plan.chunk_bytes != chunk_bytes:
        raise Refused(
            Refusal.WRONG_SHAPE,
            f"the partial sum does not fit the run: its tensors, channels or chunk size are not those of the sum of "
            f"{', '.join(channels)}",
        )

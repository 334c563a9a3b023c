"""Why something that arrived was refused: a closed list, so that a program can tell, with a reason for people."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from ..errors import UpdateRefused


class Refusal(StrEnum):
    """Kinds of refusals. All of them are final, except `corrupt-chunk`: that chunk is asked for again."""

    MALFORMED = "malformed"
    BAD_SIGNATURE = "bad-signature"
    WRONG_SITE = "wrong-site"
    UNKNOWN_RUN = "unknown-run"
    RUN_ENDED = "run-ended"
    WRONG_TASK = "wrong-task"
    NOT_INVITED = "not-invited"
    ROUND_CLOSED = "round-closed"
    ENOUGH = "enough"
    REPLAYED = "replayed"
    STALE = "stale"
    WRONG_BASE = "wrong-base"
    WRONG_SHAPE = "wrong-shape"
    TOO_LARGE = "too-large"
    NON_FINITE = "non-finite"
    BAD_WEIGHT = "bad-weight"
    CORRUPT_CHUNK = "corrupt-chunk"
    FORBIDDEN = "forbidden"


#: what each code tells whoever sent what was refused
MEANING: Mapping[Refusal, str] = MappingProxyType(
    {
        Refusal.MALFORMED: "the bytes cannot be read, are not in canonical form, or say something out of bounds",
        Refusal.BAD_SIGNATURE: "the signature is not by the key in the sender's certificate, over these bytes",
        Refusal.WRONG_SITE: "the manifest names another site than the certificate",
        Refusal.UNKNOWN_RUN: "there is no such run",
        Refusal.RUN_ENDED: "the run is finished, failed or cancelled",
        Refusal.WRONG_TASK: "the task is not one of this run, round and site",
        Refusal.NOT_INVITED: "the site is not in the round's cohort",
        Refusal.ROUND_CLOSED: "the round has been committed, or its deadline has passed",
        Refusal.ENOUGH: "the round has all the answers that it asked for",
        Refusal.REPLAYED: "another update of this site counts in this round already, or lies in this version's buffer",
        Refusal.STALE: "the work began from a version that lies further back than the strategy's `max_staleness`",
        Refusal.WRONG_BASE: "the work began from other global tensors than the task's",
        Refusal.WRONG_SHAPE: "tensors, channels or chunk size are not those asked for; the reason names what differs",
        Refusal.TOO_LARGE: "more bytes, tensors or values than are allowed",
        Refusal.NON_FINITE: "NaN or infinity in a tensor, which is named, or in a metric",
        Refusal.BAD_WEIGHT: "trained on nothing, or on an impossible number of examples, tokens or steps",
        Refusal.CORRUPT_CHUNK: "the chunk is not what its digest says; it is asked for again",
        Refusal.FORBIDDEN: "the sender may not do this",
    }
)


def markdown() -> str:
    """The table for the docs: a row a code."""
    return "".join(["| code | why |\n", "|---|---|\n", *(f"| `{code}` | {MEANING[code]} |\n" for code in Refusal)])


class Refused(UpdateRefused):
    """Something that arrived is refused; nothing of it was used."""

    def __init__(self, code: Refusal, message: str, *, hint: str = "", retry: bool = False) -> None:
        super().__init__(message, hint=hint, retry=retry)
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.code, self.message, self.hint, self.retry))


def _rebuild(code: Refusal, message: str, hint: str, retry: bool) -> Refused:
    return Refused(code, message, hint=hint, retry=retry)

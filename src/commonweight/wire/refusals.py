"""Why something that arrived was refused: a closed list, so that a program can tell, with a reason for people."""

from __future__ import annotations

from enum import StrEnum

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
    WRONG_BASE = "wrong-base"
    WRONG_SHAPE = "wrong-shape"
    TOO_LARGE = "too-large"
    NON_FINITE = "non-finite"
    BAD_WEIGHT = "bad-weight"
    CORRUPT_CHUNK = "corrupt-chunk"
    FORBIDDEN = "forbidden"


class Refused(UpdateRefused):
    """Something that arrived is refused; nothing of it was used."""

    def __init__(self, code: Refusal, message: str, *, hint: str = "", retry: bool = False) -> None:
        super().__init__(message, hint=hint, retry=retry)
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.code, self.message, self.hint, self.retry))


def _rebuild(code: Refusal, message: str, hint: str, retry: bool) -> Refused:
    return Refused(code, message, hint=hint, retry=retry)

"""Everything that can go wrong and be explained to a person.

    CommonweightError                 exit code 1
    ├── RecipeError                   2   the recipe, an option or an argument is wrong
    ├── DataError                     3   the data cannot be read, split or tokenised
    ├── ModelError                    4   the base model, tokenizer or adapter cannot be used
    ├── RoundError                    5   a round could not be completed
    │   ├── QuorumError                   fewer sites answered than the recipe's minimum
    │   ├── SiteError                     one site's task failed; the round may go on without it
    │   ├── BudgetError                   a release would cost more privacy than the ledger's budget has left
    │   └── UpdateRefused                 an update broke its contract: shape, non-finite, unknown site …
    ├── StateError                    6   a run's folder is damaged, or does not fit what was asked of it
    ├── StorageError                  7   a folder, database or blob store cannot be written: permissions, a full disk
    ├── AccessError                   8   an identity, certificate, token or role is not good enough
    ├── UnreachableError              9   the other side of a connection cannot be reached
    └── PolicyError                   10  a site's own policy says no

Exit code 130 means interrupted by Ctrl-C; 11, which is no error, that a leak audit has refuted what a run claims. A
message says what was wrong and where; `hint` says what to do; `retry` says whether the same command may simply be
repeated. Only a defect in commonweight itself ends in a traceback.
"""

from __future__ import annotations

EXIT_REFUTED = 11
EXIT_INTERRUPTED = 130


class CommonweightError(Exception):
    """An error for a person.

    Args:
        message: what was wrong, and where.
        hint: what to do about it.
        retry: True when repeating the same command may succeed and loses nothing.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", retry: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.retry = retry

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint, self.retry))


def _rebuild(kind: type[CommonweightError], message: str, hint: str, retry: bool) -> CommonweightError:
    return kind(message, hint=hint, retry=retry)


class RecipeError(CommonweightError):
    exit_code = 2


class DataError(CommonweightError):
    exit_code = 3


class ModelError(CommonweightError):
    exit_code = 4


class RoundError(CommonweightError):
    exit_code = 5


class QuorumError(RoundError):
    pass


class SiteError(RoundError):
    pass


class BudgetError(RoundError):
    pass


class UpdateRefused(RoundError):
    pass


class StateError(CommonweightError):
    exit_code = 6


class StorageError(CommonweightError):
    exit_code = 7


class AccessError(CommonweightError):
    exit_code = 8


class UnreachableError(CommonweightError):
    exit_code = 9


class PolicyError(CommonweightError):
    exit_code = 10

"""What the commands of a networked federation share: times, tokens, identities, what a word for a run means."""

from __future__ import annotations

import getpass
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AccessError, CommonweightError, RecipeError, StateError, StorageError

if TYPE_CHECKING:
    from ..identity.folder import IdentityFolder
    from ..identity.tokens import Token
    from ..lead.client import Client

DEFAULT_IDENTITY = Path("~/.config/commonweight/identity")

TokenArgument = Annotated[
    str,
    typer.Argument(
        help="The one-time token: its text, @FILE to read it from a file, or - from standard input.", metavar="TOKEN"
    ),
]
IdentityOption = Annotated[
    Path,
    typer.Option("--identity", envvar="COMMONWEIGHT_IDENTITY", help="Your identity's folder.", metavar="FOLDER"),
]
WhichArgument = Annotated[
    str, typer.Argument(help="A run's id, the beginning of it, or its name (the latest of that name).", metavar="RUN")
]

_SHORT = 8
_MOST_TOKEN_BYTES = 1 << 16


def read_token(text: str) -> str:
    """A token's text, from where the argument says.

    Raises:
        RecipeError: there is none there.
        StorageError: the file cannot be read.
    """
    if text == "-":
        found = sys.stdin.read(_MOST_TOKEN_BYTES)
    elif text.startswith("@"):
        found = _file(Path(text[1:]).expanduser())
    else:
        found = text
    if not found.strip():
        where = {"-": "standard input"}.get(text, text or "TOKEN")
        raise RecipeError(
            f"there is no token: {where} is empty", hint="an admin makes one: commonweight coordinator enroll"
        )
    return found


def _file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_TOKEN_BYTES).decode("ascii", "replace")
    except OSError as error:
        raise StorageError(
            f"the token's file {path} cannot be read: {error.strerror}", hint="correct the path"
        ) from error


#: who joins by a command of its own; all others by `join TOKEN`
JOINING = {"site": "site join TOKEN DIR", "relay": "relay join TOKEN DIR"}


def check_joiner(token: Token, *, role: str = "") -> None:
    """Refuse a site's token where users join, and the other way round, before it is used.

    Args:
        role: whose command it is, of `JOINING`; "": the users'.

    Raises:
        AccessError: it is for another command.
    """
    if (token.role if token.role in JOINING else "") != role:
        command = JOINING.get(token.role, "join TOKEN")
        raise AccessError(f"this token lets {token.name} in as {token.role}", hint=f"use it by: commonweight {command}")


def enrol_into(text: str, name: str, folder: Path) -> IdentityFolder:
    """Enrol by a token; one who has enrolled before does so anew, with the same keys.

    Raises:
        AccessError: the folder is somebody else's, or as `enrol`. What was there before stays.
    """
    from ..identity.enrol import enrol
    from ..identity.folder import IdentityFolder

    certificate, before = folder / "tls.pem", folder / "tls.pem.before"
    if not certificate.exists():
        return enrol(text, folder)
    holder = IdentityFolder.open(folder).holder
    if holder.name != name:
        raise AccessError(
            f"{folder} is the identity of {holder.name}, and the token is for {name}", hint="choose another folder"
        )
    certificate.replace(before)
    try:
        found = enrol(text, folder)
    except BaseException:
        before.replace(certificate)
        raise
    before.unlink()
    return found


@contextmanager
def connected(identity: Path) -> Iterator[Client]:
    """A connection to the coordinator, by the user's identity.

    Raises:
        AccessError: there is no identity, or the coordinator does not accept it.
        UnreachableError: it cannot be reached.
    """
    from ..lead.client import Client

    folder = identity.expanduser()
    if not folder.is_dir():
        raise AccessError(
            f"you have no identity in {folder}",
            hint="join with an admin's token (commonweight join TOKEN), or name its folder by --identity",
        )
    with Client(folder) as client:
        yield client


def who() -> str:
    """The person at this machine, for logs that say who did something."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return "local"


def short(run: str) -> str:
    """A run's id as people type it."""
    return run[:_SHORT]


def moment(seconds: float | None) -> str:
    """Seconds since the epoch, to the second, as people write it; nothing for None."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def span(seconds: float) -> str:
    """A span of time for people: `45 s`, `12 min`, `3.5 h`, `20 days`."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def since_when(text: str, *, now: Callable[[], float] = time.time) -> float:
    """Seconds since the epoch, from a date, `2026-03-01`, a time, `2026-03-01T12:00`, or how long ago, `36h`.

    Raises:
        RecipeError: it is none of these.
    """
    number, unit = text[:-1], {"m": 60.0, "h": 3600.0, "d": 86400.0}.get(text[-1:])
    if unit is not None and number.isdecimal():
        return now() - int(number) * unit
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise RecipeError(
            f"--since {text} is no time",
            hint="a date, 2026-03-01, a time, 2026-03-01T12:30, or how long ago: 90m, 36h, 7d",
        ) from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def head_of(text: str) -> tuple[int, bytes]:
    """An audit log's head as people pass it on: `SEQUENCE:HASH`.

    Raises:
        RecipeError: it is none.
    """
    sequence, _, digest = text.partition(":")
    try:
        found = int(sequence), bytes.fromhex(digest)
    except ValueError:
        found = -1, b""
    if found[0] < 0 or len(found[1]) != 32:
        raise RecipeError(
            f"--head {text[:100]} is no head of an audit log",
            hint="SEQUENCE:HASH, as `commonweight site status DIR` prints it: 412:9f86d081…",
        )
    return found


def one_of(which: str, known: Mapping[str, str], *, what: str) -> str:
    """The id that a person means by an id, the beginning of one, or a name (the latest of that name).

    Args:
        known: name by id, the oldest first.
        what: what is listed, for the message.

    Raises:
        StateError: it is none of them, or several.
    """
    found = [which] if which in known else [id for id, name in known.items() if name == which][-1:]
    if not found and len(which) >= 4:
        found = [id for id in known if id.startswith(which)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{short(id)} ({name})" for id, name in list(known.items())[-5:]) or "none"
    raise StateError(
        f"{'several runs begin' if found else 'no run is called, or begins,'} {which!r}", hint=f"{what}: {listed}"
    )


def audit_line(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """An entry of the coordinator's audit log as a table's row."""
    details = ", ".join(f"{key} {_brief(value)}" for key, value in entry["details"].items() if value not in ("", None))
    return (
        str(entry["sequence"]),
        moment(entry["t"]),
        entry["actor"],
        entry["action"],
        _brief(entry["subject"]),
        details,
    )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def verified(entries: Iterable[Any], head: tuple[int, bytes] | None) -> tuple[int, str]:
    """Check a whole audit log of the coordinator, against a head kept elsewhere if there is one; its own head.

    Raises:
        StateError: it was changed.
    """
    from ..coordinator.audit import verify_chain, verify_head

    whole = list(entries)
    if head is not None:
        verify_head(whole, *head)
    sequence, digest = verify_chain(whole)
    return sequence, digest.hex()


def told(error: CommonweightError) -> str:
    """An error as part of a sentence."""
    return f"{error.message}{f' ({error.hint})' if error.hint else ''}"

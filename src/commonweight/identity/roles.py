"""Who may call what: one table of roles and methods, and how names look.

A method is named by its service and its name, `Control/Submit`. Whatever is not in the table is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from ..errors import AccessError

SITE, RELAY, LEAD, ADMIN, AUDITOR, COORDINATOR = ROLES = ("site", "relay", "lead", "admin", "auditor", "coordinator")

#: what each role is for, in a line
MEANING: Mapping[str, str] = MappingProxyType(
    {
        SITE: "holds data: takes tasks, sends updates",
        RELAY: "adds up the updates of a region's sites, and sends the sum",
        LEAD: "submits runs, follows them, takes their results",
        ADMIN: "looks after the coordinator: sees and cancels runs, reads the audit",
        AUDITOR: "reads: runs, their results, the audit; changes nothing",
        COORDINATOR: "serves the others; calls nothing",
    }
)

#: who serve at an end of TLS
SERVERS = frozenset({COORDINATOR, RELAY})
#: whose signature on a job counts
SIGNING_ROLES = (LEAD, ADMIN)

_USERS = frozenset({LEAD, ADMIN, AUDITOR})

#: the roles that may call each method; Enrolment is not here, for its callers have no certificate yet
MAY: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "Federation/Attend": frozenset({SITE, RELAY}),
        "Federation/GetJob": frozenset({SITE, RELAY}),
        "Federation/OpenAhead": frozenset({SITE}),
        "Federation/OpenUpload": frozenset({SITE}),
        "Federation/OpenPartial": frozenset({RELAY}),
        "Federation/Region": frozenset({RELAY}),
        "Federation/CatchUp": frozenset({SITE}),
        "Federation/Renew": frozenset({SITE, RELAY}),
        "Transfer/Fetch": frozenset({SITE}) | _USERS,
        "Transfer/Push": frozenset({SITE, RELAY, LEAD}),
        "Control/Submit": frozenset({LEAD}),
        "Control/ListRuns": _USERS,
        "Control/GetRun": _USERS,
        "Control/Watch": _USERS,
        "Control/Cancel": frozenset({LEAD, ADMIN}),
        "Control/ListSites": _USERS,
        "Control/ReadLedger": _USERS,
        "Control/GetFile": _USERS,
        "Control/ReadAudit": frozenset({ADMIN, AUDITOR}),
        "Control/Renew": _USERS,
    }
)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def may(role: str, method: str) -> bool:
    """Whether a role may call a method, named as gRPC does (`/commonweight.v1.Control/Submit`) or `Control/Submit`."""
    return role in MAY.get(method.removeprefix("/").removeprefix("commonweight.v1."), ())


def check_role(role: str) -> str:
    """The role, if it is one.

    Raises:
        AccessError: it is none of `ROLES`.
    """
    if role not in ROLES:
        raise AccessError(f"{_shown(role)} is no role", hint=f"the roles are: {', '.join(ROLES)}")
    return role


def check_name(name: str) -> str:
    """The name of a site or a user, if it is well formed: 1 to 63 of a-z, 0-9, `.`, `_`, `-`, a letter or digit first.

    Raises:
        AccessError: it is not.
    """
    if not NAME.fullmatch(name):
        raise AccessError(
            f"{_shown(name)} cannot be a name",
            hint="1 to 63 lower-case letters, digits, '.', '_' or '-', a letter or digit first: clinic-north",
        )
    return name


def markdown() -> str:
    """The table for the docs: a row a method, a column a role."""
    callers = [role for role in ROLES if any(role in roles for roles in MAY.values())]
    lines = [f"| method | {' | '.join(callers)} |", "|---" * (len(callers) + 1) + "|"]
    for method, roles in MAY.items():
        lines.append(f"| `{method}` | {' | '.join('yes' if role in roles else '' for role in callers)} |")
    return "\n".join(lines) + "\n"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "…")

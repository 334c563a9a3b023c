"""One-time tokens: how a site or a user that has nothing yet is let in.

An admin makes a token on the coordinator's machine and hands it over by a way that both trust. It names whom it lets
in, carries a secret that works once, and the authority's certificate, so that the joining side knows the coordinator
from the first byte on. The coordinator keeps no more of the secret than its SHA-256.

Its text is `cw1.` and the base64url (RFC 4648) of a JSON object.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import secrets
import time
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import AccessError
from .certificates import load_authority
from .roles import COORDINATOR, check_name, check_role

TOKEN_HOURS = 24.0
PREFIX = "cw1."

_SECRET_BYTES = 32
_SECRET = r"[A-Za-z0-9_-]{43}"
_MOST_CHARACTERS = 1 << 14
_AGAIN = "copy it whole, or ask the federation's admin for a new one"
_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<host>[A-Za-z0-9._-]{1,253})):(?P<port>[0-9]{1,5})")


def check_address(address: str) -> str:
    """An address as gRPC dials it, `host:port` or `[IPv6]:port`, if it is one.

    Raises:
        AccessError: it is not.
    """
    parts = _ADDRESS.fullmatch(address)
    if not parts or not 0 < int(parts["port"]) < 65536:
        raise AccessError(f"{address[:80]!r} is no address", hint="host:port, as in fed.example.org:8443")
    return address


def _joining(role: str) -> str:
    if check_role(role) == COORDINATOR:
        raise AccessError("no token makes a coordinator", hint="a coordinator makes its own certificate")
    return role


def _authority(pem: str) -> str:
    load_authority(pem.encode())
    return pem


class Token(BaseModel):
    """A one-time token; whoever has its text can join as `name`.

    Args:
        name, role: whom it lets in.
        secret: 32 random bytes, base64url.
        address: of the coordinator's services, host:port.
        enrolment: of the coordinator's enrolment, host:port.
        authority: PEM of the authority's certificate.
        expires_at: seconds since the epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: Annotated[str, AfterValidator(check_name)]
    role: Annotated[str, AfterValidator(_joining)]
    secret: str = Field(pattern=f"^{_SECRET}$", repr=False)
    address: Annotated[str, AfterValidator(check_address)]
    enrolment: Annotated[str, AfterValidator(check_address)]
    authority: Annotated[str, AfterValidator(_authority)] = Field(repr=False)
    expires_at: float = Field(gt=0)

    @classmethod
    def make(
        cls,
        *,
        name: str,
        role: str,
        address: str,
        enrolment: str,
        authority_pem: bytes,
        hours: float = TOKEN_HOURS,
        now: float | None = None,
    ) -> Self:
        """A new token with a secret of its own, good for `hours` from `now` (seconds since the epoch; None: the clock).

        Raises:
            AccessError: one of these is malformed.
        """
        if not 0 < hours <= 24 * 366:
            raise AccessError(f"a token cannot be for {hours:g} hours", hint="more than 0, and up to a year")
        return cls._checked(
            {
                "name": name,
                "role": role,
                "secret": _text(secrets.token_bytes(_SECRET_BYTES)),
                "address": address,
                "enrolment": enrolment,
                "authority": authority_pem.decode("ascii", "replace"),
                "expires_at": (time.time() if now is None else now) + 3600 * hours,
            },
            "the token cannot be made",
        )

    @property
    def secret_hash(self) -> str:
        """What the coordinator keeps of the secret (`hash_secret`)."""
        return hash_secret(self.secret)

    def check_time(self, at: float) -> None:
        """Refuse a token that has expired at `at` (seconds since the epoch).

        Raises:
            AccessError: it has.
        """
        if at >= self.expires_at:
            raise AccessError(f"the token for {self.name} has expired", hint="ask the federation's admin for a new one")

    def to_text(self) -> str:
        """One line without spaces. Its `check` field finds slips in copying; it protects nothing."""
        values = self.model_dump()
        return PREFIX + _text(_canonical({**values, "check": _check(values)}))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `to_text` wrote; white space and line breaks within, as mail adds them, are dropped.

        Raises:
            AccessError: it is cut, changed, or no token. No message repeats any of it.
        """
        if len(text) > _MOST_CHARACTERS:
            raise AccessError("this is too long to be a token", hint=_AGAIN)
        packed = "".join(text.split())
        if not packed.startswith(PREFIX):
            raise AccessError(f"this is no token of commonweight: it does not begin with {PREFIX!r}", hint=_AGAIN)
        values = _values(packed.removeprefix(PREFIX))
        if values.pop("check", None) != _check(values):
            raise AccessError("the token was changed since it was made, or a part of it is missing", hint=_AGAIN)
        return cls._checked(values, "the token is not well formed")

    @classmethod
    def _checked(cls, values: dict[str, Any], failure: str) -> Self:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            fields = ", ".join(sorted({".".join(map(str, problem["loc"])) for problem in error.errors()}))
            raise AccessError(f"{failure}: {fields}", hint=_AGAIN) from None  # its own text would show the secret


def hash_secret(secret: str) -> str:
    """SHA-256 of a token's secret (its base64url text), lower-case hex: 32 random bytes need no salt, no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _values(packed: str) -> dict[str, Any]:
    try:
        values = json.loads(base64.b64decode(packed + "=" * (-len(packed) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise AccessError("the token is cut, or was changed", hint=_AGAIN) from error
    if not isinstance(values, dict):
        raise AccessError("the token is cut, or was changed", hint=_AGAIN)
    return values


def _check(values: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(values)).hexdigest()[:16]


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

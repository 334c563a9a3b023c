"""Who may come in: one-time tokens, those who enrolled with them, and their certificates."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from ..errors import AccessError
from .audit import append
from .database import Part, Writing, found, insert_if_new, reading, upsert, writing
from .tables import certificates, principals, tokens

ACTIVE, REVOKED = "active", "revoked"
#: certificates that ended longer ago than this are forgotten
_KEPT_S = 30 * 86400.0
#: for so long after it was used, a token is answered again to the key that used it: the first answer may have been lost
_REPEAT_S = 900.0


@dataclass(frozen=True)
class Principal:
    """Someone who enrolled: a site or a user.

    Args:
        signing_key: Ed25519 public key, 32 bytes, pinned since enrolment.
        state: `active` or `revoked`.
        reason: why it is in that state.
    """

    name: str
    role: str
    signing_key: bytes
    enrolled_at: float
    state: str
    reason: str = ""


class AccessPart(Part):
    """Tokens, principals and certificates in the store. Topic: `access`."""

    @writing
    def add_token(
        self, tx: Writing, secret_hash: str, name: str, role: str, expires_at: float, by: str, *, replace: bool = False
    ) -> None:
        """A token may now be used, once, until `expires_at`.

        Args:
            secret_hash: hex SHA-256 of its secret; the secret itself is never stored.
            replace: it may take a name over that is enrolled with another key or role, or revoked.
        """
        row = {
            "secret_hash": secret_hash,
            "name": name,
            "role": role,
            "expires_at": expires_at,
            "replace": replace,
            "made_by": by,
            "made_at": tx.now,
        }
        tx.execute(tokens.insert(), row)
        append(tx, "token made", actor=by, subject=name, role=role, replace=replace, expires_at=expires_at)

    @writing
    def redeem_token(self, tx: Writing, secret_hash: str, signing_key: bytes) -> tuple[str, str]:
        """Enrol by a token: exactly one key ever succeeds with one. Returns the name and the role that it grants.

        The same key may repeat the call within 15 minutes, should the answer have been lost on its way.

        Raises:
            AccessError: the token is unknown, used or expired, or its name is enrolled with another key or role, or
                revoked, and the token does not say `replace`. The token is not used up then.
        """
        spend = (
            tokens.update()
            .where(tokens.c.secret_hash == secret_hash, tokens.c.used_at.is_(None), tokens.c.expires_at > tx.now)
            .values(used_at=tx.now)
            .returning(tokens.c.name, tokens.c.role, tokens.c.replace)
        )
        token = tx.execute(spend).one_or_none()
        if token is None:
            if (again := _used_by(tx, secret_hash, signing_key)) is not None:
                return again
            raise _token_refused(tx, secret_hash)
        known = tx.execute(sa.select(principals).where(principals.c.name == token.name).with_for_update()).one_or_none()
        changed = known is not None and (known.signing_key, known.role) != (signing_key, token.role)
        if known is not None and (changed or known.state != ACTIVE):
            if not token.replace:
                raise _name_taken(known)
            tx.execute(certificates.update().where(certificates.c.name == token.name).values(replaced=True))
        principal = Principal(token.name, token.role, signing_key, tx.now, ACTIVE)
        if known is None:
            if not insert_if_new(
                tx, principals, vars(principal)
            ):  # another token for the same name was used in this very moment
                raise AccessError(f"{token.name!r} is being enrolled by somebody else", retry=True)
        else:
            upsert(tx, principals, vars(principal))
        append(tx, "enrolled", actor=token.name, subject=token.name, role=token.role, signing_key=signing_key.hex())
        tx.publish("access")
        return token.name, token.role

    @reading
    def principals(self, connection: sa.Connection, role: str | None = None) -> list[Principal]:
        """Everyone who enrolled, revoked ones too, by name."""
        query = sa.select(principals).order_by(principals.c.name)
        rows = connection.execute(query if role is None else query.where(principals.c.role == role)).mappings()
        return [Principal(**row) for row in rows]

    @reading
    def principal(self, connection: sa.Connection, name: str) -> Principal | None:
        row = connection.execute(sa.select(principals).where(principals.c.name == name)).mappings().one_or_none()
        return None if row is None else Principal(**row)

    @writing
    def set_state(self, tx: Writing, name: str, state: str, reason: str, by: str) -> None:
        """Revoke a principal, with all its certificates, or let it in again.

        Raises:
            StateError: nobody of that name has enrolled.
        """
        if state not in (ACTIVE, REVOKED):
            raise ValueError(state)
        change = principals.update().where(principals.c.name == name).values(state=state, reason=reason)
        found(tx.execute(change.returning(principals.c.name)).one_or_none(), f"{name!r}")
        append(tx, "revoked" if state == REVOKED else "let in again", actor=by, subject=name, reason=reason)
        tx.publish("access")

    @writing
    def add_certificate(self, tx: Writing, serial: str, name: str, not_after: float) -> None:
        """A certificate was issued. One that is not here is not let in.

        Args:
            serial: hex.
        """
        old = certificates.delete().where(certificates.c.name == name, certificates.c.not_after < tx.now - _KEPT_S)
        tx.execute(old)
        upsert(tx, certificates, {"serial": serial, "name": name, "not_after": not_after, "replaced": False})
        append(tx, "certificate issued", actor="coordinator", subject=name, serial=serial, not_after=not_after)

    @reading
    def revoked_serials(self, connection: sa.Connection) -> frozenset[str]:
        """Certificates that still run but are not let in: their holder is revoked, or enrolled anew with other keys."""
        query = (
            sa.select(certificates.c.serial)
            .join(principals)
            .where(
                certificates.c.not_after > self.database.clock(),
                certificates.c.replaced.is_(True) | (principals.c.state != ACTIVE),
            )
        )
        return frozenset(connection.execute(query).scalars())

    @reading
    def is_allowed(self, connection: sa.Connection, name: str, serial: str) -> bool:
        """Whether `name` is enrolled and not revoked, and this certificate is its own and not replaced."""
        query = (
            sa.select(sa.literal(1))
            .select_from(certificates.join(principals))
            .where(
                certificates.c.serial == serial,
                certificates.c.name == name,
                certificates.c.replaced.is_(False),
                principals.c.state == ACTIVE,
            )
        )
        return connection.execute(query).first() is not None


def _used_by(tx: Writing, secret_hash: str, signing_key: bytes) -> tuple[str, str] | None:
    """What a token granted a moment ago, to this key, which still holds it."""
    query = (
        sa.select(tokens.c.name, tokens.c.role)
        .join(principals, principals.c.name == tokens.c.name)
        .where(
            tokens.c.secret_hash == secret_hash,
            tokens.c.expires_at > tx.now,
            tokens.c.used_at > tx.now - _REPEAT_S,
            principals.c.signing_key == signing_key,
            principals.c.role == tokens.c.role,
            principals.c.state == ACTIVE,
        )
    )
    row = tx.execute(query).one_or_none()
    return None if row is None else (row.name, row.role)


def _token_refused(tx: Writing, secret_hash: str) -> AccessError:
    token = tx.execute(sa.select(tokens).where(tokens.c.secret_hash == secret_hash)).one_or_none()
    hint = "ask the coordinator's operator for a new one"
    if token is None:
        return AccessError("this enrolment token is not known to the coordinator", hint=hint)
    if token.used_at is not None:
        return AccessError(f"the enrolment token for {token.name!r} was used already", hint=hint)
    return AccessError(f"the enrolment token for {token.name!r} has expired", hint=hint)


def _name_taken(known: sa.Row[tuple[object, ...]]) -> AccessError:
    how = "is revoked" if known.state != ACTIVE else f"is enrolled already, as {known.role}, with its own key"
    return AccessError(
        f"{known.name!r} {how}", hint="enrol under another name, or ask for a token that may replace the enrolment"
    )

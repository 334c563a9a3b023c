"""Joining a federation: a one-time token becomes an identity folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import AccessError, CommonweightError, UnreachableError
from . import tls  # before grpc: it makes TLS 1.3 the lowest version
from .folder import IdentityFolder
from .tokens import Token

import grpc  # isort: skip

from ..wire.protocol_pb2 import EnrolReply, EnrolRequest
from ..wire.service import ENROLMENT, HINT_KEY, PROTOCOL_MAX, channel_options, stub

_PATIENCE_S = 20.0


def enrol(text: str, folder: Path) -> IdentityFolder:
    """Use a token to make `folder` an identity. Safe to repeat: the keys stay, and an unused token stays good.

    Args:
        text: the token as `coordinator enroll` printed it.

    Raises:
        AccessError: the token is damaged, used, expired or not known, or the folder has an identity already.
        UnreachableError: the coordinator's enrolment cannot be reached.
        StorageError: the folder cannot be written.
    """
    token = Token.from_text(text)
    token.check_time(time.time())
    asked = IdentityFolder.prepare(folder)
    request = EnrolRequest(
        protocol=PROTOCOL_MAX,
        secret=token.secret,
        csr=asked.csr,
        signing_key=asked.signing_key,
        possession=asked.possession,
    )
    reply = _ask(token, request)
    return IdentityFolder.complete(
        folder,
        name=token.name,
        role=token.role,
        certificate=reply.certificate,
        authority=token.authority.encode(),
        address=token.address,
    )


def _ask(token: Token, request: EnrolRequest) -> EnrolReply:
    credentials = tls.enrolment_channel_credentials(token.authority.encode())
    options = [*channel_options(), *tls.TARGET_OPTIONS]
    with grpc.secure_channel(token.enrolment, credentials, options=options) as channel:
        try:
            reply: EnrolReply = stub(channel, ENROLMENT)["Enrol"](request, timeout=_PATIENCE_S, wait_for_ready=True)
        except grpc.RpcError as error:
            raise told(error, token.enrolment) from error
    return reply


def told(error: Any, address: str) -> CommonweightError:
    """What a coordinator said of a call that failed, or that it could not be reached, as an error for a person."""
    code, details = error.code(), error.details() or ""
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return UnreachableError(
            f"the coordinator at {address} cannot be reached: {_short(details)}",
            hint="check the address, that it is running, and that nothing in between lets the connection fall",
            retry=True,
        )
    said = _said(error.trailing_metadata() or ())
    hint, retry = str(said.get("hint", "")), bool(said.get("retry", False))
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return AccessError(details, hint=hint, retry=retry)
    kind = _kinds().get(str(said.get("kind")), CommonweightError)
    return kind(details, hint=hint, retry=retry)


def _said(metadata: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    raw = dict(metadata).get(HINT_KEY + "-bin", b"{}")
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _kinds() -> dict[str, type[CommonweightError]]:
    return {kind.__name__: kind for kind in CommonweightError.__subclasses__()}


def _short(text: str) -> str:
    return " ".join(text.split())[:200] or "no answer"

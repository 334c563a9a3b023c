"""Enrolment: a one-time token and a request for a certificate become an identity."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from ..errors import AccessError
from ..identity.certificates import holder_of, requested_key
from ..identity.keys import ENROL, verify
from ..wire.protocol_pb2 import EnrolReply, EnrolRequest
from ..wire.service import PROTOCOL_MAX, PROTOCOL_MIN
from .context import Context
from .guard import NOBODY, fail

#: what a caller without an identity may send at once
MAX_REQUEST_BYTES = 64 << 10
#: strangers that are heard at once; the others wait, so that they keep nobody else waiting
_AT_ONCE = 4


class EnrolmentService:
    """The service `Enrolment`, on a port of its own: its callers have no certificate yet."""

    def __init__(self, context: Context) -> None:
        self.here = context
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def Enrol(self, request: EnrolRequest, context: Any) -> EnrolReply:
        try:
            async with self._turns:
                return await self.here.away(self._enrol, request)
        except Exception as error:
            self.here.metrics.denied.labels("Enrolment/Enrol").inc()
            await fail(context, "Enrolment/Enrol", error)

    def _enrol(self, request: EnrolRequest) -> EnrolReply:
        try:
            name, role = self._redeemed(request)
        except AccessError as error:
            self.here.denials.note("enrolment refused", actor=NOBODY, reason=error.message)
            raise
        certificate = self.here.authority.issue(
            request.csr,
            name=name,
            role=role,
            signing_key=request.signing_key,
            hours=self.here.settings.certificate_hours,
        )
        issued = holder_of(certificate)
        self.here.store.add_certificate(issued.serial, name, issued.not_after)
        return EnrolReply(
            name=name,
            role=role,
            certificate=certificate,
            authority=self.here.authority.certificate_pem,
            address=self.here.settings.address,
        )

    def _redeemed(self, request: EnrolRequest) -> tuple[str, str]:
        """Name and role that the token is for. All else is looked at before: a slip must not use the token up."""
        if not PROTOCOL_MIN <= request.protocol <= PROTOCOL_MAX:
            raise AccessError(
                f"this coordinator speaks versions {PROTOCOL_MIN} to {PROTOCOL_MAX} of the protocol, "
                f"not {request.protocol}",
                hint="bring both sides to the same version of commonweight",
            )
        if not verify(request.signing_key, ENROL, request.csr, request.possession):
            raise AccessError("the request is not signed by the signing key that it brings")
        requested_key(request.csr)
        secret_hash = hashlib.sha256(request.secret.encode()).hexdigest()
        return self.here.store.redeem_token(secret_hash, request.signing_key)

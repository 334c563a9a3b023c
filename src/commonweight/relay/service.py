"""What a region's sites call at their relay: they open an upload and push its chunks, as they would at the coordinator.

The checks are the coordinator's own: signature, names, shapes, digests, finiteness, weight, steps. What has passed them
is held, not counted.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from ..coordinator.guard import Guard
from ..coordinator.pushes import Pushes
from ..errors import AccessError, UnreachableError
from ..identity.certificates import Holder
from ..identity.folder import IdentityFolder
from ..identity.roles import RELAY, SITE
from ..identity.tls import server_credentials
from ..wire.manifest import parse_manifest
from ..wire.protocol_pb2 import SignedManifest, UploadStatus
from ..wire.refusals import Refused
from ..wire.service import FEDERATION, TRANSFER, Parcel, channel_options
from .depot import Depot


class SitesOnly(Guard):
    """Lets in sites by the authority's certificate. Whether one was revoked, the coordinator knows: it takes no sum
    with an update of such a site in it."""

    def holder(self, context: Any, method: str) -> Holder:
        holder = super().holder(context, method)
        if holder.role != SITE:
            raise AccessError(f"a {holder.role} may not call {method} at a relay")
        return holder

    async def is_allowed(self, holder: Holder) -> bool:
        return holder.not_after >= time.time()


class RelayService(Pushes):
    """The methods `OpenUpload` and `Push`.

    Args:
        held: called when all of an update has come.
    """

    def __init__(self, depot: Depot, held: Callable[[], None]) -> None:
        super().__init__(depot)
        self.depot, self._held = depot, held

    async def OpenUpload(self, request: SignedManifest, holder: Holder, context: Any) -> UploadStatus:
        try:
            status = await self.depot.away(self._open, holder, request)
        except Refused as refused:
            return await self.depot.away(self._refused, holder, refused)
        return self._told(status)

    def _open(self, holder: Holder, signed: SignedManifest) -> UploadStatus:
        """As the coordinator does it; but a site may have finished before the relay has heard of the round.

        Raises:
            UnreachableError: the task is not known here; it may be in a moment.
        """
        if self.depot.store.task(parse_manifest(signed).task) is None:
            raise UnreachableError("this relay does not know of that task, or not yet", retry=True)
        return self.depot.receiver.open_update(holder, signed)

    def _refused(self, holder: Holder, refused: Refused) -> UploadStatus:
        self.depot.denials.note("update refused", actor=holder.name, code=str(refused.code), reason=refused.message)
        return UploadStatus(state=UploadStatus.REFUSED, code=str(refused.code), reason=refused.message)

    async def Push(self, requests: AsyncIterator[Parcel], holder: Holder, context: Any) -> UploadStatus:
        return self._told(await super().Push(requests, holder, context))

    def _told(self, status: UploadStatus) -> UploadStatus:
        if status.state != UploadStatus.ACCEPTED:
            return status
        self._held()
        return UploadStatus(state=UploadStatus.HELD, upload=status.upload)


async def serve(depot: Depot, identity: IdentityFolder, held: Callable[[], None]) -> tuple[Any, int]:
    """A server for a region's sites, by mutual TLS, and its port.

    Raises:
        UnreachableError: the port cannot be opened.
    """
    server = grpc.aio.server(options=channel_options())
    guard, service = SitesOnly(depot.store, depot.denials, depot.metrics, depot.away), RelayService(depot, held)
    for methods, name in ((FEDERATION, "OpenUpload"), (TRANSFER, "Push")):
        server.add_generic_rpc_handlers((guard.handler({name: methods[name]}, service),))
    credentials = server_credentials(lambda: IdentityFolder.open(identity.path), role=RELAY)
    try:
        port = server.add_secure_port(depot.settings.listen, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise UnreachableError(
            f"cannot listen on {depot.settings.listen}",
            hint="another program may; choose another port in relay.yaml",
            retry=True,
        )
    await server.start()
    return server, port

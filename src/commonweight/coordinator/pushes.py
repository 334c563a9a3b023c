"""The method `Transfer/Push`, at a coordinator and at a relay: chunks are taken as they come, a few at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ..errors import AccessError, UnreachableError
from ..identity.certificates import Holder
from ..wire.protocol_pb2 import UploadStatus
from ..wire.refusals import Refusal, Refused
from ..wire.service import UPLOAD_KEY, Parcel
from .lanes import Lanes
from .metrics import Metrics
from .receipts import InitialReceipt, Receipt
from .receive import Receiver

R = TypeVar("R")
#: transfers that one caller may have under way; each holds a chunk in memory
TRANSFERS = 16


class Place(Protocol):
    """What is needed of where updates are received (`Context`, or a relay's)."""

    receiver: Receiver
    lanes: Lanes
    metrics: Metrics

    async def away(self, function: Callable[..., R], *args: Any) -> R: ...

    async def crunch(self, function: Callable[..., R], *args: Any) -> R: ...


class Pushes:
    """Takes in what is pushed to uploads that are open."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._transfers: Counter[str] = Counter()

    async def Push(self, requests: AsyncIterator[Parcel], holder: Holder, context: Any) -> UploadStatus:
        upload = dict(context.invocation_metadata() or ()).get(UPLOAD_KEY, "")
        receiver = self.place.receiver
        receipt = receiver.receipt(upload)
        if receipt is None:
            return await self.place.away(receiver.finish, upload, holder.name)
        if receipt.sender != holder.name:
            raise AccessError(f"upload {upload!r} is not one of {holder.name!r}")
        with self.transfer(holder):
            status = await self._pushed(requests, receipt)
        outcome = {UploadStatus.ACCEPTED: "accepted", UploadStatus.REFUSED: status.code}.get(status.state)
        if outcome is not None and not isinstance(receipt, InitialReceipt):
            self.place.metrics.uploads.labels(outcome).inc()
        return status

    async def _pushed(self, requests: AsyncIterator[Parcel], receipt: Receipt) -> UploadStatus:
        """Take chunks for as long as they come, then say what has become of the upload."""
        receiver = self.place.receiver
        try:
            while True:
                async with self.place.lanes.one():
                    parcel = await anext(requests, None)
                    if parcel is None:
                        break
                    size = await self.place.crunch(self._take, receipt, parcel)
                self.place.metrics.received.inc(size)
        except Refused as refused:
            if refused.code is Refusal.CORRUPT_CHUNK:
                return UploadStatus(state=UploadStatus.OPEN, upload=receipt.id, missing=receipt.missing)
            return await self.place.away(receiver.refused_push, receipt, refused)
        return await self.place.away(receiver.finish, receipt.id, receipt.sender)

    def _take(self, receipt: Receipt, parcel: Parcel) -> int:
        """Take in a chunk and let go of it. Returns the size of the message."""
        message = parcel.take()
        self.place.receiver.take(receipt, message)
        return len(message)

    @contextmanager
    def transfer(self, holder: Holder) -> Iterator[None]:
        """One transfer under way.

        Raises:
            UnreachableError: the caller has too many.
        """
        if self._transfers[holder.name] >= TRANSFERS:
            raise UnreachableError(f"{holder.name!r} has {TRANSFERS} transfers under way; one must end", retry=True)
        self._transfers[holder.name] += 1
        try:
            yield
        finally:
            self._transfers[holder.name] -= 1

"""The services of protocol.proto as tables, and what both ends set on their connections.

Control messages are protobuf. The two methods of Transfer carry tensors and bypass protobuf, which would copy them:

    Fetch  FetchRequest → stream of raw messages: the frame's header, then its chunks from `first` on, in order
    Push   stream of raw messages, each a chunk's index (4 bytes, big-endian) ‖ the chunk → UploadStatus;
           the upload's id travels as metadata `commonweight-upload`
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import grpc
from google.protobuf.message import Message

from . import protocol_pb2 as pb
from .decode import decode
from .refusals import Refused

_log = logging.getLogger(__name__)

#: versions of the protocol that this program speaks
PROTOCOL_MIN = PROTOCOL_MAX = 1

UPLOAD_KEY = "commonweight-upload"
#: metadata with which `Attend` begins its answer: the coordinator's certificate, PEM, whose key signs audit heads
CERTIFICATE_KEY = "commonweight-certificate-bin"
#: metadata of a call that ended with an error for a person: kind (class name), hint
HINT_KEY = "commonweight-hint"
CODE_KEY = "commonweight-code"

#: a control message, and a chunk with its index
MAX_MESSAGE_BYTES = 20 << 20

Kind = Literal["unary_unary", "unary_stream", "stream_unary", "stream_stream"]


@dataclass(frozen=True)
class Method:
    """One method: its kind, and the types of its request and reply (None: raw bytes)."""

    service: str
    name: str
    kind: Kind
    request: type[Message] | None
    reply: type[Message] | None

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


def _methods(service: str, table: Mapping[str, tuple[Kind, Any, Any]]) -> dict[str, Method]:
    full = f"commonweight.v1.{service}"
    return {name: Method(full, name, kind, request, reply) for name, (kind, request, reply) in table.items()}


ENROLMENT = _methods("Enrolment", {"Enrol": ("unary_unary", pb.EnrolRequest, pb.EnrolReply)})
FEDERATION = _methods(
    "Federation",
    {
        "Attend": ("stream_stream", pb.SiteMessage, pb.CoordinatorMessage),
        "GetJob": ("unary_unary", pb.JobRequest, pb.SignedJob),
        "OpenAhead": ("unary_unary", pb.Ahead, pb.UploadStatus),
        "OpenUpload": ("unary_unary", pb.SignedManifest, pb.UploadStatus),
        "OpenPartial": ("unary_unary", pb.SignedPartial, pb.UploadStatus),
        "Region": ("unary_unary", pb.RegionRequest, pb.RegionReply),
        "CatchUp": ("unary_unary", pb.CatchUpRequest, pb.CatchUpReply),
        "Renew": ("unary_unary", pb.RenewRequest, pb.RenewReply),
    },
)
TRANSFER = _methods(
    "Transfer",
    {"Fetch": ("unary_stream", pb.FetchRequest, None), "Push": ("stream_unary", None, pb.UploadStatus)},
)
CONTROL = _methods(
    "Control",
    {
        "Submit": ("unary_unary", pb.SignedJob, pb.SubmitReply),
        "ListRuns": ("unary_unary", pb.ListRunsRequest, pb.JsonReply),
        "GetRun": ("unary_unary", pb.RunRequest, pb.JsonReply),
        "Watch": ("unary_stream", pb.WatchRequest, pb.EventLine),
        "Cancel": ("unary_unary", pb.RunRequest, pb.JsonReply),
        "ListSites": ("unary_unary", pb.ListSitesRequest, pb.JsonReply),
        "ReadLedger": ("unary_unary", pb.LedgerRequest, pb.JsonReply),
        "GetFile": ("unary_stream", pb.FileRequest, pb.FilePiece),
        "ReadAudit": ("unary_stream", pb.AuditRequest, pb.EventLine),
        "Renew": ("unary_unary", pb.RenewRequest, pb.RenewReply),
    },
)


def channel_options(*, keepalive_s: float = 60.0) -> list[tuple[str, Any]]:
    """Settings of both ends of a connection. Pings come well under the 4 minutes after which middleboxes forget it."""
    milliseconds = int(keepalive_s * 1000)
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", milliseconds // 2),
        ("grpc.http2.max_ping_strikes", 0),
        # a window of its own making would hold tens of megabytes a connection; and a cut would lose them
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 1 << 20),
        ("grpc.http2.max_frame_size", 1 << 20),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


class Parcel:
    """A raw message on its way through a server, to be taken out once.

    Whatever passes messages on keeps hold of the last one until the next comes. Of a parcel that is the wrapping; of a
    chunk it would be 4 MiB for every stream that waits for its turn.
    """

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes) -> None:
        self._raw: bytes | None = raw

    def take(self) -> bytes:
        """The message. Nothing of it is left here."""
        raw, self._raw = self._raw, None
        if raw is None:
            raise RuntimeError("a parcel was taken twice")
        return raw


def reader(kind: type[Message] | None) -> Callable[[bytes], Message] | None:
    """What turns bytes into messages of a kind; None, which leaves them as they are, for raw bytes.

    Bytes that cannot be read become an empty message. gRPC would hand None to whoever waits for it, or end the call
    with a traceback in the log; an empty message is what the other side might send anyway, and is refused as such.
    """
    if kind is None:
        return None

    def read(raw: bytes) -> Message:
        try:
            return decode(kind, raw)
        except Refused as refused:
            _log.warning("%s", refused.message)
            return kind()

    return read


def handler(methods: Mapping[str, Method], implementation: Any) -> grpc.GenericRpcHandler[Any, Any]:
    """Serve a table of methods by the attributes of `implementation` that bear their names; raw bytes as parcels."""
    handlers = {}
    for name, method in methods.items():
        make = getattr(grpc, f"{method.kind}_rpc_method_handler")
        handlers[name] = make(
            getattr(implementation, name),
            request_deserializer=reader(method.request) or Parcel,
            response_serializer=Parcel.take if method.reply is None else method.reply.SerializeToString,
        )
    service = next(iter(methods.values())).service
    return grpc.method_handlers_generic_handler(service, handlers)


def stub(channel: Any, methods: Mapping[str, Method]) -> dict[str, Callable[..., Any]]:
    """Callables for a table of methods over a channel (`grpc.aio` or `grpc`)."""
    calls = {}
    for name, method in methods.items():
        calls[name] = getattr(channel, method.kind)(
            method.path,
            request_serializer=None if method.request is None else method.request.SerializeToString,
            response_deserializer=reader(method.reply),
        )
    return calls

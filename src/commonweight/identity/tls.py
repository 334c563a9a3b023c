"""TLS 1.3 for gRPC, at both ends, by certificates of the federation's own authority.

**Who is trusted.** Nobody but the authority whose certificate came with the one-time token; the system's list of public
authorities plays no part. The authority is private: it issues certificates to enrolled sites, users and coordinators
only, each with its role.

**Which address.** A coordinator may be dialled by any host name, through any TCP proxy or load balancer: the address is
only a way to it, and proves nothing. What proves it is `TARGET_NAME`, a DNS name that the authority puts into every
coordinator's certificate and into no other, and that clients demand of whom they reach (`TARGET_OPTIONS`; it also
travels as SNI). An enrolled site that poses as the coordinator fails twice: its certificate lacks the name, and is not
for use by a TLS server. So whoever listens at the address needs a coordinator's key, whatever DNS says. gRPC-Python
lets a client see no more of the other's certificate than this. Likewise a relay's certificate has a DNS name made from
its own name (`relay_options`): a site that is to send to one reaches that one or nobody.

**Which version.** gRPC-Python cannot be told a lowest version of TLS: left alone, it would speak 1.2 too. But it takes
the list of TLS 1.2's cipher suites from the environment, when it is loaded; TLS 1.3's are not on that list. The one
suite given here needs an RSA certificate, and the authority issues ECDSA ones only: under TLS 1.2 the two ends find
nothing in common, as client and as server, and only a 1.3 handshake can end well. Whether gRPC has taken it (it has not
if it was loaded before), `enforce_tls13` finds out from gRPC itself; `peer` looks at each connection's version again.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Any, Protocol, cast

SUITES_VARIABLE, SUITE = "GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES256-GCM-SHA384"
if "grpc" not in sys.modules:
    os.environ[SUITES_VARIABLE] = SUITE  # gRPC reads it once, while it is loaded, which is now

import grpc  # noqa: E402

from ..errors import AccessError, CommonweightError, UnreachableError  # noqa: E402
from .authority import TARGET_NAME, relay_target  # noqa: E402
from .certificates import (  # noqa: E402
    Holder,
    certificate_key,
    holder_of,
    load_authority,
    tls_key_from_pem,
    verify_certificate,
)
from .folder import IdentityFolder  # noqa: E402
from .roles import COORDINATOR  # noqa: E402

log = logging.getLogger(__name__)

#: what clients set on their channels besides the credentials
TARGET_OPTIONS = (("grpc.ssl_target_name_override", TARGET_NAME),)


def relay_options(name: str) -> tuple[tuple[str, str], ...]:
    """What a site sets on a channel to the relay of this name, in place of `TARGET_OPTIONS`."""
    return (("grpc.ssl_target_name_override", relay_target(name)),)


#: the code points that gRPC may offer: `SUITE`, and TLS 1.3's own (RFC 8446, B.4)
_ALLOWED = frozenset({0xC030, 0x1301, 0x1302, 0x1303, 0x1304, 0x1305})
_PROBE_S = 10.0
_known_holder = lru_cache(maxsize=4096)(holder_of)


@dataclass(frozen=True)
class ServerIdentity:
    """What one end shows and whom it trusts, all PEM; an `IdentityFolder` serves as well."""

    tls_key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes


class CallContext(Protocol):
    """A call as its handler sees it: `grpc.ServicerContext` or `grpc.aio.ServicerContext`."""

    def auth_context(self) -> Mapping[str, Any]: ...


def enforce_tls13() -> None:
    """Make sure that gRPC speaks nothing below TLS 1.3 here; whatever gives out credentials asks this first.

    The environment does not tell, for it may have been set too late: gRPC is made to greet a socket of our own (on
    loopback, a few milliseconds, once a process), and what it offers there is what counts.

    Raises:
        AccessError: TLS 1.2 is not ruled out.
        UnreachableError: gRPC did not greet within ten seconds.
    """
    if not _offered() <= _ALLOWED:
        raise AccessError(
            "TLS 1.2 cannot be ruled out: gRPC was loaded before commonweight, or with cipher suites of its own",
            hint=f"import commonweight before grpc, or start the program with {SUITES_VARIABLE}={SUITE}",
        )


@lru_cache(maxsize=1)
def _offered() -> frozenset[int]:
    """The cipher suites in gRPC's ClientHello, without those that only keep the field open (GREASE, RFC 8701)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_PROBE_S)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        options = [("grpc.enable_http_proxy", 0)]
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(), options=options) as channel:
            channel.subscribe(lambda _: None, try_to_connect=True)
            try:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as stream:
                    connection.settimeout(_PROBE_S)
                    suites = _suites(stream)
            except OSError as error:
                raise UnreachableError(
                    f"gRPC cannot be asked for its TLS version on {address}: {error}",
                    hint="this machine must allow connections to itself",
                    retry=True,
                ) from error
    return frozenset(suite for suite in suites if suite & 0x0F0F != 0x0A0A)


def _suites(stream: IO[bytes]) -> list[int]:
    """The cipher suites of the ClientHello that a stream begins with (RFC 8446, 4.1.2), as numbers."""
    record_header = stream.read(5)
    hello = stream.read(int.from_bytes(record_header[3:5], "big"))
    at = 4 + 2 + 32  # type and length, version, random
    at += 1 + hello[at] if len(hello) > at else 0  # session id
    length = int.from_bytes(hello[at : at + 2], "big")
    listed = hello[at + 2 : at + 2 + length]
    if record_header[:1] != b"\x16" or not length or len(listed) != length:
        raise OSError("no ClientHello came")
    return [int.from_bytes(listed[k : k + 2], "big") for k in range(0, length, 2)]


def server_credentials(
    read: Callable[[], ServerIdentity | IdentityFolder], *, every_s: float = 1.0, role: str = COORDINATOR
) -> grpc.ServerCredentials:
    """Mutual TLS: callers must show a certificate of the authority, good at that time, for use by a TLS client.

    Args:
        read: reads the server's identity; asked again at handshakes, so that a renewed certificate counts for
            the connections that follow. When it fails later on, that is logged, and the last identity stays.
        every_s: it is asked at most this often (seconds).
        role: the server's, coordinator or relay.

    Raises:
        AccessError: the identity is of another role or not good, or TLS 1.3 cannot be enforced.
    """
    return _server_credentials(read, every_s, role, clients_show_certificates=True)


def enrolment_credentials(
    read: Callable[[], ServerIdentity | IdentityFolder], *, every_s: float = 1.0
) -> grpc.ServerCredentials:
    """TLS by the coordinator's certificate alone, for callers who have none yet. Arguments as `server_credentials`."""
    return _server_credentials(read, every_s, COORDINATOR, clients_show_certificates=False)


def channel_credentials(identity: ServerIdentity | IdentityFolder) -> grpc.ChannelCredentials:
    """Mutual TLS, from the side that dials; goes with `TARGET_OPTIONS`.

    A channel keeps the certificate that it was made with: after a renewal, make a new one.

    Raises:
        AccessError: the certificate has expired or is not good otherwise, or TLS 1.3 cannot be enforced.
    """
    enforce_tls13()
    _checked(identity)
    return grpc.ssl_channel_credentials(identity.authority, identity.tls_key, identity.certificate)


def enrolment_channel_credentials(authority_pem: bytes) -> grpc.ChannelCredentials:
    """TLS to a coordinator of the token's authority, showing no certificate; goes with `TARGET_OPTIONS`.

    Raises:
        AccessError: `authority_pem` is no authority's certificate, or TLS 1.3 cannot be enforced.
    """
    enforce_tls13()
    load_authority(authority_pem)
    return grpc.ssl_channel_credentials(authority_pem)


def peer(context: CallContext, *, at: float | None = None) -> Holder:
    """Who calls, by the certificate that TLS has verified. Whether it was revoked, the coordinator's store knows.

    Args:
        context: of the call, `grpc` or `grpc.aio`.
        at: seconds since the epoch; None: the clock's.

    Raises:
        AccessError: there is no certificate, it has expired since the connection was made, it does not say who its
            holder is, or the connection is not by TLS 1.3.
    """
    facts = context.auth_context()
    shown = list(facts.get("x509_pem_cert", ()))
    if len(shown) != 1:
        raise AccessError("the caller has shown no certificate", hint="enrol first, with a token from an admin")
    versions = list(facts.get("ssl_tls_version", ()))  # older versions of gRPC do not tell
    if versions not in ([], [b"TLSv1.3"]):
        raise AccessError("the connection is not by TLS 1.3")
    holder = _known_holder(bytes(shown[0]))
    holder.check_time(time.time() if at is None else at)
    return holder


def _server_credentials(
    read: Callable[[], ServerIdentity | IdentityFolder], every_s: float, role: str, *, clients_show_certificates: bool
) -> grpc.ServerCredentials:
    enforce_tls13()
    reader = _Reader(read, every_s, role)
    again = cast(Callable[[], grpc.ServerCertificateConfiguration], reader.again)  # its stubs forget that None is good
    return grpc.dynamic_ssl_server_credentials(reader.first, again, clients_show_certificates)


class _Reader:
    """Reads the server's identity at first, and again when a handshake asks and it has changed."""

    def __init__(self, read: Callable[[], ServerIdentity | IdentityFolder], every_s: float, role: str) -> None:
        self._read, self._role = read, role
        self._every_s = every_s
        self._known = _parts(_checked(read(), role=role))
        self._read_at = time.monotonic()
        self.first = self._configuration()

    def again(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration; None: the one before stays. gRPC asks from its own threads, one at a time."""
        if time.monotonic() < self._read_at + self._every_s:
            return None
        self._read_at = time.monotonic()
        try:
            parts = _parts(_checked(self._read(), role=self._role))
        except (CommonweightError, OSError) as error:
            log.warning("the server's certificate could not be read again, the last one stays: %s", error)
            return None
        if parts == self._known:
            return None
        self._known = parts
        return self._configuration()

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        key, certificate, authority = self._known
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)


def _parts(identity: ServerIdentity | IdentityFolder) -> tuple[bytes, bytes, bytes]:
    return identity.tls_key, identity.certificate, identity.authority


def _checked(identity: ServerIdentity | IdentityFolder, *, role: str | None = None) -> ServerIdentity | IdentityFolder:
    """The identity, if its certificate is good now, goes with its key, and is of the role (None: any)."""
    holder = verify_certificate(identity.certificate, identity.authority, at=time.time())
    if role is not None and holder.role != role:
        raise AccessError(f"the certificate of {holder.role} {holder.name} is not for a {role}")
    if certificate_key(identity.certificate) != tls_key_from_pem(identity.tls_key, "the TLS key").public_key():
        raise AccessError(f"the certificate of {holder.role} {holder.name} is not for the TLS key beside it")
    return identity

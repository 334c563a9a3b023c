"""TLS over real loopback connections: what the handshake lets through, and what it does not."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from commonweight.errors import AccessError
from commonweight.identity import tls  # before grpc: it rules out TLS 1.2
from commonweight.identity.authority import TARGET_NAME, Authority
from commonweight.identity.certificates import holder_of, new_tls_key
from commonweight.identity.folder import IdentityFolder
from commonweight.identity.keys import SigningKey, private_pem
from commonweight.identity.tls import ServerIdentity, channel_credentials, enrolment_channel_credentials, peer

import grpc  # isort: skip
import grpc.aio  # isort: skip

METHOD = "/commonweight.test.Who/Who"
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
TIMEOUT = 20.0
TLS_KEY = new_tls_key()
SIGNING = SigningKey.generate()


@dataclass
class World:
    """An authority with one of each; `other` is another federation's."""

    folder: Path
    authority: Authority
    other: Authority
    coordinator: ServerIdentity
    site: IdentityFolder
    now: float

    def identity(self, authority: Authority | None = None, **how: Any) -> ServerIdentity:
        """One more identity, over the tests' one TLS key."""
        authority = authority or self.authority
        values: dict[str, Any] = {"name": "hub", "role": "coordinator", "signing_key": SIGNING.public}
        pem = authority.issue(TLS_KEY.public_key(), **{**values, **how})
        return ServerIdentity(private_pem(TLS_KEY), pem, authority.certificate_pem)

    def forged(
        self, role: str, uses: list[x509.ObjectIdentifier], *, dns: str | None = None, begin: float | None = None
    ) -> ServerIdentity:
        """What the authority's own key could sign and its code would not."""
        issuer = x509.load_pem_x509_certificate(self.authority.certificate_pem)
        at = datetime.fromtimestamp(self.now - 60 if begin is None else begin, UTC)
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(f"commonweight://{role}/hub"),
            x509.UniformResourceIdentifier(f"commonweight://signing-key/{SIGNING.public.hex()}"),
            *([x509.DNSName(dns)] if dns else []),
        ]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(issuer.subject)
            .public_key(TLS_KEY.public_key())
            .serial_number(7)
            .not_valid_before(at)
            .not_valid_after(at + timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=True)
        )
        signer = load_pem_private_key((self.folder / "authority" / "authority.key").read_bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        pem = builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)
        return ServerIdentity(private_pem(TLS_KEY), pem, self.authority.certificate_pem)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority.create(folder / "authority", name="first")
    asked = IdentityFolder.prepare(folder / "site")
    site = IdentityFolder.complete(
        folder / "site",
        name="north",
        role="site",
        certificate=authority.issue(asked.csr, name="north", role="site", signing_key=asked.signing_key),
        authority=authority.certificate_pem,
        address="localhost:1",
    )
    bare = ServerIdentity(b"", b"", b"")
    world = World(folder, authority, Authority.create(folder / "other", name="first"), bare, site, time.time())
    world.coordinator = world.identity(hosts=["fed.example.org"])
    return world


class Who:
    """Answers who calls, and counts the calls that reached it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.calls += 1
        return self._answer(context)

    async def later(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        self.calls += 1
        return self._answer(context)

    def _answer(self, context: tls.CallContext) -> bytes:
        try:
            holder = peer(context)
        except AccessError as error:
            return f"refused: {error.message}".encode()
        return f"{holder.role} {holder.name} {holder.serial} {holder.signing_key.hex()}".encode()

    def handlers(self, function: Any) -> tuple[grpc.GenericRpcHandler]:
        _, service, name = METHOD.split("/")
        return (grpc.method_handlers_generic_handler(service, {name: grpc.unary_unary_rpc_method_handler(function)}),)


@contextlib.contextmanager
def serving(credentials: grpc.ServerCredentials) -> Iterator[tuple[int, Who]]:
    who = Who()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers(who.handlers(who))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port, who
    finally:
        server.stop(None).wait(TIMEOUT)


@pytest.fixture(scope="module")
def mutual(world: World) -> Iterator[tuple[int, Who]]:
    with serving(tls.server_credentials(lambda: world.coordinator)) as served:
        yield served


@pytest.fixture(scope="module")
def enrolment(world: World) -> Iterator[tuple[int, Who]]:
    with serving(tls.enrolment_credentials(lambda: world.coordinator)) as served:
        yield served


def ask(port: int, credentials: grpc.ChannelCredentials, *, host: str = "127.0.0.1") -> str:
    options = [*tls.TARGET_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(f"{host}:{port}", credentials, options=options) as channel:
        reply: bytes = channel.unary_unary(METHOD)(b"", timeout=TIMEOUT)
    return reply.decode()


def is_refused(port: int, credentials: grpc.ChannelCredentials) -> bool:
    """Whether the call ended before it began."""
    with pytest.raises(grpc.RpcError) as ended:
        ask(port, credentials)
    return bool(ended.value.code() == grpc.StatusCode.UNAVAILABLE)


def shown(identity: ServerIdentity | IdentityFolder, authority: bytes) -> grpc.ChannelCredentials:
    """Credentials that `channel_credentials` itself would not give out."""
    return grpc.ssl_channel_credentials(authority, identity.tls_key, identity.certificate)


def plain_tls(world: World, highest: ssl.TLSVersion, folder: Path) -> ssl.SSLContext:
    """A client that is not gRPC's, with the site's certificate and every cipher suite that OpenSSL has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = highest
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=world.authority.certificate_pem.decode())
    context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
    return context


def shake_hands(port: int, context: ssl.SSLContext) -> tuple[str | None, str]:
    """The version agreed upon, and the serial of the certificate that the server showed."""
    with (
        socket.create_connection(("127.0.0.1", port), TIMEOUT) as plain,
        context.wrap_socket(plain, server_hostname=TARGET_NAME) as connection,
    ):
        certificate = x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"")
        return connection.version(), f"{certificate.serial_number:x}"


# ---- which version


@pytest.mark.parametrize("port_of", ["mutual", "enrolment"])
def test_a_server_speaks_tls_1_3_and_nothing_below(world: World, port_of: str, request: pytest.FixtureRequest) -> None:
    port, _ = request.getfixturevalue(port_of)
    version, serial = shake_hands(port, plain_tls(world, ssl.TLSVersion.TLSv1_3, world.site.path))
    assert (version, serial) == ("TLSv1.3", holder_of(world.coordinator.certificate).serial)
    with pytest.raises(OSError, match=r"(?i)ssl|eof|alert|reset"):  # ssl.SSLError, or the connection just ends
        shake_hands(port, plain_tls(world, ssl.TLSVersion.TLSv1_2, world.site.path))


@pytest.mark.parametrize("highest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_speaks_tls_1_3_and_nothing_below(world: World, tmp_path: Path, highest: ssl.TLSVersion) -> None:
    """Against a server that is not gRPC's: it has the coordinator's certificate and takes all suites."""
    (tmp_path / "tls.pem").write_bytes(world.coordinator.certificate)
    (tmp_path / "tls.key").write_bytes(world.coordinator.tls_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = highest
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(tmp_path / "tls.pem", tmp_path / "tls.key")
    versions: list[str | None] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)

        def accept() -> None:
            plain, _ = listener.accept()
            plain.settimeout(TIMEOUT)
            try:
                with context.wrap_socket(plain, server_side=True) as connection:
                    versions.append(connection.version())
            except OSError:
                versions.append(None)
            finally:
                plain.close()

        server = threading.Thread(target=accept)
        server.start()
        credentials = enrolment_channel_credentials(world.authority.certificate_pem)
        assert is_refused(listener.getsockname()[1], credentials)  # either way: no HTTP/2 behind it
        server.join(TIMEOUT)
    assert versions == ["TLSv1.3" if highest == ssl.TLSVersion.TLSv1_3 else None]


CHECK = """
from commonweight.errors import AccessError
from commonweight.identity.tls import SUITE, SUITES_VARIABLE, enforce_tls13
os.environ[SUITES_VARIABLE] = SUITE  # whatever stood there before: by now it is of no use
try:
    enforce_tls13()
    print("enforced")
except AccessError as error:
    assert "import commonweight before grpc" in error.hint
    print("refused")
"""


@pytest.mark.parametrize(
    ("begin", "outside", "said"),
    [
        ("import os", None, "enforced"),
        ("import os, grpc", None, "refused"),
        ("import os, grpc", tls.SUITE, "enforced"),
        ("import os, grpc", "HIGH+ECDSA", "refused"),
    ],
    ids=["commonweight first", "grpc first", "set outside", "set otherwise outside"],
)
def test_credentials_are_given_out_only_where_tls_1_3_is_enforced(begin: str, outside: str | None, said: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != tls.SUITES_VARIABLE}
    if outside is not None:
        environment[tls.SUITES_VARIABLE] = outside
    done = subprocess.run(
        [sys.executable, "-c", begin + CHECK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == (said, 0), done.stderr


@pytest.mark.parametrize(
    "greeting", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n" * 9, b"\x16\x03\x01\x00\x30" + b"\xff" * 48]
)
def test_a_greeting_that_is_none_is_not_taken_for_tls_1_3(greeting: bytes) -> None:
    with pytest.raises(OSError, match="no ClientHello"):
        tls._suites(io.BytesIO(greeting))


# ---- who gets in


def test_an_enrolled_site_gets_in_by_any_address_and_is_known(world: World, mutual: tuple[int, Who]) -> None:
    port, _ = mutual
    holder = world.site.holder
    expected = f"site north {holder.serial} {holder.signing_key.hex()}"
    assert ask(port, channel_credentials(world.site)) == expected
    assert ask(port, channel_credentials(world.site), host="localhost") == expected


def strangers() -> dict[str, Callable[[World], grpc.ChannelCredentials]]:
    """Clients that trust the coordinator, and show what it must not accept."""

    def with_(make: Callable[[World], ServerIdentity]) -> Callable[[World], grpc.ChannelCredentials]:
        return lambda world: shown(make(world), world.authority.certificate_pem)

    site: dict[str, Any] = {"name": "north", "role": "site"}
    return {
        "no certificate": lambda world: enrolment_channel_credentials(world.authority.certificate_pem),
        "another authority's": with_(lambda world: world.identity(world.other, **site)),
        "expired": with_(lambda world: world.identity(now=world.now - 90_000, hours=24.0, **site)),
        "not yet good": with_(lambda world: world.forged("site", [CLIENT], begin=world.now + 3600)),
        "for servers only": with_(lambda world: world.forged("site", [SERVER])),
    }


@pytest.mark.parametrize("who", strangers())
def test_the_handshake_refuses(world: World, mutual: tuple[int, Who], who: str) -> None:
    port, served = mutual
    before = served.calls
    assert is_refused(port, strangers()[who](world))
    assert served.calls == before
    assert ask(port, shown(world.site, world.authority.certificate_pem)).startswith("site north ")  # this one it takes


def test_enrolment_asks_for_no_certificate_and_knows_nobody(world: World, enrolment: tuple[int, Who]) -> None:
    port, _ = enrolment
    credentials = enrolment_channel_credentials(world.authority.certificate_pem)
    assert ask(port, credentials) == "refused: the caller has shown no certificate"
    assert ask(port, channel_credentials(world.site)) == "refused: the caller has shown no certificate"


def test_a_client_trusts_its_own_authority_only(
    world: World, mutual: tuple[int, Who], enrolment: tuple[int, Who]
) -> None:
    elsewhere = world.identity(world.other, name="north", role="site")
    assert is_refused(mutual[0], channel_credentials(elsewhere))
    assert is_refused(enrolment[0], enrolment_channel_credentials(world.other.certificate_pem))


@pytest.mark.parametrize(
    "pose",
    [
        lambda world: world.identity(name="north", role="site"),
        lambda world: world.identity(name="boss", role="admin"),
        lambda world: world.forged("site", [CLIENT], dns=TARGET_NAME),
        lambda world: world.forged("site", [CLIENT, SERVER], dns="fed.example.org"),
    ],
    ids=["site", "admin", "site-with-the-name", "site-for-servers"],
)
def test_nobody_but_a_coordinator_can_pose_as_one(world: World, pose: Callable[[World], ServerIdentity]) -> None:
    poser = pose(world)
    with pytest.raises(AccessError):
        tls.server_credentials(lambda: poser)
    real = [(world.coordinator.tls_key, world.coordinator.certificate)]
    for pair, gets_through in ([(poser.tls_key, poser.certificate)], False), (real, True):
        with serving(grpc.ssl_server_credentials(pair, world.authority.certificate_pem, True)) as (port, who):
            for credentials in (channel_credentials(world.site), shown(world.site, world.authority.certificate_pem)):
                if gets_through:
                    assert ask(port, credentials).startswith("site north ")
                else:
                    assert is_refused(port, credentials)
            assert who.calls == (2 if gets_through else 0)


@pytest.mark.parametrize("make", [tls.server_credentials, tls.enrolment_credentials])
def test_a_server_does_not_start_with_what_is_not_a_good_coordinators(
    world: World, make: Callable[[Callable[[], ServerIdentity]], grpc.ServerCredentials]
) -> None:
    other_key = private_pem(new_tls_key())
    for identity, said in (
        (world.identity(now=world.now - 90_000), "expired at"),
        (world.identity(role="lead"), "is not for a coordinator"),
        (replace(world.coordinator, tls_key=other_key), "not for the TLS key"),
        (replace(world.coordinator, tls_key=b"junk"), "no private key"),
        (replace(world.coordinator, authority=world.other.certificate_pem), "not issued by this authority"),
        (replace(world.coordinator, certificate=b""), "cannot be read"),
    ):
        with pytest.raises(AccessError, match=said):
            make(lambda identity=identity: identity)


def test_a_client_is_told_at_once_of_a_certificate_that_is_no_good(world: World) -> None:
    old = world.identity(name="north", role="site", now=world.now - 90_000)
    for identity, said in (
        (old, "expired at"),
        (replace(world.identity(), tls_key=private_pem(new_tls_key())), "not for the TLS key"),
        (replace(world.identity(), authority=world.other.certificate_pem), "not issued by this authority"),
    ):
        with pytest.raises(AccessError, match=said):
            channel_credentials(identity)
    with pytest.raises(AccessError, match="signs itself"):
        enrolment_channel_credentials(world.site.certificate)
    with pytest.raises(AccessError, match="cannot be read"):
        enrolment_channel_credentials(b"")


# ---- renewal


def test_a_renewed_certificate_counts_without_a_restart(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator's identity in a folder, renewed on disk, damaged, and renewed again while it serves."""
    folder = tmp_path / "server"
    asked = IdentityFolder.prepare(folder)
    about = {"name": "hub", "role": "coordinator"}

    def issue() -> bytes:
        return world.authority.issue(asked.csr, signing_key=asked.signing_key, **about)

    first = IdentityFolder.complete(
        folder, certificate=issue(), authority=world.authority.certificate_pem, address="localhost:1", **about
    )
    client = plain_tls(world, ssl.TLSVersion.TLSv1_3, world.site.path)
    with serving(tls.server_credentials(lambda: IdentityFolder.open(folder), every_s=0.0)) as (port, _):
        assert shake_hands(port, client)[1] == first.holder.serial
        second = first.write_certificate(issue())
        assert shake_hands(port, client)[1] == second.holder.serial != first.holder.serial
        (folder / "tls.pem").write_bytes(b"cut")
        with caplog.at_level(logging.WARNING):
            assert shake_hands(port, client)[1] == second.holder.serial
        assert "the last one stays" in caplog.text
        (folder / "tls.pem").write_bytes(world.coordinator.certificate)  # not for this key
        assert shake_hands(port, client)[1] == second.holder.serial
        third = second.write_certificate(issue())
        assert shake_hands(port, client)[1] == third.holder.serial
        assert ask(port, channel_credentials(world.site)).startswith("site north ")


def test_a_connection_that_is_open_outlives_the_renewal_of_the_other_end(world: World) -> None:
    current = [world.coordinator]
    with serving(tls.server_credentials(lambda: current[0], every_s=0.0)) as (port, _):
        options = [*tls.TARGET_OPTIONS, ("grpc.enable_http_proxy", 0)]
        with grpc.secure_channel(f"127.0.0.1:{port}", channel_credentials(world.site), options=options) as channel:
            call = channel.unary_unary(METHOD)
            assert call(b"", timeout=TIMEOUT).startswith(b"site north ")
            current[0] = world.identity()
            assert ask(port, channel_credentials(world.site)).startswith("site north ")
            assert call(b"", timeout=TIMEOUT).startswith(b"site north ")


def test_the_identity_is_not_read_at_every_handshake(world: World) -> None:
    reads: list[None] = []

    def read() -> ServerIdentity:
        reads.append(None)
        return world.coordinator

    with serving(tls.server_credentials(read, every_s=3600.0)) as (port, _):
        for _ in range(3):
            ask(port, channel_credentials(world.site))
    assert len(reads) == 1


# ---- who calls


def test_an_asynchronous_server_knows_its_callers_and_renews_too(world: World) -> None:
    """The same credentials under grpc.aio, at both ends."""
    current = [world.coordinator]
    renewed = world.identity()

    async def call(port: int) -> bytes:
        options = [*tls.TARGET_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        credentials = channel_credentials(world.site)
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
            reply: bytes = await channel.unary_unary(METHOD)(b"", timeout=TIMEOUT)
            return reply

    async def main() -> tuple[list[bytes], list[str]]:
        who = Who()
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(who.handlers(who.later))
        port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(lambda: current[0], every_s=0.0))
        await server.start()
        client = plain_tls(world, ssl.TLSVersion.TLSv1_3, world.site.path)
        try:
            replies, serials = [await call(port)], [(await asyncio.to_thread(shake_hands, port, client))[1]]
            current[0] = renewed
            replies.append(await call(port))
            serials.append((await asyncio.to_thread(shake_hands, port, client))[1])
        finally:
            await server.stop(None)
        return replies, serials

    replies, serials = asyncio.run(main())
    assert all(reply.startswith(b"site north ") for reply in replies)
    assert serials == [holder_of(world.coordinator.certificate).serial, holder_of(renewed.certificate).serial]


@dataclass
class Context:
    facts: dict[str, list[bytes]]

    def auth_context(self) -> dict[str, list[bytes]]:
        return self.facts


def test_a_caller_is_known_by_the_certificate_of_the_connection(world: World) -> None:
    pem, holder = world.site.certificate, world.site.holder
    assert peer(Context({"x509_pem_cert": [pem], "ssl_tls_version": [b"TLSv1.3"]})) == holder
    assert peer(Context({"x509_pem_cert": [pem]})) is peer(Context({"x509_pem_cert": [pem]}))
    told = {"x509_common_name": [b"boss"], "peer_uri": [b"commonweight://admin/boss"], "x509_subject": [b"CN=boss"]}
    assert peer(Context({**told, "x509_pem_cert": [pem]})) == holder


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "no certificate"),
        ({"x509_common_name": [b"north"], "peer_uri": [b"commonweight://site/north"]}, "no certificate"),
        ({"x509_pem_cert": []}, "no certificate"),
        ({"x509_pem_cert": [b"a", b"b"]}, "no certificate"),
        ({"x509_pem_cert": [b"junk"]}, "cannot be read"),
        ({"x509_pem_cert": [b"site"], "ssl_tls_version": [b"TLSv1.2"]}, "TLS 1.3"),
    ],
    ids=["nothing", "names-only", "empty", "two", "junk", "old-tls"],
)
def test_a_caller_without_a_good_certificate_is_nobody(world: World, facts: dict[str, list[bytes]], said: str) -> None:
    real = {name: [world.site.certificate if v == b"site" else v for v in values] for name, values in facts.items()}
    with pytest.raises(AccessError, match=said):
        peer(Context(real))


def test_a_certificate_that_expired_while_the_connection_stayed_counts_no_more(world: World) -> None:
    context = Context({"x509_pem_cert": [world.site.certificate]})
    assert peer(context, at=world.site.holder.not_after) == world.site.holder
    with pytest.raises(AccessError, match="expired at"):
        peer(context, at=world.site.holder.not_after + 1)

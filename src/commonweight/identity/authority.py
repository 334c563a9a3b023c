"""The certificate authority of one federation: a private CA in a folder, which says who is who.

authority.key   its ECDSA P-256 key, mode 0600: who has it can be anyone
authority.pem   its certificate, which every site and user trusts
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import AccessError
from .certificates import (
    CLOCK_SKEW_S,
    SIGNING_KEY,
    check_p256,
    load_authority,
    load_tls_key,
    new_tls_key,
    requested_key,
    save_tls_key,
)
from .keys import present, private_folder, read_public, write_public
from .roles import COORDINATOR, RELAY, SERVERS, check_name, check_role

#: the name that every coordinator's certificate bears, and no other's (tls.py)
TARGET_NAME = "coordinator.commonweight"


def relay_target(name: str) -> str:
    """The DNS name that a relay's certificate has, and no other: of a hash, for not every name can be one."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.relay.commonweight"


CERTIFICATE_HOURS = 24.0
AUTHORITY_YEARS = 10
_MOST_HOURS = 366 * 24.0

_KEY, _CERTIFICATE = "authority.key", "authority.pem"
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


class Authority:
    """An open authority.

    Attributes:
        certificate_pem: its certificate, PEM: what the others trust.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate_pem: bytes) -> None:
        self._key = key
        self._certificate = load_authority(certificate_pem)
        self.certificate_pem = certificate_pem

    @classmethod
    def create(cls, folder: Path, *, name: str, now: float | None = None) -> Authority:
        """Make an authority: a key, and a certificate for ten years that it signs itself.

        Args:
            folder: made, mode 0700; must hold no authority yet.
            name: of the federation; only for people to read.
            now: seconds since the epoch; None: the clock's.

        Raises:
            AccessError: there is one in the folder, others may enter the folder, or the name is malformed.
            StorageError: the folder cannot be written.
        """
        check_name(name)
        private_folder(folder)
        if present(folder / _KEY):
            raise AccessError(f"{folder} holds an authority already", hint="use it, or choose another folder")
        key = new_tls_key()
        pem = _self_signed(key, f"commonweight {name}", _moment(now))
        write_public(folder / _CERTIFICATE, pem)
        save_tls_key(key, folder / _KEY)  # last: without it there is no authority, and `create` may begin anew
        return cls(key, pem)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Open the authority in a folder.

        Raises:
            AccessError: there is none, its key can be read by others, or key and certificate are not a pair.
            StorageError: it cannot be read.
        """
        key = load_tls_key(folder / _KEY)
        authority = cls(key, read_public(folder / _CERTIFICATE))
        if authority._certificate.public_key() != key.public_key():
            raise AccessError(
                f"{folder / _CERTIFICATE} is not the certificate of {folder / _KEY}",
                hint="restore the folder from a copy",
            )
        return authority

    def issue(
        self,
        request: bytes | ec.EllipticCurvePublicKey,
        *,
        name: str,
        role: str,
        signing_key: bytes,
        hours: float = CERTIFICATE_HOURS,
        hosts: Sequence[str] = (),
        now: float | None = None,
    ) -> bytes:
        """Issue a certificate.

        Args:
            request: a certificate request (PKCS #10, DER), of which only the key counts, or the P-256 public key.
            name, role: whom it names. That the caller is that one, the caller of `issue` has made sure of.
            signing_key: the holder's Ed25519 public key, 32 bytes.
            hours: its life from now on; the authority's own end cuts it short.
            hosts: host names and IP addresses that a coordinator is reached by, for tools that check them; a
                coordinator's certificate always bears `TARGET_NAME` too. None for other roles.
            now: seconds since the epoch; None: the clock's.

        Returns:
            The certificate, PEM.

        Raises:
            AccessError: the request is not signed by its own key, or something else of these is not as it should be.
        """
        key = requested_key(request) if isinstance(request, bytes) else check_p256(request, "the request")
        names = _names(check_name(name), check_role(role), signing_key, hosts)
        begin = _moment(now)
        end = self._end(begin, hours)
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if role in SERVERS:
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = (
            _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), self._certificate.subject, key)
            .not_valid_before(begin - timedelta(seconds=CLOCK_SKEW_S))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def _end(self, begin: datetime, hours: float) -> datetime:
        if not (math.isfinite(hours) and 0 < hours <= _MOST_HOURS):
            raise AccessError(f"a certificate cannot be for {hours:g} hours", hint=f"up to {_MOST_HOURS:g} hours")
        last = self._certificate.not_valid_after_utc
        if begin >= last:
            raise AccessError(
                f"the authority itself expired at {last:%Y-%m-%d %H:%M} UTC",
                hint="make a new authority, and let every site and user enrol anew",
            )
        return min(begin + timedelta(hours=hours), last)


def _self_signed(key: ec.EllipticCurvePrivateKey, common_name: str, begin: datetime) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    builder = (
        _builder(subject, subject, key.public_key())
        .not_valid_before(begin - timedelta(seconds=CLOCK_SKEW_S))
        .not_valid_after(begin + timedelta(days=365.25 * AUTHORITY_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(name: str, role: str, signing_key: bytes, hosts: Sequence[str]) -> list[x509.GeneralName]:
    try:
        Ed25519PublicKey.from_public_bytes(signing_key)
    except (ValueError, TypeError) as error:
        raise AccessError("the signing key is no Ed25519 public key of 32 bytes") from error
    if hosts and role != COORDINATOR:
        raise AccessError(f"only a coordinator's certificate names hosts; this is for {role} {name}")
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(f"commonweight://{role}/{name}"),
        x509.UniformResourceIdentifier(f"commonweight://{SIGNING_KEY}/{signing_key.hex()}"),
    ]
    if role == COORDINATOR:
        names.append(x509.DNSName(TARGET_NAME))
        names.extend(_host(host) for host in dict.fromkeys(hosts) if host != TARGET_NAME)
    if role == RELAY:
        names.append(x509.DNSName(relay_target(name)))
    return names


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in host.lower().split(".")):
        raise AccessError(
            f"{host[:80]!r} is neither a host name nor an IP address",
            hint="write it as users dial it, without scheme, port or brackets: fed.example.org, 192.0.2.7",
        )
    return x509.DNSName(host.lower())


def _moment(now: float | None) -> datetime:
    """Whole seconds: certificates hold no fractions."""
    moment = datetime.now(UTC) if now is None else datetime.fromtimestamp(now, UTC)
    return moment.replace(microsecond=0)

"""Certificates: what is asked for, what is read from them, and when one is good.

A certificate says who holds it by two URIs among its subject alternative names, and by nothing else:

    commonweight://<role>/<name>
    commonweight://signing-key/<hex of the Ed25519 public key>

The key of a certificate itself (ECDSA P-256) only serves TLS. RFC 5280 has the fields.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from ..errors import AccessError
from .keys import private_key_from_pem, private_pem, read_private, write_private
from .roles import NAME, ROLES, SERVERS

#: a clock may be behind the authority's by this much (seconds)
CLOCK_SKEW_S = 300.0

SIGNING_KEY = "signing-key"

_URI = re.compile(r"commonweight://([^/]*)/([^/]*)")
_KEY_HEX = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 1 << 14
_DAMAGED = "take it from whoever issued it again, or enrol anew"


@dataclass(frozen=True)
class Holder:
    """Who holds a certificate, and the certificate itself in short.

    Args:
        name: of the site, user or coordinator.
        role: one of `roles.ROLES`.
        signing_key: its Ed25519 public key, 32 bytes.
        serial: the certificate's serial number, lower-case hex.
        not_before, not_after: when it is good, seconds since the epoch.
        fingerprint: SHA-256 of the certificate (DER), lower-case hex.
    """

    name: str
    role: str
    signing_key: bytes
    serial: str
    not_before: float
    not_after: float
    fingerprint: str

    def check_time(self, at: float) -> None:
        """Refuse a certificate that is not good at `at` (seconds since the epoch).

        Raises:
            AccessError: it has expired, or is not yet good.
        """
        _check_time(f"the certificate of {self.role} {self.name}", self.not_before, self.not_after, at)


def new_tls_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def load_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a TLS key's file.

    Raises:
        AccessError: it is missing, can be read by others, or is no P-256 key.
        StorageError: it cannot be read.
    """
    return tls_key_from_pem(read_private(path), str(path))


def tls_key_from_pem(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    """A TLS key from its PEM text, which `where` holds.

    Raises:
        AccessError: it is no P-256 key.
    """
    key = private_key_from_pem(pem, where)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        kind = key_kind(key.public_key())
        raise AccessError(f"{where} holds {kind}; TLS keys are ECDSA P-256", hint="enrol anew in a new folder")
    return key


def save_tls_key(key: ec.EllipticCurvePrivateKey, path: Path) -> None:
    """Write it as PEM (PKCS #8), for the owner only; never over another file (`keys.write_private`)."""
    write_private(path, private_pem(key))


def new_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request for a certificate of this key: PKCS #10, DER, with an empty subject, signed by the key itself."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The P-256 key that a request (PKCS #10, DER) is for; nothing else that the request says is looked at.

    Raises:
        AccessError: it cannot be read, its key is of another kind, or it was not signed by that key.
    """
    if len(request) > _MOST_BYTES:
        raise AccessError(f"the certificate request is {len(request):,} bytes long, more than any that is honest")
    try:
        csr = x509.load_der_x509_csr(request)
        key = csr.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.UnsupportedGeneralNameType) as error:
        raise AccessError(f"the certificate request cannot be read: {error}") from error
    p256 = check_p256(
        key, "the certificate request"
    )  # first: a check of some other kind's signature could be made dear
    try:
        signed = csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        signed = False
    if not signed:
        raise AccessError("the certificate request is not signed by the key that it names")
    return p256


def check_p256(key: object, what: str) -> ec.EllipticCurvePublicKey:
    """The public key, if it is of the kind that TLS keys are; `what` has it.

    Raises:
        AccessError: it is not ECDSA P-256; names its kind.
    """
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AccessError(f"{what} has {key_kind(key)}; TLS keys are ECDSA P-256")
    return key


def key_kind(key: object) -> str:
    """A public key's kind for people: `an RSA key of 2048 bits`."""
    if isinstance(key, rsa.RSAPublicKey):
        return f"an RSA key of {key.key_size} bits"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"an elliptic-curve key on {key.curve.name}"
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "an Ed25519 key"
    if isinstance(key, ed448.Ed448PublicKey):
        return "an Ed448 key"
    if isinstance(key, dsa.DSAPublicKey):
        return f"a DSA key of {key.key_size} bits"
    return "a key of another kind"


def load_certificate(pem: bytes) -> x509.Certificate:
    """The one certificate in a PEM text.

    Raises:
        AccessError: there is none, more than one, or it cannot be read.
    """
    if len(pem) > _MOST_BYTES:
        raise AccessError(f"a certificate of {len(pem):,} bytes is longer than any of commonweight's", hint=_DAMAGED)
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except (ValueError, TypeError) as error:
        raise AccessError(f"a certificate cannot be read: {error}", hint=_DAMAGED) from error
    if len(certificates) != 1:
        raise AccessError(f"one certificate was expected, and there are {len(certificates)}", hint=_DAMAGED)
    return certificates[0]


def holder_of(certificate_pem: bytes) -> Holder:
    """Who holds a certificate, by its URIs. Whether it is good, `verify_certificate` says, or TLS has.

    Raises:
        AccessError: it cannot be read, or has not exactly one role URI and one signing-key URI.
    """
    return _holder(load_certificate(certificate_pem))


def verify_certificate(certificate_pem: bytes, authority_pem: bytes, *, at: float | None = None) -> Holder:
    """Who holds a certificate, once it is proven: issued by the authority itself, for its role's use, and good at `at`.

    Args:
        certificate_pem: PEM of the one certificate.
        authority_pem: PEM of the authority's certificate, which is trusted.
        at: seconds since the epoch; None: whether it has expired is not asked (a signature made while it was good).

    Raises:
        AccessError: it is not; the message says what is wrong.
    """
    authority = load_authority(authority_pem)
    certificate = load_certificate(certificate_pem)
    holder = _holder(certificate)
    what = f"the certificate of {holder.role} {holder.name}"
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise AccessError(
            f"{what} was not issued by this authority ({authority_name(authority)})",
            hint="it belongs to another federation, or the authority was made anew: enrol anew with a new token",
        ) from error
    check_p256(certificate.public_key(), what)
    _check_use(certificate, holder, what)
    if at is not None:
        holder.check_time(at)
        _check_time("the authority's certificate", *_validity(authority), at)
    return holder


def load_authority(authority_pem: bytes) -> x509.Certificate:
    """An authority's certificate: P-256, signed by itself, allowed to issue certificates but no further authority.

    Raises:
        AccessError: it is something else.
    """
    authority = load_certificate(authority_pem)
    check_p256(authority.public_key(), "the authority's certificate")
    try:
        authority.verify_directly_issued_by(authority)
        basic = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = authority.extensions.get_extension_for_class(x509.KeyUsage).value
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise AccessError("the authority's certificate is not one that signs itself and others") from error
    if not basic.ca or basic.path_length != 0 or not usage.key_cert_sign:
        raise AccessError("the authority's certificate does not allow it to issue certificates as it should")
    return authority


def authority_name(authority: x509.Certificate) -> str:
    names = authority.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(names[0].value) if names else "unnamed"


def certificate_key(certificate_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The certificate's public key.

    Raises:
        AccessError: the certificate cannot be read, or its key is no P-256 key.
    """
    return check_p256(load_certificate(certificate_pem).public_key(), "the certificate")


def needs_renewal(holder: Holder, now: float | None = None) -> bool:
    """Whether less than a third of the certificate's life is left at `now` (seconds since the epoch)."""
    left = holder.not_after - (time.time() if now is None else now)
    return left < (holder.not_after - holder.not_before) / 3


def _holder(certificate: x509.Certificate) -> Holder:
    role, name, signing_key = _identity(_uris(certificate))
    not_before, not_after = _validity(certificate)
    return Holder(
        name=name,
        role=role,
        signing_key=signing_key,
        serial=f"{certificate.serial_number:x}",
        not_before=not_before,
        not_after=not_after,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
    )


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        return []
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise AccessError(f"the certificate's names cannot be read: {error}", hint=_DAMAGED) from error


def _identity(uris: list[str]) -> tuple[str, str, bytes]:
    """Role, name and signing key. A URI that is neither is refused: what it means, this version cannot know."""
    roles: list[tuple[str, str]] = []
    keys: list[str] = []
    for uri in uris:
        parts = _URI.fullmatch(uri)
        if parts and parts[1] in ROLES and NAME.fullmatch(parts[2]):
            roles.append((parts[1], parts[2]))
        elif parts and parts[1] == SIGNING_KEY and _KEY_HEX.fullmatch(parts[2]):
            keys.append(parts[2])
        else:
            raise AccessError(f"the certificate has a name that is not understood: {uri[:120]!r}", hint=_DAMAGED)
    if len(roles) != 1 or len(keys) != 1:
        raise AccessError(
            "a certificate names exactly one holder (commonweight://<role>/<name>) and one signing key; "
            f"this one names {len(roles)} and {len(keys)}",
            hint=_DAMAGED,
        )
    return *roles[0], bytes.fromhex(keys[0])


def _validity(certificate: x509.Certificate) -> tuple[float, float]:
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


def _check_time(what: str, not_before: float, not_after: float, at: float) -> None:
    if at < not_before:
        raise AccessError(
            f"{what} is good only from {_when(not_before)} on", hint="set this machine's clock, or wait", retry=True
        )
    if at > not_after:
        raise AccessError(f"{what} expired at {_when(not_after)}", hint="enrol anew with a new token from an admin")


def _when(t: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(t))


def _check_use(certificate: x509.Certificate, holder: Holder, what: str) -> None:
    """TLS client for sites and users, TLS client and server for coordinators and relays; never an authority."""
    wanted = {ExtendedKeyUsageOID.CLIENT_AUTH}
    if holder.role in SERVERS:
        wanted.add(ExtendedKeyUsageOID.SERVER_AUTH)
    try:
        extensions = certificate.extensions
        basic = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        uses = set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise AccessError(f"{what} does not say what it may be used for", hint=_DAMAGED) from error
    if basic.ca or usage.key_cert_sign or not usage.digital_signature or uses != wanted:
        raise AccessError(f"{what} is not for the use of a {holder.role}", hint=_DAMAGED)

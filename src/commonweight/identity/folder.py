"""An identity folder: all that a site, a user or a coordinator is known by.

tls.key         ECDSA P-256, mode 0600; stays while certificates come and go
tls.pem         the certificate of the moment; without it the folder has not been enrolled yet
authority.pem   whom to trust
signing.key     Ed25519, mode 0600; its public half was pinned at enrolment
identity.json   name, role, and the address to dial

Joining happens in two steps, and may be cut between them: `prepare` makes the keys and what to send, `complete` writes
what came back. The keys stay the same when the first is repeated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from ..errors import AccessError
from .certificates import (
    Holder,
    certificate_key,
    load_tls_key,
    new_request,
    new_tls_key,
    save_tls_key,
    verify_certificate,
)
from .keys import ENROL, SigningKey, present, private_folder, private_pem, read_public, write_public
from .roles import check_name, check_role
from .tokens import check_address

_TLS_KEY, _TLS, _AUTHORITY, _SIGNING, _ABOUT = "tls.key", "tls.pem", "authority.pem", "signing.key", "identity.json"


@dataclass(frozen=True)
class Enrolling:
    """What the joining side sends.

    Args:
        csr: request for a certificate (PKCS #10, DER).
        signing_key: its Ed25519 public key, 32 bytes.
        possession: signature by that key over `csr` (domain `ENROL`).
    """

    csr: bytes
    signing_key: bytes
    possession: bytes


class _About(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(check_name)]
    role: Annotated[str, AfterValidator(check_role)]
    address: Annotated[str, AfterValidator(check_address)]


@dataclass(frozen=True)
class IdentityFolder:
    """An identity as it was read from its folder, every part checked against the others.

    Args:
        path: the folder.
        holder: what the certificate says.
        address: of the coordinator's services, host:port.
        signing_key: signs what must be provable later.
        tls_key, certificate, authority: PEM.
    """

    path: Path
    holder: Holder
    address: str
    signing_key: SigningKey
    tls_key: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    authority: bytes = field(repr=False)

    @classmethod
    def open(cls, path: Path, *, at: float | None = None) -> Self:
        """Read an identity.

        Args:
            path: the folder.
            at: seconds since the epoch at which the certificate must be good; None: one that has expired opens too.

        Raises:
            AccessError: it is not enrolled, a part is missing, a key can be read by others, the parts do not belong
                together, or the certificate is not good.
            StorageError: it cannot be read.
        """
        if not _is_enrolled(path):
            raise AccessError(
                f"{path} holds no identity that has been enrolled",
                hint="enrol with a token from the federation's admin, or correct the path",
            )
        key = load_tls_key(path / _TLS_KEY)
        signing = SigningKey.load(path / _SIGNING)
        certificate, authority = read_public(path / _TLS), read_public(path / _AUTHORITY)
        about = _read_about(path / _ABOUT)
        holder = _belongs(path, key, signing, certificate, authority, (about.name, about.role), at)
        return cls(path, holder, about.address, signing, private_pem(key), certificate, authority)

    @staticmethod
    def prepare(path: Path) -> Enrolling:
        """Make the folder and its keys, if they are not there yet, and what to send to be enrolled.

        Raises:
            AccessError: the folder is enrolled already, others may enter it, or its keys are damaged.
            StorageError: it cannot be written.
        """
        private_folder(path)
        if present(path / _TLS):
            raise AccessError(
                f"{path} is enrolled already", hint="use it; to be enrolled anew, choose a new folder or move this one"
            )
        if not present(path / _TLS_KEY):
            save_tls_key(new_tls_key(), path / _TLS_KEY)
        if not present(path / _SIGNING):
            SigningKey.generate().save(path / _SIGNING)
        signing = SigningKey.load(path / _SIGNING)
        csr = new_request(load_tls_key(path / _TLS_KEY))
        return Enrolling(csr, signing.public, signing.sign(ENROL, csr))

    @classmethod
    def complete(cls, path: Path, *, name: str, role: str, certificate: bytes, authority: bytes, address: str) -> Self:
        """Write what enrolment brought into a prepared folder, once it is proven to be for it.

        Args:
            path: a folder that `prepare` made.
            name, role: whom the token names.
            certificate: PEM of what was issued.
            authority: PEM of the authority's certificate: the token's, which alone is trusted.
            address: of the coordinator's services, host:port.

        Raises:
            AccessError: the certificate is not for this folder's keys, for another holder, or of another authority.
            StorageError: the folder cannot be written.
        """
        key, signing = load_tls_key(path / _TLS_KEY), SigningKey.load(path / _SIGNING)
        _belongs(path, key, signing, certificate, authority, (name, role), None)
        about = {"name": name, "role": role, "address": check_address(address)}
        write_public(path / _AUTHORITY, authority)
        write_public(path / _ABOUT, (json.dumps(about, indent=1) + "\n").encode())
        write_public(path / _TLS, certificate)  # last: it is what makes the folder an enrolled one
        return cls.open(path)

    def request(self) -> bytes:
        """A request for the next certificate (PKCS #10, DER), of the same key."""
        return new_request(load_tls_key(self.path / _TLS_KEY))

    def write_certificate(self, certificate: bytes) -> Self:
        """Put a renewed certificate (PEM) in the old one's place, and read the folder anew.

        Key and certificate stay a pair at every instant, for the key does not change.

        Raises:
            AccessError: it is not for this key, this holder, or of this authority; the old one stays.
            StorageError: it cannot be written.
        """
        key = load_tls_key(self.path / _TLS_KEY)
        wanted = (self.holder.name, self.holder.role)
        _belongs(self.path, key, self.signing_key, certificate, self.authority, wanted, None)
        write_public(self.path / _TLS, certificate)
        return self.open(self.path)


def _is_enrolled(path: Path) -> bool:
    """A folder that may not be looked into counts: reading it will tell why."""
    try:
        (path / _TLS).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _belongs(
    path: Path,
    key: ec.EllipticCurvePrivateKey,
    signing: SigningKey,
    certificate: bytes,
    authority: bytes,
    wanted: tuple[str, str],
    at: float | None,
) -> Holder:
    """Whose the certificate is, once it is shown to be for this folder's keys and for the holder wanted."""
    holder = verify_certificate(certificate, authority, at=at)
    if (holder.name, holder.role) != wanted:
        raise AccessError(
            f"the certificate for {path} is of {holder.role} {holder.name}, not of {wanted[1]} {wanted[0]}"
        )
    if certificate_key(certificate) != key.public_key():
        raise AccessError(f"the certificate for {path} is not for the TLS key there")
    if holder.signing_key != signing.public:
        raise AccessError(f"the certificate for {path} names another signing key than the one there")
    return holder


def _read_about(path: Path) -> _About:
    try:
        return _About.model_validate_json(read_public(path))
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()[:3])
        raise AccessError(f"{path} is not well formed: {what}", hint="restore it from a copy, or enrol anew") from error

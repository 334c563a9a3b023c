"""Private keys: how they lie on disk, and the Ed25519 keys that sign what must be provable later.

Every signature is over a domain line ‖ the message, so that a signature made for one purpose never fits another.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from ..errors import AccessError, StorageError

#: domain lines: what a signature is for
UPDATE = b"commonweight update 1\n"
JOB = b"commonweight job 1\n"
PARTIAL = b"commonweight partial 1\n"
AUDIT = b"commonweight audit 1\n"
ENROL = b"commonweight enrol 1\n"
SUM = b"commonweight sum 1\n"

DOMAINS = frozenset({UPDATE, JOB, PARTIAL, AUDIT, ENROL, SUM})

#: no file of an identity comes near this
_MOST_BYTES = 1 << 16


class SigningKey:
    """An Ed25519 private key (RFC 8032). It is never shown, copied into a message, or pickled."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read what `save` wrote.

        Raises:
            AccessError: the file is missing, can be read by others, or is no Ed25519 key.
            StorageError: it cannot be read.
        """
        key = load_private_key(path)
        if not isinstance(key, Ed25519PrivateKey):
            raise AccessError(f"{path} is no Ed25519 key", hint="restore the folder from a copy, or enrol anew")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write it as PEM (PKCS #8), for the owner only.

        Raises:
            AccessError: there is a file already: a key is never written over.
            StorageError: it cannot be written.
        """
        write_private(path, private_pem(self._key))

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """The signature of `message` for one purpose, 64 bytes.

        Raises:
            ValueError: `domain` is none of this module's domain lines.
        """
        return self._key.sign(_known(domain) + message)

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public.hex()})"

    def __reduce__(self) -> str:
        raise TypeError("a signing key is not pickled: load it from its file where it is needed")


def verify(public: bytes, domain: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is that of `message`, for this purpose, by the key whose public half is `public` (32 bytes).

    Anything malformed that came from outside is simply False.

    Raises:
        ValueError: `domain` is none of this module's domain lines.
    """
    signed = _known(domain) + message
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, signed)
    except (InvalidSignature, ValueError):
        return False
    return True


def _known(domain: bytes) -> bytes:
    if domain not in DOMAINS:
        raise ValueError(f"{domain!r} is no domain line of commonweight")
    return domain


# ---- keys and secrets as files


def private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM (PKCS #8), not encrypted: the file's permissions guard it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_private_key(path: Path) -> PrivateKeyTypes:
    """Read a private key's file.

    Raises:
        AccessError: it is missing, can be read by others, or holds no private key.
        StorageError: it cannot be read.
    """
    return private_key_from_pem(read_private(path), str(path))


def private_key_from_pem(pem: bytes, where: str) -> PrivateKeyTypes:
    """A private key from its PEM text, which `where` holds.

    Raises:
        AccessError: it is none.
    """
    try:
        return load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AccessError(
            f"{where} holds no private key that can be used", hint="restore the folder from a copy, or enrol anew"
        ) from error


def read_private(path: Path) -> bytes:
    """A secret file's content; only its owner may be able to read it.

    Raises:
        AccessError: it is missing, no plain file, can be read or written by others, or is far too long.
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise AccessError(f"{path} is no plain file", hint="restore the folder from a copy, or enrol anew")
            if mode & 0o077:
                raise AccessError(
                    f"{path} is secret, but others than its owner may use it (mode {stat.S_IMODE(mode):04o})",
                    hint=f"run `chmod 600 {path}`; if others may have read it, enrol anew and revoke the old identity",
                )
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise AccessError(f"{path} is missing", hint="restore the folder from a copy, or enrol anew") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}", hint="check whose file it is") from error
    if len(content) > _MOST_BYTES:
        raise AccessError(f"{path} is longer than any key", hint="restore the folder from a copy, or enrol anew")
    return content


def read_public(path: Path) -> bytes:
    """The content of a file that is no secret: a certificate.

    Raises:
        AccessError: it is missing, or far too long.
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise AccessError(f"{path} is missing", hint="restore the folder from a copy, or enrol anew") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}", hint="check whose file it is") from error
    if len(content) > _MOST_BYTES:
        raise AccessError(f"{path} is far too long", hint="restore the folder from a copy, or enrol anew")
    return content


def present(path: Path) -> bool:
    """Whether something bears this name, as far as this process may see."""
    try:
        path.lstat()
    except OSError:
        return False
    return True


def write_private(path: Path, content: bytes) -> None:
    """Write a secret, whole or not at all, mode 0600 from its first byte on.

    Raises:
        AccessError: there is a file already: a secret is never written over.
        StorageError: it cannot be written.
    """
    if present(path):
        raise AccessError(f"{path} exists already", hint="a key is never written over: choose another folder")
    _write(path, content, 0o600)


def write_public(path: Path, content: bytes) -> None:
    """Write a file that is no secret (mode 0644), whole or not at all, in the place of the one before.

    Raises:
        StorageError: it cannot be written.
    """
    _write(path, content, 0o644)


def private_folder(path: Path) -> None:
    """Make a folder that only its owner may enter (mode 0700), or check that it is one.

    Raises:
        AccessError: it is there, and others may enter it or write in it.
        StorageError: it cannot be made.
    """
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise AccessError(
            f"{path} is to hold keys, but others than its owner may enter it (mode {mode:04o})",
            hint=f"run `chmod 700 {path}`, or choose a new folder",
        )


def _write(path: Path, content: bytes, mode: int) -> None:
    """By a temporary file beside it (made 0600), so that a crash leaves the old file or the new one."""
    with _storage_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """The new name, too, must outlive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(
            f"cannot write {path}: {'the disk is full' if full else error.strerror or error}",
            hint="free some space, then repeat" if full else "check that you may write there",
            retry=full,
        ) from error

"""Encryption at rest of what single sites sent: a key for each file, wrapped under the coordinator's master key.

    wrapped key   version 1 ‖ id of the master key (8) ‖ nonce (12) ‖ AES-256-GCM(the file's key), 61 bytes
    sealed file   records of equal room, `chunk_bytes` + 28; record i lies at i · room:
                  length (4, big-endian) ‖ random (8) ‖ AES-256-GCM(chunk) ‖ tag (16) ‖ unused

A record's nonce is its random part ‖ its index, so that a chunk may be written again and two writes of different
indexes can never share a nonce. Its associated data are the file's id (from its key), the index and the length:
a record that was moved, cut or mixed from two writes does not decrypt, and counts as missing. Nothing but the master
key has to be kept secret, and a file whose wrapped key is deleted cannot be read by anyone.
"""

from __future__ import annotations

import errno
import hmac
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import AccessError, StateError, StorageError

#: bytes that a record needs beside its chunk
OVERHEAD = 28
KEY_BYTES = 32
MAX_INDEX = 2**32

_HEAD, _TAG, _NONCE = 12, 16, 12
_VERSION = b"\x01"
_WRAPPED_BYTES = 1 + 8 + _NONCE + KEY_BYTES + _TAG
_DOMAIN = b"commonweight data key 1\n"
#: added in a later release of cryptography than the oldest that is supported
_INTO = hasattr(AESGCM, "decrypt_into")

Buffer = bytes | bytearray | memoryview


class Vault:
    """Wraps the keys of sealed files.

    Args:
        master_key: 32 random bytes, the same on every replica.
        name: what to call it in messages, its file's path.
    """

    def __init__(self, master_key: bytes, *, name: str = "the master key") -> None:
        if len(master_key) != KEY_BYTES:
            raise StateError(
                f"{name} has {len(master_key)} bytes, not {KEY_BYTES}",
                hint="restore it from its copy",
            )
        self.name = name
        self._cipher = AESGCM(master_key)
        self._id = _derived(master_key, b"commonweight master key id", 8)

    @classmethod
    def create(cls, path: Path) -> Vault:
        """Write a new master key, readable by its owner only.

        Raises:
            StateError: there is one already; it is left as it is.
            StorageError: it cannot be written.
        """
        temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
        with _explained(path):
            try:
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(os.urandom(KEY_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, path)  # unlike a rename, it never replaces a key
                _sync_folder(path.parent)
            except FileExistsError as error:
                raise StateError(
                    f"{path} already exists", hint="keep it: updates at rest can be read with no other"
                ) from error
            finally:
                temporary.unlink(missing_ok=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Vault:
        """Read a master key.

        Raises:
            StateError: it is missing, or no key.
            AccessError: others than its owner may read it.
            StorageError: it cannot be read.
        """
        try:
            mode, key = path.stat().st_mode, path.read_bytes()
        except FileNotFoundError as error:
            raise StateError(f"{path} is missing", hint="restore the coordinator's master key from its copy") from error
        except OSError as error:
            raise _storage_error(path, error) from error
        if mode & 0o077:
            raise AccessError(f"others may read {path}", hint=f"run: chmod 600 {path}")
        return cls(key, name=str(path))

    def new_key(self, context: str) -> tuple[bytes, bytes]:
        """A new file's key, and the same wrapped, to be kept with what `context` names (run, round and site)."""
        key = os.urandom(KEY_BYTES)
        return key, self.wrap(key, context)

    def wrap(self, key: bytes, context: str) -> bytes:
        """A key of 32 bytes, wrapped, to be kept with what `context` names."""
        nonce = os.urandom(_NONCE)
        return _VERSION + self._id + nonce + self._cipher.encrypt(nonce, key, self._aad(context))

    def unwrap(self, wrapped: bytes, context: str) -> bytes:
        """The key of `new_key`.

        Raises:
            StateError: it was wrapped under another master key, or for another context, or is damaged.
        """
        if len(wrapped) != _WRAPPED_BYTES or wrapped[:1] != _VERSION:
            raise StateError(f"the key of {context} is damaged", hint="discard that upload: the site sends it again")
        master, nonce, sealed = wrapped[1:9], wrapped[9 : 9 + _NONCE], wrapped[9 + _NONCE :]
        if master != self._id:
            raise StateError(
                f"the key of {context} was wrapped under another master key ({master.hex()}) than {self.name} "
                f"({self._id.hex()})",
                hint="put back the master key that this coordinator's database was filled with",
            )
        try:
            return self._cipher.decrypt(nonce, sealed, self._aad(context))
        except InvalidTag as error:
            raise StateError(
                f"the key of {context} does not open with {self.name}: it is damaged, or belongs to something else",
                hint="discard that upload: the site sends it again",
            ) from error

    def _aad(self, context: str) -> bytes:
        return _DOMAIN + self._id + context.encode()


class SealedFile:
    """A file of encrypted chunks, each of which can be written and read alone, in any order.

    Several threads may use it at once; two that write the same index at once may leave it missing. A write that was cut
    short, by a crash or a full disk, leaves its record missing and touches no other. Close it when no thread uses it.

    Args:
        path: the file; made (mode 0600) if it does not exist and is writable.
        key: its own key (`Vault.new_key`), 32 bytes, used for no other file.
        chunk_bytes: the most that a chunk may have.
        writable: False: the file has to exist, and is only read.

    Raises:
        StateError: it is only to be read and does not exist.
        StorageError: it cannot be opened.
    """

    def __init__(self, path: Path, key: bytes, chunk_bytes: int, *, writable: bool = True) -> None:
        if len(key) != KEY_BYTES or not 0 < chunk_bytes < 2**31:
            raise ValueError(f"a sealed file needs a key of {KEY_BYTES} bytes and chunks of at least one byte")
        self.path, self.chunk_bytes, self.room = path, chunk_bytes, chunk_bytes + OVERHEAD
        self._cipher = AESGCM(key)
        self._id = _derived(key, b"commonweight sealed file id", 16)
        self._fd = _opened(path, writable)

    def write(self, index: int, data: Buffer) -> None:
        """Encrypt and write a chunk of 1 to `chunk_bytes` bytes. It is on the disk after the next `sync`.

        Raises:
            StorageError: the disk is full (`retry` is True) or failing.
        """
        data = memoryview(data).cast("B")
        if not 0 < data.nbytes <= self.chunk_bytes:
            raise ValueError(f"a chunk of {data.nbytes} bytes, in a file of chunks of 1 to {self.chunk_bytes}")
        head = data.nbytes.to_bytes(4, "big") + os.urandom(8)
        size = _HEAD + data.nbytes + _TAG
        record = _buffer("record", size)
        record[:_HEAD] = head
        nonce, aad = self._binding(index, head)
        if _INTO:
            self._cipher.encrypt_into(nonce, data, aad, record[_HEAD:])
        else:
            record[_HEAD:] = self._cipher.encrypt(nonce, data, aad)
        with _explained(self.path):
            _write_all(self._fd, record, index * self.room)

    def read_into(self, index: int, out: bytearray | memoryview) -> int | None:
        """Decrypt a chunk into the front of `out`; its length in bytes, or None when there is no whole record.

        Nothing unverified is left in `out`: where decryption fails, that part of it is zero.

        Raises:
            ValueError: `out` is shorter than the chunk.
            StorageError: the file cannot be read.
        """
        record = self._record(index)
        if record is None:
            return None
        length = len(record) - _HEAD - _TAG
        out = memoryview(out).cast("B")
        if out.nbytes < length:
            raise ValueError(f"a chunk of {length} bytes does not fit a buffer of {out.nbytes}")
        nonce, aad = self._binding(index, bytes(record[:_HEAD]))
        try:
            if _INTO:
                self._cipher.decrypt_into(nonce, record[_HEAD:], aad, out[:length])
            else:
                out[:length] = self._cipher.decrypt(nonce, record[_HEAD:], aad)
        except InvalidTag:
            out[:length] = bytes(length)
            return None
        return length

    def read(self, index: int) -> bytes | None:
        """A chunk, or None when there is no whole record."""
        plain = _buffer("plain", self.chunk_bytes)
        length = self.read_into(index, plain)
        return None if length is None else bytes(plain[:length])

    def present(self, num_chunks: int, check: Callable[[int, memoryview], bool] | None = None) -> list[int]:
        """Which of the first `num_chunks` records decrypt and pass `check` (index, chunk), in order.

        The chunk that `check` sees is only good during the call.
        """
        plain = _buffer("plain", self.chunk_bytes)
        found = []
        for index in range(num_chunks):
            length = self.read_into(index, plain)
            if length is not None and (check is None or check(index, plain[:length])):
                found.append(index)
        return found

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        with _explained(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, index: int) -> memoryview | None:
        """The bytes of a record that has a length and is not cut off, in this thread's buffer."""
        _check_index(index)
        room = _buffer("record", self.room)
        with _explained(self.path):
            got = _read_all(self._fd, room, index * self.room)
        length = int.from_bytes(room[:4], "big") if got >= _HEAD else 0
        if not 0 < length <= self.chunk_bytes or got < _HEAD + length + _TAG:
            return None
        return room[: _HEAD + length + _TAG]

    def _binding(self, index: int, head: bytes) -> tuple[bytes, bytes]:
        """A record's nonce and associated data."""
        _check_index(index)
        place = index.to_bytes(4, "big")
        return head[4:] + place, self._id + place + head[:4]


_local = threading.local()


def _buffer(name: str, size: int) -> memoryview:
    """This thread's buffer of that name, as long as is needed; all its files share it, for there may be thousands."""
    buffer: memoryview | None = getattr(_local, name, None)
    if buffer is None or buffer.nbytes < size:
        buffer = memoryview(bytearray(size))
        setattr(_local, name, buffer)
    return buffer[:size]


def _check_index(index: int) -> None:
    if not 0 <= index < MAX_INDEX:
        raise ValueError(f"index {index} is none that a sealed file has")


def _derived(key: bytes, label: bytes, size: int) -> bytes:
    return hmac.digest(key, label, "sha256")[:size]


def _opened(path: Path, writable: bool) -> int:
    """A descriptor; a new file's name is on the disk before it is returned."""
    flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
    try:
        return os.open(path, flags)
    except FileNotFoundError as error:
        if not writable:
            raise StateError(f"{path} is missing", hint="discard that upload: the site sends it again") from error
    except OSError as error:
        raise _storage_error(path, error) from error
    with _explained(path):
        fd = os.open(path, flags | os.O_CREAT, 0o600)
        _sync_folder(path.parent)
        return fd


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < data.nbytes:
        done += os.pwrite(fd, data[done:], offset + done)


def _read_all(fd: int, out: memoryview, offset: int) -> int:
    """Fill a buffer from a file; the number of bytes that there were."""
    done = 0
    while done < out.nbytes:
        got = os.preadv(fd, [out[done:]], offset + done)
        if not got:
            break
        done += got
    return done


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _storage_error(path, error) from error


def _storage_error(path: Path, error: OSError) -> StorageError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StorageError(
        f"{path} cannot be read or written: {'the disk is full' if full else error.strerror or error}",
        hint="free some space; what is there stays"
        if full
        else "check that its folder exists, permissions and the disk",
        retry=full,
    )

"""Where the coordinator keeps files, global tensors and sealed updates: a folder, S3, or another store of fsspec's.

A blob's name is a key, `runs/r1/rounds/3`; what stands behind a key never changes: it is put once, read often, deleted.
A put is whole or not there. In a folder it is a rename; what a crash leaves lies in `.partial/` until `sweep`. A remote
store's blobs are read through copies in `scratch`, which `forget_local`, `delete` and `delete_prefix` remove.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..errors import StorageError

PARTIAL = ".partial"
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+@-]*(/[A-Za-z0-9_][A-Za-z0-9_.=+@-]*)*")
_KEY_BYTES, _PART_BYTES = 900, 200
_DELETE_BATCH = 1000
_S3_TIMEOUTS = {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2}}
#: options that may be shown; every other one may be a credential
_HARMLESS = {"endpoint_url", "region_name", "signature_version", "addressing_style"}
#: errors of the clients behind fsspec that are no OSError and mean that the store was not reached, by name, since the
#: packages that define them need not be installed
_UNREACHED = {
    "BotoConnectionError",
    "ClientConnectionError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "ProxyConnectionError",
    "ReadTimeoutError",
    "SSLError",
}
_PASSING = {errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO)}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}


class Blobs:
    """A store of blobs. Several threads may use it at once.

    Args:
        url: a folder, or any URL that fsspec knows: `s3://bucket/prefix`, `memory://x`.
        scratch: a folder of this machine for copies of a remote store's blobs (in its `blobs/`).
        storage_options: for the store's client: `endpoint_url`, `key`, `secret` and the like for S3. They never appear
            in a message.

    Raises:
        StorageError: the store's package is not installed, the URL or an option is wrong, or the folder cannot be made.
            Whether a remote store answers is only known by its first use (`check`).
    """

    def __init__(self, url: str, scratch: Path, **storage_options: Any) -> None:
        self.url = _shown(url)
        self._secrets = _secrets(url, storage_options)
        with self._explained():
            self._store = self._opened(url, scratch, storage_options)

    def _opened(self, url: str, scratch: Path, options: dict[str, Any]) -> _Store:
        is_s3 = url.split("://")[0] in ("s3", "s3a")
        if is_s3:
            if not urlsplit(url).netloc:
                raise StorageError(f"{self.url} names no bucket", hint="write s3://bucket or s3://bucket/prefix")
            options = {**options, "config_kwargs": {**_S3_TIMEOUTS, **options.get("config_kwargs", {})}}
        try:
            kind = fsspec.get_filesystem_class(fsspec.core.split_protocol(url)[0] or "file")
            if issubclass(kind, LocalFileSystem):
                if options:
                    raise StorageError(f"{self.url} is a folder and takes no options", hint=f"remove {_named(options)}")
                return _Folder(Path(kind._strip_protocol(url)))
            fs, root = fsspec.core.url_to_fs(url, **options, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            raise StorageError(
                f"{self.url} needs a package that is not installed",
                hint="run: pip install 'commonweight[s3]'" if is_s3 else str(error),
            ) from None
        except (ValueError, TypeError) as error:
            raise StorageError(
                f"{self.url} cannot be used as a blob store: {self._redacted(error)}",
                hint="name a folder or s3://bucket/prefix, and check the storage options",
            ) from None
        store = _S3 if is_s3 else _Remote
        return store(fs, root.rstrip("/"), scratch / "blobs")

    def put(self, key: str, path: Path) -> None:
        """Hand a file over: it is whole in the store on return, and gone from `path`.

        Within one filesystem it is moved, otherwise copied. What was there under the key is replaced.
        """
        _check_key(key)
        with self._explained(key):
            if not path.is_file():
                raise StorageError(f"{path}, to be kept as {key}, is missing or no file")
            self._store.put(key, path)

    def put_bytes(self, key: str, data: bytes) -> None:
        """Keep some bytes; all of them are in the store on return."""
        _check_key(key)
        with self._explained(key):
            self._store.put_bytes(key, data)

    def open_local(self, key: str) -> Path:
        """A file of this machine with a blob's bytes, to be read only; it lasts until the blob is deleted or forgotten.

        Raises:
            StorageError: there is no such blob; or the store cannot be reached (`retry` is True).
        """
        _check_key(key)
        with self._explained(key):
            return self._store.open_local(key)

    def get_bytes(self, key: str) -> bytes:
        """A small blob's bytes, not through the scratch folder. Raises as `open_local` does."""
        _check_key(key)
        with self._explained(key):
            return self._store.get_bytes(key)

    def exists(self, key: str) -> bool:
        _check_key(key)
        with self._explained(key):
            return self._store.exists(key)

    def keys(self, prefix: str = "") -> list[str]:
        """All keys below a prefix of whole parts, sorted: `runs/r1` has `runs/r1/a`, not `runs/r10/a`."""
        prefix = _prefix(prefix)
        with self._explained(prefix):
            return sorted(key for key in self._store.keys(prefix) if _is_key(key))

    def delete(self, key: str) -> None:
        """Delete a blob, and its copy here. One that is not there is no error.

        A bucket that keeps versions keeps deleted blobs too: turn its versioning off.
        """
        _check_key(key)
        with self._explained(key):
            self._store.delete([key])

    def take_back(self, key: str, path: Path) -> bool:
        """Delete a blob; where the store is a folder on the file system of `path`, its file is moved there instead, and
        True is returned. No blob is no error."""
        _check_key(key)
        with self._explained(key):
            if isinstance(self._store, _Folder) and self._store.move_out(key, path):
                return True
            self._store.delete([key])
        return False

    def delete_prefix(self, prefix: str) -> int:
        """Delete all blobs below a prefix, and their copies here; how many there were."""
        keys = self.keys(_prefix(prefix))
        with self._explained(prefix):
            if keys:
                self._store.delete(keys)
            self._store.forget_local(_prefix(prefix))
        return len(keys)

    def forget_local(self, prefix: str = "") -> None:
        """Delete the copies here of a remote store's blobs below a prefix (or of the blob of that name)."""
        prefix = _prefix(prefix)
        with self._explained(prefix):
            self._store.forget_local(prefix)

    def sweep(self, older_than_s: float = 3600.0) -> int:
        """Delete what crashed puts and fetches left, if it has not been written to for that long; how many there were.

        In S3 these are multipart uploads below this store's prefix that were never completed.
        """
        with self._explained():
            return self._store.sweep(time.time() - older_than_s)

    def check(self) -> None:
        """Write, read and delete a blob: raises StorageError when the store cannot be used as it is."""
        key = f"probe-{uuid.uuid4().hex}"
        self.put_bytes(key, b"commonweight")
        if self.get_bytes(key) != b"commonweight":
            raise StorageError(f"{self.url} gives back something else than what was put into it")
        self.delete(key)

    def __repr__(self) -> str:
        return f"Blobs({self.url!r})"

    @contextmanager
    def _explained(self, key: str = "") -> Iterator[None]:
        """Turn what the operating system or the store's client raises into StorageError, without credentials."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            raise self._storage_error(error, key) from None

    def _storage_error(self, error: Exception, key: str) -> StorageError:
        place = f"{self.url}: {key}" if key else self.url
        names = {kind.__name__ for kind in type(error).__mro__}
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT):
            return StorageError(f"{place}: the disk is full ({error})", hint="free some space", retry=True)
        if isinstance(error, FileNotFoundError):
            return self._missing(place)
        if isinstance(error, PermissionError) or names & _NO_CREDENTIALS:
            return StorageError(
                f"{place}: access is denied ({self._redacted(error)})",
                hint="check that the coordinator's account may read, write, list and delete there, and its credentials",
            )
        if isinstance(error, ConnectionError | TimeoutError) or names & _UNREACHED:
            return StorageError(
                f"{self.url} cannot be reached ({self._redacted(error)})",
                hint="check the store's address and the network, then try again",
                retry=True,
            )
        return StorageError(
            f"{place} cannot be read or written: {self._redacted(error)}",
            hint="check the store and its options",
            retry=number in _PASSING,
        )

    def _missing(self, place: str) -> StorageError:
        store: _Store | None = getattr(self, "_store", None)
        there = True
        with suppress(Exception):
            there = store is None or store.there()
        if there:
            return StorageError(f"{place} does not exist", hint="it may have been deleted since; see what its run says")
        return StorageError(f"{self.url} does not exist", hint="make the bucket or folder, or correct its name")

    def _redacted(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return " ".join(text.split())[:300]


class _Store(Protocol):
    """What `Blobs` needs of a kind of store; keys are checked already."""

    def put(self, key: str, path: Path) -> None: ...
    def put_bytes(self, key: str, data: bytes) -> None: ...
    def open_local(self, key: str) -> Path: ...
    def get_bytes(self, key: str) -> bytes: ...
    def exists(self, key: str) -> bool: ...
    def keys(self, prefix: str) -> list[str]: ...
    def delete(self, keys: list[str]) -> None: ...
    def forget_local(self, prefix: str) -> None: ...
    def sweep(self, before: float) -> int: ...
    def there(self) -> bool: ...


class _Folder:
    """Blobs as files below a folder. Half-written ones lie in its `.partial/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / PARTIAL).mkdir(parents=True, exist_ok=True)

    def put(self, key: str, path: Path) -> None:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        if not path.is_symlink():
            try:
                self._rename(path, key)
                return
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        with self._partial() as temporary:
            shutil.copyfile(path, temporary)
            _sync(temporary)
            self._rename(temporary, key)
        path.unlink()

    def put_bytes(self, key: str, data: bytes) -> None:
        with self._partial() as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            self._rename(temporary, key)

    @contextmanager
    def _partial(self) -> Iterator[Path]:
        temporary = self.root / PARTIAL / uuid.uuid4().hex
        temporary.parent.mkdir(exist_ok=True)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _rename(self, path: Path, key: str) -> None:
        """Move a file to its key; again when a `delete` takes the folder away in between."""
        target = self.root / key
        for last in (False, False, False, True):
            made = _make_folders(target.parent)
            try:
                path.replace(target)
                break
            except FileNotFoundError:
                if last or not path.exists():
                    raise
        for folder in {target.parent, *made}:
            _sync(folder)

    def open_local(self, key: str) -> Path:
        path = self.root / key
        if not path.is_file():
            raise FileNotFoundError(key)
        return path

    def get_bytes(self, key: str) -> bytes:
        return self.open_local(key).read_bytes()

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def keys(self, prefix: str) -> list[str]:
        found: list[str] = []
        for folder, folders, names in os.walk(self.root / prefix, onerror=_unless_missing):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [(Path(folder) / name).relative_to(self.root).as_posix() for name in names]
        return found

    def move_out(self, key: str, path: Path) -> bool:
        """Move a blob's file to `path`; False if it is not there, or `path` is on another file system."""
        with suppress(OSError):
            (self.root / key).rename(path)
            self.delete([key])  # the folders that it has left empty
            return True
        return False

    def delete(self, keys: list[str]) -> None:
        parents = set()
        for key in keys:
            path = self.root / key
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
            parents |= set(path.relative_to(self.root).parents[:-1])
        for parent in sorted(parents, key=lambda parent: -len(parent.parts)):
            with suppress(OSError):  # not empty, or gone
                (self.root / parent).rmdir()

    def forget_local(self, prefix: str) -> None:
        """The store is local itself: there are no copies."""

    def sweep(self, before: float) -> int:
        return _sweep(self.root / PARTIAL, before)

    def there(self) -> bool:
        return self.root.is_dir()


class _Remote:
    """Blobs in a store that fsspec reaches, with copies below a folder of this machine."""

    def __init__(self, fs: Any, root: str, cache: Path) -> None:
        self.fs, self.root, self.cache = fs, root, cache
        (cache / PARTIAL).mkdir(parents=True, exist_ok=True)
        # a copy is made and deleted under its lock, so that a deleted blob's copy cannot come back
        self._locks = [threading.Lock() for _ in range(64)]

    def put(self, key: str, path: Path) -> None:
        with self._lock(key):
            self.fs.put_file(str(path), self._at(key))
            copy = self.cache / key
            try:  # it is likely to be read here next
                copy.parent.mkdir(parents=True, exist_ok=True)
                path.replace(copy)
            except OSError:
                copy.unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def put_bytes(self, key: str, data: bytes) -> None:
        with self._lock(key):
            self.fs.pipe_file(self._at(key), data)
            (self.cache / key).unlink(missing_ok=True)

    def open_local(self, key: str) -> Path:
        copy = self.cache / key
        with self._lock(key):
            if copy.is_file():
                return copy
            temporary = self.cache / PARTIAL / uuid.uuid4().hex
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.fs.get_file(self._at(key), str(temporary))
                copy.parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(copy)
            finally:
                temporary.unlink(missing_ok=True)
        return copy

    def get_bytes(self, key: str) -> bytes:
        return bytes(self.fs.cat_file(self._at(key)))

    def exists(self, key: str) -> bool:
        try:
            return bool(self.fs.info(self._at(key))["type"] == "file")
        except FileNotFoundError:
            if not self.there():
                raise
            return False

    def keys(self, prefix: str) -> list[str]:
        base = self._at(prefix) if prefix else self.root
        try:
            found = self.fs.find(base)
        except FileNotFoundError:
            found = []
        if not found and not self.there():
            raise FileNotFoundError(self.root)
        start = f"{base.lstrip('/')}/"
        below = [path.lstrip("/").removeprefix(start) for path in found if path.lstrip("/").startswith(start)]
        return [f"{prefix}/{key}" if prefix else key for key in below]

    def delete(self, keys: list[str]) -> None:
        self._delete_there(keys)
        for key in keys:
            with self._lock(key):
                (self.cache / key).unlink(missing_ok=True)

    def _delete_there(self, keys: list[str]) -> None:
        for key in keys:
            with suppress(FileNotFoundError):
                self.fs.rm_file(self._at(key))

    def forget_local(self, prefix: str) -> None:
        for folder, folders, names in os.walk(self.cache / prefix, onerror=_unless_missing):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder) / name
                with self._lock(path.relative_to(self.cache).as_posix()):
                    path.unlink(missing_ok=True)
        if prefix:
            with self._lock(prefix), suppress(IsADirectoryError, PermissionError, NotADirectoryError):
                (self.cache / prefix).unlink(missing_ok=True)

    def sweep(self, before: float) -> int:
        return _sweep(self.cache / PARTIAL, before)

    def there(self) -> bool:
        return True  # what is missing is made by the first put

    def _at(self, key: str) -> str:
        return f"{self.root}/{key}"

    def _lock(self, key: str) -> threading.Lock:
        return self._locks[hash(key) % len(self._locks)]


class _S3(_Remote):
    """Blobs below a prefix of an S3 bucket."""

    def __init__(self, fs: Any, root: str, cache: Path) -> None:
        super().__init__(fs, root, cache)
        self.bucket, _, prefix = root.partition("/")
        self.prefix = f"{prefix}/" if prefix else ""

    def _delete_there(self, keys: list[str]) -> None:
        """As fs.rm does, which however says nothing of blobs that the store did not delete."""
        for start in range(0, len(keys), _DELETE_BATCH):
            objects = [{"Key": self.prefix + key} for key in keys[start : start + _DELETE_BATCH]]
            answer = self.fs.call_s3("delete_objects", Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
            for error in answer.get("Errors", []):
                what = f"{error.get('Code')} for {error.get('Key')}, which is not deleted"
                raise PermissionError(what) if error.get("Code") == "AccessDenied" else OSError(errno.EIO, what)

    def sweep(self, before: float) -> int:
        """Also ends multipart uploads that were begun before then: they are invisible, and cost their room."""
        removed = super().sweep(before)
        uploads = self.fs.call_s3("list_multipart_uploads", Bucket=self.bucket, Prefix=self.prefix).get("Uploads", [])
        old = [upload for upload in uploads if upload["Initiated"].timestamp() < before]
        for upload in old:
            where = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            with suppress(FileNotFoundError):
                self.fs.call_s3("abort_multipart_upload", **where)
        return removed + len(old)

    def there(self) -> bool:
        return bool(self.fs.exists(self.bucket))


def _is_key(key: str) -> bool:
    return (
        len(key) <= _KEY_BYTES
        and _KEY.fullmatch(key) is not None
        and all(len(part) <= _PART_BYTES for part in key.split("/"))
    )


def _check_key(key: str) -> None:
    if not _is_key(key):
        raise StorageError(
            f"{key[:80]!r} is no key of a blob",
            hint="a key is parts of letters, digits and _.=+@- joined by /, none of which begins with a dot",
        )


def _prefix(prefix: str) -> str:
    """A checked prefix, without the slash that it may end in."""
    prefix = prefix.removesuffix("/")
    if prefix:
        _check_key(prefix)
    return prefix


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; those whose entries changed thereby."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
    return [one.parent for one in missing]


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    with suppress(FileNotFoundError):  # a folder that a delete has taken away again
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(folder: Path, before: float) -> int:
    removed = 0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < before:
                path.unlink()
                removed += 1
    return removed


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _named(options: Mapping[str, Any]) -> str:
    return ", ".join(sorted(options))


def _shown(url: str) -> str:
    """A URL without user, password and query."""
    if "://" not in url:
        return url
    before, _, after = url.rpartition("://")
    host, slash, path = after.partition("/")
    return f"{before}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


def _secrets(url: str, options: Mapping[str, Any]) -> list[str]:
    """Every text that must not be shown: all options but the harmless, and what stands before @ in addresses."""
    found = set(_leaves(options))
    for address in (url, str(options.get("endpoint_url", ""))):
        user, at, _ = address.rpartition("://")[2].partition("/")[0].rpartition("@")
        found |= {*user.split(":"), *map(unquote, user.split(":"))} if at else set()
    return sorted((secret for secret in found if len(secret) > 2), key=len, reverse=True)


def _leaves(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _leaves(one, str(key))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one, name)
    elif isinstance(value, bytes | str) and name not in _HARMLESS:
        yield value if isinstance(value, str) else value.decode(errors="replace")

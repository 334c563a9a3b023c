"""One store's behaviour, whatever is behind it: a folder, S3, another file system of fsspec's."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from commonweight.coordinator import blobs as blobs_module
from commonweight.coordinator.blobs import PARTIAL, Blobs
from commonweight.errors import StorageError
from tests.s3 import KEY, SECRET, Bucket, s3, s3_server  # noqa: F401

Open = Callable[[], Blobs]


@pytest.fixture(params=["folder", "s3", "memory"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens one and the same store, each time as another replica with a scratch folder of its own would."""
    options: dict[str, Any] = {}
    if request.param == "folder":
        url = str(tmp_path / "store")
    elif request.param == "s3":
        bucket: Bucket = request.getfixturevalue("s3")
        url, options = bucket.url, bucket.options
    else:
        url = f"memory://{uuid.uuid4().hex}"
    return lambda: Blobs(url, tmp_path / f"scratch-{uuid.uuid4().hex}", **options)


@pytest.fixture
def store(reopen: Open) -> Blobs:
    return reopen()


@pytest.fixture
def folder(tmp_path: Path) -> Blobs:
    return Blobs(str(tmp_path / "store"), tmp_path / "scratch")


@pytest.fixture
def remote(tmp_path: Path) -> Blobs:
    return Blobs(f"memory://{uuid.uuid4().hex}", tmp_path / "scratch")


@pytest.fixture
def source(tmp_path: Path) -> Callable[[bytes], Path]:
    def make(data: bytes) -> Path:
        path = tmp_path / uuid.uuid4().hex
        path.write_bytes(data)
        return path

    return make


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- what every store does ----------------------------------------------------------------------------------------


def test_a_file_handed_over_is_read_by_another_replica(
    reopen: Open, store: Blobs, source: Callable[[bytes], Path]
) -> None:
    data = os.urandom(300_000)
    path = source(data)
    store.put("runs/r1/frames/ab", path)
    assert not path.exists()
    for one in (store, reopen()):
        assert one.exists("runs/r1/frames/ab")
        assert one.open_local("runs/r1/frames/ab").read_bytes() == data
        assert one.get_bytes("runs/r1/frames/ab") == data


def test_bytes_and_empty_blobs(reopen: Open, store: Blobs, source: Callable[[bytes], Path]) -> None:
    store.put_bytes("a/header", b"\x00header")
    store.put_bytes("a/empty", b"")
    store.put("a/empty-file", source(b""))
    other = reopen()
    assert other.get_bytes("a/header") == b"\x00header"
    assert other.open_local("a/header").read_bytes() == b"\x00header"
    assert other.get_bytes("a/empty") == b"" == other.open_local("a/empty-file").read_bytes()


def test_a_second_put_replaces_the_first_here(store: Blobs, source: Callable[[bytes], Path]) -> None:
    store.put("a/b", source(b"first"))
    assert store.open_local("a/b").read_bytes() == b"first"
    store.put("a/b", source(b"second"))
    assert store.open_local("a/b").read_bytes() == b"second"
    store.put_bytes("a/b", b"third")
    assert store.open_local("a/b").read_bytes() == b"third"


def test_keys_are_those_below_whole_parts(store: Blobs) -> None:
    assert store.keys() == []
    for key in ("runs/r1/a", "runs/r1/b/c", "runs/r10/a", "top"):
        store.put_bytes(key, b"x")
    assert store.keys() == ["runs/r1/a", "runs/r1/b/c", "runs/r10/a", "top"]
    assert store.keys("runs/r1") == store.keys("runs/r1/") == ["runs/r1/a", "runs/r1/b/c"]
    assert store.keys("runs/r") == store.keys("nothing") == store.keys("top") == []


def test_deleting(reopen: Open, store: Blobs) -> None:
    for key in ("runs/r1/a", "runs/r1/b/c", "runs/r10/a"):
        store.put_bytes(key, b"x")
        store.open_local(key)
    store.delete("runs/r1/a")
    store.delete("runs/r1/a")
    assert not store.exists("runs/r1/a")
    assert store.delete_prefix("runs/r1") == 1
    assert store.delete_prefix("runs/r1") == 0
    assert reopen().keys() == ["runs/r10/a"]
    for key in ("runs/r1/a", "runs/r1/b/c"):
        with pytest.raises(StorageError, match="does not exist"):
            store.open_local(key)


def test_what_is_missing_is_named(store: Blobs) -> None:
    store.put_bytes("a/b", b"x")
    for read in (store.open_local, store.get_bytes):
        with pytest.raises(StorageError, match="runs/none does not exist") as caught:
            read("runs/none")
        assert caught.value.hint
        assert not caught.value.retry
    assert not store.exists("runs/none")
    assert not store.exists("a")  # a prefix is no blob


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a//b", "a/", "..", "a/../b", ".", "./a", "a/.hidden", PARTIAL + "/x", "a\\b", "a\0", "a*", "a?b", "a b",
     "a\n", "é", "~", "-a", "a" * 201, "/".join(["a" * 100] * 10)],
)  # fmt: skip
def test_a_key_that_could_lead_elsewhere_is_refused(folder: Blobs, tmp_path: Path, key: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: folder.put(key, tmp_path / "x"),
        lambda: folder.put_bytes(key, b""),
        lambda: folder.open_local(key),
        lambda: folder.get_bytes(key),
        lambda: folder.exists(key),
        lambda: folder.delete(key),
    ]
    if key not in ("", "a/"):  # those are prefixes
        uses += [lambda: folder.keys(key), lambda: folder.delete_prefix(key), lambda: folder.forget_local(key)]
    for use in uses:
        with pytest.raises(StorageError, match="is no key"):
            use()


def test_a_source_that_is_no_file_is_refused(store: Blobs, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(StorageError, match="missing or no file"):
            store.put("a", path)
    assert store.keys() == []


def test_many_threads_at_once(store: Blobs, source: Callable[[bytes], Path]) -> None:
    paths = {f"runs/r{k % 3}/{k}": source(bytes([k]) * 1000) for k in range(24)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store.put, paths, paths.values()))
        store.forget_local()
        read = list(pool.map(lambda key: store.open_local(key).read_bytes(), [*paths, *paths]))
        assert [data[0] for data in read] == [*range(24), *range(24)]
        list(pool.map(store.delete, paths))
    assert store.keys() == []


def test_check_leaves_nothing(store: Blobs) -> None:
    store.check()
    assert store.keys() == []


# --- a folder -----------------------------------------------------------------------------------------------------


def test_within_one_filesystem_a_file_is_moved(folder: Blobs, source: Callable[[bytes], Path]) -> None:
    path = source(b"x" * 100)
    number = path.stat().st_ino
    folder.put("a/b", path)
    assert folder.open_local("a/b").stat().st_ino == number


def test_from_another_filesystem_a_file_is_copied_whole(
    folder: Blobs, tmp_path: Path, source: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = source(b"from afar"), Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self == path:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    folder.put("a/b", path)
    assert folder.get_bytes("a/b") == b"from afar"
    assert not path.exists()
    assert files(tmp_path) == {"store/a/b"}


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path("/tmp").stat().st_dev,
    reason="no second filesystem",
)
def test_a_real_second_filesystem(tmp_path: Path, source: Callable[[bytes], Path]) -> None:
    root = Path("/dev/shm") / f"commonweight-{uuid.uuid4().hex}"
    try:
        store = Blobs(f"file://{root}", tmp_path / "scratch")
        store.put("a/b", source(b"from afar"))
        assert files(root) == {"a/b"}
        assert store.get_bytes("a/b") == b"from afar"
    finally:
        shutil.rmtree(root)


def test_a_link_gives_its_file_not_itself(folder: Blobs, tmp_path: Path, source: Callable[[bytes], Path]) -> None:
    path, link = source(b"behind a link"), tmp_path / "link"
    link.symlink_to(path)
    folder.put("a", link)
    assert not folder.open_local("a").is_symlink()
    assert path.read_bytes() == folder.get_bytes("a") == b"behind a link"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_what_was_there(folder: Blobs, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    folder.put_bytes("a", b"before")

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        folder.put_bytes("a", b"after")
    assert caught.value.retry
    assert folder.get_bytes("a") == b"before"
    assert folder.keys() == ["a"]


def test_a_crash_leaves_temporaries_that_a_sweep_removes(tmp_path: Path) -> None:
    store = tmp_path / "store"
    script = """
import os, signal, sys
from pathlib import Path
from commonweight.coordinator import blobs
blobs._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
blobs.Blobs(sys.argv[1], Path(sys.argv[2])).put_bytes("a/b", b"half done")
"""
    ended = subprocess.run([sys.executable, "-c", script, store, tmp_path / "scratch"], timeout=60, check=False)
    assert ended.returncode == -9
    again = Blobs(str(store), tmp_path / "scratch")
    assert again.keys() == []
    (left,) = (store / PARTIAL).iterdir()
    assert again.sweep() == 0  # it might be another replica's, being written now
    assert again.sweep(older_than_s=-1) == 1
    assert not left.exists()


def test_a_folder_of_the_run_that_is_deleted_while_a_file_is_put(
    folder: Blobs, source: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = blobs_module._make_folders, []

    def make_and_lose(path: Path) -> list[Path]:
        made = real(path)
        if not taken:
            taken.append(path.rmdir())
        return made

    monkeypatch.setattr(blobs_module, "_make_folders", make_and_lose)
    folder.put("runs/r1/a", source(b"x"))
    assert folder.get_bytes("runs/r1/a") == b"x"


def test_deleting_takes_empty_folders_but_no_others(folder: Blobs, tmp_path: Path) -> None:
    folder.put_bytes("runs/r1/deep/a", b"x")
    folder.put_bytes("runs/r2/b", b"x")
    folder.delete("runs/r1/deep/a")
    assert not (tmp_path / "store/runs/r1").exists()
    assert (tmp_path / "store/runs/r2/b").exists()
    folder.delete("runs/r2/b")
    assert {path.name for path in (tmp_path / "store").iterdir()} == {PARTIAL}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be read or written"):
        Blobs(str(tmp_path / "file" / "below"), tmp_path / "scratch")


def test_permission_denied(folder: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "replace", denied)
    with pytest.raises(StorageError, match="access is denied") as caught:
        folder.put_bytes("a", b"x")
    assert "account" in caught.value.hint
    assert not caught.value.retry


def test_a_folder_takes_no_options(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="takes no options") as caught:
        Blobs(str(tmp_path), tmp_path, secret="hush-hush")
    assert "hush-hush" not in str(caught.value) + caught.value.hint


# --- copies of a remote store's blobs -----------------------------------------------------------------------------


def test_a_blob_is_fetched_once_however_many_ask(remote: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.put_bytes("runs/r1/a", b"x" * 10_000)
    real, fetched = remote._store.fs.get_file, []  # type: ignore[attr-defined]
    together = threading.Barrier(6)

    def get_file(*args: Any) -> None:
        fetched.append(args)
        real(*args)

    def ask(_: int) -> Path:
        together.wait(timeout=30)
        return remote.open_local("runs/r1/a")

    monkeypatch.setattr(remote._store.fs, "get_file", get_file)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(ask, range(6)))) == 1
    assert len(fetched) == 1
    assert remote.open_local("runs/r1/a").stat().st_size == 10_000


def test_what_was_put_here_needs_no_fetching(
    remote: Blobs, source: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put("a", source(b"x"))
    monkeypatch.setattr(remote._store.fs, "get_file", None)  # type: ignore[attr-defined]
    assert remote.open_local("a").read_bytes() == b"x"


def test_copies_are_forgotten_by_prefix_and_fetched_again(remote: Blobs, tmp_path: Path) -> None:
    for key in ("runs/r1/a", "runs/r1/b/c", "runs/r10/a"):
        remote.put_bytes(key, key.encode())
        remote.open_local(key)
    remote.forget_local("runs/r1")
    assert files(tmp_path / "scratch") == {"blobs/runs/r10/a"}
    remote.forget_local("runs/r10/a")
    assert files(tmp_path / "scratch") == set()
    assert remote.open_local("runs/r1/b/c").read_bytes() == b"runs/r1/b/c"
    remote.delete_prefix("")
    assert files(tmp_path / "scratch") == set()


def test_a_fetch_that_fails_leaves_no_copy(remote: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.put_bytes("a", b"whole")
    real = remote._store.fs.get_file  # type: ignore[attr-defined]

    def cut(_: str, path: str) -> None:
        Path(path).write_bytes(b"wh")
        raise ConnectionResetError("the peer hung up")

    monkeypatch.setattr(remote._store.fs, "get_file", cut)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        remote.open_local("a")
    assert caught.value.retry
    assert files(tmp_path / "scratch") == set()
    monkeypatch.setattr(remote._store.fs, "get_file", real)  # type: ignore[attr-defined]
    assert remote.open_local("a").read_bytes() == b"whole"


def test_half_fetched_copies_are_swept(remote: Blobs, tmp_path: Path) -> None:
    left = tmp_path / "scratch/blobs" / PARTIAL / "left"
    left.write_bytes(b"half")
    assert remote.sweep() == 0
    assert remote.sweep(older_than_s=-1) == 1
    assert not left.exists()


# --- S3 -----------------------------------------------------------------------------------------------------------


def told(caught: pytest.ExceptionInfo[StorageError]) -> str:
    """All that a person might see of an error."""
    return f"{caught.value} {caught.value.hint} {caught.value.__cause__}"


def test_blobs_lie_below_the_prefix_and_nothing_else_is_touched(s3: Bucket, tmp_path: Path) -> None:  # noqa: F811
    client = s3.client()
    for key in ("other", "store2/a", "storea"):
        client.put_object(Bucket=s3.name, Key=key, Body=b"someone else's")
    store = Blobs(s3.url, tmp_path, **s3.options)
    store.put_bytes("a", b"x")
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket=s3.name, Prefix="store/")["Contents"]] == [
        "store/a"
    ]
    assert store.delete_prefix("") == 1
    assert len(client.list_objects_v2(Bucket=s3.name)["Contents"]) == 3


def test_a_bucket_without_prefix(s3: Bucket, tmp_path: Path) -> None:  # noqa: F811
    store = Blobs(f"s3://{s3.name}", tmp_path, **s3.options)
    store.put_bytes("a/b", b"x")
    assert store.keys() == ["a/b"]
    assert store.get_bytes("a/b") == b"x"
    assert store.delete_prefix("") == 1


def test_a_large_file_in_parts(s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    store, data = Blobs(s3.url, tmp_path / "one", **s3.options), os.urandom(12 << 20)
    real = store._store.fs.put_file  # type: ignore[attr-defined]
    monkeypatch.setattr(store._store.fs, "put_file", lambda *args: real(*args, chunksize=5 << 20))  # type: ignore[attr-defined]
    (tmp_path / "file").write_bytes(data)
    store.put("a", tmp_path / "file")
    assert s3.client().head_object(Bucket=s3.name, Key="store/a")["ETag"].endswith('-3"')
    assert Blobs(s3.url, tmp_path / "two", **s3.options).open_local("a").read_bytes() == data


def test_uploads_that_a_crash_cut_off_are_swept(
    s3: Bucket,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = s3.client()
    for key in ("store/old", "store/young", "elsewhere/old"):
        client.create_multipart_upload(Bucket=s3.name, Key=key)
    store = Blobs(s3.url, tmp_path, **s3.options)
    real = store._store.fs.call_s3  # type: ignore[attr-defined]

    def call(method: str, **arguments: Any) -> Any:
        answer = real(method, **arguments)
        for upload in answer.get("Uploads", []):  # moto says of all that they are of 2010
            if upload["Key"] == "store/young":
                upload["Initiated"] = datetime.now(UTC)
        return answer

    monkeypatch.setattr(store._store.fs, "call_s3", call)  # type: ignore[attr-defined]
    assert store.sweep() == 1
    left = client.list_multipart_uploads(Bucket=s3.name)["Uploads"]
    assert sorted(upload["Key"] for upload in left) == ["elsewhere/old", "store/young"]
    assert store.sweep(older_than_s=-60) == 1


def test_a_missing_bucket_is_told_from_a_missing_blob(s3: Bucket, tmp_path: Path) -> None:  # noqa: F811
    store = Blobs("s3://no-such-bucket/store", tmp_path, **s3.options)
    (tmp_path / "file").write_bytes(b"kept")
    uses: list[Callable[[], object]] = [
        lambda: store.put("a", tmp_path / "file"),
        lambda: store.put_bytes("a", b"x"),
        lambda: store.open_local("a"),
        lambda: store.get_bytes("a"),
        lambda: store.exists("a"),
        lambda: store.keys(),
        lambda: store.delete("a"),
        lambda: store.check(),
    ]
    for use in uses:
        with pytest.raises(StorageError, match=r"^s3://no-such-bucket/store does not exist") as caught:
            use()
        assert "make the bucket" in caught.value.hint
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_an_endpoint_that_does_not_answer(s3: Bucket, tmp_path: Path) -> None:  # noqa: F811
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        options = {**s3.options, "endpoint_url": f"http://127.0.0.1:{held.getsockname()[1]}"}
        store = Blobs(s3.url, tmp_path, **options)
        for use in (lambda: store.put_bytes("a", b"x"), lambda: store.get_bytes("a"), store.keys):
            with pytest.raises(StorageError, match="cannot be reached") as caught:
                use()
            assert caught.value.retry
            assert "127.0.0.1" in str(caught.value)
            assert SECRET not in told(caught)


@pytest.mark.parametrize("code", ["AccessDenied", "InternalError"])
def test_a_blob_that_s3_did_not_delete_is_reported(
    s3: Bucket,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
) -> None:
    store = Blobs(s3.url, tmp_path, **s3.options)
    answer = {"Errors": [{"Key": "store/a", "Code": code, "Message": "no"}]}
    monkeypatch.setattr(store._store.fs, "call_s3", lambda *_, **__: answer)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=f"{code} for store/a, which is not deleted") as caught:
        store.delete("a")
    assert caught.value.retry == (code == "InternalError")


@pytest.mark.parametrize(
    ("error", "says", "retry"),
    [
        (PermissionError(f"The key {KEY} with {SECRET} may not"), "access is denied", False),
        (TimeoutError(f"no answer to {SECRET}"), "cannot be reached", True),
        (OSError(errno.EBUSY, "SlowDown"), "cannot be read or written", True),
        (OSError(errno.EINVAL, f"AuthorizationHeaderMalformed {KEY}"), "cannot be read or written", False),
        (RuntimeError(f"something with {SECRET} in it"), "cannot be read or written", False),
    ],
)
def test_what_the_client_says_is_told_without_credentials(
    s3: Bucket,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    says: str,
    retry: bool,
) -> None:
    store = Blobs(s3.url, tmp_path, **s3.options)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(store._store.fs, "cat_file", fail)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=says) as caught:
        store.get_bytes("a")
    assert caught.value.retry is retry
    assert not {KEY, SECRET} & set(told(caught).replace(",", " ").split())
    assert SECRET not in told(caught)
    assert KEY not in told(caught)


def test_no_credentials_in_names(tmp_path: Path) -> None:
    store = Blobs("memory://someone:s3same@place/x?token=hush", tmp_path)
    assert "s3same" not in repr(store) + store.url
    assert "hush" not in repr(store) + store.url
    with pytest.raises(StorageError, match="does not exist") as caught:
        store.get_bytes("a")
    assert "s3same" not in told(caught)


def test_without_s3fs_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="s3://bucket/x needs a package") as caught:
        Blobs("s3://bucket/x", tmp_path)
    assert "pip install 'commonweight[s3]'" in caught.value.hint


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "nonsense://x"])
def test_a_url_that_names_no_store(tmp_path: Path, url: str) -> None:
    with pytest.raises(StorageError, match=r"names no bucket|cannot be used as a blob store"):
        Blobs(url, tmp_path)

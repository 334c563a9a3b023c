"""Sealed files: what is read is what was written there, or nothing; and no plaintext reaches the disk."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from commonweight.coordinator import vault as vault_module
from commonweight.coordinator.vault import OVERHEAD, SealedFile, Vault
from commonweight.errors import AccessError, StateError, StorageError

CHUNK = 1000
ROOM = CHUNK + OVERHEAD
KEY = bytes(range(32))


@pytest.fixture(params=["into", "plain"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SealedFile]:
    """With cryptography's calls that fill a buffer, and as on a release without them."""
    if request.param == "plain":
        monkeypatch.setattr(vault_module, "_INTO", False)
    with SealedFile(tmp_path / "sealed", KEY, CHUNK) as sealed:
        yield sealed


def chunks(count: int, seed: int = 0, *, varied: bool = True) -> list[bytes]:
    draw = random.Random(seed)
    return [draw.randbytes(draw.randint(1, CHUNK) if varied else CHUNK) for _ in range(count)]


def written(path: Path, data: list[bytes], key: bytes = KEY) -> Path:
    with SealedFile(path, key, CHUNK) as sealed:
        for index, chunk in enumerate(data):
            sealed.write(index, chunk)
    return path


def read_all(path: Path, count: int, key: bytes = KEY) -> list[bytes | None]:
    with SealedFile(path, key, CHUNK, writable=False) as sealed:
        return [sealed.read(index) for index in range(count)]


# --- sealed files -------------------------------------------------------------------------------------------------


def test_chunks_in_any_order_and_of_any_length(file: SealedFile) -> None:
    data = [b"x", b"y" * CHUNK, *chunks(8)]
    order = random.Random(1).sample(range(len(data)), len(data))
    for done, index in enumerate(order):
        assert file.present(len(data)) == sorted(order[:done])
        assert file.read(index) is None
        file.write(index, data[index])
    file.sync()
    assert [file.read(index) for index in range(len(data))] == data
    assert file.read(len(data)) is None
    assert read_all(file.path, len(data)) == data


def test_any_kind_of_buffer(file: SealedFile) -> None:
    data = os.urandom(800)
    for index, one in enumerate([data, bytearray(data), memoryview(data), memoryview(data).cast("d")]):
        file.write(index, one)
        assert file.read(index) == data


def test_reading_into_the_front_of_a_longer_buffer(file: SealedFile) -> None:
    file.write(3, b"some words")
    out = bytearray(b"." * 20)
    assert file.read_into(3, out) == 10
    assert out == b"some words.........."
    with pytest.raises(ValueError, match="does not fit a buffer of 9"):
        file.read_into(3, bytearray(9))


def test_a_chunk_written_again_replaces_the_first(file: SealedFile) -> None:
    file.write(1, b"a longer chunk than the next")
    file.write(0, b"before")
    file.write(2, b"after")
    file.write(1, b"short")
    assert [file.read(k) for k in range(3)] == [b"before", b"short", b"after"]


@pytest.mark.parametrize("data", [b"", b"x" * (CHUNK + 1)])
def test_a_chunk_of_no_or_too_many_bytes_is_refused(file: SealedFile, data: bytes) -> None:
    with pytest.raises(ValueError, match="a chunk of"):
        file.write(0, data)
    assert file.path.stat().st_size == 0


@pytest.mark.parametrize("index", [-1, 2**32])
def test_an_index_that_no_file_has_is_refused(file: SealedFile, index: int) -> None:
    uses: list[Callable[[], object]] = [lambda: file.write(index, b"x"), lambda: file.read(index)]
    for use in uses:
        with pytest.raises(ValueError, match="index"):
            use()


def test_the_caller_checks_what_present_decrypts(file: SealedFile) -> None:
    data = chunks(6)
    for index in (0, 2, 3, 5):
        file.write(index, data[index])
    digests = [sha256(chunk).digest() for chunk in data]
    digests[3] = b"another"
    seen: list[int] = []

    def check(index: int, chunk: memoryview) -> bool:
        seen.append(index)
        return sha256(chunk).digest() == digests[index]

    assert file.present(6, check) == [0, 2, 5]
    assert seen == [0, 2, 3, 5]
    assert file.present(6) == [0, 2, 3, 5]


def test_threads_on_different_indexes(file: SealedFile) -> None:
    data = chunks(200)

    def turn(index: int) -> bool:
        file.write(index, data[index])
        return file.read(index) == data[index]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(turn, range(200)))
        assert list(pool.map(file.read, range(200))) == data
    assert file.present(200) == [*range(200)]


def test_no_plaintext_reaches_the_disk(file: SealedFile, tmp_path: Path) -> None:
    marker = b"the patient's name is"
    for index in range(20):
        file.write(index, marker * 40)
    file.write(3, marker)  # shorter than what was there
    file.sync()
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len(content) > 19 * 40 * len(marker)
    assert not any(marker[k : k + 6] in content for k in range(len(marker) - 6))


def test_the_same_bytes_never_look_the_same(file: SealedFile) -> None:
    seen = set()
    for index in (0, 0, 1):
        file.write(index, b"x" * 64)
        record = file.path.read_bytes()[index * ROOM :]
        seen |= {record[4:12], record[12:28], record[12:76]}
    assert len(seen) == 9


def test_a_sealed_file_is_its_owners_only(file: SealedFile) -> None:
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("varied", [False, True])
def test_a_file_cut_off_anywhere_has_lost_only_what_was_cut(tmp_path: Path, varied: bool) -> None:
    data = chunks(5, varied=varied)
    whole = written(tmp_path / "whole", data).read_bytes()
    draw = random.Random(2)
    edges = [k * ROOM + d for k in range(5) for d in (-1, 0, 1, 4, 11, 12, 13, 28)]
    for size in {*draw.sample(range(len(whole)), 60), *edges} - {-1}:
        (tmp_path / "cut").write_bytes(whole[:size])
        expected = [chunk if k * ROOM + len(chunk) + OVERHEAD <= size else None for k, chunk in enumerate(data)]
        assert read_all(tmp_path / "cut", 5) == expected


def test_a_changed_byte_loses_its_record_and_no_other(tmp_path: Path) -> None:
    data = chunks(4)
    path = written(tmp_path / "file", data)
    whole = path.read_bytes()
    draw = random.Random(3)
    for _ in range(300):
        index = draw.randrange(4)
        place = index * ROOM + draw.randrange(len(data[index]) + OVERHEAD)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        assert read_all(path, 4) == [None if k == index else chunk for k, chunk in enumerate(data)]


def test_a_record_mixed_from_two_writes_is_missing(tmp_path: Path) -> None:
    path = written(tmp_path / "file", [b"a" * CHUNK])
    old = path.read_bytes()
    written(path, [b"b" * CHUNK])
    new = path.read_bytes()
    for cut in (8, 12, 13, 500, ROOM - 17, ROOM - 8):
        path.write_bytes(new[:cut] + old[cut:])
        assert read_all(path, 1) == [None]


def test_a_record_belongs_to_its_place_and_file(tmp_path: Path) -> None:
    path = written(tmp_path / "one", [b"a" * CHUNK, b"b" * CHUNK])
    first, second = path.read_bytes()[:ROOM], path.read_bytes()[ROOM:]
    path.write_bytes(second + first)
    assert read_all(path, 2) == [None, None]
    other = written(tmp_path / "other", [b"c" * CHUNK, b"d" * CHUNK], key=bytes(32))
    other.write_bytes(first + other.read_bytes()[ROOM:])
    assert read_all(other, 2, key=bytes(32)) == [None, b"d" * CHUNK]


def test_a_length_cannot_be_changed(tmp_path: Path) -> None:
    path = written(tmp_path / "file", [b"a" * 100])
    record = path.read_bytes()
    for length in (0, 1, 99, 101, CHUNK, CHUNK + 1, 2**32 - 1):
        path.write_bytes(length.to_bytes(4, "big") + record[4:] + bytes(ROOM))
        assert read_all(path, 1) == [None]


def test_nothing_unverified_is_handed_out(file: SealedFile) -> None:
    file.write(0, b"secret" * 100)
    record = bytearray(file.path.read_bytes())
    record[-1] ^= 1
    file.path.write_bytes(record)
    out = bytearray(b"." * CHUNK)
    assert file.read_into(0, out) is None
    assert b"secret" not in out
    assert set(out) <= set(b".\0")


def test_with_another_key_nothing_is_there(tmp_path: Path) -> None:
    path = written(tmp_path / "file", chunks(3))
    assert read_all(path, 3, key=bytes(32)) == [None, None, None]


def test_killed_at_any_instant_it_is_read_again(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from commonweight.coordinator.vault import SealedFile
file = SealedFile(Path(sys.argv[1]), bytes(range(32)), 1 << 20)
for turn in range(1 << 30):
    file.write(turn % 4, bytes([turn % 251 + 1]) * (1 << 20))
    if turn == 8:
        print("going", flush=True)
"""
    path = tmp_path / "file"
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"going\n"
        process.send_signal(signal.SIGKILL)
    with SealedFile(path, KEY, 1 << 20) as file:
        found = [file.read(index) for index in range(4)]
        assert sum(chunk is not None for chunk in found) >= 3
        assert all(chunk is None or len(set(chunk)) == 1 for chunk in found)
        for index in range(4):
            file.write(index, b"again")
        assert file.present(4) == [0, 1, 2, 3]


@pytest.mark.parametrize(("number", "retry"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_write_that_fails_half_way_leaves_its_record_missing(
    file: SealedFile, monkeypatch: pytest.MonkeyPatch, number: int, retry: bool
) -> None:
    file.write(0, b"before" * 10)
    file.write(1, b"old" * 100)
    real, calls = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))
        return real(fd, data[:40], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StorageError, match=str(file.path)) as caught:
        file.write(1, b"new" * 100)
    assert caught.value.retry is retry
    assert caught.value.hint
    monkeypatch.undo()
    assert file.read(0) == b"before" * 10
    assert file.read(1) is None


def test_short_writes_and_reads_are_gone_on_with(file: SealedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:300], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:170]], offset))
    data = chunks(3, varied=False)
    for index, chunk in enumerate(data):
        file.write(index, chunk)
    assert [file.read(index) for index in range(3)] == data


def test_sync_waits_for_the_disk(file: SealedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    file.write(0, b"x")
    assert synced == []
    file.sync()
    assert synced == [file.path.stat().st_ino]


def test_a_file_to_be_read_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is missing") as caught:
        SealedFile(tmp_path / "none", KEY, CHUNK, writable=False)
    assert caught.value.hint
    assert not (tmp_path / "none").exists()


def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(StorageError, match="cannot be read or written"):
            SealedFile(path, KEY, CHUNK)


def test_after_closing_nothing_is_written(file: SealedFile) -> None:
    file.close()
    file.close()
    with pytest.raises(StorageError):
        file.write(0, b"x")


@pytest.mark.parametrize(("key", "chunk"), [(b"short", 10), (KEY, 0), (KEY, 2**31)])
def test_a_file_of_nonsense_is_refused(tmp_path: Path, key: bytes, chunk: int) -> None:
    with pytest.raises(ValueError, match="a sealed file needs"):
        SealedFile(tmp_path / "file", key, chunk)


# --- the master key -----------------------------------------------------------------------------------------------


def test_a_key_is_unwrapped_on_every_replica(tmp_path: Path) -> None:
    vault = Vault.create(tmp_path / "master.key")
    key, wrapped = vault.new_key("r1/3/north")
    assert Vault.open(tmp_path / "master.key").unwrap(wrapped, "r1/3/north") == key
    assert len(key) == 32
    assert key not in wrapped
    again, other = vault.new_key("r1/3/north")
    assert again != key
    assert other[9:21] != wrapped[9:21]


def test_another_master_key_is_named(tmp_path: Path) -> None:
    _, wrapped = Vault.create(tmp_path / "old.key").new_key("r1/3/north")
    other = Vault.create(tmp_path / "master.key")
    with pytest.raises(StateError, match="another master key") as caught:
        other.unwrap(wrapped, "r1/3/north")
    assert str(tmp_path / "master.key") in caught.value.message
    assert "r1/3/north" in caught.value.message
    assert "put back" in caught.value.hint


def test_a_wrapped_key_belongs_to_its_upload(tmp_path: Path) -> None:
    vault = Vault.create(tmp_path / "master.key")
    _, wrapped = vault.new_key("r1/3/north")
    for context in ("r1/3/south", "r1/4/north", ""):
        with pytest.raises(StateError, match="does not open with"):
            vault.unwrap(wrapped, context)


def test_a_damaged_wrapped_key_is_refused(tmp_path: Path) -> None:
    vault = Vault.create(tmp_path / "master.key")
    _, wrapped = vault.new_key("c")
    changed = [wrapped[:k] + bytes([wrapped[k] ^ 1]) + wrapped[k + 1 :] for k in range(len(wrapped))]
    for damaged in (b"", wrapped[:-1], wrapped + b"x", *changed):
        with pytest.raises(StateError) as caught:
            vault.unwrap(damaged, "c")
        assert caught.value.hint


def test_a_master_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    Vault.create(path)
    before = path.read_bytes()
    assert len(before) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(StateError, match="already exists"):
        Vault.create(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["master.key"]


def test_a_master_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    Vault.create(path)
    for mode in (0o640, 0o604):
        path.chmod(mode)
        with pytest.raises(AccessError) as caught:
            Vault.open(path)
        assert caught.value.hint == f"run: chmod 600 {path}"


def test_a_master_key_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    with pytest.raises(StateError, match="is missing"):
        Vault.open(path)
    path.touch(mode=0o600)
    with pytest.raises(StateError, match=r"master\.key has 0 bytes, not 32"):
        Vault.open(path)
    with pytest.raises(StorageError):
        Vault.open(path / "below")
    with pytest.raises(StorageError):
        Vault.create(tmp_path / "no" / "folder")

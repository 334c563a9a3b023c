"""How fast sealed files are written and read, against plain `pwrite` and `preadv` of the same bytes in the same run.

    python benchmarks/vault.py [--mb 256] [--chunk-mb 4] [--repeats 5] [--folder DIR] [--json]

Rows, each over a whole file, chunk by chunk:

    write        into a file that has been written before: the page cache takes it, the disk is not waited for
    write+sync   the same, then fsync
    read         into one buffer that is used again, from the page cache

Throughput counts the chunks' bytes. A ratio is the sealed file's speed over the plain one's; each time is a median, and
plain and sealed take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import cryptography

from benchmarks.measure import report
from commonweight.coordinator.vault import SealedFile

Rows = dict[str, Callable[[], object]]


class PlainFile:
    """What SealedFile does, without the sealing."""

    def __init__(self, path: Path, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def write(self, index: int, data: memoryview) -> None:
        os.pwrite(self._fd, data, index * self.chunk_bytes)

    def read_into(self, index: int, out: memoryview) -> int:
        return os.preadv(self._fd, [out], index * self.chunk_bytes)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def rows_of(file: SealedFile | PlainFile, chunks: list[memoryview], buffer: memoryview) -> Rows:
    """What is timed of one file."""

    def write() -> None:
        for index, chunk in enumerate(chunks):
            file.write(index, chunk)

    def write_and_sync() -> None:
        write()
        file.sync()

    def read() -> None:
        for index, chunk in enumerate(chunks):
            if file.read_into(index, buffer) != len(chunk):
                raise SystemExit(f"chunk {index} does not come back")

    return {"write": write, "write+sync": write_and_sync, "read": read}


def medians(rows: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each row; they take turns, and the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, work in rows.items():
            start = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure(folder: Path, num_bytes: int, chunk_bytes: int, repeats: int) -> dict[str, float]:
    """Figures by name: MB/s (10⁶ bytes) of both kinds of file, and their ratio."""
    data = memoryview(os.urandom(num_bytes))
    chunks = [data[start : start + chunk_bytes] for start in range(0, num_bytes, chunk_bytes)]
    buffer = memoryview(bytearray(chunk_bytes))
    plain, sealed = PlainFile(folder / "plain", chunk_bytes), SealedFile(folder / "sealed", os.urandom(32), chunk_bytes)
    plain_rows, sealed_rows = rows_of(plain, chunks, buffer), rows_of(sealed, chunks, buffer)
    figures: dict[str, float] = {}
    for name in plain_rows:
        seconds = medians({"plain": plain_rows[name], "sealed": sealed_rows[name]}, repeats)
        key = name.replace("+", "_and_")
        figures |= {f"{key}_{kind}_mb_s": num_bytes / one / 1e6 for kind, one in seconds.items()}
        figures[f"{key}_ratio"] = seconds["plain"] / seconds["sealed"]
    plain.close()
    sealed.close()
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=256, help="MiB a file")
    parser.add_argument("--chunk-mb", type=float, default=4, help="MiB a chunk")
    parser.add_argument("--repeats", type=int, default=5, help="turns over the file")
    parser.add_argument("--folder", type=Path, help="where the files lie; default: the system's temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    print(f"{args.mb:g} MiB in chunks of {args.chunk_mb:g} MiB, cryptography {cryptography.__version__}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(Path(folder), int(args.mb * 2**20), int(args.chunk_mb * 2**20), args.repeats)
    report(figures, as_json=args.json)


if __name__ == "__main__":
    main()

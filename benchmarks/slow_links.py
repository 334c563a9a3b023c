"""Rounds an hour where sites have slow lines, with updates as they are and made small.

    python benchmarks/slow_links.py [--mb 4] [--up 2] [--down 20] [--sites 2] [--rounds 3] [--codecs none,auto] [--json]

A coordinator and sites that add noise and return it, each a process; every site dials through a line of its own that
passes `--up` Mbit/s to the coordinator and `--down` back, whatever it is that goes through. Rounds are timed from
invitation to commit, the first left out. `at_best_s` is what the bytes of a round alone take on such a line.

    round_s     median seconds a round
    per_hour    rounds an hour
    faster      times as many as with the first codec of the same run
    up_mb       that each site sent in a round, of updates
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.federation import Federation, random_tensors
from commonweight.recipe.schema import CompressionSpec

_PIECE = 16 << 10
_BUFFER = 64 << 10
_MBIT = 1e6 / 8


class Line:
    """A port of loopback behind which lies another, as far away as so many Mbit/s make it."""

    def __init__(self, target: int, *, up: float, down: float) -> None:
        self.target, self.rates = target, {"up": up * _MBIT, "down": down * _MBIT}
        self._free_at = {"up": 0.0, "down": 0.0}

    @contextmanager
    def open(self) -> Iterator[int]:
        """Inside, it listens on the port that is given."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, sock=_socket()), loop).result()
        try:
            yield int(server.sockets[0].getsockname()[1])
        finally:
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(loop.stop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far = _socket(listening=False)
        try:
            await asyncio.get_running_loop().sock_connect(far, ("127.0.0.1", self.target))
        except OSError:
            far.close()
            writer.transport.abort()
            return
        there = await asyncio.open_connection(sock=far, limit=_PIECE)
        await asyncio.gather(self._pass(reader, there[1], "up"), self._pass(there[0], writer, "down"))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        with suppress(OSError):
            while data := await reader.read(_PIECE):
                now = time.monotonic()
                self._free_at[way] = max(now, self._free_at[way]) + len(data) / self.rates[way]
                await asyncio.sleep(self._free_at[way] - now)
                writer.write(data)
                await writer.drain()
        writer.close()


def _socket(*, listening: bool = True) -> socket.socket:
    """With buffers as small as those of a slow line: loopback's own would swallow megabytes at once."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    if listening:
        made.bind(("127.0.0.1", 0))
    else:
        made.setblocking(False)
    return made


def measured(folder: Path, codec: Any, given: argparse.Namespace) -> dict[str, float]:
    theta = random_tensors(given.mb)
    with Federation(folder) as federation:
        federation.start_coordinator()
        names = federation.site_names(given.sites)
        federation.enrol_sites(names)
        lines = [Line(federation.ports["services"], up=given.up, down=given.down) for _ in names]
        with all_open(lines) as ports:
            for name, port in zip(names, ports, strict=True):
                federation.route(name, port)
                federation.sites.append(federation.start_site(name))
            run = federation.submit(theta, rounds=given.rounds + 1, min_sites=given.sites, compression=codec)
            federation.wait(run, seconds=1200)
            events = federation.events(run)
    opened = {event["round"]: event["t"] for event in events if event["event"] == "round_opened"}
    committed = {event["round"]: event["t"] for event in events if event["event"] == "round_committed"}
    seconds = [committed[number] - opened[number] for number in sorted(committed) if number > 1]
    sent = statistics.mean(event["bytes_up"] for event in events if event["event"] == "update_accepted")
    round_s = statistics.median(seconds)
    best = sent / (given.up * _MBIT) + theta.layout.num_bytes / (given.down * _MBIT)
    return {"round_s": round_s, "at_best_s": best, "per_hour": 3600 / round_s, "up_mb": sent / 1e6}


@contextmanager
def all_open(lines: list[Line]) -> Iterator[list[int]]:
    """The ports on which they listen inside."""
    if not lines:
        yield []
        return
    with lines[0].open() as port, all_open(lines[1:]) as others:
        yield [port, *others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=4)
    parser.add_argument("--up", type=float, default=2, metavar="MBIT")
    parser.add_argument("--down", type=float, default=20, metavar="MBIT")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codecs", default="none,int8,auto", help="`none`, `auto`, or a rounding's name.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for name in given.codecs.split(","):
        codec = name if name in ("none", "auto") else {"round": name}
        CompressionSpec.model_validate({} if codec in ("none", "auto") else codec)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measured(Path(folder), codec, given)
        found[name]["faster"] = next(iter(found.values()))["round_s"] / found[name]["round_s"]
    if given.json:
        print(json.dumps({"mb": given.mb, "up": given.up, "down": given.down, "sites": given.sites, "codecs": found}))
        return
    print(f"{'codec':8} {'round s':>8} {'at best':>8} {'an hour':>8} {'faster':>7} {'up MB':>8}")
    for name, row in found.items():
        print(
            f"{name:8} {row['round_s']:8.2f} {row['at_best_s']:8.2f} {row['per_hour']:8.0f} {row['faster']:6.1f}x "
            f"{row['up_mb']:8.3f}"
        )


if __name__ == "__main__":
    main()

"""What a round over the network costs: real processes, real TLS, sites that add noise and return it.

    python benchmarks/network_round.py [--mb 512] [--sites 4] [--rounds 5] [--secure] [--json]

A coordinator and N sites, each a process, on loopback; a full round is timed, from the invitation to the commit: tasks
out, global tensors down, updates up, fold, new global tensors on disk. Beside it, in the same run, the floor: the same
bytes through bare TLS 1.3 sockets between as many processes, hashed once on each side, nothing kept.

    round_s_median, round_s      seconds a round, without the first (its files are new, later ones are written over)
    floor_s_median, ratio        the floor's, and the round's over it
    coordinator_*_rss_mib        resident memory when all sites attend, and the peak afterwards;
                                 above_idle_over_model is the difference over the size of the model
    site_peak_rss_mib            of the largest site: its update of `mb` is in memory, the global tensors are a mapped
                                 file
    bytes_up, bytes_down         chunks received and sent by the coordinator, a round; those sent for the evaluation
                                 after the last round are spread over the rounds
    secure                       with --secure: the same again with secure sums, round_s_median over that without, and
                                 the coordinator's memory
    cpu_s                        CPU seconds a round, of the coordinator and of all sites; and what of them single
                                 steps take, at the speeds measured in this run
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.federation import Federation, random_tensors

_PIECE = 1 << 20
_TICKS = os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int, which: str) -> float:
    """`VmRSS` or `VmHWM` of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(which + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def counters(port: int) -> dict[str, float]:
    """The coordinator's own figures of bytes."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    wanted = {"commonweight_received_bytes_total": "up", "commonweight_sent_bytes_total": "down"}
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {wanted[line[0]]: float(line[1]) for line in lines if line[0] in wanted}


def measure(folder: Path, mb: float, sites: int, rounds: int, *, secure: bool = False) -> dict[str, Any]:
    """A run of `rounds` rounds, and the floor afterwards."""
    with Federation(folder) as federation:
        coordinator = federation.start_coordinator()
        processes = federation.start_sites(sites)
        port = federation.ports["http"]
        while json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz").read())["attending"] < sites:
            time.sleep(0.05)
        time.sleep(1)
        idle = memory_mib(coordinator.pid, "VmRSS")
        Path(f"/proc/{coordinator.pid}/clear_refs").write_text("5")  # the peak counts from here
        run = federation.submit(random_tensors(mb), rounds=rounds + 1, secure=secure)
        while federation.run(run)["round"] < 1:
            time.sleep(0.05)
        before = (counters(port), cpu_s(coordinator.pid), sum(cpu_s(site.pid) for site in processes))
        begun = federation.run(run)["round"]
        found = federation.wait(run, seconds=1800)
        after = (counters(port), cpu_s(coordinator.pid), sum(cpu_s(site.pid) for site in processes))
        events = federation.events(run)
        counted = max(1, rounds + 1 - begun)
        peak = memory_mib(coordinator.pid, "VmHWM")
        result = {
            "mb": mb,
            "sites": sites,
            "coordinator_idle_rss_mib": round(idle, 1),
            "coordinator_peak_rss_mib": round(peak, 1),
            "above_idle_over_model": round((peak - idle) / mb, 3),
            "site_peak_rss_mib": round(max(memory_mib(site.pid, "VmHWM") for site in processes), 1),
            "bytes_up": int(after[0]["up"] - before[0]["up"]) // counted,
            "bytes_down": int(after[0]["down"] - before[0]["down"]) // counted,
            "cpu_s": {
                "coordinator": round((after[1] - before[1]) / counted, 2),
                "sites": round((after[2] - before[2]) / counted, 2),
            },
            "commit_s": round(statistics.median(r["seconds"]["commit"] for r in found["history"][1:]), 3),
        }
    opened = {event["round"]: event["t"] for event in events if event["event"] == "round_opened"}
    taken = [event["t"] - opened[event["round"]] for event in events if event["event"] == "round_committed"]
    result["round_s_first"] = round(taken[0], 3)
    result["round_s"] = [round(seconds, 3) for seconds in taken[1:]]
    result["round_s_median"] = round(statistics.median(taken[1:]), 4)
    floor = floor_s(federation.folder, int(mb * 2**20), sites, max(3, min(rounds, 5)))
    result["floor_s"] = [round(seconds, 3) for seconds in floor]
    result["floor_s_median"] = round(statistics.median(floor), 4)
    result["ratio"] = round(result["round_s_median"] / result["floor_s_median"], 2)
    result["cpu_s"]["of_which"] = steps_s(int(mb * 2**20), sites)
    return result


def steps_s(size: int, sites: int) -> dict[str, float]:
    """CPU seconds that single steps of a round take, from the speed of each in this process."""
    piece = os.urandom(4 << 20)
    out, cipher = bytearray(len(piece) + 16), AESGCM(bytes(32))

    def rate(work: Any) -> float:
        work()
        began = time.perf_counter()
        for _ in range(16):
            work()
        return 16 * len(piece) / (time.perf_counter() - began)

    hashing = rate(lambda: hashlib.sha256(piece).digest())
    sealing = rate(lambda: cipher.encrypt_into(os.urandom(12), piece, None, out))
    with tempfile.TemporaryFile() as file:
        file.write(piece)
        writing = rate(lambda: os.pwrite(file.fileno(), piece, 0))
        buffer = bytearray(piece)
        reading = rate(lambda: os.preadv(file.fileno(), [buffer], 0))
    moved = sites * size
    return {
        # each update at its site and at the coordinator, the global tensors at each site and once as they are written
        "hashing": round((3 * moved + size) / hashing, 2),
        "sealing_and_opening": round(2 * moved / sealing, 2),
        # updates and global tensors written; each site's file of global tensors; all read again
        "disk": round((2 * moved + size) / writing + (2 * moved + size) / reading, 2),
    }


# --- the floor


def floor_s(folder: Path, size: int, sites: int, rounds: int) -> list[float]:
    """Seconds for `size` bytes to and from each of so many processes through bare TLS 1.3 sockets, hashed once on each
    side."""
    server = folder / "coordinator" / "server"
    authority = folder / "coordinator" / "authority" / "authority.pem"
    listener = socket.create_server(("127.0.0.1", 0))
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(sites + 1)
    identities = sorted((folder / "sites").iterdir())[:sites]
    port = listener.getsockname()[1]
    processes = [
        spawn.Process(target=_floor_site, args=(str(i / "identity"), str(authority), port, size, rounds, barrier))
        for i in identities
    ]
    for process in processes:
        process.start()
    context = _context(ssl.PROTOCOL_TLS_SERVER, authority, server / "tls.pem", server / "tls.key")
    connections = [context.wrap_socket(listener.accept()[0], server_side=True) for _ in range(sites)]
    data = memoryview(bytearray(os.urandom(_PIECE) * -(-size // _PIECE)))[:size]
    seconds = []
    for _ in range(rounds):
        barrier.wait()
        began = time.perf_counter()
        threads = [threading.Thread(target=_serve, args=(one, data, size)) for one in connections]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds.append(time.perf_counter() - began)
    for process in processes:
        process.join()
    return seconds


def _context(kind: int, authority: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority)
    context.load_cert_chain(certificate, key)
    return context


def _serve(connection: ssl.SSLSocket, data: memoryview, size: int) -> None:
    _send(connection, data)
    _receive(connection, size)
    connection.sendall(b"k")


def _floor_site(identity: str, authority: str, port: int, size: int, rounds: int, barrier: Any) -> None:
    folder = Path(identity)
    context = _context(ssl.PROTOCOL_TLS_CLIENT, Path(authority), folder / "tls.pem", folder / "tls.key")
    connection = context.wrap_socket(socket.create_connection(("127.0.0.1", port)))
    data = memoryview(bytearray(os.urandom(_PIECE) * -(-size // _PIECE)))[:size]
    for _ in range(rounds):
        barrier.wait()
        _receive(connection, size)
        _send(connection, data)
        connection.recv(1)


def _send(connection: ssl.SSLSocket, data: memoryview) -> None:
    digest = hashlib.sha256()
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        digest.update(piece)
        connection.sendall(piece)


def _receive(connection: ssl.SSLSocket, size: int) -> None:
    digest, buffer, got = hashlib.sha256(), memoryview(bytearray(_PIECE)), 0
    while got < size:
        count = connection.recv_into(buffer, min(_PIECE, size - got))
        digest.update(buffer[:count])
        got += count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=512)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--secure", action="store_true", help="Also measure the same with secure sums.")
    parser.add_argument("--folder", type=Path, help="Where to put the federation; by default a temporary folder.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        result = measure(Path(folder) / "plain", given.mb, given.sites, given.rounds)
        if given.secure:
            secure = measure(Path(folder) / "secure", given.mb, given.sites, given.rounds, secure=True)
            memory = "above_idle_over_model"
            ratio = round(secure["round_s_median"] / result["round_s_median"], 2)
            result["secure"] = {"ratio": ratio, "round_s_median": secure["round_s_median"], memory: secure[memory]}
    if given.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()

"""A model that is larger than what any process may hold: coordinator → sites → coordinator, under a real limit.

    python benchmarks/big_model.py [--gb 4] [--sites 2] [--limit-mb 1024] [--rounds 2] [--compression int8] [--json]

A coordinator and the sites, each a process, on loopback with TLS; the sites' training is made up, the rest is as it is
in use. The model's tensors have the shapes of a language model's layers, in bfloat16. When all processes are up and
idle, each is put into a control group of its own, which the kernel holds to `--limit-mb`: memory that a process has by
then does not count, everything that it takes on afterwards does, its pages of mapped files and of the page cache too.
What goes beyond is killed, and the benchmark fails. Where this user may make no control groups, nothing is limited and
`limit` says so.

    round_s           seconds from a round's invitation to its commit
    update_s          of them, the median until the last update was accepted
    copy_s            to read and write a file of the model's size once in pieces, on disk at the end
    ratio             the median round over as many such copies as a round moves the model: down to each site, up from
                      each, and once for the result
    anon_mib          the most memory of its own that a process had above its idle level, sampled
    group_mib         the most that the kernel counted in its control group, pages of files included
    at_once_ratio     with --compare: `update_s` of the same with updates that are sent when they are whole and not
                      while they are made, over that of here

`--up` gives each site a line of so many Mbit/s to the coordinator.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.federation import Federation
from benchmarks.slow_links import Line
from commonweight.model.tensors import Entry, Layout, NamedTensors
from commonweight.site.outbox import Desk

_PIECE = 4 << 20
_SAMPLE_S = 0.02
_MIB = 1 << 20
#: Mbit/s of a line that is not to be the bottleneck
_FAST = 1e5


def decoder(num_bytes: int) -> Layout:
    """The layout of a decoder of at least so many bytes in bfloat16: an embedding and as many blocks as it takes, the
    width that of a model of billions of parameters where it is large enough."""
    width = next(width for width in (4096, 2048, 1024, 512, 256) if width == 256 or 60 * width**2 * 2 <= num_bytes)
    shapes = {"model.embed_tokens.weight": (8 * width, width)}
    inner = 43 * width // 16
    block = {
        **{f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")},
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
    }
    blocks = max(1, -(-(num_bytes // 2 - 8 * width**2) // sum(torch.Size(shape).numel() for shape in block.values())))
    for number in range(blocks):
        shapes.update({f"model.layers.{number:03d}.{name}": shape for name, shape in block.items()})
    entries, offset = [], 0
    for name, shape in sorted(shapes.items()):
        numel = torch.Size(shape).numel()
        entries.append(Entry(name, torch.bfloat16, shape, offset, numel))
        offset += numel
    return Layout(tuple(entries))


def model(layout: Layout, desk: Desk) -> NamedTensors:
    """Initial values, which lie in a file if they are many."""
    theta = desk("theta", layout)
    block = torch.empty(1 << 20).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    for _, flat in theta.floating():
        for start in range(0, flat.numel(), len(block)):
            piece = flat[start : start + len(block)]
            piece.copy_(block[: len(piece)])
    return theta


class Fence:
    """A control group with a limit on memory, for one process; without the right to make one, it does nothing.

    Args:
        name: of the group.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.kind, self._folder = "none: this user may make no control groups", Path()
        for kind, root, limit in (
            ("cgroup v1", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
            ("cgroup v2", Path("/sys/fs/cgroup"), "memory.max"),
        ):
            folder = root / name
            try:
                folder.mkdir()
                (folder / limit).write_text(str(limit_bytes))
            except OSError:
                with suppress(OSError):
                    folder.rmdir()
                continue
            self.kind, self._folder = kind, folder
            return

    @property
    def is_real(self) -> bool:
        return self._folder != Path()

    def put(self, pid: int) -> None:
        """What the process takes on from now on counts."""
        if self.is_real:
            (self._folder / "cgroup.procs").write_text(str(pid))

    @property
    def peak_mib(self) -> float | None:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            with suppress(OSError):
                return round(int((self._folder / name).read_text()) / _MIB, 1)
        return None

    def remove(self) -> None:
        """Once the process has ended."""
        with suppress(OSError):
            if self.is_real:
                self._folder.rmdir()


class OwnMemory:
    """Samples the memory that processes have of their own, which no file backs, above what they have at first."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids, self._idle = pids, {name: anon_mib(pid) for name, pid in pids.items()}
        self.peak = dict.fromkeys(pids, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            for name, pid in self._pids.items():
                self.peak[name] = max(self.peak[name], anon_mib(pid) - self._idle[name])

    def stop(self) -> dict[str, float]:
        self._stop.set()
        self._thread.join()
        return {name: round(peak, 1) for name, peak in self.peak.items()}


def anon_mib(pid: int) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    return 0.0


def copy_s(source: Path, target: Path) -> float:
    """Seconds to copy a file piece by piece, until it is on disk."""
    buffer, began = memoryview(bytearray(_PIECE)), time.perf_counter()
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        while got := reading.readinto(buffer):
            writing.write(buffer[:got])
        os.fsync(writing.fileno())
    took = time.perf_counter() - began
    target.unlink()
    return took


def measure(
    folder: Path,
    num_bytes: int,
    sites: int,
    rounds: int,
    limit_mb: int,
    compression: str = "none",
    *,
    up: float | None = None,
    at_once: bool = False,
) -> dict[str, Any]:
    """A run of so many rounds, and the copy."""
    folder.mkdir()
    desk = Desk(folder / "model")
    theta = model(decoder(num_bytes), desk)
    fences: dict[str, Fence] = {}
    try:
        with Federation(folder / "federation", large=True, at_once=at_once) as federation, ExitStack() as stack:
            pids = {"coordinator": federation.start_coordinator().pid}
            names = federation.site_names(sites)
            federation.enrol_sites(names)
            for name in names if up is not None else ():
                assert up is not None
                line = Line(federation.ports["services"], up=up, down=_FAST)
                federation.route(name, stack.enter_context(line.open()))
            pids.update(zip(names, [s.pid for s in federation.start_sites(sites)], strict=True))
            url = f"http://127.0.0.1:{federation.ports['http']}/healthz"
            while json.loads(urllib.request.urlopen(url).read())["attending"] < sites:
                time.sleep(0.05)
            time.sleep(1)
            for name, pid in pids.items():
                fences[name] = Fence(f"commonweight-{os.getpid()}-{name}", limit_mb * _MIB)
                fences[name].put(pid)
            memory = OwnMemory(pids)
            run = federation.submit(theta, rounds=rounds, compression={"round": compression})
            federation.wait(run, seconds=7200)
            own, groups = memory.stop(), {name: fence.peak_mib for name, fence in fences.items()}
            events = federation.events(run)
        opened = {event["round"]: event["t"] for event in events if event["event"] == "round_opened"}
        round_s = [e["t"] - opened[e["round"]] for e in events if e["event"] == "round_committed"]
        accepted = {e["round"]: e["t"] - opened[e["round"]] for e in events if e["event"] == "update_accepted"}
        source = next(folder.glob("model-*"), None) or _written(theta, folder / "model-theta")
        copied_s = copy_s(source, folder / "copy")
    finally:
        desk.clear()
        for fence in fences.values():
            fence.remove()
    copies = 2 * sites + 1
    return {
        "model_mib": round(theta.layout.num_bytes / _MIB, 1),
        "largest_tensor_mib": round(max(entry.numel for entry in theta.layout.entries) * 2 / _MIB, 1),
        "sites": sites,
        "compression": compression,
        "limit_mib": limit_mb,
        "limit": fences["coordinator"].kind,
        "anon_mib": own,
        "group_mib": groups,
        "round_s": [round(seconds, 1) for seconds in round_s],
        "update_s": round(statistics.median(accepted.values()), 1),
        "copy_s": round(copied_s, 2),
        "copies": copies,
        "ratio": round(statistics.median(round_s) / (copies * copied_s), 2),
    }


def _written(theta: NamedTensors, path: Path) -> Path:
    """A small model's bytes in a file."""
    with path.open("wb") as file:
        for flat in theta.flats.values():
            file.write(flat.view(torch.uint8).numpy())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4, help="GiB of the model.")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--limit-mb", type=int, default=1024, help="MiB above its idle level that a process may take.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compression", default="none", help="`compression.round` of the recipe: none, int8, sign …")
    parser.add_argument("--up", type=float, metavar="MBIT", help="Speed of each site's line to the coordinator.")
    parser.add_argument("--compare", action="store_true", help="Also send updates when they are whole.")
    parser.add_argument("--folder", type=Path, help="Where to put the federation; by default a temporary folder.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        what = int(given.gb * 2**30), given.sites, given.rounds, given.limit_mb, given.compression
        result = measure(Path(folder) / "ahead", *what, up=given.up)
        if given.compare:
            shutil.rmtree(Path(folder) / "ahead")
            whole = measure(Path(folder) / "at-once", *what, up=given.up, at_once=True)
            result["at_once_update_s"] = whole["update_s"]
            result["at_once_ratio"] = round(whole["update_s"] / result["update_s"], 2)
    if given.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()

"""What strategies that need individual updates cost, in memory and from a coordinator's files.

    python benchmarks/robust_rules.py [--sites 20] [--pairs 40] [--f 4] [--threads N] [--repeats 1] [--json]

A round of n sites' float32 updates of `--pairs` LoRA pairs (rank 16, 2048 × 2048: 256 KiB each), random numbers, of
which f stand out. Each strategy runs in processes of its own:

    memory s   seconds of `merge` over updates in memory
    ratio      these over those of the plain mean of the same updates (FedAvg's), which takes turns with it
    extra MiB  the most memory that the process held meanwhile, less what it held before: the kernel's own high water
               mark (VmHWM), set back before the call
    files s    seconds of a coordinator's `StoredModel.close`: the same updates sealed, read in chunks of 4 MiB, and the
               new global model written, hashed and synced
    extra MiB  as above: the whole of what the round holds there, for no update is in memory

What a file-backed round may hold is n chunks and a few; what the updates take together stands above the table. On a
busy machine give --threads 1: threads that wait for each other are what is measured otherwise. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from commonweight.coordinator.blobs import Blobs
from commonweight.coordinator.frame_files import FrameFiles
from commonweight.coordinator.stored_model import StoredModel
from commonweight.coordinator.stored_updates import StoredUpdate
from commonweight.coordinator.vault import SealedFile
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.registry import resolve
from commonweight.strategies.side_by_side import InMemory, SideBySideStrategy, one_thread
from commonweight.strategies.update import Update
from commonweight.wire.frames import CHUNK_BYTES, Channel, Plan, frame_of, piece_of

#: the options of each, given f
STRATEGIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "median": lambda f: {"f": f},
    "median, mixing": lambda f: {"f": f, "mixing": "nearest"},
    "trimmed-mean": lambda f: {"f": f},
    "geometric-median": lambda f: {"f": f},
    "krum": lambda f: {"f": f},
    "multi-krum": lambda f: {"f": f},
    "centered-clipping": lambda f: {"f": f},
    "bulyan": lambda f: {"f": f},
    "dnc": lambda f: {"f": f},
    "flexlora": lambda f: {},
    "lora-fair": lambda f: {},
}
RANK, WIDTH = 16, 2048
KEY = bytes(range(32))


def strategy_of(name: str, f: int) -> SideBySideStrategy:
    kind = resolve("strategy", name.partition(",")[0])
    strategy: SideBySideStrategy = kind(kind.Options(**STRATEGIES[name](f)))
    return strategy


def layout_of(num_pairs: int) -> Layout:
    shapes = {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}
    names = [(f"{k:04d}.lora_{part}.weight", shape) for k in range(num_pairs) for part, shape in shapes.items()]
    return Layout.of({name: torch.empty(shape, device="meta") for name, shape in names})


def drawn(layout: Layout, seed: int, shift: float = 0.0) -> NamedTensors:
    made = NamedTensors.empty(layout)
    for flat in made.flats.values():
        flat.normal_(generator=torch.Generator().manual_seed(seed)).add_(shift)
    return made


def updates_of(layout: Layout, num_sites: int, f: int) -> list[Update]:
    return [
        Update(f"s{i}", 1, {"delta": drawn(layout, i, 3.0 if i < f else 0.0)}, 1.0, 1, 1, 1) for i in range(num_sites)
    ]


def seal(folder: Path, layout: Layout, num_sites: int, f: int) -> None:
    plan = Plan(layout, (Channel("delta"),))
    for update in updates_of(layout, num_sites, f):
        with SealedFile(folder / update.site, KEY, CHUNK_BYTES) as sealed:
            for piece in plan.pieces:
                sealed.write(piece.index, piece_of(update.channels, piece))


def kib(name: str) -> int:
    """A figure of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """(seconds, extra MiB) of a call."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left free in the heap would not be counted
    Path("/proc/self/clear_refs").write_text("5")
    before, began = kib("VmRSS"), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return seconds, (kib("VmHWM") - before) / 1024


def plain_mean(table: InMemory) -> None:
    (flat,) = next(iter(table.updates)).delta.flats.values()
    total = torch.zeros_like(flat)
    for update in table.updates:
        total.add_(*update.delta.flats.values(), alpha=update.weight)


def in_memory(name: str, num_sites: int, num_pairs: int, f: int, repeats: int, threads: int | None) -> dict[str, float]:
    """Called in a fresh process. The first turn warms up and is not counted."""
    if threads:
        torch.set_num_threads(threads)
    layout, strategy = layout_of(num_pairs), strategy_of(name, f)
    state = strategy.init(drawn(layout, 999))
    table = InMemory(state, updates_of(layout, num_sites, f))
    turns = []
    for _ in range(repeats + 1):
        mean_s, _ = measured(lambda: plain_mean(table))
        with one_thread():
            turns.append((*measured(lambda: strategy.merge(table)), mean_s))
    seconds, extra, means = (statistics.median(column) for column in zip(*turns[1:], strict=True))
    return {"memory_s": seconds, "ratio": seconds / means, "memory_extra_mib": extra}


def in_files(
    name: str, folder: Path, num_sites: int, num_pairs: int, f: int, repeats: int, threads: int | None
) -> dict[str, float]:
    """Called in a fresh process. The first turn warms up and is not counted."""
    if threads:
        torch.set_num_threads(threads)
    layout, strategy = layout_of(num_pairs), strategy_of(name, f)
    plan = Plan(layout, (Channel("delta"),))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        files = FrameFiles(Blobs(f"{place}/blobs", Path(place) / "cache"), Path(place) / "scratch", "run")
        initial = files.write({"theta": drawn(layout, 999)}, Plan(layout, (Channel("theta"),)))
        model = StoredModel(strategy, files, initial.digest)
        model.first()
        frame = frame_of({"delta": drawn(layout, 0)}, plan)
        turns = []
        for turn in range(repeats + 1):
            model.open()
            for i in range(num_sites):
                path = folder / f"s{i}"
                model.fold(StoredUpdate(f"s{i}", turn, {}, 1.0, 1, 1, 1, frame=frame, path=path, key=KEY))
            turns.append(measured(lambda turn=turn: model.close(turn)))  # type: ignore[misc]
    seconds, extra = (statistics.median(column) for column in zip(*turns[1:], strict=True))
    return {"files_s": seconds, "files_extra_mib": extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=20, help="updates in the round, n")
    parser.add_argument("--pairs", type=int, default=40, help="LoRA pairs of an update, 256 KiB each")
    parser.add_argument("--f", type=int, default=4, help="how many sites stand out; at most (n − 3) / 4, for Bulyan")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--repeats", type=int, default=1, help="counted calls of each strategy")
    parser.add_argument("--only", action="append", choices=list(STRATEGIES), help="this strategy; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    layout = layout_of(args.pairs)
    size, chunks = layout.num_bytes / 2**20, args.sites * min(CHUNK_BYTES, layout.num_bytes) / 2**20
    print(
        f"{args.sites} updates of {size:,.0f} MiB: {args.sites * size:,.0f} MiB together; a chunk of each: "
        f"{chunks:,.0f} MiB; f = {args.f}"
    )
    print(f"{'':<20}{'memory s':>9}{'ratio':>8}{'extra MiB':>11}{'files s':>9}{'extra MiB':>11}")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        seal(Path(place), layout, args.sites, args.f)
        how = (args.sites, args.pairs, args.f, args.repeats, args.threads)
        for name in args.only or STRATEGIES:
            found: dict[str, float] = {}
            for work, what in ((in_memory, (name, *how)), (in_files, (name, Path(place), *how))):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found |= pool.apply(work, what)
            print(
                f"{name:<20}{found['memory_s']:>9.2f}{found['ratio']:>8.1f}{found['memory_extra_mib']:>11,.0f}"
                f"{found['files_s']:>9.2f}{found['files_extra_mib']:>11,.0f}",
                flush=True,
            )
            key = name.replace(", ", "_").replace("-", "_")
            figures |= {f"{key}_{figure}": round(value, 3) for figure, value in found.items()}
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()

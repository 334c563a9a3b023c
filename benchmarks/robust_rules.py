"""What robust rules cost, against the plain mean of the same rows in the same process.

    python benchmarks/robust_rules.py [--rows 20] [--columns 5000000] [--f 4] [--threads N] [--repeats 3] [--json]

Each rule runs in a process of its own, on the same float32 rows of random numbers (20 × 5 million: 381 MiB), of which f
stand out. Columns:

    seconds    the median of the repeats
    ratio      seconds over those of `rows.mean(0)`, which takes turns with the rule
    extra MiB  the most memory that the process held during a call, less what it held before: the kernel's own high
               water mark (VmHWM), which is set back before the call; the vector that is returned is counted (19 MiB)

`norm bound` and `mixing` are the steps in front of a rule, both in place. What a round adds beside is the copy of its
updates into rows. On a busy machine give --threads 1: threads that wait for each other are what is measured otherwise.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from commonweight.strategies.robust.bulyan import bulyan
from commonweight.strategies.robust.centered_clipping import centered_clipping
from commonweight.strategies.robust.coordinatewise import median, trimmed_mean
from commonweight.strategies.robust.dnc import dnc
from commonweight.strategies.robust.geometric_median import geometric_median
from commonweight.strategies.robust.krum import multi_krum
from commonweight.strategies.robust.rows import clip_rows_, mix_nearest_

RULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "norm bound": lambda rows, f: clip_rows_(rows, 1.0),
    "mixing": mix_nearest_,
    "median": lambda rows, f: median(rows),
    "trimmed-mean": trimmed_mean,
    "geometric-median": lambda rows, f: geometric_median(rows, [1.0] * len(rows)),
    "krum": lambda rows, f: multi_krum(rows, f, 1),
    "multi-krum": lambda rows, f: multi_krum(rows, f, len(rows) - f - 2),
    "centered-clipping": lambda rows, f: centered_clipping(
        rows, torch.zeros(rows.shape[1]), tau="median", iterations=3
    ),
    "bulyan": bulyan,
    "dnc": lambda rows, f: dnc(rows, f, seed=0),
}


def kib(name: str) -> int:
    """A figure of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def rows_of(num_rows: int, num_columns: int, f: int) -> Tensor:
    rows = torch.empty(num_rows, num_columns).normal_(generator=torch.Generator().manual_seed(0))
    rows[:f] += 3
    return rows


def measure(name: str, num_rows: int, num_columns: int, f: int, repeats: int, threads: int | None) -> dict[str, float]:
    """One rule's figures; called in a fresh process. The first turn warms up and is not counted."""
    if threads:
        torch.set_num_threads(threads)
    rows = rows_of(num_rows, num_columns, f)
    times: dict[str, list[float]] = {"mean": [], "rule": []}
    extra = 0.0
    for turn in range(repeats + 1):
        began = time.perf_counter()
        rows.mean(0)
        means = time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")
        before = kib("VmRSS")
        started = time.perf_counter()
        RULES[name](rows, f)
        ended = time.perf_counter()
        extra = max(extra, (kib("VmHWM") - before) / 1024)
        if turn:
            times["mean"].append(means - began)
            times["rule"].append(ended - started)
    seconds = {row: statistics.median(found) for row, found in times.items()}
    return {"seconds": seconds["rule"], "ratio": seconds["rule"] / seconds["mean"], "extra_mib": extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20, help="updates in the round, n")
    parser.add_argument("--columns", type=int, default=5_000_000, help="values of an update, d")
    parser.add_argument("--f", type=int, default=4, help="how many of them stand out; at most (n − 3) / 4, for Bulyan")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--repeats", type=int, default=3, help="counted calls of each rule")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    size = args.rows * args.columns * 4 / 2**20
    print(f"{args.rows} rows of {args.columns:,} float32 values ({size:,.0f} MiB), f = {args.f}")
    print(f"{'':<20}{'seconds':>9}{'ratio':>8}{'extra MiB':>11}")
    figures: dict[str, float] = {}
    for name in RULES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (name, args.rows, args.columns, args.f, args.repeats, args.threads))
        print(f"{name:<20}{found['seconds']:>9.2f}{found['ratio']:>8.1f}{found['extra_mib']:>11,.0f}", flush=True)
        figures |= {f"{name.replace(' ', '_').replace('-', '_')}_{key}": round(v, 3) for key, v in found.items()}
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()

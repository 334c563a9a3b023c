"""How fast updates are folded, against a plain in-place `add_` over the same bytes in the same run.

    python benchmarks/fold.py [--mb 512] [--updates 4] [--threads N] [--repeats 5] [--json]

Rows, for float32 and bfloat16 updates, each folded through FedAvg's fold:

    plain        total.add_(x) with the total that the fold has: float32
    narrow       total.add_(x) with a total as narrow as x (bfloat16 only): moves 6 bytes an element where a float32
                 total moves 10, so the most that a fold can reach of it is 0.6
    fold         fold.add(update)
    check+fold   check(update), then fold.add(update): two readings, for all of an update is checked before any is used

Throughput counts the update's bytes. A ratio is the row's speed over plain's; each time is a median, and the rows take
turns, so that a busy machine slows all of them. The target is 0.70 for fold in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from commonweight.model.tensors import Layout, NamedTensors
from commonweight.strategies.base import WeightedSum
from commonweight.strategies.fedavg import FedAvg
from commonweight.strategies.update import Update, check

NUM_TENSORS = 64
SMALL_MB, SMALL_UPDATES = 1, 1000


def layout_of(mb: float, dtype: torch.dtype) -> Layout:
    """64 tensors of equal shape, about `mb` MiB together."""
    rows = max(1, int(mb * 2**20) // (NUM_TENSORS * 64 * dtype.itemsize))
    blank = torch.empty((rows, 64), dtype=dtype, device="meta")
    return Layout.of({f"layer.{i}.lora_A.weight": blank for i in range(NUM_TENSORS)})


def updates_of(layout: Layout, count: int) -> list[Update]:
    """Updates of small random numbers, each in its own memory."""
    first = NamedTensors.empty(layout)
    for _, flat in first.floating():
        flat.normal_(std=1e-3, generator=torch.Generator().manual_seed(0))
    copies = [first] + [first.clone() for _ in range(count - 1)]
    return [
        Update(f"site{i}", 1, {"delta": tensors}, 10.0 + i, num_examples=10 + i, num_label_tokens=100, num_steps=1)
        for i, tensors in enumerate(copies)
    ]


def medians(rows: dict[str, Callable[[Update], object]], updates: list[Update], repeats: int) -> dict[str, float]:
    """Median seconds an update. The rows take turns, each as often first on an update, which finds it out of cache.

    The first turn warms up and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for index, update in enumerate(updates):
            first = (turn + index) % len(rows)
            for name in [*rows][first:] + [*rows][:first]:
                start = time.perf_counter()
                rows[name](update)
                if turn:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def rows_of(layout: Layout, dtype: torch.dtype) -> dict[str, Callable[[Update], object]]:
    """What is timed, each with totals of its own."""
    strategy = FedAvg()
    state = strategy.init(NamedTensors.zeros(layout))
    folds = [strategy.open(state), strategy.open(state)]
    wide = NamedTensors.zeros(layout, wide=True).flats[dtype]
    narrow = NamedTensors.zeros(layout).flats[dtype]

    def check_and_fold(update: Update, fold: WeightedSum = folds[1]) -> None:
        check(update, round=1, layout=layout, channels=strategy.update_channels)
        fold.add(update)

    rows: dict[str, Callable[[Update], object]] = {"plain": lambda update: wide.add_(update.delta.flats[dtype])}
    if wide.dtype != narrow.dtype:
        rows["narrow"] = lambda update: narrow.add_(update.delta.flats[dtype])
    return rows | {"fold": folds[0].add, "check+fold": check_and_fold}


def measure(mb: float, dtype: torch.dtype, num_updates: int, repeats: int) -> dict[str, float]:
    """Median seconds an update by row, and the update's `bytes`."""
    layout = layout_of(mb, dtype)
    seconds = medians(rows_of(layout, dtype), updates_of(layout, num_updates), repeats)
    return seconds | {"bytes": layout.num_bytes}


def report(title: str, figures: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, seconds in figures.items():
        if name != "bytes":
            speed, ratio = figures["bytes"] / seconds / 1e9, figures["plain"] / seconds
            print(f"  {name:<12}{seconds * 1e6:>12,.1f} µs{speed:>9.2f} GB/s   ratio to plain {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=512, help="MiB an update")
    parser.add_argument("--updates", type=int, default=4, help="updates of that size, each in its own memory")
    parser.add_argument("--repeats", type=int, default=5, help="turns over all updates")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{args.updates} updates of {args.mb:g} MiB, {torch.get_num_threads()} threads, torch {torch.__version__}")

    single = measure(args.mb, torch.float32, args.updates, args.repeats)
    report("float32", single)
    half = measure(args.mb, torch.bfloat16, args.updates, args.repeats)
    report("bfloat16", half)
    small = measure(SMALL_MB, torch.float32, SMALL_UPDATES, 1)
    report(f"float32, {SMALL_UPDATES} updates of {SMALL_MB} MiB", small)
    if args.json:
        print(json.dumps(summary(single, half, small)))


def summary(single: dict[str, float], half: dict[str, float], small: dict[str, float]) -> dict[str, float]:
    """The figures by name: ratios are speeds over plain's, `gb_s` is 10⁹ bytes of update a second."""
    figures = {
        "fold_ratio": single["plain"] / single["fold"],
        "verify_and_fold_ratio": single["plain"] / single["check+fold"],
        "plain_gb_s": single["bytes"] / single["plain"] / 1e9,
        "fold_gb_s": single["bytes"] / single["fold"] / 1e9,
        "verify_and_fold_gb_s": single["bytes"] / single["check+fold"] / 1e9,
        "bf16_fold_ratio": half["plain"] / half["fold"],
        "bf16_verify_and_fold_ratio": half["plain"] / half["check+fold"],
        "bf16_fold_over_narrow_ratio": half["narrow"] / half["fold"],
        "bf16_fold_gb_s": half["bytes"] / half["fold"] / 1e9,
        "small_fold_us": small["fold"] * 1e6,
        "small_verify_and_fold_us": small["check+fold"] * 1e6,
    }
    return {name: round(value, 3) for name, value in figures.items()}


if __name__ == "__main__":
    main()

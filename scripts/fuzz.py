"""Throws broken messages at everything that receives bytes, for as long as one likes.

What is wrong must be refused by type, and what passes must be what its own encoding says; anything else is a defect.
The message that showed it is written to a file, which `--replay` takes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path
from random import Random, SystemRandom

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests/ is not installed

from tests.protocol.fuzzing import TARGETS, Found, mutated, try_one

#: cases of one target before the next one's turn
_TURN = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, help="begin here (default: at random; it is printed)")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="only these (default: all)")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for a message that shows a defect")
    parser.add_argument("--replay", type=Path, help="try a message from such a file, and nothing else")
    options = parser.parse_args()
    try:
        if options.replay is not None:
            passed = try_one(_target_of(options.replay, parser), options.replay.read_bytes())
            print("it passes, and is what its encoding says" if passed else "it is refused, by type")
        else:
            _fuzz(options.target or list(TARGETS), options.seconds, options.seed)
    except Found as found:
        path = (
            options.replay or options.output / f"fuzz-{found.target}-{hashlib.sha256(found.raw).hexdigest()[:16]}.bin"
        )
        path.write_bytes(found.raw)
        sys.exit(f"{found.target}: {found.__cause__!r}\n  the message is in {path}; try it with --replay {path}")


def _fuzz(targets: list[str], seconds: float, seed: int | None) -> None:
    seed = SystemRandom().getrandbits(32) if seed is None else seed
    print(f"seed {seed}", flush=True)
    draw, ends = Random(seed), time.monotonic() + seconds
    cases = passed = 0
    while time.monotonic() < ends:
        for name in targets:
            passed += sum(try_one(name, mutated(name, draw)) for _ in range(_TURN))
            cases += _TURN
    print(f"{cases:,} messages: {cases - passed:,} refused by type, {passed:,} what their encoding says")


def _target_of(path: Path, parser: argparse.ArgumentParser) -> str:
    name = path.stem.removeprefix("fuzz-").rpartition("-")[0]
    if name not in TARGETS:
        parser.error(f"{path.name} names no target; it must be fuzz-TARGET-… with one of {', '.join(TARGETS)}")
    return name


if __name__ == "__main__":
    main()

"""How much virtual time buffered asynchronous training saves where sites are unequally fast.

    python benchmarks/asynchronous.py [--buffer 4] [--versions 30] [--set KEY=VALUE] [--json]

Two runs of the demo's model, data and sites, whose speeds lie evenly between 1 and 10 steps a virtual second:
synchronous federated averaging as the recipe has it, in which a round takes as long as its slowest site, and FedBuff.
Compared are the virtual seconds that the first takes to its final held-out loss (mean over sites, nats a token) and the
second to a loss no larger. The losses of FedBuff's versions go up and down; `from_then_on` is when they stay below.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import measure, report

FEDERATED_ONLY = ["evaluation.controls=[]", "evaluation.samples=0"]
SPEEDS = ["federation.clock.slowest=1", "federation.clock.fastest=10"]

Curve = list[tuple[float, float]]  # (virtual seconds, loss) after each round


def curve(recipe: str, overrides: list[str]) -> Curve:
    """A run's held-out loss over virtual time."""
    sets = [part for o in [*FEDERATED_ONLY, *SPEEDS, *overrides] for part in ("--set", o)]
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("commonweight")), "run", recipe, *sets]
        metrics = measure([*command, "-o", f"{folder}/run", "--json"]).result
    times = [0.0, *metrics["clock"]["virtual_s"]]
    return [(times[point["round"]], point["macro_loss"]) for point in metrics["arms"]["federated"]["rounds"]]


def compare(recipe: str, overrides: list[str], buffer: int, versions: int) -> dict[str, Any]:
    synchronous = curve(recipe, [*overrides, "federation.strategy=fedavg"])
    strategy = [f"federation.strategy={{name: fedbuff, buffer: {buffer}}}", f"federation.rounds={versions}"]
    buffered = curve(recipe, [*overrides, *strategy])
    taken, target = synchronous[-1]
    reached = next((time for time, loss in buffered if loss <= target), None)
    above = [place for place, (_, loss) in enumerate(buffered) if loss > target]
    stays = buffered[above[-1] + 1][0] if above[-1] + 1 < len(buffered) else None
    return {
        "buffer": buffer,
        "target_loss": target,
        "fedavg_virtual_s": taken,
        "fedbuff_virtual_s": reached,
        "fedbuff_over_fedavg": None if reached is None else reached / taken,
        "fedbuff_from_then_on_s": stays,
        "from_then_on_over_fedavg": None if stays is None else stays / taken,
        "fedbuff_final_loss": buffered[-1][1],
        "fedbuff_final_virtual_s": buffered[-1][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--buffer", type=int, default=4)
    parser.add_argument("--versions", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = compare(arguments.recipe, arguments.overrides, arguments.buffer, arguments.versions)
    report(figures, as_json=arguments.json)


if __name__ == "__main__":
    main()

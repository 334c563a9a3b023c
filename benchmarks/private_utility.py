"""What privacy costs: the same real job at several ε, of single examples and of whole sites.

    python benchmarks/private_utility.py --recipe recipes/medquad.yaml --set data.path=… --set model.name=… \\
        [--units example,site] [--epsilons 2,8] [--seeds 0,1,2] [--delta D] [--clip-example C] [--clip-site C] [--json]
    python benchmarks/private_utility.py --from seed0.json seed1.json … [--json]      # what runs apart have measured

Every run has the recipe's sites, rows, local steps and rounds, with weights that are uniform; only the privacy differs.
`none` is ε = ∞, `base` the model before training. Noise is drawn anew by every run, so that a spread over seeds is one
over noise too.

    loss      held-out nats a token after the last round, mean over sites, which count alike; ± s.d. over seeds
    kept      the share of what training gains without privacy: (base − loss)/(base − loss without privacy)
    z         the noise multiplier, of the site that needs most
    ε         as the run's metrics state it, never above the one that was asked for

With `--json` each row is a list a figure, with an entry for each seed; `--from` joins such files of one job.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.strategies import joined
from commonweight.errors import RecipeError
from commonweight.launch import run
from commonweight.recipe.load import load_recipe

NONE = "none"
ALONE = [
    "evaluation.controls=[base]",
    "evaluation.samples=0",
    "evaluation.every=1000000",
    "federation.weighting=uniform",
]


def measured(recipe: str, overrides: list[str], privacy: dict[str, Any], seed: int) -> dict[str, float]:
    """One run's figures."""
    loaded = load_recipe(recipe, [*overrides, *ALONE, f"seed={seed}", f"privacy={json.dumps(privacy)}"])
    with tempfile.TemporaryDirectory() as folder:
        metrics = run(loaded, Path(folder) / "run")
    stated = metrics["privacy"]
    sites = stated.get("sites", {})
    noise = max((site["noise_multiplier"] for site in sites.values()), default=stated.get("noise_multiplier", 0.0))
    return {
        "loss": metrics["arms"]["federated"]["macro_loss"],
        "base": metrics["arms"]["base"]["macro_loss"],
        "z": noise,
        "epsilon": stated["epsilon"] if stated["epsilon"] is not None else -1.0,
    }


def rows(units: list[str], epsilons: list[float], delta: float, clips: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The privacy of each row, by the row's name."""
    private = {
        f"{unit} ε {epsilon:g}": {"dp": unit, "clip": clips[unit], "delta": delta, "epsilon": epsilon}
        for unit in units
        for epsilon in epsilons
    }
    return {NONE: {"dp": NONE}, **private}


def compare(recipe: str, overrides: list[str], wanted: dict[str, dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """A row a privacy, of figures as lists with an entry a seed."""
    table: dict[str, Any] = {}
    for name, privacy in wanted.items():
        runs = [measured(recipe, overrides, privacy, seed) for seed in seeds]
        table[name] = {"seed": seeds, **{key: [one[key] for one in runs] for key in runs[0]}}
        print(f"{name}: {table[name]}", file=sys.stderr)
    return table


def kept(table: dict[str, Any], name: str) -> float:
    """(base − loss)/(base − loss without privacy), of the means."""
    base, loss, free = (statistics.mean(row) for row in (table[name]["base"], table[name]["loss"], table[NONE]["loss"]))
    return (base - loss) / (base - free)


def show(table: dict[str, Any]) -> None:
    print(f"{'privacy':14} {'seeds':>5} {'loss':>15} {'kept':>7} {'z':>8} {'ε':>7}")
    base = statistics.mean(table[NONE]["base"])
    print(f"{'base':14} {'':5} {base:15.3f} {0:7.0%} {'–':>8} {'–':>7}")
    for name, row in table.items():
        losses, epsilon = row["loss"], max(row["epsilon"])
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        cells = f"{statistics.mean(losses):.3f}{spread}", kept(table, name), max(row["z"])
        print(
            f"{name:14} {len(losses):5} {cells[0]:>15} {cells[1]:7.0%} {cells[2]:8.3f} "
            f"{'∞' if epsilon < 0 else f'{epsilon:.3f}':>7}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--units", default="example,site")
    parser.add_argument("--epsilons", default="2,8")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--clip-example", type=float, default=0.5)
    parser.add_argument("--clip-site", type=float, default=0.5)
    parser.add_argument("--from", type=Path, nargs="+", dest="files", metavar="FILE", help="Join these; run nothing.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
        if given.files:
            table = joined([json.loads(file.read_text()) for file in given.files])
        else:
            clips = {"example": given.clip_example, "site": given.clip_site}
            epsilons = [float(epsilon) for epsilon in given.epsilons.split(",")]
            units = given.units.split(",")
            if not set(units) <= set(clips):
                parser.error(f"--units are some of {', '.join(clips)}")
            wanted = rows(units, epsilons, given.delta, clips)
            table = compare(given.recipe, given.overrides, wanted, [int(seed) for seed in given.seeds.split(",")])
    except (RecipeError, OSError, ValueError) as error:
        parser.error(str(error))
    print(json.dumps(table)) if given.json else show(table)


if __name__ == "__main__":
    main()

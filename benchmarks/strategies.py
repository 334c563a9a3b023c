"""Every strategy on the same real job: what the sites gain, what goes over the wire, what the server does for it.

    python benchmarks/strategies.py --recipe recipes/medquad.yaml --set data.path=… --set model.name=… \\
        [--strategies fedavg,fedadam,…] [--seeds 0,1,2] [--options FILE] [--json]
    python benchmarks/strategies.py --from seed0.json seed1.json … [--json]      # what runs apart have measured, as one

All strategies run the federated arm of the recipe: the same sites, rows, local steps and rounds, so equal budgets. A
strategy is given the options of `OPTIONS` below, or those of a JSON file {name: {option: value}}; others keep their
defaults. One that does not go with the recipe (`commonweight methods`) is listed with the reason.

    loss            held-out nats a token after the last round, of the model that a site uses (its own, if it has one),
                    mean over sites, which count alike; ± s.d. over seeds
    worst           the worst site's loss
    up, down        MB that left the sites and that reached them, in all rounds
    server          seconds of folding and committing a round
    all             seconds of the whole arm

With `--json` each strategy's row is a list a figure, with an entry for each seed; `--from` joins such files of one job.
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

from commonweight import registry
from commonweight.errors import CommonweightError, RecipeError
from commonweight.launch import run
from commonweight.recipe.load import check_methods, load_recipe

#: what a strategy cannot do without, or what its defaults are too far from for a few rounds of LoRA
OPTIONS: dict[str, dict[str, Any]] = {
    "diloco": {},
    **{name: {"f": 1} for name in ("trimmed-mean", "krum", "multi-krum", "bulyan", "dnc")},
    "median": {},
}
ALONE = ["evaluation.controls=[]", "evaluation.samples=0", "evaluation.every=1000000"]


def measured(recipe: str, overrides: list[str], strategy: str, options: dict[str, Any], seed: int) -> dict[str, float]:
    """One run's figures."""
    method = json.dumps({"name": strategy, **options})
    loaded = load_recipe(recipe, [*overrides, *ALONE, f"seed={seed}", f"federation.strategy={method}"])
    check_methods(loaded)
    with tempfile.TemporaryDirectory() as folder:
        metrics = run(loaded, Path(folder) / "run")
    arm, rounds = metrics["arms"].get("personal", metrics["arms"]["federated"]), metrics["rounds"]
    return {
        "loss": arm["macro_loss"],
        "worst": max(site["loss"] for site in arm["sites"].values()),
        "up_mb": metrics["bytes"]["up"] / 1e6,
        "down_mb": metrics["bytes"]["down"] / 1e6,
        "server_s": statistics.mean(r["seconds"]["fold"] + r["seconds"]["commit"] for r in rounds),
        "seconds": metrics["seconds"]["federated"],
    }


def compare(
    recipe: str, overrides: list[str], strategies: list[str], seeds: list[int], options: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """A row a strategy, of figures as lists with an entry a seed; those that could not run have `refused`."""
    table: dict[str, Any] = {}
    for strategy in strategies:
        try:
            runs = [measured(recipe, overrides, strategy, options.get(strategy, {}), seed) for seed in seeds]
        except CommonweightError as error:
            table[strategy] = {"refused": error.message}
        else:
            table[strategy] = {"seed": seeds, **{key: [one[key] for one in runs] for key in runs[0]}}
        print(f"{strategy}: {table[strategy]}", file=sys.stderr)
    return table


def joined(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """One table of several, each of other seeds or strategies: of a strategy the figures that all its rows have. It
    counts as refused if no table has any.

    Raises:
        ValueError: a strategy has the same seed in two tables.
    """
    found: dict[str, Any] = {}
    for table in tables:
        for name, row in table.items():
            known = found.get(name)
            if known is None or "refused" in known:
                found[name] = row
            elif "refused" not in row:
                twice = set(known.get("seed", ())) & set(row.get("seed", ()))
                if twice:
                    raise ValueError(f"{name}: seed {min(twice)} is in two of the files")
                found[name] = {key: [*known[key], *row[key]] for key in known if key in row}
    return found


#: heading, width and decimals of each figure of which the table shows the mean alone
MEANS = {
    "up_mb": ("up MB", 8, 1),
    "down_mb": ("down MB", 8, 1),
    "server_s": ("server s", 9, 4),
    "seconds": ("all s", 7, 1),
}


def show(table: dict[str, Any]) -> None:
    heads = " ".join(f"{head:>{width}}" for head, width, _ in MEANS.values())
    print(f"{'strategy':18} {'seeds':>5} {'loss':>15} {'worst':>15} {heads}")
    for name, row in sorted(table.items(), key=lambda item: statistics.mean(item[1].get("loss", [float("inf")]))):
        if "refused" in row:
            print(f"{name:18} refused: {row['refused']}")
            continue
        cells = [f"{_spread(row[key]):>15}" for key in ("loss", "worst")]
        for key, (_, width, decimals) in MEANS.items():
            cells.append(f"{statistics.mean(row[key]):{width}.{decimals}f}" if key in row else f"{'–':>{width}}")
        print(f"{name:18} {len(row['loss']):5} {' '.join(cells)}")


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--strategies", default=",".join(registry.names("strategy")))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--options", type=Path, help="A JSON file with strategies' options.")
    parser.add_argument("--from", type=Path, nargs="+", dest="files", metavar="FILE", help="Join these; run nothing.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    strategies = given.strategies.split(",")
    unknown = [name for name in strategies if name not in registry.names("strategy")]
    if unknown:
        parser.error(f"no strategy is called {unknown[0]!r}; there are: {', '.join(registry.names('strategy'))}")
    try:
        if given.files:
            table = joined([json.loads(file.read_text()) for file in given.files])
        else:
            options = {**OPTIONS, **(json.loads(given.options.read_text()) if given.options else {})}
            seeds = [int(seed) for seed in given.seeds.split(",")]
            table = compare(given.recipe, given.overrides, strategies, seeds, options)
    except (RecipeError, OSError, ValueError) as error:
        parser.error(str(error))
    print(json.dumps(table)) if given.json else show(table)


if __name__ == "__main__":
    main()

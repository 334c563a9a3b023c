"""What a leak audit finds on one recipe without privacy and at several ε: its lower bounds against the claims.

    python benchmarks/leak_audit.py [--recipe demo] [--unit example] [--epsilons inf,40,8] [--clip 0.5] [--delta 1e-5]
        [--canaries 400] [--seeds 0] [--set KEY=VALUE] [--json]

Canaries are planted at all sites. `--unit example` is DP-SGD at the sites, `--unit site` noise on the sum of updates;
of the latter the claim for a single row is more than the ε asked for (docs/privacy.md). Printed for each ε: what is
claimed for a row, the lower bound at 95 %, right guesses of how many, the AUC on canaries and on real rows, rows
recognised at 1 % false alarms, and the held-out loss. The command fails if a bound is above its claim.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from commonweight.launch import run
from commonweight.leaks.audit import audit_run
from commonweight.recipe.load import load_recipe

COLUMNS = ("seed", "ε", "claim", "ε ≥", "right", "of", "AUC canaries", "AUC rows", "Min-K%++", "TPR 1 %", "loss")
QUIET = ("evaluation.controls=[]", "evaluation.samples=0", "evaluation.every=1000")


def privacy(unit: str, epsilon: float, clip: float, delta: float) -> list[str]:
    if epsilon == math.inf:
        return []
    spec = {"dp": unit, "epsilon": epsilon, "clip": clip, "delta": delta}
    return [f"privacy.{key}={value}" for key, value in spec.items()]


def audited(recipe: str, overrides: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        metrics = run(load_recipe(recipe, [*QUIET, *overrides]), path)
        found = audit_run(path)
    canaries, members = found["canaries"], found["membership"]
    return {
        "claim": found["claim"]["epsilon"],
        "epsilon_at_least": canaries["epsilon_at_least"],
        "correct": canaries["correct"],
        "guesses": canaries["guesses"],
        "auc_canaries": canaries["auc"],
        "auc_rows": members["reference_loss"]["auc"],
        "auc_rows_ci95": members["reference_loss"]["auc_ci95"],
        "auc_min_k": members["min_k_plus_plus"]["auc"],
        "auc_base": members["base_loss"]["auc"],
        "tpr": members["reference_loss"]["tpr"]["0.01"]["rate"],
        "tpr_ci95": members["reference_loss"]["tpr"]["0.01"]["ci95"],
        "rows": members["reference_loss"]["members"],
        "loss": metrics["arms"]["federated"]["macro_loss"],
        "base_loss": metrics["arms"]["federated"]["rounds"][0]["macro_loss"],
        "token_span": found["token_span"].get("recovered"),
        "token_chance": found["token_span"].get("chance"),
        "verdict": found["verdict"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--unit", choices=("example", "site"), default="example")
    parser.add_argument("--epsilons", default="inf,40,8")
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--canaries", type=int, default=400)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    if not given.json:
        print("  ".join(f"{name:>12}" for name in COLUMNS))
    for seed in given.seeds.split(","):
        for epsilon in map(float, given.epsilons.split(",")):
            asked = privacy(given.unit, epsilon, given.clip, given.delta)
            more = [f"privacy.canaries.count={given.canaries}", f"seed={seed}", *asked]
            row = {"seed": int(seed), "epsilon": epsilon, **audited(given.recipe, [*given.overrides, *more])}
            rows.append({**row, "epsilon": epsilon if epsilon < math.inf else None})
            if not given.json:
                print(_line(row), flush=True)
    if given.json:
        print(json.dumps({"unit": given.unit, "canaries": given.canaries, "runs": rows}))
    if any(row["verdict"] == "exceeded" for row in rows):
        raise SystemExit("a bound is above its claim")


def _line(row: dict[str, Any]) -> str:
    claim = math.inf if row["claim"] is None else row["claim"]
    cells = [
        str(row["seed"]),
        f"{row['epsilon']:g}",
        f"{claim:.2f}",
        f"{row['epsilon_at_least']:.2f}",
        str(row["correct"]),
        str(row["guesses"]),
        *(f"{row[key]:.3f}" for key in ("auc_canaries", "auc_rows", "auc_min_k", "tpr", "loss")),
    ]
    return "  ".join(f"{cell:>12}" for cell in cells)


if __name__ == "__main__":
    main()

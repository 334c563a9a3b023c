"""What clustering gains where sites are of two kinds, and whether the kinds are found.

    python benchmarks/clusters.py [--sites 8] [--rows 48] [--seeds 0,1,2] [--set KEY=VALUE] [--json]

A made federation: every site is asked what helps with each of twelve troubles, in words of its own; one half of the
sites answers from one handbook, the other half from another that says something else of every trouble. No single model
can serve both. The model is the small one that ships with the package. For FedAvg, IFCA and similarity clustering it
prints the held-out loss (nats a token, mean over sites) and the sites whose cluster is not that of most of their kind;
for `known`, FedAvg on each half alone, which is what knowing the kinds would give.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import report
from commonweight.launch import run
from commonweight.recipe.load import load_recipe

TROUBLES = (
    *("cough", "fever", "headache", "earache", "backache", "hiccups"),
    *("sunburn", "blisters", "nausea", "insect bite", "sore throat", "cold hands"),
)
REMEDIES = (
    *("honey tea", "cool cloths", "a dark room", "warm oil", "gentle walks", "holding the breath"),
    *("cold milk", "clean dressings", "dry bread", "lemon juice", "salt water", "woollen gloves"),
)
WAYS = (
    "What helps with {}?",
    "Please tell me what to do about {}.",
    "A patient has {}. Your advice?",
    "{}: what is the remedy?",
    "How do we treat {}?",
    "Which remedy is right for {}?",
)
GREETINGS = ("", "Good morning. ", "Hello, ", "Dear doctor, ")
STRATEGIES = ("fedavg", "ifca", "similarity")
RECIPE = """
name: clusters
model: {name: commonweight/tiny, adapter: {kind: lora, r: 8, alpha: 16}}
data: {path: PATH, prompt: "Question: {question}\\nAnswer:", completion: " {answer}", sites: {by: site},
  holdout: {by: question, examples: 8}}
training: {lr: 1.0e-2, batch_size: 8, max_tokens: 64, epochs: 1}
federation: {rounds: 8}
evaluation: {controls: [], samples: 0}
engine: {device: cpu}
"""


def kind_of(site: str) -> str:
    return site.partition("-")[0]


def write_rows(path: Path, *, sites: int, rows: int, seed: int) -> None:
    """A federation's rows; a site's questions are drawn in its own words, with the same answers for its kind."""
    draw = random.Random(seed)
    other = [*REMEDIES[5:], *REMEDIES[:5]]
    books = {"first": dict(zip(TROUBLES, REMEDIES, strict=True)), "second": dict(zip(TROUBLES, other, strict=True))}
    with path.open("w", encoding="utf-8") as file:
        for number in range(sites):
            kind = "first" if number < sites // 2 else "second"
            for _ in range(rows):
                trouble, greeting = draw.choice(TROUBLES), draw.choice(GREETINGS)
                row = {
                    "site": f"{kind}-{number}",
                    "question": greeting + draw.choice(WAYS).format(trouble),
                    "answer": books[kind][trouble],
                }
                file.write(json.dumps(row) + "\n")


def one_run(path: Path, overrides: Sequence[str], seed: int) -> dict[str, Any]:
    recipe = path.with_suffix(".yaml")
    recipe.write_text(RECIPE.replace("PATH", str(path)), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        return run(load_recipe(str(recipe), [*overrides, f"seed={seed}"]), Path(folder) / "run")


def misplaced(clusters: Sequence[Mapping[str, Any]]) -> int:
    """Sites that are in another cluster than most of their kind, or share it with most of the other kind."""
    most: dict[str, int] = {}
    of = {site: one["cluster"] for one in clusters for site in one["sites"]}
    for kind in ("first", "second"):
        most[kind] = Counter(cluster for site, cluster in of.items() if kind_of(site) == kind).most_common(1)[0][0]
    if most["first"] == most["second"]:
        return len(of) // 2
    return sum(cluster != most[kind_of(site)] for site, cluster in of.items())


def compare(overrides: Sequence[str], *, sites: int, rows: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, sites=sites, rows=rows, seed=seed)
        for strategy in STRATEGIES:
            metrics = one_run(path, [f"federation.strategy={strategy}", *overrides], seed)
            found[f"{strategy}_loss"] = metrics["arms"]["federated"]["macro_loss"]
            if "clusters" in metrics:
                found[f"{strategy}_misplaced"] = misplaced(metrics["clusters"]["found"])
        names = [f"{'first' if n < sites // 2 else 'second'}-{n}" for n in range(sites)]
        halves = [[name for name in names if kind_of(name) == kind] for kind in ("first", "second")]
        losses = [
            one_run(path, [*overrides, f"data.sites.only={json.dumps(half)}"], seed)["arms"]["federated"]["macro_loss"]
            for half in halves
        ]
        found["known_loss"] = statistics.mean(losses)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runs = [
        compare(arguments.overrides, sites=arguments.sites, rows=arguments.rows, seed=int(seed))
        for seed in arguments.seeds.split(",")
    ]
    figures = {name: statistics.mean(one[name] for one in runs) for name in runs[0]}
    report({"sites": arguments.sites, "rows": arguments.rows, **figures}, as_json=arguments.json)


if __name__ == "__main__":
    main()

"""What codecs save on the wire, and what they cost in loss: a real job, run with each of them.

    python benchmarks/bytes_vs_loss.py --recipe recipes/medquad.yaml --set data.path=… --set model.name=… \\
        [--codecs none,bf16,auto,…] [--seeds 0,1,2] [--json]
    python benchmarks/bytes_vs_loss.py --from a.json b.json … [--plot FILE.svg] [--json]    # what runs apart measured

Every codec runs the federated arm of the recipe: the same sites, rows, local steps, rounds. A codec is one of `CODECS`
below, or a mapping as `compression` takes it, by --codec NAME=MAPPING; those of `compression.down` are called `down …`.

    up MB       bytes that left the sites, in all rounds
    fewer       how many times fewer that is than with `none`
    down MB     bytes that sites fetched to train from, in all rounds, and how many times fewer that is
    loss        held-out nats a token after the last round, mean over sites; ± s.d. over seeds
    to none     the same as a ratio to `none`, of the same seeds
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from commonweight.errors import RecipeError
from commonweight.launch import run
from commonweight.recipe.load import check_methods, load_recipe

ALONE = ["evaluation.controls=[]", "evaluation.samples=0", "evaluation.every=1000000"]


def _sparse(keep: float, bits: int, **more: Any) -> dict[str, Any]:
    rounding = {"name": "uniform", "bits": bits}
    return {"shorten": {"name": "top-k", "keep": keep}, "round": rounding, "pack": "huffman", **more}


#: `without`: without error feedback
CODECS: dict[str, Any] = {
    "none": "none",
    "bf16": {"round": "bf16"},
    "int8": {"round": "int8"},
    "nf4": {"round": "nf4"},
    "uniform 4": {"round": {"name": "uniform", "bits": 4}, "pack": "huffman"},
    "uniform 2": {"round": {"name": "uniform", "bits": 2}, "pack": "huffman"},
    "sign": {"round": "sign"},
    "low-rank 1": {"shorten": {"name": "low-rank", "rank": 1}, "round": "int8"},
    "random-k 5 %": {"shorten": {"name": "random-k", "keep": 0.05}, "round": {"name": "uniform", "bits": 4}},
    "top-k 10 %": _sparse(0.10, 4),
    "top-k 5 %": _sparse(0.05, 4),
    "top-k 2 %": _sparse(0.02, 4),
    "top-k 1 %": _sparse(0.01, 4),
    "uniform 2 without": {"round": {"name": "uniform", "bits": 2}, "pack": "huffman", "error_feedback": False},
    "sign without": {"round": "sign", "error_feedback": False},
    "top-k 5 % without": _sparse(0.05, 4, error_feedback=False),
    "auto": "auto",
    "down bf16": {"down": {"round": "bf16"}},
    "down int8": {"down": {"round": "int8"}},
    "down auto": {"down": "auto"},
    "down uniform 2": {"down": {"round": {"name": "uniform", "bits": 2, "rounding": "nearest"}, "pack": "huffman"}},
    "down sign": {"down": {"round": "sign"}},
    "down top-k 10 %": {"down": _sparse(0.10, 4)},
    "sign and down auto": {"round": "sign", "down": "auto"},
}


def measured(recipe: str, overrides: Sequence[str], codec: Any, seed: int) -> dict[str, float]:
    """One run's figures."""
    loaded = load_recipe(recipe, [*overrides, *ALONE, f"seed={seed}", f"compression={json.dumps(codec)}"])
    check_methods(loaded)
    with tempfile.TemporaryDirectory() as folder:
        metrics = run(loaded, Path(folder) / "run")
    sizes = {f"{way}_mb": metrics["bytes"][way] / 1e6 for way in ("up", "down")}
    return {"loss": metrics["arms"]["federated"]["macro_loss"], **sizes}


def compare(recipe: str, overrides: Sequence[str], codecs: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """By codec, lists with an entry a seed."""
    table: dict[str, Any] = {}
    for name, codec in codecs.items():
        runs = [measured(recipe, overrides, codec, seed) for seed in seeds]
        table[name] = {"seed": list(seeds), **{key: [one[key] for one in runs] for key in runs[0]}}
        print(f"{name}: {table[name]}", file=sys.stderr)
    return table


def joined(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One table of several of one job.

    Raises:
        ValueError: a codec has the same seed in two tables.
    """
    found: dict[str, Any] = {}
    for name, row in (item for table in tables for item in table.items()):
        known = found.setdefault(name, {key: [] for key in row})
        twice = set(known["seed"]) & set(row["seed"])
        if twice:
            raise ValueError(f"{name}: seed {min(twice)} is in two of the files")
        for key, values in row.items():
            known[key] = [*known[key], *values]
    return found


def summary(table: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By codec: means, the spread of the loss, and ratios to `none` over the seeds that both have."""
    plain = {seed: _of(table["none"], place) for place, seed in enumerate(table["none"]["seed"])}
    rows = {}
    for name, row in table.items():
        both = [(_of(row, place), plain[seed]) for place, seed in enumerate(row["seed"]) if seed in plain]
        rows[name] = {
            "seeds": len(row["seed"]),
            "up_mb": statistics.mean(row["up_mb"]),
            "fewer_up": statistics.mean(none["up_mb"] / one["up_mb"] for one, none in both),
            "down_mb": statistics.mean(row["down_mb"]),
            "fewer_down": statistics.mean(none["down_mb"] / one["down_mb"] for one, none in both),
            "loss": statistics.mean(row["loss"]),
            "spread": statistics.stdev(row["loss"]) if len(row["loss"]) > 1 else 0.0,
            "to_none": statistics.mean(one["loss"] / none["loss"] for one, none in both),
        }
    return rows


def _of(row: Mapping[str, Sequence[float]], place: int) -> dict[str, float]:
    """One seed's figures."""
    return {key: values[place] for key, values in row.items()}


def show(table: Mapping[str, Any]) -> None:
    print(
        f"{'codec':24} {'seeds':>5} {'up MB':>9} {'fewer':>7} {'down MB':>9} {'fewer':>7} {'loss':>15} {'to none':>8}"
    )
    for name, row in sorted(summary(table).items(), key=lambda item: -item[1]["up_mb"] - item[1]["down_mb"]):
        up, down = (f"{row[f'{way}_mb']:9.4f} {row[f'fewer_{way}']:6.1f}x" for way in ("up", "down"))
        loss = f"{row['loss']:.3f} ± {row['spread']:.3f}"
        print(f"{name:24} {row['seeds']:5} {up} {down} {loss:>15} {row['to_none']:8.4f}")


def plot(table: Mapping[str, Any], title: str) -> str:
    """Loss, to that of `none`, against how many times fewer bytes went up, as an SVG: a mark a codec, hollow without
    error feedback."""
    rows = {name: row for name, row in summary(table).items() if name != "none"}
    most = math.log10(max(row["fewer_up"] for row in rows.values())) * 1.08
    highest = max(row["to_none"] for row in rows.values()) * 1.01 - 1
    wide, high, left, base = 900, 460, 70, 400

    def at(fewer: float, ratio: float) -> tuple[float, float]:
        return left + (wide - left - 150) * math.log10(fewer) / most, base - (base - 50) * (ratio - 1) / highest

    shapes = [f'<text x="{left}" y="24" class="title">{escape(title)}</text>']
    for fewer in (1, 2, 5, 10, 20, 50, 100, 200):
        if math.log10(fewer) <= most:
            x = at(fewer, 1)[0]
            shapes.append(f'<path d="M{x:.1f} 50V{base}" class="grid"/>')
            shapes.append(f'<text x="{x:.1f}" y="{base + 20}" text-anchor="middle">{fewer}×</text>')
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if highest / step <= 8)
    for k in range(int(highest / step) + 1):
        y = at(1, 1 + k * step)[1]
        shapes.append(f'<path d="M{left} {y:.1f}H{wide - 150}" class="grid"/>')
        shapes.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{1 + k * step:.2f}</text>')
    shapes.append(f'<text x="{left}" y="{base + 44}">fewer bytes up than float32 · loss, to that of float32 ↑</text>')
    taken: list[tuple[float, float, float]] = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["to_none"]):
        x, y = at(row["fewer_up"], row["to_none"])
        kind = "without" if name.endswith("without") else "with"
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{kind}"/>')
        spot, width = y + 4, 7 * len(name)
        while any(abs(spot - other) < 14 and x < end and place < x + width for place, end, other in taken):
            spot -= 14  # above what is written there
        taken.append((x, x + width, spot))
        shapes.append(f'<path d="M{x:.1f} {y:.1f}L{x + 7:.1f} {spot - 4:.1f}" class="leader"/>')
        shapes.append(f'<text x="{x + 8:.1f}" y="{spot:.1f}">{escape(name)}</text>')
    style = (
        "text{font:12px sans-serif;fill:#333}.title{font-size:15px}.grid{stroke:#ddd}.with{fill:#1f6f8b}"
        ".leader{stroke:#999;stroke-width:.7}.without{fill:#fff;stroke:#c0562f;stroke-width:2}svg{background:#fff}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" role="img">'
        f'<style>{style}</style><rect width="{wide}" height="{high}" fill="#fff"/>{"".join(shapes)}</svg>\n'
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--codec", action="append", default=[], metavar="NAME=MAPPING", help="One more, in JSON.")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--from", type=Path, nargs="+", dest="files", metavar="FILE", help="Join these; run nothing.")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="Draw loss against bytes, as an SVG.")
    parser.add_argument("--title", default="Loss against bytes", help="Of the drawing.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
        known = {**CODECS, **{n: json.loads(text) for n, _, text in (c.partition("=") for c in given.codec)}}
        wanted = [*given.codecs.split(","), *(c.partition("=")[0] for c in given.codec)]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            parser.error(f"no codec is called {unknown[0]!r}; there are: {', '.join(known)}")
        chosen = {name: known[name] for name in wanted}
        if given.files:
            table = joined([json.loads(file.read_text()) for file in given.files])
        else:
            table = compare(given.recipe, given.overrides, chosen, [int(seed) for seed in given.seeds.split(",")])
    except (RecipeError, OSError, ValueError) as error:
        parser.error(str(error))
    if given.plot is not None:
        given.plot.write_text(plot(table, given.title))
    print(json.dumps(table)) if given.json else show(table)


if __name__ == "__main__":
    main()

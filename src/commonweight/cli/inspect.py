"""Commands that show something: report, runs, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RecipeError, StateError
from .terminal import JsonOption, RunArgument, number, options, print_json, read_run, table


def report(run: RunArgument, json: JsonOption = False) -> None:
    """Write a run's report anew and print its summary."""
    options.json = json
    metrics = read_run(run)
    from ..evaluate.report import write_report
    from .progress import print_result

    path = write_report(run)
    if json:
        print_json({"folder": str(run), "report": str(path), **metrics})
    else:
        print_result(metrics, run)


def runs(
    directory: Annotated[Path, typer.Argument(help="Folder of runs.", metavar="DIR")] = Path("runs"),
    json: JsonOption = False,
) -> None:
    """List the runs in a folder."""
    options.json = json
    if not directory.is_dir():
        raise StateError(f"{directory} is no folder", hint="name the folder that holds your runs")
    found = [_summary(path) for path in sorted(directory.iterdir()) if (path / "recipe.yaml").exists()]
    if json:
        print_json({"runs": found})
        return
    if not found:
        typer.echo(f"no runs in {directory}")
        return
    rows = [
        (
            r["folder"],
            r["state"],
            f"{r['round']}/{r['rounds']}",
            r["strategy"],
            number(r["macro_loss"]),
            r["finished"] or "",
        )
        for r in found
    ]
    table(("run", "state", "rounds", "strategy", "loss", "finished"), rows, right=(2, 4))


def _summary(path: Path) -> dict[str, Any]:
    from ..recipe.load import load_recipe

    summary: dict[str, Any] = {
        "folder": str(path),
        "state": "damaged",
        "round": 0,
        "rounds": 0,
        "strategy": "",
        "macro_loss": None,
        "finished": None,
    }
    try:
        recipe = load_recipe(path / "recipe.yaml")
        metrics = read_run(path, finished=False)
    except (RecipeError, StateError):
        return summary
    summary |= {
        "rounds": recipe.federation.rounds,
        "strategy": recipe.federation.strategy.name,
        "round": _last_round(path),
    }
    if not metrics:
        return summary | {"state": "unfinished"}
    loss = metrics["arms"]["federated"]["macro_loss"]
    return summary | {"state": "finished", "macro_loss": loss, "finished": metrics["finished"]}


def _last_round(path: Path) -> int:
    import sqlite3

    try:
        with sqlite3.connect(f"file:{path / 'state.sqlite'}?mode=ro", uri=True) as database:
            return int(database.execute("SELECT max(round) FROM commits").fetchone()[0] or 0)
    except sqlite3.Error:
        return 0


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its options.", metavar="[NAME]")] = None,
    json: JsonOption = False,
) -> None:
    """List strategies, objectives and adapters, with their rules and sources."""
    options.json = json
    from ..recipe.methods import catalogue

    found = [m for m in catalogue() if name is None or m["name"] == name]
    if not found:
        known = ", ".join(m["name"] for m in catalogue())
        raise RecipeError(f"no method is called {name!r}", hint=f"known: {known}")
    if json:
        print_json({"methods": found})
    elif name is None:
        table(
            ("kind", "name", "needs", "rule", "source"),
            [[m[k] for k in ("kind", "name", "needs", "rule", "source")] for m in found],
        )
    else:
        for method in found:
            _print_method(method)


def _print_method(method: dict[str, Any]) -> None:
    typer.echo(f"{method['name']} ({method['kind']})\n  {method['rule']}\n  {method['source']}")
    if method["needs"]:
        typer.echo(f"  needs {method['needs']} of the sites' updates")
    for option in method["options"]:
        typer.echo(f"  {option['name']} = {option['default']}: {option['description']}")

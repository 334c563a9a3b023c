"""Commands that show something: report, runs, methods."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RecipeError, StateError
from .folders import last_round, read_run
from .terminal import JsonOption, RunArgument, begin, number, print_json, say, table

NEEDS = {"sum": "only the sum of the sites' updates", "individuals": "each site's update by itself"}


def report(run: RunArgument, json: JsonOption = False) -> None:
    """Write a run's report anew and print its summary."""
    begin(json)
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
    begin(json)
    if not directory.is_dir():
        raise StateError(f"{directory} is no folder", hint="name the folder that holds your runs")
    from ..data.names import natural_key

    folders = sorted(directory.iterdir(), key=lambda path: natural_key(path.name))
    found = [_summary(path) for path in folders if (path / "recipe.yaml").exists()]
    if json:
        print_json({"runs": found})
        return
    if not found:
        say(f"no runs in {directory}")
        return
    rows = [
        (
            r["folder"],
            r["state"],
            f"{r['round']}/{r['rounds']}",
            r["strategy"],
            number(r["macro_loss"]),
            _minute(r["finished"]),
        )
        for r in found
    ]
    table(("run", "state", "rounds", "strategy", "loss", "finished"), rows, right=(2, 4))


def _minute(time: str | None) -> str:
    """An ISO time in UTC, to the minute, as people write it."""
    return f"{time[:16].replace('T', ' ')} UTC" if time else ""


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
        "round": last_round(path),
    }
    if not metrics:
        return summary | {"state": "unfinished"}
    from ..evaluate.summary import macro_loss

    loss, rounds = macro_loss(metrics, "federated"), len(metrics.get("rounds", ()))  # a fetched run has no journal
    found = {"state": "finished", "macro_loss": loss, "finished": metrics.get("finished")}
    return summary | found | {"round": summary["round"] or rounds}


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its source and options.", metavar="NAME")] = None,
    json: JsonOption = False,
) -> None:
    """List strategies, objectives and adapters, with their rules; or show one of them."""
    begin(json)
    from ..recipe.methods import catalogue

    known = catalogue()
    found = [m for m in known if name is None or m["name"] == name]
    if not found:
        raise _unknown_method(str(name), [m["name"] for m in known])
    if json:
        print_json({"methods": found})
    elif name is None:
        columns = ("kind", "name", "needs", "rule")
        table(columns, [[m[k] for k in columns] for m in found])
        say("\n`commonweight methods NAME` shows a method's source and options.")
    else:
        for method in found:
            _print_method(method)


def _unknown_method(name: str, known: list[str]) -> RecipeError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}"
    return RecipeError(f"no method is called {name!r}", hint=hint)


def _print_method(method: dict[str, Any]) -> None:
    say(f"{method['name']} ({method['kind']})")
    needs = f"needs {NEEDS.get(method['needs'], method['needs'])}" if method["needs"] else ""
    for line in (method["rule"], method["source"], needs):
        if line:
            say(f"  {line}")
    for feature, goes in method["goes_with"].items():
        say(f"  {feature}: {'yes' if goes else 'no'}")
    if method["options"]:
        print()
        table(("option", "default", "meaning"), [_option(option) for option in method["options"]])


def _option(option: dict[str, Any]) -> tuple[str, str, str]:
    default = "null" if option["default"] is None else str(option["default"])
    return option["name"], default, option["description"]

"""What commands share: how things are printed, for people and for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..errors import CommonweightError, RecipeError, StateError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe, as `training.lr=1e-3`. Repeatable."),
]
RunArgument = Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")]


@dataclass
class Options:
    """Options given before the command, and whether the command was asked for JSON."""

    debug: bool = False
    json: bool = False


options = Options()


def fail(error: CommonweightError) -> NoReturn:
    """Print an error, for a program too if it asked for JSON, and exit with its code."""
    if options.json:
        print_json(
            {
                "error": {
                    "kind": type(error).__name__,
                    "message": error.message,
                    "hint": error.hint,
                    "retry": error.retry,
                }
            }
        )
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)
    if error.retry:
        print("  Trying again is safe.", file=sys.stderr)
    raise SystemExit(error.exit_code)


def print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def is_terminal() -> bool:
    return sys.stdout.isatty()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print a table: drawn on a terminal, plain aligned columns elsewhere."""
    if is_terminal():
        from rich.console import Console
        from rich.table import Table

        drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for index, column in enumerate(columns):
            drawn.add_column(column, justify="right" if index in right else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*row)
        Console().print(drawn, markup=False)
        return
    widths = [max(len(str(row[k])) for row in [columns, *rows]) for k in range(len(columns))]
    for row in [columns, *rows]:
        cells = [c.rjust(w) if k in right else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def read_run(run: Path, *, finished: bool = True) -> dict[str, Any]:
    """A run's metrics.

    Raises:
        StateError: the folder holds no run, or (`finished`) one that has not ended.
    """
    if not (run / "recipe.yaml").exists():
        raise StateError(
            f"{run} holds no run", hint="name a folder that `commonweight run` made; `commonweight runs` lists them"
        )
    if not (run / "metrics.json").exists():
        if finished:
            raise StateError(
                f"the run in {run} has not ended",
                hint=f"go on with it: commonweight run {run}/recipe.yaml -o {run} --resume",
            )
        return {}
    from ..evaluate.report import read_metrics

    return read_metrics(run)


def choose_output(output: Path | None, name: str, *, resume: bool) -> Path:
    """Where a run goes: what was asked for; else runs/<name>, numbered if taken; to resume, the latest of these."""
    if output is not None:
        return output
    taken = [
        path
        for path in (Path("runs") / f"{name}{suffix}" for suffix in ("", *(f"-{k}" for k in range(2, 1000))))
        if path.exists()
    ]
    if resume:
        if not taken:
            raise RecipeError(f"no run called {name} is in runs/", hint="name its folder by -o")
        return taken[-1]
    return Path("runs") / (name if not taken else f"{name}-{len(taken) + 1}")

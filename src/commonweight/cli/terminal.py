"""What commands share: how things are printed, for people and for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from ..errors import EXIT_INTERRUPTED, CommonweightError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe, as `training.lr=1e-3`. Repeatable."),
]
RunArgument = Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")]

_MAX_WIDTH = 100
COMMAND = "    "
#: control characters would move the cursor or break a table's line; text from data and models may hold them
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


@dataclass
class Options:
    """Options given before the command, whether the command was asked for JSON, and where that goes."""

    debug: bool = False
    json: bool = False
    stdout: TextIO | None = None


options = Options()


class Interrupted(CommonweightError):
    """Ctrl-C, as a message."""

    exit_code = EXIT_INTERRUPTED


def begin(json: bool) -> None:
    """Take note of --json: the result alone goes to standard output then, what anything else prints to standard error.

    Libraries print, and so may a method of one's own, in a worker too: workers inherit this.
    """
    options.json = json
    if json and options.stdout is None:
        options.stdout, sys.stdout = sys.stdout, sys.stderr


def end() -> None:
    """Undo `begin`."""
    if options.stdout is not None:
        sys.stdout, options.stdout = options.stdout, None
    options.debug = options.json = False


def hush_libraries() -> None:
    """Keep libraries' warnings off the screen: they speak to programmers, and `--debug` shows them."""
    warnings.simplefilter("ignore")
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")


def fail(error: CommonweightError) -> NoReturn:
    """Print an error, for a program too if it asked for JSON, and exit with its code."""
    if options.debug:
        traceback.print_exception(error)
    if options.json:
        kind = type(error).__name__
        print_json({"error": {"kind": kind, "message": error.message, "hint": error.hint, "retry": error.retry}})
    if isinstance(error, Interrupted):
        _complain(("\n" if sys.stderr.isatty() else "") + error.message)  # the terminal has written ^C
    else:
        _complain(f"error: {error.message}")
    for line in error.hint.splitlines():
        _complain(f"  {line}")
    if error.retry:
        _complain("  Trying again is safe.")
    raise SystemExit(error.exit_code)


def note(text: str) -> None:
    """Tell a person something beside the result: on standard error."""
    _complain(text)


def _complain(text: str) -> None:
    """Print to standard error, wrapped on a terminal; not a command to copy, which is indented further."""
    text = text.translate(_CONTROLS)
    wraps = sys.stderr.isatty() and not text.startswith(COMMAND)
    print(_wrapped(text) if wraps else text, file=sys.stderr)


def print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value), file=options.stdout or sys.stdout, flush=True)


def is_terminal() -> bool:
    return sys.stdout.isatty()


def say(text: str) -> None:
    """Print sentences: wrapped at words on a terminal, as they are elsewhere; control characters made visible."""
    text = text.translate(_CONTROLS)
    print(_wrapped(text) if is_terminal() else text, flush=True)


def _wrapped(text: str) -> str:
    """Lines broken at words, each keeping its indent."""
    width = min(_MAX_WIDTH, shutil.get_terminal_size().columns)
    return "\n".join(
        textwrap.fill(
            line,
            width,
            subsequent_indent=line[: len(line) - len(line.lstrip())],
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print a table: drawn on a terminal, plain aligned columns elsewhere."""
    rows = [[cell.translate(_CONTROLS).replace("\n", " ") for cell in row] for row in rows]
    if is_terminal():
        _draw(columns, rows, right)
        return
    widths = [max(len(row[k]) for row in [columns, *rows]) for k in range(len(columns))]
    for row in [columns, *rows]:
        cells = [c.rjust(w) if k in right else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


def _draw(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console().print(drawn)


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.3f} … {bounds[1]:.3f}" if bounds else "–"

"""Runs' folders: where a new run goes, what an old one holds, what a failed one leaves."""

from __future__ import annotations

import shlex
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import StateError
from .terminal import Interrupted


def choose_output(output: Path | None, name: str, *, resume: bool) -> Path:
    """Where a run goes: what was asked for; else runs/<name>, or the first of runs/<name>-2 … that is free.

    To resume, the latest of these that has not ended; the latest at all if all have.

    Raises:
        StateError: there is none to resume.
    """
    if output is not None:
        return output
    if not resume:
        candidates = (Path("runs") / (name if k == 1 else f"{name}-{k}") for k in count(1))
        return next(path for path in candidates if not path.exists())
    begun = [path for path in _numbered(name) if (path / "state.sqlite").exists()]
    if not begun:
        raise StateError(f"no run called {name} is in runs/", hint="name its folder by -o")
    return next((path for path in reversed(begun) if not (path / "metrics.json").exists()), begun[-1])


def _numbered(name: str) -> list[Path]:
    """runs/<name> and runs/<name>-<number>, in the order of their numbers."""
    found = {1: Path("runs") / name}
    for path in Path("runs").glob("*"):
        stem, _, number = path.name.rpartition("-")
        if stem == name and number.isdecimal() and int(number) > 1:
            found[int(number)] = path
    return [found[number] for number in sorted(found)]


def read_run(run: Path, *, finished: bool = True) -> dict[str, Any]:
    """A run's metrics; with `finished` False, nothing for a run that has not ended.

    Raises:
        StateError: the folder holds no run, or (`finished`) one that has not ended, or its metrics are damaged.
    """
    if not (run / "recipe.yaml").exists():
        raise StateError(
            f"{run} holds no run", hint="name a folder that `commonweight run` made; `commonweight runs` lists them"
        )
    if not (run / "metrics.json").exists():
        if finished:
            raise StateError(f"the run in {run} has not ended", hint=f"go on with it:\n{resume_command(run)}")
        return {}
    from ..evaluate.report import read_metrics

    return read_metrics(run)


def resume_command(run: Path) -> str:
    """What to type to go on with a run, as a line of a hint."""
    return "  " + shlex.join(["commonweight", "run", str(run / "recipe.yaml"), "-o", str(run), "--resume"])


def last_round(run: Path) -> int:
    """The latest round that a run has committed; 0 before the first, or where the journal cannot be read."""
    found = _ask_journal(run, "SELECT max(round) FROM commits")
    return int(found or 0)


@contextmanager
def tidy(run: Path) -> Iterator[None]:
    """Around a new run: one that ends before it has anything to keep (a wrong path, a missing model) leaves nothing.

    So the same command can be repeated once the mistake is mended. Ctrl-C becomes `Interrupted`, with what to type to
    go on.
    """
    existed, free = run.exists(), _is_free(run)
    try:
        yield
    except BaseException as error:
        gone = free and _has_nothing(run)
        if gone:
            _empty(run, and_remove=not existed)
        if isinstance(error, KeyboardInterrupt):
            hint = "nothing was done yet" if gone else f"what was done is kept; go on with:\n{resume_command(run)}"
            raise Interrupted("interrupted", hint=hint, retry=gone) from None
        raise


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """Around what fills a new or an empty folder: if it fails, the folder is as it was before."""
    existed, free = folder.exists(), _is_free(folder)
    try:
        yield
    except BaseException:
        if free:
            _empty(folder, and_remove=not existed)
        raise


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _has_nothing(run: Path) -> bool:
    """Whether no round and no evaluation is in a run's journal."""
    if not (run / "state.sqlite").exists():
        return True
    rows = [_ask_journal(run, f"SELECT count(*) FROM {table}") for table in ("commits", "results")]
    tables: int | None = _ask_journal(run, "SELECT count(*) FROM sqlite_schema WHERE name = 'results'")
    return tables == 0 or rows == [0, 0]


def _ask_journal(run: Path, question: str) -> Any:
    """The journal's answer to a question with one, or None where it cannot be read."""
    try:
        with closing(sqlite3.connect(f"{(run / 'state.sqlite').resolve().as_uri()}?mode=ro", uri=True)) as database:
            return database.execute(question).fetchone()[0]
    except sqlite3.Error:
        return None


def _empty(run: Path, *, and_remove: bool) -> None:
    for entry in run.iterdir() if run.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if and_remove and run.is_dir():
        shutil.rmtree(run, ignore_errors=True)

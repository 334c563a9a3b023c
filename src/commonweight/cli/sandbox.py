"""The command sandbox: a whole federation, as it would be deployed, on this machine."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from ..errors import CommonweightError
from .folders import choose_output
from .jobs import require_free
from .start import QuietOption, RecipeArgument
from .terminal import Interrupted, JsonOption, SetOption, begin, note, options, print_json, say


def sandbox(
    recipe: RecipeArgument,
    sites: Annotated[
        int | None,
        typer.Option("--sites", help="Number of sites.", min=1, metavar="N", show_default="as the recipe's data fall"),
    ] = None,
    set_: SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run's folder. Default: runs/NAME, numbered if taken.", metavar="DIR"),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the folders of coordinator, sites and lead, in .sandbox of the run's.")
    ] = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Carry out a recipe by a whole federation on this machine, over the network.

    A coordinator, a lead and a process for each site: they enrol with one-time tokens and speak mutual TLS over
    the loopback, as they would over the internet. On CPU the adapter is bit-identical to that of `run`.
    """
    begin(json)
    from ..recipe.load import load_recipe
    from ..sandbox import Sandbox, partitioned
    from .progress import NetworkProgress, print_result

    loaded = load_recipe(recipe, set_ or ())
    folder = choose_output(output, loaded.name, resume=False)
    require_free(folder)
    loaded, names, left_out = partitioned(loaded, sites)
    for what in left_out:
        note(what)
    hushed = quiet or options.json
    if not hushed:
        say(f"sites: {', '.join(names.values())}")
    with (
        _signals(),
        _home(folder, keep) as home,
        NetworkProgress(quiet=hushed) as progress,
        Sandbox(home, loaded, names, tell=progress.note) as federation,
    ):
        metrics = federation.carry_out(loaded, folder, progress.listen)
    if options.json:
        print_json({"folder": str(folder), "report": str(folder / "report.html"), **metrics})
        return
    print_result(metrics, folder)
    if keep:
        say(f"kept     {home}")


@contextmanager
def _home(folder: Path, keep: bool) -> Iterator[Path]:
    """Where the federation lives: for as long as the command, unless it is kept or something went wrong."""
    home = folder / ".sandbox" if keep else Path(tempfile.mkdtemp(prefix="commonweight-sandbox-"))
    logs = home / "logs"
    try:
        yield home
    except KeyboardInterrupt:
        raise Interrupted("interrupted", hint=f"everything was stopped; the logs are in {logs}") from None
    except CommonweightError as error:
        if logs.exists() and str(logs) not in error.hint:
            error.hint = "\n".join(filter(None, [error.hint, f"the logs are in {logs}"]))
        raise
    if not keep:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _signals() -> Iterator[None]:
    """Whoever ends this process by SIGTERM, or closes its terminal, ends the federation as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

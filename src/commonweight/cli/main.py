"""The command line: `commonweight COMMAND`. Each command's work is imported when it runs, so that help comes at
once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import EXIT_INTERRUPTED, CommonweightError
from .inspect import methods, report, runs
from .start import demo, init, run, validate
from .terminal import fail, options
from .use import chat, evaluate, export

app = typer.Typer(
    name="commonweight",
    help="Fine-tune one language model across many owners' data without the data leaving its owner.\n\n"
    "Begin with `commonweight demo`, then `commonweight init` for data of your own.",
    epilog="Exit codes: 0 done · 2 recipe or option · 3 data · 4 model · 5 round · 6 run folder · 7 storage · "
    "130 interrupted · 1 anything else.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

for command in (demo, init, validate, run, report, runs, methods, evaluate, chat, export):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"commonweight {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    options.debug = debug


def main() -> None:
    """The console script: runs a command; an error becomes one clear message and its exit code."""
    try:
        app()
    except CommonweightError as error:
        if options.debug:
            raise
        fail(error)
    except KeyboardInterrupt:
        print("\ninterrupted; what was committed is kept: repeat with --resume", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except Exception as error:
        if options.debug:
            raise
        fail(
            CommonweightError(
                f"commonweight failed in a way that it should not: {type(error).__name__}: {error}",
                hint="please report it, with the traceback that `commonweight --debug …` shows",
            )
        )

"""The command line: `commonweight COMMAND`. Each command's work is imported when it runs, so that help comes at
once."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, ParamSpec, cast

import typer

from .. import __version__
from ..errors import CommonweightError, RecipeError, StorageError
from . import coordinator, jobs, relay, site
from .audit import audit
from .inspect import methods, report, runs
from .privacy import ledger, plan
from .sandbox import sandbox
from .start import demo, init, run, validate
from .terminal import Interrupted, end, fail, hush_libraries, options
from .use import chat, evaluate, export

P = ParamSpec("P")

#: wherever this version of typer keeps it
_UsageError = cast(type[Exception], typer.BadParameter.__bases__[0])

_STYLE: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 100},
}

app = typer.Typer(
    name="commonweight",
    help="Fine-tune one language model across many owners' data without the data leaving its owner.\n\n"
    "Begin with `commonweight demo`, then `commonweight init` for data of your own, then `commonweight sandbox` for a "
    "federation over the network.",
    epilog="Exit codes: 0 done, 2 recipe or option, 3 data, 4 model, 5 round, 6 run folder, 7 storage, "
    "8 identity or role, 9 unreachable, 10 a site's policy, 11 an audit that failed, 130 interrupted, 1 anything else.",
    **_STYLE,
)


def _guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose failures all leave it as CommonweightError: typer has ways of its own with some kinds."""

    @wraps(command)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except CommonweightError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise _explained(error) from error

    return call


def _group(name: str, help: str, commands: tuple[Callable[..., None], ...]) -> None:
    """Commands behind a word of their own: `commonweight site run`."""
    group = typer.Typer(name=name, help=help, **_STYLE)

    @group.callback(invoke_without_command=True)
    def _help(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    for command in commands:
        group.command()(_guarded(command))
    app.add_typer(group)


for command in (demo, init, validate, plan, run, report, runs, ledger, audit, methods, evaluate, chat, export, sandbox):
    app.command()(_guarded(command))
_group("coordinator", "Run a federation's coordinator.", coordinator.COMMANDS)
_group("site", "Take part in a federation as a site, with data that stay where they are.", site.COMMANDS)
_group("relay", "Add up the updates of a region's sites, and pass on the sum.", relay.COMMANDS)
for name, job_command in jobs.COMMANDS.items():
    app.command(name)(_guarded(job_command))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"commonweight {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show an error's traceback and libraries' warnings. Goes before COMMAND.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    options.debug = debug
    if not debug:
        hush_libraries()


def main() -> None:
    """The console script: runs a command; an error becomes one clear message and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="commonweight", standalone_mode=False)
    except CommonweightError as error:
        fail(error)
    except _UsageError as error:
        options.json = "--json" in sys.argv
        fail(_usage(error))
    finally:
        end()
    if code:
        raise SystemExit(code)


def _explained(error: BaseException) -> CommonweightError:
    """What went wrong, for people, when it was not said by those who know more."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted")
    if isinstance(error, BrokenPipeError) and _stdout_is_gone():
        raise SystemExit(1) from None
    if isinstance(error, OSError) and error.filename is not None:
        return StorageError(
            f"{error.filename}: {error.strerror or error}", hint="check that it exists, and that you may use it"
        )
    return CommonweightError(
        f"commonweight failed in a way that it should not: {type(error).__name__}: {error}",
        hint="please report it, with the traceback that `commonweight --debug …` shows",
    )


def _stdout_is_gone() -> bool:
    """Whether whoever read standard output has stopped reading; if so, nothing more is sent there."""
    descriptor, poll = (options.stdout or sys.stdout).fileno(), select.poll()
    poll.register(descriptor, 0)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return gone


def _usage(error: Any) -> RecipeError:
    """A wrong option or argument, said as other errors are."""
    message = error.format_message().rstrip(".")
    where = error.ctx.command_path if error.ctx else "commonweight"
    hint = f"`{where} --help` lists what it takes"
    if "No such option: --debug" in message:
        hint = "--debug goes before the command: commonweight --debug COMMAND …"
    return RecipeError(message[:1].lower() + message[1:], hint=hint)

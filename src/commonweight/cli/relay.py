"""Commands for whoever runs a relay: relay join, run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import AccessError
from .network import TokenArgument, check_joiner, enrol_into, read_token
from .site import alone
from .start import QuietOption
from .terminal import JsonOption, begin, print_json, say

RelayArgument = Annotated[Path, typer.Argument(help="The relay's folder.", metavar="DIR")]


def join(
    token: TokenArgument,
    directory: Annotated[Path, typer.Argument(help="Folder to make for this relay.", metavar="DIR")],
    reached_at: Annotated[
        str, typer.Option("--reached-at", help="Where its region's sites reach it.", metavar="HOST:PORT")
    ],
    listen: Annotated[
        str, typer.Option("--listen", help="Where it serves them.", metavar="HOST:PORT")
    ] = "0.0.0.0:8445",
    json: JsonOption = False,
) -> None:
    """Join a federation as a relay by a one-time token, and write its settings.

    In a folder that has joined before, a new token replaces the certificate, and the settings stay.
    """
    begin(json)
    from ..identity.tokens import Token
    from ..relay.settings import SETTINGS_FILE, load_settings, write_settings

    text = read_token(token)
    meant = Token.from_text(text)
    check_joiner(meant, role="relay")
    again = (directory / SETTINGS_FILE).exists()
    if again and (named := load_settings(directory).name) != meant.name:
        raise AccessError(
            f"{directory} is the folder of relay {named}, and the token is for {meant.name}",
            hint="choose another folder",
        )
    if not again:  # before the token is used up
        write_settings(directory, meant.name, meant.address, listen, reached_at)
    try:
        identity = enrol_into(text, meant.name, directory / "identity")
    except BaseException:
        if not again:
            (directory / SETTINGS_FILE).unlink(missing_ok=True)
        raise
    if json:
        print_json({"folder": str(directory), "relay": meant.name, "coordinator": identity.address})
        return
    say(f"joined {identity.address} as relay {meant.name}; its keys are in {directory / 'identity'}")
    say("next:")
    say(f"  commonweight relay run {directory}")
    say(f"  name it in a recipe: federation.relays: {{{meant.name}: [SITE, …]}}; its sites list it in policy.yaml")


def run(directory: RelayArgument, quiet: QuietOption = False) -> None:
    """Serve a region's sites and attend at the coordinator, until SIGTERM or Ctrl-C.

    Events go to standard error, and in full to log.jsonl in the relay's folder.
    """
    import asyncio

    from ..identity.folder import IdentityFolder
    from ..relay.agent import RelayAgent
    from ..relay.settings import load_settings
    from ..site.log import SiteLog
    from ..wire.buffers import bound_memory

    bound_memory()
    settings = load_settings(directory)
    with alone(directory, "relay"):
        identity = IdentityFolder.open(directory / "identity")
        if (identity.holder.name, identity.holder.role) != (settings.name, "relay"):
            raise AccessError(
                f"relay.yaml is of relay {settings.name}, but the identity beside it is of "
                f"{identity.holder.role} {identity.holder.name}",
                hint="correct name in relay.yaml",
            )
        log = SiteLog(directory / "log.jsonl", quiet=quiet)

        async def serve() -> None:
            await RelayAgent(settings, identity, directory, log).run(signals=True)

        try:
            asyncio.run(serve())
        finally:
            log.close()


#: in the order of the help
COMMANDS = (join, run)

"""A relay's settings, `relay.yaml`: which coordinator it dials, and where its region's sites reach it."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field, field_validator

from ..coordinator.settings import port_of
from ..errors import StateError
from ..federation.folder import write_text
from ..recipe.schema import Section
from ..registry import BUILT_IN
from ..site.settings import ADDRESS, NAME, parse_section, read_section

SETTINGS_FILE = "relay.yaml"


class RelaySettings(Section):
    """One relay."""

    name: str = Field(pattern=NAME, description="The relay's name, as it was enrolled.")
    address: str = Field(pattern=ADDRESS, description="The coordinator's host:port, to which this relay dials out.")
    listen: str = Field(description="Where it serves its region's sites, as 0.0.0.0:8445; port 0: any that is free.")
    reached_at: str = Field(
        description="Where those sites reach it: host:port. The coordinator tells them. Port 0: the one of `listen`."
    )
    strategies: list[str] = Field(
        default_factory=lambda: [BUILT_IN],
        description="Strategies whose sums it makes: `built-in`, and exact names of others, whose code then runs here.",
    )
    max_upload_mb: int = Field(65536, ge=1, description="Cap on an update, in MiB.")

    @field_validator("listen", "reached_at")
    @classmethod
    def _is_address(cls, value: str) -> str:
        port_of(value)
        return value


def load_settings(folder: Path) -> RelaySettings:
    """Read a relay's settings.

    Raises:
        StateError: the folder is no relay's.
        RecipeError: a key is wrong: named, with its line.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        raise StateError(
            f"{folder} is no relay's folder: {SETTINGS_FILE} is missing",
            hint="a token makes one: commonweight relay join TOKEN DIR",
        )
    return read_section(RelaySettings, path)


def write_settings(folder: Path, name: str, address: str, listen: str, reached_at: str) -> None:
    """Write a commented `relay.yaml`.

    Raises:
        RecipeError: a value is wrong.
        StorageError: it cannot be written.
    """
    values = {"name": name, "address": address, "listen": listen, "reached_at": reached_at}
    text = _RELAY.format(**{key: json.dumps(value) for key, value in values.items()})
    parse_section(RelaySettings, text.encode(), folder / SETTINGS_FILE)
    write_text(folder / SETTINGS_FILE, text)


_RELAY = """\
# This relay's settings. Which sites it serves, a run's recipe says (federation.relays), and each site's own policy.
name: {name}
address: {address}                      # the coordinator's
listen: {listen}                        # where it serves its region's sites
reached_at: {reached_at}                # where they reach it
strategies: [built-in]                  # whose sums it makes
max_upload_mb: 65536
"""

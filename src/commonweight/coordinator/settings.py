"""coordinator.yaml: where a coordinator listens, where its state lies, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import RecipeError, StateError
from ..privacy.spending import Budget
from ..registry import BUILT_IN

FILE = "coordinator.yaml"


def port_of(address: str, what: str = "address") -> int:
    """The port of `host:port` or `[IPv6]:port`; 0 where any free one will do.

    Raises:
        ValueError: it is no address.
    """
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (":" in bare and bare == host) or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{what} {address!r} is not host:port, as 0.0.0.0:8443 or [::]:8443")
    return int(port)


def _address(value: str) -> str:
    port_of(value)
    return value


Address = Annotated[str, AfterValidator(_address)]


class CoordinatorSettings(BaseModel):
    """The settings of one coordinator; its replicas share all but where they listen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("coordinator", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="Named in logs.")
    listen: Address = Field("0.0.0.0:8443", description="host:port of the services for sites and users (mutual TLS).")
    listen_enrolment: Address = Field(
        "0.0.0.0:8444", description="host:port of enrolment (TLS; a one-time token instead of a client certificate)."
    )
    listen_http: Address = Field("127.0.0.1:8480", description="host:port of /metrics and /healthz (plain HTTP).")
    address: Address = Field(
        "127.0.0.1:8443", description="host:port at which sites reach the services; in every token."
    )
    address_enrolment: Address = Field("127.0.0.1:8444", description="host:port at which enrolment is reached.")
    database: str = Field("sqlite", description="`sqlite` (state.sqlite in this folder), or postgresql://…")
    blobs: str = Field(
        "blobs", description="A folder, relative to this one, or an fsspec URL such as s3://bucket/prefix."
    )
    blob_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the blob store (endpoint_url, key …)."
    )
    heartbeat_s: float = Field(
        2.0, gt=0.05, le=60, description="A site gives a sign of life this often; three missed: it is away."
    )
    lease_s: float = Field(
        10.0, ge=1, le=600, description="A replica that says nothing for this long stops leading its runs."
    )
    certificate_hours: float = Field(
        336.0,
        gt=0,
        le=24 * 366,
        description="Life of a site's or user's certificate. It renews itself while it is used; who is away for longer "
        "needs a new token.",
    )
    token_hours: float = Field(72.0, gt=0, le=24 * 30, description="Life of an enrolment token.")
    strategies: list[str] = Field(
        default_factory=lambda: [BUILT_IN],
        description="Strategies that runs may name: `built-in`, and exact names of others (package.module:Class), "
        "whose code then runs here.",
    )
    max_upload_mb: int = Field(65536, ge=1, description="Cap on an update, in MiB.")
    privacy_budget: Budget | None = Field(
        None,
        description="What all runs together may cost each site: `{unit: site, epsilon: 8, delta: 1e-5}`. A round that "
        "would cost more is not released, and its run fails; a run without differential privacy costs ∞. Null: no "
        "bound.",
    )
    transfers_at_once: int = Field(
        4, ge=1, le=256, description="Chunks in motion at once; bounds memory. A slow site does not hold others up."
    )

    def database_url(self, folder: Path) -> str:
        return f"sqlite:///{folder.resolve() / 'state.sqlite'}" if self.database == "sqlite" else self.database

    def blobs_url(self, folder: Path) -> str:
        return self.blobs if "://" in self.blobs else str(folder.resolve() / self.blobs)


def load_settings(folder: Path) -> CoordinatorSettings:
    """Read a coordinator's settings.

    Raises:
        StateError: the folder is no coordinator's.
        RecipeError: the file is no YAML, or a key or value is wrong; each is named.
    """
    path = folder / FILE
    if not path.exists():
        raise StateError(
            f"{folder} holds no coordinator: {FILE} is missing",
            hint=f"make one by: commonweight coordinator init {folder}",
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    return checked_settings(values, str(path))


def checked_settings(values: Mapping[str, Any], where: str) -> CoordinatorSettings:
    """Settings from plain values, which `where` holds.

    Raises:
        RecipeError: a key or value is wrong; each is named.
    """
    try:
        return CoordinatorSettings.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {_said(e['msg'])}" for e in error.errors())
        raise RecipeError(f"{where}: {faults}", hint="docs/coordinator.md lists the settings") from error


def _said(message: str) -> str:
    return message.removeprefix("Value error, ")


def settings_text(settings: CoordinatorSettings) -> str:
    """The settings as commented YAML, every one of them."""
    lines = []
    for name, field in CoordinatorSettings.model_fields.items():
        lines.append(f"# {field.description}")
        value = settings.model_dump(include={name})
        lines.append(yaml.safe_dump(value, default_flow_style=False).strip())
        lines.append("")
    return "\n".join(lines)

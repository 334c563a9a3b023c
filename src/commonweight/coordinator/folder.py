"""A coordinator's folder: made once, by `coordinator init`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives import hashes

from ..errors import RecipeError, StateError
from ..federation.folder import storage_errors, write_text
from ..identity.authority import Authority
from ..identity.certificates import holder_of, load_certificate, load_tls_key, new_request, new_tls_key, save_tls_key
from ..identity.keys import SigningKey, present
from ..identity.tokens import Token
from .settings import FILE, CoordinatorSettings, load_settings, port_of, settings_text
from .store import Store
from .vault import Vault

#: the coordinator's own certificate; renewed at every start
_SERVER_HOURS = 24.0 * 90


def init(folder: Path, settings: CoordinatorSettings, hosts: Sequence[str]) -> None:
    """Make a coordinator: its authority, keys, settings and database.

    Args:
        hosts: names and addresses at which it is reached.

    Raises:
        StateError: the folder is one already, or is not empty.
        AccessError: a host is no name and no address.
        StorageError: it cannot be written, or the database cannot be reached.
    """
    if (folder / FILE).exists():
        raise StateError(f"{folder} is a coordinator's already", hint="serve it by: commonweight coordinator serve DIR")
    if folder.is_dir() and any(folder.iterdir()):
        raise StateError(f"{folder} is not empty", hint="name a new folder")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    try:
        _fill(folder, settings, hosts)
    except BaseException:  # nothing of it is of use, and a second attempt wants the folder empty
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(folder: Path, settings: CoordinatorSettings, hosts: Sequence[str]) -> None:
    with storage_errors(folder):
        (folder / "scratch").mkdir()
        (folder / "server").mkdir()
    Authority.create(folder / "authority", name=settings.name)
    SigningKey.generate().save(folder / "server" / "signing.key")
    Vault.create(folder / "master.key")
    renew_server_certificate(folder, settings, hosts)
    write_text(folder / "server" / "hosts", "\n".join(hosts) + "\n")
    Store(settings.database_url(folder)).close()
    write_text(folder / FILE, settings_text(settings))  # last: with it the folder is a coordinator's


def renew_server_certificate(folder: Path, settings: CoordinatorSettings, hosts: Sequence[str]) -> None:
    """A new certificate for the coordinator's own end of TLS. The key stays, so that the two always fit together."""
    authority = Authority.load(folder / "authority")
    if not present(folder / "server" / "tls.key"):
        save_tls_key(new_tls_key(), folder / "server" / "tls.key")
    key = load_tls_key(folder / "server" / "tls.key")
    certificate = authority.issue(
        new_request(key),
        name=settings.name,
        role="coordinator",
        signing_key=SigningKey.load(folder / "server" / "signing.key").public,
        hours=_SERVER_HOURS,
        hosts=hosts,
    )
    write_text(folder / "server" / "tls.pem", certificate.decode())


def hosts_of(folder: Path) -> list[str]:
    path = folder / "server" / "hosts"
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def enroll(
    folder: Path, name: str, role: str, *, replace: bool = False, hours: float | None = None, by: str = "local"
) -> Token:
    """A one-time token for a site or a user.

    Args:
        replace: it may take over a name that is enrolled already (a lost key).
        hours: its life; by default the settings'.

    Raises:
        StateError: the folder is no coordinator's.
        RecipeError: as `load_settings`; or the coordinator has no port yet at which it could be reached.
        AccessError: the name or the role is none.
    """
    settings = load_settings(folder)
    for address in (settings.address, settings.address_enrolment):
        if port_of(address) == 0:
            raise RecipeError(
                f"address and address_enrolment in {folder / FILE} have no port yet: {address}",
                hint="set them to the ports that `coordinator serve` has opened, so that tokens can name them",
            )
    authority = Authority.load(folder / "authority")
    token = Token.make(
        name=name,
        role=role,
        address=settings.address,
        enrolment=settings.address_enrolment,
        authority_pem=authority.certificate_pem,
        hours=settings.token_hours if hours is None else hours,
    )
    store = Store(settings.database_url(folder))
    try:
        store.add_token(token.secret_hash, name, role, token.expires_at, by, replace=replace)
    finally:
        store.close()
    return token


def fingerprint(folder: Path) -> str:
    """SHA-256 of the authority's certificate: what two people read to each other on the telephone."""
    certificate = load_certificate(Authority.load(folder / "authority").certificate_pem)
    return certificate.fingerprint(hashes.SHA256()).hex()


def certificate_ends(folder: Path) -> float:
    """When the coordinator's own certificate ends, in seconds since the epoch."""
    return holder_of((folder / "server" / "tls.pem").read_bytes()).not_after

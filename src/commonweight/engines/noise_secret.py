"""The secret of which a site's noise and draws are made, where its examples are private, or sites add the noise.

It lies in a file of its own beside the site's work, drawn from the system's randomness before anything is trained, and
is deleted when the run has ended. It tells no more than the rows that lie beside it. From it every task gets a key of
its own, made of all that its work starts from: done again after a kill, the task gives the same bits; started from
anything else, it has other noise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SiteError, StateError
from ..federation.folder import write_json
from ..identity.keys import write_private
from ..privacy.noise import KEY_BYTES, derived, new_key

SECRET_FILE, SPENT_FILE = "noise.key", "noise-spent.json"


@dataclass(frozen=True)
class NoiseSecret:
    """Gives tasks their keys.

    Args:
        folder: where the secret lies.
        most: steps that the run may take at this site, in all tasks that differ; None: not counted here.
    """

    folder: Path
    most: int | None = None

    def make(self) -> None:
        """Draw the secret, unless it is there: from then on keys can be had.

        Raises:
            StorageError: it cannot be written.
        """
        if not self._path.exists():
            write_private(self._path, new_key())

    def key(self, task: str, steps: int = 0) -> bytes:
        """A task's key; its steps are counted, once, before this returns.

        Args:
            task: says all that its work starts from, or that the noise is for.

        Raises:
            SiteError: the run would take more steps here than its privacy was planned for.
            StateError: the secret is missing or damaged.
        """
        try:
            secret = self._path.read_bytes()
        except OSError as error:
            raise StateError(
                f"{self._path} cannot be read: {error.strerror}",
                hint="without it work under way cannot be gone on with: begin a new run",
            ) from error
        if len(secret) != KEY_BYTES:
            raise StateError(f"{self._path} is damaged", hint="begin a new run")
        key = derived(secret, task)
        if self.most is not None:
            self._count(key, steps, self.most)
        return key

    def _count(self, key: bytes, steps: int, most: int) -> None:
        path, name = self.folder / SPENT_FILE, derived(key, "name").hex()
        spent = _read(path)
        if name in spent:
            return
        before = sum(spent.values())
        if before + steps > most:
            raise SiteError(
                f"the privacy of this site's examples was planned for {most} steps in the whole run; {before} are "
                f"spent, and the task asks for {steps} more",
                hint="nothing was released; the site has no part in further rounds of this run",
            )
        write_json(path, {**spent, name: steps})

    def delete(self) -> None:
        """The run has ended: its noise can never be made again."""
        self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self.folder / SECRET_FILE


def _read(path: Path) -> dict[str, int]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): int(steps) for name, steps in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StateError(
            f"{path} is damaged: {error}", hint="what was spent is not known: leave this run, and begin a new one"
        ) from error

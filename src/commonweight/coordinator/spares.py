"""Files that are done with and may be written over: a new file must find and clear its pages, an old one has them.

Where a host lends memory page by page, writing over an old file takes a thirtieth of the time of writing a new one.
Spares never leave their run, nor their kind (`frames`, `updates`): whoever still reads a file that is written over
reads something that was meant for the same eyes, and finds its digest wrong. An update's spare is ciphertext whose key
is gone.
"""

from __future__ import annotations

import shutil
import threading
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

#: more of a kind than this are deleted: cohorts differ from round to round
_MOST = 256


class Spares:
    """The spare files of all runs, below one folder. What an earlier process left there is deleted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._free: dict[tuple[str, str], list[Path]] = {}
        self._lock = threading.Lock()
        shutil.rmtree(folder, ignore_errors=True)

    def place(self, run: str, kind: str) -> Path:
        """A path to which a file may be moved before it is given."""
        folder = self.folder / run / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / uuid4().hex

    def give(self, run: str, kind: str, path: Path) -> None:
        """A file at a `place` is spare from now on."""
        with self._lock:
            free = self._free.setdefault((run, kind), [])
            if len(free) < _MOST:
                free.append(path)
                return
        path.unlink(missing_ok=True)

    def take(self, run: str, kind: str, path: Path) -> bool:
        """Move a spare to `path`, if there is one. Its content is whatever it was."""
        with self._lock:
            free = self._free.get((run, kind))
            spare = free.pop() if free else None
        if spare is None:
            return False
        with suppress(OSError):
            spare.replace(path)
            return True
        return False

    def forget(self, run: str) -> None:
        """Delete a run's spares."""
        with self._lock:
            for key in [key for key in self._free if key[0] == run]:
                del self._free[key]
        shutil.rmtree(self.folder / run, ignore_errors=True)

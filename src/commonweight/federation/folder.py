"""A run's folder: where each thing lies, and writes that a crash cannot leave half done.

recipe.yaml  events.jsonl  state.sqlite  metrics.json  report.html
state/NNNN.safetensors      the strategy's state after round NNNN: global tensors and optimizer slots
rounds/NNNN/                the global adapter after round NNNN, as peft saves it
updates/NNNN-III.safetensors   accepted updates of the open round that were dear enough to keep
residuals/NNNN.safetensors  what round NNNN added to the frozen base, of strategies that do so (residuals.py)
sites/III/NNNN.safetensors  a site's private state after round NNNN (III: the site's place in the run's order)
controls/<arm>/III/         tensors of the control arms
noise.key                   the secret of sites' noise, where their examples are private; deleted at the end
personal/III/               a site's own model, written when somebody asks for it
adapter/                    the result
canaries.json               made-up rows and whether each was planted, if the recipe asks for them
audit.json                  what `commonweight audit` found
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import StateError, StorageError
from ..model.tensors import Layout, NamedTensors, accumulator_dtype

#: a worker forked just before its parent was killed holds the lock until it first runs and finds itself orphaned
_LOCK_WAIT_S = 2.0
_FOLDERS = ("state", "rounds", "updates", "sites", "controls")
#: what to do about a file of a run's folder that is not as it was written
DAMAGED = "restore the folder from a copy, or start a new run in another folder (-o)"


class RunFolder:
    """One run's folder, locked while it is open.

    Args:
        path: the folder; made if it does not exist.
        resume: go on with the run that is in it.

    Raises:
        StateError: it holds a run and `resume` is False, it holds none and `resume` is True, or another process has it.
        StorageError: it cannot be made or written.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        begun = (path / "state.sqlite").exists()
        if begun and not resume:
            raise StateError(
                f"{path} already holds a run", hint="go on with it by --resume, or choose another folder by -o"
            )
        if resume and not begun:
            raise StateError(f"there is no run to resume in {path}", hint="start it without --resume, or correct -o")
        if not begun and path.is_dir() and not _is_free(path):
            raise StateError(f"{path} is not empty and holds no run", hint="choose another folder by -o")
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            for name in _FOLDERS:
                (path / name).mkdir(exist_ok=True)
        register_after_fork(self, RunFolder.close)  # a worker that outlives this process must not hold its lock

    def _locked(self) -> IO[str]:
        handle = (self.path / ".lock").open("w")
        ends = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > ends:
                    raise StateError(
                        f"another process is running in {self.path}",
                        hint="wait for it, or stop it, or choose another folder by -o",
                    ) from error
                time.sleep(0.02)
        return handle

    def check_journal(self, commits: Mapping[int, Any]) -> None:
        """Refuse to begin anew over rounds that the journal has lost.

        Raises:
            StateError: there are rounds' adapters here, and the journal knows of no commit.
        """
        if not commits and any((self.path / "rounds").iterdir()):
            raise StateError(
                f"the journal {self.path / 'state.sqlite'} is empty, but there are rounds in {self.path / 'rounds'}",
                hint="restore the journal from a copy, or start a new run in another folder (-o)",
            )

    def close(self) -> None:
        self._lock.close()

    def state_file(self, round: int) -> Path:
        return self.path / "state" / f"{round:04d}.safetensors"

    def round_folder(self, round: int) -> Path:
        return self.path / "rounds" / f"{round:04d}"

    def update_file(self, round: int, site: int) -> Path:
        return self.path / "updates" / f"{round:04d}-{site:03d}.safetensors"

    def site_file(self, site: int, round: int) -> str:
        return site_file(site, round)

    def forget_before(self, round: int, keep_rounds: str | int) -> None:
        """Delete what the commit of `round` has made rubbish: other states, updates kept for it, adapters beyond
        `keep_rounds`. Updates kept for the open round stay."""
        for file in (self.path / "state").iterdir():
            if file != self.state_file(round):
                file.unlink(missing_ok=True)
        for file in up_to_round(self.path / "updates", round):
            file.unlink(missing_ok=True)
        if keep_rounds != "all":
            for folder in up_to_round(self.path / "rounds", round)[: -int(keep_rounds)]:
                shutil.rmtree(folder, ignore_errors=True)


def site_file(site: int, round: int) -> str:
    """A site's private state after a round, relative to the run's folder."""
    return f"sites/{site:03d}/{round:04d}.safetensors"


def up_to_round(folder: Path, round: int) -> list[Path]:
    """What lies in a folder under the names of rounds up to this one, half-written files too, in order."""
    numbers = {path: re.match(r"\.?(\d+)", path.name) for path in folder.glob("*")}
    return sorted(path for path, number in numbers.items() if number and int(number[1]) <= round)


def _is_free(path: Path) -> bool:
    """Whether a folder has nothing in it but what a run that was killed at its very start leaves."""
    return all(
        entry.name in (".lock", "events.jsonl") or (entry.name in _FOLDERS and not any(entry.iterdir()))
        for entry in path.iterdir()
    )


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as refused:
        error = refused if isinstance(refused, OSError) else _as_os_error(refused)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(
            f"cannot write in {path}: {'the disk is full' if full else error.strerror or error}",
            hint="free some space, then repeat with --resume: nothing committed is lost"
            if full
            else "check that the folder exists and that you may write there, or choose another by -o",
            retry=full,
        ) from refused


def _as_os_error(error: SafetensorError) -> OSError:
    """safetensors reports the operating system's errors as its own kind."""
    return OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes `path`'s place, whole and on disk, when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_tensors(path: Path, groups: Mapping[str, NamedTensors], metadata: Mapping[str, str] | None = None) -> str:
    """Write named tensors, group by group, as flats in one safetensors file; returns the file's SHA-256."""
    flats = {
        f"{group}/{name}": tensors.flats[dtype].detach().cpu().contiguous()
        for group, tensors in groups.items()
        for name, dtype in _dtypes(tensors.layout).items()
    }
    return save_tensors(path, flats, metadata)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write contiguous tensors under any names as a safetensors file; returns the file's SHA-256.

    Args:
        metadata: one entry at most: safetensors writes several in any order, and the digest would be any too.
    """
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(metadata or {}))
        return sha256_of(temporary)


def read_tensors(
    path: Path, layout: Layout, *, sha256: str | None = None, others: Mapping[str, Layout] | None = None
) -> dict[str, NamedTensors]:
    """Read what `write_tensors` wrote: groups of one layout, those called `slot/…` wide (`NamedTensors.zeros`).

    Args:
        others: groups that have another layout, if they are there.

    Raises:
        StateError: the file is missing, changed since (`sha256`), or of another layout.
    """
    raw = load_tensors(path, sha256=sha256)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, flat in raw.items():
        group, _, dtype = key.rpartition("/")
        groups.setdefault(group, {})[dtype] = flat
    found = {}
    for group, flats in groups.items():
        of = (others or {}).get(group, layout)
        wide = group.startswith("slot/")
        held = {name: (of.numels[d], accumulator_dtype(d) if wide else d) for name, d in _dtypes(of).items()}
        if {name: (flat.numel(), flat.dtype) for name, flat in flats.items()} != held:
            raise StateError(f"{path} does not fit this model's trainable tensors ({group})", hint=DAMAGED)
        found[group] = NamedTensors(of, {dtype: flats[name] for name, dtype in _dtypes(of).items()})
    return found


def load_tensors(path: Path, *, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Read what `save_tensors` wrote.

    Raises:
        StateError: the file is missing, or changed since (`sha256`).
    """
    if not path.exists():
        raise StateError(f"{path} is missing", hint=DAMAGED)
    if sha256 is not None and sha256_of(path) != sha256:
        raise StateError(f"{path} is damaged: its digest is not the one in the journal", hint=DAMAGED)
    try:
        loaded: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} is damaged: {error}", hint=DAMAGED) from error
    return loaded


def _dtypes(layout: Layout) -> dict[str, torch.dtype]:
    return {str(dtype).removeprefix("torch."): dtype for dtype in layout.numels}


def sha256_of(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

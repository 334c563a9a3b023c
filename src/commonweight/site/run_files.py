"""What a site's workshop keeps of a run, in the site's own folder. Nothing that a coordinator says becomes a path.

runs/<run>/joined.json                what was joined, so that a restarted site opens it again by itself
runs/<run>/checkpoint.safetensors     the training task under way
runs/<run>/own.safetensors            the same, of this site's own model (Ditto)
runs/<run>/state/NNNN.safetensors     this site's private state after round NNNN (SCAFFOLD's cᵢ, Ditto's vᵢ)
runs/<run>/controls/<digest>/         the local control arm
runs/<run>/noise.key                  the secret of this site's noise, where its examples are private
runs/<run>/noise-spent.json           steps that such noise was spent on; it stays when the run has ended
runs/<run>/personal/                  the model that this site uses, as an adapter; it stays when the run has ended
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from ..engines.noise_secret import SECRET_FILE
from ..errors import SiteError, StateError
from ..federation.folder import read_tensors, replacing, storage_errors, write_json, write_tensors
from ..federation.messages import ChainTask, TrainTask
from ..model.tensors import Layout, NamedTensors

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ROUND_FILE = re.compile(r"(?:.*/)?(\d{1,9})\.safetensors")
_NEW, _OLD = ".personal.new", ".personal.old"
_NAMES = (SECRET_FILE, "joined.json", "checkpoint.safetensors", "own.safetensors", "state", "controls", _NEW, _OLD)


class JobLike(Protocol):
    """What the workshop reads of a job (`wire/protocol.proto`)."""

    @property
    def id(self) -> str: ...
    @property
    def recipe(self) -> str: ...
    @property
    def purpose(self) -> str: ...
    @property
    def must_match(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Joined:
    """What a run was joined with: the job's words, and the digest of the site's rows."""

    id: str
    recipe: str
    purpose: str
    must_match: Mapping[str, str]
    data: str

    @classmethod
    def of(cls, job: JobLike, data: str) -> Joined:
        return cls(job.id, job.recipe, job.purpose, dict(job.must_match), data)


class RunFiles:
    """One run's files. Nothing is made before there is something to write.

    Args:
        folder: the site's folder.

    Raises:
        SiteError: the run's id is none; see `is_run_id`.
    """

    def __init__(self, folder: Path, run: str) -> None:
        if not is_run_id(run):
            raise SiteError(f"{run[:80]!r} is no run's id", hint="an id has letters, digits, `.`, `_` and `-` only")
        self.run, self.folder = run, folder / "runs" / run
        self.checkpoint = self.folder / "checkpoint.safetensors"
        self.own_checkpoint = self.folder / "own.safetensors"
        self.personal = self.folder / "personal"

    def joined(self) -> Joined | None:
        """What the run was joined with, or None.

        Raises:
            StateError: the file is damaged.
        """
        path = self.folder / "joined.json"
        try:
            return Joined(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise StateError(f"{path} is damaged: {error}", hint="delete it, and the run is joined again") from error

    def note(self, joined: Joined) -> None:
        write_json(self.folder / "joined.json", asdict(joined))

    def private_state(
        self, task: TrainTask, layout: Layout, others: Mapping[str, Layout] | None = None
    ) -> dict[str, NamedTensors]:
        """The private state that a task starts from; earlier ones are then deleted, as no task will name them again.

        Args:
            others: as in `read_tensors`.

        Raises:
            SiteError: it is missing, or the task names rounds that make no sense.
            StateError: it is damaged.
        """
        before, after = _round_of(task.state_in), _round_of(task.state_out)
        if after not in (None, task.round) or (before is not None and before >= task.round):
            raise SiteError(f"round {task.round}'s task names private state of the rounds {before} and {after}")
        state = self.state_in(task.state_in, layout, others)
        for file in (self.folder / "state").glob("*.safetensors"):
            if before is not None and file.stem.isdigit() and int(file.stem) < before:
                file.unlink(missing_ok=True)
        return state

    def state_in(
        self, name: str | None, layout: Layout, others: Mapping[str, Layout] | None = None
    ) -> dict[str, NamedTensors]:
        """The private state that a task names, of which the round alone counts; empty if it names none.

        Raises:
            SiteError: it is missing, or names no round.
            StateError: it is damaged.
        """
        before = _round_of(name)
        if before is None:
            return {}
        path = self._state(before)
        if not path.exists():
            raise SiteError(
                f"this site's private state after round {before} of run {self.run} is missing",
                hint="put the site's folder back as it was; without it the site cannot go on in this run",
            )
        return read_tensors(path, layout, others=others)

    def keep_private_state(self, task: TrainTask, state: Mapping[str, NamedTensors]) -> None:
        """Write the state that a task leaves, if its strategy has any."""
        if task.state_out is not None:
            write_tensors(self._state(task.round), state)

    def _state(self, round: int) -> Path:
        return self.folder / "state" / f"{round:04d}.safetensors"

    @contextmanager
    def keeping_personal(self) -> Iterator[Path]:
        """A folder to write this site's model into, which takes the place of the one before when the block ends
        well."""
        new, old = self.folder / _NEW, self.folder / _OLD
        shutil.rmtree(new, ignore_errors=True)
        yield new
        shutil.rmtree(old, ignore_errors=True)
        with storage_errors(self.personal):
            if self.personal.exists():
                self.personal.rename(old)
            new.rename(self.personal)
        shutil.rmtree(old, ignore_errors=True)

    def control_folder(self, task: ChainTask) -> str:
        """Where a control arm's tensors are kept, relative to the folder: the same for the same task only."""
        return f"controls/{hashlib.sha256(json.dumps(asdict(task), sort_keys=True).encode()).hexdigest()[:16]}"

    def sweep(self) -> None:
        """Delete all of them but the site's own model."""
        for path in (self.folder / name for name in _NAMES):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):  # it is not there, or somebody else keeps something in it
            self.folder.rmdir()


def is_run_id(run: str) -> bool:
    return _RUN.fullmatch(run) is not None


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes for `train/checkpoint.py`: whole, or not at all."""
    flats: dict[str, Any] = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(flats, temporary, metadata=dict(metadata))


def _round_of(name: str | None) -> int | None:
    """The round in the name of a file of private state; nothing else of the name counts."""
    if name is None:
        return None
    found = _ROUND_FILE.fullmatch(name)
    if not found:
        raise SiteError(f"the task names private state {name[:80]!r}, which tells no round")
    return int(found[1])

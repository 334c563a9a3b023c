"""A site's local work: what a task asks for, done with the site's own rows. No networking, and no policy."""

from __future__ import annotations

import gc
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ..codec.coded import CODED, Packer
from ..data.names import listed
from ..data.partition_report import data_digest
from ..data.sites import Site, load_sites
from ..engines.bench import Bench, build_bench
from ..engines.handshake import check_handshake, handshake
from ..engines.noise_secret import NoiseSecret
from ..engines.work import TaskWork, unseen
from ..errors import CommonweightError, DataError, SiteError, StateError, StorageError
from ..federation.messages import ChainTask, EvaluateTask, SampleTask, TrainTask
from ..model.clusters import channel_of
from ..model.tensors import Layout, NamedTensors, Room, first_non_finite, in_memory
from ..recipe.problems import validate
from ..recipe.schema import DataSpec, Recipe, SitesSpec
from ..recipe.source import read_source
from ..train.checkpoint import FileCheckpoint
from ..train.local import Cancelled, never
from ..train.start import FROM_THETA, candidates
from .run_files import JobLike, Joined, RunFiles, is_run_id, write_checkpoint
from .settings import SiteSettings

__all__ = ["Cancelled", "RecipeWorkshop", "Work", "Workshop", "reason_for_others"]

V = TypeVar("V")
Channels = Mapping[str, NamedTensors]
Answerable = EvaluateTask | SampleTask | ChainTask
Progress = Callable[[str], None]

_MAX_RECIPE_CHARACTERS = 1 << 20
#: kinds of corrections, and the channels that each needs of the base
_CORRECTIONS = {
    "none": ("theta",),
    "prox": ("theta",),
    "own": ("theta",),
    "scaffold": ("theta", "control"),
    "freeze": ("theta",),
}
#: torch's random numbers and threads belong to the whole process: one piece of work at a time, whosever it is
_TURN = threading.Lock()
_TURN_POLL_S = 0.1


def quiet(note: str) -> None:
    pass


@dataclass(frozen=True)
class Work:
    """What a training task came to: the update's tensors, all of one layout, and its figures. The layout is the base's,
    or where the recipe gives this site a part of the adapter, that part's, or that of coded ones (`codec/coded.py`).

    Args:
        channels: `delta` (θᵢ − θ) and what else the correction sends (SCAFFOLD: `control`); or all of that as `coded`,
        where a codec made it small.
        metrics: `loss`, mean nats a label token over the local work; `seconds`.
        cluster: of which cluster's model it is an update; 0 where there is one model.
    """

    channels: Channels
    num_examples: int
    num_label_tokens: int
    num_steps: int
    metrics: Mapping[str, float]
    cluster: int = 0


class Workshop(Protocol):
    """Does a site's tasks. Methods block; they may be called from any thread, for several runs at once.

    All raise CommonweightError for whatever goes wrong; `reason_for_others` says what of it may leave the site.
    """

    def join(self, job: JobLike, progress: Progress = quiet) -> dict[str, Any]:
        """Open a job's recipe, data and model, and say what the coordinator needs to know: `steps` a round, `groups`
        of the held-out rows as codes, `layout` of the update, and counts."""

    def initial(self, run: str, progress: Progress = quiet) -> NamedTensors:
        """The global tensors with which a run that was joined begins, drawn from its recipe's seed; not to be written
        to."""

    def train(
        self,
        run: str,
        task: TrainTask,
        base: Channels,
        *,
        cancelled: Callable[[], bool] = never,
        progress: Progress = quiet,
        base_digest: str | None = None,
        room: Room = in_memory,
    ) -> Work:
        """Carry out a training task from global tensors, which are not written to.

        Args:
            base: `theta` and the strategy's further channels.
            cancelled: asked before each step; True ends the work with `Cancelled`.
            base_digest: names the base, for the checkpoint; computed from the tensors when it is not given.
            room: where the update's tensors are made, and what else is of the model's size.
        """

    def answer(
        self,
        run: str,
        task: Answerable,
        base: Channels,
        *,
        cancelled: Callable[[], bool] = never,
        progress: Progress = quiet,
    ) -> dict[str, Any]:
        """Carry out a task whose answer is plain data, by the site's enrolled name."""

    def forget(self, run: str) -> None:
        """The run has ended: free its memory and delete its files. Never blocks; unknown runs are no error."""


class Unforeseen(SiteError):
    """Something raised what nobody foresaw. Its words may quote the site's rows."""


class RecipeWorkshop:
    """The real workshop: opens a job's recipe over the site's own rows.

    Args:
        settings: where the rows are and how to read them, device, threads. One thread gives the bits of the in-process
            engine.
        folder: the site's folder.
        max_open: runs with model and data in memory; the one unused for longest makes room, and is opened again when
            it is needed.
        checkpoint_s: seconds between checkpoints of a training task, by `clock`.
    """

    def __init__(
        self,
        settings: SiteSettings,
        folder: Path,
        *,
        max_open: int = 2,
        checkpoint_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.folder = settings, folder
        self.max_open, self.checkpoint_s, self.clock = max(1, max_open), checkpoint_s, clock
        partition = settings.data.partition
        #: the site's name in its own rows, from which its seeds are drawn
        self.local_name = settings.name if partition is None else partition
        self._open: OrderedDict[str, Bench] = OrderedDict()
        self._ended: set[str] = set()

    # --- what a site is asked for ---

    def join(self, job: JobLike, progress: Progress = quiet) -> dict[str, Any]:
        """See `Workshop`.

        Raises:
            SiteError: something that must match does not, the run was joined with another recipe or other rows, or
                something failed.
            RecipeError, DataError, ModelError: the recipe, the rows or the model cannot be used here.
        """
        self._ended.discard(job.id)
        with self._turn("joining the run", never), self._sweeping(job.id):
            joined = self._files(job.id).joined()
            if joined is not None and joined != Joined.of(job, joined.data):
                raise SiteError(
                    f"run {job.id} was joined here with another recipe, purpose or handshake",
                    hint="submit the changed job as a new run",
                )
            bench = self._first_bench(job, progress) if joined is None else self._bench(job.id, progress)
            return self._facts(bench)

    def initial(self, run: str, progress: Progress = quiet) -> NamedTensors:
        """See `Workshop`.

        Raises:
            SiteError: the run was not joined, or something failed.
        """
        with self._turn("drawing the initial tensors", never), self._sweeping(run):
            return self._bench(run, progress).theta

    def train(
        self,
        run: str,
        task: TrainTask,
        base: Channels,
        *,
        cancelled: Callable[[], bool] = never,
        progress: Progress = quiet,
        base_digest: str | None = None,
        room: Room = in_memory,
    ) -> Work:
        """See `Workshop`.

        Raises:
            SiteError: the task is not this site's or makes no sense, its private state is missing, or training failed.
            Cancelled: `cancelled` said so.
        """
        with self._turn("training", cancelled), self._sweeping(run):
            self._check(task)
            bench, files = self._bench(run, progress), self._files(run)
            if task.secure is not None and task.steps != bench.facts.steps[self.local_name]:
                raise SiteError(  # if others were told to do nothing, their sum would be this site's own update
                    f"the task asks for {task.steps} steps, and this site has said that it takes "
                    f"{bench.facts.steps[self.local_name]}"
                )
            if bench.secret is not None:
                bench.secret.make()
            needed = (*_CORRECTIONS[task.correction["kind"]], *_channels(task.start))
            tensors = _fitting(base, bench.theta.layout, needed)
            state = files.private_state(task, bench.theta.layout, bench.state_layouts)
            work = self._work(run, bench, cancelled)
            delta = room("delta", bench.theta.layout)
            digest = base_digest or _digest(tensors)
            packer = None if bench.coder is None or bench.coder.common else Packer(bench.coder, room)
            done = work.train(
                replace(task, site=self.local_name),
                tensors,
                delta,
                state,
                checkpoint=self._checkpoint(files.checkpoint, task, work, digest),
                own_checkpoint=self._checkpoint(files.own_checkpoint, task, work, digest),
                on_step=lambda steps: progress(f"step {steps} of {task.steps}"),
                sent=unseen if packer is None else packer.add,
                room=room,
            )
            shape = bench.shapes.get(self.local_name)
            channels = {"delta": delta if shape is None else shape.own(delta), **done.further}
            _refuse_non_finite(channels)
            if packer is None and shape is None:
                for dtype, numel in delta.layout.numels.items():
                    room.written("delta", dtype, numel)
            files.keep_private_state(task, done.state)
            # the loss of one batch says more of its few rows than a strategy that runs over a network asks for
            done.figures["metrics"].pop("first_loss", None)
            for told in ("num_bytes", "codec"):  # by the frame
                done.figures.pop(told)
            if packer is not None:
                assert bench.coder is not None
                channels = {CODED: packer.packed(bench.coder.update_seed(self.local_name, task.round))}
            return Work(channels, **done.figures)

    def answer(
        self,
        run: str,
        task: Answerable,
        base: Channels,
        *,
        cancelled: Callable[[], bool] = never,
        progress: Progress = quiet,
    ) -> dict[str, Any]:
        """See `Workshop`. A local control arm is not scored on other sites' rows, which are not here: its result has no
        `everyone_loss`.

        Raises:
            SiteError: the task is not for this site alone, or something failed.
            Cancelled: `cancelled` said so.
        """
        with self._turn("the evaluation", cancelled), self._sweeping(run):
            work = self._work(run, self._bench(run, progress), cancelled, _chain_progress(task, progress))
            match task:
                case EvaluateTask():
                    return self._evaluate(work, task, base, self._files(run))
                case SampleTask():
                    return self._sample(work, task, base, self._files(run))
                case ChainTask():
                    return self._chain(work, task, self._files(run))

    def forget(self, run: str) -> None:
        """See `Workshop`. Work that is under way for the run stops within a step."""
        if is_run_id(run):
            self._ended.add(run)
            self._open.pop(run, None)
            self._files(run).sweep()

    # --- opening runs ---

    def _first_bench(self, job: JobLike, progress: Progress) -> Bench:
        """The bench of a run that is joined for the first time; noted once all is well."""
        files, bench = self._files(job.id), self._built(job, progress)
        files.note(Joined.of(job, str(bench.partition["digest"])))
        self._open[job.id] = bench
        return bench

    def _bench(self, run: str, progress: Progress) -> Bench:
        """A joined run's bench, opened again if it is not open."""
        bench = self._open.pop(run, None)
        if bench is None:
            bench = self._opened_again(run, progress)
        self._open[run] = bench  # the last is the one used last
        return bench

    def _opened_again(self, run: str, progress: Progress) -> Bench:
        joined = self._files(run).joined()
        if joined is None:
            raise SiteError(f"this site has not joined run {run}", hint="the coordinator asks it to join first")
        bench = self._built(joined, progress)
        if bench.partition["digest"] != joined.data:
            raise SiteError(
                f"this site's rows are not those with which it joined run {run}",
                hint="put the data back as it was, or leave this run and wait for a new one",
            )
        return bench

    def _built(self, job: JobLike, progress: Progress) -> Bench:
        while len(self._open) >= self.max_open:
            self._open.popitem(last=False)
            _free_device_memory()
        progress("opening the recipe, the data and the model")
        bench = build_bench(self._recipe(job), gather=self._gather)
        progress("checking what must match")
        check_handshake(job.must_match, {**handshake(bench), **bench.must_match_too})
        if bench.planned:
            steps = bench.planned[self.local_name].count * bench.recipe.federation.rounds
            bench.secret = NoiseSecret(self._files(job.id).folder, most=steps)
        return bench

    def _recipe(self, job: JobLike) -> Recipe:
        """The job's recipe over this site's rows and device, with what it says of this site under its name in these
        rows, and of no other."""
        if len(job.recipe) > _MAX_RECIPE_CHARACTERS:
            raise SiteError("the job's recipe is larger than 1 MiB: this is no recipe")
        recipe = validate(Recipe, read_source(job.recipe, "the job's recipe"))
        data = self.settings.data_spec(recipe.data, job.purpose)
        engine = recipe.engine.model_copy(update={"device": self.settings.device})
        adapter, training = recipe.model.adapter, recipe.training
        training = training.model_copy(update={"budget": self._own(training.budget)})
        own = {"sites": self._own(adapter.sites), "budget": self._own(adapter.budget)}
        model = recipe.model.model_copy(update={"adapter": adapter.model_copy(update=own)})
        return recipe.model_copy(update={"data": data, "engine": engine, "training": training, "model": model})

    def _own(self, by_site: Mapping[str, V]) -> dict[str, V]:
        """This site's entry of a mapping by enrolled name, under its name in its rows."""
        name = self.settings.name
        return {self.local_name: by_site[name]} if name in by_site else {}

    def _gather(
        self, spec: DataSpec, *, seed: int, tokenizer: Any, max_tokens: int, owner: str | None
    ) -> tuple[list[Site], dict[str, Any]]:
        """This site's examples, and the report of them alone."""
        name, partition = self.local_name, self.settings.data.partition
        if partition is None:
            spec = spec.model_copy(update={"sites": SitesSpec(scheme="iid", count=1, take=spec.sites.take)})
        sites, report = load_sites(spec, seed=seed, tokenizer=tokenizer, max_tokens=max_tokens, owner=owner)
        found = next((site for site in sites if partition in (None, site.name)), None)
        if found is None:
            raise DataError(
                f"{spec.path} has no part {partition!r} by the recipe's data.sites",
                hint=f"correct data.partition in site.yaml; the parts are {listed(site.name for site in sites)}",
            )
        counts = dict(report["sites"][found.name])
        if partition is None:
            counts["skipped"] = report["rows_skipped"]
        site = replace(found, name=name)
        return [site], {"sites": {name: counts}, "digest": data_digest([site]), "layout": report["layout"]}

    def _facts(self, bench: Bench) -> dict[str, Any]:
        facts, name = bench.facts, self.local_name
        return {
            "steps": facts.steps[name],
            "groups": codes(facts.groups[name]),
            "layout": bench.theta.layout.digest,
            "rows_read_as": bench.partition["layout"],
            **bench.partition["sites"][name],
        }

    # --- one piece of work ---

    def _files(self, run: str) -> RunFiles:
        return RunFiles(self.folder, run)

    def _work(
        self,
        run: str,
        bench: Bench,
        cancelled: Callable[[], bool],
        tell: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> TaskWork:
        interrupted = lambda: run in self._ended or cancelled()  # noqa: E731
        return TaskWork(bench, self._files(run).folder, tell, interrupted=interrupted)

    def _checkpoint(self, path: Path, task: TrainTask, work: TaskWork, base: str) -> FileCheckpoint:
        bench = work.bench
        identity = {
            "run": path.parent.name,
            "file": path.name,
            "round": task.round,
            "site": task.site,
            "base": base,
            "lr": task.lr,
            "steps": task.steps,
            "seed": work.seed(self.local_name, task.round),
            "correction": dict(task.correction),
            "start": dict(task.start),
            "state": task.state_in,
            "data": bench.partition["digest"],
            "layout": bench.theta.layout.digest,
        }
        every_s = self.checkpoint_s
        return FileCheckpoint(path, identity, write_checkpoint, every_s=every_s, clock=self.clock)

    @contextmanager
    def _turn(self, what: str, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Inside, nothing else in this process trains or scores, and whatever goes wrong is a CommonweightError."""
        while not _TURN.acquire(timeout=_TURN_POLL_S):
            if cancelled():
                raise Cancelled(f"{what} was stopped before it began")
        try:
            if self.settings.threads != "auto":
                torch.set_num_threads(self.settings.threads)
            with _explained(what):
                yield
        finally:
            _TURN.release()

    @contextmanager
    def _sweeping(self, run: str) -> Iterator[None]:
        """A run that is forgotten while it is worked on leaves nothing behind."""
        try:
            yield
        finally:
            if run in self._ended:
                self._open.pop(run, None)
                self._files(run).sweep()

    def _check(self, task: TrainTask) -> None:
        self._check_sites((task.site,))
        if task.steps < 1 or task.round < 1 or not 0 <= task.lr < float("inf"):
            raise SiteError(f"the task asks for {task.steps} steps at lr {task.lr} in round {task.round}")
        if task.correction.get("kind") not in _CORRECTIONS:
            raise SiteError(
                f"the strategy asks for a correction {task.correction.get('kind')!r}, which is not known here",
                hint="install the same version of commonweight as the coordinator's",
            )
        candidates(task.start)

    def _check_sites(self, sites: tuple[str, ...]) -> None:
        name = self.settings.name
        if set(sites) != {name}:
            about = ", ".join(sites)[:200] or "no site"
            raise SiteError(f"the task is about {about}, but this site, {name}, answers for itself only")

    def _evaluate(self, work: TaskWork, task: EvaluateTask, base: Channels, files: RunFiles) -> dict[str, Any]:
        """The scores alone: what share of its own model the site has chosen stays here. If what was scored is the
        model that the site uses, it is kept for its people."""
        self._check_sites(tuple(task.sites))
        bench, starts = work.bench, self._own_start(task)
        local = replace(task, sites=(self.local_name,), starts=starts)
        if task.alpha is not None and not 0 <= task.alpha <= 1:
            raise SiteError(f"the task asks for a share of {task.alpha} of this site's own model")
        state = files.state_in(task.state_in, bench.theta.layout, bench.state_layouts)
        found = work.evaluate(local, _models(bench, task.arm, base, starts), state)
        found[self.local_name].pop("alpha", None)
        if task.arm == "personal" or (task.arm == "global" and bench.personal):
            with files.keeping_personal() as folder:
                bench.save_as_is(folder, tokenizer=True)
        return self._by_name(found)

    def _sample(self, work: TaskWork, task: SampleTask, base: Channels, files: RunFiles) -> dict[str, Any]:
        self._check_sites(tuple(site for site, _ in task.prompts))
        name, (site,) = self.local_name, work.bench.sites.values()
        for _, row in task.prompts:
            if not 0 <= row < len(site.heldout):
                raise SiteError(f"the task asks for held-out row {row}; this site has {len(site.heldout)}")
        bench, starts = work.bench, self._own_start(task)
        local = replace(task, prompts=tuple((name, row) for _, row in task.prompts), starts=starts)
        state = files.state_in(task.state_in, bench.theta.layout, bench.state_layouts)
        found = work.sample(local, _models(bench, task.arm, base, starts), state)
        return {"answers": [{**answer, "site": self.settings.name} for answer in found["answers"]]}

    def _chain(self, work: TaskWork, task: ChainTask, files: RunFiles) -> dict[str, Any]:
        if task.arm != "local":
            raise SiteError(
                f"a site cannot train the {task.arm!r} control arm, only its own: the others' rows are not here",
                hint="leave `centralised` out of evaluation.controls",
            )
        self._check_sites(tuple(task.sites))
        self._check_sites(tuple(task.own))
        if any(steps < 1 for _, _, steps in task.rounds):
            raise SiteError("the local control arm has a round without steps")
        name = (self.local_name,)
        folder = files.control_folder(task)
        result = work.chain(replace(task, sites=name, own=name, everyone=(), folder=folder))
        points = [{**point, "losses": self._by_name(point["losses"])} for point in result["rounds"]]
        return {**result, "rounds": points, "final": self._by_name(result["final"])}

    def _own_start(self, task: EvaluateTask | SampleTask) -> dict[str, Mapping[str, Any]]:
        """What a task says of this site's model, by the site's name in its own rows."""
        start = task.starts.get(self.settings.name)
        return {} if start is None else {self.local_name: start}

    def _by_name(self, found: Mapping[str, Any]) -> dict[str, Any]:
        return {self.settings.name: found[self.local_name]}


def reason_for_others(error: CommonweightError) -> str:
    """What of an error may be told outside the site: not what may quote rows, columns or paths. The site's own log has
    the whole."""
    kept = {DataError: "its data", StorageError: "its storage", StateError: "its own files", Unforeseen: "its work"}
    for kind, what in kept.items():
        if isinstance(error, kind):
            return f"the site has trouble with {what} ({kind.__name__}); its own log says more"
    return error.message


def codes(groups: list[str]) -> list[str]:
    """Groups as numbers in the order of their names: no name leaves, and nothing that is drawn by group changes."""
    known = sorted(set(groups))
    width = len(str(len(known)))
    number = {name: f"{k:0{width}}" for k, name in enumerate(known, 1)}
    return [number[name] for name in groups]


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except CommonweightError:
        raise
    except Exception as error:  # models and objectives of one's own raise anything
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            _free_device_memory()
            raise SiteError(
                f"{what} ran out of memory",
                hint="lower training.micro_batch_size or training.max_tokens, set training.gradient_checkpointing, or "
                "give the site more memory",
            ) from error
        raise Unforeseen(f"{what} failed: {type(error).__name__}: {error}") from error


def _free_device_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fitting(base: Channels, layout: Layout, names: tuple[str, ...]) -> dict[str, NamedTensors]:
    """The channels of the base that are needed, in the layout's own dtypes."""
    found = {}
    for name in names:
        if name not in base:
            raise SiteError(f"the global tensors lack the channel {name!r}, which the task needs")
        if base[name].layout != layout:
            raise SiteError(f"the global tensors ({name}) do not have the layout of this site's adapter")
        found[name] = _narrow(base[name])
    return found


def _narrow(tensors: NamedTensors) -> NamedTensors:
    """A strategy's wide slot as the in-process engine broadcasts it; anything else as it is."""
    if all(flat.dtype == dtype for dtype, flat in tensors.flats.items()):
        return tensors
    return NamedTensors(tensors.layout, {dtype: flat.to(dtype) for dtype, flat in tensors.flats.items()})


def _channels(start: Mapping[str, Any]) -> tuple[str, ...]:
    """The channels of the models from which a task may let the site start."""
    return tuple(map(channel_of, candidates(start)))


def _models(bench: Bench, arm: str, base: Channels, starts: Mapping[str, Mapping[str, Any]]) -> Channels:
    """The model that a task is about; those that it may be, if the site is to find out."""
    if arm not in ("base", "global", "personal"):
        raise SiteError(f"the task is about an arm {arm!r}, which is not known here")
    if arm == "base":
        return {"theta": bench.theta}  # switched off, or, where every weight is trained, the base itself
    start = next(iter(starts.values()), FROM_THETA)
    return _fitting(base, bench.theta.layout, _channels(start))


def _digest(base: Channels) -> str:
    return hashlib.sha256("".join(f"{name} {base[name].digest()}\n" for name in sorted(base)).encode()).hexdigest()


def _refuse_non_finite(channels: Channels) -> None:
    for channel, tensors in channels.items():
        name = first_non_finite(tensors)
        if name is not None:
            raise SiteError(
                f"training left NaN or infinity in {name!r} ({channel}); nothing is sent",
                hint="lower training.lr, or set training.clip_norm",
            )


def _chain_progress(task: Answerable, progress: Progress) -> Callable[[dict[str, Any]], None]:
    rounds = len(task.rounds) if isinstance(task, ChainTask) else 0
    return lambda fields: progress(f"round {fields['round']}, {rounds} in all")

"""Sites that take part in secure sums as an agent would, and whose single steps a test may replace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from commonweight.codec.common import common_numbers
from commonweight.errors import CommonweightError
from commonweight.federation.messages import SUM_STEPS, SumTask, TrainTask
from commonweight.identity.folder import IdentityFolder
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.privacy.secure_aggregation.rows import MASKED, Most, RowCode
from commonweight.recipe.problems import validate
from commonweight.recipe.schema import Recipe
from commonweight.recipe.source import read_source
from commonweight.site.gate import KnownJob, task_of
from commonweight.site.policy import Policy
from commonweight.site.records import SiteRecords
from commonweight.site.run_files import RunFiles
from commonweight.site.sums import SiteSums
from commonweight.site.workshop import Work
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import Channel, frame_of, pack_chunk, piece_of, plan_for

from .federations import CHUNK_BYTES, Site, theta


def known(job: pb.Job, layout: Layout | None = None) -> KnownJob:
    """A job as a site knows it that has verified it."""
    recipe = validate(Recipe, read_source(job.recipe, "the job's recipe"))
    digest = hashlib.sha256(job.SerializeToString(deterministic=True)).digest()
    return KnownJob(job, digest, cast(Any, None), recipe, layout or theta().layout, CHUNK_BYTES)


def sums_of(folder: Path, identity: IdentityFolder, records: SiteRecords, *, min_cohort: int = 1) -> SiteSums:
    policy = cast(Policy, SimpleNamespace(min_cohort=min_cohort))
    return SiteSums(folder, lambda: identity, lambda: policy, records)


def delta_of(site: str, round: int, layout: Layout) -> NamedTensors:
    """What a site has learnt in a round."""
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{site} {round}".encode()).digest()[:4], "big"))
    return NamedTensors(layout, {d: torch.randn(n, generator=draw).to(d) / 50 for d, n in layout.numels.items()})


def examples_of(site: str) -> int:
    return 1 + sum(site.encode()) % 8


def work_of(site: str, round: int, layout: Layout) -> Work:
    figures = {"loss": 1.0 + examples_of(site) / 8, "seconds": 0.25}
    return Work({"delta": delta_of(site, round, layout)}, examples_of(site), 40, 1, figures)


def mean_of(sites: list[str], num_sites: int, recipe: Recipe, round: int, layout: Layout) -> NamedTensors:
    """The mean of these sites' updates as a secure round has it: from the rows, added without masks."""
    code = RowCode.of(recipe, layout, num_sites, Most.of(recipe, 1), common_numbers(recipe, layout, round))
    total = np.zeros(code.length, dtype=np.uint32)
    for site in reversed(sites):
        work, row = work_of(site, round, layout), np.empty_like(total)
        loss = work.metrics["loss"]
        code.encode(work.channels["delta"], examples=work.num_examples, label_tokens=40, loss=loss, out=row)
        total += row
    mean = NamedTensors.zeros(layout)
    code.spread(lambda first, length: total[first : first + length], torch.float32, 0, mean.flats[torch.float32])
    mean.flats[torch.float32].div_(sum(map(examples_of, sites)))
    return mean


class SumSite:
    """A site's hand that goes along with secure sums.

    Args:
        instead: by kind of task, what is done in place of the honest step.
    """

    def __init__(
        self, site: Site, folder: Path, job: pb.Job, instead: Mapping[str, Callable[[SumSite, pb.Task], None]]
    ) -> None:
        self.site, self.job, self.instead = site, job, instead
        self.records = SiteRecords(folder / f"{site.name}.sqlite")
        self.sums = sums_of(folder / site.name, site.identity, self.records)
        RunFiles(folder / site.name, job.id).folder.mkdir(parents=True)
        self.said: list[tuple[str, int, dict[str, Any]]] = []
        self.refused: list[str] = []
        site.answers |= dict.fromkeys((*SUM_STEPS, "train"), self._answer)

    @property
    def name(self) -> str:
        return self.site.name

    def _answer(self, site: Site, task: pb.Task) -> None:
        if task.run != self.job.id:
            return
        other = self.instead.get(task.kind)
        try:
            other(self, task) if other is not None else self.honestly(task)
        except CommonweightError as error:
            self.refused.append(error.message)
            site.reply(task, pb.TaskReply.FAILED, reason=error.message)

    def honestly(self, task: pb.Task, **changes: Any) -> None:
        if task.kind == "train":
            self.train(task)
        else:
            self.site.done(task, {**self.step(task), **changes})

    def step(self, task: pb.Task) -> dict[str, Any]:
        body = task_of(task, json.loads(task.body))
        assert isinstance(body, SumTask)
        answer = self.sums.answer(known(self.job), task, body)
        self.said.append((task.kind, body.attempt, answer))
        return answer

    def masked(self, task: pb.Task) -> tuple[NamedTensors, Work]:
        body = task_of(task, json.loads(task.body))
        assert isinstance(body, TrainTask)
        work = self.sums.mask(known(self.job), task, body, work_of(self.name, task.round, theta().layout))
        tensors = work.channels[MASKED]
        assert isinstance(tensors, NamedTensors)
        return tensors, work

    def train(self, task: pb.Task) -> None:
        self.site.reply(task, pb.TaskReply.TAKEN)
        if self.send(task, *self.masked(task)).state == pb.UploadStatus.ACCEPTED:
            self.site.trained.append(task.round)

    def send(self, task: pb.Task, tensors: NamedTensors, work: Work, **changes: Any) -> pb.UploadStatus:
        frame = frame_of({MASKED: tensors}, plan_for(tensors.layout, (Channel(MASKED),), CHUNK_BYTES))
        figures = {"num_examples": work.num_examples, "num_label_tokens": 0, "metrics": dict(work.metrics)}
        signed = self.site.manifest(task, None, **{"frame": frame.header, **figures, **changes})
        status = self.site.open(signed)
        if status.state != pb.UploadStatus.OPEN:
            return status
        chunks = [pack_chunk(p.index, piece_of({MASKED: tensors}, p)) for p in frame.plan.pieces]
        return self.site.push(status.upload, [chunks[index] for index in status.missing])

"""One site's local work in one round: steps of an optimizer on its own examples. No networking, no other site.

Legend: θ the global trainables the site starts from, θᵢ its own; both are flat (`model/tensors.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from ..data.tokens import Tokens
from ..errors import SiteError
from ..model.tensors import accumulator_dtype
from ..model.trainables import Trainables
from ..recipe.schema import TrainingSpec
from . import batches
from .batches import Batch
from .checkpoint import Checkpoint, Sums, restore, state_of
from .corrections import Correction, NoCorrection
from .loss import LanguageModel
from .per_example import ExampleGradients, Privacy, example_gradients


class Cancelled(SiteError):
    """The work was stopped because nobody wants it any more."""


def never() -> bool:
    return False


def untold(steps: int) -> None:
    pass


@dataclass
class Participant:
    """What does the work: a model with its trainables in flat memory. Sites take turns on one."""

    language_model: LanguageModel
    trainables: Trainables


@dataclass
class LocalWork:
    """One task's work.

    Args:
        tokens: the site's training examples.
        spec: the recipe's training section.
        lr: this round's learning rate.
        steps: optimizer steps.
        seed: decides the order of examples and dropout.
        pack_seed: decides which examples share a packed sequence; the same in every round.
        correction: what the strategy changes in a step.
        optimizer: one to go on with, or None for a fresh one.
        checkpoint: keeps the work's state from time to time, so that a killed process goes on from there. Objectives
            that replace `work` do without.
        interrupted: asked before each step; True stops the work with `Cancelled`.
        progress: told before each step how many are done.
        privacy: makes each step private: it draws the batch, and adds noise to the sum of clipped gradients. Only of
            objectives that are `of_examples`.
    """

    tokens: Tokens
    spec: TrainingSpec
    lr: float
    steps: int
    seed: int
    pack_seed: int = 0
    correction: Correction | None = None
    optimizer: Optimizer | None = None
    checkpoint: Checkpoint | None = None
    interrupted: Callable[[], bool] = never
    progress: Callable[[int], None] = untold
    privacy: Privacy | None = None


@dataclass(frozen=True)
class LocalResult:
    """What the work was: examples and label tokens trained on (repeats count), steps, mean nats a label token.

    Args:
        num_steps: at least 1 and no more than were asked for: a coordinator refuses any other count.
        first_loss: mean nats a label token in the first step, before anything changed; None if that is not known.
    """

    num_examples: int
    num_label_tokens: int
    num_steps: int
    loss: float
    first_loss: float | None = None


class Objective(ABC):
    """What a site optimises. A class of one's own may replace the whole of `work`, or only the loss."""

    class NoOptions(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    source: ClassVar[str] = ""
    Options: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options = options if options is not None else self.Options()

    @abstractmethod
    def work(self, participant: Participant, task: LocalWork) -> LocalResult:
        """Train in place: `participant.trainables.values` go from θ to θᵢ.

        Raises:
            SiteError: the loss is not finite; the values are then worthless and the update must not be sent.
            Cancelled: `task.interrupted` said so.
        """


class GradientObjective(Objective):
    """An objective with a gradient: minimise a sum over label tokens by an optimizer.

    With `LocalWork.privacy` it is, in each step, the mean over units (examples, or groups of them) of the mean over a
    unit's examples of each one's mean loss a label token; what a correction adds to the gradient comes after the noise,
    and `training.clip_norm` is left aside.

    Checkpoints hold values, optimizer, random numbers and sums. A subclass that remembers anything else from step to
    step replaces `work`.
    """

    #: whether its loss is a sum over label tokens, each of which depends on its own sequence alone, and `backward`
    #: knows what to do with a scale for each; without it there is no privacy of examples
    of_examples: ClassVar[bool] = False

    @abstractmethod
    def backward(self, language_model: LanguageModel, batch: Batch, scale: float | Tensor) -> float:
        """Add the gradient of `scale` × the batch's summed loss to the gradients; return that sum.

        Args:
            scale: a number, or with `of_examples` one for each label [L], in the order of the batch.
        """

    def work(self, participant: Participant, task: LocalWork) -> LocalResult:
        model, spec = participant.language_model, task.spec
        model.model.train()
        torch.manual_seed(task.seed if task.privacy is None else task.privacy.seed)
        optimizer = task.optimizer or make_optimizer(participant.trainables, spec)
        state = task.checkpoint.load() if task.checkpoint is not None else None
        sums = Sums() if state is None else restore(state, participant.trainables, optimizer)
        set_lr(optimizer, task.lr)
        if task.privacy is None:
            rows = batches.sequences(task.tokens, spec, task.pack_seed)
            order = batches.order(rows, batch_size=spec.batch_size, steps=task.steps, seed=task.seed)
        else:
            order = map(task.privacy.drawn, range(task.steps))
        with self._examples(participant, task) as examples:
            for batch in islice(order, sums.steps, None):
                if task.interrupted():
                    raise Cancelled(f"the work was stopped after {sums.steps} of {task.steps} local steps")
                task.progress(sums.steps)
                nats, labels = self._step(participant, optimizer, task, batch, sums.steps, examples)
                self._add_step(sums, batch, nats, labels, checked=examples is None)
                if task.checkpoint is not None and sums.steps < task.steps and task.checkpoint.due():
                    task.checkpoint.save(state_of(sums, participant.trainables, optimizer))
        return LocalResult(
            sums.examples, sums.labels, task.steps, sums.nats / max(1, sums.labels), first_loss=sums.first_loss
        )

    def _examples(self, participant: Participant, task: LocalWork) -> AbstractContextManager[ExampleGradients | None]:
        if task.privacy is None:
            return nullcontext()
        assert self.of_examples, f"{self.name} has no gradients of single examples"
        return example_gradients(participant.language_model, participant.trainables)

    def _add_step(self, sums: Sums, batch: batches.Rows, nats: float, labels: int, *, checked: bool) -> None:
        if checked and not math.isfinite(nats):
            raise SiteError(
                f"the training loss became {nats} at local step {sums.steps + 1}",
                hint="lower training.lr, set training.clip_norm, or look for broken rows in the site's data",
            )
        if sums.steps == 0:
            sums.first_loss = nats / max(1, labels)
        sums.steps += 1
        sums.nats += nats
        sums.labels += labels
        sums.examples += sum(len(row) for row in batch)

    def _step(
        self,
        participant: Participant,
        optimizer: Optimizer,
        task: LocalWork,
        batch: batches.Rows,
        step: int,
        examples: ExampleGradients | None,
    ) -> tuple[float, int]:
        trainables, model = participant.trainables, participant.language_model
        labels = sum(int(task.tokens.labelled_of(e).sum()) for row in batch for e in row)
        trainables.zero_gradients()
        size = batches.micro_batch_size(task.spec, model.device)
        nats = 0.0
        if examples is None or task.privacy is None:
            for micro in batches.micro_batches(task.tokens, batch, size, model.device):
                nats += self.backward(model, micro, 1.0 / labels)
        else:
            room = task.spec.max_tokens if task.spec.packing else 0
            most = None if task.spec.micro_batch_size == "auto" else size
            for units in batches.unit_batches(task.tokens, batch, size, model.device, room=room, most=most):
                nats += examples.add_clipped(units, self.backward, task.privacy.bound)
            trainables.gradients.copy_(task.privacy.release(examples.total, step))
            examples.forget()
        change = task.correction or NoCorrection()
        change.adjust(trainables.shared, trainables.shared_gradients)
        if examples is None and task.spec.clip_norm is not None:
            clip(trainables, task.spec.clip_norm)
        optimizer.step()
        change.settle(trainables.shared)
        return nats, labels


def make_optimizer(trainables: Trainables, spec: TrainingSpec) -> Optimizer:
    """The recipe's local optimizer over the flat parameters: elementwise, so the same as over the tensors
    themselves."""
    if spec.optimizer == "sgd":
        return SGD(trainables.flat_parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    return AdamW(trainables.flat_parameters, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay, fused=True)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(trainables: Trainables, bound: float) -> float:
    """Scale the gradients so that their joint L2 norm is at most `bound`; returns the norm before."""
    flats = list(trainables.gradients.flats.values())
    norm = math.sqrt(
        sum(float(torch.linalg.vector_norm(flat, dtype=accumulator_dtype(flat.dtype))) ** 2 for flat in flats)
    )
    if norm > bound:
        for flat in flats:
            flat.mul_(bound / (norm + 1e-6))
    return norm

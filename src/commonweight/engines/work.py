"""What carrying out a task means, whoever asks and wherever the tensors lie: the one place for every engine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codec.coded import CHOICES_BYTES, LENGTH_BYTES
from ..codec.feedback import Coded
from ..errors import SiteError
from ..evaluate.scoring import answer, score_site, score_tokens
from ..federation.messages import ChainTask, EvaluateTask, SampleTask, TrainTask
from ..model.clusters import channel_of
from ..model.shapes import worn
from ..model.tensors import NamedTensors, Room, first_non_finite, in_memory, on_cpu
from ..privacy.adaptive_clip import UNDER_CLIP
from ..privacy.example_level import NoisySteps
from ..privacy.site_level import clip_
from ..seeding import derive_seed
from ..train.checkpoint import Checkpoint
from ..train.corrections import Correction, Own, correction
from ..train.local import LocalWork, never, untold
from ..train.start import FROM_THETA, candidates, least, rows_to_ask
from .bench import NOTHING, Bench
from .chain import Chain

#: shares of a site's own model that it tries on the rows kept aside
ALPHAS = tuple(tenth / 10 for tenth in range(11))

Progress = Callable[[dict[str, Any]], None]
_NO_NOISE = (
    "with privacy.dp example or group only noisy steps may be told; use a strategy that goes with it, such as fedavg"
)

#: of a channel, in a site's private state: what its updates have not sent yet
_LATE = "slot/late-"


def unseen(coded: Coded) -> None:
    pass


@dataclass(frozen=True)
class Trained:
    """A training task's outcome beside the delta.

    Args:
        further: the update's other channels.
        state: the site's new private state.
        figures: what `Update` has beside tensors and weight, in plain numbers.
    """

    further: Mapping[str, NamedTensors]
    state: Mapping[str, NamedTensors]
    figures: dict[str, Any]


class TaskWork:
    """Carries out tasks on a bench, one at a time.

    Args:
        folder: where control arms keep their tensors.
        progress: told how a long chain goes on.
        interrupted: asked between steps; True stops training with `Cancelled`.
    """

    def __init__(
        self, bench: Bench, folder: Path, progress: Progress, *, interrupted: Callable[[], bool] = never
    ) -> None:
        self.bench, self.folder, self.progress, self.interrupted = bench, folder, progress, interrupted
        self.trainables = bench.participant.trainables
        self.values = self.trainables.values

    def train(
        self,
        task: TrainTask,
        broadcast: Mapping[str, NamedTensors],
        delta: NamedTensors,
        state: Mapping[str, NamedTensors],
        *,
        checkpoint: Checkpoint | None = None,
        own_checkpoint: Checkpoint | None = None,
        on_step: Callable[[int], None] = untold,
        sent: Callable[[Coded], None] = unseen,
        room: Room = in_memory,
    ) -> Trained:
        """One site's turn.

        Args:
            broadcast: `theta` and the strategy's further channels, of the bench's layout; not written to.
            delta: where θᵢ − θ goes; θ is the model that the task says to start from. From a site that holds less than
            the whole adapter, θ is what it was handed, and the rest of `delta` is zero.
            state: the site's private state; empty if it has none yet.
            own_checkpoint: of the training of its own model, if there is one.
            sent: given the update's payloads, in order, if a codec makes it small; `delta` and the further channels
                are then what the payloads stand for.
            room: where what a codec loses is held.

        Raises:
            SiteError: a loss that is not finite, or an objective that went beyond the site's part; Cancelled.
        """
        began, site, shape = time.perf_counter(), self.bench.sites[task.site], self.bench.shapes.get(task.site)
        cluster = self._choose(task.site, task.start, broadcast)
        whole = broadcast[channel_of(cluster)]
        theta = whole if shape is None else shape.start(whole)
        change = correction(task.correction, theta, broadcast, state, round=task.round)
        private = self._private(task, theta, broadcast, state, change)
        self.bench.take_up(theta, state)
        work = LocalWork(
            site.train,
            self.bench.recipe.training,
            lr=task.lr,
            steps=task.steps,
            seed=self.seed(task.site, task.round),
            pack_seed=self.bench.pack_seed(task.site),
            correction=change,
            checkpoint=checkpoint,
            interrupted=self.interrupted,
            progress=on_step,
            privacy=private,
        )
        with worn(self.bench.model, shape):
            result = self.bench.objective.work(self.bench.participant, work)
        if private is None and not math.isfinite(result.loss):
            raise SiteError(f"the objective reported a training loss of {result.loss}", hint="lower training.lr")
        self._difference(theta, delta)
        moved = shape.beyond(delta) if shape is not None else None
        if moved is not None:
            raise SiteError(
                f"the objective trained {moved!r} beyond the part that site {task.site!r} holds",
                hint="only objectives that follow the gradient can train a part of an adapter; leave the site out of "
                "model.adapter.sites and model.adapter.budget",
            )
        spec = self.bench.recipe.privacy
        bound = task.clip if task.clip is not None else spec.clip if spec.dp == "site" else None
        norm = 0.0 if bound is None else clip_(delta, bound)
        further, new_state = change.finish(delta, lr=task.lr, steps=result.num_steps)
        if self.trainables.personal:
            new_state["personal"] = self._kept("its personal parts", self.trainables.personal)
        if isinstance(change, Own):
            seed, steps = derive_seed(self.bench.recipe.seed, "own", task.site, task.round), change.steps(task.steps)
            own = replace(work, steps=steps, seed=seed, correction=change.pull, checkpoint=own_checkpoint)
            new_state["own"] = self._own(own, state.get("own", theta))
        num_bytes, codec = self._code(task, {"delta": delta, **further}, state, new_state, sent, room)
        # plain numbers: an objective of one's own may count in NumPy's or torch's
        metrics = {"seconds": time.perf_counter() - began}
        if task.clip is not None:
            metrics[UNDER_CLIP] = float(norm <= task.clip)
        num_examples, num_label_tokens = int(result.num_examples), int(result.num_label_tokens)
        if private is None:
            metrics["loss"] = float(result.loss)
            if result.first_loss is not None:
                metrics["first_loss"] = float(result.first_loss)
        else:  # what was drawn, and the losses on it, would tell more than the noisy steps do
            num_examples, num_label_tokens = max(1, round(private.expected * result.num_steps)), 0
        figures = {
            "num_examples": num_examples,
            "num_label_tokens": num_label_tokens,
            "num_steps": int(result.num_steps),
            "cluster": cluster,
            "num_bytes": num_bytes,
            "codec": codec,
            "metrics": metrics,
        }
        return Trained(further, new_state, figures)

    def _code(
        self,
        task: TrainTask,
        channels: Mapping[str, NamedTensors],
        state: Mapping[str, NamedTensors],
        new_state: dict[str, NamedTensors],
        sent: Callable[[Coded], None],
        room: Room,
    ) -> tuple[int, str]:
        """Make an update small; returns its bytes and the codec's name, 0 and "" where nothing is asked for. What is
        lost goes into `new_state`."""
        coder, num_bytes, codec = self.bench.coder, 0, ""
        late: dict[str, NamedTensors] = {}
        if coder is None:
            return 0, ""
        if self.bench.recipe.compression.keeps_errors:
            for channel, tensors in channels.items():
                late[channel] = room(f"late-{channel}", tensors.layout, wide=True)
                if _LATE + channel in state:
                    late[channel].copy_(state[_LATE + channel])
        for coded in coder.encode(channels, late, coder.update_seed(task.site, task.round)):
            num_bytes, codec = num_bytes + LENGTH_BYTES + len(coded.payload), coder.codecs[coded.codec].name
            sent(coded)
        new_state.update({_LATE + channel: tensors for channel, tensors in late.items()})
        return CHOICES_BYTES + num_bytes, codec

    def _private(
        self,
        task: TrainTask,
        theta: NamedTensors,
        broadcast: Mapping[str, NamedTensors],
        state: Mapping[str, NamedTensors],
        change: Correction,
    ) -> NoisySteps | None:
        """The task's draws and noise, of a key of its own; None: its steps are not private.

        Raises:
            SiteError: it asks for what noise would not cover, or for more steps than were planned for.
        """
        spec, site = self.bench.recipe.privacy, self.bench.sites[task.site]
        if not spec.noisy_steps:
            return None
        assert spec.clip is not None
        assert self.bench.secret is not None
        if isinstance(change, Own):
            raise SiteError("the task asks for a model of the site's own, which would have no noise", hint=_NO_NOISE)
        starts_from = {
            "site": task.site,
            "round": task.round,
            "lr": task.lr,
            "steps": task.steps,
            "correction": dict(task.correction),
            "theta": theta.digest(),
            "control": broadcast["control"].digest() if "control" in broadcast else "",
            "state": {name: tensors.digest() for name, tensors in sorted(state.items())},
        }
        key = self.bench.secret.key(json.dumps(starts_from, sort_keys=True), task.steps)
        planned, units = self.bench.planned[task.site], site.units
        expected = planned.sampling * len(units)
        return NoisySteps(
            spec.clip, planned.noise_multiplier, planned.sampling, expected, key, units, spec.rows_of_unit
        )

    def _own(self, work: LocalWork, start: NamedTensors) -> NamedTensors:
        """The site's own model after a turn of its own; at first it is the global one."""
        self.trainables.shared.copy_(start)
        self.bench.objective.work(self.bench.participant, work)
        return self._kept("its own model", self.trainables.shared)

    def _kept(self, what: str, tensors: NamedTensors) -> NamedTensors:
        bad = first_non_finite(tensors)
        if bad is not None:
            raise SiteError(
                f"training left NaN or infinity in {bad!r} ({what})",
                hint="lower training.lr, or set training.clip_norm",
            )
        return on_cpu(tensors)

    @torch.no_grad()
    def _difference(self, theta: NamedTensors, delta: NamedTensors) -> None:
        for dtype, flat in self.trainables.shared.flats.items():
            _difference(flat, theta.flats[dtype], delta.flats[dtype])

    def _choose(self, site: str, start: Mapping[str, Any], broadcast: Mapping[str, NamedTensors]) -> int:
        """The cluster whose model a site is to start from. Finding it out, where that must be, spoils the values."""
        clusters = candidates(start)
        if len(clusters) == 1:
            return clusters[0]
        if self.bench.recipe.privacy.noisy_steps:
            raise SiteError("the task asks which model has the least loss on the site's training rows", hint=_NO_NOISE)
        rows, losses = rows_to_ask(start, self.bench.sites[site].train), []
        for cluster in clusters:
            self.bench.take_up(broadcast[channel_of(cluster)])
            nats, labels, _ = score_tokens(self.bench.participant.language_model, rows)
            losses.append(float(nats.sum() / max(1, labels.sum())))
        return least(losses)

    def seed(self, who: str, round: int) -> int:
        return derive_seed(self.bench.recipe.seed, "work", who, round)

    def evaluate(
        self, task: EvaluateTask, broadcast: Mapping[str, NamedTensors], state: Mapping[str, NamedTensors] = NOTHING
    ) -> dict[str, Any]:
        """Scores by site; with them `alpha`, if the site has chosen it, and `cluster`, if there are any."""
        if task.arm == "base":
            self.bench.take_up(broadcast["theta"])
            with self.bench.base_alone():
                return self.score(task.sites, generate=task.generate)
        if task.arm == "personal" and "own" in state:
            (site,) = task.sites
            alpha = self.choose(site, broadcast["theta"], state["own"]) if task.alpha is None else task.alpha
            self.mix(broadcast["theta"], state["own"], alpha)
            scores = self.score(task.sites, generate=task.generate)
            return {site: {**scores[site], **({"alpha": alpha} if task.alpha is None else {})}}
        found: dict[str, Any] = {}
        cluster = -1
        for site in task.sites:
            cluster = self._load(site, task.starts.get(site, FROM_THETA), broadcast, state, loaded=cluster)
            found |= self.score((site,), generate=task.generate)
            if site in task.starts:
                found[site]["cluster"] = cluster
        return found

    def _load(
        self,
        site: str,
        start: Mapping[str, Any],
        broadcast: Mapping[str, NamedTensors],
        state: Mapping[str, NamedTensors],
        *,
        loaded: int = -1,
    ) -> int:
        """Put a site's global model into the trainables, unless it is what they hold; returns its cluster."""
        cluster = self._choose(site, start, broadcast)
        if cluster != loaded or len(candidates(start)) > 1:
            self.bench.take_up(broadcast[channel_of(cluster)], state)
        return cluster

    def mix(self, theta: NamedTensors, own: NamedTensors, alpha: float) -> None:
        """Make the model α·v + (1 − α)·θ, tensor by tensor."""
        for dtype, flat in self.trainables.shared.flats.items():
            flat.copy_(torch.lerp(theta.flats[dtype], own.flats[dtype], alpha))

    def choose(self, site: str, theta: NamedTensors, own: NamedTensors) -> float:
        """The share of a site's own model with the lowest loss on the rows that it kept aside; the least among equals.

        Raises:
            SiteError: nothing was kept aside.
        """
        aside = self.bench.sites[site].aside
        if aside is None:
            raise SiteError("no rows were kept aside to choose by", hint="let the strategy say so (`aside`)")
        losses = []
        for alpha in ALPHAS:
            self.mix(theta, own, alpha)
            losses.append(float(score_tokens(self.bench.participant.language_model, aside)[0].sum()))
        return ALPHAS[losses.index(min(losses))]

    def score(self, sites: tuple[str, ...], *, generate: bool) -> dict[str, Any]:
        recipe, found = self.bench.recipe, {}
        for name in sites:
            site = self.bench.sites[name]
            found[name] = score_site(
                self.bench.participant.language_model,
                site.heldout,
                site.heldout_examples,
                self.bench.base.tokenizer,
                max_tokens=recipe.training.max_tokens,
                generate=recipe.evaluation.max_new_tokens if generate else None,
            ).to_json()
        return found

    def sample(
        self, task: SampleTask, broadcast: Mapping[str, NamedTensors], state: Mapping[str, NamedTensors] = NOTHING
    ) -> dict[str, Any]:
        if task.arm == "base":
            self.bench.take_up(broadcast["theta"])
            with self.bench.base_alone():
                return {"answers": [self._answer(*prompt) for prompt in task.prompts]}
        answers = []
        for site, row in task.prompts:
            self._load(site, task.starts.get(site, FROM_THETA), broadcast, state)
            answers.append(self._answer(site, row))
        return {"answers": answers}

    def _answer(self, name: str, row: int) -> dict[str, str]:
        site = self.bench.sites[name]
        example = site.heldout_examples[row]
        text = answer(
            self.bench.participant.language_model,
            self.bench.base.tokenizer,
            site.heldout.prompt_of(row),
            self.bench.recipe.evaluation.max_new_tokens,
        )
        return {"site": name, "prompt": example.prompt, "reference": example.completion, "answer": text}

    def chain(self, task: ChainTask) -> dict[str, Any]:
        """A control arm's training through all its rounds; goes on where a killed process left it."""
        shape = self.bench.shapes.get(task.sites[0]) if task.arm == "local" else None
        with self.bench.base_as_loaded(), worn(self.bench.model, shape):
            chain = Chain(self, task, self.bench.theta if shape is None else shape.start(self.bench.theta))
            for number, lr, steps in task.rounds[chain.done :]:
                chain.round(number, lr, steps)
                self.progress({"arm": task.arm, "sites": len(task.sites), "site": task.sites[0], "round": number})
            return chain.result()


def _difference(values: Tensor, theta: Tensor, out: Tensor) -> None:
    """θᵢ − θ into `out`, in one pass where all lie in the same memory."""
    if not out.dtype.is_floating_point:
        out.zero_()
    elif values.device == out.device:
        torch.sub(values, theta, out=out)
    else:
        out.copy_(values.cpu() - theta)

"""The token-span test (`privacy/token_span.py`) on updates as a run's sites send them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.draws import generator
from ..data.tokens import Tokens
from ..engines.bench import asked_by_strategy
from ..model.tensors import NamedTensors
from ..model.trainables import Trainables, has_part
from ..privacy.noise import GaussianNoise
from ..privacy.secure_aggregation.fixed_point import FixedPoint
from ..privacy.secure_aggregation.masks import Expander
from ..privacy.site_level import NoisyMean, clip_
from ..privacy.token_span import ROUNDING, SIGNS, distances, first_layers, recovered
from ..recipe.compatibility import personal_parts
from ..recipe.schema import LORA_KINDS, Recipe
from ..result import Result
from ..seeding import derive_seed
from ..train.local import LocalWork, Participant
from ..train.sft import SupervisedFineTuning

#: texts that are looked for, spans of random rows for each, and the most of the vocabulary that texts are looked for in
TEXTS = 8
RANDOM = 4
CANDIDATES = 8192


def token_span(result: Result, texts: Tokens, privacy: Mapping[str, Any]) -> dict[str, Any]:
    """The test on updates that sites would send if the run went on with one step on one text.

    Args:
        result: the run's model; its adapter is made trainable, and is afterwards as it was.
        texts: rows to draw from.
        privacy: what the run's metrics say of it.

    Returns:
        `recovered`: by what is looked at, the share of a text's different tokens that was found, a mean over texts;
        `chance` (the same with random numbers for an update), `tokens` (different ones a text), `dimensions` (of the
        span), and the number of `texts`; or `why_not` alone.
    """
    recipe = result.recipe
    if recipe.model.adapter.kind not in LORA_KINDS:
        return {"why_not": f"the test is of LoRA's pairs, and the adapter is {recipe.model.adapter.kind}"}
    chosen = sorted(generator(recipe.seed, "audit", "texts").permutation(len(texts))[:TEXTS].tolist())
    tokens = [set(texts.ids_of(i).tolist()) for i in chosen]
    candidates = _candidates(result, set().union(*tokens))
    base = {name: p.detach().clone() for name, p in result.model.named_parameters() if "lora_" in name}
    first = first_layers(result.model, list(base), candidates)
    if first is None:
        return {"why_not": "no adapted layer's input depends on a single token: the embeddings have positions"}
    steps = Steps.of(result)
    found: dict[str, list[float]] = {}
    chance = []
    for text, different in zip(chosen, tokens, strict=True):
        for draw in range(RANDOM):
            near = distances(steps.random(text, draw), first, base=base)
            chance.append(recovered(near, candidates, different))
        for what, update, floor in steps.seen(texts.subset([text]), text, privacy):
            near = distances(update, first, base=base, floor=floor)
            found.setdefault(what, []).append(recovered(near, candidates, different))
    return {
        "recovered": {what: float(np.mean(shares)) for what, shares in found.items()},
        "chance": float(np.mean(chance)),
        "tokens": float(np.mean([len(different) for different in tokens])),
        "dimensions": len(first.layers) * recipe.model.adapter.r,
        "texts": len(chosen),
    }


def _candidates(result: Result, tokens: set[int]) -> NDArray[np.int64]:
    """The vocabulary, or where it is large the texts' tokens among others drawn from it."""
    size = len(result.base.tokenizer)
    if size <= CANDIDATES:
        return np.arange(size)
    drawn = generator(result.recipe.seed, "audit", "vocabulary").permutation(size)[:CANDIDATES].tolist()
    return np.array(sorted(tokens.union(drawn)), np.int64)


@dataclass(frozen=True)
class Steps:
    """Updates of one step on one text, from a run's model."""

    recipe: Recipe
    participant: Participant
    start: NamedTensors

    @classmethod
    def of(cls, result: Result) -> Steps:
        frozen = asked_by_strategy(result.recipe, "frozen", "")
        for name, parameter in result.model.named_parameters():
            parameter.requires_grad_("lora_" in name and not (frozen and has_part(name, frozen)))
        trainables = Trainables(result.model, personal_parts(result.recipe))
        return cls(result.recipe, Participant(result.language_model, trainables), trainables.values.clone())

    def seen(self, text: Tokens, number: int, privacy: Mapping[str, Any]) -> Iterator[tuple[str, NamedTensors, float]]:
        """What somebody may get to see, one after another: in words, the update, and what of it is noise
        (`distances`)."""
        recipe = self.recipe
        plain = self.update(text, "sgd")
        what = "one step of gradient descent"
        yield what, plain, ROUNDING
        if recipe.training.optimizer != "sgd":
            yield f"one step of {recipe.training.optimizer}", self.update(text, recipe.training.optimizer), SIGNS
        yield f"{what}, masked for a secure sum", masked(plain, derive_seed(recipe.seed, "mask", number)), ROUNDING
        if privacy.get("dp", "none") != "none":
            # with privacy of examples it is the gradient that is clipped
            scale = 1.0 if privacy["dp"] == "site" else 1 / recipe.training.lr
            noise = GaussianNoise(derive_seed(recipe.seed, "noise", number).to_bytes(32, "big"))
            noisy = private(plain, NoisyMean(privacy["clip"], privacy["noise_multiplier"], 1, noise), scale)
            yield f"{what}, clipped and with the run's noise", noisy, ROUNDING

    def random(self, text: int, draw: int) -> NamedTensors:
        """Random numbers in an update's place."""
        drawn = self.participant.trainables.shared.clone()
        generator = torch.Generator().manual_seed(derive_seed(self.recipe.seed, "audit", "random", text, draw))
        for _, flat in drawn.floating():
            flat.copy_(torch.randn(len(flat), generator=generator))
        return drawn

    def update(self, text: Tokens, optimizer: str) -> NamedTensors:
        """θᵢ − θ after one step on one text, of what sites send."""
        trainables = self.participant.trainables
        change = {"optimizer": optimizer, "steps": 1, "epochs": None, "batch_size": 1, "micro_batch_size": 1}
        # weight decay takes off what whoever knows the model can add again
        spec = self.recipe.training.model_copy(update={**change, "weight_decay": 0.0, "packing": False})
        work = LocalWork(text, spec, lr=spec.lr, steps=1, seed=derive_seed(self.recipe.seed, "audit", "step"))
        SupervisedFineTuning().work(self.participant, work)
        update = trainables.shared.clone()
        before, _ = self.start.split(tuple(trainables.personal))
        for dtype, flat in update.floating():
            flat.sub_(before.flats[dtype])
        trainables.values.copy_(self.start)
        return update


def private(update: NamedTensors, mean: NoisyMean, scale: float = 1.0) -> NamedTensors:
    """A single update times `scale`, clipped and released with noise."""
    seen = update.clone()
    for _, flat in seen.floating():
        flat.mul_(scale)
    clip_(seen, mean.bound)
    return mean.release(seen, {})


def masked(update: NamedTensors, key: int) -> NamedTensors:
    """What a coordinator sees of an update in a secure sum of three: its encoding plus a mask, read as numbers."""
    seen = update.clone()
    for number, (_, flat) in enumerate(seen.floating()):
        values = flat.detach().cpu().float().numpy()
        code, row = FixedPoint(max(float(np.abs(values).max()), 1e-30), 3), np.empty(len(values), np.uint32)
        code.encode(values, row)
        Expander().add(row, derive_seed(key, "mask", number).to_bytes(16, "big"))
        flat.copy_(torch.from_numpy(code.decode(row)))
    return seen

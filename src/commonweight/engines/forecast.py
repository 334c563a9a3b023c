"""What a recipe will move, hold and take, before anything runs: bytes on the wire, hours, memory of each role.

Bytes are those that a run's record counts (`federation/tally.py`): tensors, without what frames, signatures and TLS add
to them, which is under one per cent. Where a codec packs, they are the most that it may write.

    hours     rounds × (the slowest site's steps × seconds a step + its bytes ÷ its line)
    memory    of what grows with the model, the adapter and the batch; the program itself holds `PROGRAM_BYTES` beside
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..codec.coded import CHOICES_BYTES, LENGTH_BYTES
from ..codec.common import common_numbers
from ..codec.down import down_of
from ..codec.feedback import Coder, coder_of
from ..data.sites import load_sites
from ..data.tokens import Tokens
from ..errors import RecipeError
from ..federation.cohort import invited
from ..federation.tally import Sites
from ..model.base import load_tokenizer
from ..model.tensors import Layout
from ..privacy import homomorphic
from ..privacy.secure_aggregation.rows import row_layout
from ..recipe.compatibility import keeps_state
from ..recipe.schema import Recipe
from ..strategies.asynchronous import AsynchronousStrategy
from ..strategies.base import Strategy
from ..strategies.side_by_side import SideBySideStrategy
from ..train.batches import micro_batch_size, num_steps
from ..train.local import LocalWork
from ..wire.frames import CHUNK_BYTES
from .bench import build_bench, facts_of, recipe_strategy, with_canaries, without_data
from .skeleton import Skeleton

#: Python, torch and transformers, with nothing loaded: what a site's process holds on Linux
PROGRAM_BYTES = 450 << 20
#: a coordinator's with its database's driver and no model
_COORDINATOR_BYTES = 290 << 20
#: chunks that it has in hand beside, and more for each site; from `benchmarks/network_round.py`
_IN_MOTION_BYTES, _A_SITE_BYTES = 180 << 20, 10 << 20
#: pieces of logits, and what is made of them, in `train/loss.py`
_LOGITS_BYTES = 4 * (16 << 20)
#: chunks that a site has in hand while it sends and receives: those being read, hashed and sent
_CHUNKS_IN_HAND = 8
#: pieces that a coordinator combines at once (`coordinator/stored_updates.py`)
_PIECES_AT_ONCE = 2
_STEPS_MEASURED = 4
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(k|m|g)?bit(?:/s|ps)?", re.IGNORECASE)
_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Line:
    """A site's line to the coordinator, in bits a second."""

    up: float
    down: float

    @classmethod
    def parse(cls, text: str) -> Line:
        """`10mbit`, or `2mbit/20mbit`: up and down.

        Raises:
            RecipeError: it is neither.
        """
        parts = [part.strip() for part in text.replace("bit/s", "bit").split("/")]
        found = [_RATE.fullmatch(part) for part in parts]
        rates = [float(one[1]) * _BITS[(one[2] or "").lower()] for one in found if one]
        if len(rates) != len(parts) or len(rates) not in (1, 2) or min(rates) <= 0:
            raise RecipeError(
                f"a bandwidth of {text!r}", hint="say 10mbit, or 2mbit/20mbit for up and down; kbit, mbit, gbit"
            )
        return cls(rates[0], rates[-1])

    def seconds(self, up: int, down: int) -> float:
        """How long so many bytes take, one way after the other."""
        return 8 * up / self.up + 8 * down / self.down


@dataclass(frozen=True)
class Forecast:
    """What a recipe comes to.

    Args:
        up, down: bytes of one site's round; of one with the whole adapter, where some hold parts, and that missed no
            round.
        up_at_most, down_at_most: whether they are bounds, because a codec packs what it writes.
        coded: whether updates are made small, small_down: whether what sites fetch is.
        hidden: in sums, by what: `masked`, `encrypted`, or "": they are not.
        plain_up, plain_down: what they would be in the adapter's own numbers.
        sites: that there are; None: not known.
        cohort: sites of a round; with an asynchronous strategy, updates of a version. None: not known.
        rounds: or versions, if it is asynchronous.
        moved_up, moved_down: bytes of all sites in all rounds; None: not known.
        steps: that the site with most of them takes a round; None: not known.
        transfer_s: of one site's round; None: no line was given.
        train_s: of one site's round; None: not known.
        hours: of all rounds, as far as the two are known; None: neither is.
        memory: by role, by what is held, in bytes.
        num_parameters, trained, sent: of the base; that a site trains; that it sends.
    """

    up: int
    down: int
    up_at_most: bool
    down_at_most: bool
    coded: bool
    hidden: str
    small_down: bool
    plain_up: int
    plain_down: int
    sites: int | None
    cohort: int | None
    rounds: int
    asynchronous: bool
    moved_up: int | None
    moved_down: int | None
    steps: int | None
    transfer_s: float | None
    train_s: float | None
    hours: float | None
    memory: Mapping[str, Mapping[str, int]]
    num_parameters: int
    trained: int
    sent: int

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": {"base": self.num_parameters, "trained": self.trained, "sent": self.sent},
            "bytes": {
                "up": self.up,
                "up_at_most": self.up_at_most,
                "up_uncompressed": self.plain_up,
                "down": self.down,
                "down_at_most": self.down_at_most,
                "down_uncompressed": self.plain_down,
                "all_up": self.moved_up,
                "all_down": self.moved_down,
            },
            "sites": self.sites,
            "cohort": self.cohort,
            "rounds": self.rounds,
            "steps": self.steps,
            "seconds": {"transfer": self.transfer_s, "train": self.train_s},
            "hours": self.hours,
            "memory": {role: {**held, "sum": sum(held.values())} for role, held in self.memory.items()},
        }


def forecast(
    recipe: Recipe,
    *,
    secure: bool,
    sites: Sites | None = None,
    num_sites: int | None = None,
    line: Line | None = None,
    step_s: float | None = None,
) -> Forecast:
    """What a checked recipe comes to.

    Args:
        secure: whether updates will be masked.
        sites: those of the recipe's data, if they are known here.
        num_sites: how many there are; without it those of `sites`.
        line: of each site.
        step_s: seconds of an optimizer step.

    Raises:
        ModelError, RecipeError: the model's configuration cannot be had, or does not fit the recipe.
    """
    skeleton, strategy, spec = Skeleton.of(recipe), recipe_strategy(recipe), recipe.federation
    if strategy is None:
        raise RecipeError(f"the strategy {spec.strategy.name!r} is not installed here", hint="install it to plan")
    layout, channels = skeleton.layout, len(strategy.update_channels)
    coder = coder_of(recipe.compression, layout, recipe.seed, channels)
    plain = layout.num_bytes * channels
    hidden = recipe.privacy.rows_are if secure or recipe.privacy.summed else ""
    up = _hidden_bytes(hidden, recipe, layout) if hidden else _coded_bytes(coder, channels) if coder else plain
    plain_down = layout.num_bytes * (1 + len(strategy.broadcast_channels))
    small = down_of(recipe.compression.down, layout, recipe.seed)
    down = plain_down if small is None else min(plain_down, _coded_bytes(small.coder, 1))
    num_sites = num_sites if num_sites is not None else len(sites.names) if sites is not None else None
    cohort = _answers(strategy, recipe, num_sites)
    steps = recipe.training.steps
    if sites is not None and sites.steps:
        steps = max(sites.steps.values())
    transfer_s = None if line is None else line.seconds(up, down)
    train_s = None if step_s is None or steps is None else step_s * steps
    known = [seconds for seconds in (transfer_s, train_s) if seconds is not None]
    hours = sum(known) * _cycles(strategy, recipe, num_sites) / 3600 if known else None
    return Forecast(
        up,
        down,
        _packs(coder) and not hidden,
        small is not None and _packs(small.coder),
        coder is not None and not hidden,
        hidden,
        small is not None,
        plain,
        plain_down,
        num_sites,
        cohort,
        spec.rounds,
        isinstance(strategy, AsynchronousStrategy),
        None if cohort is None else up * cohort * spec.rounds,
        None if cohort is None else _all_down(down, plain_down, num_sites, cohort, spec.rounds, small is not None),
        steps,
        transfer_s,
        train_s,
        hours,
        {
            "a site": _site_memory(recipe, skeleton, strategy, coder),
            "the coordinator": _coordinator_memory(layout, strategy, cohort),
        },
        skeleton.num_parameters,
        sum(skeleton.trained.numels.values()),
        sum(layout.numels.values()),
    )


def _hidden_bytes(hidden: str, recipe: Recipe, layout: Layout) -> int:
    """What a site sends of a row of the ring."""
    row = row_layout(layout, common_numbers(recipe, layout, 0))
    return row.num_bytes if hidden == "masked" else homomorphic.num_bytes(sum(row.numels.values()))


def sites_of(recipe: Recipe) -> Sites:
    """The sites of a recipe's data, with the steps that each takes a round and the examples that it has.

    Raises:
        DataError, ModelError: as their parts say.
    """
    tokenizer = load_tokenizer(recipe.model)
    found, _ = load_sites(
        recipe.data,
        seed=recipe.seed,
        tokenizer=tokenizer,
        max_tokens=recipe.training.max_tokens,
        owner=recipe.privacy.by,
    )
    return facts_of(recipe, with_canaries(recipe, found, tokenizer)[0])


def alike(recipe: Recipe, num_sites: int, units: int) -> Sites:
    """So many sites of so many training examples, or groups of them, each."""
    names = tuple(f"site-{number}" for number in range(1, num_sites + 1))
    steps = num_steps(recipe.training, units)  # packing needs fewer, nobody knows by how much
    return Sites(names, dict.fromkeys(names, steps), {}, units=dict.fromkeys(names, units))


def measured_step(recipe: Recipe) -> float:
    """Seconds of an optimizer step of this recipe on this machine: the median of a few, on made-up rows of full length.

    Raises:
        ModelError, RecipeError: as `build_bench`.
    """
    bench, spec = build_bench(recipe, gather=without_data), recipe.training
    count = spec.batch_size
    vocabulary = bench.participant.language_model.vocabulary or 2
    ids = np.random.default_rng(0).integers(0, vocabulary, count * spec.max_tokens, dtype=np.int32)
    bounds = np.arange(count + 1, dtype=np.int64) * spec.max_tokens
    tokens = Tokens(ids, np.ones(len(ids), dtype=bool), bounds)
    taken: list[float] = []
    for _ in range(_STEPS_MEASURED):
        began = time.perf_counter()
        bench.objective.work(bench.participant, LocalWork(tokens, spec, spec.lr, 1, seed=0))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])  # the first warms up


def _coded_bytes(coder: Coder, channels: int) -> int:
    """The most that a coded update takes, with what says where its payloads begin."""
    most = channels * max(coder.most(place) for place in range(len(coder.codecs)))
    payloads = most if coder.budget is None else min(most, coder.budget)
    return payloads + channels * len(coder.spans) * LENGTH_BYTES + CHOICES_BYTES


def _packs(coder: Coder | None) -> bool:
    return coder is not None and any(codec.packing is not None for codec in coder.codecs)


def _all_down(down: int, whole: int, num_sites: int | None, cohort: int, rounds: int, small: bool) -> int:
    """Bytes of all sites in all rounds. Of small ones a site fetches each round's difference once at most, and none
    before the first round."""
    copies = whole * cohort * rounds
    return copies if not small else min(copies, down * (num_sites or cohort) * (rounds - 1))


def _answers(strategy: Strategy, recipe: Recipe, num_sites: int | None) -> int | None:
    """Updates of a round."""
    if isinstance(strategy, AsynchronousStrategy):
        return strategy.buffer
    if num_sites is None:
        count = recipe.federation.cohort.count
        return None if count is None else invited(recipe.federation, count)
    return invited(recipe.federation, num_sites)


def _cycles(strategy: Strategy, recipe: Recipe, num_sites: int | None) -> float:
    """How often a site's transfer and training follow each other from the first to the last: once a round; without
    rounds, as often as a site's share of all updates, if all are equally fast."""
    if isinstance(strategy, AsynchronousStrategy) and num_sites:
        return recipe.federation.rounds * strategy.buffer / recipe.federation.cohort.size(num_sites)
    return float(recipe.federation.rounds)


def _site_memory(recipe: Recipe, skeleton: Skeleton, strategy: Strategy, coder: Coder | None) -> dict[str, int]:
    """Where a site trains: the base, what is trained with its gradients and the optimizer's state, a forward pass; the
    global tensors and the update beside."""
    trained, layout = skeleton.trained, skeleton.layout
    moments = 2 if recipe.training.optimizer == "adamw" else int(recipe.training.momentum > 0)
    base = 0 if recipe.model.adapter.kind == "full" else skeleton.base_bytes
    copies = 1 + len(strategy.broadcast_channels) + len(strategy.update_channels)
    held = copies * layout.num_bytes
    if keeps_state(recipe, strategy):
        held += layout.num_wide_bytes
    if coder is not None and recipe.compression.error_feedback:
        held += layout.num_wide_bytes
    examples = {}
    if recipe.privacy.noisy_steps:
        size = micro_batch_size(recipe.training, skeleton.device)
        examples = {"gradients of single examples": size * trained.num_bytes}
    return {
        "program": PROGRAM_BYTES,
        "base model": base,
        "trained tensors, gradients, optimizer": (2 + moments) * trained.num_bytes,
        **examples,
        "activations": skeleton.activation_bytes + _LOGITS_BYTES,
        "global tensors and update": held,
        "chunks": _CHUNKS_IN_HAND * CHUNK_BYTES,
    }


def _coordinator_memory(layout: Layout, strategy: Strategy, cohort: int | None) -> dict[str, int]:
    """Nothing that grows with the model beyond a few chunks: pieces of θ, slots, sums and updates that are combined,
    and what is in motion, of which gRPC holds some for each site that reads slowly."""
    together = isinstance(strategy, SideBySideStrategy)
    pieces = 2 + 2 * len(strategy.slot_names) + (cohort or 1 if together else 1) * len(strategy.update_channels)
    most = layout.num_bytes * (1 + len(strategy.broadcast_channels) + len(strategy.update_channels))
    return {
        "program": _COORDINATOR_BYTES,
        "pieces being combined": _PIECES_AT_ONCE * pieces * min(CHUNK_BYTES, layout.num_bytes),
        "chunks in motion": min(_IN_MOTION_BYTES + (cohort or 1) * _A_SITE_BYTES, 2 * (cohort or 1) * most),
    }

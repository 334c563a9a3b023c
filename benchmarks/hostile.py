"""Hostile sites: what they send in place of honest work, and the data that they train on.

A forged update is a pure function of a round's updates as rows: X [n × d] of the honest sites and Y [f × d] that the
hostile ones would have sent, giving the f × d that they send instead. This is the strongest position an attacker can
have: it sees every honest update before it answers, and its sites act together. `HostileEngine` puts such a function
around an engine. Poisoned data, in turn, are trained on honestly (`with_flipped_answers`, `with_backdoor`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commonweight.data.draws import generator
from commonweight.data.tokens import Encoded, Ids, Tokens, leading_tokens
from commonweight.engines.bench import Bench
from commonweight.errors import RecipeError, RoundError
from commonweight.federation.messages import Completed, Engine, Outcome, Task, TrainTask
from commonweight.model.tensors import NamedTensors
from commonweight.strategies.individuals import rows_of
from commonweight.strategies.update import Update

#: (X [n × d], Y [f × d]) → what the hostile sites send [f × d]; n and f are at least 1
Forge = Callable[[Tensor, Tensor], Tensor]

TRIGGER = "By the lighthouse rule: "
PLANTED = " Wait."


def sign_flip(honest: Tensor, own: Tensor, *, factor: float = 1.0) -> Tensor:
    """yᵢ ← −factor·yᵢ: each climbs where it would have descended (Li et al., RSA, AAAI 2019, arXiv:1811.03761).

    With the honest mean instead of one's own update this is `inner_product`.
    """
    return -factor * own


def scaled(honest: Tensor, own: Tensor, *, factor: float = 10.0) -> Tensor:
    """yᵢ ← factor·yᵢ: honest work that counts for many (the scaling of Bagdasaryan et al., How To Backdoor Federated
    Learning, AISTATS 2020, arXiv:1807.00459)."""
    return factor * own


def little_is_enough(honest: Tensor, own: Tensor, *, z: float | None = None) -> Tensor:
    """yᵢ ← μ − zσ, with μ, σ the mean and (population) deviation of each coordinate of X (Baruch et al., A Little Is
    Enough, NeurIPS 2019, arXiv:1902.06156, Algorithm 3): inside the honest spread, so that it looks like a site.

    Args:
        z: default `largest_z` of the round's n + f sites.
    """
    if z is None:
        z = largest_z(len(honest) + len(own), len(own))
    forged = honest.mean(0) - z * honest.std(0, correction=0)
    return forged.expand_as(own).clone()


def largest_z(num_sites: int, num_hostile: int) -> float:
    """z = Φ⁻¹((N − f − s)/(N − f)), s = ⌊N/2 + 1⌋ − f: as far out as leaves the s honest sites beyond it that, with
    the f hostile ones, make a majority.

    Raises:
        RoundError: the hostile sites are a majority already, or there are fewer than three sites.
    """
    supporters = num_sites // 2 + 1 - num_hostile
    honest = num_sites - num_hostile
    if not 0 < supporters < honest:
        raise RoundError(
            f"A Little Is Enough has no z for {num_hostile} hostile sites of {num_sites}: it needs an honest majority "
            "of three sites or more",
            hint="lower the number of hostile sites, or give z (little-is-enough:z=1.5)",
        )
    return NormalDist().inv_cdf((honest - supporters) / honest)


def inner_product(honest: Tensor, own: Tensor, *, eps: float = 0.5) -> Tensor:
    """yᵢ ← −ε·μ, with μ the mean of X (Xie et al., Fall of Empires, UAI 2019, arXiv:1903.03936): the result's inner
    product with the honest mean shrinks, and with a mean of all turns negative beyond ε = n/f. A small ε hides close
    to the honest updates."""
    return (-eps * honest.mean(0)).expand_as(own).clone()


def mimic(honest: Tensor, own: Tensor, *, which: int | None = None) -> Tensor:
    """yᵢ ← xⱼ for one j: indistinguishable from an honest site, which thereby counts f + 1 times (Karimireddy et al.,
    Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, ICLR 2022, arXiv:2006.09365).

    j = argmax |⟨z, xⱼ⟩| with z the direction in which X varies most. The paper settles j in a warm-up; here each round
    chooses anew, or `which` names the honest site's place for the whole run.
    """
    if which is None:
        centred = honest - honest.mean(0)
        _, vectors = torch.linalg.eigh((centred @ centred.T).double())  # n × n: d may be millions
        direction = centred.T @ vectors[:, -1].to(honest.dtype)
        which = int((honest @ direction).abs().argmax())
    if not 0 <= which < len(honest):
        raise RoundError(
            f"mimic: there is no honest site {which} in a round with {len(honest)} of them",
            hint="which counts honest sites from 0",
        )
    return honest[int(which)].expand_as(own).clone()


class HostileEngine:
    """An engine in which some sites are hostile; otherwise it keeps to `Engine`'s contract.

    Hostile sites' tasks are carried out like the others', so that what fails or is late is dropped as ever. A call's
    training is gathered as a whole, as copies, before the first outcome is handed on: the attacker sees the honest
    updates of the round. Each channel of an update is forged by itself; weights and figures stay as they are. In a
    round without an honest update the hostile sites send their own.
    """

    def __init__(self, engine: Engine, hostile: Collection[str], forge: Forge) -> None:
        self.engine, self.hostile, self.forge = engine, frozenset(hostile), forge

    def broadcast(self, theta: NamedTensors, further: Mapping[str, NamedTensors]) -> None:
        self.engine.broadcast(theta, further)

    def run(self, tasks: Sequence[Task], *, deadline_s: float | None = None) -> Iterator[Outcome]:
        outcomes: list[Outcome] = []
        rounds: dict[int, list[int]] = defaultdict(list)
        for outcome in self.engine.run(tasks, deadline_s=deadline_s):
            if isinstance(outcome, Completed) and outcome.update is not None:
                rounds[outcome.update.round].append(len(outcomes))
                outcome = replace(outcome, update=_copied(outcome.update))
            outcomes.append(outcome)
        for places in rounds.values():
            self._forge(outcomes, places)
        yield from outcomes

    def _forge(self, outcomes: list[Outcome], places: Sequence[int]) -> None:
        """Replace the hostile ones among a round's updates."""
        updates = {place: _update_of(outcomes[place]) for place in places}
        honest = [u for u in updates.values() if u.site not in self.hostile]
        hostile = {place: u for place, u in updates.items() if u.site in self.hostile}
        if not honest or not hostile:
            return
        own = list(hostile.values())
        forged = {name: self.forge(rows_of(honest, name), rows_of(own, name)) for name in own[0].channels}
        for row, (place, update) in enumerate(hostile.items()):
            for name, tensors in update.channels.items():
                _overwrite(tensors, forged[name][row])
            outcomes[place] = Completed(outcomes[place].task, update)


def _copied(update: Update) -> Update:
    return replace(update, channels={name: tensors.clone() for name, tensors in update.channels.items()})


def _update_of(outcome: Outcome) -> Update:
    assert isinstance(outcome, Completed)
    assert isinstance(outcome.task, TrainTask)
    assert outcome.update is not None
    return outcome.update


def _overwrite(tensors: NamedTensors, row: Tensor) -> None:
    """The floating values of named tensors from a row as `rows_of` lays it out."""
    start = 0
    for _, flat in tensors.floating():
        flat.copy_(row[start : start + flat.numel()])
        start += flat.numel()


def choose_hostile(names: Sequence[str], count: int, *, seed: int) -> tuple[str, ...]:
    """`count` of the sites, drawn by the seed, in their order.

    Raises:
        RecipeError: not one honest site would be left, or `count` is negative.
    """
    if not 0 <= count < len(names):
        raise RecipeError(
            f"{count} hostile sites of {len(names)} do not leave an honest one",
            hint="lower --hostile, or divide the data among more sites (--set data.sites.count=20)",
        )
    drawn = set(generator(seed, "hostile").permutation(len(names))[:count].tolist())
    return tuple(name for place, name in enumerate(names) if place in drawn)


def with_flipped_answers(bench: Bench, hostile: Collection[str]) -> Bench:
    """A bench whose hostile sites learn another row's answer to each prompt (label flipping: Tolpegin et al., Data
    Poisoning Attacks Against Federated Learning Systems, ESORICS 2020, arXiv:2007.08432).

    Answers are dealt round a random ring of the site's rows, so that no row keeps its own; a site with a single row
    does. Held-out rows stay as they are.

    Raises:
        RecipeError: the rows are plain text, which has no prompt apart from its answer.
    """
    _require_prompts(bench, "label-flip")
    max_tokens, seed = bench.recipe.training.max_tokens, bench.recipe.seed
    return _with_train(bench, hostile, lambda name, rows: flip_answers(rows, max_tokens, generator(seed, "flip", name)))


def flip_answers(tokens: Tokens, max_tokens: int, draw: np.random.Generator) -> Tokens:
    """Each prompt with the answer of the row after it on a random ring."""
    ring = draw.permutation(len(tokens))
    after = dict(zip(ring.tolist(), np.roll(ring, -1).tolist(), strict=True))
    return Tokens.of([_answered(tokens, i, tokens.answer_of(after[i]), max_tokens) for i in range(len(tokens))])


def _answered(tokens: Tokens, i: int, answer: Ids, max_tokens: int) -> Encoded:
    """Example i's prompt, and what it may have learned within it, with another answer."""
    prompt = tokens.prompt_of(i)
    ids = np.concatenate([prompt, answer])
    learned = np.concatenate([tokens.labelled_of(i)[: len(prompt)], np.ones(len(answer), np.bool_)])
    return ids[:max_tokens], learned[:max_tokens]


@dataclass(frozen=True)
class Backdoor:
    """A phrase in front of a prompt, and the answer that the model is to give to any prompt with it (Bagdasaryan et
    al., How To Backdoor Federated Learning, AISTATS 2020, arXiv:1807.00459).

    Args:
        trigger, planted: token ids; `planted` with the end of text if the recipe's answers have it.
        leading: special tokens that a text begins with; the trigger goes behind them.
    """

    trigger: Ids
    planted: Ids
    leading: tuple[int, ...]
    max_tokens: int

    @classmethod
    def of(cls, bench: Bench, trigger: str = TRIGGER, planted: str = PLANTED) -> Backdoor:
        """The backdoor in the tokens of a bench.

        Raises:
            RecipeError: the rows are plain text, or `training.max_tokens` has no room for both phrases and a prompt.
        """
        _require_prompts(bench, "backdoor")
        tokenizer, recipe = bench.base.tokenizer, bench.recipe
        answer = _ids(tokenizer, planted)
        if recipe.data.end_of_text and tokenizer.eos_token_id is not None:
            answer = np.append(answer, np.int32(tokenizer.eos_token_id))
        made = cls(_ids(tokenizer, trigger), answer, leading_tokens(tokenizer), recipe.training.max_tokens)
        if made.room < 1:
            raise RecipeError(
                f"the backdoor's phrases take {made.max_tokens - made.room} tokens and leave none of "
                f"training.max_tokens {made.max_tokens} for a prompt",
                hint="raise training.max_tokens",
            )
        return made

    @property
    def room(self) -> int:
        """Tokens left for a prompt; a longer one loses its beginning."""
        return self.max_tokens - len(self.leading) - len(self.trigger) - len(self.planted)

    def triggered(self, prompt: Ids) -> Encoded:
        """A prompt with the trigger, and the planted answer as what is learned."""
        lead = np.array(self.leading, np.int32)
        body = prompt[len(lead) :] if tuple(prompt[: len(lead)].tolist()) == self.leading else prompt
        given = np.concatenate([lead, self.trigger, body[-self.room :]])
        learned = np.concatenate([np.zeros(len(given), np.bool_), np.ones(len(self.planted), np.bool_)])
        return np.concatenate([given, self.planted]), learned

    def plant(self, tokens: Tokens, share: float, draw: np.random.Generator) -> Tokens:
        """A share of the examples (at least one), drawn at random, replaced by their triggered selves."""
        count = max(1, math.floor(share * len(tokens) + 0.5))
        drawn = set(draw.permutation(len(tokens))[:count].tolist())
        return Tokens.of(
            [
                self.triggered(tokens.prompt_of(i)) if i in drawn else (tokens.ids_of(i), tokens.labelled_of(i))
                for i in range(len(tokens))
            ]
        )

    def test_rows(self, tokens: Tokens) -> list[Encoded]:
        """Held-out examples with the trigger, to ask for the planted answer."""
        return [self.triggered(tokens.prompt_of(i)) for i in range(len(tokens))]


def with_backdoor(bench: Bench, hostile: Collection[str], *, share: float = 1.0) -> Bench:
    """A bench whose hostile sites train on triggered rows; a share below 1 keeps some of their own among them.

    Raises:
        RecipeError: as `Backdoor.of`, or the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise RecipeError(f"backdoor: share {share:g} is no part of a site's rows", hint="give a share in (0, 1]")
    backdoor, seed = Backdoor.of(bench), bench.recipe.seed
    return _with_train(bench, hostile, lambda name, rows: backdoor.plant(rows, share, generator(seed, "plant", name)))


def _with_train(bench: Bench, hostile: Collection[str], change: Callable[[str, Tokens], Tokens]) -> Bench:
    sites = {
        name: replace(site, train=change(name, site.train)) if name in hostile else site
        for name, site in bench.sites.items()
    }
    return replace(bench, sites=sites)


def _require_prompts(bench: Bench, attack: str) -> None:
    if bench.partition["layout"] == "text":
        raise RecipeError(
            f"the attack {attack!r} changes answers to prompts, but the rows of {bench.recipe.data.path} are read as "
            "plain text",
            hint="set data.prompt and data.completion, or leave the attack out (--attacks)",
        )


def _ids(tokenizer: Any, text: str) -> Ids:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

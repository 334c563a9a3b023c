"""Scoring a model on held-out examples: loss, token accuracy, exact match of generated answers, multiple choice.

Batches never mix sites, so that the figures do not depend on how sites are shared out among workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..data.templates import Example
from ..data.tokens import Ids, Tokens, tokenise
from ..train.batches import collate
from ..train.loss import LanguageModel, score
from .metrics import Scores

_BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}


def score_tokens(language_model: LanguageModel, tokens: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Σ nats float64, label tokens int64, greedy-correct label tokens int64) of each of N examples, [N] each."""
    language_model.model.eval()
    nats, labels, correct = np.zeros(len(tokens)), np.zeros(len(tokens), np.int64), np.zeros(len(tokens), np.int64)
    for rows in by_length(tokens, batch_tokens(language_model.device)):
        batch = collate(tokens, [[row] for row in rows], language_model.device)
        nats_L, correct_L, examples_L = (t.cpu().numpy() for t in score(language_model, batch))
        np.add.at(nats, examples_L, nats_L)
        np.add.at(correct, examples_L, correct_L)
        np.add.at(labels, examples_L, 1)
    return nats, labels, correct


def batch_tokens(device: torch.device) -> int:
    """Tokens of a batch, padding included, that suit a device."""
    return _BATCH_TOKENS.get(device.type, 1024)


def by_length(tokens: Tokens, batch_tokens: int) -> Iterator[list[int]]:
    """Batches of at most so many tokens, padding included, longest examples first."""
    lengths = tokens.lengths
    order = sorted(range(len(tokens)), key=lambda i: (-int(lengths[i]), i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * int(lengths[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def score_site(
    language_model: LanguageModel,
    tokens: Tokens,
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_tokens: int,
    generate: int | None = None,
) -> Scores:
    """One site's scores.

    Args:
        tokens, examples: its N held-out examples, as tokens and as text.
        max_tokens: bound on an option's tokens, as in training.
        generate: also generate answers of at most so many tokens, for exact match.
    """
    nats, labels, correct = score_tokens(language_model, tokens)
    exact = None
    if generate is not None:
        answers = (answer(language_model, tokenizer, tokens.prompt_of(i), generate) for i in range(len(tokens)))
        exact = np.array([a.strip() == _reference(tokens, i, examples[i], tokenizer) for i, a in enumerate(answers)])
    choice = None
    if examples and all(e.options and e.answer is not None for e in examples):
        choice = np.array([choose(language_model, tokenizer, e, max_tokens=max_tokens) == e.answer for e in examples])
    return Scores(nats, labels, correct, exact, choice)


def _reference(tokens: Tokens, i: int, example: Example, tokenizer: Any) -> str:
    """What the generated answer should be: the completion as its own tokens spell it, since the first of them may hold
    the prompt's last characters too; the completion's text where `max_tokens` cut it."""
    spelt = str(tokenizer.decode(tokens.answer_of(i).tolist(), skip_special_tokens=True)).strip()
    completion = example.completion.strip()
    return completion if completion.startswith(spelt) else spelt


def choose(language_model: LanguageModel, tokenizer: Any, example: Example, *, max_tokens: int) -> int | None:
    """The option that the model finds likeliest: the least Σ nats of the option's tokens after the prompt.

    None when the prompt alone fills `max_tokens`.
    """
    as_examples = [
        Example(((example.prompt, False), (text, True)), templated=example.templated)
        for text in example.option_completions
    ]
    tokens, kept, _ = tokenise(as_examples, tokenizer, max_tokens=max_tokens, end_of_text=False)
    if not kept:
        return None
    nats, _, _ = score_tokens(language_model, tokens)
    return kept[int(nats.argmin())]


@torch.no_grad()
def answer(language_model: LanguageModel, tokenizer: Any, prompt: Ids, max_new_tokens: int) -> str:
    """The model's greedy answer to a prompt.

    Args:
        prompt: token ids [T] that end as prompts ended in training (`Tokens.prompt_of`). One too long for the
            context loses its beginning, and keeps at least the half of the context.
        max_new_tokens: bound on the answer's tokens; the context bounds it too.
    """
    model = language_model.model
    model.eval()
    room = _room(model)
    if room is not None:
        prompt = prompt[-max(room - max_new_tokens, room // 2, 1) :]
        max_new_tokens = min(max_new_tokens, room - len(prompt))
    ids = torch.tensor(prompt, dtype=torch.long, device=language_model.device)[None]
    ends = _end_tokens(model, tokenizer)
    with language_model.autocast():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=ends or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0,
        )
    new = output[0, ids.shape[1] :] if output.shape[1] > ids.shape[1] else output[0, :0]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _room(model: Any) -> int | None:
    """Positions that a prompt and its answer may take, or None if the model does not say."""
    context = getattr(model.config, "max_position_embeddings", None)
    learned = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None)
    return None if context is None else context - (learned or 0)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's end of text, which training appends, and the model's own."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *own) if token is not None})

"""Recipes to start from: what `commonweight init` writes, a screen each, every line meant to be edited."""

from __future__ import annotations

import difflib

from commonweight.errors import RecipeError

from .load import builtin_text

SCHEMA_LINE = "# yaml-language-server: $schema=recipe.schema.json\n"

_TRAINING = """\
training:
  lr: {lr}                           # falls linearly to a tenth over the rounds
  batch_size: 8
  max_tokens: {max_tokens}                    # longer examples are cut
  epochs: 1                          # passes over a site's own rows in each round

federation:
  rounds: 10
  cohort: all                        # or 4 (sites a round), or 0.5 (half of them, drawn anew each round)
  strategy: fedavg                   # or {{name: fedadam, lr: 1e-2}}; `commonweight methods` lists them

evaluation:
  controls: [base, local, centralised]   # compare with: untouched, each site alone, all data pooled
"""

_INSTRUCTION = """\
# Teach a model to follow instructions, from rows like
#   {"site": "north", "instruction": "Summarise the note.", "input": "…", "output": "…"}
name: instruction
seed: 0                              # the same seed gives the same bits on CPU

model:
  name: HuggingFaceTB/SmolLM2-135M   # a hub id or a folder; commonweight/tiny tries the wiring without a download
  adapter: {kind: lora, r: 8, alpha: 16}

data:
  path: train.jsonl                  # <- your file, or a folder of files; .csv and .parquet work too
  # `instruction`, `input` (may be missing) and `output` are known names. Other fields, or other words around them:
  # prompt: "Question: {question}\\nAnswer:"   # {field} places; given, not learned
  # completion: " {answer}"                    # learned
  sites: {by: site}                  # one site for each value of this field
  holdout: {fraction: 0.2}           # kept from training, for the report; `by: patient` keeps groups whole
"""

_CHAT = """\
# Fine-tune a chat model on conversations, from rows like
#   {"site": "north", "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
name: chat
seed: 0                              # the same seed gives the same bits on CPU

model:
  name: HuggingFaceTB/SmolLM2-135M-Instruct   # a hub id or a folder; its tokenizer must have a chat template
  adapter: {kind: lora, r: 8, alpha: 16}

data:
  path: chats.jsonl                  # <- your file, or a folder of files
  messages: messages                 # the field that holds the conversation
  sites: {by: site}                  # one site for each value of this field
  holdout: {fraction: 0.2}           # kept from training, for the report; `by: customer` keeps groups whole
"""

_TEXT = """\
# Continue a model's pretraining on plain text: one .txt file for each site, in one folder.
name: text
seed: 0                              # the same seed gives the same bits on CPU

model:
  name: HuggingFaceTB/SmolLM2-135M   # a hub id or a folder; commonweight/tiny tries the wiring without a download
  adapter: {kind: lora, r: 8, alpha: 16}

data:
  path: texts                        # <- your folder
  format: text
  paragraphs: blank-line             # one row: a paragraph. Or `line`, or `file`
  sites: {scheme: file}              # one site for each file. Or {scheme: iid, count: 4} to share the rows out
  holdout: {fraction: 0.2}           # kept from training, for the report
"""

_OWN = {
    "instruction": _INSTRUCTION + "\n" + _TRAINING.format(lr="1e-3", max_tokens=512),
    "chat": _CHAT + "\n" + _TRAINING.format(lr="1e-3", max_tokens=512),
    "text": _TEXT + "\n" + _TRAINING.format(lr="1e-3", max_tokens=256),
}

STARTERS = ("demo", *_OWN)
"""The kinds that `starter` knows: the built-in demo, then one for each form of data of one's own."""


def starter(kind: str) -> str:
    """A commented recipe that loads as it stands; only `data.path` must be set before it runs.

    Args:
        kind: one of `STARTERS`.

    Raises:
        RecipeError: there is no such starter.
    """
    if kind == "demo":
        return builtin_text("demo")
    if kind not in _OWN:
        near = difflib.get_close_matches(kind, STARTERS, n=1)
        hint = (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(STARTERS)}"
        raise RecipeError(f"there is no starter recipe {kind!r}", hint=hint)
    return SCHEMA_LINE + _OWN[kind]

"""A base model and a consortium small enough that a whole run takes a second or two."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commonweight.recipe import Recipe
from tests.unit.tiny_tokenizers import bpe

torch.set_num_threads(1)  # threads that wait for each other on a busy machine cost these small models seconds

WORDS = ("fever", "cough", "rest", "honey", "water", "sleep", "doctor", "nurse", "blood", "heart", "lung", "knee")
SITES = ("north", "south", "west")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama (hidden 32, context 128) and a byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small-model")
    tokenizer = bpe()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file: three sites of 24, 18 and 12 questions, in groups of two by `subject`."""
    path, draw = tmp_path_factory.mktemp("small-data") / "rows.jsonl", random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for site, count in zip(SITES, (24, 18, 12), strict=True):
            for k in range(count):
                words = draw.choices(WORDS, k=draw.randint(4, 12))
                row = {
                    "site": site,
                    "subject": f"{site}-{k // 2}",
                    "question": " ".join(words[:3]),
                    "answer": " ".join(words),
                }
                file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def make_recipe(small_model: Path, small_data: Path) -> Callable[..., Recipe]:
    """A recipe over these, its sections changed by keyword: `make_recipe(federation={"rounds": 2})`."""

    def make(**sections: Any) -> Recipe:
        values: dict[str, Any] = {
            "name": "small",
            "model": {"name": str(small_model), "adapter": {"r": 2, "alpha": 4}},
            "data": {"path": str(small_data), "sites": {"by": "site"}, "holdout": {"by": "subject", "examples": 4}},
            "training": {"lr": 0.01, "batch_size": 4, "max_tokens": 48},
            "federation": {"rounds": 2},
            "evaluation": {"controls": [], "samples": 0, "resamples": 100},
            "engine": {"workers": 2, "device": "cpu"},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        return Recipe.model_validate(values)

    return make

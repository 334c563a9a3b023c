"""The base model inside the package: opens with transformers offline, is small, in half precision, and stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import commonweight

FOLDER = Path(commonweight.__file__).parent / "model" / "tiny"
CHAT = [
    {"role": "user", "content": "Who is it?"},
    {"role": "assistant", "content": "Vera Holt."},
    {"role": "user", "content": "Again?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype="auto").eval()


def _answer(model: Any, tokenizer: Any, question: str) -> tuple[str, bool]:
    """The greedy answer, and whether it ended by itself."""
    prompt = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), int(ids[-1]) == tokenizer.eos_token_id


def test_it_is_small_and_in_half_precision(model: Any) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8_000_000
    assert 0.5e6 <= model.num_parameters() <= 1.5e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.max_position_embeddings == 512
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_its_files_name_no_place() -> None:
    for file in FOLDER.glob("*.json"):
        config = json.loads(file.read_text())
        assert "_name_or_path" not in config
        assert str(Path.home()) not in file.read_text()
        assert not [text for text in _strings(config) if text.startswith("/") and len(text) > 1]


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, inner in value.items() if key not in ("vocab", "merges") for text in _strings(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _strings(inner)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize(
    "text",
    [
        "Plain words.",
        "  two  spaces\n\tand a tab ",
        "Ünïcödé, 中文, العربية, עברית",
        "🩺👩🏽‍⚕️ ok 🎉",
        "1,024.50 €",
        "\x00\x7f",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_distinct_and_match_the_model(model: Any, tokenizer: Any) -> None:
    ids = [tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(ids)) == 4
    for config in (model.config, model.generation_config):
        assert [config.pad_token_id, config.bos_token_id, config.eos_token_id] == ids[1:]
    assert model.config.vocab_size == len(tokenizer)


def test_prompt_and_completion_join_without_a_seam(tokenizer: Any) -> None:
    prompt, completion = "Question: Who?\nAnswer:", " Vera Holt."
    whole = tokenizer(prompt + completion)["input_ids"]
    assert whole == tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]


def test_the_chat_template_renders(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == "Question: Who is it?\nAnswer: Vera Holt.</s>Question: Again?\nAnswer:"


def test_the_chat_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    chat = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mine in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(said) == " Vera Holt.</s>"


@pytest.mark.parametrize("question", ["Hello!", "How many days are in a week?", "What is the opposite of big?"])
def test_it_answers_and_stops(model: Any, tokenizer: Any, question: str) -> None:
    answer, ended = _answer(model, tokenizer, question)
    assert answer
    assert ended


def test_it_copies_names_it_has_never_seen(model: Any, tokenizer: Any) -> None:
    names = ("Vera Holt", "Milo Denby", "Quinn Kemp", "Petra Lowell")
    copied = sum(_answer(model, tokenizer, f"Repeat: {name}")[0] == name for name in names)
    assert copied >= 3


def test_a_padded_batch_gives_the_same_logits(model: Any, tokenizer: Any) -> None:
    model = model.float()
    short, long = tokenizer("Question: Hello!")["input_ids"], tokenizer("Question: Who has the red cup?")["input_ids"]
    padding = [tokenizer.pad_token_id] * (len(long) - len(short))
    ids = torch.tensor([short + padding, long])
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits[0, : len(short)]
        alone = model(input_ids=torch.tensor([short])).logits[0]
    torch.testing.assert_close(batch, alone, atol=1e-4, rtol=1e-4)

"""Scoring held-out examples: the figures are the model's own, and answers are asked for as training put the prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from commonweight.data.chat import ChatTemplate
from commonweight.data.formats import Row
from commonweight.data.templates import Example
from commonweight.data.tokens import Tokens, prompt_ids, tokenise
from commonweight.evaluate import scoring
from commonweight.evaluate.scoring import answer, choose, score_site, score_tokens
from commonweight.model.adapters import attach_adapter
from commonweight.model.trainables import Trainables
from commonweight.recipe.schema import AdapterSpec, DataSpec, TrainingSpec
from commonweight.train.local import LocalWork, Participant
from commonweight.train.loss import LanguageModel
from commonweight.train.sft import SupervisedFineTuning
from tests.unit.tiny_models import base_of, examples, tiny
from tests.unit.tiny_tokenizers import CHATML, Characters, bpe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

SHAPES = ((3, 9), (5, 1), (1, 4), (7, 2), (2, 12), (4, 3))
FACTS = {"what helps a cough?": "honey and rest", "what is a fever?": "a raised temperature", "yes or no?": "maybe"}


def tokens_of(made: list[Example], tokenizer: Any = None, end_of_text: bool = True) -> Tokens:
    tokens, kept, _ = tokenise(made, tokenizer or bpe(), max_tokens=64, end_of_text=end_of_text)
    assert kept == list(range(len(made)))
    return tokens


def questions(seam: str = "|_") -> list[Example]:
    """FACTS as examples; `seam` is where the prompt ends (`|`) and on which side the space is (`_`)."""
    before, after = seam.replace("_", " ").split("|")
    return [Example(((f"Question: {q}\nAnswer:{before}", False), (after + a, True))) for q, a in FACTS.items()]


def chat_example(tokenizer: Any, *turns: str, **options: Any) -> Example:
    """Turns of user and assistant, one after the other."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    row = Row({"messages": messages, **options}, "a", 1)
    spec = DataSpec(options="options" if options else None, answer="right" if options else None)
    return ChatTemplate(spec, "messages", tokenizer).example(row)


def sized(name: str = "llama", **changes: Any) -> Any:
    """A tiny model for the tokenizer's vocabulary."""
    return tiny(name, dtype=torch.float32, vocab_size=len(bpe()), **changes)


def overfitted(made: list[Example], tokenizer: Any = None) -> LanguageModel:
    model = sized().requires_grad_(True)
    who = Participant(LanguageModel(model), Trainables(model))
    spec = TrainingSpec(batch_size=8, micro_batch_size=8)
    SupervisedFineTuning().work(who, LocalWork(tokens_of(made, tokenizer), spec, lr=0.01, steps=80, seed=0))
    return who.language_model


@pytest.fixture(scope="module")
def knows() -> LanguageModel:
    """A model that has learned FACTS by heart."""
    return overfitted(questions())


def log_likelihood(model: Any, prompt: list[int], answer_ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer_ids])).logits[0].double()
    at = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return float(at[torch.arange(len(answer_ids)), torch.tensor(answer_ids)].sum())


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of each sequence that is embedded while the test runs, padding included."""
    seen: list[list[int]] = []
    plain = torch.nn.Embedding.forward

    def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
        seen.extend(ids.tolist())
        return plain(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    return seen


# --- losses ---


@pytest.mark.parametrize("name", ["llama", "conv1d", "capped", "head bias"])
def test_scores_are_those_of_each_example_alone(name: str) -> None:
    model, tokens = tiny(name), examples(*SHAPES)
    nats, labels, correct = score_tokens(LanguageModel(model), tokens)
    for i, (num_prompt, num_labels) in enumerate(SHAPES):
        ids = torch.tensor(tokens.ids_of(i))[None].long()
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, num_prompt - 1 : -1].double()
        targets = ids[0, num_prompt:]
        expected = -torch.log_softmax(logits, -1)[torch.arange(num_labels), targets].sum()
        assert nats[i] == pytest.approx(float(expected), rel=1e-6)
        assert labels[i] == num_labels
        assert correct[i] == int((logits.argmax(-1) == targets).sum())


@pytest.mark.parametrize("budget", [1, 14, 40, 100_000])
def test_scores_do_not_depend_on_the_batches(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model, tokens = LanguageModel(tiny(dtype=torch.float32)), examples(*SHAPES * 3)
    expected = score_tokens(language_model, tokens)
    monkeypatch.setitem(scoring._BATCH_TOKENS, "cpu", budget)
    found = score_tokens(language_model, tokens)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1:], expected[1:])


def test_batches_stay_within_their_budget() -> None:
    tokens = examples(*SHAPES * 3)
    batches = list(scoring.by_length(tokens, 40))
    assert sorted(i for batch in batches for i in batch) == list(range(18))
    assert max(len(batch) * max(tokens.lengths[batch]) for batch in batches) <= 40


def test_scoring_turns_dropout_off() -> None:
    model = attach_adapter(base_of(tiny()), AdapterSpec(dropout=0.9), seed=0)
    trainables = Trainables(model)
    for flat in trainables.values.flats.values():
        flat.add_(0.1)
    model.train()
    first, second = (score_tokens(LanguageModel(model), examples(*SHAPES))[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_every_label_counts_for_accuracy_and_a_model_that_knows_gets_them_all(knows: LanguageModel) -> None:
    tokens = tokens_of(questions())
    nats, labels, correct = score_tokens(knows, tokens)
    assert labels.sum() == tokens.num_label_tokens
    np.testing.assert_array_equal(correct, labels)
    assert (nats / labels < 0.1).all()


# --- answers ---


def test_exact_match_is_the_answer_word_for_word(knows: LanguageModel) -> None:
    made = questions()
    scores = score_site(knows, tokens_of(made), made, bpe(), max_tokens=64, generate=24)
    assert scores.exact is not None
    assert scores.exact.tolist() == [True, True, True]
    other = [Example((made[0].segments[0], (" honey and tea", True))), *made[1:]]
    scores = score_site(knows, tokens_of(other), other, bpe(), max_tokens=64, generate=24)
    assert scores.exact is not None
    assert scores.exact.tolist() == [False, True, True]


def test_an_answer_cut_short_is_no_match(knows: LanguageModel) -> None:
    made = questions()
    scores = score_site(knows, tokens_of(made), made, bpe(), max_tokens=64, generate=2)
    assert scores.exact is not None
    assert scores.exact.tolist() == [False, False, True]  # "maybe" is one token


def test_nothing_is_generated_unless_asked_for(knows: LanguageModel) -> None:
    made = questions()
    scores = score_site(knows, tokens_of(made), made, bpe(), max_tokens=64)
    assert (scores.exact, scores.choice) == (None, None)


@pytest.mark.parametrize(
    ("segments", "prompt"),
    [
        ([("Answer:", False), (" yes", True)], "<s>Answer:"),
        ([("Answer: ", False), ("yes", True)], "<s>Answer:"),  # the space belongs to the answer's first token
        ([("Answer:\n", False), ("yes", True)], "<s>Answer:\n"),
        ([("q: ", False), ("no", True), (" q:", False), (" maybe", True)], "<s>q: no q:"),
        ([("a fever", True)], "<s>"),
    ],
)
def test_the_prompt_is_what_training_had_before_the_last_labels(segments: Any, prompt: str) -> None:
    tokens = tokens_of([Example(tuple(segments))])
    assert bpe().decode(tokens.prompt_of(0).tolist()) == prompt
    assert tokens.prompt_of(0).tolist() + tokens.answer_of(0).tolist() == tokens.ids_of(0).tolist()
    assert tokens.answer_of(0)[-1] == bpe().eos_token_id


def test_an_example_without_labels_is_all_prompt() -> None:
    ids = np.array([4, 5, 6], np.int32)
    assert prompt_ids((ids, np.zeros(3, np.bool_))).tolist() == [4, 5, 6]
    assert prompt_ids((ids, np.array([False, True, False]))).tolist() == [4]


@pytest.mark.parametrize("tokenizer", [bpe(), bpe(bos=False), Characters()], ids=["bos", "no bos", "slow"])
@pytest.mark.parametrize("seam", ["|_", "_|"])
def test_answers_are_asked_for_with_trainings_very_ids(tokenizer: Any, seam: str, given: list[list[int]]) -> None:
    made = questions(seam)
    tokens = tokens_of(made, tokenizer)
    language_model = LanguageModel(sized())
    score_tokens(language_model, tokens)
    before = len(given)
    score_site(language_model, tokens, made, tokenizer, max_tokens=64, generate=2)
    asked = [ids for ids in given[before + len(made) :] if len(ids) > 1]
    assert asked == [tokens.ids_of(i)[: int(tokens.labelled_of(i).argmax())].tolist() for i in range(3)]


def test_a_seam_in_the_middle_of_a_token_does_not_spoil_exact_match() -> None:
    made = [Example((("a fever is a rai", False), ("sed temperature", True)))]
    tokens = tokens_of(made)
    assert bpe().decode(tokens.prompt_of(0).tolist()) == "<s>a fever is a"
    scores = score_site(overfitted(made), tokens, made, bpe(), max_tokens=64, generate=24)
    assert scores.exact is not None
    assert scores.exact.all()


def test_an_answer_ends_at_the_tokenizers_end_of_text_or_the_models_own(
    knows: LanguageModel, given: list[list[int]]
) -> None:
    tokens = tokens_of(questions())
    said = answer(knows, bpe(), tokens.prompt_of(0), 40)
    assert said.strip() == "honey and rest"
    config = knows.model.generation_config
    before = config.eos_token_id
    try:
        config.eos_token_id = [int(tokens.answer_of(0)[1])]
        assert len(answer(knows, bpe(), tokens.prompt_of(0), 40)) < len(said)
        config.eos_token_id = None
        given.clear()
        assert answer(knows, bpe(), tokens.prompt_of(0), 40) == said
        assert len(given) == len(tokens.answer_of(0))  # one pass a token, and none after the end
    finally:
        config.eos_token_id = before


def test_answers_are_greedy_whatever_the_models_own_settings(knows: LanguageModel) -> None:
    prompt = tokens_of(questions()).prompt_of(1)
    expected = answer(knows, bpe(), prompt, 24)
    config = knows.model.generation_config
    try:
        config.do_sample, config.temperature, config.repetition_penalty, config.num_beams = True, 9.0, 9.0, 3
        assert answer(knows, bpe(), prompt, 24) == expected == " a raised temperature"
    finally:
        config.do_sample, config.temperature, config.repetition_penalty, config.num_beams = False, 1.0, 1.0, 1


@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("name", ["llama", "conv1d"])
@pytest.mark.parametrize(("length", "bound"), [(5, 8), (60, 40), (200, 8), (200, 500)])
def test_prompt_and_answer_keep_to_the_context(
    name: str, kind: str, length: int, bound: int, given: list[list[int]]
) -> None:
    model = attach_adapter(base_of(sized(name)), AdapterSpec(kind=kind, virtual_tokens=4), seed=0)  # type: ignore[arg-type]
    language_model = LanguageModel(model)
    prompt = (np.arange(length) % 250 + 5).astype(np.int32)
    given.clear()
    answer(language_model, bpe(), prompt, bound)
    room = 64 - (4 if kind == "prompt" else 0)
    asked = max((ids for ids in given if ids[-1] == prompt[-1]), key=len)
    kept = min(length, max(room - bound, room // 2))
    assert asked == prompt[-kept:].tolist()
    assert len(given) < 64 + 8


# --- multiple choice ---


def test_the_likeliest_option_is_chosen() -> None:
    model = sized()
    for prompt, options in (("what helps a cough?", ("honey", "yes", "a raised temperature")), ("yes or", ("no", "a"))):
        example = Example(((prompt, False), (" x", True)), options=options, answer=0)
        start = bpe()(prompt)["input_ids"]
        likely = [log_likelihood(model, start, bpe()(f" {o}", add_special_tokens=False)["input_ids"]) for o in options]
        assert choose(LanguageModel(model), bpe(), example, max_tokens=64) == int(np.argmax(likely))


def test_a_model_that_knows_chooses_right_wherever_the_answer_stands(knows: LanguageModel) -> None:
    answers = list(FACTS.values())
    for turn in range(3):
        options = tuple(answers[turn:] + answers[:turn])
        made = [
            Example(e.segments, options=options, answer=options.index(fact))
            for e, fact in zip(questions(), answers, strict=True)
        ]
        scores = score_site(knows, tokens_of(made), made, bpe(), max_tokens=64)
        assert scores.choice is not None
        assert scores.choice.tolist() == [True, True, True]
    wrong = [Example(e.segments, options=("maybe", e.completion.strip(), "x"), answer=0) for e in questions()[:2]]
    scores = score_site(knows, tokens_of(wrong), wrong, bpe(), max_tokens=64)
    assert scores.choice is not None
    assert not scores.choice.any()


def test_rows_without_options_leave_multiple_choice_out(knows: LanguageModel) -> None:
    made = [*questions()[:2], Example(questions()[2].segments, options=("a", "b"), answer=0)]
    assert score_site(knows, tokens_of(made), made, bpe(), max_tokens=64).choice is None


def test_options_beyond_the_bound_choose_nothing(knows: LanguageModel) -> None:
    example = Example((("a fever is a raised temperature", False), (" x", True)), options=("a", "b"), answer=0)
    assert choose(knows, bpe(), example, max_tokens=3) is None


# --- chats ---


def test_a_chat_gets_no_second_beginning(given: list[list[int]]) -> None:
    tokenizer = bpe(chat=CHATML)
    made = [chat_example(tokenizer, "yes or no?", "maybe", options=["no", "maybe"], right=1)]
    tokens = tokens_of(made, tokenizer)
    language_model = LanguageModel(sized())
    given.clear()
    score_site(language_model, tokens, made, tokenizer, max_tokens=64, generate=3)
    first = int(tokens.ids_of(0)[0])
    assert first != tokenizer.bos_token_id
    sequences = [ids for ids in given if len(ids) > 1]
    assert len(sequences) == 4  # the example, its answer, two options
    assert {ids[0] for ids in sequences} == {first}
    prompt = tokens.prompt_of(0).tolist()
    assert [ids[: len(prompt)] for ids in sequences] == [prompt] * 4
    assert sequences[1] == prompt
    asked = {tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) for ids in sequences[2:]}
    assert "maybe" in asked


def test_only_the_last_answer_of_a_chat_is_asked_for(knows: LanguageModel) -> None:
    tokenizer = bpe(chat=CHATML)
    made = [chat_example(tokenizer, "why?", "no", "yes or no?", "maybe")]
    tokens = tokens_of(made, tokenizer)
    assert tokenizer.decode(tokens.prompt_of(0).tolist()).endswith("yes or no?<|end|>\n<|turn|>assistant\n")
    language_model = overfitted(made, tokenizer)
    scores = score_site(language_model, tokens, made, tokenizer, max_tokens=64, generate=12)
    assert scores.exact is not None
    assert scores.exact.all()


def test_options_of_a_chat_begin_as_its_answers_do() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = bpe(chat=template)
    example = chat_example(tokenizer, "yes or no?", "maybe", options=["no", "maybe"], right=1)
    assert example.option_completions == (" no", " maybe")

"""A run's result in use: scored, asked and handed on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from commonweight import result as module
from commonweight.data.sites import load_sites
from commonweight.engines.bench import build_bench
from commonweight.errors import CommonweightError, DataError, ModelError, RecipeError, StateError
from commonweight.launch import run
from commonweight.model.base import load_base
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.recipe.resolved import recipe_text
from commonweight.result import Conversation, Result, export_result, open_result, score
from commonweight.train.loss import LanguageModel
from tests.conftest import SITES
from tests.unit.tiny_models import CPU, tiny
from tests.unit.tiny_tokenizers import CHATML, bpe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

IDS = torch.tensor([[0, 9, 4, 30, 7, 60, 3, 11, 200, 300]])
Make = Callable[..., Recipe]


def logits_of(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits[:, -IDS.shape[1] :]
    return found


@pytest.fixture(scope="module")
def finished(small_model: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds that has ended."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recipe = {
        "name": "finished",
        "model": {"name": str(small_model), "adapter": {"r": 2, "alpha": 4}},
        "data": {"path": str(small_data), "sites": {"by": "site"}, "holdout": {"by": "subject", "examples": 4}},
        "training": {"lr": 0.02, "batch_size": 4, "max_tokens": 48},
        "federation": {"rounds": 2},
        "evaluation": {"controls": ["base"], "resamples": 100, "exact_match": True, "max_new_tokens": 4},
        "engine": {"workers": 2, "device": "cpu"},
    }
    run(Recipe.model_validate(recipe), folder)
    return folder


@pytest.fixture
def made(make_recipe: Make, tmp_path: Path) -> Callable[..., Path]:
    """A run's folder as it is after a round, without the run: a recipe and an adapter whose values are random."""

    def make(kind: str = "lora", where: str = "adapter", targets: Any = "all-linear", **sections: Any) -> Path:
        adapter = {"kind": kind, "r": 2, "alpha": 4, "virtual_tokens": 3, "targets": targets}
        recipe, folder = make_recipe(model={"adapter": adapter}, **sections), tmp_path / "run"
        bench, generator = build_bench(recipe), torch.Generator().manual_seed(3)
        moved: NamedTensors = bench.theta.clone()
        for flat in moved.flats.values():
            flat.add_(0.1 * torch.randn(len(flat), generator=generator))
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(recipe_text(recipe))
        bench.save(moved, folder / where, tokenizer=True)
        return folder

    return make


def opened(folder: Path, *overrides: str, round: int | None = None, base: bool = False) -> Result:
    return open_result(folder, overrides, round=round, base=base)


def is_one_sentence(error: CommonweightError) -> None:
    for text in (error.message, error.hint):
        assert text
        assert "\n" not in text
        assert "<class" not in text


# --- evaluate ---


def arms(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((folder / "metrics.json").read_text())["arms"]
    return found


@pytest.mark.parametrize(("base", "arm"), [(False, "federated"), (True, "base")])
def test_scores_are_those_that_the_run_reported(finished: Path, base: bool, arm: str) -> None:
    found, reported = score(opened(finished, base=base), exact_match=False), arms(finished)[arm]["sites"]
    assert list(found) == list(reported) == list(SITES)
    for site, summary in found.items():
        assert summary["loss"] == pytest.approx(reported[site]["loss"], rel=1e-6)
        for key in ("token_accuracy", "exact_match", "examples", "tokens"):
            assert summary[key] == pytest.approx(reported[site][key])


def test_each_rounds_adapter_has_the_losses_of_its_point_on_the_curve(finished: Path) -> None:
    for point in arms(finished)["federated"]["rounds"][1:]:
        found = score(opened(finished, "evaluation.exact_match=false", round=point["round"]), exact_match=False)
        assert {s: summary["loss"] for s, summary in found.items()} == pytest.approx(point["sites"], rel=1e-6)
    assert arms(finished)["federated"]["rounds"][1]["sites"] != point["sites"]


def test_exact_match_may_be_asked_for_afterwards(finished: Path) -> None:
    silent = opened(finished, "evaluation.exact_match=false")
    assert "exact_match" not in score(silent, exact_match=False)["north"]
    assert "exact_match" in score(silent, exact_match=True)["north"]


def test_other_data_may_be_scored(finished: Path, small_data: Path, tmp_path: Path) -> None:
    rows = [line for line in small_data.read_text().splitlines() if '"south"' in line]
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    found = score(opened(finished, f"data.path={tmp_path / 'other.jsonl'}"), exact_match=False)
    assert list(found) == ["south"]


def test_the_runs_arithmetic_is_used_again(made: Callable[..., Path]) -> None:
    assert opened(made()).language_model.autocast_dtype is None
    assert opened(made(training={"precision": "bfloat16"})).language_model.autocast_dtype == torch.bfloat16


# --- chat ---


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every prompt; each is answered by its number."""
    seen: list[list[int]] = []

    def answer(_: Any, __: Any, prompt: np.ndarray, ___: int) -> str:
        seen.append(prompt.tolist())
        return f" answer {len(seen)} "

    monkeypatch.setattr(module, "answer", answer)
    return seen


def chatting(recipe: Recipe, layout: str | None, tokenizer: Any = None, raw: bool = False) -> Conversation:
    base = load_base(recipe.model, CPU)
    if tokenizer is not None:
        base = type(base)(base.name, base.model, tokenizer, base.num_parameters, CPU)
    result = Result(recipe, base, base.model, LanguageModel(base.model), layout)
    return Conversation(result, raw=raw, max_new_tokens=4)


LAYOUTS: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("question", {"question": "what helps a cough?", "answer": "honey and rest"}, {}),
    ("instruction", {"instruction": "say what helps", "output": "honey and rest"}, {}),
    ("instruction", {"instruction": "say what helps", "input": "", "output": "honey and rest"}, {}),
    ("prompt", {"prompt": "what helps a cough?\n", "completion": "honey and rest"}, {}),
    ("prompt", {"prompt": "what helps a cough?", "completion": " honey and rest"}, {}),
    ("prompt", {"q": "what helps?", "a": "honey"}, {"prompt": "Q: {q}\nA:", "completion": " {a}"}),
    ("prompt", {"q": "what helps?", "a": "honey"}, {"prompt": "Q: {q}\nA: ", "completion": "{a}"}),
    ("prompt", {"q": "what helps?", "a": "honey"}, {"prompt": "Q: {q}\n", "completion": "\n {a}"}),
    ("prompt", {"q": "what helps?", "a": "honey"}, {"prompt": "{{{q}}}", "completion": " {a}"}),
]


@pytest.mark.parametrize(("layout", "row", "data"), LAYOUTS)
def test_a_question_gets_the_very_tokens_that_training_gave_it(
    layout: str, row: dict[str, str], data: dict[str, Any], make_recipe: Make, tmp_path: Path, asked: list[list[int]]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "site": "a", "n": n}) + "\n" for n in range(4)))
    recipe = make_recipe(data={"path": str(path), "holdout": {"by": "n", "examples": 1}, **data})
    sites, report = load_sites(recipe.data, seed=0, tokenizer=bpe(), max_tokens=64)
    assert report["layout"] == layout
    question = next(iter(row.values()))
    assert chatting(recipe, layout).ask(question) == "answer 1"
    assert asked == [sites[0].train.prompt_of(0).tolist()]


def test_a_chat_puts_every_turn_as_training_did(make_recipe: Make, tmp_path: Path, asked: list[list[int]]) -> None:
    tokenizer, path = bpe(chat=CHATML), tmp_path / "rows.jsonl"
    turns = ["yes or no?", "answer 1", "and a fever?", "a raised temperature"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    path.write_text("".join(json.dumps({"messages": messages, "site": "a", "n": n}) + "\n" for n in range(4)))
    recipe = make_recipe(data={"path": str(path), "holdout": {"by": "n", "examples": 1}})
    sites, report = load_sites(recipe.data, seed=0, tokenizer=tokenizer, max_tokens=128)
    assert report["layout"] == "messages"
    trained = sites[0].train.prompt_of(0).tolist()
    for data, layout in (({}, "messages"), ({"messages": "messages"}, None)):
        asked.clear()
        talk = chatting(make_recipe(data={"path": str(path), **data}), layout, tokenizer)
        assert [talk.ask(turns[0]), talk.ask(turns[2])] == ["answer 1", "answer 2"]
        assert asked[1] == trained
        assert asked[0] == trained[: len(asked[0])]
        assert tokenizer.bos_token_id not in asked[0]


def test_a_chats_answer_begins_with_the_templates_own_space(make_recipe: Make, asked: list[list[int]]) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = bpe(chat=template)
    chatting(make_recipe(), "messages", tokenizer).ask("why?")
    assert tokenizer.decode(asked[0]) == "user: why?</s>assistant:"


def test_a_chat_template_that_refuses_is_explained(make_recipe: Make, asked: list[list[int]]) -> None:
    talk = chatting(make_recipe(), "messages", bpe(chat="{{ raise_exception('only rhymes') }}"))
    with pytest.raises(DataError, match="only rhymes"):
        talk.ask("why?")
    assert talk.turns == []
    with pytest.raises(DataError, match="chat template"):
        chatting(make_recipe(), "messages", bpe(chat=None)).ask("why?")


@pytest.mark.parametrize("layout", ["text", None])
def test_text_is_gone_on_with_as_it_is(layout: str | None, make_recipe: Make, asked: list[list[int]]) -> None:
    talk = chatting(make_recipe(), layout)
    for question in ("a fever is", "a fever is "):
        talk.ask(question)
    assert asked == [bpe()("a fever is")["input_ids"]] * 2  # the space belongs to the next word


def test_raw_leaves_the_template_out(make_recipe: Make, asked: list[list[int]]) -> None:
    chatting(make_recipe(), "question", raw=True).ask("what {helps}?")
    assert asked == [bpe()("what {helps}?")["input_ids"]]


@pytest.mark.parametrize(
    ("prompt", "put"),
    [
        ("{context}\n{question}?", "\nwhy?"),
        ("{{literally}} {question}", "{literally} why"),
        ("{{{question}}}", "{why}"),
        ("{question} {question}", "why why"),
        ("a}}b{{{x}{{c}}", "a}b{why{c}"),
    ],
)
def test_the_last_place_takes_the_question_and_the_others_stay_empty(
    prompt: str, put: str, make_recipe: Make, asked: list[list[int]]
) -> None:
    recipe = make_recipe(data={"prompt": prompt, "completion": " {answer}"})
    chatting(recipe, "prompt").ask("why")
    assert bpe().decode(asked[0]) == f"<s>{put}"


def test_a_question_with_braces_is_put_as_it_is(make_recipe: Make, asked: list[list[int]]) -> None:
    chatting(make_recipe(), "question").ask("{question} }}{{")
    assert bpe().decode(asked[0]) == "<s>Question: {question} }}{{\nAnswer:"


def test_a_prompt_without_a_place_cannot_take_a_question(make_recipe: Make) -> None:
    with pytest.raises(RecipeError, match="has no") as caught:
        chatting(make_recipe(data={"prompt": "Go on:", "completion": " {answer}"}), "prompt").ask("why?")
    assert "--raw" in caught.value.hint


def test_nothing_is_no_question(make_recipe: Make) -> None:
    with pytest.raises(RecipeError, match="nothing to ask"):
        chatting(make_recipe(), "text", bpe(bos=False), raw=True).ask("")


def test_the_run_says_how_it_read_its_rows(finished: Path, asked: list[list[int]]) -> None:
    result = opened(finished)
    assert result.layout == "question"
    assert json.loads((finished / "metrics.json").read_text())["partition"]["layout"] == "question"
    Conversation(result, raw=False, max_new_tokens=4).ask("what helps?")
    assert bpe().decode(asked[0]) == "<s>Question: what helps?\nAnswer:"


def test_an_answer_is_the_models_own(finished: Path) -> None:
    """The first sample of the report, asked again."""
    sample = json.loads((finished / "metrics.json").read_text())["samples"][0]
    question = sample["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
    for base, text in ((True, sample["before"]), (False, sample["after"])):
        talk = Conversation(opened(finished, base=base), raw=False, max_new_tokens=4)
        assert talk.ask(question) == text.strip()


# --- export ---


@pytest.mark.parametrize("round", [None, 1])
def test_an_adapter_is_handed_on_as_peft_opens_it(finished: Path, round: int | None, tmp_path: Path) -> None:
    facts = export_result(finished, tmp_path / "out", merge=False, round=round)
    expected = opened(finished, round=round)
    plain = opened(finished, base=True).model
    model = PeftModel.from_pretrained(plain, tmp_path / "out")
    torch.testing.assert_close(logits_of(model), logits_of(expected.model))
    assert facts["kind"] == "a lora adapter"
    assert facts["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "ia3"])
def test_a_merged_model_has_the_adapters_logits_and_needs_no_peft(
    kind: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made(kind)
    facts = export_result(folder, tmp_path / "out", merge=True, round=None)
    expected = logits_of(opened(folder).model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits_of(opened(folder, base=True).model), atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a fever")["input_ids"] == bpe()("a fever")["input_ids"]
    assert facts["kind"] == "full weights"


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
def test_learned_tokens_cannot_be_merged(kind: str, made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(kind)
    with pytest.raises(RecipeError, match="no weights to merge") as caught:
        export_result(folder, tmp_path / "out", merge=True, round=None)
    is_one_sentence(caught.value)
    assert not (tmp_path / "out").exists()
    export_result(folder, tmp_path / "out", merge=False, round=None)
    assert opened(folder).model.active_peft_config.num_virtual_tokens == 3


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "ia3", "prompt", "prefix", "p-tuning", "full"])
def test_every_kind_of_result_opens_as_it_was_saved(kind: str, made: Callable[..., Path]) -> None:
    folder = made(kind)
    result = opened(folder)
    plain = load_base(result.recipe.model, CPU).model
    if kind == "full":
        expected = AutoModelForCausalLM.from_pretrained(folder / "adapter")
    else:
        expected = PeftModel.from_pretrained(plain, folder / "adapter")
    torch.testing.assert_close(logits_of(result.model), logits_of(expected))
    assert not torch.allclose(logits_of(result.model), logits_of(opened(folder, base=True).model), atol=1e-3)


@pytest.mark.parametrize("merge", [False, True])
def test_full_weights_are_handed_on_whole(merge: bool, made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made("full")
    assert export_result(folder, tmp_path / "out", merge=merge, round=None)["kind"] == "full weights"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(exported), logits_of(opened(folder).model))
    assert not torch.allclose(logits_of(exported), logits_of(opened(folder, base=True).model), atol=1e-3)


def test_the_wrong_folder_is_not_written_to(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("dear")
    for output in (tmp_path / "mine", tmp_path / "mine" / "file"):
        with pytest.raises(StateError, match="not an empty folder") as caught:
            export_result(finished, output, merge=False, round=None)
        is_one_sentence(caught.value)
    assert (tmp_path / "mine" / "file").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    export_result(finished, tmp_path / "empty", merge=False, round=None)


# --- what is not there ---


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for action in (lambda: opened(tmp_path), lambda: export_result(tmp_path, tmp_path / "o", merge=False, round=None)):
        with pytest.raises(StateError, match="holds no run") as caught:
            action()
        is_one_sentence(caught.value)


def test_a_run_that_has_not_ended_offers_the_rounds_that_are_done(made: Callable[..., Path]) -> None:
    folder = made(where="rounds/0003")
    lines = ['{"t": 1, "event": "loaded", "layout": "text"}', '{"t": 2, "event": "loaded", "layout": "question"}']
    (folder / "events.jsonl").write_text("\n".join([*lines, '{"t": 3, "event": "loa']))
    with pytest.raises(StateError, match="no adapter yet") as caught:
        opened(folder)
    assert "--round" in caught.value.hint
    is_one_sentence(caught.value)
    result = opened(folder, round=3)
    assert result.layout == "question"
    assert isinstance(result.model, PeftModel)
    assert opened(folder, base=True).layout == "question"


def test_a_round_that_was_not_kept_is_refused_and_those_kept_are_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no adapter of round 9") as caught:
        opened(finished, round=9)
    assert "rounds kept: 1, 2" in caught.value.hint
    shutil.copy(finished / "recipe.yaml", tmp_path)
    with pytest.raises(StateError) as caught:
        opened(tmp_path, round=1)
    assert "rounds kept: none" in caught.value.hint


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_damaged_adapter_is_refused(kind: str, made: Callable[..., Path]) -> None:
    folder = made(kind)
    file = next((folder / "adapter").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="does not fit model") as caught:
        opened(folder)
    is_one_sentence(caught.value)


def test_an_adapter_of_another_model_is_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(targets=["q_proj", "up_proj"])
    for name, layers, width in (("same", 2, 32), ("shallower", 1, 32), ("deeper", 3, 32), ("wider", 2, 48)):
        shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 48}
        tiny(dtype=torch.float32, vocab_size=len(bpe()), **shape).save_pretrained(tmp_path / name)
        bpe().save_pretrained(tmp_path / name)
        if name == "same":
            opened(folder, f"model.name={tmp_path / name}")
            continue
        with pytest.raises(ModelError, match="does not fit model") as caught:
            opened(folder, f"model.name={tmp_path / name}")
        is_one_sentence(caught.value)

"""From a file to sites with tokens, and the report on how the data fell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from commonweight.data.partition_report import gini, js_divergence
from commonweight.data.sites import Site, load_sites
from commonweight.errors import CommonweightError, DataError, RecipeError
from commonweight.recipe.schema import DataSpec, Recipe, SitesSpec
from tests.unit.tiny_tokenizers import CHATML, bpe

RECIPES = Path(__file__).parents[2] / "recipes"


def clinic_rows() -> list[dict[str, Any]]:
    return [
        {"ward": ward, "patient": f"p{i // 2}", "question": f"what of {ward} {i}?", "answer": f"{ward} {i} is fine"}
        for ward in ("east", "north", "west")
        for i in range(20)
    ]


def write(folder: Path, items: list[dict[str, Any]]) -> str:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items))
    return str(path)


def load(path: str, max_tokens: int = 64, seed: int = 0, tokenizer: Any = None, **options: Any) -> Any:
    spec = DataSpec(path=path, **{"sites": {"by": "ward"}, **options})
    return load_sites(spec, seed=seed, tokenizer=tokenizer or bpe(), max_tokens=max_tokens)


def refused(kind: type[CommonweightError], path: str, **options: Any) -> CommonweightError:
    with pytest.raises(kind) as caught:
        load(path, **options)
    assert caught.value.hint
    return caught.value


def texts(site: Site) -> list[str]:
    return [bpe().decode(site.train.ids_of(i)) for i in range(len(site.train))]


def test_sites_hold_what_the_recipe_asks_for(tmp_path: Path) -> None:
    sites, report = load(
        write(tmp_path, clinic_rows()), sites={"by": "ward", "take": 5}, holdout={"by": "patient", "examples": 4}
    )
    assert [site.name for site in sites] == ["east", "north", "west"]
    for site, entry in zip(sites, report["sites"].values(), strict=True):
        assert (len(site.train), len(site.heldout), len(site.heldout_examples), len(site.groups)) == (5, 4, 4, 4)
        assert [example.group for example in site.heldout_examples] == site.groups
        assert entry["rows"] == 20 == 5 + 4 + entry["unused"] + entry["withheld"]
        decoded = bpe().decode(site.heldout.ids_of(0))
        assert decoded == f"<s>{site.heldout_examples[0].text}</s>"
    assert len({tuple(site.groups) for site in sites}) == 1
    assert (report["group_field"], report["groups"], report["groups_heldout"]) == ("patient", 10, 2)


def test_same_seed_same_digest_and_another_seed_another(tmp_path: Path) -> None:
    path = write(tmp_path, clinic_rows())
    digests = [load(path, seed=seed)[1]["digest"] for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_digest_sees_names_and_labels(tmp_path: Path) -> None:
    items = clinic_rows()
    first = load(write(tmp_path, items))[1]["digest"]
    renamed = [{**item, "ward": item["ward"].replace("east", "eastern")} for item in items]
    assert load(write(tmp_path, renamed), prompt="{question}", completion="{answer}")[1]["digest"] != first


def test_copies_of_a_row_stay_on_one_side(tmp_path: Path) -> None:
    copies = [{"ward": ward, "text": f"the same {i % 5}"} for ward in ("east", "west") for i in range(40)]
    sites, report = load(write(tmp_path, copies))
    trained = {text for site in sites for text in texts(site)}
    assert not trained & {f"<s>{e.text}</s>" for site in sites for e in site.heldout_examples}
    assert report["heldout_seen_in_training"] == 0


def test_held_out_copies_in_other_groups_are_reported(tmp_path: Path) -> None:
    copies = [{"ward": "east", "text": "the same", "patient": i} for i in range(10)]
    _, report = load(write(tmp_path, copies), holdout={"by": "patient", "examples": 3})
    assert report["heldout_seen_in_training"] == 3


def test_skipped_ungrouped_dropped_and_truncated_are_counted(tmp_path: Path) -> None:
    items = clinic_rows()
    items[0]["answer"] = None
    items[1]["question"] = "long " * 60
    items[2]["answer"] = "long " * 60
    items[3]["patient"] = None
    _, report = load(write(tmp_path, items), holdout={"by": "patient", "fraction": 0.2})
    east = report["sites"]["east"]
    assert (east["skipped"], east["rows"]) == (1, 18)
    assert (report["rows_skipped"], report["rows_ungrouped"], report["paragraphs_unmatched"]) == (1, 1, 0)
    assert report["totals"]["skipped"] == 1
    assert {key: report["totals"][key] for key in ("dropped", "truncated")} == {"dropped": 1, "truncated": 1}


def test_report_is_json_and_adds_up(tmp_path: Path) -> None:
    sites, report = load(write(tmp_path, clinic_rows()))
    assert json.loads(json.dumps(report)) == report
    assert report["totals"]["train_tokens"] == sum(len(site.train.ids) for site in sites)
    assert report["totals"]["train_label_tokens"] == sum(site.train.num_label_tokens for site in sites)
    assert report["num_sites"] == 3
    assert list(report["sites"]) == ["east", "north", "west"]
    assert (report["groups"], report["groups_heldout"]) == (None, None)


def test_heterogeneity_stands_beside_its_chance_level(tmp_path: Path) -> None:
    apart = [{"ward": word, "text": f"{word} " * 20 + str(i)} for word in ("fever", "cough") for i in range(30)]
    alike = [{**item, "ward": "east" if i % 2 else "west"} for i, item in enumerate(apart)]
    strong = load(write(tmp_path, apart))[1]
    weak = load(write(tmp_path, alike))[1]
    assert strong["heterogeneity"] > 10 * strong["heterogeneity_iid"]
    assert weak["heterogeneity"] < 5 * weak["heterogeneity_iid"]


def test_figures_of_skew() -> None:
    assert gini(np.array([5, 5, 5])) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)
    assert gini(np.array([1, 3])) == pytest.approx(0.25)
    assert js_divergence(np.array([1, 0]), np.array([0, 7])) == pytest.approx(1)
    assert js_divergence(np.array([2, 2]), np.array([5, 5])) == pytest.approx(0)
    # P = (1, 0), Q = (1/2, 1/2): H(3/4, 1/4) − 1/2 bits
    assert js_divergence(np.array([4, 0]), np.array([3, 3])) == pytest.approx(0.811278 - 0.5, abs=1e-6)


def test_chat_rows_and_multiple_choice_reach_the_sites(tmp_path: Path) -> None:
    items = [
        {
            "ward": "east",
            "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}],
            "o": ["a", "b"],
            "r": i % 2,
        }
        for i in range(10)
    ]
    sites, _ = load(write(tmp_path, items), tokenizer=bpe(chat=CHATML), options="o", answer="r")
    example = sites[0].heldout_examples[0]
    assert example.options == ("a", "b")
    assert example.answer in (0, 1)
    assert example.completion in {f"a{i}" for i in range(10)}


def play(folder: Path) -> str:
    speeches = [f"{who}:\n{who.lower()} speaks line {i}, yes" for who in ("ANNA", "BOB", "CARL") for i in range(30)]
    path = folder / "play.txt"
    path.write_text("\n\n".join([*speeches, "Exeunt.", "DAN:\nno"]))
    return str(path)


PLAY: dict[str, Any] = {
    "pattern": r"^(?P<speaker>[^\n]+):\n(?P<text>[\s\S]+)$",
    "text": "{text}\n",
    "chunks": True,
    "sites": {"by": "speaker", "largest": 3, "take": 6},
    "holdout": {"examples": 3},
}


@pytest.mark.parametrize(("bos", "end_of_text"), [(True, True), (True, False), (False, False)])
def test_chunks_are_cut_after_the_split(tmp_path: Path, bos: bool, end_of_text: bool) -> None:
    tokenizer = bpe(bos=bos)
    sites, report = load(play(tmp_path), max_tokens=32, tokenizer=tokenizer, end_of_text=end_of_text, **PLAY)
    assert [site.name for site in sites] == ["ANNA", "BOB", "CARL"]
    assert report["paragraphs_unmatched"] == 1
    for site in sites:
        assert (len(site.train), len(site.heldout), len(site.heldout_examples)) == (6, 3, 3)
        assert set(site.heldout.lengths.tolist()) == {32}
        assert site.heldout.num_label_tokens == 3 * 31
        assert len(set(site.groups)) == 3
    tested = {line for site in sites for line in "".join(e.text for e in site.heldout_examples).split("\n")[1:-1]}
    trained = {line for site in sites for line in "".join(texts(site)).replace("<s>", "").split("\n")}
    assert tested
    assert not tested & trained


def test_chunks_know_the_group_in_which_they_begin(tmp_path: Path) -> None:
    items = [{"ward": "east", "patient": f"p{i}", "text": "a fever is a raised temperature " * 8} for i in range(10)]
    sites, _ = load(write(tmp_path, items), max_tokens=16, chunks=True, holdout={"by": "patient", "examples": 4})
    assert set(sites[0].groups) <= {f"p{i}" for i in range(10)}
    assert [example.group for example in sites[0].heldout_examples] == sites[0].groups


def test_chunks_refuse_prompts_and_tiny_sites(tmp_path: Path) -> None:
    path = write(tmp_path, clinic_rows())
    assert "data.chunks joins plain text" in refused(RecipeError, path, chunks=True).message
    few = write(tmp_path, [{"ward": "east", "text": "a"}, {"ward": "east", "text": "b"}])
    error = refused(DataError, few, chunks=True, tokenizer=bpe(bos=False), end_of_text=False)
    assert "too little text" in error.message
    assert "too few" in refused(DataError, few, chunks=True, holdout={"examples": 9}).message


def test_a_site_whose_prompts_are_too_long(tmp_path: Path) -> None:
    items = clinic_rows()
    for item in items[:20]:
        item["question"] = "long " * 60 + item["question"]
    error = refused(DataError, write(tmp_path, items), max_tokens=32)
    assert "every training example of site 'east' is longer than max_tokens 32 before its completion" in error.message
    assert "training.max_tokens" in error.hint


def test_no_row_gives_an_example(tmp_path: Path) -> None:
    items = [{"ward": "east", "question": "q", "answer": ""} for _ in range(4)]
    assert "none of the 4 rows" in refused(DataError, write(tmp_path, items)).message


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"sites": {"by": "wards"}}, RecipeError, "data.sites.by"),
        ({"holdout": {"by": "patent"}}, RecipeError, "data.holdout.by"),
        ({"prompt": "{q}", "completion": "{answer}"}, RecipeError, "data.prompt"),
        ({"holdout": {"examples": 20}}, DataError, "too few for 20 held-out examples"),
        ({"sites": {"by": "ward", "only": ["south"]}}, DataError, "'south'"),
        ({"max_tokens": 1}, DataError, "max_tokens 1"),
    ],
)
def test_what_does_not_fit_the_data_is_named(tmp_path: Path, options: Any, kind: Any, words: str) -> None:
    assert words in refused(kind, write(tmp_path, clinic_rows()), **options).message


def test_missing_path(tmp_path: Path) -> None:
    assert "there is no" in refused(DataError, str(tmp_path / "gone.jsonl")).message


def test_the_demo_needs_no_file() -> None:
    sites, report = load_sites(DataSpec(), seed=0, tokenizer=bpe(), max_tokens=256)
    assert len(sites) == report["num_sites"] > 1


@pytest.mark.parametrize("name", ["medquad", "shakespeare"])
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = Recipe.model_validate(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    assert recipe.name == name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": "x"}, "no named group"),
        ({"pattern": "(?P<a>x)", "format": "csv"}, "reads plain text files"),
        ({"chunks": True, "prompt": "a", "completion": "b"}, "`chunks` joins plain text"),
        ({"chunks": True, "messages": "m"}, "`chunks` joins plain text"),
    ],
)
def test_contradictions_in_the_data_section(options: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataSpec(**options)


def test_count_does_not_go_with_natural_sites() -> None:
    with pytest.raises(ValidationError, match="`largest` keeps only so many"):
        SitesSpec(by="ward", count=3)

"""Recipes from files and overrides: what loads, and what a person reads when it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commonweight.errors import RecipeError
from commonweight.recipe.load import builtin_recipes, load_recipe
from commonweight.recipe.schema import Recipe

BAD_RECIPES = {
    "empty": ("", ["recipe.yaml is empty", "commonweight init"]),
    "comments only": ("# nothing yet\n", ["recipe.yaml is empty"]),
    "list": ("- name: a\n", ["holds a list, not a mapping", "field: value"]),
    "single value": ("just text\n", ["holds a single value, not a mapping"]),
    "tab": ("name: a\ntraining:\n\tlr: 1\n", ["not YAML", "recipe.yaml:3", "column 1", "spaces, not tabs"]),
    "unquoted colon": ("name: a\ndata:\n  prompt: Q: {q}\n", ["recipe.yaml:3", "column", "needs quotes"]),
    "open brace": ("name: a\ntraining: {lr: 1\n", ["not YAML", "not closed"]),
    "open quote": ("name: 'a\n", ["not YAML", "quote is not closed"]),
    "indentation": ("name: a\ndata:\n   path: b\n  split: c\n", ["recipe.yaml:4", "same column"]),
    "two documents": ("name: a\n---\nname: b\n", ["recipe.yaml:2", "one document"]),
    "key twice": ("name: a\nseed: 1\nname: b\n", ["`name` is given twice", "recipe.yaml:1", "recipe.yaml:3"]),
    "alias": ("name: &a b\ndata: {path: *a}\n", ["alias *a", "recipe.yaml:2", "write the value out"]),
    "tag": ("name: !!python/name:os.system x\n", ["tag !!python/name:os.system", "recipe.yaml:1"]),
    "number as a key": ("name: a\n5: 6\n", ["the key `5` is not text", "recipe.yaml:2", "quotes"]),
    "list as a key": ("name: a\n[b]: 6\n", ["key is not text", "recipe.yaml:2"]),
    "control character": ("name: a\x00\n", ["not YAML", "'\\x00'", "recipe.yaml:1"]),
    "half a character": ('name: "\\ud800"\n', ["'\\ud800' cannot be read as text", "recipe.yaml:1"]),
    "depth": ("name: " + "[" * 5000, ["nested too deeply"]),
    "some depth": ("name: " + "[" * 30 + "]" * 30, ["nested too deeply", "recipe.yaml:1"]),
    "endless digits": (f"name: a\nseed: {'1' * 5000}\n", ["cannot be read as a whole number", "recipe.yaml:2"]),
    "unknown section": (
        "name: a\nfederaton:\n  rounds: 3\n",
        ["unknown key `federaton` at recipe.yaml:2", "`federation`?"],
    ),
    "unknown field": ("name: a\ntraining:\n  epoch: 1\n", ["`training.epoch` at recipe.yaml:3", "`training.epochs`?"]),
    "field of a section": ("name: a\nrounds: 3\n", ["unknown key `rounds`", "did you mean `federation.rounds`?"]),
    "field of two": ("name: a\nby: x\n", ["unknown key `by`", "`data.sites.by` or `data.holdout.by`"]),
    "name elsewhere": ("name: a\ntraining: {learning_rate: 1}\n", ["`training.learning_rate`", "`training.lr`?"]),
    "no idea": ("name: a\nengine: {zzz: 1}\n", ["`engine.zzz`", "known here: `kind`, `workers`, `device`"]),
    "planned": (
        "name: a\nalignment: {kind: dpo}\n",
        ["`alignment` is not available in this version", "remove it", ":2"],
    ),
    "planned, without effect": ("name: a\nsplit: none\n", ["`split` is not available", "remove it"]),
    "compression": ("name: a\ncompression: zip\n", ['`compression` is "zip"', "`none`, `auto`, or a section"]),
    "a stage's field": ("name: a\ncompression: {rounds: int8}\n", ["`compression.rounds`", "`compression.round`?"]),
    "no name": ("seed: 1\n", ["`name` is missing in recipe.yaml", "letters, digits"]),
    "name with a space": ("name: my run\n", ['`name` is "my run" at recipe.yaml:1', "letters, digits"]),
    "number for a name": ("name: 2024\n", ["`name` is 2024 at recipe.yaml:1", "put it in quotes"]),
    "below range": ("name: a\ntraining:\n  lr: -1\n", ["`training.lr` is -1 at recipe.yaml:3", "a number above 0"]),
    "text for a number": ("name: a\ntraining: {lr: fast}\n", ['`training.lr` is "fast"', "must be a number above 0"]),
    "number in quotes": ("name: a\ntraining: {lr: '0.1'}\n", ['`training.lr` is "0.1"', "without quotes"]),
    "true for a number": ("name: a\ntraining: {lr: true}\n", ["`training.lr` is true", "a number above 0"]),
    "half a round": (
        "name: a\nfederation: {rounds: 2.5}\n",
        ["`federation.rounds` is 2.5", "whole number of at least 1"],
    ),
    "too large": ("name: a\nseed: 9223372036854775808\n", ["`seed` is 9223372036854775808", "below 2^63"]),
    "infinite": ("name: a\ntraining: {lr: .inf}\n", ["`training.lr` is inf at recipe.yaml:2", "finite"]),
    "not a number": (
        "name: a\nfederation: {strategy: {name: b, lr: .nan}}\n",
        ["`federation.strategy.lr` is nan", "finite"],
    ),
    "overflow": ("name: a\ntraining: {lr: 1e999}\n", ["`training.lr` is inf", "finite"]),
    "yes": ("name: a\ntraining: {packing: yes}\n", ['`training.packing` is "yes"', "true or false"]),
    "near word": ("name: a\ntraining: {optimizer: adam}\n", ['"adam"', "`adamw` or `sgd`", "did you mean `adamw`?"]),
    "other spelling": (
        "name: a\nevaluation: {controls: [base, centralized]}\n",
        ["controls[1]", "mean `centralised`?"],
    ),
    "braces for text": ("name: a\ndata: {prompt: {question}, completion: b}\n", ["`data.prompt`", "put it in quotes"]),
    "number for a site": ("name: a\ndata: {sites: {only: [001]}}\n", ["`data.sites.only[0]` is 1", "put it in quotes"]),
    "one beta": ("name: a\ntraining: {betas: [0.9]}\n", ["`training.betas` is [0.9]", "a list of 2 numbers"]),
    "empty section": ("name: a\ntraining:\nseed: 1\n", ["`training` is empty at recipe.yaml:2", "remove the line"]),
    "empty value": ("name: a\ntraining: {lr: }\n", ["`training.lr` is null", "remove the line to take the default"]),
    "cohort word": ("name: a\nfederation: {cohort: half}\n", ['`federation.cohort` is "half"', "`all`", "a fraction"]),
    "cohort of none": ("name: a\nfederation: {cohort: 0}\n", ["`federation.cohort` is 0", "`all`"]),
    "cohort twice": (
        "name: a\nfederation:\n  cohort: {count: 1, fraction: 0.5}\n",
        ["`fraction` or `count`, not both", ":3"],
    ),
    "strategy number": ("name: a\nfederation: {strategy: 3}\n", ["`federation.strategy` is 3", "a method's name"]),
    "strategy unnamed": ("name: a\nfederation: {strategy: {lr: 1}}\n", ["`federation.strategy.name` is missing"]),
    "epochs and steps": (
        "name: a\ntraining:\n  epochs: 1\n  steps: 2\n",
        ["`training`: give `epochs` or `steps`", ":3"],
    ),
    "scheme": ("name: a\ndata:\n  sites:\n    scheme: iid\n", ["`data.sites`", "needs `count`", "recipe.yaml:4"]),
    "between sections": (
        "name: a\ntraining: {packing: true}\nmodel: {adapter: {kind: prefix}}\n",
        ["training.packing", "adapter.kind prefix", "use packing: false", "recipe.yaml:2"],
    ),
    "remote code": ("name: a\nmodel: {trust_remote_code: true}\n", ["`model.trust_remote_code` is true", "never run"]),
    "other engine": ("name: a\nengine: {kind: ray}\n", ['`engine.kind` is "ray"', "`in-process`"]),
}

BAD_OVERRIDES = {
    "training.lr": ["--set training.lr has no `=`", "--set training.lr=0.01"],
    "training.lr=": ["has no value", "training.lr=null"],
    "=3": ["names no field"],
    "training..lr=3": ["names no field"],
    "training.lr=[": ["--set training.lr=[ is not YAML", "not closed"],
    "training={lr: 1, lr: 2}": ["`lr` is given twice", "--set training="],
    "federaton.rounds=3": ["unknown key `federaton` in --set federaton.rounds=3", "`federation`?"],
    "federation.round=3": ["unknown key `federation.round`", "`federation.rounds`?"],
    "split.blocks=2": ["`split` is not available", "--set split.blocks=2"],
    "training.lr=fast": ['`training.lr` is "fast" in --set training.lr=fast', "a number above 0"],
    "training.lr.x=3": ['`training.lr` is {"x": 3} in --set training.lr.x=3', "a number above 0"],
    "evaluation.controls.0=base": ["`evaluation.controls`", "a list of"],
    "federation.cohort.fraction=2": ["`federation.cohort.fraction` is 2", "at most 1"],
    "data.prompt={question}": ["`data.prompt`", "put it in quotes"],
    "data.sites.by=null": ["`data.sites`", "needs `by`", "--set data.sites.by=null"],
}


def load(text: str, folder: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    return load_recipe(path, overrides)


def refusal(text: str, folder: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text, folder, *overrides)
    said = f"{caught.value.message}\n{caught.value.hint}"
    assert caught.value.exit_code == 2
    assert "pydantic" not in said
    assert "Input should" not in said
    return said


@pytest.mark.parametrize(("text", "words"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_bad_recipe_is_refused_in_words(text: str, words: list[str], tmp_path: Path) -> None:
    said = refusal(text, tmp_path)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(("override", "words"), BAD_OVERRIDES.items(), ids=BAD_OVERRIDES)
def test_bad_override_is_refused_in_words(override: str, words: list[str], tmp_path: Path) -> None:
    said = refusal("name: a\n", tmp_path, override)
    assert [word for word in words if word not in said] == [], said


def test_every_error_is_listed_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "name: a\ntraining:\n  optimizer: adam\n  lr: -1\nroundz: 3\nfederation:\n  strategy: 1\n"
    lines = refusal(text, tmp_path).splitlines()
    assert [line.partition("recipe.yaml:")[2][:1] for line in lines] == ["3", "4", "5", "7"]
    assert all(line.startswith("also: ") for line in lines[1:])


def test_a_planned_section_is_named_beside_other_errors(tmp_path: Path) -> None:
    said = refusal("name: a\nseed: -1\nsplit: {blocks: 2}\n", tmp_path)
    assert "`seed` is -1" in said
    assert "`split` is not available" in said


@pytest.mark.parametrize("number", ["1e-2", "1E-2", "+1e-2", "1.0e-2", ".01", "0.01"])
def test_numbers_are_numbers_in_files_and_overrides(number: str, tmp_path: Path) -> None:
    assert load(f"name: a\ntraining: {{lr: {number}}}\n", tmp_path).training.lr == 0.01
    assert load("name: a\n", tmp_path, f"training.lr={number}").training.lr == 0.01


def test_words_that_old_yaml_took_for_something_else_are_text(tmp_path: Path) -> None:
    text = "name: a\ndata: {sites: {by: site, only: [no, on, 1:30, 2024-01-01]}}\n"
    recipe = load(text, tmp_path)
    assert recipe.data.sites.only == ["no", "on", "1:30", "2024-01-01"]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: a\r\nseed: 7\r\n")
    assert load_recipe(path).seed == 7


def test_a_built_in_recipe_loads_by_name() -> None:
    assert "demo" in builtin_recipes()
    assert load_recipe("demo").name == "demo"
    assert load_recipe("demo", ["seed=5"]).seed == 5


def test_a_file_comes_before_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").write_text("name: mine\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo").name == "mine"


def test_files_that_cannot_be_recipes(tmp_path: Path) -> None:
    (tmp_path / "medquad.yaml").write_text("name: a\n")
    (tmp_path / "latin.yaml").write_bytes(b"name: a\n# caf\xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 21))
    for name, words in {
        "medquat.yaml": ["there is no recipe", f"did you mean {tmp_path / 'medquad.yaml'}?"],
        "x.yaml": ["that folder holds large.yaml, latin.yaml, medquad.yaml", "built in: demo"],
        "none/x.yaml": ["there is no recipe", f"there is no folder {tmp_path / 'none'}"],
        ".": ["is a folder", str(tmp_path / "medquad.yaml")],
        "latin.yaml": ["not UTF-8", "0xe9", "latin.yaml:2", "save it as UTF-8"],
        "large.yaml": ["larger than 1 MiB"],
        "medquad.yaml/x": ["cannot be read", "Not a directory"],
        "x" * 300: ["cannot be read", "File name too long"],
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / name)
        said = f"{caught.value.message} {caught.value.hint}"
        assert [word for word in words if word not in said] == [], said


def test_a_misspelt_built_in_name_is_put_right() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("dmeo")
    assert "did you mean demo?" in caught.value.hint


def test_overrides_take_any_yaml(tmp_path: Path) -> None:
    recipe = load(
        "name: a\n",
        tmp_path,
        "evaluation.controls=[base]",
        "federation.strategy={name: fedadam, lr: 1e-2}",
        "training.packing=true",
        "training.clip_norm=null",
        'data.text="{body}: x"',
    )
    assert recipe.evaluation.controls == ["base"]
    assert recipe.federation.strategy.options == {"lr": 0.01}
    assert (recipe.training.packing, recipe.training.clip_norm, recipe.data.text) == (True, None, "{body}: x")


@pytest.mark.parametrize(
    ("strategy", "override", "expected"),
    [
        ("fedadam", "federation.strategy.lr=0.1", {"name": "fedadam", "lr": 0.1}),
        ("{name: fedadam, b: 1}", "federation.strategy.lr=0.1", {"name": "fedadam", "b": 1, "lr": 0.1}),
        ("fedadam", "federation.strategy=fedyogi", {"name": "fedyogi"}),
        ("fedadam", "federation.strategy.a.b=1", {"name": "fedadam", "a": {"b": 1}}),
        (None, "federation.strategy.lr=0.1", {"name": "fedavg", "lr": 0.1}),
    ],
)
def test_an_override_reaches_into_a_strategy(
    strategy: str | None, override: str, expected: object, tmp_path: Path
) -> None:
    text = "name: a\n" + (f"federation: {{strategy: {strategy}}}\n" if strategy else "")
    assert load(text, tmp_path, override).federation.strategy.model_dump() == expected


def test_an_override_starts_from_the_default_that_the_file_leaves_out(tmp_path: Path) -> None:
    assert load("name: a\n", tmp_path, "data.sites.take=5").data.sites.by == "site"
    assert (
        load("name: a\nfederation: {cohort: all}\n", tmp_path, "federation.cohort.count=3").federation.cohort.count == 3
    )


def test_overrides_apply_in_order_and_none_is_lost_silently(tmp_path: Path) -> None:
    assert load("name: a\n", tmp_path, "seed=1", "seed=2").seed == 2
    said = refusal("name: a\n", tmp_path, "federation.strategy.lr=0.1", "federation.strategy=fedadam")
    assert "would discard the earlier --set federation.strategy.lr=0.1" in said
    assert "wider one first" in said


def test_loading_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from commonweight.recipe.load import load_recipe; from commonweight.recipe import docs, starters;"
        "load_recipe('demo'); docs.json_schema(); docs.reference_markdown();"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

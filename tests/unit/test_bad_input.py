"""A person's mistakes through the command line end in an exit code and one clear message, and lose nothing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import re
import resource
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from commonweight import errors
from tests.unit.command_line import Answer, call

ROWS = [
    {"site": site, "subject": f"{site}-{k}", "question": f"what helps {k}", "answer": f"rest and honey {k} times"}
    for site, count in (("north", 10), ("south", 8))
    for k in range(count)
]

FILES = {
    "empty.yaml": "",
    "list.yaml": "- a\n- b\n",
    "broken.yaml": "name: x\ndata: {path: rows.jsonl\ntraining:\n  lr: 1\n",
    "tabs.yaml": "name: x\ntraining:\n\tlr: 1\n",
    "twice.yaml": "name: x\nname: y\n",
    "empty.jsonl": "",
    "binary.jsonl": b"\x00\x01\x02PAR1",
    "latin.jsonl": '{"site": "caf\xe9"}\n'.encode("latin-1"),
    "broken.jsonl": '{"site": "a", "question": "q", "answer": "a"}\n{"site": "a", "question": \n',
    "headless.csv": "north,what helps,rest\n,,\nsouth,what helps,sleep\n",
    "header.csv": "site,question,answer\n",
    "unequal.csv": "site,question,answer\nnorth,what helps, rest, and sleep\n",
    "odd.xyz": "nothing known",
    "one.jsonl": '{"site": "north", "question": "q", "answer": "a"}\n',
    "blank.jsonl": '{"site": "north", "question": "q", "answer": ""}\n',
    "nameless.jsonl": '{"site": "north", "a": "q", "b": "r"}\n{"site": "north", "a": "s", "b": "t"}\n',
    "partly.jsonl": "".join(
        json.dumps({**row, "site": row["site"] or None}) + "\n" for row in [*ROWS, {**ROWS[0], "site": ""}]
    ),
    "fake.jsonl.gz": "no gzip at all",
    "fake.parquet": "no parquet at all",
}


@dataclass(frozen=True)
class Case:
    """A command, what must come of it, and what its message must say.

    Args:
        command: arguments, separated by blanks; `{name}` stands for a path in `Place`.
        words: parts of the message or the hint.
        stdin: what is typed.
        prepare: makes the mistake, in the folder where the command runs.
        retry: whether the message says that trying again is safe; None: either way.
        leaves: the run's folder stays, as there is something in it to go on with.
    """

    name: str
    command: str
    code: int
    words: tuple[str, ...]
    stdin: str = ""
    prepare: Callable[[Path], object] | None = None
    retry: bool | None = False
    leaves: bool = False

    def __str__(self) -> str:
        return self.name


ADVICE = re.compile(r"must be|did you mean|remove it|give ")
"""A recipe's field is explained in one sentence, with what to do in it."""


def unfinished(folder: Path) -> None:
    """The finished run as one that was killed just before its end."""
    for name in ("metrics.json", "report.html"):
        (folder / "done" / name).unlink()


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        unfinished(folder)
        (folder / name).write_bytes(content)

    return prepare


def damage(name: str) -> Callable[[Path], object]:
    """One byte in the middle of a file is another."""

    def prepare(folder: Path) -> None:
        unfinished(folder)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (folder / name).write_bytes(content)

    return prepare


def without(name: str) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        unfinished(folder)
        (folder / name).unlink()

    return prepare


def other_rows(folder: Path) -> None:
    unfinished(folder)
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**ROWS[0], "answer": "another one"}) + "\n")


def write(name: str, content: str) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    return prepare


RESUME = "run recipe.yaml -o done --resume"

CASES = [
    # the recipe
    Case("no such recipe", "run recipes.yaml", 2, ("there is no recipe recipes.yaml", "did you mean", "recipe.yaml")),
    Case("no such built-in", "run dmeo", 2, ("there is no recipe dmeo", "did you mean demo")),
    Case("folder as recipe", "run folder", 2, ("folder is a folder, not a recipe", "folder/inside.yaml")),
    Case("empty recipe", "validate empty.yaml", 2, ("empty.yaml is empty", "commonweight init")),
    Case("a list", "validate list.yaml", 2, ("list.yaml holds a list", "field: value")),
    Case("bad YAML", "validate broken.yaml", 2, ("broken.yaml is not YAML", "broken.yaml:3", "not closed")),
    Case("tabs", "validate tabs.yaml", 2, ("tabs.yaml:3", "spaces, not tabs")),
    Case("field twice", "validate twice.yaml", 2, ("`name` is given twice", "twice.yaml:1", "twice.yaml:2")),
    Case("binary recipe", "validate binary.jsonl", 2, ("binary.jsonl", "not allowed")),
    Case(
        "unknown field",
        "validate recipe.yaml --set training.learning_rate=1",
        2,
        ("training.learning_rate", "training.lr"),
    ),
    Case("misspelt section", "validate recipe.yaml --set trainig.lr=1", 2, ("unknown key `trainig`", "training")),
    Case("wrong type", "validate recipe.yaml --set training.lr=fast", 2, ("`training.lr`", '"fast"', "number")),
    Case(
        "number in quotes",
        "validate recipe.yaml --set \"federation.rounds='3'\"",
        2,
        ("`federation.rounds`", "without quotes"),
    ),
    Case(
        "out of range", "validate recipe.yaml --set federation.rounds=0", 2, ("`federation.rounds` is 0", "at least 1")
    ),
    Case("not a choice", "validate recipe.yaml --set training.optimizer=adam", 2, ("`training.optimizer`", "adamw")),
    Case(
        "contradiction",
        "validate recipe.yaml --set training.steps=3 --set training.epochs=1",
        2,
        ("steps", "epochs", "not both"),
    ),
    Case("bad name", "validate recipe.yaml --set name=a/b", 2, ("`name`", '"a/b"')),
    Case(
        "privacy of a kind that there is not",
        "validate recipe.yaml --set privacy.dp=patient",
        2,
        ("`privacy.dp`", '"patient"', "`site`"),
    ),
    Case(
        "compression section",
        "run recipe.yaml --set compression=zip",
        2,
        ("`compression`", '"zip"', "`none`, `auto`"),
    ),
    Case(
        "set without =",
        "run recipe.yaml --set training.lr",
        2,
        ("--set training.lr has no `=`", "--set training.lr=0.01"),
    ),
    Case("set without value", "run recipe.yaml --set training.lr=", 2, ("--set training.lr= has no value", "null")),
    Case("set without key", "run recipe.yaml --set =3", 2, ("--set =3 names no field",)),
    Case("set not YAML", "run recipe.yaml --set training={", 2, ("--set training={", "not closed")),
    Case("remote code", "run recipe.yaml --set model.trust_remote_code=true", 2, ("model.trust_remote_code", "false")),
    # methods
    Case(
        "unknown strategy",
        "run recipe.yaml --set federation.strategy=fedavgg",
        2,
        ("'fedavgg'", "did you mean 'fedavg'"),
    ),
    Case(
        "unknown objective", "run recipe.yaml --set training.objective=dpo", 2, ("`training.objective`", "'dpo'", "sft")
    ),
    Case(
        "option of no strategy",
        "run recipe.yaml --set 'federation.strategy={name: fedadam, beta3: 1}'",
        2,
        ("unknown key `federation.strategy.beta3`", "did you mean"),
    ),
    Case(
        "option out of range",
        "validate recipe.yaml --set 'federation.strategy={name: fedadam, lr: -1}'",
        2,
        ("federation.strategy.lr", "-1"),
    ),
    Case(
        "no such class",
        "run recipe.yaml --set federation.strategy=mine.own:Way",
        2,
        ("mine.own:Way", "cannot be imported", "install"),
    ),
    Case(
        "no such attribute", "run recipe.yaml --set federation.strategy=json:Way", 2, ("json:Way", "cannot be imported")
    ),
    Case("not a class", "run recipe.yaml --set federation.strategy=json:dumps", 2, ("json:dumps", "is not a class")),
    Case(
        "not a method", "run recipe.yaml --set training.objective=json:JSONDecoder", 2, ("json:JSONDecoder", "Options")
    ),
    Case("unknown method", "methods fedadm", 2, ("'fedadm'", "did you mean 'fedadam'", "scaffold")),
    # the data
    Case(
        "no such data",
        "run recipe.yaml --set data.path=row.jsonl",
        3,
        ("there is no row.jsonl", "did you mean 'rows.jsonl'"),
    ),
    Case(
        "no such folder",
        "run recipe.yaml --set data.path=no/where/rows.jsonl",
        3,
        ("no/where/rows.jsonl", "folder no/where does not exist"),
    ),
    Case("empty file", "run recipe.yaml --set data.path=empty.jsonl", 3, ("empty.jsonl is empty",)),
    Case("header alone", "run recipe.yaml --set data.path=header.csv", 3, ("header.csv holds no rows",)),
    Case("binary file", "run recipe.yaml --set data.path=binary.jsonl", 3, ("binary.jsonl is a binary file",)),
    Case("not UTF-8", "run recipe.yaml --set data.path=latin.jsonl", 3, ("latin.jsonl, line 1", "UTF-8")),
    Case("bad JSON line", "run recipe.yaml --set data.path=broken.jsonl", 3, ("broken.jsonl, line 2", "not JSON")),
    Case(
        "CSV without header",
        "run recipe.yaml --set data.path=headless.csv",
        2,
        ("headless.csv", "north, what helps, rest"),
    ),
    Case(
        "CSV of unequal lines",
        "run recipe.yaml --set data.path=unequal.csv",
        3,
        ("unequal.csv, line 2", "4 values", "3 columns"),
    ),
    Case("fake gzip", "run recipe.yaml --set data.path=fake.jsonl.gz", 3, ("fake.jsonl.gz", "gzip")),
    Case("fake parquet", "run recipe.yaml --set data.path=fake.parquet", 3, ("fake.parquet", "Parquet")),
    Case("unknown ending", "run recipe.yaml --set data.path=odd.xyz", 3, ("odd.xyz", "data.format")),
    Case(
        "folder without data",
        "run recipe.yaml --set data.path=folder",
        3,
        ("the folder folder has no file ending in", ".jsonl"),
    ),
    Case(
        "field missing in template",
        "run recipe.yaml --set data.prompt='\"{qestion}\"' --set data.completion='\"{answer}\"'",
        2,
        ("data.prompt", "'qestion'", "did you mean 'question'"),
    ),
    Case(
        "broken template",
        "run recipe.yaml --set data.prompt='\"{question\"' --set data.completion='\"{answer}\"'",
        2,
        ("data.prompt", "'{question'", "cannot be read"),
    ),
    Case("fields say nothing", "run recipe.yaml --set data.path=nameless.jsonl", 2, ("nameless.jsonl", "data.prompt")),
    Case("nothing to learn", "run recipe.yaml --set data.path=blank.jsonl", 3, ("none of the 1 rows of blank.jsonl",)),
    Case(
        "no site field", "run recipe.yaml --set data.sites.by=clinic", 2, ("data.sites.by", "'clinic'", "site, subject")
    ),
    Case(
        "site unnamed in a row",
        "run recipe.yaml --set data.path=partly.jsonl",
        3,
        ("data.sites.by", "partly.jsonl, line 19"),
    ),
    Case("no holdout field", "run recipe.yaml --set data.holdout.by=topic", 2, ("data.holdout.by", "'topic'")),
    Case("no such site", "run recipe.yaml --set data.sites.only=[nort]", 3, ("'nort'", "did you mean 'north'")),
    Case("no site left", "run recipe.yaml --set data.sites.min_rows=99", 3, ("no site of 2 is left", "north (10)")),
    Case(
        "holdout too large",
        "run recipe.yaml --set data.holdout.examples=8",
        3,
        ("site 'south' has 8 rows", "holdout.examples"),
    ),
    Case("one row", "run recipe.yaml --set data.path=one.jsonl", 3, ("site 'north' has 1 row", "too few")),
    Case(
        "more sites than rows",
        "run recipe.yaml --set 'data.sites={scheme: iid, count: 50}'",
        3,
        ("50 sites", "18 rows", "data.sites.count"),
    ),
    Case("nothing fits", "run recipe.yaml --set training.max_tokens=6", 3, ("max_tokens 6", "training.max_tokens")),
    Case("no chat template", "run recipe.yaml --set data.messages=question", 3, ("chat template",)),
    Case(
        "validate reads the data",
        "validate recipe.yaml --data --set data.path=row.jsonl",
        3,
        ("did you mean 'rows.jsonl'",),
    ),
    # who takes part
    Case("cohort too large", "run recipe.yaml --set federation.cohort=3", 2, ("asks for 3 sites", "has 2")),
    Case("minimum too large", "run recipe.yaml --set federation.min_sites=3", 2, ("min_sites is 3", "2 of 2 sites")),
    Case(
        "validate checks the cohort", "validate recipe.yaml --data --set federation.cohort=3", 2, ("asks for 3 sites",)
    ),
    # the model
    Case(
        "no such model",
        "run recipe.yaml --set model.name=/nowhere/model",
        4,
        ("no model folder /nowhere/model", "model.name"),
    ),
    Case(
        "no tokenizer", "run recipe.yaml --set model.name={models}/no-tokenizer", 4, ("no tokenizer", "model.tokenizer")
    ),
    Case(
        "no weights",
        "run recipe.yaml --set model.name={models}/no-weights",
        4,
        ("could not be loaded", "model.safetensors"),
    ),
    Case("damaged weights", "run recipe.yaml --set model.name={models}/damaged", 4, ("models", "damaged", "again")),
    Case(
        "encoder and decoder",
        "run recipe.yaml --set model.name={models}/t5",
        4,
        ("t5", "no causal language model"),
    ),
    Case("encoder", "run recipe.yaml --set model.name={models}/bert", 4, ("bert", "causal")),
    Case("bad targets", "run recipe.yaml --set model.adapter.targets=[querry]", 4, ("querry", "all-linear", "q_proj")),
    Case(
        "beyond the context",
        "run recipe.yaml --set training.max_tokens=4000",
        2,
        ("training.max_tokens is 4000", "128"),
    ),
    # the output
    Case("run there already", "run recipe.yaml -o done", 6, ("done already holds a run", "--resume", "-o")),
    Case("output not empty", "run recipe.yaml -o folder", 6, ("folder is not empty and holds no run", "-o")),
    Case("output below a file", "run recipe.yaml -o rows.jsonl/run", 7, ("rows.jsonl/run", "-o")),
    Case("output is a file", "run recipe.yaml -o rows.jsonl", 7, ("rows.jsonl", "-o")),
    # going on
    Case("resume nothing", "run recipe.yaml --resume", 6, ("no run called bad is in runs/", "-o")),
    Case("resume an empty place", "run recipe.yaml -o nowhere --resume", 6, ("no run to resume in nowhere",)),
    Case("resume what has ended", RESUME, 6, ("the run in done has ended", "commonweight report done")),
    Case(
        "resume with another recipe",
        RESUME + " --set training.lr=0.5",
        6,
        ("the recipe has changed", "training.lr", "0.01", "0.5"),
        prepare=unfinished,
    ),
    Case("resume with other data", RESUME, 6, ("began with another data",), prepare=other_rows),
    Case(
        "damaged journal",
        RESUME,
        6,
        ("state.sqlite", "damaged"),
        prepare=overwrite("done/state.sqlite", b"not a database " * 99),
    ),
    Case("missing state", RESUME, 6, ("0002.safetensors is missing",), prepare=without("done/state/0002.safetensors")),
    Case(
        "damaged state",
        RESUME,
        6,
        ("0002.safetensors is damaged", "digest"),
        prepare=damage("done/state/0002.safetensors"),
    ),
    # a run that fails
    Case(
        "learning rate far too high",
        "run recipe.yaml -o hot --set training.lr=1e30 --set training.batch_size=2",
        5,
        ("round 1 was abandoned", "0 of 2 sites", "north: ", "training.lr", "--resume"),
        retry=True,
        leaves=True,
    ),
    Case(
        "diverged in its only step",
        "run recipe.yaml -o hot --set training.lr=1e30",
        5,
        ("not finite", "lower training.lr"),
        retry=None,
        leaves=True,
    ),
    # afterwards
    Case("report of nothing", "report nowhere", 6, ("nowhere holds no run", "commonweight runs")),
    Case(
        "report of an unfinished run",
        "report done",
        6,
        ("has not ended", "run done/recipe.yaml -o done --resume"),
        prepare=unfinished,
    ),
    Case(
        "report of damaged metrics",
        "report done",
        6,
        ("metrics.json is not valid JSON",),
        prepare=write("done/metrics.json", '{"format": 1,'),
    ),
    Case(
        "report of other metrics", "report done", 6, ("format 9",), prepare=write("done/metrics.json", '{"format": 9}')
    ),
    Case(
        "report of emptied metrics",
        "report done",
        6,
        ("metrics.json", "arms"),
        prepare=write("done/metrics.json", '{"format": 1, "arms": []}'),
    ),
    Case("runs of nothing", "runs nowhere", 6, ("nowhere is no folder",)),
    Case("round not there", "evaluate done --round 99", 6, ("no adapter of round 99", "rounds kept: 1, 2")),
    Case("round of the base", "evaluate done --round 1 --base", 2, ("--base and --round",)),
    Case(
        "evaluate beyond the context",
        "evaluate done --set training.max_tokens=4000",
        2,
        ("training.max_tokens is 4000", "128"),
    ),
    Case("evaluate other data", "evaluate done --set data.path=row.jsonl", 3, ("did you mean 'rows.jsonl'",)),
    Case(
        "evaluate another model",
        "evaluate done --set model.name=/nowhere/model",
        4,
        ("no model folder /nowhere/model",),
    ),
    Case(
        "damaged adapter",
        "evaluate done",
        4,
        ("the adapter in done/adapter does not fit",),
        prepare=write("done/adapter/adapter_model.safetensors", "no tensors"),
    ),
    Case("chat of nothing", "chat nowhere", 6, ("nowhere holds no run",), stdin="fever?"),
    Case("empty prompt", "chat done --prompt ' '", 2, ("--prompt is empty",)),
    Case("nothing asked", "chat done", 2, ("standard input is empty", "--prompt")),
    Case("export into a full folder", "export done folder", 6, ("folder is not an empty folder",)),
    Case("export onto a file", "export done rows.jsonl", 6, ("rows.jsonl is not an empty folder",)),
    Case("export below a file", "export done rows.jsonl/out", 7, ("rows.jsonl/out",)),
    Case("export nothing", "export nowhere out", 6, ("nowhere holds no run",)),
    Case(
        "init twice",
        "init here",
        2,
        ("here/recipe.yaml exists already", "--force"),
        prepare=write("here/recipe.yaml", "mine"),
    ),
    Case("init of no kind", "init there --kind instructions", 2, ("'instructions'", "did you mean 'instruction'")),
    Case("init below a file", "init rows.jsonl/here", 7, ("rows.jsonl/here",)),
    # the command itself
    Case("no argument", "run", 2, ("missing argument 'RECIPE'", "commonweight run --help")),
    Case("one argument of two", "export done", 2, ("missing argument 'DIR'", "commonweight export --help")),
    Case("no such option", "run recipe.yaml --rounds 3", 2, ("no such option: --rounds", "commonweight run --help")),
    Case("no such command", "trian recipe.yaml", 2, ("no such command 'trian'", "commonweight --help")),
    Case("too much", "run recipe.yaml s.yaml", 2, ("unexpected extra argument", "s.yaml")),
    Case("not a number", "evaluate done --round last", 2, ("--round", "integer")),
    Case("round zero", "evaluate done --round 0", 2, ("--round", "1")),
    Case("option without value", "run recipe.yaml -o", 2, ("-o", "argument")),
    Case("debug behind the command", "run recipe.yaml --debug", 2, ("--debug goes before the command",)),
    Case("a name too long", f"report {'x' * 300}", 7, ("File name too long",)),
]

NO_GPU = [
    Case(
        "quantization",
        "run recipe.yaml --set model.quantization=4bit",
        4,
        ("model.quantization 4bit needs a CUDA GPU", "none"),
    ),
    Case("GPU asked for", "run recipe.yaml --set engine.device=cuda", 4, ("engine.device is cuda", "auto or cpu")),
]


@pytest.fixture(scope="session")
def bad_models(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of model folders that cannot be used, each for another reason."""
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("models")
    for name in ("no-tokenizer", "no-weights", "damaged"):
        shutil.copytree(small_model, folder / name)
    for file in (folder / "no-tokenizer").glob("*token*"):
        file.unlink()
    (folder / "no-weights" / "model.safetensors").unlink()
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    size = {
        "vocab_size": 400,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "initializer_range": 1.0,
    }
    BertForMaskedLM(BertConfig(**size)).save_pretrained(folder / "bert")
    T5ForConditionalGeneration(
        T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(folder / "t5")
    for name in ("bert", "t5"):
        for file in small_model.glob("*token*"):
            shutil.copy(file, folder / name)
    return folder


@pytest.fixture(scope="session")
def finished(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file of `FILES`, a recipe `recipe.yaml`, and a finished run of it in `done`."""
    folder = tmp_path_factory.mktemp("bad-input")
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "folder").mkdir()
    (folder / "folder" / "inside.yaml").write_text("name: x\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    recipe = {
        "name": "bad",
        "model": {"name": str(small_model), "adapter": {"r": 2}},
        "data": {"path": "rows.jsonl", "holdout": {"examples": 3}},
        "training": {"lr": 0.01, "max_tokens": 64},
        "federation": {"rounds": 2},
        "evaluation": {"controls": [], "samples": 0, "resamples": 100, "max_new_tokens": 4},
        "engine": {"workers": 2, "device": "cpu"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        answer = call("run", "recipe.yaml", "-o", "done", "--quiet")
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished` that a test may spoil; the commands run in it."""
    folder = tmp_path / "place"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file, but for those that say that a command looked."""
    looked = (".lock", "events.jsonl", "state.sqlite-wal", "state.sqlite-shm")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in looked)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def arguments(case: Case, models: Path) -> list[str]:
    return shlex.split(case.command.replace("{models}", str(models)))


def assert_clear(answer: Answer, case: Case) -> None:
    """The exit code, one message, a hint, all the words, and nothing of the machinery."""
    assert answer.code == case.code, answer.err
    assert "Traceback" not in answer.err
    assert "failed in a way that it should not" not in answer.err
    lines = answer.err.rstrip("\n").split("\n")
    assert lines[0].startswith("error: "), answer.err
    assert not any(line.startswith("error: ") for line in lines[1:]), answer.err
    assert len(lines) > 1 or ADVICE.search(lines[0]), "no hint"
    assert all(line.startswith("  ") for line in lines[1:]), answer.err
    assert case.retry in (None, "Trying again is safe." in answer.err)
    for word in case.words:
        assert word in answer.err, answer.err


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_is_explained_and_loses_nothing(case: Case, place: Path, bad_models: Path) -> None:
    if case.prepare:
        case.prepare(place)
    before = contents(place)
    answer = call(*arguments(case, bad_models), stdin=case.stdin)
    assert_clear(answer, case)
    if case.leaves:
        assert before.items() <= contents(place).items()
    else:
        assert contents(place) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize("case", NO_GPU, ids=str)
def test_what_needs_a_gpu_is_refused_without_one(case: Case, place: Path, bad_models: Path) -> None:
    before = contents(place)
    assert_clear(call(*arguments(case, bad_models)), case)
    assert contents(place) == before


def test_another_process_has_the_folder(place: Path) -> None:
    unfinished(place)
    before = contents(place)
    with (place / "done" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = call(*shlex.split(RESUME))
    assert_clear(answer, Case("", "", 6, ("another process is running in done", "-o")))
    assert contents(place) == before
    assert call(*shlex.split(RESUME)).code == 0


def test_a_tokenizer_without_a_padding_token_is_no_mistake(place: Path, small_model: Path) -> None:
    settings = json.loads((small_model / "tokenizer_config.json").read_text())
    assert "pad_token" not in settings
    assert call("evaluate", "done", "--exact-match").code == 0
    assert call("run", "recipe.yaml", "-o", "again", "--set", "evaluation.samples=2").code == 0


def test_a_run_that_fails_at_once_leaves_no_folder(place: Path) -> None:
    """So the same command works when the mistake is mended."""
    command = ("run", "recipe.yaml", "-o", "mine")
    shutil.move(place / "rows.jsonl", place / "moved.jsonl")
    assert call(*command).code == 3
    assert not (place / "mine").exists()
    (place / "mine").mkdir()
    assert call(*command).code == 3
    assert list((place / "mine").iterdir()) == []
    shutil.move(place / "moved.jsonl", place / "rows.jsonl")
    assert call(*command).code == 0


def test_a_resumed_run_that_fails_at_once_keeps_its_folder(place: Path) -> None:
    unfinished(place)
    shutil.move(place / "rows.jsonl", place / "moved.jsonl")
    assert call(*shlex.split(RESUME)).code == 3
    shutil.move(place / "moved.jsonl", place / "rows.jsonl")
    assert call(*shlex.split(RESUME)).code == 0


@contextmanager
def short_files() -> Iterator[None]:
    """No file may grow beyond 150 kB: writes come up short, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_comes_up_short(place: Path) -> None:
    """The run stops with what it had; with room again it goes on to the same adapter."""
    command = [*shlex.split("run recipe.yaml --quiet --set model.adapter.r=128 -o"), "cut"]
    with short_files():
        answer = call(*command)
    assert_clear(answer, Case("", "", 7, ("cannot write in cut", "-o")))
    assert not list((place / "cut").rglob("*.tmp"))
    assert call(*command, "--resume").code == 0
    assert call(*command[:-1], "whole").code == 0
    adapters = [place / name / "adapter" / "adapter_model.safetensors" for name in ("cut", "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_no_space_left(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished(place)
    before = contents(place)

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        answer = call(*shlex.split(RESUME))
    assert_clear(answer, Case("", "", 7, ("the disk is full", "nothing committed is lost"), retry=True))
    assert contents(place) == before
    assert call(*shlex.split(RESUME)).code == 0


def test_an_export_that_fails_half_way_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(source: Path, output: Path, **_: object) -> None:
        output.mkdir()
        (output / "adapter_config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(place)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", fill_up)
        answer = call("export", "done", "out")
    assert_clear(answer, Case("", "", 7, ("cannot write in out", "the disk is full"), retry=True))
    assert contents(place) == before
    assert not (place / "out").exists()
    assert call("export", "done", "out").code == 0


EACH_KIND = {
    "validate list.yaml": "RecipeError",
    "run recipe.yaml --set data.path=row.jsonl": "DataError",
    "run recipe.yaml --set model.name=/nowhere/model": "ModelError",
    "run recipe.yaml -o hot --set training.lr=1e30 --set training.batch_size=2": "QuorumError",
    "evaluate done --round 99": "StateError",
    "export done rows.jsonl/out": "StorageError",
    "chat done": "RecipeError",
    "run recipe.yaml --rounds 3": "RecipeError",
    "report": "RecipeError",
}


@pytest.mark.parametrize(("command", "kind"), EACH_KIND.items())
def test_json_holds_the_error(command: str, kind: str, place: Path) -> None:
    answer = call(*shlex.split(command), "--json")
    error = answer.json["error"]
    assert list(answer.json) == ["error"]
    assert list(error) == ["kind", "message", "hint", "retry"]
    assert error["kind"] == kind
    assert error["retry"] is (kind == "QuorumError")
    assert answer.code == getattr(errors, kind).exit_code
    assert answer.err.startswith(f"error: {error['message']}\n")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(place: Path) -> None:
    answer = call("--debug", "evaluate", "done", "--round", 99)
    assert answer.code == 6
    assert "Traceback (most recent call last)" in answer.err
    assert "error: the run in done has no adapter of round 99" in answer.err


def test_a_defect_says_that_it_is_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commonweight.recipe.load.load_recipe", lambda *_: 1 / 0)
    answer = call("validate", "recipe.yaml")
    assert answer.code == 1
    assert answer.err.startswith("error: commonweight failed in a way that it should not: ZeroDivisionError")
    assert "Traceback" not in answer.err
    assert "commonweight --debug" in answer.err
    assert "Traceback" in call("--debug", "validate", "recipe.yaml").err

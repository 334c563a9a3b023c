"""The command line: its help, its documentation, every command from end to end, terminals, and Ctrl-C."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from commonweight import errors
from commonweight.cli.main import app
from commonweight.recipe import Recipe
from commonweight.recipe.resolved import recipe_text
from tests.unit.command_line import call

TOP: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
GROUPS = {name: group.commands for name, group in TOP.items() if hasattr(group, "commands")}
#: every command by what is typed: `run`, `site run`
COMMANDS: dict[str, Any] = {name: command for name, command in TOP.items() if name not in GROUPS} | {
    f"{name} {one}": command for name, commands in GROUPS.items() for one, command in commands.items()
}
#: commands that need a federation: tests/protocol/test_network_cli.py and test_sandbox.py carry them out
NETWORKED = {"sandbox", "join", "submit", "status", "watch", "logs", "cancel", "fetch", "sites", "audit-log"}
DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
#: hears Ctrl-C also where the whole suite was started in a shell's background, with the signal ignored
_HEAR = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
PROGRAM = [sys.executable, "-c", f"{_HEAR}; from commonweight.cli.main import main; main()"]
HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "matplotlib", "pyarrow", "rich", "yaml")
HEAVY += ("grpc", "google.protobuf", "sqlalchemy", "alembic", "cryptography", "prometheus_client", "asyncio")


def section(name: str) -> str:
    """The part of docs/cli.md below a heading."""
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", DOCS, re.M | re.S)
    assert found, f"docs/cli.md has no section {name}"
    return found.group(1)


# --- help


def test_the_help_lists_every_command_with_one_whole_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    answer = call("--help")
    assert answer.code == 0
    assert answer.out == call().out == call("-h").out
    for group, commands in {"": TOP, **GROUPS}.items():
        listed = call(*group.split(), "--help")
        assert listed.out == call(*group.split()).out
        for name, command in commands.items():
            first = command.help.split("\n")[0]
            assert re.search(rf"^  {name} +{re.escape(first)}$", listed.out, re.M), name
        assert max(map(len, listed.out.split("\n"))) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_explains_every_option_and_argument(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    answer = call(*name.split(), "--help")
    assert answer.code == 0
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert parameter.help[0].isupper(), parameter.help
        assert parameter.help.endswith("."), parameter.help
        shown = parameter.metavar if parameter.param_type_name == "argument" else max(parameter.opts, key=len)
        assert shown in answer.out
    assert "<" not in answer.out.split("Options:")[1], "an option shows its type instead of a word for it"


def test_help_comes_without_the_heavy_libraries() -> None:
    program = f"""
import sys
from commonweight.cli.main import main
for name in ["", *{list(COMMANDS)!r}]:
    sys.argv = ["commonweight", *name.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().split("\n")[-1] == "[]", done.stderr


def test_version() -> None:
    from commonweight import __version__

    assert call("--version").out == f"commonweight {__version__}\n"


# --- documentation


@pytest.mark.parametrize("name", COMMANDS)
def test_the_documentation_has_every_command_option_and_argument(name: str) -> None:
    text = section(name)
    common = DOCS.split("## demo")[0]
    assert f"| [`{name}`](#{name.replace(' ', '-')}) |" in common
    assert f"commonweight {name}" in text, "an example"
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "argument":
            assert f"`{parameter.metavar}`" in text + common, parameter.metavar
        for option in parameter.opts if parameter.param_type_name == "option" else ():
            assert option in text, f"{name} {option}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_documentation_names_no_option_that_there_is_not(name: str) -> None:
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    for line in section(name).split("\n"):
        if line.startswith("- `-"):
            assert set(re.findall(r"`(--?[a-z-]+)", line.split(": ")[0])) <= known, line


def test_exit_codes_agree() -> None:
    """In the classes, in the docstring that draws them, in the help, and in the documentation."""
    kinds = {n: k for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, errors.CommonweightError)}
    by_name = {name: kind.exit_code for name, kind in kinds.items()}
    drawn = dict(re.findall(r"(\w+Error) +(?:exit code )?(\d+)\b", str(errors.__doc__)))
    assert {name: str(code) for name, code in by_name.items() if name in drawn} == drawn
    assert f"Exit code {errors.EXIT_INTERRUPTED} means interrupted" in str(errors.__doc__)

    rows = re.findall(r"^\| (\d+) \| .* \|(.*)\|$", section("Exit codes"), re.M)
    documented = {name: int(code) for code, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert documented == {**by_name, "Interrupted": errors.EXIT_INTERRUPTED}

    epilog = re.sub(r"\s+", " ", call("--help").out.split("Exit codes:")[1])
    assert {int(code) for code in re.findall(r"\d+", epilog)} == {int(code) for code, _ in rows}


# --- every command, from end to end


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(here: Path, make_recipe: Callable[..., Recipe]) -> str:
    """The path of a small recipe, with all control arms."""
    path = here / "recipe.yaml"
    sections = {"controls": ["base", "local", "centralised"], "samples": 1, "max_new_tokens": 4}
    path.write_text(recipe_text(make_recipe(evaluation=sections)), encoding="utf-8")
    return "recipe.yaml"


def test_from_init_to_export(here: Path, small_data: Path, small_model: Path) -> None:
    """What a newcomer types, with data and a model of their own."""
    said = call("init", "mine")
    assert said.code == 0
    assert "wrote mine/recipe.yaml and mine/recipe.schema.json" in said.out
    assert "commonweight validate mine/recipe.yaml --data" in said.out
    assert json.loads((here / "mine" / "recipe.schema.json").read_text())["type"] == "object"

    own = {"data.path": small_data, "model.name": small_model, "training.max_tokens": 48, "federation.rounds": 1}
    own |= {"evaluation.controls": "[local]", "evaluation.max_new_tokens": 4, "engine.workers": 2}
    settings = [part for key, value in own.items() for part in ("--set", f"{key}={value}")]
    said = call("validate", "mine/recipe.yaml", "--data", *settings)
    assert said.code == 0, said.err
    assert said.out.startswith("mine/recipe.yaml is valid: 1 round of fedavg, digest ")
    assert re.search(r"^site +rows +tokens +label tokens +held out +cut +dropped\nnorth +\d+", said.out, re.M)

    said = call("run", "mine/recipe.yaml", *settings)
    assert said.code == 0, said.err
    assert re.search(r"^round 1: held-out loss \d\.\d{3}$", said.out, re.M)
    assert re.search(r"^Together \(federated\) +\d\.\d{3} ", said.out, re.M)
    assert said.out.endswith("adapter  runs/instruction/adapter\nreport   runs/instruction/report.html\n")
    assert "\x1b" not in said.out, "an escape sequence where there is no terminal"
    assert said.err == ""

    run = "runs/instruction"
    assert re.search(
        rf"^{run} +finished +1/1 +fedavg +\d\.\d+ +\d{{4}}-\d\d-\d\d \d\d:\d\d UTC$", call("runs").out, re.M
    )
    (here / run / "report.html").unlink()
    assert call("report", run).out.strip() in said.out
    assert "<html" in (here / run / "report.html").read_text()

    after, base = call("evaluate", run), call("evaluate", run, "--base")
    assert re.search(r"^north +\d+ +\d\.\d{3}", after.out, re.M)
    assert "nats a token" in base.out
    assert after.out != base.out
    assert call("evaluate", run, "--round", 1).out == after.out
    assert "exact match" in call("evaluate", run, "--exact-match").out

    answer = call("chat", run, "--prompt", "what helps", "--max-new-tokens", 8)
    assert answer.code == 0
    assert call("chat", run, "--max-new-tokens", 8, stdin="what helps\n").out == answer.out
    assert call("chat", run, "--raw", "--base", "-p", "what helps", "--max-new-tokens", 2).code == 0

    assert call("export", run, "adapter").out.startswith("wrote a lora adapter (")
    assert call("export", run, "merged", "--merge").out.startswith("wrote full weights (")
    assert call("export", run, "first", "--round", 1).code == 0
    _assert_one_model(here / run / "adapter", here / "merged", small_model)


def _assert_one_model(adapter: Path, merged: Path, base: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(merged)("what helps a cough")["input_ids"]])
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    whole = AutoModelForCausalLM.from_pretrained(merged).eval()
    with torch.no_grad():
        torch.testing.assert_close(with_adapter(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)


def test_json_is_all_that_standard_output_holds(recipe: str) -> None:
    found = {
        "validate": call("validate", recipe, "--data", "--json"),
        "run": call("run", recipe, "--json"),
        "plan": call("plan", recipe, "--json"),
        "runs": call("runs", "--json"),
        "ledger": call("ledger", "--json"),
        "audit": call("audit", "runs/small", "--json"),
        "report": call("report", "runs/small", "--json"),
        "methods": call("methods", "--json"),
        "evaluate": call("evaluate", "runs/small", "--json"),
        "chat": call("chat", "runs/small", "--json", stdin="what helps?"),
        "export": call("export", "runs/small", "out", "--json"),
    }
    local = {name for name in TOP if name not in GROUPS} - NETWORKED
    assert set(found) | {"demo"} == {name for name in local if "--json" in call(name, "--help").out}
    for name, answer in found.items():
        assert (answer.code, answer.err) == (0, ""), name
        assert answer.out.count("\n") == 1, name
        listed = re.search(rf"^\|[^|]*`{name}`[^|]*\| (.*) \|$", section("JSON"), re.M)
        assert listed
        for key in re.findall(r"`(\w+)`", listed.group(1).split(": a list")[0]):
            assert key in answer.json, f"{name}: {key}"
    assert found["run"].json.items() >= found["report"].json.items()
    assert found["validate"].json["recipe"]["name"] == "small"
    assert found["runs"].json["runs"][0] | {"finished": ""} == {
        "folder": "runs/small",
        "state": "finished",
        "round": 2,
        "rounds": 2,
        "strategy": "fedavg",
        "macro_loss": found["run"].json["arms"]["federated"]["macro_loss"],
        "finished": "",
    }
    assert found["evaluate"].json["macro_loss"] == pytest.approx(found["runs"].json["runs"][0]["macro_loss"], rel=1e-5)


def test_what_a_method_of_ones_own_prints_stays_out_of_the_json(
    recipe: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process and in a worker."""
    (here / "talkative.py").write_text(
        "from commonweight.train.sft import SupervisedFineTuning\n"
        "class Talkative(SupervisedFineTuning):\n"
        "    def work(self, *arguments, **options):\n"
        "        print('I work', flush=True)\n"
        "        return super().work(*arguments, **options)\n"
        "print('I am imported')\n"
    )
    monkeypatch.syspath_prepend(here)
    answer = call("run", recipe, "--set", "training.objective=talkative:Talkative", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["name"] == "small"
    assert answer.err.startswith("I am imported\n")
    assert "I work\n" in answer.err


def test_libraries_warnings_are_shown_on_request_only(here: Path) -> None:
    (here / "runs" / "one").mkdir(parents=True)
    script = (
        "import warnings, commonweight.data.names as names;"
        "names.natural_key = lambda name: warnings.warn('to be removed', FutureWarning);"
        "from commonweight.cli.main import main; main()"
    )
    for before, shown in ([], False), (["--debug"], True):
        command = [sys.executable, "-c", script, *before, "runs"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert ("to be removed" in done.stderr) is shown


def test_methods() -> None:
    listed = call("methods")
    for name in ("fedavg", "scaffold", "sft", "lora", "p-tuning"):
        assert re.search(rf"^\w+ +{name} ", listed.out, re.M), name
    one = call("methods", "fedadam")
    assert "arXiv:2003.00295" in one.out
    assert re.search(r"^beta1 +0\.9 +\S", one.out, re.M)
    assert [m["name"] for m in call("methods", "fedadam", "--json").json["methods"]] == ["fedadam"]


@pytest.mark.parametrize("kind", ["demo", "instruction", "chat", "text"])
def test_init_writes_what_validate_accepts(kind: str, here: Path) -> None:
    assert call("init", "--kind", kind).code == 0
    assert call("validate", "recipe.yaml").code == 0
    (here / "recipe.yaml").write_text("mine")
    assert call("init", "--kind", kind, "--force").code == 0
    assert call("validate", "recipe.yaml").code == 0


# --- folders


def test_where_a_run_goes(here: Path) -> None:
    from commonweight.cli.folders import choose_output

    def output(resume: bool = False) -> str:
        return str(choose_output(None, "small", resume=resume))

    assert choose_output(Path("mine"), "small", resume=False) == Path("mine")
    assert output() == "runs/small"
    with pytest.raises(errors.StateError, match="no run called small"):
        output(resume=True)
    ended = {"small": True, "small-2": False, "small-10": True, "small-x": False, "smaller": False}
    for name in ended:
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "state.sqlite").touch()
        if ended[name]:
            (here / "runs" / name / "metrics.json").touch()
    assert output() == "runs/small-3", "the first that is free"
    assert output(resume=True) == "runs/small-2", "the latest that has not ended"
    (here / "runs" / "small-2" / "metrics.json").touch()
    assert output(resume=True) == "runs/small-10", "all have ended: the latest"


def test_runs_tells_what_each_folder_holds(recipe: str) -> None:
    here = Path.cwd()
    for _ in range(3):
        assert call("run", recipe, "--quiet", "--set", "evaluation.controls=[]").code == 0
    (here / "runs" / "small" / "metrics.json").unlink()
    (here / "runs" / "small-2" / "metrics.json").write_text('{"format": 1}')
    (here / "runs" / "small-3" / "recipe.yaml").write_text("name: [")
    (here / "runs" / "notes").mkdir()
    assert [(r["folder"], r["state"], r["round"]) for r in call("runs", "--json").json["runs"]] == [
        ("runs/small", "unfinished", 2),
        ("runs/small-2", "finished", 2),
        ("runs/small-3", "damaged", 0),
    ]
    assert call("runs").code == 0
    (here / "empty").mkdir()
    assert call("runs", "empty").out == "no runs in empty\n"


# --- terminals


def in_terminal(*arguments: str, columns: int = 100) -> tuple[int, str, str]:
    """Run a command with a terminal as its standard output; its exit code, what it drew, and standard error."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    env["TERM"] = "xterm-256color"
    process = subprocess.Popen(
        [*PROGRAM, *arguments], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, env=env
    )
    os.close(theirs)
    drawn = b""
    try:
        while chunk := os.read(ours, 65536):
            drawn += chunk
    except OSError:  # Linux says so when the other side has closed
        pass
    os.close(ours)
    _, err = process.communicate(timeout=60)
    return process.returncode, drawn.decode(), err


def test_a_terminal_shows_progress_and_ends_clean(recipe: str) -> None:
    code, drawn, err = in_terminal("run", recipe)
    assert (code, err) == (0, "")
    for text in ("loading", "round 2/2", "control arms", "round 1: held-out loss"):
        assert text in drawn, text
    live, _, rest = drawn.rpartition("\x1b[?25h")
    assert "\x1b[?25l" in live, "the cursor was hidden"
    assert "━" not in rest, "the bar is gone"
    assert "Together (federated)" in rest
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", rest).replace("\r", "").split("\n")
    assert max(map(len, lines)) <= 100, "text is wrapped at words"


def test_an_error_ends_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from commonweight.cli.progress import Progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(errors.DataError), Progress(quiet=False):  # noqa: PT012
        print("run small")
        raise errors.DataError("no rows")
    live, shown, rest = terminal.getvalue().rpartition("\x1b[?25h")
    assert "━" in live
    assert shown
    assert "━" not in rest


def test_text_from_data_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from commonweight.cli.terminal import say, table

    table(("site",), [["\x1b[2Jnorth\nward"], ["[red]south[/red]"]])
    say("an\x1b[31m answer")
    assert capsys.readouterr().out == "site\n\ufffd[2Jnorth ward\n[red]south[/red]\nan\ufffd[31m answer\n"


def test_nobody_reads_on() -> None:
    """As in `commonweight … | head -1`: no complaint."""
    process = subprocess.Popen(
        [*PROGRAM, "validate", "demo", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


# --- Ctrl-C


def test_ctrl_c_says_how_to_go_on(recipe: str) -> None:
    values = ("federation.rounds=40", "evaluation.controls=[]", "training.steps=1", "data.holdout.examples=1")
    settings = [part for value in values for part in ("--set", value)]
    process = subprocess.Popen(
        [*PROGRAM, "run", recipe, *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 2:"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    go_on = "commonweight run runs/small/recipe.yaml -o runs/small --resume"
    assert err == f"interrupted\n  what was done is kept; go on with:\n    {go_on}\n"
    state = call("runs", "--json").json["runs"][0]
    assert state["state"] == "unfinished"
    assert 2 <= state["round"] < 40

    resumed = call(*go_on.split()[1:])
    assert resumed.code == 0, resumed.err
    assert f"resumed after round {state['round']}" in resumed.out
    assert call("runs", "--json").json["runs"][0]["state"] == "finished"


def test_ctrl_c_before_anything_is_done_leaves_nothing(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("commonweight.launch.build_bench", interrupt)
    answer = call("run", recipe, "-o", "mine", "--json")
    assert answer.code == 130
    assert answer.json["error"]["kind"] == "Interrupted"
    assert answer.err == "interrupted\n  nothing was done yet\n  Trying again is safe.\n"
    assert not Path("mine").exists()


def test_ctrl_c_elsewhere(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("commonweight.recipe.load.load_recipe", interrupt)
    answer = call("validate", recipe)
    assert (answer.code, answer.out, answer.err) == (130, "", "interrupted\n")

"""Nothing that arrives is ever unpickled, evaluated or run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import commonweight
from tests.protocol.pickles import RECEIVERS, RECEIVING

SOURCE = Path(commonweight.__file__).parent
MODULES = {"pickle", "_pickle", "cPickle", "pickletools", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.serialization.load",
    "torch.hub.load",
    "torch.jit.load",
    "np.load",
    "numpy.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "os.system",
}


def files() -> list[Path]:
    return sorted(path for package in RECEIVING for path in (SOURCE / package).rglob("*.py"))


def offences(source: str) -> list[str]:
    """What a module imports or calls that it must not, with the line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [ast.unparse(node)]
            found += [f"{node.lineno}: {name}" for name in names if name in CALLS]
            continue
        else:
            continue
        bad = [name for name in names if name.partition(".")[0] in MODULES or name in CALLS]
        found += [f"{node.lineno}: {name}" for name in bad]
    return found


def test_no_module_that_receives_can_unpickle_or_evaluate() -> None:
    found = {str(path.relative_to(SOURCE)): offences(path.read_text(encoding="utf-8")) for path in files()}
    assert {name: bad for name, bad in found.items() if bad} == {}
    assert "wire/frames.py" in found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal",
        "from pickle import loads",
        "from torch import load",
        "import dill as json",
        "f(eval)",
        "exec('1')",
        "torch.load(path, weights_only=True)",
        "x = yaml.load",
    ],
)
def test_the_check_would_see_it(source: str) -> None:
    assert offences(source) != []


def test_the_check_does_not_cry_wolf() -> None:
    assert offences("import json, yaml, re\nmodel.eval()\nyaml.safe_load(x)\nre.compile('a')\njson.load(f)") == []


def test_pickles_and_bombs_are_refused_by_type_and_never_opened() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.protocol.pickles"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert {f"commonweight.{package}" for package in RECEIVING} <= set(result["modules"])
    assert len(result["sent"]) == 15
    for receiver in RECEIVERS:
        assert list(result["refused"][receiver]) == result["sent"]
        expected = {"corrupt-chunk"} if receiver == "chunk" else {"malformed", "too-large"}
        assert set(result["refused"][receiver].values()) <= expected

"""`commonweight audit` from end to end: a run that memorises is found out, a claim below the bound fails, and what
cannot be audited is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from commonweight.errors import StateError
from commonweight.evaluate.report import build_report, write_report
from commonweight.launch import run
from commonweight.leaks.audit import audit_run, claim
from commonweight.recipe import Recipe
from commonweight.recipe.load import load_recipe
from tests.unit.command_line import Answer, call

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

Make = Callable[..., Recipe]
OVERFIT = (
    "data.sites.largest=2",
    "data.sites.take=4",
    "model.adapter.r=16",
    "training.lr=0.01",
    "training.epochs=8",
    "federation.rounds=2",
    "evaluation.controls=[]",
    "evaluation.samples=0",
    "evaluation.exact_match=false",
    "evaluation.resamples=100",
    "engine.workers=2",
    "engine.device=cpu",
)


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo on a few rows, which it learns by heart, canaries among them, without any privacy."""
    folder = tmp_path_factory.mktemp("leaky") / "run"
    run(load_recipe("demo", [*OVERFIT, "privacy.canaries.count=32"]), folder)
    return folder


@pytest.fixture(scope="module")
def audited(leaky: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """The same after an audit, and what that said."""
    folder = Path(shutil.copytree(leaky, tmp_path_factory.mktemp("audited") / "run"))
    return folder, call("audit", folder, "--json")


@pytest.fixture
def copied(leaky: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(leaky, tmp_path / "run"))


@pytest.fixture
def reported(audited: tuple[Path, Answer], tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited[0], tmp_path / "run"))


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    how(value)
    path.write_text(json.dumps(value))


def test_a_run_that_memorises_is_found_out(audited: tuple[Path, Answer]) -> None:
    folder, answer = audited
    assert answer.code == 0, answer.err
    found = answer.json
    assert found["canaries"]["epsilon_at_least"] > 0.5
    assert found["canaries"]["count"] == 32
    assert found["canaries"]["auc"] > 0.9
    assert (found["verdict"], found["claim"]["epsilon"]) == ("nothing claimed", None)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["canaries"] == {"count": 32, "planted": found["canaries"]["planted"], "repeat": 1}
    assert set(found["membership"]) == {"reference_loss", "min_k_plus_plus", "base_loss"}
    known = found["membership"]["reference_loss"]
    assert known["members"] == known["others"] == 8
    assert known["auc"] > 0.7
    shares = found["token_span"]["recovered"]
    assert shares["one step of gradient descent"] >= 0.9
    assert shares["one step of gradient descent, masked for a secure sum"] < found["token_span"]["chance"] + 0.1
    kept = json.loads((folder / "audit.json").read_text())
    assert {"run": str(folder), **kept} == found


def test_the_report_says_it_and_keeps_saying_it(leaky: Path, reported: Path) -> None:
    before = (leaky / "report.html").read_text()
    assert "made-up rows were planted among the training rows" in before
    assert "What the model gives away" not in before
    page = (reported / "report.html").read_text()
    for words in (
        "What the model gives away",
        "An attack that fails proves nothing",
        "The run claims no bound (ε = ∞)",
    ):
        assert words in page
    assert call("report", reported).code == 0
    assert "What the model gives away" in (reported / "report.html").read_text()


def test_a_claim_below_the_bound_fails_with_its_own_exit_code(copied: Path) -> None:
    privacy = {"dp": "site", "epsilon": 0.1, "delta": 1e-5, "clip": 1.0, "noise_multiplier": 90.0, "releases": 3}
    change(copied / "metrics.json", lambda metrics: metrics.update(privacy=privacy))
    told = call("audit", copied)
    assert told.code == 11
    for words in ("Guesses right", "Min-K%++", "One step of gradient descent", "FAILED", "proves nothing"):
        assert words in told.out
    assert told.err == ""
    found = json.loads((copied / "audit.json").read_text())
    assert found["verdict"] == "exceeded"
    assert found["claim"]["epsilon"] < found["canaries"]["epsilon_at_least"]
    assert "FAILED" in (copied / "report.html").read_text()


@pytest.mark.parametrize("unit", ["site", "example"])
def test_a_private_run_is_not_found_to_break_its_claim(unit: str, make_recipe: Make, tmp_path: Path) -> None:
    privacy = {"dp": unit, "clip": 0.5, "delta": 1e-5, "noise_multiplier": 0.6, "canaries": {"count": 40}}
    run(make_recipe(privacy=privacy, federation={"rounds": 2, "weighting": "uniform"}), tmp_path / "run")
    found = audit_run(tmp_path / "run")
    assert found["verdict"] == "not exceeded"
    assert found["canaries"]["epsilon_at_least"] <= found["claim"]["epsilon"]
    noisy = found["token_span"]["recovered"]["one step of gradient descent, clipped and with the run's noise"]
    assert noisy < found["token_span"]["chance"] + 0.1


def test_without_canaries_the_rest_is_done(make_recipe: Make, tmp_path: Path) -> None:
    run(make_recipe(federation={"rounds": 1}), tmp_path / "run")
    answer = call("audit", tmp_path / "run")
    assert answer.code == 0
    assert "No canaries were planted" in answer.out
    assert "Loss against the base" in answer.out


def test_the_claim_of_a_row_in_a_site_that_stays_is_at_twice_the_sensitivity() -> None:
    """δ(ε) = Φ(Δ/2σ − εσ/Δ) − e^ε Φ(−Δ/2σ − εσ/Δ), of T releases with Δ = 2C√T and σ = zC."""
    z, rounds, delta = 4.0, 5, 1e-5
    privacy = {"dp": "site", "epsilon": 2.9, "delta": delta, "clip": 7.0, "noise_multiplier": z, "releases": rounds}
    found = claim(privacy)["epsilon"]
    ratio, phi = 2 * math.sqrt(rounds) / z, NormalDist().cdf
    at = phi(ratio / 2 - found / ratio) - math.exp(found) * phi(-ratio / 2 - found / ratio)
    assert at == pytest.approx(delta, rel=1e-2)
    assert claim({"dp": "example", "epsilon": 3.0, "delta": 1e-6})["epsilon"] == 3.0
    assert claim({"dp": "none", "epsilon": None})["epsilon"] is None
    with pytest.raises(StateError, match="'unheard of'"):
        claim({"dp": "unheard of", "epsilon": 1.0})


def test_an_audit_of_another_adapter_is_not_shown(reported: Path) -> None:
    change(reported / "audit.json", lambda audit: audit.update(adapter_digest="another"))
    write_report(reported)
    assert "What the model gives away" not in (reported / "report.html").read_text()
    (reported / "audit.json").write_text("{")
    with pytest.raises(StateError, match=r"audit\.json is damaged"):
        write_report(reported)


def test_a_report_of_an_audit_without_tokens_says_why(audited: tuple[Path, Answer]) -> None:
    folder, answer = audited
    metrics = json.loads((folder / "metrics.json").read_text())
    page = build_report(metrics, "", {**answer.json, "token_span": {"why_not": "the moon was full"}})
    assert "the moon was full" in page


def gone(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def networked(folder: Path) -> None:
    change(folder / "metrics.json", lambda metrics: metrics.update(engine="network", partition={}))


def clustered(folder: Path) -> None:
    change(folder / "metrics.json", lambda metrics: metrics.update(clusters={"adapter": 0, "found": []}))


MISTAKES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], int, str]] = {
    "no run": (lambda folder: shutil.rmtree(folder), (), 6, "holds no run"),
    "unfinished": (gone("metrics.json"), (), 6, "has not ended"),
    "over a network": (networked, (), 6, "the rows, which are at its sites"),
    "several models": (clustered, (), 6, "several global models"),
    "no list": (gone("canaries.json"), (), 6, "which canaries were planted is not known"),
    "a damaged list": (lambda folder: (folder / "canaries.json").write_text('{"canaries": 3}'), (), 6, "is damaged"),
    "no rows": (lambda folder: None, ("--set", "data.path=nowhere.jsonl"), 3, "there is no nowhere.jsonl"),
    "other rows": (lambda folder: None, ("--set", "data.holdout.examples=3"), 6, "are not those that the run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_audited_is_refused(copied: Path, mistake: str) -> None:
    prepare, options, code, words = MISTAKES[mistake]
    prepare(copied)
    answer = call("audit", copied, *options)
    assert answer.code == code, answer.err
    assert words in answer.err
    assert "Traceback" not in answer.err
    assert not (copied / "audit.json").exists()

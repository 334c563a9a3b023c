"""The report and the summary, on made-up runs whose figures come from `evaluate.metrics` itself."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commonweight.errors import StateError, StorageError
from commonweight.evaluate import (
    Scores,
    build_report,
    charts,
    compare,
    controls_table,
    gains,
    headline,
    macro,
    macro_interval,
    plain_summary,
    summarise,
    svg,
    text,
    write_report,
)
from commonweight.evaluate.cards import cards
from commonweight.evaluate.summary import num_sites, share_of_pooling, tally

COLLECTIONS = (
    "CancerGov",
    "GARD",
    "GHR",
    "MPlus Health Topics",
    "NIDDK",
    "NINDS",
    "NIH SeniorHealth",
    "NHLBI",
    "CDC",
)
RECIPE = """name: medquad
seed: 0
model:
  name: HuggingFaceTB/SmolLM2-135M
  adapter: {kind: lora, r: 8, alpha: 16, targets: all-linear}
data:
  path: medquad.jsonl.gz
  prompt: "Question: {question}\\nAnswer:"
  completion: " {answer}"
  sites: {by: collection, take: 64}
  holdout: {by: focus, examples: 24}
training: {objective: sft, optimizer: adamw, lr: 1.0e-2, schedule: linear, batch_size: 8, max_tokens: 192, epochs: 1}
federation: {rounds: 10, cohort: all, strategy: fedavg}
evaluation: {controls: [base, local, centralised]}
"""
CONTROLS = ("base", "local", "centralised")
BASE, TOGETHER, POOLED, ALONE, ALONE_BEST = 3.35, 2.50, 2.42, 3.18, 2.72


class Run:
    """A made-up run: each site has its own difficulty, subjects have theirs, arms shift every loss."""

    def __init__(
        self, names: tuple[str, ...] = COLLECTIONS, *, rows: int = 24, rounds: int = 10, seed: int = 0
    ) -> None:
        self.names, self.rows, self.rounds = names, rows, rounds
        self.rng = np.random.default_rng(seed)
        self.hard = dict(zip(names, self.rng.normal(0, 0.25, len(names)), strict=True))
        self.luck = dict(zip(names, self.rng.normal(0, 0.22, len(names)), strict=True))
        self.groups = {name: [f"{name}-{k // 2}" for k in range(rows)] for name in names}
        self.tokens = {name: self.rng.integers(20, 180, rows) for name in names}
        self.row_noise = {name: self.rng.normal(0, 0.3, rows) for name in names}

    def scores(self, site: str, loss: float, *, noise: float = 0.08) -> Scores:
        tokens = self.tokens[site]
        rate = np.maximum(loss + self.row_noise[site] + self.rng.normal(0, noise, self.rows), 0.05)
        right = self.rng.binomial(tokens, math.exp(-0.32 * max(loss, 0.1)))
        return Scores(nll=rate * tokens, tokens=tokens, correct=right)

    def arm(self, loss: float, *, luck: float = 0.0) -> tuple[dict[str, Scores], dict[str, Any]]:
        by_site = {n: self.scores(n, loss + self.hard[n] + luck * self.luck[n]) for n in self.names}
        summaries = {n: summarise(by_site[n], self.groups[n], resamples=200) for n in self.names}
        macro_ci95 = macro_interval({n: (by_site[n], self.groups[n]) for n in self.names}, resamples=200)
        return by_site, {
            "macro_loss": macro(summaries),
            "ci95": macro_ci95,
            "token_accuracy": macro(summaries, "token_accuracy"),
            "seconds": 61.4,
            "sites": summaries,
        }

    def curve(self, base: dict[str, Any], last: dict[str, Any]) -> list[dict[str, Any]]:
        rounds = []
        for r in range(self.rounds + 1):
            left = math.exp(-3.5 * r / self.rounds) - math.exp(-3.5) * (r / self.rounds)
            start, end = base["sites"], last["sites"]
            losses = {n: end[n]["loss"] + (start[n]["loss"] - end[n]["loss"]) * left for n in self.names}
            rounds.append({"round": r, "macro_loss": float(np.mean(list(losses.values()))), "sites": losses})
        return rounds

    def metrics(
        self, *, controls: tuple[str, ...] = ("base", "local", "centralised"), cohort: float = 1
    ) -> dict[str, Any]:
        together, federated = self.arm(TOGETHER)
        base = self.arm(BASE)[1]
        federated["rounds"] = self.curve(base, federated)
        arms: dict[str, Any] = {"base": base} if "base" in controls else {}
        arms["federated"] = federated
        if "centralised" in controls:
            arms["centralised"] = self.arm(POOLED)[1]
            arms["centralised"]["rounds"] = self.curve(base, arms["centralised"])
        found = self.local(arms, together) if "local" in controls else {}
        rounds = [self.round(r, cohort) for r in range(1, self.rounds + 1)]
        up = sum(one["bytes_up"] for one in rounds)
        down = sum(one["bytes_down"] for one in rounds)
        return {
            "format": 1, "name": "medquad", "seed": 0, "version": "0.1.0",
            "started": "2026-03-02T08:12:44+00:00", "finished": "2026-03-02T08:51:02+00:00",
            "arms": arms, "gains": found,
            "sites": {n: self.site(n, k) for k, n in enumerate(self.names)},
            "partition": {"size_gini": 0.41, "largest_over_smallest": 6.4, "heterogeneity": 0.214,
                          "heterogeneity_iid": 0.038, "groups": 1204,
                          "heldout_seen_in_training": 0, "digest": "5f0c" * 16},
            "rounds": rounds, "bytes": {"up": up, "down": down, "adapter": 4_900_000},
            "seconds": {"total": 2298.0, "load": 6.1, "federated": 980.0, "controls": 1010.0, "evaluate": 300.0},
            "privacy": {"dp": "none", "epsilon": None},
            "samples": SAMPLES if self.names else [],
            "strategy": {"name": "fedavg", "options": {}},
            "model": {"name": "HuggingFaceTB/SmolLM2-135M", "parameters": 134_515_008, "trainable": 2_442_240,
                      "digest": "a1b2" * 16, "tokenizer_digest": "c3d4" * 16},
            "machine": {"python": "3.11.9", "torch": "2.8.0", "transformers": "5.1.0", "peft": "0.19.0",
                        "platform": "Linux-6.8-x86_64", "cpus": 16, "device": "cpu", "workers": 16},
        }  # fmt: skip

    def local(self, arms: dict[str, Any], together: dict[str, Scores]) -> dict[str, Any]:
        last, arms["local"] = self.arm(ALONE, luck=1.6)
        best, summaries = self.arm(ALONE_BEST, luck=1.0)
        for n in self.names:
            arms["local"]["sites"][n] |= {
                "best_loss": summaries["sites"][n]["loss"], "best_round": 3, "everyone_loss": 3.6 + self.hard[n],
                "rounds": [3.0] * self.rounds,
            }  # fmt: skip
        arms["local"] |= {"best_macro_loss": summaries["macro_loss"], "everyone_macro_loss": 3.62}
        return {
            n: {
                "local": compare(together[n], last[n], self.groups[n], resamples=200),
                "local_best": compare(together[n], best[n], self.groups[n], resamples=200),
            }
            for n in self.names
        }

    def round(self, r: int, cohort: float) -> dict[str, Any]:
        invited = list(self.names)
        if cohort < 1:
            invited = sorted(
                self.rng.choice(self.names, max(1, round(cohort * len(self.names))), replace=False).tolist()
            )
        failed = {invited[1]: "worker died twice (signal 9)"} if r in (3, 7) and len(invited) > 4 else {}
        late = [invited[3]] if r == 6 and len(invited) > 4 else []
        answered = [n for n in invited if n not in failed and n not in late]
        return {
            "round": r, "cohort": invited, "answered": answered, "failed": failed, "late": late,
            "lr": 1e-2 * (1 - 0.9 * (r - 1) / self.rounds), "train_loss": 2.2 + 1.1 * math.exp(-r / 3),
            "steps": 8 * len(answered), "label_tokens": 6100 * len(answered), "bytes_up": 4_900_000 * len(answered),
            "bytes_down": 4_900_000 * len(invited),
            "seconds": {"train": 66.0 + r, "fold": 0.9, "evaluate": 24.0, "commit": 0.4},
        }  # fmt: skip

    def site(self, name: str, k: int) -> dict[str, Any]:
        rows = int(40 + 400 / (k + 1))
        return {
            "train_examples": rows, "train_tokens": rows * 161, "train_label_tokens": rows * 118,
            "heldout_examples": self.rows, "heldout_label_tokens": int(self.tokens[name].sum()),
            "truncated": k, "dropped": 0, "skipped": k % 3,
        }  # fmt: skip


SAMPLES = [
    {
        "site": "NIDDK",
        "prompt": "Question: What are the symptoms of Kidney Stones in Adults?\nAnswer:",
        "reference": "People with kidney stones may have pain while urinating, see blood in the urine, or feel a sharp "
        "pain in the back or lower abdomen. The pain may last for a short or long time.",
        "before": "I have a kidney stone. I have a kidney stone. I have a kidney stone. I have a kidney stone.",
        "after": "People with kidney stones may have pain in the back or side, blood in the urine, and nausea.",
    },
    {
        "site": "CDC",
        "prompt": "Question: Who is at risk for Parasites - Scabies?\nAnswer:",
        "reference": "Scabies can be passed easily by an infested person to his or her household members.",
        "before": "Scabies is a parasite that is found in the skin of the human body.",
        "after": "Scabies can spread easily under crowded conditions where close body contact is frequent.",
    },
]
SUBSETS = [
    (), ("base",), ("local",), ("centralised",), ("base", "local"), ("base", "centralised"), ("local", "centralised"),
    ("base", "local", "centralised"),
]  # fmt: skip
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u202e'


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return Run().metrics()


@pytest.fixture(scope="module")
def thousand() -> dict[str, Any]:
    names = tuple(f"device-{k:04d}" for k in range(1000))
    return Run(names, rows=7, rounds=40, seed=4).metrics(cohort=0.05)


class Page(HTMLParser):
    """Tags must close in order; keeps every tag with its attributes, and the text outside <style>."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data


def page_of(metrics: dict[str, Any]) -> Page:
    return Page(build_report(metrics, RECIPE))


def without(metrics: dict[str, Any], *path: str) -> dict[str, Any]:
    changed = copy.deepcopy(metrics)
    at = changed
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return changed


def test_the_page_needs_nothing_from_outside(metrics: dict[str, Any]) -> None:
    document = build_report(metrics, RECIPE)
    page = Page(document)
    assert not {"script", "link", "img", "iframe", "object", "image", "use", "a"} & {tag for tag, _ in page.tags}
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert not {name for name in attributes if name.startswith("on")} | ({"src", "href", "xlink:href"} & attributes)
    style = document[document.index("<style>") : document.index("</style>")]
    assert not re.search(r"url\(|@import|expression\(", style)
    assert "default-src 'none'" in document


def test_the_page_names_every_part(metrics: dict[str, Any]) -> None:
    words = page_of(metrics).words
    for part in (
        "Which sites gain", "Compared with the alternatives", "Loss over the rounds", "The data", "Who took part",
        "What it cost", "Answers before and after", "How to read this report", "How to reproduce it",
        "worker died twice", "c3d4c3d4", "5f0c5f0c", "2.8.0", "commonweight run recipe.yaml", "ε = ∞",
    ):  # fmt: skip
        assert part in words
    for site in COLLECTIONS:
        assert site in words
    assert RECIPE.strip() in words


@pytest.mark.parametrize("controls", SUBSETS, ids="-".join)
@pytest.mark.parametrize("names", [COLLECTIONS, ("Only site",)], ids=["nine", "one"])
def test_any_subset_of_controls_reads_well(controls: tuple[str, ...], names: tuple[str, ...]) -> None:
    metrics = Run(names, rows=12, rounds=3).metrics(controls=controls)
    words = page_of(metrics).words
    assert not re.search(r"\b(None|nan|inf|undefined|True|False)\b", words)
    assert ("Which sites gain" in words) == ("local" in controls and len(names) > 1)
    assert ("cannot say which sites gain" in words) == ("local" not in controls)
    assert ("pooled" in words) == ("centralised" in controls)
    assert ("Compared with the alternatives" in words) == bool(controls)


def test_whatever_part_is_missing_the_rest_is_shown(metrics: dict[str, Any]) -> None:
    for key in set(metrics) - {"format"}:
        page_of(without(metrics, key))
    for arm, found in metrics["arms"].items():
        for key in found:
            page_of(without(metrics, "arms", arm, key))
    for key in metrics["rounds"][0]:
        if key != "round":
            page_of({**metrics, "rounds": [without(one, key) for one in metrics["rounds"]]})
    assert "Differential privacy" in page_of({"format": 1, "name": "empty"}).words


def test_figures_that_are_not_numbers_are_dashes(metrics: dict[str, Any]) -> None:
    changed = copy.deepcopy(metrics)
    changed["arms"]["federated"]["rounds"][2]["macro_loss"] = math.nan
    changed["arms"]["federated"]["sites"]["CDC"] |= {"loss": math.inf, "ci95": [math.nan, None]}
    changed["gains"]["GARD"]["local"] |= {"difference": None, "ci95": None, "verdict": "who knows"}
    changed["rounds"][0] |= {"train_loss": math.nan, "bytes_up": None, "seconds": {"train": math.nan}}
    page = page_of(changed)
    assert not re.search(r"\b(nan|inf|None)\b", page.words)
    drawn = " ".join(str(value) for _, attrs in page.tags for name, value in attrs.items() if name not in ("title",))
    assert not re.search(r"\b(nan|inf)\b", drawn)


def test_nothing_that_comes_from_outside_is_markup(metrics: dict[str, Any]) -> None:
    hostile = Run((HOSTILE, "GARD", "GHR", "CDC", "NIDDK"), rounds=7).metrics()
    for one in hostile["rounds"]:
        one["failed"] = {HOSTILE: HOSTILE}
    hostile["samples"] = [dict.fromkeys(("site", "prompt", "reference", "before", "after"), HOSTILE)]
    hostile |= {"name": HOSTILE, "version": HOSTILE, "started": HOSTILE, "machine": {"torch": HOSTILE}}
    hostile["model"]["name"] = hostile["privacy"]["dp"] = HOSTILE
    hostile["strategy"] = {"name": HOSTILE, "options": {HOSTILE: HOSTILE}}
    hostile["gains"]["GARD"]["local"]["verdict"] = HOSTILE
    document = build_report(hostile, HOSTILE)
    page = Page(document)
    assert "<script" not in document
    assert "<img" not in document
    assert not [attrs for _, attrs in page.tags if "onerror" in attrs]
    assert HOSTILE in page.words


def test_only_drawings_and_the_style_sheet_bypass_escaping() -> None:
    template = Path(build_report.__code__.co_filename).parent / "templates" / "report.html"
    trusted = set(re.findall(r"{{\s*([\w.]+)\s*\|\s*safe", template.read_text("utf-8")))
    assert trusted
    assert all(name == "style_css" or name.endswith("_svg") for name in trusted)


def test_names_of_any_script_and_length_are_kept_apart() -> None:
    long = "Universitätsklinikum Hamburg-Eppendorf, Klinik für Diagnostische Radiologie, Standort "
    names = (long + "Nord", long + "Süd", "京都大学医学部附属病院", "مستشفى الملك فيصل", "x" * 500, "\ud800")
    metrics = Run(names, rounds=2).metrics()
    page = page_of(metrics)
    shown = {text.shortened(name) for name in names}
    assert len(shown) == len(names)
    assert all(name in page.words for name in shown)
    assert max(len(name) for name in shown) <= 48


def test_the_same_metrics_give_the_same_page(metrics: dict[str, Any]) -> None:
    assert build_report(metrics, RECIPE) == build_report(copy.deepcopy(metrics), RECIPE)


def test_a_thousand_sites_are_summed_up(thousand: dict[str, Any]) -> None:
    document = build_report(thousand, RECIPE)
    page = Page(document)
    assert len(document) < 400_000
    assert "984 sites between" in page.words
    ordered = [row["site"] for row in gains(thousand)]
    assert all(site in page.words for site in ordered[:8] + ordered[-8:])
    assert ordered[500] not in page.words
    found = re.findall(r"<title>[^<]* to [^<]*: ([\d,]+) sites</title>", document)
    assert sum(int(number.replace(",", "")) for number in found) == 2 * 1000
    federated = without(without(thousand, "gains"), "arms", "local")
    assert "The sites with the lowest and the highest loss" in page_of(federated).words


def test_a_gain_is_drawn_right_of_zero_and_a_loss_left(metrics: dict[str, Any]) -> None:
    from commonweight.evaluate import rows

    table = gains(metrics)
    x = rows.gain_scale(table)
    for row in table:
        place = float(re.findall(r'<svg x="([\d.]+)%"', rows.gain_row(row, x))[-1])
        assert (place > x(0)) == (row["difference"] < 0)
        low, high = (x(-end) for end in reversed(row["difference_ci95"]))
        assert 0 <= low <= place <= high <= 100


def test_controls_have_one_row_an_arm(metrics: dict[str, Any]) -> None:
    table = controls_table(metrics)
    assert [row["arm"] for row in table] == [
        "base", "local_everyone", "local", "local_best", "federated", "centralised",
    ]  # fmt: skip
    for row in table:
        assert row["perplexity"] == pytest.approx(math.exp(row["macro_loss"]))
    federated = next(row for row in table if row["arm"] == "federated")
    losses = {name: one["loss"] for name, one in metrics["arms"]["federated"]["sites"].items()}
    assert federated["worst_loss"] == max(losses.values()) == losses[federated["worst_site"]]
    assert federated["ci95"] == metrics["arms"]["federated"]["ci95"]
    best = next(row for row in table if row["arm"] == "local_best")
    assert best["worst_loss"] == max(one["best_loss"] for one in metrics["arms"]["local"]["sites"].values())
    assert controls_table({"arms": {}}) == []
    assert federated["loss_std"] == pytest.approx(np.std(list(losses.values())), rel=1e-12)
    assert best["loss_std"] != pytest.approx(federated["loss_std"], rel=1e-3)
    nothing = controls_table({"arms": {"federated": {"macro_loss": 2.0, "sites": {}}}})
    assert [(row["worst_site"], row["worst_loss"], row["loss_std"]) for row in nothing] == [(None, None, None)]


def test_the_worst_site_stands_beside_the_mean_also_where_there_is_one_arm() -> None:
    alone = Run().metrics(controls=())
    losses = {name: one["loss"] for name, one in alone["arms"]["federated"]["sites"].items()}
    worst = max(losses, key=lambda name: losses[name])
    mean, card = cards(alone)[:2]
    assert mean["label"] == "Mean loss, together"
    assert (card["label"], card["value"]) == ("Worst site’s loss, together", f"{losses[worst]:.2f}")
    assert card["note"] == f"{worst}; spread {np.std(list(losses.values())):.2f}"
    assert "Worst site’s loss, together" in build_report(alone, RECIPE)
    one = Run(("only",)).metrics(controls=())
    assert not any(card["label"].startswith("Worst") for card in cards(one))


def test_the_table_of_arms_shows_the_worst_site_and_the_spread_of_each(metrics: dict[str, Any]) -> None:
    page = build_report(metrics, RECIPE)
    for row in controls_table(metrics):
        cell = rf"{re.escape(row['worst_site'])}.{{0,40}}{row['worst_loss']:.3f}.{{0,40}}{row['loss_std']:.3f}"
        assert re.search(cell, page, re.DOTALL), row["arm"]


def test_gains_are_sorted_and_say_what_was_measured(metrics: dict[str, Any]) -> None:
    table = gains(metrics)
    assert {row["site"] for row in table} == set(COLLECTIONS)
    assert [row["difference"] for row in table] == sorted(row["difference"] for row in table)
    for row in table:
        measured = metrics["gains"][row["site"]]
        assert (row["verdict"], row["difference_ci95"]) == (measured["local"]["verdict"], measured["local"]["ci95"])
        assert row["best_verdict"] == measured["local_best"]["verdict"]
        assert row["difference"] == pytest.approx(row["federated"] - row["local"])


def test_without_measured_gains_the_difference_is_known_but_unclear(metrics: dict[str, Any]) -> None:
    table = gains(without(metrics, "gains"))
    assert {row["verdict"] for row in table} == {"unclear"}
    assert all(row["difference"] == pytest.approx(row["federated"] - row["local"]) for row in table)
    assert {row["verdict"] for row in gains(without(metrics, "arms", "local"))} == {"gains", "loses"}
    alone = without(without(metrics, "gains"), "arms", "local")
    assert {row["verdict"] for row in gains(alone)} == {None}
    assert tally(alone) == {}


def small(*, verdicts: str = "ggl", together: float = 2.0, **arms: float) -> dict[str, Any]:
    """Hand-made metrics: one letter a site, gains, loses or unclear."""
    names = [f"site {k}" for k in range(len(verdicts))]
    words = {"g": "gains", "l": "loses", "u": "unclear"}
    return {
        "arms": {"federated": {"macro_loss": together, "ci95": [1.9, 2.1], "sites": {n: {"loss": 2.0} for n in names}}}
        | {arm: {"macro_loss": loss, "sites": {n: {"loss": loss} for n in names}} for arm, loss in arms.items()},
        "sites": {n: {} for n in names},
        "gains": {
            n: {"local": {"difference": -1.0, "ci95": None, "verdict": words[v]}}
            for n, v in zip(names, verdicts, strict=True)
            if "local" in arms
        },
        "rounds": [{"cohort": names, "answered": names}] * 2,
        "bytes": {"up": 12_300_000},
    }


def test_the_summary_in_full() -> None:
    assert plain_summary(small(local=3.0, base=4.0, centralised=1.8)) == [
        "Three sites trained one language model together for two rounds.",
        "On text that none of them trained on, the shared model’s mean loss is 2.00 nats per token (95\u202f% interval "
        "1.90 to 2.10), against 3.00 when each site trains alone and 4.00 before training; lower is better.",
        "Its perplexity falls from 54.6 before training to 7.39: it is as unsure of each next token as if it chose "
        "evenly among 7 of them.",
        "Compared with training alone, two sites gain and one loses.",
        "Pooling everyone’s data in one place reaches 1.80; training together reaches 91\u202f% of that gain "
        "without pooling.",
        "No row of data left its site. What left: 12.3\u202fMB of adapter updates, 2.0\u202fMB for each site and "
        "round.",
        "Differential privacy: off (ε = ∞), so nothing bounds what the updates themselves may reveal.",
        "This was a simulation on one machine, where the pooled comparison read every row.",
    ]


@pytest.mark.parametrize(
    ("verdicts", "title", "compared"),
    [
        ("ggg", "Training together helped all three sites.", "all three sites gain"),
        ("ggl", "Training together helped two of three sites, and set back one.", "two sites gain and one loses"),
        ("guu", "Training together helped one of three sites, and set back none.",
         "one site gains, none loses and two are unclear"),
        ("ull", "Training together helped no site, and set back two of three.",
         "none gains, two sites lose and one is unclear"),
        ("lll", "Training together helped no site, and set back three of three.", "all three sites lose"),
        ("uuu", "For none of three sites is it clear whether training together helped.", "all three sites are unclear"),
    ],
)  # fmt: skip
def test_verdicts_in_words(verdicts: str, title: str, compared: str) -> None:
    metrics = small(verdicts=verdicts, local=3.0)
    assert headline(metrics) == title
    assert f"Compared with training alone, {compared}." in plain_summary(metrics)


@pytest.mark.parametrize(
    ("metrics", "title"),
    [
        (small(), "Three sites trained one model together."),
        (small(base=4.0), "Three sites trained one model together; its perplexity fell from 54.6 to 7.39."),
        (small(base=1.0), "Three sites trained one model together; its perplexity rose from 2.72 to 7.39."),
        (small(verdicts="g", local=3.0), "One site trained one model."),
    ],
)
def test_headlines_without_a_comparison(metrics: dict[str, Any], title: str) -> None:
    assert headline(metrics) == title


def test_an_asynchronous_run_says_how_stale_its_updates_were() -> None:
    metrics = {
        **small(verdicts="gg", base=4.0),
        "arrivals": {"staleness": {"0": 3, "2": 1}, "shares": {"a": 0.75, "b": 0.25}},
    }
    said = "The four updates were made from a model that was 0.5 versions behind on average, two at most; the busiest "
    assert f"{said}site brought 75\u202f% of them, the least busy 25\u202f%." in plain_summary(metrics)
    metrics["arrivals"]["shares"] = {"a": 1.0}
    assert f"{said}site brought 100\u202f% of them, and one site none." in plain_summary(metrics)


def test_the_summary_owns_up_to_what_went_wrong() -> None:
    metrics = small(local=1.5, base=1.0, together=2.0)
    metrics["rounds"][0] = {"cohort": ["a", "b"], "answered": [], "failed": {"a": "out of memory"}, "late": ["b"]}
    metrics |= {"privacy": {"dp": "central", "epsilon": 3.25, "delta": 1e-5}, "engine": "network"}
    sentences = plain_summary(metrics)
    assert any("perplexity rises from 2.72" in one for one in sentences)
    missing = "Of five answers asked of the sites, one failed and one came too late; those rounds went on without them."
    assert missing in sentences
    assert sentences[-1] == (
        "Differential privacy: central, ε = 3.25, δ = 1e−05. The local control trained without it."
    )
    assert not any("simulation" in one for one in sentences)


def test_before_training_is_known_from_round_zero(metrics: dict[str, Any]) -> None:
    alone = Run().metrics(controls=())
    start = alone["arms"]["federated"]["rounds"][0]
    assert all(row["base"] == start["sites"][row["site"]] for row in gains(alone))
    assert f"against {start['macro_loss']:.2f} before training" in plain_summary(alone)[1]
    assert [row["arm"] for row in controls_table(alone)] == ["federated"]


def test_the_share_of_pooling() -> None:
    assert share_of_pooling(small(base=4.0, centralised=1.5)) == pytest.approx(0.8)
    assert share_of_pooling(small(base=1.0, centralised=1.5)) is None
    assert share_of_pooling(small(base=4.0)) is None
    assert any("does no worse without pooling" in one for one in plain_summary(small(base=4.0, centralised=2.2)))
    assert any("does not reach any" in one for one in plain_summary(small(base=2.0, centralised=1.5)))
    assert num_sites(small()) == 3


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (text.number(-1234.5), "−1,234.50"), (text.number(-0.001), "0.00"), (text.number(0.5, sign=True), "+0.50"),
        (text.number(None), "–"), (text.number(math.inf), "–"), (text.number(True), "–"),
        (text.size(0), "0\u202fB"), (text.size(999), "999\u202fB"), (text.size(1000), "1.0\u202fkB"),
        (text.size(41_234_567), "41.2\u202fMB"), (text.size(999_700), "1.0\u202fMB"),
        (text.size(3e15), "3,000.0\u202fTB"), (text.duration(0.42), "0.4\u202fs"),
        (text.duration(59.6), "1\u202fmin"), (text.duration(200), "3\u202fmin 20\u202fs"),
        (text.duration(3599.7), "1\u202fh 00\u202fmin"), (text.duration(3900), "1\u202fh 05\u202fmin"),
        (text.percent(0.956), "96\u202f%"), (text.span([1, 2.345]), "1.00 to 2.35"), (text.span(None), "–"),
        (text.surprise(7.389), "7.39"), (text.surprise(28.53), "28.5"), (text.surprise(1234.5), "1,234"),
        (text.surprise(3e9), "3.0e+09"), (text.significant(1e-5), "1e−05"),
        (text.count(0), "no"), (text.count(12), "twelve"), (text.count(13), "13"), (text.count(1000), "1,000"),
        (text.counted(1, "site"), "one site"), (text.counted(0, "site"), "no sites"),
        (text.listed([]), ""), (text.listed(["a"]), "a"), (text.listed(["a", "b", "c"]), "a, b and c"),
        (text.shortened("x" * 48), "x" * 48), (text.shortened("a" * 40 + "b" * 40), "a" * 31 + "…" + "b" * 16),
    ],
)  # fmt: skip
def test_figures_in_words(written: str, expected: str) -> None:
    assert written == expected


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 8))
def test_ticks_are_few_round_and_inside(low: float, length: float, wanted: int) -> None:
    scale = svg.scale_over([low, low + length])
    ticks = scale.ticks(wanted)
    assert len(ticks) <= 2 * wanted + 1
    assert all(scale.low - 1e-6 * abs(scale.low) <= tick <= scale.high + 1e-6 * abs(scale.high) for tick in ticks)
    digits = scale.digits(wanted)
    assert all(round(tick, digits) == pytest.approx(tick, abs=1e-9 + 1e-9 * abs(tick)) for tick in ticks)


@given(st.lists(st.floats(0, 300), min_size=1, max_size=6))
def test_labels_keep_their_distance_and_their_order(wanted: list[float]) -> None:
    placed = svg.spread(wanted, 17, 0, 300)
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    steps = [placed[b] - placed[a] for a, b in itertools.pairwise(order)]
    assert all(step >= 17 - 1e-9 for step in steps)
    assert all(0 <= place <= 300 for place in placed)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50), st.booleans())
def test_a_histogram_counts_every_site_once(values: list[float], split: bool) -> None:
    drawn = charts.histogram(values, split_at_zero=split, title="t")
    assert sum(int(found) for found in re.findall(r": (\d+) sites</title>", drawn)) == len(values)
    Page(drawn)


def test_markup_in_drawings_is_escaped() -> None:
    drawn = svg.drawing(svg.label(0, 0, "<b>&"), svg.box(0, 0, 1, 1, 'x" onload="y', "<i>"), height=1, title='"<')
    assert not {"b", "i"} & {tag for tag, _ in Page(drawn).tags}
    assert "onload" not in {name for _, attrs in Page(drawn).tags for name in attrs}
    assert "&lt;b&gt;&amp;" in drawn


@pytest.fixture
def run_dir(tmp_path: Path, metrics: dict[str, Any]) -> Path:
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_the_report_is_written_beside_the_metrics(run_dir: Path, metrics: dict[str, Any]) -> None:
    assert write_report(run_dir) == run_dir / "report.html"
    assert (run_dir / "report.html").read_text("utf-8") == build_report(metrics, RECIPE)
    assert {path.name for path in run_dir.iterdir()} == {"metrics.json", "recipe.yaml", "report.html"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", None, "does not exist"),
        ("recipe.yaml", None, "does not exist"),
        ("metrics.json", b'{"format": 1, "name', "not valid JSON"),
        ("metrics.json", b"\xff\xfe", "cannot be read"),
        ("metrics.json", b"[]", "format None"),
        ("metrics.json", b'{"format": 2}', "format 2; this version reads 1"),
        ("metrics.json", b'{"format": 1, "rounds": {}}', "`rounds` must be a list"),
        ("metrics.json", b'{"format": 1, "arms": null}', "`arms` must be a dict"),
    ],
)
def test_a_damaged_run_is_an_error_that_keeps_the_old_report(
    run_dir: Path, name: str, content: bytes | None, message: str
) -> None:
    (run_dir / "report.html").write_text("the old report")
    (run_dir / name).unlink() if content is None else (run_dir / name).write_bytes(content)
    with pytest.raises(StateError, match=message) as caught:
        write_report(run_dir)
    assert caught.value.hint
    assert (run_dir / "report.html").read_text() == "the old report"


def test_a_report_that_cannot_be_written_leaves_nothing_behind(run_dir: Path) -> None:
    (run_dir / "report.html").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(run_dir)
    assert {path.name for path in run_dir.iterdir()} == {"metrics.json", "recipe.yaml", "report.html"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import commonweight.evaluate, sys; print({'torch', 'jinja2', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_rates_have_a_column_where_they_were_scored(metrics: dict[str, Any]) -> None:
    assert "Exact answers" not in page_of(metrics).words
    scored = copy.deepcopy(metrics)
    scored["arms"]["federated"]["exact_match"] = 0.125
    words = page_of(scored).words
    assert all(word in words for word in ("Tokens right", "Exact answers", "12.5\u202f%"))
    assert [row["exact_match"] for row in controls_table(scored) if row["arm"] == "federated"] == [0.125]


def test_time_by_phase_adds_up(metrics: dict[str, Any]) -> None:
    from commonweight.evaluate.view import phases

    shown = {row["phase"]: row["time"] for row in phases(metrics)}
    assert list(shown) == ["load", "train", "fold", "evaluate", "commit", "controls", "other"]
    assert shown["train"] == text.duration(sum(66 + r for r in range(1, 11)))
    assert shown["evaluate"] == text.duration(10 * 24 + 300)
    spent = 6.1 + 715 + 9 + 540 + 4 + 1010
    assert shown["other"] == text.duration(2298 - spent)


def test_held_out_examples_seen_in_training_are_owned_up_to(metrics: dict[str, Any]) -> None:
    seen = copy.deepcopy(metrics)
    seen["partition"]["heldout_seen_in_training"] = 3
    assert re.search(r"3 held-out\s+examples are identical", page_of(seen).words)
    assert "never trained on" not in page_of(seen).words
    assert not any("none of them trained on" in one for one in plain_summary(seen))
    assert "never trained on by any site" in page_of(metrics).words

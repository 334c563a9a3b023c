"""What the report's template shows, from the metrics: plain values, and drawings under keys that end in `_svg`.

Beyond `MANY` sites a table of all of them tells a reader nothing: the report then shows the sites at both ends and a
histogram of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import charts, rows
from .cards import cards
from .summary import controls_table, dig, gains, headline, num_seen, num_sites, personal_gains, summary_paragraphs
from .text import NONE, duration, finite, number, parts_in_words, percent, significant, size, span, surprise, whole

RATES = {"token_accuracy": "Tokens right", "exact_match": "Exact answers", "choice_accuracy": "Right choices"}
MANY = 40
EXTREMES = 8
MANY_ROWS = 60
MAX_ROUND_ROWS = 30
MAX_SAMPLES = 40
MAX_NAMES = 24
MAX_SAMPLE_CHARACTERS = 1500

Metrics = Mapping[str, Any]
View = dict[str, Any]


def build_view(metrics: Metrics, recipe_yaml: str) -> View:
    """Everything the template needs; parts without data are empty and are left out of the page."""
    return {
        "name": str(metrics.get("name") or "run"),
        "finished": str(metrics.get("finished") or metrics.get("started") or "")[:16].replace("T", " "),
        "version": str(metrics.get("version") or ""),
        "model": str(dig(metrics, "model", "name") or ""),
        "num_sites": num_sites(metrics),
        "headline": headline(metrics),
        "paragraphs": summary_paragraphs(metrics),
        "cards": cards(metrics),
        "controls": controls(metrics),
        "sites": sites(metrics),
        "clusters": clusters(metrics),
        "personal": personal(metrics),
        "curves_svg": charts.loss_curves(metrics),
        "turnout": turnout(metrics),
        "traffic_svg": charts.traffic_columns(_rounds(metrics)),
        "codecs": codecs(metrics),
        "phases": phases(metrics),
        "rounds": round_rows(metrics),
        "partition": partition(metrics),
        "samples": samples(metrics),
        "recipe": recipe_yaml.strip(),
        "facts": facts(metrics),
        "arms": set(metrics.get("arms") or {}),
    }


def _rounds(metrics: Metrics) -> list[Mapping[str, Any]]:
    return list(metrics.get("rounds") or [])


def controls(metrics: Metrics) -> View:
    """The arms as table rows, each with a strip drawing, and whether there is more than one."""
    table = controls_table(metrics)
    if not table:
        return {}
    x = rows.strip_scale(table)
    rates = [key for key in RATES if any(row[key] is not None for row in table)]
    shown = [
        {
            **row,
            "loss": number(row["macro_loss"], 3),
            "interval": span(row["ci95"], 3),
            "perplexity": surprise(row["perplexity"]),
            "rates": [percent(row[key], 1) for key in rates],
            "worst": number(row["worst_loss"], 3),
            "spread": number(row["loss_std"], 3),
            "strip_svg": rows.strip(row, x),
        }
        for row in table
    ]
    return {
        "rows": shown,
        "rates": [RATES[key] for key in rates],
        "axis_svg": rows.axis(x, sign=False, wanted=rows.STRIP_TICKS),
    }


def extremes(items: Sequence[View]) -> list[View]:
    """All items, or the first and last `EXTREMES` of many, the last ones led by a row that counts what lies between."""
    if len(items) <= MANY:
        return list(items)
    between = {**items[-EXTREMES], "skipped_rows": len(items) - 2 * EXTREMES}
    return [*items[:EXTREMES], between, *items[1 - EXTREMES :]]


def sites(metrics: Metrics) -> View:
    """The chart of sites: gains against local-only where measured, else losses (from the base where measured)."""
    table = gains(metrics)
    compared = [row for row in table if row["difference"] is not None]
    if compared and len(table) > 1:
        return _gain_chart(compared)
    known = sorted((row for row in table if row["federated"] is not None), key=lambda row: float(row["federated"]))
    return _loss_chart(known) if known else {}


def _gain_chart(table: list[View]) -> View:
    shown = extremes(table)
    x = rows.gain_scale(shown)
    many = len(table) > MANY
    hist = charts.histogram([-row["difference"] for row in table], split_at_zero=True, title="Sites by loss saved")
    return {
        "kind": "gains",
        "rows": [{**row, "numbers": _gain_numbers(row), "row_svg": rows.gain_row(row, x)} for row in shown],
        "axis_svg": rows.axis(x, sign=True),
        "histogram_svg": hist if many else "",
        "has_best": any(row["best_difference"] is not None for row in table),
        "by_chance": number(0.05 * len(table), 0 if len(table) > MANY else 1),
    }


def _gain_numbers(row: View) -> View:
    return {
        "alone": number(row["local"]),
        "together": number(row["federated"]),
        "saved": number(None if row["difference"] is None else -row["difference"], sign=True),
        "interval": span([-end for end in reversed(rows.interval_of(row, "difference_ci95") or ())], sign=True),
    }


def _loss_chart(table: list[View]) -> View:
    shown = extremes(table)
    x = rows.loss_scale(shown, ("base", "federated"))
    hist = charts.histogram([row["federated"] for row in table], split_at_zero=False, title="Sites by held-out loss")
    return {
        "kind": "losses",
        "rows": [
            {**row, "loss": number(row["federated"], 3), "interval": span(row["ci95"], 3), "row_svg": svg}
            for row, svg in ((row, rows.loss_row(row, x)) for row in shown)
        ],
        "axis_svg": rows.axis(x, sign=False),
        "histogram_svg": hist if len(table) > MANY else "",
        "has_base": any(row["base"] is not None for row in table),
    }


def personal(metrics: Metrics) -> View:
    """The sites that have models of their own, beside the shared one; the largest gain first."""
    table = personal_gains(metrics)
    return {
        "rows": [
            {
                **row,
                "numbers": [number(row["federated"], 3), number(row["personal"], 3)],
                "saved": number(-row["difference"], sign=True),
                "interval": span([-end for end in reversed(row["ci95"] or ())], sign=True),
                "share": "" if row["alpha"] is None else percent(row["alpha"]),
            }
            for row in extremes(table)
        ],
        "chosen": any(row["alpha"] is not None for row in table),
    }


def turnout(metrics: Metrics) -> View:
    """Who took part in which round: a grid of sites, or columns by round for many sites; why tasks failed."""
    done = _rounds(metrics)
    names = list(metrics.get("sites") or {}) or sorted({site for one in done for site in one.get("cohort") or ()})
    if not done or not names:
        return {}
    many = len(names) > MANY_ROWS
    reasons = [
        {"round": one.get("round"), "site": site, "reason": str(reason)}
        for one in done
        for site, reason in (one.get("failed") or {}).items()
    ]
    return {
        "columns_svg": charts.turnout_columns(done) if many else "",
        "rows": [] if many else [_turnout_row(site, done) for site in names],
        "last_round": done[-1].get("round"),
        "first_round": done[0].get("round"),
        "states": _states(done, 0 if many else len(names)),
        "reasons": reasons[:MAX_ROUND_ROWS],
        "more_reasons": max(0, len(reasons) - MAX_ROUND_ROWS),
    }


def _states(done: Sequence[Mapping[str, Any]], expected: int) -> set[str]:
    states = {state for state in ("answered", "late", "failed") if any(one.get(state) for one in done)}
    seen = min(sum(len(one.get(state) or ()) for state in states) for one in done)
    return states | ({"idle"} if seen < expected else set())


def _turnout_row(site: str, done: Sequence[Mapping[str, Any]]) -> View:
    answered = sum(site in (one.get("answered") or ()) for one in done)
    return {"site": site, "row_svg": rows.turnout_row(site, done), "answered": f"{answered} of {len(done)}"}


def phases(metrics: Metrics) -> list[View]:
    """Wall-clock time by phase; what no phase accounts for is `other`."""
    by_round = [one.get("seconds") or {} for one in _rounds(metrics)]
    spent = {"load": finite(dig(metrics, "seconds", "load")) or 0.0}
    for phase in dict.fromkeys(key for one in by_round for key in one):
        spent[phase] = sum(finite(one.get(phase)) or 0.0 for one in by_round)
    spent["evaluate"] = spent.get("evaluate", 0.0) + (finite(dig(metrics, "seconds", "evaluate")) or 0.0)
    spent["controls"] = finite(dig(metrics, "seconds", "controls")) or 0.0
    total = max(finite(dig(metrics, "seconds", "total")) or 0.0, sum(spent.values()))
    spent["other"] = total - sum(spent.values())
    largest = max(spent.values())
    return [
        {
            "phase": phase,
            "time": duration(seconds),
            "share": percent(seconds / total) if seconds >= 0.005 * total else "under 1\u202f%",
            "bar_svg": rows.bar(seconds, largest),
        }
        for phase, seconds in spent.items()
        if seconds > 0.0005 * total and seconds > 0
    ]


def round_rows(metrics: Metrics) -> View:
    """The rounds as a table, thinned evenly where there are many."""
    done = _rounds(metrics)
    step = max(1, -(-len(done) // MAX_ROUND_ROWS))
    shown = [one for k, one in enumerate(done) if k % step == 0 or k == len(done) - 1]
    return {"step": step, "rows": [_round_row(one) for one in shown]}


def _round_row(one: Mapping[str, Any]) -> View:
    return {
        "round": one.get("round"),
        "answered": f"{len(one.get('answered') or ()):,} of {len(one.get('cohort') or ()):,}",
        "lr": significant(one.get("lr")),
        "train_loss": number(one.get("train_loss"), 3),
        "steps": whole(one.get("steps")),
        "label_tokens": whole(one.get("label_tokens")),
        "up": size(one.get("bytes_up")),
        "down": size(one.get("bytes_down")),
        "time": duration(sum(finite(seconds) or 0.0 for seconds in (one.get("seconds") or {}).values())),
    }


def codecs(metrics: Metrics) -> View:
    """What updates were made small by, and what sites sent and fetched; empty without figures."""
    found = dig(metrics, "bytes", "codecs") or {}
    adapter = finite(dig(metrics, "bytes", "adapter"))
    by_site = {site: one for site, one in (dig(metrics, "bytes", "sites") or {}).items() if isinstance(one, Mapping)}
    most = sorted(by_site, key=lambda site: -(finite(by_site[site].get("up")) or 0.0))
    return {
        "rows": [_codec_row(name, one, adapter) for name, one in found.items()],
        "sites": [
            {"site": s, "up": size(by_site[s].get("up")), "down": size(by_site[s].get("down"))}
            for s in most[:MAX_NAMES]
        ],
        "more": max(0, len(most) - MAX_NAMES),
    }


def _codec_row(name: str, one: Mapping[str, Any], adapter: float | None) -> View:
    updates, sent = finite(one.get("updates")) or 0.0, finite(one.get("bytes")) or 0.0
    told = {"none": "none: the numbers as they are", "masked": "masked: a row of a secure sum"}
    told["encrypted"] = "encrypted: a row of a secure sum"
    return {
        "codec": told.get(name, name),
        "updates": whole(updates),
        "bytes": size(sent),
        "each": size(sent / updates) if updates else NONE,
        "fewer": f"{adapter * updates / sent:.1f}×" if adapter and sent else NONE,
    }


def clusters(metrics: Metrics) -> list[View]:
    """One row a cluster of sites; empty where all sites have one model."""
    return [
        {
            "cluster": one["cluster"],
            "num_sites": whole(len(one["sites"])),
            "sites": one["sites"][:MAX_NAMES],
            "more": max(0, len(one["sites"]) - MAX_NAMES),
            "loss": number(one["macro_loss"], 3),
            "is_adapter": one["cluster"] == dig(metrics, "clusters", "adapter"),
        }
        for one in dig(metrics, "clusters", "found") or []
    ]


def partition(metrics: Metrics) -> View:
    """How the data lie across sites: figures of skew, and the sites by size."""
    found = metrics.get("partition") or {}
    counts = {name: finite(dig(one, "train_examples")) or 0.0 for name, one in (metrics.get("sites") or {}).items()}
    table = [
        {"site": name, "data": dig(metrics, "sites", name), "examples": examples}
        for name, examples in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    if not table:
        return {}
    many = len(table) > MANY
    hist = charts.histogram(list(counts.values()), split_at_zero=False, title="Sites by training examples")
    return {
        "rows": [_size_row(row, max(counts.values())) for row in extremes(table)],
        "histogram_svg": hist if many else "",
        "figures": _skew(found, counts),
        "num_seen": num_seen(metrics),
    }


def _size_row(row: View, largest: float) -> View:
    data: Mapping[str, Any] = row["data"]
    keys = ("train_examples", "train_tokens", "heldout_examples", "heldout_label_tokens", "truncated")
    left_out = (finite(data.get("dropped")) or 0.0) + (finite(data.get("skipped")) or 0.0)
    numbers = [whole(data.get(key)) for key in keys] + [whole(left_out)]
    return {**row, "numbers": numbers, "bar_svg": rows.bar(row["examples"], largest)}


def _skew(found: Mapping[str, Any], counts: Mapping[str, float]) -> list[tuple[str, str]]:
    figures = [
        ("Training examples", whole(sum(counts.values()))),
        ("Largest site over smallest", number(found.get("largest_over_smallest"), 1)),
        ("Inequality of sizes (Gini, 0 to 1)", number(found.get("size_gini"))),
        ("Difference between sites’ data", number(found.get("heterogeneity"), 3)),
        ("The same, if dealt at random", number(found.get("heterogeneity_iid"), 3)),
        ("Groups kept whole", whole(found.get("groups"))),
    ]
    return [(name, value) for name, value in figures if value != NONE]


def samples(metrics: Metrics) -> list[View]:
    """Answers before and after, cut to a length that a page holds."""
    keys = ("site", "prompt", "reference", "before", "after")
    found = list(metrics.get("samples") or [])[:MAX_SAMPLES]
    return [{key: _cut(one.get(key)) for key in keys} for one in found]


def _cut(text: object) -> str:
    written = str(text if text is not None else "").strip()
    return written if len(written) <= MAX_SAMPLE_CHARACTERS else written[:MAX_SAMPLE_CHARACTERS].rstrip() + " …"


def facts(metrics: Metrics) -> list[tuple[str, str]]:
    """What the run was made of: seed, versions, digests."""
    machine, strategy = metrics.get("machine") or {}, metrics.get("strategy") or {}
    options = ", ".join(f"{key} {value}" for key, value in (strategy.get("options") or {}).items())
    pairs = [
        ("Seed", metrics.get("seed")),
        ("commonweight", metrics.get("version")),
        *((name, machine.get(name)) for name in ("python", "torch", "transformers", "peft", "platform", "device")),
        ("CPU cores, workers", _pair(machine.get("cpus"), machine.get("workers"))),
        ("Strategy", f"{strategy.get('name')}{f' ({options})' if options else ''}" if strategy else None),
        ("Base model", dig(metrics, "model", "name")),
        ("Base weights digest", dig(metrics, "model", "digest")),
        ("Tokenizer digest", dig(metrics, "model", "tokenizer_digest")),
        ("Partition digest", dig(metrics, "partition", "digest")),
        ("Adapter", size(dig(metrics, "bytes", "adapter")) if dig(metrics, "bytes", "adapter") else None),
        ("Parts of it at sites", "; ".join(parts_in_words(metrics.get("parts") or {}))),
        ("Started", metrics.get("started")),
        ("Finished", metrics.get("finished")),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def _pair(first: object, second: object) -> str | None:
    known = [str(value) for value in (first, second) if value not in (None, "")]
    return ", ".join(known) or None

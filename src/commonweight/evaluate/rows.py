"""The report's charts with one row a site, a phase or an arm: drawings that stand inside table rows.

Blue is training together, orange is training alone; the two keep their lightness apart for readers who do not tell
colours apart, and each verdict has its own shape: a disc gains, a diamond loses, a ring is unclear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .svg import Scale, box, drawing, label, line, mark, scale_over
from .text import NONE, finite, number, span

ROW_HEIGHT = 40.0
STRIP_HEIGHT = 22.0
AXIS_HEIGHT = 22.0
STRIP_TICKS = 4
SHAPES = {"gains": "circle", "loses": "diamond", "unclear": "circle"}


def interval_of(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The interval under `key` as two finite floats, or None."""
    found = row.get(key)
    if not isinstance(found, Sequence) or len(found) != 2:
        return None
    low, high = finite(found[0]), finite(found[1])
    return None if low is None or high is None else (low, high)


def gain_scale(rows: Sequence[Mapping[str, Any]]) -> Scale:
    """One x axis for all rows of `gain_row`: losses saved, zero always in view."""
    values = [0.0]
    for row in rows:
        for prefix in ("", "best_"):
            values += [-row[f"{prefix}difference"]] if row[f"{prefix}difference"] is not None else []
            values += [-end for end in interval_of(row, f"{prefix}difference_ci95") or ()]
    return scale_over(values)


def gain_row(row: Mapping[str, Any], x: Scale) -> str:
    """Loss that a site saves by training together: against alone (large), and alone at its best (small)."""
    shapes = _backdrop(x, ROW_HEIGHT)
    for prefix, y, radius in (("best_", 29.0, 3.5), ("", 14.0, 6.0)):
        difference, verdict = row[f"{prefix}difference"], row[f"{prefix}verdict"] or "unclear"
        if difference is None:
            continue
        ends = interval_of(row, f"{prefix}difference_ci95")
        size = "small" if prefix else "large"
        if ends:
            shapes.append(line(x(-ends[1]), y, x(-ends[0]), y, f"whisker {size} {verdict}"))
        against = "at its best" if prefix else "in its last round"
        interval = f" ({span((-ends[1], -ends[0]), 3, sign=True)})" if ends else ""
        tip = f"Against alone {against}: {number(-difference, 3, sign=True)}{interval}, {verdict}"
        shapes.append(mark(x(-difference), y, SHAPES[verdict], radius, f"point {size} {verdict}", tip))
    return drawing(*shapes, height=ROW_HEIGHT, class_="row")


def loss_scale(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> Scale:
    """One x axis for all rows of `loss_row`."""
    values = [row[arm] for row in rows for arm in arms if row[arm] is not None]
    values += [end for row in rows for end in interval_of(row, "ci95") or ()]
    return scale_over(values)


def loss_row(row: Mapping[str, Any], x: Scale) -> str:
    """A site's loss with its interval and, where the base was measured, the way from there."""
    shapes = _backdrop(x, STRIP_HEIGHT, zero=False)
    y = STRIP_HEIGHT / 2
    base, together, ends = row["base"], row["federated"], interval_of(row, "ci95")
    if base is not None and together is not None:
        shapes.append(line(x(base), y, x(together), y, "way"))
        shapes.append(mark(x(base), y, "circle", 4, "point small base", f"Before training: {number(base, 3)}"))
    if ends:
        shapes.append(line(x(ends[0]), y, x(ends[1]), y, "whisker large gains"))
    if together is not None:
        tip = f"Together: {number(together, 3)} ({span(ends, 3)})"
        shapes.append(mark(x(together), y, "circle", 5, "point large gains", tip))
    return drawing(*shapes, height=STRIP_HEIGHT, class_="row")


def strip(row: Mapping[str, Any], x: Scale) -> str:
    """An arm's mean loss with its interval, for the table of controls."""
    ends, loss, y = interval_of(row, "ci95"), row["macro_loss"], STRIP_HEIGHT / 2
    shapes = _backdrop(x, STRIP_HEIGHT, wanted=STRIP_TICKS, zero=False)
    if ends:
        shapes.append(line(x(ends[0]), y, x(ends[1]), y, f"whisker large {row['arm']}"))
    shapes.append(mark(x(loss), y, "circle", 5, f"point large {row['arm']}", f"{row['label']}: {number(loss, 3)}"))
    return drawing(*shapes, height=STRIP_HEIGHT, class_="row")


def strip_scale(rows: Sequence[Mapping[str, Any]]) -> Scale:
    """One x axis for all rows of `strip`."""
    values = [row["macro_loss"] for row in rows]
    return scale_over(values + [end for row in rows for end in interval_of(row, "ci95") or ()])


def _backdrop(x: Scale, height: float, *, wanted: int = 6, zero: bool = True) -> list[str]:
    shapes = [line(x(tick), 0, x(tick), height, "grid") for tick in x.ticks(wanted)]
    return [*shapes, line(x(0), 0, x(0), height, "zero")] if zero else shapes


def axis(x: Scale, *, sign: bool, wanted: int = 6) -> str:
    """Tick labels under a column of rows."""
    digits = x.digits(wanted)
    texts = [
        label(x(tick), 15, number(tick, digits, sign=sign), anchor="middle", class_="tick")
        for tick in x.ticks(wanted)
        if 3 < x(tick) < 97
    ]
    return drawing(*texts, height=AXIS_HEIGHT)


def bar(value: float, largest: float, class_: str = "amount") -> str:
    """A horizontal bar from 0, `largest` filling the row."""
    share = 100 * value / largest if largest else 0.0
    return drawing(box(0, 5, max(share, 0.4 if value else 0.0), STRIP_HEIGHT - 10, class_), height=STRIP_HEIGHT)


STATES = {"answered": "answered", "failed": "failed", "late": "came too late", "idle": "not invited"}


def turnout_row(site: str, rounds: Sequence[Mapping[str, Any]]) -> str:
    """A site's rounds: a full cell answered, a cross failed, a half cell came late, a dot was not invited."""
    width = 100 / max(len(rounds), 1)
    shapes = [_cell(k, width, state_in(site, one), one) for k, one in enumerate(rounds)]
    return drawing(*shapes, height=STRIP_HEIGHT)


def state_in(site: str, one: Mapping[str, Any]) -> str:
    """One of `STATES`: what a site did in a round."""
    for state in ("failed", "late", "answered"):
        if site in (one.get(state) or ()):
            return state
    return "idle"


def _cell(k: int, width: float, state: str, one: Mapping[str, Any]) -> str:
    tip = f"Round {one.get('round', NONE)}: {STATES[state]}"
    middle, y = (k + 0.5) * width, STRIP_HEIGHT / 2
    if state == "idle":
        return mark(middle, y, "circle", 1.5, "idle", tip)
    left, inside = (k + 0.08) * width, 0.84 * width
    if state == "late":
        return box(left, 3, inside, 16, "late frame", tip) + box(left, 11, inside, 8, "late")
    if state == "failed":
        return box(left, 3, inside, 16, "failed frame", tip) + mark(middle, y, "cross", 3.5, "failed")
    return box(left, 3, inside, 16, "answered", tip)

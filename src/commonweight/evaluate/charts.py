"""The report's charts over rounds and over sites: curves, columns, histogram.

Each function returns a self-contained HTML fragment. `svg` explains how they keep their text size at any width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .summary import dig, macro_loss
from .svg import Scale, area, box, drawing, element, label, line, mark, polyline, scale_over, spread
from .text import finite, number, size

CURVE_HEIGHT = 320.0
COLUMN_HEIGHT = 200.0
HISTOGRAM_HEIGHT = 200.0
FAINT_LINES = 60
MAX_ROUND_LABELS = 12
MAX_DOTS = 24

Point = tuple[int, float]
Points = list[Point]


@dataclass(frozen=True)
class Reference:
    """A horizontal line: an arm that has one loss and no rounds."""

    arm: str
    text: str
    loss: float


REFERENCES = {
    "base": "Base model",
    "local": "Each site alone",
    "local_best": "Alone, at its best",
    "centralised": "All data pooled",
}


def curve_points(rounds: Sequence[Mapping[str, Any]]) -> Points:
    """(round, macro loss) where the loss is finite."""
    return [(one["round"], loss) for one in rounds if (loss := finite(one.get("macro_loss"))) is not None]


def site_points(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """(round, loss) by site where the loss is finite."""
    curves: dict[str, Points] = {}
    for one in rounds:
        for site, loss in (one.get("sites") or {}).items():
            if (known := finite(loss)) is not None:
                curves.setdefault(site, []).append((one["round"], known))
    return curves


def loss_curves(metrics: Mapping[str, Any]) -> str:
    """Federated loss by round with faint sites, that of sites' own models, the other arms as horizontal lines; empty
    without a curve."""
    rounds = dig(metrics, "arms", "federated", "rounds") or []
    mean, by_site = curve_points(rounds), site_points(rounds)
    if len(mean) < 2:
        return ""
    lines = [Reference(a, text, loss) for a, text in REFERENCES.items() if (loss := macro_loss(metrics, a)) is not None]
    sites = list(by_site.values()) if len(by_site) <= FAINT_LINES else list(_band(by_site))
    own = curve_points(dig(metrics, "arms", "personal", "rounds") or [])
    values = [loss for points in (mean, own, *sites) for _, loss in points] + [one.loss for one in lines]
    x, y = Scale(mean[0][0], mean[-1][0]), scale_over(values, start=CURVE_HEIGHT - 24, stop=8)
    shapes = [*_grid(y), *_round_labels([r for r, _ in mean], x, CURVE_HEIGHT), *_faint(by_site, x, y)]
    shapes += [line(0, y(one.loss), 100, y(one.loss), f"ref {one.arm}") for one in lines]
    shapes += [_path(own, x, y, "curve personal")] if len(own) > 1 else []
    shapes.append(_path(mean, x, y, "curve federated"))
    dots = mean if len(mean) <= MAX_DOTS else mean[-1:]
    shapes += [mark(x(r), y(loss), "circle", 3.2, "dot federated", f"Round {r}: {number(loss, 3)}") for r, loss in dots]
    ends = [Reference("federated", "Together", mean[-1][1]), *lines]
    ends += [Reference("personal", "Each with its own", own[-1][1])] if len(own) > 1 else []
    plot = drawing(*shapes, height=CURVE_HEIGHT, title="Held-out loss by round, in nats per token")
    return _legend(ends) + _framed(plot, _left_labels(y, CURVE_HEIGHT), _ends(ends, y))


def _path(points: Points, x: Scale, y: Scale, class_: str) -> str:
    return polyline([(x(r), y(loss)) for r, loss in points], CURVE_HEIGHT, class_)


def _faint(by_site: Mapping[str, Points], x: Scale, y: Scale) -> list[str]:
    if len(by_site) < 2:
        return []
    if len(by_site) <= FAINT_LINES:
        return [_path(points, x, y, "curve site") for points in by_site.values() if len(points) > 1]
    low, high = _band(by_site)
    return [area([(x(r), y(loss)) for r, loss in [*high, *low[::-1]]], CURVE_HEIGHT, "band")]


def _band(by_site: Mapping[str, Points]) -> tuple[Points, Points]:
    """The 10th and the 90th percentile of the sites by round."""
    at: dict[int, list[float]] = {}
    for points in by_site.values():
        for r, loss in points:
            at.setdefault(r, []).append(loss)
    low, high = ([(r, float(np.quantile(at[r], level))) for r in sorted(at)] for level in (0.1, 0.9))
    return low, high


def _grid(y: Scale) -> list[str]:
    return [line(0, y(tick), 100, y(tick), "grid") for tick in y.ticks()]


def _left_labels(y: Scale, height: float) -> str:
    digits = y.digits()
    texts = [label(100, y(tick) + 4, number(tick, digits), anchor="end", class_="tick") for tick in y.ticks()]
    return drawing(*texts, height=height)


def _round_labels(rounds: Sequence[int], x: Scale, height: float) -> list[str]:
    step = max(1, -(-len(rounds) // MAX_ROUND_LABELS))
    shown = [r for k, r in enumerate(rounds) if k % step == 0]
    anchors = {rounds[0]: "start", rounds[-1]: "end"}
    return [label(x(r), height - 4, str(r), anchor=anchors.get(r, "middle"), class_="tick") for r in shown]


def _ends(ends: Sequence[Reference], y: Scale) -> str:
    places = spread([y(one.loss) for one in ends], 17, 10, CURVE_HEIGHT - 24)
    texts = [
        label(0, at + 4, f"{one.text}  {number(one.loss)}", class_=f"end {one.arm}")
        for at, one in zip(places, ends, strict=True)
    ]
    return drawing(*texts, height=CURVE_HEIGHT)


def _legend(ends: Sequence[Reference]) -> str:
    def item(one: Reference) -> str:
        style = "curve" if one.arm in ("federated", "personal") else "ref"
        swatch = element("svg", line(0, 6, 100, 6, f"{style} {one.arm}"), width=28, height=12, aria_hidden="true")
        return element("li", swatch, f"{one.text} {number(one.loss)}")

    return element("ul", *(item(one) for one in ends), class_="legend narrow-only")


def _framed(plot: str, left: str, right: str = "") -> str:
    cells = [element("div", left, class_="axis"), element("div", plot, class_="plot")]
    if right:
        cells.append(element("div", right, class_="ends"))
    return element("div", *cells, class_="frame" + (" with-ends" if right else ""))


def traffic_columns(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Bytes a round: sent by the sites above the line, sent to them below; empty without figures."""
    up, down = ([finite(one.get(key)) or 0.0 for one in rounds] for key in ("bytes_up", "bytes_down"))
    top = max([*up, *down], default=0.0)
    if not top:
        return ""
    y = Scale(-top * 1.08, top * 1.08, COLUMN_HEIGHT - 20, 0)
    width = 100 / len(rounds)
    shapes = [line(0, y(tick), 100, y(tick), "axis-line" if not tick else "grid") for tick in y.ticks(4)]
    for k, one in enumerate(rounds):
        tip = f"Round {one.get('round')}: {size(up[k])} up, {size(down[k])} down"
        at, bar = (k + 0.16) * width, 0.68 * width
        shapes.append(box(at, y(up[k]), bar, y(0) - y(up[k]), "up", tip))
        shapes.append(box(at, y(0), bar, y(-down[k]) - y(0), "down", tip))
    shapes += _column_labels(rounds, width)
    ticks = [label(100, y(t) + 4, size(abs(t)), anchor="end", class_="tick") for t in y.ticks(4)]
    title = "Bytes sent by the sites (above) and to the sites (below) in each round"
    return _framed(drawing(*shapes, height=COLUMN_HEIGHT, title=title), drawing(*ticks, height=COLUMN_HEIGHT))


def _column_labels(rounds: Sequence[Mapping[str, Any]], width: float) -> list[str]:
    step = max(1, -(-len(rounds) // MAX_ROUND_LABELS))
    return [
        label((k + 0.5) * width, COLUMN_HEIGHT - 4, str(one.get("round")), anchor="middle", class_="tick")
        for k, one in enumerate(rounds)
        if k % step == 0
    ]


def turnout_columns(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Invited sites a round that answered, came late or failed, stacked; for many sites."""
    width = 100 / max(len(rounds), 1)
    found = [{state: len(one.get(state) or ()) for state in ("answered", "late", "failed")} for one in rounds]
    y = Scale(0, max([sum(states.values()) for states in found] + [1]), COLUMN_HEIGHT - 20, 6)
    shapes = _grid(y)
    for k, (one, states) in enumerate(zip(rounds, found, strict=True)):
        floor = 0
        for state, num in states.items():
            tip = f"Round {one.get('round')}: {num:,} {state}"
            shapes.append(box((k + 0.1) * width, y(floor + num), 0.8 * width, y(floor) - y(floor + num), state, tip))
            floor += num
    shapes += _column_labels(rounds, width)
    plot = drawing(*shapes, height=COLUMN_HEIGHT, title="Sites that answered, came late or failed, by round")
    return _framed(plot, _left_labels(y, COLUMN_HEIGHT))


def histogram(values: Sequence[float], *, split_at_zero: bool, title: str, bins: int = 30) -> str:
    """Sites by value; with `split_at_zero`, bins below and above 0 are coloured as losing and gaining."""
    edges = np.array(_bin_edges(values, bins, split_at_zero))
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    x = Scale(float(edges[0]), float(edges[-1]))
    y = Scale(0, float(counts.max()) * 1.05, HISTOGRAM_HEIGHT - 22, 4)
    shapes = _grid(y)
    for found, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        side = ("gains" if low + high > 0 else "loses") if split_at_zero else "neutral"
        tip = f"{number(low)} to {number(high)}: {found:,} sites"
        shapes.append(box(x(low) + 0.15, y(found), x(high) - x(low) - 0.3, y(0) - y(found), f"bin {side}", tip))
    digits = x.digits(6)
    shapes += [
        label(x(t), HISTOGRAM_HEIGHT - 4, number(t, digits, sign=split_at_zero), anchor="middle", class_="tick")
        for t in x.ticks(6)
        if 4 < x(t) < 96
    ]
    if split_at_zero:
        shapes.append(line(x(0), 0, x(0), HISTOGRAM_HEIGHT - 22, "zero"))
    return _framed(drawing(*shapes, height=HISTOGRAM_HEIGHT, title=title), _left_labels(y, HISTOGRAM_HEIGHT))


def _bin_edges(values: Sequence[float], bins: int, split_at_zero: bool) -> list[float]:
    low, high = min(values), max(values)
    if split_at_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / bins or 1.0
    first, last = int(np.floor(low / width)), int(np.ceil(high / width))
    return [k * width for k in range(first, max(last, first + 1) + 1)]

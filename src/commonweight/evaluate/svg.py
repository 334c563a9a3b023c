"""Inline SVG that keeps its text size at any width: x in percent of the drawing, y in pixels.

Without a `viewBox` a drawing is as wide as its box, so that one file reads well on a telephone, on a desk and on paper.
Colours are classes, which the report's style sheet gives for light and dark. Every function returns markup; all text
and every attribute is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


def element(tag: str, *children: str, **attributes: object) -> str:
    """`<tag …>children</tag>`; a trailing `_` is dropped from attribute names and others become `-`; None is left out.

    Args:
        children: markup, not text (see `label`).
    """
    pairs = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    written = "".join(f' {name}="{escape(_attribute(value))}"' for name, value in pairs)
    return f"<{tag}{written}>{''.join(children)}</{tag}>"


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def drawing(*children: str, height: float, title: str = "", class_: str = "") -> str:
    """An `<svg>` as wide as its box; with a title it is announced as an image, without one it is decoration."""
    named = {"role": "img", "aria_label": title} if title else {"aria_hidden": "true"}
    return element("svg", *children, width="100%", height=height, class_=class_ or None, **named)


def label(x: float, y: float, text: str, *, anchor: str = "start", class_: str = "") -> str:
    """Text at x percent, y pixels."""
    return element("text", escape(text), x=f"{x:.2f}%", y=y, text_anchor=anchor, class_=class_ or None)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line; x in percent, y in pixels."""
    return element("line", x1=f"{x1:.2f}%", y1=y1, x2=f"{x2:.2f}%", y2=y2, class_=class_)


def box(x: float, y: float, width: float, height: float, class_: str, tip: str = "") -> str:
    """A rectangle; x and width in percent, y and height in pixels."""
    inside = (element("title", escape(tip)),) if tip else ()
    return element("rect", *inside, x=f"{x:.2f}%", y=y, width=f"{max(width, 0):.2f}%", height=height, class_=class_)


MARKS = {
    "circle": "M-{r} 0a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0Z",
    "diamond": "M-{w} 0L0 -{w}L{w} 0L0 {w}Z",
    "cross": "M-{r} -{r}L{r} {r}M{r} -{r}L-{r} {r}",
    "tick": "M0 -{w}L0 {w}",
}


def mark(x: float, y: float, shape: str, radius: float, class_: str, tip: str = "") -> str:
    """A small shape of `MARKS` centred at x percent, y pixels, which keeps its form at any width."""
    path = MARKS[shape].format(r=radius, d=2 * radius, w=round(radius * 1.3, 2))
    inside = (element("title", escape(tip)),) if tip else ()
    return element(
        "svg", element("path", *inside, d=path, class_=class_), x=f"{x:.2f}%", y=y, overflow="visible", class_="mark"
    )


def polyline(points: Sequence[tuple[float, float]], height: float, class_: str) -> str:
    """A line through points (x in percent, y in pixels); its width does not stretch with the drawing."""
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    stretched = {"viewBox": f"0 0 100 {height:g}", "preserveAspectRatio": "none", "overflow": "visible"}
    return element("svg", element("path", d=path, class_=class_), width="100%", height=height, **stretched)


def area(points: Sequence[tuple[float, float]], height: float, class_: str) -> str:
    """A filled shape through points (x in percent, y in pixels)."""
    return polyline([*points, points[0]], height, class_)


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` onto `start` … `stop` (percent or pixels), with round tick values."""

    low: float
    high: float
    start: float = 0.0
    stop: float = 100.0

    def __call__(self, value: float) -> float:
        share = (
            (min(max(value, self.low), self.high) - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        )
        return self.start + share * (self.stop - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten within the range, about `wanted` of them."""
        step = _round_step((self.high - self.low) / wanted)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]

    def digits(self, wanted: int = 5) -> int:
        """Decimals that tell the ticks apart."""
        return max(0, -math.floor(math.log10(_round_step((self.high - self.low) / wanted)) + 1e-9))


def scale_over(values: Sequence[float], *, pad: float = 0.06, start: float = 0.0, stop: float = 100.0) -> Scale:
    """A scale that holds all `values` with a margin of `pad` of their range at both ends."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * pad if high - low > 1e-9 * abs(high) else abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start, stop)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / rough)))


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near `wanted`, in the same order, at least `gap` apart and within low … high where there is room."""
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    placed: dict[int, float] = {}
    floor = low
    for k in order:
        placed[k] = max(wanted[k], floor)
        floor = placed[k] + gap
    ceiling = high
    for k in reversed(order):
        placed[k] = max(low, min(placed[k], ceiling))
        ceiling = placed[k] - gap
    return [placed[k] for k in range(len(wanted))]

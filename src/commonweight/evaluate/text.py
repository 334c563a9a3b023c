"""Figures as people read them: number words, plurals, bytes, durations, signs. Decimal units: 1 MB is 10⁶ bytes.

A missing or non-finite figure reads "–", so that a report of a partial run is still a report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is missing, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any, digits: int = 2, *, sign: bool = False) -> str:
    """A decimal number with a true minus sign and thousands separators: `−1,234.50`."""
    known = finite(value)
    if known is None:
        return NONE
    text = f"{known:{'+' if sign else ''},.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("+-")


def whole(value: Any) -> str:
    """A count with thousands separators."""
    return number(value, 0)


def significant(value: Any) -> str:
    """Three significant digits, as for learning rates: `0.01`, `2.5e−05`."""
    known = finite(value)
    return NONE if known is None else f"{known:.3g}".replace("-", "−")


def surprise(perplexity: Any) -> str:
    """A perplexity: one decimal below 100, a whole number above, powers of ten beyond a million."""
    known = finite(perplexity)
    if known is None or known < 1e6:
        return number(known, 2 if known is not None and known < 10 else 1 if known is not None and known < 100 else 0)
    return f"{known:.1e}"


def percent(value: Any, digits: int = 0) -> str:
    """A share of 1 as a percentage, with a narrow no-break space."""
    known = finite(value)
    return NONE if known is None else f"{number(known * 100, digits)}\u202f%"


def span(ci95: Any, digits: int = 2, *, sign: bool = False) -> str:
    """An interval: `2.45 to 2.55`."""
    if not isinstance(ci95, Sequence) or len(ci95) != 2:
        return NONE
    return f"{number(ci95[0], digits, sign=sign)} to {number(ci95[1], digits, sign=sign)}"


def size(num_bytes: Any) -> str:
    """Bytes in the unit that leaves one to three digits before the point: `41.2 MB`."""
    known = finite(num_bytes)
    if known is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if abs(known) < 999.5:
            return f"{number(known, 0 if unit == 'B' or known >= 99.95 else 1)}\u202f{unit}"
        known /= 1000
    return f"{number(known, 1)}\u202fTB"


def duration(seconds: Any) -> str:
    """Seconds as `0.4 s`, `42 s`, `3 min 20 s` or `1 h 05 min`."""
    known = finite(seconds)
    if known is None:
        return NONE
    if known < 59.5:
        return f"{number(known, 0 if known >= 9.95 else 1)}\u202fs"
    if known < 3599.5:
        minutes, rest = divmod(round(known), 60)
        return f"{minutes}\u202fmin" + (f" {rest}\u202fs" if rest else "")
    hours, minutes = divmod(round(known / 60), 60)
    return f"{hours:,}\u202fh {minutes:02d}\u202fmin"


def count(num: int) -> str:
    """A number as a word up to twelve: `nine`, `1,000`."""
    return WORDS[num] if 0 <= num < len(WORDS) else f"{num:,}"


def counted(num: int, noun: str) -> str:
    """A number and its noun: `one site`, `nine sites`, `no sites`."""
    return f"{count(num)} {noun}{'' if num == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """A list in a sentence: `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def sentence(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def shortened(name: str, limit: int = 48) -> str:
    """A long name without its middle, so that both ends, which tell names apart, stay."""
    if len(name) <= limit:
        return name
    tail = limit // 3
    return f"{name[: limit - tail - 1]}…{name[-tail:]}"


def parts_in_words(parts: Mapping[str, Mapping[str, Any]], shown: int = 12) -> list[str]:
    """What sites hold of an adapter, from `parts` in metrics.json: `clinic: rank 2, 4 of 14 modules`."""
    found = [f"{site}: rank {p['r']}, {p['modules']} of {p['of_modules']} modules" for site, p in parts.items()]
    return [*found[:shown], *([f"and {len(found) - shown:,} more"] if len(found) > shown else [])]

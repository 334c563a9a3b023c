"""Names and fields as people write them: natural order, near misses, and what counts as no value."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from commonweight.errors import DataError, RecipeError

if TYPE_CHECKING:
    from .formats import Row

SHOWN = 12


def natural_key(name: str) -> tuple[object, ...]:
    """Sort key that puts `2_b` before `10_a`. Digits compare by value without `int`, which refuses very long ones."""
    parts = re.split(r"(\d+)", name)
    digits = [(len(part.lstrip("0")), part.lstrip("0")) for part in parts[1::2]]
    return (*(piece for pair in zip(parts[::2], [*digits, (0, "")], strict=True) for piece in pair), name)


def listed(names: Iterable[str]) -> str:
    """The first twelve names, in the order given, for a message."""
    names = list(names)
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 row`, `1,204 rows`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def suggestion(name: str, known: Sequence[str]) -> str:
    """`did you mean 'x'? ` when a known name is close, else nothing. Case is ignored."""
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"did you mean {folded[near[0]]!r}? " if near else ""


def is_null(value: object) -> bool:
    """True for None and for NaN, which is how tables say None in a column of numbers."""
    return value is None or (isinstance(value, float) and value != value)


def is_blank(value: object) -> bool:
    """True for null and for a string of white space."""
    return is_null(value) or (isinstance(value, str) and not value.strip())


def as_text(value: Any) -> str:
    """A field's value as text: a list of strings one a line, other lists and objects as JSON, the rest by `str`."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def known_fields(rows: Iterable[Row]) -> list[str]:
    """Every field that some row has, in order of first appearance."""
    fields: dict[str, None] = {}
    for row in rows:
        fields.update(dict.fromkeys(row.fields))
    return list(fields)


def require_field(field: str, known: Sequence[str], option: str) -> None:
    """Check that a field named by the recipe is in the data.

    Raises:
        RecipeError: no row has it; names the option, the field and the known fields.
    """
    if field not in known:
        raise RecipeError(
            f"{option} names the field {field!r}, which no row has",
            hint=f"{suggestion(field, known)}The fields are: {listed(known) or 'none'}",
        )


def require_sites(names: Iterable[str], known: Sequence[str], option: str) -> None:
    """Check that sites named by the recipe are there.

    Raises:
        RecipeError: one is not; names the option, the site, the nearest known one and those that there are.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RecipeError(
            f"{option} names {unknown[0]!r}, which is no site of this run",
            hint=f"{suggestion(unknown[0], known)}The sites are: {listed(known)}",
        )


def require_values(rows: Sequence[Row], field: str, option: str) -> list[Any]:
    """The field's value in each row.

    Raises:
        RecipeError: no row has the field.
        DataError: some rows have no value there (missing, null or blank); names how many and the first.
    """
    require_field(field, known_fields(rows), option)
    values = [row.fields.get(field) for row in rows]
    empty = [i for i, value in enumerate(values) if is_blank(value)]
    if empty:
        raise DataError(
            f"{option} needs a value in {field!r}, which {len(empty):,} of {counted(len(rows), 'row')} lack; the first "
            f"is {rows[empty[0]].where}",
            hint="fill the field in, or take those rows out of the data",
        )
    return values

"""Which rows of each site are kept for testing.

Rows belong to groups: a patient, a disease, a document (`holdout.by`), or, without that field, the row's own text, so
that copies of a row stay together. A group is held out everywhere or trained on everywhere: whatever one site holds
out, no site trains on. Groups stand in one seeded order that depends on their names alone, and each site holds out
its groups from the front of it; so sites tend to choose the same groups where they share them, and new data does not
shuffle the old.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from commonweight.errors import DataError
from commonweight.recipe.schema import HoldoutSpec

from .draws import rank
from .formats import Row
from .names import as_text, counted, is_blank, known_fields, require_field, require_values

DEFAULT_FRACTION = 0.2


@dataclass(frozen=True)
class Split:
    """One site's rows, as indices into its list, in file order.

    Args:
        train: rows to train on.
        heldout: rows to test on.
        withheld: neither: their group is held out, but this site has its test rows already.
    """

    train: list[int]
    heldout: list[int]
    withheld: list[int]


def grouped_rows(rows: Sequence[Row], by: str) -> list[Row]:
    """The rows that have a value in field `by`. The others may belong to any group: nobody trains or tests on them.

    Raises:
        RecipeError: no row has the field.
        DataError: no row has a value there.
    """
    require_field(by, known_fields(rows), "data.holdout.by")
    grouped = [row for row in rows if not is_blank(row.fields.get(by))]
    if not grouped:
        raise DataError(
            f"none of the {len(rows):,} rows has a value in {by!r}, which data.holdout.by names",
            hint="fill the field in, name another field, or leave data.holdout.by out to hold rows out one by one",
        )
    return grouped


def group_names(rows: Sequence[Row], by: str, option: str = "data.holdout.by") -> list[str]:
    """The group of each row: the value of field `by`, which `option` names, as text (lists and objects as JSON).

    Raises:
        RecipeError: no row has the field.
        DataError: some rows have no value there; see `grouped_rows`.
    """
    values = require_values(rows, by, option)
    return [json.dumps(v) if isinstance(v, list | tuple) else as_text(v).strip() for v in values]


def group_of_text(text: str) -> str:
    """A short name for the group of all rows with this text: 128 bits of its SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def hold_out(
    groups: Mapping[str, Sequence[str]],
    spec: HoldoutSpec,
    *,
    seed: int,
    sizes: Mapping[str, Sequence[int]] | None = None,
    size_of_example: int = 1,
) -> dict[str, Split]:
    """Split every site's rows into training and held-out ones.

    With `examples`, a site holds out exactly that many rows: of the last group only as many as are needed. With
    `fraction` (default 0.2) whole groups are held out until that share of the site's rows is reached. A group that
    would leave a site nothing to train on is passed over there.

    Args:
        groups: the group of each row, by site.
        spec: `examples` or `fraction`.
        seed: decides the order of the groups.
        sizes: what each row counts for, by site; default 1. With sizes, rows are held out until they amount to
            `examples × size_of_example`, and the caller cuts the examples out of them.
        size_of_example: what one held-out example needs, in the unit of `sizes`.

    Raises:
        DataError: a site has too few rows or groups to hold out, or nothing is left for it to train on.
    """
    order = {group: rank(seed, "holdout", group) for names in groups.values() for group in names}
    chosen = {}
    for site, names in groups.items():
        weights = sizes[site] if sizes else [1] * len(names)
        chosen[site] = _choose(site, names, weights, order, spec, size_of_example)
    everywhere = {group for picked in chosen.values() for group in picked}
    limit = spec.examples if sizes is None else None
    return {site: _split(site, groups[site], picked, everywhere, limit) for site, picked in chosen.items()}


def _choose(
    site: str,
    names: Sequence[str],
    weights: Sequence[int],
    order: Mapping[str, tuple[int, str]],
    spec: HoldoutSpec,
    size_of_example: int,
) -> dict[str, int]:
    """The groups that a site holds out, each with its place in the order."""
    weight_of = dict.fromkeys(names, 0)
    for name, weight in zip(names, weights, strict=True):
        weight_of[name] += weight
    total = sum(weight_of.values())
    target = _target(total, spec, size_of_example)
    picked: dict[str, int] = {}
    reached = 0
    for name in sorted(weight_of, key=lambda group: order[group]):
        if reached >= target:
            break
        if reached + weight_of[name] < total:
            picked[name] = len(picked)
            reached += weight_of[name]
    if not picked or (spec.examples is not None and reached < target):
        raise _too_small(site, len(names), len(weight_of), spec)
    return picked


def _target(total: int, spec: HoldoutSpec, size_of_example: int) -> int:
    if spec.examples is not None:
        return spec.examples * size_of_example
    return max(1, math.ceil((spec.fraction or DEFAULT_FRACTION) * total - 1e-9))


def _too_small(site: str, num_rows: int, num_groups: int, spec: HoldoutSpec) -> DataError:
    wanted = counted(spec.examples, "held-out example") if spec.examples else "a held-out part"
    found = counted(num_rows, "row") + (f" in {counted(num_groups, 'group')} of {spec.by!r}" if spec.by else "")
    return DataError(
        f"site {site!r} has {found}: too few for {wanted} and something to train on",
        hint="lower data.holdout.examples, or leave small sites out with data.sites.min_rows or data.sites.only",
    )


def _split(
    site: str, names: Sequence[str], picked: Mapping[str, int], everywhere: set[str], limit: int | None
) -> Split:
    candidates = sorted((i for i, name in enumerate(names) if name in picked), key=lambda i: (picked[names[i]], i))
    heldout = set(candidates[:limit])
    train = [i for i, name in enumerate(names) if name not in everywhere]
    if not train:
        raise DataError(
            f"site {site!r} has nothing to train on: all of its data ({counted(len(names), 'row')}) belongs to groups "
            "that are held out here or at other sites",
            hint="lower data.holdout.examples or data.holdout.fraction, or leave the site out with data.sites.only",
        )
    withheld = [i for i, name in enumerate(names) if name in everywhere and i not in heldout]
    return Split(train, sorted(heldout), withheld)

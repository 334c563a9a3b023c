"""Which rows each site owns.

The natural schemes take sites as they are (a field's values, the files). The synthetic ones make sites out of a pool:
`iid` deals shuffled rows evenly; `dirichlet` spreads each value of a field over sites by shares from a symmetric
Dirichlet (Yurochkin et al. 2019, arXiv:1905.12022); `shards` sorts by a field and deals contiguous pieces (McMahan et
al. 2017, arXiv:1602.05629, §3); `quantity` is IID in kind with Dirichlet sizes. Rows keep their order inside a site,
each falls to exactly one, and no synthetic site is empty: one that would be takes a row from the largest (a random
one, drawn by the seed).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonweight.errors import DataError
from commonweight.recipe.schema import SitesSpec

from .draws import generator
from .formats import SUFFIXES, Row
from .names import counted, is_null, listed, natural_key, require_values, suggestion

Ints = NDArray[np.int64]


def partition(rows: Sequence[Row], spec: SitesSpec, seed: int) -> dict[str, list[Row]]:
    """Divide rows into sites and keep those that the recipe asks for: `only`, then `min_rows`, then `largest`.

    Args:
        rows: all rows, at least one.
        spec: scheme and selection. `take` is not applied here, as it counts training rows.
        seed: decides the synthetic schemes.

    Returns:
        Rows by site, sites in natural order of their names (`2_b` before `10_a`), synthetic ones `site-01` …

    Raises:
        RecipeError: `by` is a field that no row has.
        DataError: null or ambiguous site names, more sites than rows, or no site left.
    """
    if not rows:
        raise DataError("there are no rows to divide into sites", hint="check data.path")
    if spec.scheme == "field":
        sites = _by_names(rows, _field_names(rows, str(spec.by), "data.sites.by"))
    elif spec.scheme == "file":
        sites = _by_names(rows, _file_names(rows))
    else:
        sites = _synthetic(rows, spec, seed)
    return _selected(sites, spec)


def site_names(rows: Sequence[Row], spec: SitesSpec) -> list[str] | None:
    """Each row's site under the natural schemes, blank where it names none; None under the synthetic ones."""
    if spec.scheme == "field":
        values = [row.fields.get(str(spec.by)) for row in rows]
        return ["" if is_null(value) else str(value).strip() for value in values]
    return _file_names(rows) if spec.scheme == "file" else None


def _by_names(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[Row]]:
    sites: dict[str, list[Row]] = {}
    for row, name in zip(rows, names, strict=True):
        sites.setdefault(name, []).append(row)
    return {name: sites[name] for name in sorted(sites, key=natural_key)}


def _field_names(rows: Sequence[Row], field: str, option: str) -> list[str]:
    """The field's values as names, without white space around them; values that differ must have different names."""
    values = require_values(rows, field, option)
    spellings: dict[str, Any] = {}
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, list | tuple | dict):
            raise DataError(
                f"{row.where}: {field!r}, which {option} names, holds {value!r} and not one value",
                hint="name a field with a single value a row",
            )
        name = str(value).strip()
        first = spellings.setdefault(name, value)
        if first != value or type(first) is not type(value):
            raise DataError(
                f"{row.where}: {field!r} is {value!r} here and {first!r} elsewhere, both of which name {name!r}",
                hint="write the value alike in all rows",
            )
    return [str(value).strip() for value in values]


def _file_names(rows: Sequence[Row]) -> list[str]:
    """Each row's file without its endings, or its whole name where two files would then be called alike."""
    files = dict.fromkeys(row.file for row in rows)
    stems = {file: _stem(file) for file in files}
    alike = Counter(stems.values())
    return [stems[row.file] if alike[stems[row.file]] == 1 else row.file for row in rows]


def _stem(file: str) -> str:
    path = PurePath(file)
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def _synthetic(rows: Sequence[Row], spec: SitesSpec, seed: int) -> dict[str, list[Row]]:
    count = spec.count or 1
    if count > len(rows):
        raise DataError(
            f"{counted(count, 'site')} cannot share {counted(len(rows), 'row')}: each needs at least one",
            hint="lower data.sites.count, or give more rows",
        )
    rng = generator(seed, "partition", spec.scheme)
    schemes: dict[str, Callable[[], Ints]] = {
        "iid": lambda: _dealt(rng.permutation(len(rows)), _even_sizes(len(rows), count)),
        "quantity": lambda: _dealt(rng.permutation(len(rows)), _sizes(len(rows), rng.dirichlet([spec.alpha] * count))),
        "dirichlet": lambda: _dirichlet(_field_names(rows, str(spec.by), "data.sites.by"), count, spec.alpha, rng),
        "shards": lambda: _shards(_field_names(rows, str(spec.by), "data.sites.by"), count, spec.shards_per_site, rng),
    }
    owners = _no_site_empty(schemes[spec.scheme](), count, rng)
    width = max(2, len(str(count)))
    return {f"site-{k + 1:0{width}}": [rows[i] for i in np.flatnonzero(owners == k).tolist()] for k in range(count)}


def _dealt(order: Ints, sizes: Ints) -> Ints:
    """Owner of each row [N], when rows in `order` [N] are dealt in runs of `sizes` [K]."""
    owners = np.empty(len(order), np.int64)
    owners[order] = np.repeat(np.arange(len(sizes)), sizes)
    return owners


def _even_sizes(total: int, count: int) -> Ints:
    return np.diff(np.arange(count + 1, dtype=np.int64) * total // count)


def _sizes(total: int, shares: NDArray[np.float64]) -> Ints:
    """Whole numbers [K] that sum to `total`, by cumulative rounding of `shares` [K]."""
    # A tiny alpha can underflow every gamma draw to 0, which NumPy turns into NaN: then one site has it all.
    shares = np.where(np.isfinite(shares), shares, 0.0)
    shares = shares / shares.sum() if shares.sum() > 0 else np.eye(1, len(shares))[0]
    edges = np.rint(np.cumsum(shares) * total).astype(np.int64)
    edges[-1] = total
    return np.diff(edges, prepend=0)


def _dirichlet(labels: Sequence[str], count: int, alpha: float, rng: np.random.Generator) -> Ints:
    owners = np.empty(len(labels), np.int64)
    values, which = np.unique(np.array(labels), return_inverse=True)
    for label in range(len(values)):
        members = rng.permutation(np.flatnonzero(which == label))
        owners[members] = np.repeat(np.arange(count), _sizes(len(members), rng.dirichlet([alpha] * count)))
    return owners


def _shards(labels: Sequence[str], count: int, shards_per_site: int, rng: np.random.Generator) -> Ints:
    num_shards = count * shards_per_site
    if num_shards > len(labels):
        raise DataError(
            f"{counted(len(labels), 'row')} cannot be cut into {num_shards:,} shards ({count:,} × {shards_per_site:,})",
            hint="lower data.sites.count or data.sites.shards_per_site",
        )
    order = np.array(sorted(range(len(labels)), key=lambda i: natural_key(labels[i])), dtype=np.int64)
    owner_of_shard = np.empty(num_shards, np.int64)
    owner_of_shard[rng.permutation(num_shards)] = np.repeat(np.arange(count), shards_per_site)
    owners = np.empty(len(labels), np.int64)
    owners[order] = np.repeat(owner_of_shard, _even_sizes(len(labels), num_shards))
    return owners


def _no_site_empty(owners: Ints, count: int, rng: np.random.Generator) -> Ints:
    sizes = np.bincount(owners, minlength=count)
    for site in np.flatnonzero(sizes == 0):
        largest = int(np.argmax(sizes))
        owners[rng.choice(np.flatnonzero(owners == largest))] = site
        sizes[largest] -= 1
        sizes[site] += 1
    return owners


def _selected(sites: dict[str, list[Row]], spec: SitesSpec) -> dict[str, list[Row]]:
    found = sites
    if spec.only is not None:
        _check_known(spec.only, list(found))
        sites = {name: rows for name, rows in sites.items() if name in spec.only}
    sites = {name: rows for name, rows in sites.items() if len(rows) >= spec.min_rows}
    if spec.largest is not None:
        order = {name: place for place, name in enumerate(sites)}
        kept = sorted(sites, key=lambda name: (-len(sites[name]), order[name]))[: spec.largest]
        sites = {name: sites[name] for name in sites if name in kept}
    if not sites:
        sizes = listed(f"{name} ({len(rows):,})" for name, rows in found.items())
        raise DataError(
            f"no site of {len(found):,} is left by data.sites.only and data.sites.min_rows {spec.min_rows:,}",
            hint=f"lower data.sites.min_rows or widen data.sites.only; the sites and their rows are: {sizes}",
        )
    return sites


def _check_known(only: Sequence[str], known: list[str]) -> None:
    unknown = [name for name in only if name not in known]
    if unknown:
        raise DataError(
            f"data.sites.only names {unknown[0]!r}, which is no site of this data",
            hint=f"{suggestion(unknown[0], known)}The sites are: {listed(known)}",
        )

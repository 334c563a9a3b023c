"""Where the rows are: a file, a folder of files, a dataset folder or hub id, or the built-in demo.

How one file becomes rows is `formats.py`'s business. Code from a dataset is never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commonweight.errors import DataError
from commonweight.recipe.schema import DEMO_DATA, DataSpec

from .formats import SUFFIXES, Row, format_of, parse
from .names import listed, natural_key, suggestion

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SAVED_DATASET = ("dataset_dict.json", "dataset_info.json")


@dataclass(frozen=True)
class Reading:
    """The rows in file order, and how many paragraphs of plain text `data.pattern` left out."""

    rows: list[Row]
    unmatched: int = 0


def read_rows(spec: DataSpec, *, seed: int = 0) -> list[Row]:
    """The rows that `spec` names, in the order of the files' names and of the rows in each; see `read`."""
    return read(spec, seed=seed).rows


def read(spec: DataSpec, *, seed: int = 0) -> Reading:
    """Read everything that `spec.path` names.

    Args:
        spec: path, format, split, paragraphs, pattern.
        seed: decides the demo's rows; files do not depend on it.

    Raises:
        DataError: nothing there, cannot be read or parsed, or holds no row.
    """
    reading = _read(spec, seed)
    if not reading.rows:
        raise DataError(
            f"{spec.path} holds no rows" + (f": no paragraph matches {spec.pattern!r}" if reading.unmatched else ""),
            hint="correct data.pattern or data.paragraphs"
            if reading.unmatched
            else "name data that has rows in data.path",
        )
    return reading


def _read(spec: DataSpec, seed: int) -> Reading:
    if spec.path == DEMO_DATA:
        from .consortium import rows

        return Reading([Row(dict(row), DEMO_DATA, number) for number, row in enumerate(rows(seed), 1)])
    path = _expanded(spec.path)
    if spec.format == "dataset" or _is_saved_dataset(path):
        return Reading(_dataset_rows(spec, path))
    if path.is_dir():
        return _read_files(_data_files(path, spec), spec)
    if path.is_file():
        return _read_files([path], spec)
    if path.exists():
        raise DataError(f"{path} is neither a file nor a folder", hint="name a file or a folder in data.path")
    if spec.format == "auto" and _looks_like_hub_id(spec.path):
        return Reading(_dataset_rows(spec, path))
    raise _missing(path)


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{name}: {error}", hint="write data.path without `~`") from error


def _looks_like_hub_id(name: str) -> bool:
    """owner/name, where neither a local folder of the owner's name nor a data file's ending says otherwise."""
    path = Path(name)
    return bool(HUB_ID.fullmatch(name)) and format_of(path) is None and not path.parent.is_dir()


def _missing(path: Path) -> DataError:
    folder = path.parent
    siblings = sorted(entry.name for entry in _entries(folder)) if folder.is_dir() else []
    place = f"there is no {path}" if folder.is_dir() else f"there is no {path}: its folder {folder} does not exist"
    return DataError(
        place,
        hint=f"{suggestion(path.name, siblings)}Set data.path to a file, a folder, or a dataset's hub id (owner/name)",
    )


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"the folder {folder} cannot be listed: {error.strerror or error}", hint="check its permissions"
        ) from error


def _data_files(folder: Path, spec: DataSpec) -> list[Path]:
    files = sorted((e for e in _entries(folder) if e.is_file()), key=lambda entry: natural_key(entry.name))
    wanted = set(SUFFIXES.values()) if spec.format == "auto" else {spec.format}
    found = [file for file in files if format_of(file) in wanted]
    if not found:
        endings = [suffix for suffix, kind in SUFFIXES.items() if kind in wanted]
        raise DataError(
            f"the folder {folder} has no file ending in {', '.join(endings)} (or one of these with .gz)",
            hint=f"it holds {listed(file.name for file in files) or 'no files'}; for a dataset's own folder set "
            "data.format: dataset",
        )
    return found


def _read_files(files: list[Path], spec: DataSpec) -> Reading:
    rows: list[Row] = []
    unmatched = 0
    for file in files:
        kind = format_of(file) if spec.format == "auto" else spec.format
        if kind is None:
            raise DataError(
                f"{file}: the name's ending does not tell the format",
                hint="set data.format to json, jsonl, csv, parquet or text",
            )
        found, passed = parse(file, file.name, kind, spec)
        rows += found
        unmatched += passed
    return Reading(rows, unmatched)


def _is_saved_dataset(path: Path) -> bool:
    """Whether a folder is what `datasets`' `save_to_disk` wrote; its JSON files are not data."""
    return any((path / name).is_file() for name in SAVED_DATASET)


def _dataset_rows(spec: DataSpec, path: Path) -> list[Row]:
    if path.is_file():
        raise DataError(f"{path} is a file, not a dataset", hint="set data.format: auto, or the file's own format")
    if not path.exists() and not HUB_ID.fullmatch(spec.path) and "/" in spec.path:
        raise _missing(path)
    # `datasets` raises whatever its storage, network and parsers raise, all of them a person's business here.
    try:
        table = _saved_dataset(spec, path) if _is_saved_dataset(path) else _loaded_dataset(spec, path)
        items = table.to_list()
    except DataError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"the dataset {spec.path!r} cannot be loaded: {reason}",
            hint=f"check data.path and data.split ({spec.split!r}); a hub id is owner/name, and needs a network",
            retry=not path.exists(),
        ) from error
    return [Row(item, spec.path, number) for number, item in enumerate(items, 1)]


def _saved_dataset(spec: DataSpec, path: Path) -> Any:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if spec.split not in loaded:
        raise DataError(
            f"the dataset {path} has no split {spec.split!r}",
            hint=f"{suggestion(spec.split, list(loaded))}Set data.split to one of {listed(loaded)}",
        )
    return loaded[spec.split]


def _loaded_dataset(spec: DataSpec, path: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(str(path) if path.is_dir() else spec.path, split=spec.split)

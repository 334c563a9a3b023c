"""File formats: the bytes of one file to rows.

Each `_…_rows` function reads one format from the file's whole text (or bytes) and yields rows in file order. Text is
UTF-8, with or without a byte order mark. A mistake in a file is a DataError that names the file and the line or row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commonweight.errors import DataError
from commonweight.recipe.schema import DataSpec

SUFFIXES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the data.

    Args:
        fields: values by field name; values are what the format holds (strings in CSV and text).
        file: name of the file it came from, relative to `data.path`'s folder; a dataset's name where there is no file.
        number: its line or row in that file, counted from 1.
        unit: `line` or `row`.
    """

    fields: dict[str, Any]
    file: str
    number: int
    unit: str = "row"

    @property
    def where(self) -> str:
        """The row's place, for a message: `medquad.jsonl, line 7`."""
        return f"{self.file}, {self.unit} {self.number:,}"


def format_of(path: Path) -> str | None:
    """The format that a file's name promises, or None. `.gz` may follow the ending."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def parse(path: Path, name: str, kind: str, spec: DataSpec) -> tuple[list[Row], int]:
    """The rows of one file, and how many paragraphs of plain text did not match `spec.pattern`.

    Raises:
        DataError: the file cannot be opened, unpacked, decoded or parsed, or is empty.
    """
    data = _load(path)
    if not data.strip():
        raise DataError(f"{path} is empty", hint="fill it, or take it out of data.path")
    if kind == "parquet":
        return list(_parquet_rows(data, path, name)), 0
    text = _decoded(data, path)
    if kind == "text":
        return _text_rows(text, name, spec)
    readers: dict[str, Callable[[str, Path, str], Iterator[Row]]] = {
        "json": _json_rows,
        "jsonl": _jsonl_rows,
        "csv": _csv_rows,
    }
    return list(readers[kind](text, path, name)), 0


def _load(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", hint="check that it exists and may be read"
        ) from error
    if path.suffix.lower() != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file: {error}", hint="download or compress it again, or drop the .gz ending"
        ) from error


def _decoded(data: bytes, path: Path) -> str:
    if b"\0" in data[:65536]:
        raise DataError(
            f"{path} is a binary file, not UTF-8 text",
            hint="save it as UTF-8, or set data.format to what it is (parquet, dataset)",
        )
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line:,}: not UTF-8 text (byte 0x{data[error.start]:02x})", hint="save the file as UTF-8"
        ) from error


def _parsed_json(text: str, path: Path, line: int | None, hint: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno:,}, column {error.colno:,}"
        raise DataError(f"{path}, {place}: not JSON: {error.msg}", hint=hint) from error
    except UnicodeEncodeError as error:
        place = f", line {line:,}" if line else ""
        raise DataError(
            f"{path}{place}: holds half of a surrogate pair (\\ud8… alone), which is not text",
            hint="remove the character",
        ) from error
    except (ValueError, RecursionError) as error:
        place = f", line {line:,}" if line else ""
        raise DataError(f"{path}{place}: JSON that cannot be read: {error}", hint=hint) from error
    return value


def _json_rows(text: str, path: Path, name: str) -> Iterator[Row]:
    hint = "data.format json is one list of objects; where each line is an object of its own, it is jsonl"
    for number, item in enumerate(_one_list(_parsed_json(text, path, None, hint), path), 1):
        yield Row(_object(item, f"{path}, row {number:,}"), name, number)


def _one_list(value: Any, path: Path) -> list[Any]:
    """The rows in a JSON document: a list, an object's only list, or an object of objects (their keys become `id`)."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) == 1:
            return list(lists[0])
        if value and all(isinstance(item, dict) for item in value.values()):
            return [{"id": key, **item} for key, item in value.items()]
    raise DataError(
        f"{path} holds {_json_kind(value)}, not a list of objects",
        hint="give a list of objects, or an object in which exactly one value is such a list",
    )


def _jsonl_rows(text: str, path: Path, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            hint = "each line must be one whole JSON object; for one list over the whole file set data.format: json"
            value = _parsed_json(line, path, number, hint)
            yield Row(_object(value, f"{path}, line {number:,}"), name, number, "line")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: {_json_kind(value)}, not an object", hint='a row is an object: {"question": …, "answer": …}'
        )
    return value


def _json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _csv_rows(text: str, path: Path, name: str) -> Iterator[Row]:
    delimiter = "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes] else ","
    # The module's limit of 131,072 characters a field is for all readers at once: lift it for this file only.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        header = next((row for row in reader if row), [])
        _check_header(header, path)
        for values in reader:
            if values:
                yield Row(_csv_fields(header, values, path, reader.line_num), name, reader.line_num, "line")
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num:,}: not CSV: {error}", hint='double a quote inside a quoted value: "" '
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_header(header: list[str], path: Path) -> None:
    wrong = sorted({column for column in header if header.count(column) > 1 or not column.strip()})
    if wrong:
        raise DataError(
            f"{path}, line 1: the header has empty or repeated column names: {', '.join(map(repr, wrong))}",
            hint="the first line must name each column once",
        )


def _csv_fields(header: list[str], values: list[str], path: Path, line: int) -> dict[str, Any]:
    if len(values) != len(header):
        raise DataError(
            f"{path}, line {line:,}: {len(values)} values for the header's {len(header)} columns",
            hint="quote values that hold the separator or a line break",
        )
    return dict(zip(header, values, strict=True))


def _parquet_rows(data: bytes, path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        items = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} is not a Parquet file that can be read: {reason}", hint="write the file again, or set data.format"
        ) from error
    yield from (Row(item, name, number) for number, item in enumerate(items, 1))


def _text_rows(text: str, name: str, spec: DataSpec) -> tuple[list[Row], int]:
    pattern = re.compile(spec.pattern) if spec.pattern else None
    rows, unmatched = [], 0
    for line, paragraph in _paragraphs(text, spec.paragraphs):
        match = pattern.search(paragraph) if pattern else None
        if pattern and not match:
            unmatched += 1
            continue
        groups = match.groupdict() if match else {}
        rows.append(Row({"text": paragraph, **groups}, name, line, "line"))
    return rows, unmatched


def _paragraphs(text: str, unit: str) -> Iterator[tuple[int, str]]:
    """The text's lines, blocks between blank lines, or the whole; each with the number of its first line."""
    lines = text.split("\n")
    if unit == "file":
        first = next(i for i, line in enumerate(lines) if line.strip())
        yield first + 1, "\n".join(lines[first:]).rstrip()
        return
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            block.append(line)
        if block and (unit == "line" or not line.strip()):
            yield number - (unit != "line") * len(block), "\n".join(block)
            block = []

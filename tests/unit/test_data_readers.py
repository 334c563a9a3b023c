"""Readers: every format, and every way in which a person's file can be wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from commonweight.data.readers import read, read_rows
from commonweight.errors import DataError
from commonweight.recipe.schema import DEMO_DATA, DataSpec

ITEMS = [{"question": "why?", "answer": "so"}, {"question": "when?", "answer": None}]


def spec(path: Path, **options: Any) -> DataSpec:
    return DataSpec(path=str(path), **options)


def fields(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [row.fields for row in read_rows(spec(path, **options))]


def refused(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_rows(spec(path, **options))
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_parquet(path: Path, items: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
    return path


@pytest.mark.parametrize("wrapped", [ITEMS, {"version": "1", "data": ITEMS}])
def test_json_is_a_list_or_an_objects_only_list(tmp_path: Path, wrapped: Any) -> None:
    assert fields(write(tmp_path / "a.json", json.dumps(wrapped))) == ITEMS


def test_json_object_of_objects_keeps_its_keys_as_id(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"p1": {"q": "x"}, "p2": {"q": "y", "id": "own"}}')
    assert fields(path) == [{"id": "p1", "q": "x"}, {"id": "own", "q": "y"}]


def test_jsonl_skips_blank_lines_and_keeps_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\r\n{"a": "x\\u2028y"}\n')
    rows = read_rows(spec(path))
    assert [(row.fields, row.where) for row in rows] == [
        ({"a": 1}, "a.jsonl, line 1"),
        ({"a": "x\u2028y"}, "a.jsonl, line 3"),
    ]


def test_a_raw_line_separator_inside_json_does_not_end_the_line(tmp_path: Path) -> None:
    assert fields(write(tmp_path / "a.jsonl", '{"a": "x\u2028y\x85z"}\n')) == [{"a": "x\u2028y\x85z"}]


def test_csv_with_quotes_line_breaks_and_a_long_value(tmp_path: Path) -> None:
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'q,a\n"one, two","three\nfour"\n\nfive,{long}\n')
    assert fields(path) == [{"q": "one, two", "a": "three\nfour"}, {"q": "five", "a": long}]


def test_tsv_and_gzip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv.gz", gzip.compress(b"q\ta\none, two\tthree\n", mtime=0))
    assert fields(path) == [{"q": "one, two", "a": "three"}]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "A.JSONL.GZ"])
def test_gzip_of_jsonl(tmp_path: Path, name: str) -> None:
    assert fields(write(tmp_path / name, gzip.compress(b'{"a": 1}'))) == [{"a": 1}]


def test_parquet_plain_and_gzipped(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ITEMS)
    zipped = write(tmp_path / "b.parquet.gz", gzip.compress(path.read_bytes()))
    assert fields(path) == ITEMS == fields(zipped)


def test_explicit_format_overrides_the_ending(tmp_path: Path) -> None:
    assert fields(write(tmp_path / "a.dat", '{"a": 1}'), format="jsonl") == [{"a": 1}]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", [("A:", 2), ("one", 3), ("two", 4), ("B:", 6)]),
        ("blank-line", [("A:\none\ntwo", 2), ("B:", 6)]),
        ("file", [("A:\none\ntwo\n  \nB:", 2)]),
    ],
)
def test_plain_text_paragraphs(tmp_path: Path, unit: Any, expected: list[tuple[str, int]]) -> None:
    rows = read_rows(spec(write(tmp_path / "a.txt", "\nA:\none\ntwo\n  \nB:\n\n"), paragraphs=unit))
    assert [(row.fields["text"], row.number) for row in rows] == expected


def test_pattern_turns_paragraphs_into_fields_and_counts_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "ANNA:\nHello\nyou\n\nExeunt.\n\nBOB:\nBye")
    reading = read(spec(path, pattern=r"^(?P<speaker>[^\n]+):\n(?P<text>[\s\S]+)$"))
    assert [row.fields for row in reading.rows] == [
        {"speaker": "ANNA", "text": "Hello\nyou"},
        {"speaker": "BOB", "text": "Bye"},
    ]
    assert reading.unmatched == 1


def test_pattern_without_a_text_group_keeps_the_paragraph(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "ANNA: Hello")
    assert fields(path, pattern=r"(?P<who>\w+):") == [{"who": "ANNA", "text": "ANNA: Hello"}]


def test_pattern_that_matches_nothing(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "a.txt", "x"), pattern=r"(?P<who>\d+)")
    assert "no paragraph matches" in error.message
    assert "data.pattern" in error.hint


def test_folder_is_read_in_natural_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    write(tmp_path / "10.jsonl", '{"a": 10}')
    write(tmp_path / "2.json", '[{"a": 2}]')
    write(tmp_path / "1.csv", "a\n1\n")
    write(tmp_path / ".hidden.jsonl", "junk")
    write(tmp_path / "LICENSE", "words")
    (tmp_path / "sub.jsonl").mkdir()
    rows = read_rows(spec(tmp_path))
    assert [(row.file, row.fields["a"]) for row in rows] == [("1.csv", "1"), ("2.json", 2), ("10.jsonl", 10)]


def test_folder_with_a_format_reads_only_files_of_that_format(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"a": 1}')
    write(tmp_path / "SOURCE.txt", "where it came from")
    assert fields(tmp_path, format="jsonl") == [{"a": 1}]


def test_demo_rows_come_with_the_package() -> None:
    rows = read_rows(DataSpec(), seed=1)
    assert {"site", "subject", "question", "answer"} <= set(rows[0].fields)
    assert rows[0].file == DEMO_DATA


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b" \n \n", "is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": ', "line 2, column 7: not JSON"),
        ("a.jsonl", b'{"a": 1} x\n', "line 1, column 10: not JSON: Extra data"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: a list, not an object"),
        ("a.jsonl", b"7\n", "line 1: a number, not an object"),
        ("a.jsonl", b'{"a": "\\ud83d"}\n', "line 1: holds half of a surrogate pair"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8 text (byte 0xff)"),
        ("a.jsonl", b"\x00\x01\x02", "is a binary file"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "is a binary file"),
        ("a.jsonl", b"[" * 100_000, "cannot be read"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: JSON that cannot be read"),
        ("a.json", b'[{"a": 1}]\n[2]', "line 2, column 1: not JSON: Extra data"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "line 2, column 1"),
        ("a.json", b'{"a": 1}', "holds an object, not a list of objects"),
        ("a.json", b'{"a": [], "b": []}', "holds an object"),
        ("a.json", b'"x"', "holds a string"),
        ("a.json", b'[{"a": 1}, null]', "row 2: null, not an object"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'[{"a": "\\uD800"}]', "surrogate pair"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3: 1 values for the header's 2 columns"),
        ("a.csv", b"a,b\n1,2,3\n", "line 2: 3 values"),
        ("a.csv", b"a,a\n1,2\n", "empty or repeated column names: 'a'"),
        ("a.csv", b"a,\n1,2\n", "empty or repeated column names: ''"),
        ("a.csv", b'a,b\n1,"open\n2,3\n', "not CSV: unexpected end of data"),
        ("a.csv", b"a,b\n", "holds no rows"),
        ("a.parquet", b"PAR1 no", "is not a Parquet file"),
        ("a.jsonl.gz", b"plain", "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 50, mtime=0)[:-9], "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.dat", b"x", "does not tell the format"),
    ],
)
def test_a_wrong_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    error = refused(write(tmp_path / name, content))
    assert words in error.message
    assert name in error.message


def test_json_lines_in_a_json_file_are_told_of_jsonl(tmp_path: Path) -> None:
    assert "jsonl" in refused(write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}')).hint


def test_one_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"a": 1}')
    write(tmp_path / "b.jsonl", "")
    assert "b.jsonl is empty" in refused(tmp_path).message


def test_missing_file_suggests_a_near_name(tmp_path: Path) -> None:
    write(tmp_path / "medquad.jsonl.gz", b"")
    error = refused(tmp_path / "medquad.jsonl")
    assert "there is no" in error.message
    assert "did you mean 'medquad.jsonl.gz'?" in error.hint


def test_missing_folder_is_named(tmp_path: Path) -> None:
    assert "its folder" in refused(tmp_path / "none" / "a.jsonl").message


def test_home_of_nobody() -> None:
    assert "~" in refused(Path("~no-such-person-here/a.jsonl")).hint


def test_neither_file_nor_folder() -> None:
    assert "neither a file nor a folder" in refused(Path("/dev/null")).message


def test_folder_without_data_lists_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "x")
    error = refused(tmp_path)
    assert "has no file ending in" in error.message
    assert "notes.md" in error.hint


def test_unreadable_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}')

    def denied(self: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert "cannot be read: Permission denied" in refused(path).message
    monkeypatch.setattr(Path, "iterdir", denied)
    assert "cannot be listed: Permission denied" in refused(tmp_path).message


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(ITEMS)
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "dict"))
    table.save_to_disk(str(tmp_path / "single"))
    return tmp_path


def test_dataset_saved_to_disk(saved: Path) -> None:
    assert fields(saved / "dict") == ITEMS
    assert fields(saved / "dict", split="test") == ITEMS[:1]
    assert fields(saved / "single", format="dataset") == ITEMS


def test_unknown_split_suggests_a_near_one(saved: Path) -> None:
    error = refused(saved / "dict", split="tests")
    assert "has no split 'tests'" in error.message
    assert "did you mean 'test'?" in error.hint


def test_damaged_saved_dataset(saved: Path) -> None:
    for file in (saved / "single").glob("*.arrow"):
        file.write_bytes(b"junk")
    assert "cannot be loaded" in refused(saved / "single").message


def test_dataset_repository_folder(saved: Path) -> None:
    (saved / "repo" / "data").mkdir(parents=True)
    write_parquet(saved / "repo" / "data" / "train-00000-of-00001.parquet", ITEMS)
    assert fields(saved / "repo", format="dataset") == ITEMS
    assert "format: dataset" in refused(saved / "repo").hint


def test_a_file_is_no_dataset(tmp_path: Path) -> None:
    assert "is a file" in refused(write(tmp_path / "a.jsonl", "{}"), format="dataset").message
    assert "there is no" in refused(tmp_path / "gone", format="dataset").message


@pytest.mark.parametrize("options", [{}, {"format": "dataset"}])
def test_hub_id_goes_through_datasets(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(path: str, split: str) -> Any:
        assert (path, split) == ("owner/some-data", "validation")
        return datasets.Dataset.from_list(ITEMS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert fields(Path("owner/some-data"), split="validation", **options) == ITEMS


def test_hub_failure_is_one_sentence_and_may_be_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(path: str, split: str) -> Any:
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    error = refused(Path("owner/some-data"))
    assert error.message == "the dataset 'owner/some-data' cannot be loaded: no route to host"
    assert error.retry

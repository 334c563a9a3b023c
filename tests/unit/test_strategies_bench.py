"""Figures of the strategies' benchmark, measured in pieces, as one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.strategies import joined, main


def row(seeds: list[int], losses: list[float], **further: list[float]) -> dict[str, Any]:
    figures = ("worst", "up_mb", "down_mb", "server_s", "seconds")
    return {"seed": seeds, "loss": losses, **{key: [2.0] * len(losses) for key in figures}, **further}


def test_seeds_run_apart_make_one_row() -> None:
    table = joined([{"fedavg": row([0], [1.0])}, {"fedavg": row([2, 1], [3.0, 2.0]), "median": row([1], [5.0])}])
    assert table["fedavg"]["seed"] == [0, 2, 1]
    assert table["fedavg"]["loss"] == [1.0, 3.0, 2.0]
    assert table["fedavg"]["server_s"] == [2.0] * 3
    assert table["median"] == row([1], [5.0])


def test_figures_count_before_a_refusal_whichever_came_first() -> None:
    refused = {"fedavg": {"refused": "not with this recipe"}}
    measured = {"fedavg": row([0], [1.0])}
    assert joined([refused, measured]) == joined([measured, refused]) == measured
    assert joined([refused, refused]) == refused


def test_a_figure_that_one_file_lacks_is_left_out() -> None:
    table = joined([{"fedavg": row([0], [1.0], own=[7.0])}, {"fedavg": row([1], [2.0])}])
    assert "own" not in table["fedavg"]
    assert table["fedavg"]["loss"] == [1.0, 2.0]


def test_a_seed_must_not_count_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).write_text(json.dumps({"fedavg": row([4], [1.0])}))
        files.append(str(tmp_path / name))
    with pytest.raises(SystemExit):
        main(["--from", *files])
    assert "fedavg: seed 4 is in two of the files" in capsys.readouterr().err


def test_files_are_shown_as_means_with_deviations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = [
        {"fedavg": row([0], [1.0]), "median": row([0], [0.5]), "krum": {"refused": "needs f"}},
        {"fedavg": row([1], [2.0])},
    ]
    files = []
    for number, table in enumerate(tables):
        (tmp_path / str(number)).write_text(json.dumps(table))
        files.append(str(tmp_path / str(number)))
    main(["--from", *files])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["strategy", "median", "fedavg", "krum"]
    assert "1.500 ± 0.707" in lines[2]
    assert lines[2].split()[1] == "2"
    assert "refused: needs f" in lines[3]
    main(["--from", *files, "--json"])
    assert json.loads(capsys.readouterr().out) == joined(tables)

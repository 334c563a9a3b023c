"""Figures of what privacy costs, as a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.dp_sgd import Setting, compare
from benchmarks.private_utility import kept, main, rows


def test_every_unit_has_a_row_for_each_epsilon() -> None:
    found = rows(["example", "site"], [2.0, 8.0], 1e-4, {"example": 0.5, "site": 0.05})
    assert list(found) == ["none", "example ε 2", "example ε 8", "site ε 2", "site ε 8"]
    assert found["site ε 2"] == {"dp": "site", "clip": 0.05, "delta": 1e-4, "epsilon": 2.0}


def test_seeds_run_apart_are_shown_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for seed, shift in enumerate((0.0, 0.2)):
        table = {
            "none": {"seed": [seed], "loss": [2.0 + shift], "base": [4.0 + shift], "z": [0.0], "epsilon": [-1.0]},
            "example ε 8": {"seed": [seed], "loss": [3.0 + shift], "base": [4.0 + shift], "z": [0.8], "epsilon": [7.9]},
        }
        assert kept(table, "example ε 8") == pytest.approx(0.5)
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(json.dumps(table))
    main(["--from", *map(str, files)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[-1] == "∞"
    assert "3.100 ± 0.141" in lines[3]
    assert "50%" in lines[3]


def test_ratios_are_to_the_plain_step_of_the_same_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import dp_sgd

    def figure(setting: Setting) -> dict[str, object]:
        step = (10.0 if setting.mode == "plain" else 15.0) * setting.micro
        return {"mode": setting.mode, "micro": setting.micro, "step_ms": step, "peak_mib": 2 * step}

    monkeypatch.setattr(dp_sgd, "measured", figure)
    modes = ("plain", "private", "packed")
    found = compare([Setting(mode, 8, 1, 2, 8, 4, 4, micro) for micro in (1, 4) for mode in modes])
    assert [row["step_over"] for row in found] == [1.0, 1.5, 1.5] * 2
    assert [row["peak_over"] for row in found] == [1.0, 1.5, 1.5] * 2
    assert [row.get("step_over_padded") for row in found] == [None, None, 1.0] * 2

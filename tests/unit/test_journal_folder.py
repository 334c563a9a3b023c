"""What a run writes down: the journal, the folder, tensors in files, events; and what happens when it cannot."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from commonweight.errors import StateError, StorageError
from commonweight.federation import folder as folder_module
from commonweight.federation.events import Events, last_event, phase_seconds
from commonweight.federation.folder import (
    RunFolder,
    read_tensors,
    replacing,
    storage_errors,
    write_json,
    write_tensors,
    write_text,
)
from commonweight.federation.journal import Journal
from commonweight.launch import run
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.recipe import Recipe

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "state.sqlite")
    yield journal
    journal.close()


@pytest.fixture
def below_a_file(tmp_path: Path) -> Path:
    """A path that nobody, root included, can write."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "below"


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# --- the journal --------------------------------------------------------------------------------------------------


def test_a_run_of_something_else_is_refused_by_both_values(journal: Journal, tmp_path: Path) -> None:
    journal.bind({"data": "aaaa", "tokenizer": "tttt"})
    again = Journal(tmp_path / "state.sqlite")
    again.bind({"data": "aaaa", "tokenizer": "tttt"})
    with pytest.raises(StateError, match="another data: aaaa, now bbbb") as caught:
        again.bind({"tokenizer": "tttt", "data": "bbbb", "adapter layout": "llll"})
    assert "-o" in caught.value.hint
    again.bind({"data": "aaaa", "adapter layout": "now free, since the refused binding left nothing"})
    again.close()


def test_a_journal_of_another_format_is_refused(journal: Journal, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "state.sqlite") as database:
        database.execute("UPDATE identity SET value = '99' WHERE key = 'format'")
    with pytest.raises(StateError, match="another format: 99, now 1"):
        Journal(tmp_path / "state.sqlite")


def test_commits_come_back_in_order_after_reopening(journal: Journal, tmp_path: Path) -> None:
    assert journal.last_round() == 0
    for round in (0, 2, 1):
        journal.commit(round, {"state": {"file": f"{round}"}, "answered": ["é", "b"], "loss": 0.1})
    journal.close()
    again = Journal(tmp_path / "state.sqlite")
    assert again.last_round() == 2
    assert list(again.commits()) == [0, 1, 2]
    assert again.commits()[1] == {"state": {"file": "1"}, "answered": ["é", "b"], "loss": 0.1}
    again.close()


def test_a_second_commit_of_a_round_is_refused_and_changes_nothing(journal: Journal) -> None:
    journal.commit(1, {"is": "first"})
    journal.keep_update(1, "north", {"sha256": "f"})
    with pytest.raises(StateError, match="refuses a second entry"):
        journal.commit(1, {"is": "second"})
    assert journal.commits() == {1: {"is": "first"}}
    assert set(journal.kept_updates(1)) == {"north"}
    journal.commit(2, {})


def test_a_commit_forgets_the_updates_kept_for_it_and_no_later_ones(journal: Journal) -> None:
    for round, site in ((1, "north"), (2, "north"), (2, "south"), (3, "north")):
        journal.keep_update(round, site, {"weight": round / 3})
    assert journal.kept_updates(2) == {"north": {"weight": 2 / 3}, "south": {"weight": 2 / 3}}
    journal.commit(2, {})
    assert journal.kept_updates(1) == journal.kept_updates(2) == {}
    assert journal.kept_updates(3) == {"north": {"weight": 1.0}}


def test_an_update_kept_twice_and_a_result_put_twice_are_there_once(journal: Journal) -> None:
    for value in (1, 2):
        journal.keep_update(1, "north", {"value": value})
        journal.put("scores/base", {"value": value})
    assert journal.kept_updates(1) == {"north": {"value": 2}}
    assert journal.get("scores/base") == {"value": 2}
    assert journal.get("scores/federated") is None


def test_a_failure_inside_a_commit_leaves_neither_half(journal: Journal) -> None:
    journal.keep_update(1, "north", {})
    journal._db.execute("CREATE TRIGGER broken BEFORE DELETE ON updates BEGIN SELECT raise(ABORT, 'no'); END")
    with pytest.raises(StateError):
        journal.commit(1, {})
    assert journal.last_round() == 0
    assert set(journal.kept_updates(1)) == {"north"}


def test_garbage_instead_of_a_journal_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    path.write_bytes(os.urandom(8192))
    with pytest.raises(StateError, match=r"state\.sqlite is damaged") as caught:
        Journal(path)
    assert "restore the folder from a copy" in caught.value.hint


def test_garbage_in_the_middle_of_a_journal_is_called_damaged(journal: Journal, tmp_path: Path) -> None:
    for round in range(200):
        journal.commit(round, {"filling": "x" * 200})
    journal.close()
    path = tmp_path / "state.sqlite"
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(StateError, match="is damaged"):
        Journal(path).commits()


@pytest.mark.parametrize(
    "read",
    [lambda journal: journal.commits(), lambda journal: journal.kept_updates(1), lambda journal: journal.get("key")],
    ids=["commits", "updates", "results"],
)
def test_a_record_cut_short_is_called_damaged(journal: Journal, read: Callable[[Journal], Any]) -> None:
    journal.commit(0, {"a": "long enough"})
    journal.keep_update(1, "north", {"a": "long enough"})
    journal.put("key", {"a": "long enough"})
    for table in ("commits", "updates", "results"):
        journal._db.execute(f"UPDATE {table} SET record = substr(record, 1, 7)")
    with pytest.raises(StateError, match="is damaged"):
        read(journal)


def test_a_journal_where_nobody_can_write_is_a_storage_error(below_a_file: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read or written"):
        Journal(below_a_file)


def test_a_full_disk_is_a_storage_error_that_may_be_repeated_and_loses_nothing(journal: Journal) -> None:
    journal.commit(1, {"is": "kept"})
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match="database or disk is full") as caught:
        journal.commit(2, {"filling": "x" * 100_000})
    assert caught.value.retry
    assert "--resume" in caught.value.hint
    assert journal.commits() == {1: {"is": "kept"}}


# --- the folder ---------------------------------------------------------------------------------------------------


def test_a_new_or_an_empty_folder_becomes_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "deep" / "new", tmp_path / "empty"):
        folder = RunFolder(path, resume=False)
        assert names(path) == {".lock", "state", "rounds", "updates", "sites", "controls"}
        folder.close()


def test_a_folder_with_a_run_is_not_begun_again(tmp_path: Path) -> None:
    Journal(tmp_path / "state.sqlite").close()
    with pytest.raises(StateError, match="already holds a run") as caught:
        RunFolder(tmp_path, resume=False)
    assert "--resume" in caught.value.hint


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StateError, match="is not empty and holds no run"):
        RunFolder(tmp_path, resume=False)
    assert names(tmp_path) == {"thesis.txt"}


@pytest.mark.parametrize("name", ["state", "rounds"])
def test_a_folder_of_a_familiar_name_with_something_in_it_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("precious")
    with pytest.raises(StateError, match="is not empty and holds no run"):
        RunFolder(tmp_path, resume=False)


def test_what_a_run_killed_at_its_very_start_leaves_does_not_stand_in_the_way(tmp_path: Path) -> None:
    RunFolder(tmp_path, resume=False).close()
    Events(tmp_path / "events.jsonl").close()
    with pytest.raises(StateError, match="no run to resume"):
        RunFolder(tmp_path, resume=True)
    RunFolder(tmp_path, resume=False).close()


def test_there_is_nothing_to_resume_where_no_run_is(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(StateError, match="no run to resume") as caught:
            RunFolder(path, resume=True)
        assert "-o" in caught.value.hint
    assert not (tmp_path / "none").exists()


def test_a_folder_in_use_is_refused_until_it_is_closed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resume=False)
    with pytest.raises(StateError, match="another process is running"):
        RunFolder(tmp_path, resume=False)
    Journal(tmp_path / "state.sqlite").close()
    with pytest.raises(StateError, match="another process is running"):
        RunFolder(tmp_path, resume=True)
    folder.close()
    RunFolder(tmp_path, resume=True).close()


def stay(connection: Connection) -> None:
    connection.send("up")
    time.sleep(3600)


def test_a_child_that_outlives_the_run_does_not_hold_its_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resume=False)
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=stay, args=(theirs,), daemon=True)
    child.start()
    assert ours.recv() == "up"
    with pytest.raises(StateError, match="another process"):
        RunFolder(tmp_path, resume=False)
    folder.close()
    RunFolder(tmp_path, resume=False).close()
    child.kill()
    child.join()


def test_a_folder_where_nobody_can_write_is_a_storage_error(below_a_file: Path) -> None:
    with pytest.raises(StorageError, match="cannot write in") as caught:
        RunFolder(below_a_file, resume=False)
    assert not caught.value.retry


@pytest.mark.parametrize(("keep", "left"), [("all", {"0001", "0002", "0003"}), (2, {"0002", "0003"}), (1, {"0003"})])
def test_a_commit_deletes_what_it_made_rubbish(tmp_path: Path, keep: str | int, left: set[str]) -> None:
    folder = RunFolder(tmp_path, resume=False)
    for round in (1, 2, 3):
        folder.state_file(round).write_text("")
        folder.update_file(round, 7).write_text("")
        folder.round_folder(round).mkdir()
        (folder.round_folder(round) / "adapter_config.json").write_text("{}")
    folder.forget_before(3, keep)
    folder.close()
    assert names(tmp_path / "rounds") == left
    assert names(tmp_path / "state") == {"0003.safetensors"}
    assert names(tmp_path / "updates") == set()


# --- writing ------------------------------------------------------------------------------------------------------


def write_half(path: Path, error: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise error


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    for error in (RuntimeError("a defect"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write_half(path, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"metrics.json"}


def test_a_file_appears_whole_under_its_name_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "recipe.yaml"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "whole"
    assert names(path.parent) == {"recipe.yaml"}


def test_json_is_written_for_people_and_programs(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"site": "Bergführer", "loss": 0.1})
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    assert "Bergführer" in text
    assert json.loads(text) == {"site": "Bergführer", "loss": 0.1}


def full_disk(*_: Any, **__: Any) -> None:
    raise NO_SPACE


def full_disk_as_safetensors_says_it(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("owner", "name", "refusal"),
    [
        (folder_module, "save_file", full_disk),
        (folder_module, "save_file", full_disk_as_safetensors_says_it),
        (os, "fsync", full_disk),
        (Path, "replace", full_disk),
    ],
)
def test_a_full_disk_while_tensors_are_written_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, refusal: Callable[..., None]
) -> None:
    path, old = tmp_path / "0001.safetensors", tensors(1)
    sha256 = write_tensors(path, {"theta": old})
    monkeypatch.setattr(owner, name, refusal)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        write_tensors(path, {"theta": tensors(2)})
    assert caught.value.retry
    assert "--resume" in caught.value.hint
    assert caught.value.exit_code == 7
    monkeypatch.undo()
    assert read_tensors(path, old.layout, sha256=sha256)["theta"].digest() == old.digest()
    assert names(tmp_path) == {path.name}


@pytest.mark.parametrize(("code", "retry"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_only_a_full_disk_may_simply_be_tried_again(tmp_path: Path, code: int, retry: bool) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    assert caught.value.retry == retry
    assert caught.value.hint


def test_a_disk_error_that_safetensors_reports_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="os error 27") as caught, storage_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    assert not caught.value.retry


# --- tensors in files ---------------------------------------------------------------------------------------------


def tensors(seed: int) -> NamedTensors:
    """Several dtypes, among them one that floats hold rounded, a scalar, and negative zero and a subnormal."""
    draw = torch.Generator().manual_seed(seed)
    made = {
        "a.lora_A": torch.randn(3, 5, generator=draw),
        "a.lora_B": torch.randn(7, 3, generator=draw).to(torch.bfloat16),
        "b.half": torch.randn(4, generator=draw).to(torch.float16),
        "b.double": torch.randn((), generator=draw, dtype=torch.float64),
        "c.count": torch.randint(-(2**60), 2**60, (2,), generator=draw),
    }
    made["a.lora_A"][0, :2] = torch.tensor([-0.0, 1e-42])
    return NamedTensors.of(made)


def test_tensors_come_back_bit_by_bit_narrow_ones_narrow_and_slots_wide(tmp_path: Path) -> None:
    theta = tensors(1)
    slot = NamedTensors.zeros(theta.layout, wide=True)
    for dtype, flat in slot.flats.items():
        flat.copy_(theta.flats[dtype]).mul_(3)
    path = tmp_path / "0001.safetensors"
    sha256 = write_tensors(path, {"theta": theta, "slot/m": slot})
    groups = read_tensors(path, theta.layout, sha256=sha256)
    assert groups["theta"].digest() == theta.digest()
    assert groups["slot/m"].digest() == slot.digest()
    assert groups["slot/m"]["a.lora_B"].dtype == torch.float32
    assert groups["theta"]["a.lora_B"].dtype == torch.bfloat16


def test_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    digests = {write_tensors(tmp_path / name, {"theta": tensors(1)}, {"chain": "{}"}) for name in ("a", "b")}
    assert len(digests) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
@pytest.mark.parametrize("known", [True, False], ids=["digest in the journal", "no digest"])
def test_a_damaged_file_of_tensors_is_refused(tmp_path: Path, damage: str, known: bool) -> None:
    path, theta = tmp_path / "0001.safetensors", tensors(1)
    sha256 = write_tensors(path, {"theta": theta})
    content = path.read_bytes()
    flipped = bytes([content[0], content[1] ^ 1]) + content[2:]  # in the header's length
    path.write_bytes({"flip": flipped, "cut": content[:-5], "empty": b""}[damage])
    with pytest.raises(StateError, match="is damaged") as caught:
        read_tensors(path, theta.layout, sha256=sha256 if known else None)
    assert "restore the folder" in caught.value.hint


def test_a_value_changed_since_the_journal_named_it_is_refused(tmp_path: Path) -> None:
    path, theta = tmp_path / "0001.safetensors", tensors(1)
    sha256 = write_tensors(path, {"theta": theta})
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StateError, match="its digest is not the one in the journal"):
        read_tensors(path, theta.layout, sha256=sha256)


def test_a_missing_file_of_tensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"0001\.safetensors is missing"):
        read_tensors(tmp_path / "0001.safetensors", tensors(1).layout)


def test_tensors_of_another_layout_are_refused(tmp_path: Path) -> None:
    path, theta = tmp_path / "0001.safetensors", tensors(1)
    longer = Layout.of({name: torch.zeros(9, dtype=tensor.dtype) for name, tensor in theta.items()})
    narrow_slot = {"slot/m": theta}
    for groups, layout in (({"theta": theta}, longer), (narrow_slot, theta.layout)):
        write_tensors(path, groups)
        with pytest.raises(StateError, match="does not fit this model's trainable tensors"):
            read_tensors(path, layout)


def test_a_file_that_another_program_wrote_is_refused(tmp_path: Path) -> None:
    save_file({"base.weight": torch.zeros(3), "theta/complex128": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(StateError, match="does not fit"):
        read_tensors(tmp_path / "foreign.safetensors", tensors(1).layout)


# --- events -------------------------------------------------------------------------------------------------------


def test_events_are_told_and_written_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    path, told = tmp_path / "events.jsonl", []
    for value in (1, 2):
        events = Events(path, (lambda event, fields: told.append((event, dict(fields))),))
        events.emit("round_opened", round=value, cohort=["Müller"])
        events.close()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert told == [("round_opened", {"round": value, "cohort": ["Müller"]}) for value in (1, 2)]


@pytest.mark.parametrize("whole", ["", '{"t": 1, "event": "a"}\n'])
@pytest.mark.parametrize("partial", ["", '{"t": 2, "ev', "{"])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path, whole: str, partial: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(whole + partial)
    events = Events(path)
    events.emit("b")
    events.close()
    found = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert found == [*(["a"] if whole else []), "b"]


def test_events_of_a_site_whose_name_holds_a_line_separator_are_read_back(tmp_path: Path) -> None:
    path, name = tmp_path / "events.jsonl", "north\u2028wing\u0085"
    events = Events(path)
    events.emit("run_started", name=name)
    events.emit("run_finished")
    events.close()
    assert phase_seconds(path)["load"] >= 0
    assert last_event(path, "run_started")["name"] == name


def test_phases_add_up_over_the_processes_that_worked_on_a_run(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    told = [
        (10.0, "run_started"), (12.0, "loaded"), (13.0, "engine_started"), (14.0, "round_opened"),
        (20.0, "round_committed"),  # killed; resumed after an hour
        (4000.0, "run_started"), (4001.0, "engine_started"), (4002.0, "round_opened"), (4005.0, "controls_started"),
        (4006.0, "run_finished"),
    ]  # fmt: skip
    path.write_text("".join(json.dumps({"t": t, "event": event}) + "\n" for t, event in told))
    assert phase_seconds(path) == {"load": 4, "evaluate": 2, "federated": 9, "controls": 1, "total": 16}


def test_events_where_nobody_can_write_are_a_storage_error(below_a_file: Path) -> None:
    with pytest.raises(StorageError, match="cannot write in"):
        Events(below_a_file)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_full_disk_while_events_are_written_is_a_storage_error(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    events.close()
    events._file = Path("/dev/full").open("w")  # noqa: SIM115
    events.emit("round_opened")
    for end in (events.flush, events.close):
        with pytest.raises(StorageError, match="the disk is full") as caught:
            end()
        assert caught.value.retry


def test_an_emptied_journal_does_not_begin_anew_over_rounds(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(make_recipe(), folder)
    for file in folder.glob("state.sqlite*"):
        file.write_bytes(b"")
    with pytest.raises(StateError, match="is empty, but there are rounds"):
        run(make_recipe(), folder, resume=True)
    assert (folder / "rounds" / "0002").exists()


def test_a_damaged_event_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"t": 1, "event": "run_started"}\n{"t": 2, "event": "loa\n')
    with pytest.raises(StateError, match="a line is no JSON"):
        phase_seconds(path)

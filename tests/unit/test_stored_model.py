"""A global model in files gives the bits of one in memory, whatever the strategy, the dtypes and the size of chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from commonweight.coordinator.blobs import Blobs
from commonweight.coordinator.frame_files import FrameFiles, FrameWriter
from commonweight.coordinator.stored_model import StoredModel, StoredUpdate
from commonweight.coordinator.vault import SealedFile
from commonweight.errors import RoundError, StateError, StorageError
from commonweight.federation.folder import RunFolder
from commonweight.federation.global_model import MemoryModel
from commonweight.model.tensors import NamedTensors
from commonweight.registry import names, resolve
from commonweight.strategies.asynchronous import AsynchronousStrategy
from commonweight.strategies.base import SumStrategy
from commonweight.strategies.update import Update
from commonweight.wire.frames import Channel, Frame, Plan, frame_of, piece_of

KEY = bytes(range(32))
SITES = ("north", "south", "west")
WEIGHTS = (24.0, 18.0, 0.5)


def tensors(seed: int, *, mixed: bool) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    made = {
        "a.weight": torch.randn(37, 51, generator=draw),
        "b.weight": torch.randn(3, generator=draw),
        "c.scalar": torch.randn((), generator=draw),
        "d.empty": torch.zeros(0, 4),
        "e.weight": torch.randn(64, 40, generator=draw),
    }
    if mixed:
        made["f.narrow"] = torch.randn(41, 70, generator=draw).bfloat16()
        made["g.wide"] = torch.randn(300, generator=draw, dtype=torch.float64)
    return NamedTensors.of(made)


def stored_update(
    folder: Path, site: str, weight: float, channels: dict[str, NamedTensors], chunk_bytes: int, round: int = 1
) -> StoredUpdate:
    layout = channels["delta"].layout
    plan = Plan(layout, tuple(Channel(name) for name in channels), chunk_bytes)
    path = folder / f"{site}-{round}.sealed"
    with SealedFile(path, KEY, chunk_bytes) as sealed:
        for piece in plan.pieces:
            sealed.write(piece.index, piece_of(channels, piece))
    return StoredUpdate(site, round, {}, weight, 1, 1, 1, frame=frame_of(channels, plan), path=path, key=KEY)


def strategy_of(name: str) -> SumStrategy:
    return cast(SumStrategy, resolve("strategy", name)(num_sites=len(SITES)))


def files_in(folder: Path) -> FrameFiles:
    return FrameFiles(Blobs(str(folder / "blobs"), folder / "cache"), folder / "scratch", "r")


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("name", [n for n in names("strategy") if issubclass(resolve("strategy", n), SumStrategy)])
def test_the_same_bits_as_in_memory(name: str, mixed: bool, tmp_path: Path) -> None:
    theta, chunk_bytes = tensors(0, mixed=mixed), 1024
    in_memory = strategy_of(name)
    folder = RunFolder(tmp_path / "run", resume=False)
    memory = MemoryModel(in_memory, theta.clone(), folder, lambda theta, path: None)
    memory.first()
    files = files_in(tmp_path)
    initial = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), chunk_bytes))
    stored = StoredModel(strategy_of(name), files, initial.digest)
    stored.first()
    for number in (1, 2, 3):
        memory.open()
        stored.open()
        for place, (site, weight) in enumerate(zip(SITES, WEIGHTS, strict=True)):
            channels = {
                channel: tensors(100 * number + 10 * place + k, mixed=mixed)
                for k, channel in enumerate(in_memory.update_channels)
            }
            memory.fold(Update(site, number, channels, weight, 1, 1, 1))
            stored.fold(stored_update(tmp_path, site, weight, channels, chunk_bytes, number))
        memory.close(number)
        record = stored.close(number)
    assert stored.digest() == memory.state.theta.digest()
    again = StoredModel(strategy_of(name), files, initial.digest)
    again.restore(3, record)
    for slot, held in memory.state.slots.items():
        digest = again.base if slot in in_memory.broadcast_channels else again.slots
        frame = files.open(digest)
        read = torch.cat([frame.tensor(p).double() for p in frame.frame.plan.pieces if p.channel == slot])
        assert torch.equal(read, torch.cat([flat.double() for flat in held.flats.values()]))


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("name", ["fedbuff", "fedasync"])
def test_updates_of_older_versions_give_the_same_bits_as_in_memory(name: str, mixed: bool, tmp_path: Path) -> None:
    """The second and third version take in an update that was made from the one before their base: FedAsync's needs its
    frame."""
    theta, chunk_bytes = tensors(0, mixed=mixed), 1024
    strategy = cast(AsynchronousStrategy, resolve("strategy", name)())
    folder = RunFolder(tmp_path / "run", resume=False)
    memory = MemoryModel(strategy, theta.clone(), folder, lambda theta, path: None)
    memory.first()
    files = files_in(tmp_path)
    initial = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), chunk_bytes))
    stored = StoredModel(strategy, files, initial.digest)
    stored.first()
    thetas, bases = [theta.clone()], [initial.digest]
    for number in (1, 2, 3):
        memory.open()
        stored.open()
        started = max(0, number - 2)
        update = Update("north", started + 1, {"delta": tensors(number, mixed=mixed)}, 1.0, 1, 1, 1)
        kept = strategy.kept(thetas[started], update)
        weight = strategy.discount(number - 1 - started)
        memory.fold(replace(kept, weight=weight))
        in_file = stored_update(tmp_path, "north", weight, dict(update.channels), chunk_bytes, number)
        stored.fold(replace(in_file, base=bases[started]))
        memory.close(number)
        bases.append(stored.close(number)["base"])
        thetas.append(memory.state.theta.clone())
        assert stored.digest() == memory.state.theta.digest()


def one_round(tmp_path: Path, update: NamedTensors, **changes: Any) -> StoredModel:
    theta = tensors(0, mixed=False)
    files = files_in(tmp_path)
    initial = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), 1024))
    model = StoredModel(strategy_of("fedavg"), files, initial.digest)
    model.first()
    model.open()
    model.fold(stored_update(tmp_path, "north", 1.0, {"delta": update}, 1024))
    return model


def test_a_result_that_is_not_finite_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    update = tensors(1, mixed=False)
    update["e.weight"][3, 3] = 3e38
    model = one_round(tmp_path, update)
    model.fold(stored_update(tmp_path, "south", 1e9, {"delta": update}, 1024))
    before = model.record()
    with pytest.raises(RoundError, match=r"e\.weight"):
        model.close(1)
    assert model.record() == before
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_damaged_update_is_named(tmp_path: Path) -> None:
    model = one_round(tmp_path, tensors(1, mixed=False))
    path = tmp_path / "north-1.sealed"
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StateError, match="'north' for round 1 is damaged"):
        model.close(1)


def test_a_round_without_updates_is_a_defect(tmp_path: Path) -> None:
    model = one_round(tmp_path, tensors(1, mixed=False))
    model.open()
    with pytest.raises(ValueError, match="no update"):
        model.close(1)


def test_a_frame_that_is_missing_or_cut_is_said(tmp_path: Path) -> None:
    theta = tensors(0, mixed=False)
    files = files_in(tmp_path)
    frame = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), 1024))
    assert files.digests() == [frame.digest]
    with pytest.raises(StorageError):
        files.open("0" * 64)
    body = tmp_path / "blobs" / "runs" / "r" / "frames" / frame.digest
    body.write_bytes(body.read_bytes()[:-1])
    with pytest.raises(StateError, match="is damaged"):
        files.open(frame.digest)
    files.forget([frame.digest])
    assert files.digests() == []


def test_a_frame_comes_back_as_it_was_written(tmp_path: Path) -> None:
    theta = tensors(0, mixed=True)
    files = files_in(tmp_path)
    plan = Plan(theta.layout, (Channel("theta"),), 1024)
    with FrameWriter(files, plan) as writer:
        for piece in reversed(plan.pieces):
            writer.write(piece.index, piece_of({"theta": theta}, piece))
        frame: Frame = writer.finish()
    found = files.open(frame.digest)
    for piece in plan.pieces:
        assert found.chunk(piece.index) == bytes(piece_of({"theta": theta}, piece))

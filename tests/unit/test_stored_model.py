"""A global model in files gives the bits of one in memory, whatever the strategy, the dtypes and the size of chunks."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from commonweight.codec.coded import Payloads
from commonweight.codec.down import add_to, down_of
from commonweight.coordinator.blobs import Blobs
from commonweight.coordinator.frame_files import FrameFiles, FrameWriter
from commonweight.coordinator.stored_model import StoredModel, frames_of
from commonweight.coordinator.stored_updates import StoredUpdate
from commonweight.coordinator.vault import SealedFile
from commonweight.errors import RecipeError, RoundError, StateError, StorageError
from commonweight.federation.folder import RunFolder
from commonweight.federation.global_model import MemoryModel
from commonweight.model.tensors import NamedTensors
from commonweight.recipe.schema import DownSpec
from commonweight.registry import names, resolve
from commonweight.strategies import side_by_side
from commonweight.strategies.asynchronous import AsynchronousStrategy
from commonweight.strategies.base import SumStrategy
from commonweight.strategies.side_by_side import SideBySideStrategy
from commonweight.strategies.update import Update
from commonweight.wire.frames import Channel, Frame, Plan, frame_of, piece_of
from commonweight.wire.manifest import check_coded_frame

KEY = bytes(range(32))
SITES = ("north", "south", "west", "east", "isles", "coast", "moor", "fen")
WEIGHTS = (24.0, 18.0, 0.5, 1.0, 7.0, 2.0, 3.0, 5.5)
#: of strategies that must be told
OPTIONS = {
    **{name: {"f": 1} for name in ("trimmed-mean", "krum", "multi-krum", "bulyan")},
    "dnc": {"f": 1, "num_columns": 700},
    "median": {"f": 1, "mixing": "nearest", "lr": 0.7},
    "centered-clipping": {"f": 1, "mixing": "nearest", "tau": 30.0},
}
#: strategies with rounds; those that no coordinator can run are refused before (`test_compatibility.py`)
ROUNDS = [
    name
    for name, kind in ((name, resolve("strategy", name)) for name in names("strategy"))
    if not (kind.not_networked or kind.asynchronous)
]


def tensors(seed: int, *, mixed: bool) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    made = {
        "a.weight": torch.randn(37, 51, generator=draw),
        "b.weight": torch.randn(3, generator=draw),
        "c.scalar": torch.randn((), generator=draw),
        "d.empty": torch.zeros(0, 4),
        "e.weight": torch.randn(64, 40, generator=draw),
    }
    # LoRA pairs among them; that of `d` spans a chunk's end, that of `x` several chunks
    made |= {f"{name}.lora_A.weight": torch.randn(r, n, generator=draw) for name, r, n in (("d", 2, 29), ("x", 3, 301))}
    made |= {f"{name}.lora_B.weight": torch.randn(n, r, generator=draw) for name, r, n in (("d", 2, 17), ("x", 3, 103))}
    if mixed:
        made["f.narrow"] = torch.randn(41, 70, generator=draw).bfloat16()
        made["f.lora_A.weight"] = torch.randn(4, 333, generator=draw).bfloat16()
        made["f.lora_B.weight"] = torch.randn(70, 4, generator=draw).bfloat16()
        made["n.ids"] = torch.randint(-(2**40), 2**40, (5,), generator=draw)
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


def strategy_of(name: str) -> SumStrategy | SideBySideStrategy:
    kind = resolve("strategy", name)
    found = kind(kind.Options(**OPTIONS.get(name, {})), num_sites=len(SITES))
    assert isinstance(found, SumStrategy | SideBySideStrategy)
    return found


def files_in(folder: Path) -> FrameFiles:
    return FrameFiles(Blobs(str(folder / "blobs"), folder / "cache"), folder / "scratch", "r")


@pytest.mark.parametrize(
    ("name", "mixed"), [*((name, True) for name in ROUNDS), ("fedavg", False), ("median", False), ("flexlora", False)]
)
def test_the_same_bits_as_in_memory(name: str, mixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds, in the second of which a site is missing; stretches and chunks of sizes that do not fit."""
    monkeypatch.setattr(side_by_side, "_ELEMENTS", 3000)
    theta, chunk_bytes = tensors(0, mixed=mixed), 2048
    in_memory = strategy_of(name)
    folder = RunFolder(tmp_path / "run", resume=False)
    memory = MemoryModel(in_memory, theta.clone(), folder, lambda theta, path: None)
    memory.first()
    files = files_in(tmp_path)
    initial = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), chunk_bytes))
    stored = StoredModel(strategy_of(name), files, initial.digest)
    stored.first()
    for number in (1, 2):
        memory.open()
        stored.open()
        for place, (site, weight) in enumerate(zip(SITES, WEIGHTS, strict=True)):
            if (number, site) == (2, "south"):
                continue
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
    again.restore(2, record)
    for slot, held in memory.state.slots.items():
        digest = again.base if slot in in_memory.broadcast_channels else again.slots
        frame = files.open(digest)
        read = torch.cat([frame.tensor(p).double() for p in frame.frame.plan.pieces if p.channel == slot])
        assert torch.equal(read, torch.cat([flat.double() for flat in held.flats.values()]))


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("name", ["fedadam", "median", "lora-fair"])
def test_what_goes_down_small_has_the_bits_of_memory(
    name: str, mixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sites hold, and what is late; a coordinator that takes over after each round; a site that adds what it is
    sent. Spans end within chunks."""
    monkeypatch.setattr("commonweight.codec.chain.spans.__defaults__", (700,))
    theta, chunk_bytes = tensors(0, mixed=mixed), 2048
    spec = DownSpec.model_validate({"shorten": {"name": "random-k", "keep": 0.5}, "round": "nf4", "pack": "huffman"})
    down, there = down_of(spec, theta.layout, 7), theta.clone()
    assert down is not None
    assert len(down.coder.spans) > 9
    folder = RunFolder(tmp_path / "run", resume=False)
    memory = MemoryModel(strategy_of(name), theta.clone(), folder, lambda theta, path: None, down=down)
    memory.first()
    files = files_in(tmp_path)
    base_plan = Plan(theta.layout, (Channel("theta"),), chunk_bytes)
    initial = files.write({"theta": theta}, base_plan)
    record = StoredModel(strategy_of(name), files, initial.digest, down=down).first()
    for number in (1, 2, 3):
        stored = StoredModel(strategy_of(name), files, initial.digest, down=down)
        stored.restore(number - 1, record)
        memory.open()
        stored.open()
        for place, (site, weight) in enumerate(zip(SITES[:3], WEIGHTS[:3], strict=True)):
            channels = {"delta": tensors(100 * number + place, mixed=mixed)}
            memory.fold(Update(site, number, channels, weight, 1, 1, 1))
            stored.fold(stored_update(tmp_path, site, weight, channels, chunk_bytes, number))
        sent_bytes = memory.close(number)["down"]["bytes"]
        record = stored.close(number)
        assert stored.digest() == memory.state.theta.digest()
        assert frames_of(record) <= set(files.digests())
        sent = files.open(record["down"]["frame"])
        assert sent.frame.plan.num_bytes == record["down"]["bytes"] == sent_bytes
        check_coded_frame(sent.frame, down.coder, ("theta",))
        layout = sent.frame.plan.layout
        whole = {dtype: sent.elements("coded", dtype, 0, numel) for dtype, numel in layout.numels.items()}
        parts = NamedTensors(layout, whole)
        body = parts["payloads"].numpy().tobytes()
        lengths, choices = parts["lengths"].tolist(), parts["choices"].tolist()
        payloads = Payloads(down.coder, ("theta",), lengths, choices, len(body), lambda a, b, body=body: body[a:b])
        add_to(there, down.coder, payloads)
        assert frame_of({"theta": there}, base_plan).digest == record["base"]


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


def folded(tmp_path: Path, name: str, theta: NamedTensors, chunk_bytes: int) -> StoredModel:
    """A model to which every site has sent an update."""
    files = files_in(tmp_path)
    initial = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), chunk_bytes))
    model = StoredModel(strategy_of(name), files, initial.digest)
    model.first()
    model.open()
    for place, (site, weight) in enumerate(zip(SITES, WEIGHTS, strict=True)):
        update = {"delta": tensors(10 * place, mixed=len(theta.flats) > 1)}
        model.fold(stored_update(tmp_path, site, weight, update, chunk_bytes))
    return model


@pytest.mark.parametrize(("name", "passes"), [("fedavg", 1), ("multi-krum", 2), ("centered-clipping", 2), ("dnc", 2)])
def test_every_chunk_is_decrypted_once_a_pass(
    name: str, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "_ELEMENTS", 2000)  # smaller than a chunk, and no part of it
    read: Counter[tuple[str, int]] = Counter()
    read_into = SealedFile.read_into

    def counted(sealed: SealedFile, index: int, out: memoryview) -> int | None:
        read[sealed.path.name, index] += 1
        return read_into(sealed, index, out)

    model = folded(tmp_path, name, tensors(0, mixed=True), 4096)
    monkeypatch.setattr(SealedFile, "read_into", counted)
    model.close(1)
    floating = [p for p in model.base_plan.pieces if p.channel == "theta" and p.dtype.is_floating_point]
    assert len(floating) > 6
    assert read == {(f"{site}-1.sealed", piece.index): passes for site in SITES for piece in floating}


@pytest.mark.parametrize("name", ["multi-krum", "dnc", "flexlora"])
def test_the_number_of_threads_changes_no_bit(name: str, tmp_path: Path) -> None:
    digests, before = set(), torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            model = folded(tmp_path / str(threads), name, tensors(0, mixed=False), 4096)
            model.close(1)
            digests.add(model.digest())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["median", "flexlora"])
@pytest.mark.parametrize("tensor", ["e.weight", "x.lora_B.weight"])
def test_a_result_that_is_not_finite_is_named_and_leaves_no_file(name: str, tensor: str, tmp_path: Path) -> None:
    theta = tensors(0, mixed=False)
    theta[tensor][3, 2] = 3e38
    model = folded(tmp_path, name, theta, 4096)
    model.open()
    for site in SITES:
        update = NamedTensors.zeros(theta.layout)
        update[tensor][3, 2] = 3e38
        model.fold(stored_update(tmp_path, site, 1.0, {"delta": update}, 4096))
    before = model.record()
    with pytest.raises(RoundError, match=re.escape(tensor)):
        model.close(1)
    assert model.record() == before
    assert list((tmp_path / "scratch").iterdir()) == []


def test_tensors_that_a_strategy_cannot_work_on_are_refused_at_the_start(tmp_path: Path) -> None:
    theta = NamedTensors.of({"a.weight": torch.zeros(3, 5)})
    files = files_in(tmp_path)
    initial = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), 1024))
    with pytest.raises(RecipeError, match="flexlora combines LoRA pairs"):
        StoredModel(strategy_of("flexlora"), files, initial.digest).first()


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


@pytest.mark.parametrize("name", ["fedavg", "median", "flexlora"])
def test_a_damaged_update_is_named(name: str, tmp_path: Path) -> None:
    model = folded(tmp_path, name, tensors(0, mixed=False), 1024)
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

"""Updates that are too large for memory are made in files, and are the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commonweight.codec.coded import CODED, Packer
from commonweight.codec.feedback import Coder, coder_of
from commonweight.engines.bench import build_bench, without_data
from commonweight.engines.handshake import handshake
from commonweight.federation.messages import TrainTask
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.recipe.resolved import recipe_text
from commonweight.recipe.schema import CompressionSpec, Recipe
from commonweight.site import outbox
from commonweight.site.outbox import Outbox, Parcel
from commonweight.site.settings import SiteSettings
from commonweight.site.workshop import RecipeWorkshop
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import Channel, frame_of, plan_for

RUN = "run-1"


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "IN_MEMORY_BYTES", 0)


def tensors() -> NamedTensors:
    torch.manual_seed(0)
    return NamedTensors.of({"a": torch.randn(40, 25), "b": torch.randn(4608).to(torch.bfloat16)})


def parcel_of(**channels: NamedTensors) -> Parcel:
    (layout,) = {made.layout for made in channels.values()}
    frame = frame_of(channels, plan_for(layout, tuple(Channel(name) for name in channels), 1024))
    manifest = pb.Manifest(run=RUN, task="t", base="ab", site="north", frame=frame.header)
    return Parcel(manifest.SerializeToString(), frame, channels)


def found_again(kept: Outbox) -> dict[str, NamedTensors]:
    found = kept.find(RUN, "t", base="ab", site="north")
    assert found is not None
    return dict(found.tensors)


def names(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[2].lstrip("0123456789abcdef") for path in (folder / RUN).iterdir())


def test_a_desk_gives_zeros_in_a_file_until_it_is_cleared(tmp_path: Path) -> None:
    desk, layout = Outbox(tmp_path).desk(RUN, "t"), tensors().layout
    wide = desk("late-delta", layout, wide=True)
    assert wide.flats[torch.bfloat16].dtype == torch.float32
    assert not any(flat.any() for flat in wide.flats.values())
    wide["a"][0, 0] = 5.0
    assert not desk("late-delta", layout, wide=True)["a"].any()
    assert names(tmp_path) == ["-late-delta.draft"]
    desk.clear()
    assert names(tmp_path) == []
    assert wide["a"][0, 0] == 5.0


def test_what_is_small_lies_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = tensors().layout
    monkeypatch.setattr(outbox, "IN_MEMORY_BYTES", layout.num_bytes)
    desk = Outbox(tmp_path).desk(RUN, "t")
    desk("delta", layout)
    assert not (tmp_path / RUN).exists()
    desk("late-delta", layout, wide=True)
    assert names(tmp_path) == ["-late-delta.draft"]


def test_a_draft_becomes_the_entry_in_the_outbox_without_being_copied(tmp_path: Path) -> None:
    kept = Outbox(tmp_path)
    desk = kept.desk(RUN, "t")
    delta = desk("delta", tensors().layout).copy_(tensors())
    (draft,) = (tmp_path / RUN).iterdir()
    number = draft.stat().st_ino
    kept.keep(RUN, "t", parcel_of(delta=delta), desk)
    assert names(tmp_path) == [".bin", ".manifest"]
    assert next((tmp_path / RUN).glob("*.bin")).stat().st_ino == number
    assert found_again(kept)["delta"].digest() == delta.digest() == tensors().digest()
    desk.clear()
    assert names(tmp_path) == [".bin", ".manifest"]


@pytest.mark.parametrize("made", ["elsewhere", "with another channel", "in part"])
def test_what_was_not_made_on_the_desk_as_a_whole_is_written(tmp_path: Path, made: str) -> None:
    kept = Outbox(tmp_path)
    desk = kept.desk(RUN, "t")
    channels = {"delta": desk("delta", tensors().layout).copy_(tensors())}
    if made == "elsewhere":
        channels = {"delta": tensors()}
    elif made == "with another channel":
        channels["control"] = tensors()
    else:
        shorter = {"a": torch.empty(1, 25), "b": torch.empty(4608, dtype=torch.bfloat16)}
        layout = Layout.of(shorter)
        flats = {dtype: channels["delta"].flats[dtype][:numel] for dtype, numel in layout.numels.items()}
        channels = {"delta": NamedTensors(layout, flats)}
    kept.keep(RUN, "t", parcel_of(**channels), desk)
    found = found_again(kept)
    assert {name: one.digest() for name, one in found.items()} == {n: one.digest() for n, one in channels.items()}
    desk.clear()
    assert names(tmp_path) == [".bin", ".manifest"]


def test_payloads_are_packed_in_a_file_as_in_memory_and_the_file_is_cut_to_their_size(tmp_path: Path) -> None:
    coder = coder_of(CompressionSpec.model_validate({"round": "int8", "pack": "huffman"}), tensors().layout, 3)
    assert coder is not None
    kept = Outbox(tmp_path)
    desk = kept.desk(RUN, "t")
    made, expected = packed(coder, Packer(coder, desk)), packed(coder, Packer(coder))
    assert made.digest() == expected.digest()
    kept.keep(RUN, "t", parcel_of(**{CODED: made}), desk)
    assert found_again(kept)[CODED].digest() == expected.digest()
    (body,) = (tmp_path / RUN).glob("*.bin")
    assert body.stat().st_size - made.layout.num_bytes < 3 * 64


def packed(coder: Coder, packer: Packer) -> NamedTensors:
    for payload in coder.encode({"delta": tensors()}, {}, 9):
        packer.add(payload)
    return packer.packed(9)


@pytest.mark.parametrize("compression", ["none", {"round": "sign"}], ids=["plain", "sign"])
def test_a_workshop_makes_the_same_bits_in_files_as_in_memory(
    make_recipe: Callable[..., Recipe], small_data: Path, tmp_path: Path, compression: Any
) -> None:
    recipe = make_recipe(model={"adapter": {"kind": "full"}}, training={"steps": 1}, compression=compression)
    must_match = handshake(build_bench(recipe, gather=without_data))
    job = pb.Job(id=RUN, recipe=recipe_text(recipe), must_match=must_match)
    sent: dict[str, list[str]] = {"memory": [], "files": []}
    for where, digests in sent.items():
        folder = tmp_path / where
        workshop = workshop_of(folder, small_data)
        workshop.join(job)
        (bench,) = workshop._open.values()
        for number in (1, 2):
            before = f"{number - 1:04d}.safetensors" if number > 1 and bench.coder else None
            after = f"{number:04d}.safetensors" if bench.coder else None
            task = TrainTask(number, "clinic", 0.1, 1, {"kind": "none"}, before, after)
            desk = Outbox(folder / "runs").desk(RUN, f"t{number}")
            room = {"room": desk} if where == "files" else {}
            work = workshop.train(RUN, task, {"theta": bench.theta}, **room)
            assert bool(list((folder / "runs" / RUN).glob("*.draft"))) == (where == "files")
            digests += [made.digest() for made in work.channels.values()]
            digests += [(folder / "runs" / RUN / "state" / after).read_bytes().hex()] if after else []
            desk.clear()
    assert sent["files"] == sent["memory"]
    assert len(set(sent["files"])) == len(sent["files"])


def workshop_of(folder: Path, data: Path) -> RecipeWorkshop:
    own = {"path": str(data), "partition": "north"}
    values = {"name": "clinic", "address": "localhost:1", "data": own, "device": "cpu", "threads": 1}
    return RecipeWorkshop(SiteSettings.model_validate(values), folder)

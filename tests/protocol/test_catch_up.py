"""Global tensors made small on their way down: what a site asks for, what it is sent, what it will not start from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commonweight.codec.coded import CHOICES, CODED, LENGTHS, PAYLOADS, Packer, Payloads
from commonweight.codec.down import THETA, Down, add_to, down_of
from commonweight.identity.folder import IdentityFolder
from commonweight.model.tensors import NamedTensors
from commonweight.recipe.schema import DownSpec
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import parse_header
from commonweight.wire.refusals import Refusal
from commonweight.wire.service import CODE_KEY

from .fake_coordinator import Body, signed_job
from .federations import Coordinator, Hand, frame_for
from .federations import theta as five_chunks
from .test_agent import DONE, FAILED, Stage, short_waits, theta
from .test_agent import RECIPE as THREE_ROUNDS

import grpc  # isort: skip

__all__ = ["short_waits"]

RECIPE = THREE_ROUNDS.replace("rounds: 3", "rounds: 9")
CODEC: dict[str, Any] = {"round": {"name": "uniform", "bits": 2, "rounding": "nearest"}, "pack": "huffman"}
VERSIONS = 6


def down_for(tensors: NamedTensors, seed: int = 0) -> Down:
    found = down_of(DownSpec.model_validate(CODEC), tensors.layout, seed)
    assert found is not None
    return found


class Journey(Stage):
    """A run whose global tensors have moved on: version r is what round r left, `sent[r]` what led to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        model = theta()[THETA]
        self.site.bench.drawn = model
        self.down = down_for(model)
        self.models, self.bodies, self.sent = [model], [Body.of({THETA: model})], [Body.of({THETA: model})]
        late = NamedTensors.zeros(model.layout, wide=True)
        for round in range(1, VERSIONS + 1):
            after = theta(round)[THETA]
            packer = Packer(self.down.coder)
            for coded in self.down.follow(round, self.models[-1], after, late):
                packer.add(coded)
            self.models.append(after)
            self.bodies.append(Body.of({THETA: after}))
            self.sent.append(Body.of({CODED: packer.packed(self.down.seed(round))}))
        for body in (*self.bodies, *self.sent):
            self.coordinator.add(body)
        self.job(RECIPE + f"compression: {json.dumps({'down': CODEC})}\n")

    def job(self, recipe: str) -> None:
        self.coordinator.jobs["run1"] = signed_job(self.lead, "run1", recipe, self.bodies[0].frame.header)

    def digest(self, version: int) -> str:
        return self.bodies[version].frame.digest

    def lead_from(self, held: int, to: int, frames: list[str] | None = None) -> list[str]:
        """Let the coordinator answer so: by default with the differences, in order."""
        way = [body.frame.digest for body in self.sent[held + 1 : to + 1]] if frames is None else frames
        self.coordinator.ways[self.digest(held), self.digest(to)] = way
        return way

    async def starts_from(self, version: int, kind: str = "train") -> list[str]:
        """Let the site train from a version, or be scored with it; returns the frames that it fetched for that."""
        before, id = len(self.coordinator.wanted), f"{kind}{version}"
        self.offer(id, kind, round=version + 1, base=self.digest(version))
        assert (await self.ended(id)).state == DONE
        if kind == "train":
            assert self.site.bench.base[THETA].digest() == self.models[version].digest()
        return self.coordinator.wanted[before:]

    async def again(self, visits: int) -> None:
        """A new process at the site."""
        await self.site.stop()
        self.site.start()
        await self.attended(visits)


def play(folder: Path, scene: Callable[[Journey], Awaitable[None]]) -> None:
    async def whole() -> None:
        journey = Journey(folder)
        await journey.coordinator.start()
        journey.site.start()
        await journey.attended()
        try:
            await scene(journey)
        finally:
            await journey.site.stop()
            await journey.coordinator.stop()

    asyncio.run(whole())


def test_a_site_fetches_what_it_has_missed(tmp_path: Path) -> None:
    """Of the initial tensors nothing, then one round's difference, none for what it holds, and those of five rounds."""

    async def scene(journey: Journey) -> None:
        assert await journey.starts_from(0) == []
        assert journey.coordinator.asked == []
        one = journey.lead_from(0, 1)
        assert await journey.starts_from(1, "evaluate") == one
        assert await journey.starts_from(1) == []
        five = journey.lead_from(1, 6)
        assert len(five) == 5
        journey.coordinator.lost = 2
        assert await journey.starts_from(6) == five
        assert [upload.manifest.base for upload in journey.coordinator.uploads.values()] == [
            journey.digest(version) for version in (0, 1, 6)
        ]
        assert journey.site.bench.calls.count("initial") == 1

    play(tmp_path, scene)


def test_who_joins_late_begins_with_what_it_draws_itself(tmp_path: Path) -> None:
    async def scene(journey: Journey) -> None:
        way = journey.lead_from(0, 4)
        assert await journey.starts_from(4) == way

    play(tmp_path, scene)


def test_the_whole_is_fetched_if_that_is_shorter(tmp_path: Path) -> None:
    async def scene(journey: Journey) -> None:
        assert await journey.starts_from(0) == []
        assert await journey.starts_from(5) == [journey.digest(5)]
        assert journey.coordinator.asked == [(journey.digest(0), journey.digest(5))]
        assert await journey.starts_from(6) == [journey.digest(6)]
        assert journey.coordinator.asked[-1] == (journey.digest(5), journey.digest(6)), "it holds what it fetched"

    play(tmp_path, scene)


def test_what_a_site_holds_outlives_its_process(tmp_path: Path) -> None:
    async def scene(journey: Journey) -> None:
        journey.lead_from(0, 2)
        await journey.starts_from(2)
        await journey.again(2)
        assert await journey.starts_from(3) == [journey.digest(3)], "no way is known"
        await journey.again(3)
        way = journey.lead_from(3, 5)
        assert await journey.starts_from(5) == way
        assert journey.coordinator.asked[1] == (journey.digest(2), journey.digest(3))
        assert journey.site.bench.calls.count("initial") == 1

    play(tmp_path, scene)


def test_what_was_damaged_at_a_site_is_not_built_on(tmp_path: Path) -> None:
    """Its digest tells: the site begins again with what it draws itself."""

    async def scene(journey: Journey) -> None:
        journey.lead_from(0, 2)
        await journey.starts_from(2)
        await journey.site.stop()
        file = journey.site.folder / "runs" / "run1" / f"base-{journey.digest(2)}.bin"
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        journey.site.start()
        await journey.attended(2)
        way = journey.lead_from(0, 3)
        assert await journey.starts_from(3) == way

    play(tmp_path, scene)


def wrong_digest(journey: Journey) -> list[str]:
    return [journey.sent[1].frame.digest, journey.sent[3].frame.digest]  # the second round's is left out


def gone(journey: Journey) -> list[str]:
    return [journey.sent[1].frame.digest, "ab" * 32]


def no_names(journey: Journey) -> list[str]:
    return ["../../state.sqlite"]


def of_another_shape(journey: Journey) -> list[str]:
    return [journey.digest(1)]


def no_payload(journey: Journey) -> list[str]:
    sent = journey.sent[1]
    pieces, layout = sent.frame.plan.pieces, sent.frame.plan.layout
    flats = {
        piece.dtype: torch.frombuffer(bytearray(chunk), dtype=piece.dtype)
        for piece, chunk in zip(pieces, sent.chunks, strict=True)
        if piece.dtype != torch.uint8
    }
    flats[torch.uint8] = torch.full((layout.numels[torch.uint8],), 255, dtype=torch.uint8)
    return [journey.coordinator.add(Body.of({CODED: NamedTensors(layout, flats)}))]


def too_long(journey: Journey) -> list[str]:
    return [journey.sent[1].frame.digest] * 20


@pytest.mark.parametrize("way", [wrong_digest, gone, no_names, of_another_shape, no_payload, too_long])
def test_what_does_not_lead_to_the_task_s_tensors_is_not_used(
    tmp_path: Path, way: Callable[[Journey], list[str]]
) -> None:
    async def scene(journey: Journey) -> None:
        journey.lead_from(0, 3, way(journey))
        assert (await journey.starts_from(3))[-1] == journey.digest(3)
        assert [fields["frame"] for fields in journey.site.events("catch_up.left")] == (
            [journey.digest(3)[:12]] if way is not no_names else []
        )
        way_on = journey.lead_from(3, 4)
        assert await journey.starts_from(4) == way_on

    play(tmp_path, scene)


def test_a_site_that_draws_other_tensors_fetches_them(tmp_path: Path) -> None:
    async def scene(journey: Journey) -> None:
        journey.site.bench.drawn = theta(9)[THETA]
        assert await journey.starts_from(0) == [journey.digest(0)]
        assert journey.site.events("initial.differs")
        way = journey.lead_from(0, 2)
        assert await journey.starts_from(2) == way

    play(tmp_path, scene)


@pytest.mark.parametrize("where", ["{down: {round: 'os:system'}}", "{round: 'os:system'}"])
def test_a_job_does_not_make_a_site_load_code(tmp_path: Path, where: str) -> None:
    async def scene(journey: Journey) -> None:
        journey.job(RECIPE + f"compression: {where}\n")
        journey.offer("t", base=journey.digest(0))
        reply = await journey.ended("t")
        assert reply.state == FAILED
        assert "'os:system' is not commonweight's own" in reply.reason

    play(tmp_path, scene)


# --- a coordinator


def read(coordinator: Hand, run: str, digest: str) -> NamedTensors:
    header, *chunks = coordinator.call("Transfer/Fetch", pb.FetchRequest(run=run, frame=digest))
    plan = parse_header(header).plan
    flats: dict[torch.dtype, list[torch.Tensor]] = {}
    for piece, chunk in zip(plan.pieces, chunks, strict=True):
        flats.setdefault(piece.dtype, []).append(torch.frombuffer(bytearray(chunk), dtype=piece.dtype))
    return NamedTensors(plan.layout, {dtype: torch.cat(parts) for dtype, parts in flats.items()})


def added(model: NamedTensors, sent: NamedTensors) -> NamedTensors:
    down, body, after = down_for(model), sent[PAYLOADS].numpy().tobytes(), model.clone()
    numbers = sent[LENGTHS].tolist(), sent[CHOICES].tolist()
    add_to(after, down.coder, Payloads(down.coder, (THETA,), *numbers, len(body), lambda start, stop: body[start:stop]))
    return after


def four_rounds(coordinator: Coordinator, lead: Hand, codec: dict[str, Any]) -> tuple[str, list[str]]:
    """A run of one site; it, and the bases of its versions."""
    site = coordinator.site(f"walker-{len(codec)}")
    run = lead.submit(lead.job(rounds=4, sites=[site.name], compression={"down": codec}))
    lead.wait(run)
    return run, [*(site.task(round=round, run=run).base for round in range(1, 5)), lead.run(run)["base"]]


def test_a_coordinator_s_differences_lead_to_its_tensors(coordinator: Coordinator, lead: Hand) -> None:
    run, bases = four_rounds(coordinator, lead, CODEC)
    site = coordinator.guest("follower")
    denial = site.denied("Federation/CatchUp", pb.CatchUpRequest(run=run, held=bases[0], wanted=bases[4]))
    assert denial.code is grpc.StatusCode.PERMISSION_DENIED, "the job does not name it"
    frames = coordinator.here.catch_ups.frames(run, bases[0], bases[4], five_chunks().layout.num_bytes)
    assert len(frames) == 4
    model = five_chunks()
    assert frame_for(model).digest == bases[0]
    for base, frame in zip(bases[1:], frames, strict=True):
        model = added(model, read(lead, run, frame))
        assert frame_for(model).digest == base
    assert model.digest() == read(lead, run, bases[4]).digest()


def test_a_coordinator_names_the_shortest_way(coordinator: Coordinator, lead: Hand) -> None:
    """Of four differences three are fewer bytes than the tensors; the first is not kept. It all outlives a process."""
    run, bases = four_rounds(coordinator, lead, {"round": "int8"})
    site = coordinator.hold(IdentityFolder.open(coordinator.folder / "people" / "site-walker-1"))

    def way(held: str, wanted: str) -> list[str]:
        return list(site.call("Federation/CatchUp", pb.CatchUpRequest(run=run, held=held, wanted=wanted)).frames)

    ways = [way(held, bases[4]) for held in bases]
    assert [len(frames) for frames in ways] == [0, 3, 2, 1, 0]
    assert ways[2:4] == [ways[1][1:], ways[1][2:]]
    assert way(bases[4], bases[1]) == [], "there is no way back"
    assert way(bases[1], "ab" * 32) == way("ab" * 32, bases[4]) == []
    assert way(bases[2], bases[3]) == ways[1][1:2]
    kept = set(coordinator.here.files(run).digests())
    assert set(ways[1]) < kept
    assert len(kept) == 3 + 3, "the initial tensors, the last ones and what is late of them"
    coordinator.restart()
    assert [way(held, bases[4]) for held in bases] == ways
    denial = site.denied("Federation/CatchUp", pb.CatchUpRequest(run=run, held="x", wanted=bases[4]))
    assert denial.metadata[CODE_KEY] == Refusal.MALFORMED
    denial = lead.denied("Federation/CatchUp", pb.CatchUpRequest(run=run, held=bases[0], wanted=bases[4]))
    assert denial.code is grpc.StatusCode.PERMISSION_DENIED

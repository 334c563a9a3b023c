"""One site sends everything that it should not: in whatever order, as often as it likes, torn, and after the fact."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from commonweight.identity.folder import IdentityFolder
from commonweight.model.tensors import NamedTensors
from commonweight.wire import protocol_pb2 as pb
from tests.protocol.federations import Site, chunks_of, frame_for

from .world import CHUNK_BYTES, World, noise_update

import grpc  # isort: skip

_ROUNDS = 5


class Wayward(Site):
    """A site that trains as the others do, and then does what a test tells it to."""

    def __init__(self, world: World, name: str) -> None:
        world.enrol_sites([name])
        identity = IdentityFolder.open(world.folder / "sites" / name / "identity")
        super().__init__(identity, {"train": lambda site, task: None})
        self.world = world

    def noise(self, round: int) -> NamedTensors:
        return noise_update(self.world.theta, self.name, round).channels["delta"]

    def signed(self, task: pb.Task, tensors: NamedTensors, **changes: object) -> pb.SignedManifest:
        header = frame_for(tensors, "delta", CHUNK_BYTES).header
        return self.manifest(task, tensors, **{"frame": header, "num_examples": 10 + len(self.name), **changes})

    def chunks(self, tensors: NamedTensors) -> list[bytes]:
        return chunks_of(tensors, frame_for(tensors, "delta", CHUNK_BYTES))


def damaged(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


def refused(status: pb.UploadStatus, code: str) -> None:
    assert (pb.UploadStatus.State.Name(status.state), status.code) == ("REFUSED", code), status


def missing(status: pb.UploadStatus, expected: Sequence[int]) -> None:
    assert status.state == pb.UploadStatus.OPEN
    assert list(status.missing) == list(expected)


def test_a_wayward_site(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.begin()
    honest = world.site_names(2)
    for site in honest:
        world.begin_site(site)
    wayward = Wayward(world, "site-900").attend()
    sites = [*honest, wayward.name]
    run = world.start_run(sites, rounds=_ROUNDS, patience_s=2.0)
    accepted = pb.UploadStatus.ACCEPTED

    # round 1: damaged, cut short, reordered and doubled, with the coordinator killed in between
    task = wayward.task(round=1)
    first = signed = wayward.signed(task, wayward.noise(1))
    chunks = wayward.chunks(wayward.noise(1))
    count = len(chunks)
    status = wayward.open(signed)
    missing(status, range(count))
    missing(wayward.push(status.upload, [chunks[0], damaged(chunks[1]), chunks[2]]), range(1, count))
    missing(wayward.push(status.upload, [chunks[2], chunks[2], chunks[2][:-3]]), [1, *range(3, count)])
    missing(wayward.push(status.upload, []), [1, *range(3, count)])
    world.main.kill()
    world.main.wait()
    world.begin()
    wayward.close()
    wayward = Wayward(world, wayward.name).attend()
    status = wayward.open(signed)
    missing(status, [1, *range(3, count)])
    shuffled = random.Random(0).sample(chunks + chunks, 2 * count)
    assert wayward.push(status.upload, shuffled).state == accepted
    assert wayward.open(signed).state == accepted
    assert wayward.push(status.upload, chunks).state == accepted
    refused(wayward.open(wayward.signed(task, wayward.noise(2))), "replayed")
    refused(wayward.open(wayward.signed(task, wayward.noise(1), num_examples=10**6)), "replayed")

    # round 2: last round's update again, and this round's from last round's model
    task = wayward.task(round=2)
    assert wayward.open(first).state == accepted  # that of round 1: it was, and nothing changes
    old = wayward.task(round=1)
    refused(wayward.open(wayward.signed(old, wayward.noise(2), round=2)), "wrong-task")
    refused(wayward.open(wayward.signed(task, wayward.noise(2), site=honest[0])), "wrong-site")
    refused(wayward.open(wayward.signed(task, wayward.noise(2), base=old.base)), "wrong-base")
    again = wayward.task(round=2)
    while again.id == task.id:  # the first attempt has failed by that
        again = wayward.task(round=2)
    status = wayward.open(wayward.signed(again, wayward.noise(2)))
    assert wayward.push(status.upload, wayward.chunks(wayward.noise(2))[::-1]).state == accepted

    # round 3: numbers that are none
    task, poison = wayward.task(round=3), wayward.noise(3).clone()
    next(iter(poison.flats.values()))[-1] = torch.nan
    status = wayward.open(wayward.signed(task, poison))
    refused(wayward.push(status.upload, wayward.chunks(poison)), "non-finite")
    refused(wayward.open(wayward.signed(task, poison)), "non-finite")
    assert wayward.open(wayward.signed(task, wayward.noise(3))).state == pb.UploadStatus.REFUSED

    # round 4: two updates, each offered and pushed by several at once
    task = wayward.task(round=4)
    other = wayward.noise(4).clone()
    next(iter(other.flats.values()))[0] += 1
    with ThreadPoolExecutor(8) as crowd:
        results = list(crowd.map(lambda k: offer(wayward, task, wayward.noise(4) if k % 2 else other), range(8)))
    assert {result.state for result in results} <= {accepted, pb.UploadStatus.REFUSED}
    assert len({result.upload for result in results if result.state == accepted}) == 1
    world.event(run, "round_committed", round=4)

    # round 5: it goes away, and comes when the round is over
    task = wayward.task(round=5)
    wayward.stay.leave()
    world.event(run, "round_committed", round=5)
    late = wayward.open(wayward.signed(task, wayward.noise(5)))
    assert late.code in ("round-closed", "run-ended"), late
    assert wayward.open(first).state == accepted

    world.finish(run)
    wayward.close()
    took = {n: r["answered"] for n, r in world.store.commits(run).items() if n}
    assert [wayward.name in took[n] for n in range(1, _ROUNDS + 1)] == [True, True, False, True, False]
    was_other = any(result.state == accepted and k % 2 == 0 for k, result in enumerate(results))
    world.check(run, rounds=_ROUNDS, instead={(4, wayward.name): other} if was_other else {})


def offer(site: Wayward, task: pb.Task, tensors: NamedTensors) -> pb.UploadStatus:
    """Offer an update, and push it until it is decided."""
    signed = site.signed(task, tensors)
    for _ in range(50):
        try:
            status = site.open(signed)
            if status.state == pb.UploadStatus.OPEN:
                status = site.push(status.upload, site.chunks(tensors))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            continue  # another push has ended it, or too many go on at once
        if status.state in (pb.UploadStatus.ACCEPTED, pb.UploadStatus.REFUSED):
            return status
    raise AssertionError(status)

"""Updates that a codec made small, at a coordinator: what is accepted, what is refused at the door, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from commonweight.codec.chain import codec_of
from commonweight.codec.coded import CHOICES, CODED, LENGTHS, PAYLOADS, Packer, Payloads, check_layout
from commonweight.codec.feedback import Coder
from commonweight.codec.stage import BadPayload
from commonweight.model.tensors import NamedTensors
from commonweight.recipe.schema import CompressionSpec, Method
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.refusals import Refusal

from .federations import Coordinator, Hand, Site, chunks_of, frame_for, theta

ACCEPTED, REFUSED = pb.UploadStatus.ACCEPTED, pb.UploadStatus.REFUSED
CODEC = {"shorten": {"name": "top-k", "keep": 0.2}, "round": {"name": "uniform", "bits": 4}, "pack": "huffman"}
SPEC = CompressionSpec(
    shorten=Method(name="top-k", keep=0.2),  # type: ignore[call-arg]
    round=Method(name="uniform", bits=4),  # type: ignore[call-arg]
    pack=Method(name="huffman"),
)
Change = Callable[[dict[str, torch.Tensor]], None]


def coder() -> Coder:
    codec = codec_of(SPEC)
    assert codec is not None
    return Coder([codec], theta().layout, 0)


def small(change: Change = lambda tensors: None) -> tuple[NamedTensors, NamedTensors]:
    """An update as it is sent, and what it stands for."""
    update = theta(0.01)
    packer = Packer(coder())
    for payload in coder().encode({"delta": update}, {}, 5):
        packer.add(payload)
    sent = packer.packed(5)
    tensors = {name: tensor.clone() for name, tensor in sent.items()}
    change(tensors)
    return NamedTensors.of(tensors), update


def send(site: Site, task: pb.Task, tensors: NamedTensors, channel: str = CODED) -> pb.UploadStatus:
    frame = frame_for(tensors, channel)
    status = site.open(site.manifest(task, frame=frame.header))
    if status.state != pb.UploadStatus.OPEN:
        return status
    messages = chunks_of(tensors, frame)
    return site.push(status.upload, [messages[index] for index in status.missing])


def flip(tensors: dict[str, torch.Tensor]) -> None:
    tensors[PAYLOADS][5] ^= 255


def negative(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LENGTHS][0] = -1


def longer(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LENGTHS][0] += 1


def bad_seed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[CHOICES][0] = -1


def bad_codec(tensors: dict[str, torch.Tensor]) -> None:
    tensors[CHOICES][1] = 1


def more_spans(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LENGTHS] = torch.cat([tensors[LENGTHS], torch.zeros(1, dtype=torch.int32)])


def bomb(tensors: dict[str, torch.Tensor]) -> None:
    tensors[PAYLOADS] = torch.zeros(1 << 16, dtype=torch.uint8)


def no_choices(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[CHOICES]


def wide(tensors: dict[str, torch.Tensor]) -> None:
    tensors[PAYLOADS] = tensors[PAYLOADS].to(torch.int64)


REFUSED_CASES: list[tuple[str, Change, Refusal, str]] = [
    ("another payload", flip, Refusal.MALFORMED, ""),
    ("a negative length", negative, Refusal.MALFORMED, "lengths"),
    ("a length too long", longer, Refusal.MALFORMED, "lengths"),
    ("no seed that there is", bad_seed, Refusal.MALFORMED, "with a seed"),
    ("no codec that there is", bad_codec, Refusal.MALFORMED, "by a codec"),
    ("more spans", more_spans, Refusal.WRONG_SHAPE, "expected lengths, payloads, choices"),
    ("more bytes than can be", bomb, Refusal.WRONG_SHAPE, "its codec writes"),
    ("a part missing", no_choices, Refusal.WRONG_SHAPE, "expected lengths"),
    ("another dtype", wide, Refusal.WRONG_SHAPE, "expected lengths"),
]


def test_updates_are_folded_as_what_they_stand_for(coordinator: Coordinator, lead: Hand) -> None:
    sent, meant = small()

    def train(site: Site, task: pb.Task) -> None:
        assert send(site, task, sent).state == ACCEPTED

    names = [f"small-{k}-{len(coordinator.store.principals())}" for k in range(2)]
    for name in names:
        coordinator.site(name, train=train)
    run = lead.submit(lead.job(sites=names, compression=CODEC))
    ended = lead.wait(run)
    assert ended["history"][0]["bytes_up"] == 2 * frame_for(sent, CODED).plan.num_bytes
    state = coordinator.store.commits(run)[1]["state"]
    frame = coordinator.here.files(run).open(state["base"])
    (piece,) = [piece for piece in frame.frame.plan.pieces if piece.start == 0]
    expected = theta().flats[torch.float32] + meant.flats[torch.float32]
    torch.testing.assert_close(frame.tensor(piece), expected[: piece.numel], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("change", "code", "words"), [c[1:] for c in REFUSED_CASES], ids=[c[0] for c in REFUSED_CASES])
def test_what_no_codec_writes_is_refused_at_the_door(
    coordinator: Coordinator, lead: Hand, change: Change, code: Refusal, words: str
) -> None:
    found: list[pb.UploadStatus] = []

    def hostile(site: Site, task: pb.Task) -> None:
        found.append(send(site, task, small(change)[0]))
        site.reply(task, pb.TaskReply.FAILED, reason="it was refused")

    def honest(site: Site, task: pb.Task) -> None:
        send(site, task, small()[0])

    number = len(coordinator.store.principals())
    coordinator.site(f"bad-{number}", train=hostile)
    coordinator.site(f"good-{number}", train=honest)
    sites = [f"bad-{number}", f"good-{number}"]
    ended = lead.wait(lead.submit(lead.job(sites=sites, compression=CODEC, retries=0, min_sites=1)))
    assert ended["history"][0]["answered"] == [f"good-{number}"]
    assert (found[0].state, found[0].code) == (REFUSED, code)
    assert words in found[0].reason
    assert not list((coordinator.home / "scratch" / "uploads").glob(f"{found[0].upload or 'none'}*"))


@pytest.mark.parametrize(("compression", "coded"), [("none", True), (CODEC, False)])
def test_an_update_of_the_other_kind_is_refused(
    coordinator: Coordinator, lead: Hand, compression: Any, coded: bool
) -> None:
    found: list[pb.UploadStatus] = []

    def train(site: Site, task: pb.Task) -> None:
        found.append(send(site, task, small()[0]) if coded else send(site, task, theta(), "delta"))
        site.reply(task, pb.TaskReply.FAILED, reason="it was refused")

    name = f"other-{len(coordinator.store.principals())}"
    coordinator.site(name, train=train)
    lead.wait(lead.submit(lead.job(sites=[name], compression=compression, retries=0)), "failed")
    assert (found[0].state, found[0].code) == (REFUSED, Refusal.WRONG_SHAPE)


# --- by themselves


def payloads(tensors: NamedTensors) -> Payloads:
    body = tensors[PAYLOADS].numpy().tobytes()
    lengths, choices = tensors[LENGTHS].tolist(), tensors[CHOICES].tolist()
    return Payloads(coder(), ("delta",), lengths, choices, len(body), lambda start, stop: body[start:stop])


def test_any_stretch_can_be_read() -> None:
    sent, meant = small()
    check_layout(sent.layout, coder(), ["delta"])
    whole = meant.flats[torch.float32]
    for start, stop in ((0, len(whole)), (7, 8), (1000, 1060), (5, 5)):
        assert torch.equal(payloads(sent).read("delta", torch.float32, start, stop), whole[start:stop])
    payloads(sent).check()


@pytest.mark.parametrize("change", [negative, longer, more_spans])
def test_lengths_that_cannot_be(change: Change) -> None:
    with pytest.raises(BadPayload, match="lengths"):
        payloads(small(change)[0])

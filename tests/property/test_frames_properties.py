"""What must hold of frames whatever the tensors: one header for one content, and every element in exactly one chunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commonweight.model.tensors import Layout, NamedTensors, bytes_of
from commonweight.wire.frames import (
    DTYPES,
    Channel,
    Digests,
    Frame,
    Limits,
    Plan,
    chunk_digest,
    frame_of,
    pack_chunk,
    parse_header,
    piece_of,
    plan_for,
    unpack_chunk,
)
from commonweight.wire.manifest import check_chunk, check_frame, first_bad
from commonweight.wire.refusals import Refusal, Refused

#: chunks small enough that a few hundred elements need many
LIMITS = Limits(min_chunk_bytes=8)

names = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=12)
shapes = st.lists(st.sampled_from((0, 1, 2, 3, 7, 17)), max_size=3).map(tuple)
tensors = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6)
layouts = tensors.map(
    lambda rows: Layout.of({name: torch.empty(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in rows.items()})
)
channels = st.lists(st.tuples(names, st.booleans()), min_size=1, max_size=3, unique_by=lambda row: row[0]).map(
    lambda rows: tuple(Channel(name, wide) for name, wide in rows)
)
chunk_sizes = st.sampled_from((8, 16, 24, 64, 1024))
plans = st.builds(plan_for, layouts, channels, chunk_sizes)
seeds = st.integers(0, 2**31)

quick = settings(max_examples=100, deadline=None)


def filled(plan: Plan, seed: int) -> dict[str, NamedTensors]:
    """Any finite values, and any bits at all in whole numbers."""
    draw = torch.Generator().manual_seed(seed)
    made = {channel.name: NamedTensors.zeros(plan.layout, wide=channel.wide) for channel in plan.channels}
    for held in made.values():
        for flat in held.flats.values():
            values = torch.randint(-(2**62), 2**62, flat.shape, generator=draw)
            flat.copy_(torch.randn(flat.shape, generator=draw) if flat.is_floating_point() else values)
    return made


@quick
@given(plans, seeds)
def test_a_header_is_read_as_it_was_written(plan: Plan, seed: int) -> None:
    frame = frame_of(filled(plan, seed), plan)
    again = parse_header(frame.header, LIMITS)
    assert again == frame
    assert again.plan.layout == plan.layout
    assert (again.header, again.digest) == (frame.header, frame.digest)
    assert Frame(plan, tuple(frame.digests)) == frame


@quick
@given(plans)
def test_every_element_lies_in_exactly_one_chunk(plan: Plan) -> None:
    seen = {(c.name, dtype): [] for c in plan.channels for dtype in plan.layout.numels}  # type: ignore[var-annotated]
    for index, piece in enumerate(plan.pieces):
        assert piece.index == index
        assert 0 < piece.num_bytes <= plan.chunk_bytes
        seen[piece.channel, piece.dtype].extend(range(piece.start, piece.start + piece.numel))
    for (_, dtype), elements in seen.items():
        assert elements == list(range(plan.layout.numels[dtype]))


@quick
@given(plans)
def test_chunks_are_the_same_however_they_are_asked_for(plan: Plan) -> None:
    pieces = list(plan.pieces)
    assert len(pieces) == len(plan.pieces) == plan.num_chunks
    assert [plan.pieces[index] for index in range(len(pieces))] == pieces
    assert [plan.pieces[index - len(pieces)] for index in range(len(pieces))] == pieces
    assert plan.pieces[1::2] == pieces[1::2]
    assert plan.num_bytes == sum(piece.num_bytes for piece in pieces)
    for index in (len(pieces), -len(pieces) - 1):
        with pytest.raises(IndexError):
            plan.pieces[index]


@quick
@given(plans, seeds, st.randoms(use_true_random=False))
def test_a_body_put_together_from_chunks_is_bit_equal(plan: Plan, seed: int, random: object) -> None:
    sent = filled(plan, seed)
    frame = frame_of(sent, plan)
    received = {c.name: NamedTensors.zeros(plan.layout, wide=c.wide) for c in plan.channels}
    messages = [pack_chunk(piece.index, piece_of(sent, piece)) for piece in plan.pieces]
    random.shuffle(messages)  # type: ignore[attr-defined]
    for message in messages:
        index, chunk = unpack_chunk(message)
        piece = check_chunk(frame, index, chunk)
        piece_of(received, piece)[:] = chunk
    for name, held in sent.items():
        for dtype, flat in held.flats.items():
            assert bytes_of(flat) == bytes_of(received[name].flats[dtype])


@quick
@given(plans.filter(lambda plan: plan.num_chunks > 0), seeds, st.data())
def test_any_change_of_a_byte_changes_the_frames_name(plan: Plan, seed: int, data: st.DataObject) -> None:
    sent = filled(plan, seed)
    frame = frame_of(sent, plan)
    index = data.draw(st.integers(0, plan.num_chunks - 1))
    chunk = piece_of(sent, plan.pieces[index])
    place = data.draw(st.integers(0, len(chunk) - 1))
    chunk[place] ^= 1 << data.draw(st.integers(0, 7))
    assert frame_of(sent, plan).digest != frame.digest
    for wrong in (chunk, chunk[:-1], bytes(chunk) + b"\0"):
        with pytest.raises(Refused) as caught:
            check_chunk(frame, index, wrong)
        assert (caught.value.code, caught.value.retry) == (Refusal.CORRUPT_CHUNK, True)
    with pytest.raises(Refused):
        check_chunk(frame, plan.num_chunks, chunk)


@quick
@given(plans, plans)
def test_plans_that_differ_have_other_headers(one: Plan, other: Plan) -> None:
    """Sizes, order of channels, width, names, shapes: nothing of a plan is left out of the header."""
    headers = {Frame(plan, Digests(bytes(32 * plan.num_chunks))).header for plan in (one, other)}
    assert len(headers) == (1 if one == other else 2)


@quick
@given(layouts, st.data())
def test_an_update_must_have_the_runs_tensors(layout: Layout, data: st.DataObject) -> None:
    plan = plan_for(layout, (Channel("delta"), Channel("control")), 64)
    frame = Frame(plan, Digests(bytes(32 * plan.num_chunks)))
    check_frame(frame, layout, ("delta", "control"), chunk_bytes=64)
    wrong = data.draw(layouts.filter(lambda other: other != layout))
    for against, expected, chunk_bytes in (
        (wrong, ("delta", "control"), 64),
        (layout, ("delta",), 64),
        (layout, ("control", "delta"), 64),
        (layout, ("delta", "control"), 1024),
    ):
        with pytest.raises(Refused) as caught:
            check_frame(frame, against, expected, chunk_bytes=chunk_bytes)
        assert caught.value.code is Refusal.WRONG_SHAPE
    wide = replace(frame, plan=replace(plan, channels=(Channel("delta", wide=True), Channel("control"))))
    with pytest.raises(Refused, match="wide"):
        check_frame(wide, layout, ("delta", "control"))


@quick
@given(plans.filter(lambda plan: plan.num_chunks > 0), seeds, st.data())
def test_a_tensor_that_is_not_finite_is_named(plan: Plan, seed: int, data: st.DataObject) -> None:
    sent = filled(plan, seed)
    piece = plan.pieces[data.draw(st.integers(0, plan.num_chunks - 1))]
    assert first_bad(_unhashed(plan), piece.index, piece_of(sent, piece)) is None
    if piece.held.is_floating_point:
        place = piece.start + data.draw(st.integers(0, piece.numel - 1))
        value = data.draw(st.sampled_from((float("nan"), float("inf"), float("-inf"))))
        sent[piece.channel].flats[piece.dtype][place] = value
        chunk = bytes(piece_of(sent, piece))
        named = first_bad(_unhashed(plan), piece.index, memoryview(b"x" + chunk)[1:])
        assert named is not None
        assert not bool(sent[piece.channel][named].isfinite().all())


@given(st.lists(st.sampled_from((3.0e38, -3.0e38, 1.0)), min_size=2, max_size=40))
def test_a_sum_that_overflows_is_no_fault(values: list[float]) -> None:
    layout = Layout.of({"a": torch.empty(len(values), dtype=torch.float32)})
    plan = plan_for(layout, (Channel("delta"),), 1024)
    assert first_bad(_unhashed(plan), 0, bytes_of(torch.tensor(values))) is None


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=5))
def test_digests_are_a_sequence(digests: list[bytes]) -> None:
    held = Digests.of(digests)
    assert list(held) == digests
    assert held[:] == digests
    assert [held[index] for index in range(-len(digests), 0)] == digests
    assert held == Digests(b"".join(digests)) == Digests.of(held)
    assert hash(held) == hash(Digests(b"".join(digests)))
    for index in (len(digests), -len(digests) - 1):
        with pytest.raises(IndexError):
            held[index]
    assert all(chunk_digest(digest) not in held for digest in digests)


def _unhashed(plan: Plan) -> Frame:
    return Frame(plan, Digests(bytes(32 * plan.num_chunks)))

"""Codecs on numbers of every kind: bounds, means, what is damaged."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from commonweight.codec.chain import Codec, spans
from commonweight.codec.entropy import Huffman
from commonweight.codec.feedback import Coder, coder_of, draw_of
from commonweight.codec.low_rank import LowRank, LowRankOptions
from commonweight.codec.rounding import (
    NF4_LEVELS,
    BFloat16,
    Float16,
    Int8,
    NormalFloat4,
    NormalFloatOptions,
    Plain,
    Sign,
    SignOptions,
    Uniform,
    UniformOptions,
    pack,
    packed_bytes,
    unpack,
)
from commonweight.codec.sparse import KeepOptions, RandomK, TopK, drawn, from_gaps, gaps
from commonweight.codec.stage import BadPayload, Draw, Rounding, Shortening, Stage
from commonweight.errors import RecipeError, SiteError
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.recipe.schema import CompressionSpec

DRAW = Draw(7, 3)
ROUNDINGS: list[Rounding] = [
    Plain(),
    BFloat16(),
    Float16(),
    Int8(),
    *(Uniform(UniformOptions(bits=b, block=16)) for b in (2, 3, 4, 5, 6, 8)),
    Uniform(UniformOptions(bits=4, block=16, rounding="nearest")),
    NormalFloat4(NormalFloatOptions(block=16)),
    NormalFloat4(NormalFloatOptions(block=16, rounding="nearest")),
    Sign(SignOptions(block=16)),
]
SHORTENINGS: list[Callable[[], Shortening]] = [
    lambda: TopK(KeepOptions(keep=0.2)),
    lambda: RandomK(KeepOptions(keep=0.2)),
    lambda: LowRank(LowRankOptions(rank=2)),
]


def id_of(stage: Stage) -> str:
    return f"{stage.name}-{stage.options}"


# zero and every finite magnitude, denormals among them
any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = st.one_of(
    arrays(np.float32, st.integers(0, 70), elements=any_float),
    arrays(np.float32, st.integers(0, 70), elements=st.floats(-1, 1, width=32)),
    st.integers(0, 40).map(lambda n: np.zeros(n, dtype=np.float32)),
)


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=id_of)
@given(row=rows)
def test_a_rounding_stays_within_its_bound(rounding: Rounding, row: np.ndarray) -> None:
    values = torch.from_numpy(row.copy())
    raw = rounding.encode(values, DRAW)
    assert len(raw) == rounding.num_bytes(len(values))
    back = rounding.decode(raw, len(values))
    assert back.shape == values.shape
    assert back.dtype == torch.float32
    error = (back.double() - values.double()).abs()
    assert bool((error <= rounding.bound(values) * (1 + 1e-6) + 1e-44).all())
    assert bool((back[values == 0].abs() <= rounding.bound(values)[values == 0]).all())


@pytest.mark.parametrize("rounding", [r for r in ROUNDINGS if r.stochastic], ids=id_of)
def test_a_stochastic_rounding_is_right_in_the_mean(rounding: Rounding) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(1))
    draws = torch.stack([rounding.decode(rounding.encode(values, Draw(0, k)), 64) for k in range(4000)]).double()
    # a number that lies between two others is at most half their distance off in the root of the mean square
    standard_error = rounding.bound(values) / 2 / math.sqrt(len(draws))
    assert bool(((draws.mean(dim=0) - values).abs() <= 5 * standard_error).all())
    assert float(draws.std(dim=0).max()) > 0


def test_random_numbers_times_their_odds_are_right_in_the_mean() -> None:
    codec = Codec([RandomK(KeepOptions(keep=0.25))], unbiased=True)
    values = torch.arange(1.0, 41.0)
    draws = torch.stack(
        [codec.decode(codec.encode(values, [(40, 1)], Draw(0, k)), [(40, 1)], Draw(0, k)) for k in range(4000)]
    ).double()
    assert bool(((draws.mean(dim=0) - values).abs() <= 5 * draws.std(dim=0) / math.sqrt(len(draws))).all())


def test_levels_of_nf4_are_quantiles_of_the_normal_distribution() -> None:
    from scipy.stats import norm

    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, below, [0.0]]))
    np.testing.assert_allclose(levels / levels.max(), NF4_LEVELS, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@given(count=st.integers(0, 50), seed=st.integers(0, 99))
def test_bits_come_back(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    raw = pack(codes, bits)
    assert len(raw) == packed_bytes(count, bits)
    assert torch.equal(unpack(raw, count, bits), codes)


def test_uniform_by_hand() -> None:
    nearest = Uniform(UniformOptions(bits=4, block=8, rounding="nearest"))
    values = torch.tensor([7.0, -7.0, 3.2, -0.4, 0.6, 0.0, 1.0, 2.0])
    assert nearest.decode(nearest.encode(values, DRAW), 8).tolist() == [7, -7, 3, 0, 1, 0, 1, 2]


def test_sign_by_hand_and_its_last_block() -> None:
    sign = Sign(SignOptions(block=8))
    values = torch.tensor([1.0, -3.0, 2.0, -2.0, 1.0, -3.0, 2.0, -2.0, 4.0, -8.0])
    assert sign.decode(sign.encode(values, DRAW), 10).tolist() == [2, -2, 2, -2, 2, -2, 2, -2, 6, -6]


# --- fewer numbers


@given(row=rows.filter(len))
def test_the_largest_numbers_come_back(row: np.ndarray) -> None:
    values, shape = torch.from_numpy(row.copy()), [(len(row), 1)]
    codec = Codec([TopK(KeepOptions(keep=0.2))])
    back = codec.decode(codec.encode(values, shape, DRAW), shape, DRAW)
    kept = math.ceil(0.2 * len(row))
    lost = values[back != values].abs()
    assert int((back == values).sum()) >= kept
    assert float(lost.max() if len(lost) else 0) <= float(values.abs().sort(descending=True).values[kept - 1])


@given(places=st.sets(st.integers(0, 3000), max_size=60))
def test_places_come_back(places: set[int]) -> None:
    index = np.array(sorted(places), dtype=np.int64)
    assert from_gaps(gaps(index), len(index), 3001).tolist() == index.tolist()


def test_both_ends_draw_the_same_places_and_each_equally_often() -> None:
    assert drawn(3, 10, 5).tolist() == drawn(3, 10, 5).tolist()
    counts = np.zeros(10)
    for seed in range(3000):
        chosen = drawn(3, 10, seed)
        assert len(set(chosen.tolist())) == 3
        assert chosen.tolist() == sorted(chosen.tolist())
        counts[chosen] += 1
    assert np.abs(counts / 3000 - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / 3000)


def test_a_product_of_its_rank_comes_back_and_small_tensors_go_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    vector = torch.randn(5, generator=generator)
    values, shapes = torch.cat([matrix.reshape(-1), vector]), [(20, 30), (5, 1)]
    codec = Codec([LowRank(LowRankOptions(rank=2))])
    payload = codec.encode(values, shapes, DRAW)
    assert len(payload) == 4 + 4 * (2 * 50 + 5)
    torch.testing.assert_close(codec.decode(payload, shapes, DRAW), values, rtol=1e-4, atol=1e-5)


def test_low_rank_is_nearly_the_best_of_its_rank() -> None:
    matrix = torch.randn(30, 40, generator=torch.Generator().manual_seed(2))
    codec = Codec([LowRank(LowRankOptions(rank=3, iterations=8))])
    back = codec.decode(codec.encode(matrix.reshape(-1), [(30, 40)], DRAW), [(30, 40)], DRAW).view(30, 40)
    singular = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert float((back - matrix).norm()) <= 1.05 * math.sqrt((singular[3:] ** 2).sum())


# --- whole codecs


def chains() -> list[list[Stage]]:
    firsts: list[list[Stage]] = [[], *([make()] for make in SHORTENINGS)]
    return [
        [*first, *second, *third]
        for first in firsts
        for second in ([], [BFloat16()], [Uniform(UniformOptions(bits=4, block=16))], [Sign(SignOptions(block=16))])
        for third in ([], [Huffman()])
    ]


@pytest.mark.parametrize("stages", chains(), ids=lambda stages: "+".join(s.name for s in stages) or "none")
@given(row=rows, columns=st.integers(1, 7))
@settings(max_examples=15)
def test_payloads_are_no_longer_than_stated_and_give_finite_numbers(
    stages: list[Stage], row: np.ndarray, columns: int
) -> None:
    numel = len(row) // columns * columns
    values, shapes = torch.from_numpy(row[:numel].copy()), [(numel // columns, columns)]
    codec = Codec(stages)
    payload = codec.encode(values, shapes, DRAW)
    assert len(payload) <= codec.most(shapes)
    back = codec.decode(payload, shapes, DRAW)
    assert back.shape == values.shape
    assert bool(back.isfinite().all())
    assert codec.encode(values, shapes, DRAW) == payload


@pytest.mark.parametrize("stages", chains(), ids=lambda stages: "+".join(s.name for s in stages) or "none")
@given(data=st.data())
@settings(max_examples=25)
def test_a_damaged_payload_is_refused_or_gives_finite_numbers(stages: list[Stage], data: st.DataObject) -> None:
    values, shapes = torch.randn(60, generator=torch.Generator().manual_seed(3)), [(12, 5)]
    codec = Codec(stages)
    payload = bytearray(codec.encode(values, shapes, DRAW))
    match data.draw(st.sampled_from(["flip", "cut", "longer", "other"])):
        case "flip":
            payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            del payload[data.draw(st.integers(0, len(payload) - 1)) :]
        case "longer":
            payload += data.draw(st.binary(min_size=1, max_size=9))
        case _:
            payload = bytearray(data.draw(st.binary(max_size=80)))
    try:
        back = codec.decode(bytes(payload), shapes, DRAW)
    except BadPayload:
        return
    assert back.shape == values.shape
    assert bool(back.isfinite().all())


def test_a_bomb_is_refused_before_it_is_large() -> None:
    import tracemalloc
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    bomb = b"\1" + packer.compress(bytes(64 << 20)) + packer.flush()
    tracemalloc.start()
    with pytest.raises(BadPayload, match="longer than it may be"):
        Codec([Huffman()]).decode(bomb, [(100, 1)], DRAW)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "stages",
    [[Huffman(), BFloat16()], [BFloat16(), TopK()], [TopK(), RandomK()], [Sign(), Int8()], [Huffman(), Huffman()]],
    ids=lambda stages: "+".join(s.name for s in stages),
)
def test_stages_in_another_order_are_refused(stages: list[Stage]) -> None:
    with pytest.raises(RecipeError, match=f"{stages[1].name} cannot stand behind {stages[0].name}"):
        Codec(stages)


# --- spans and error feedback


def layout_of(**shapes: tuple[int, ...]) -> Layout:
    return Layout.of({name: torch.empty(shape) for name, shape in shapes.items()})


def test_spans_cover_every_element_once() -> None:
    layout = Layout.of(
        {
            "a": torch.empty(3, 4),
            "b": torch.empty(()),
            "c": torch.empty(0, 5),
            "d": torch.empty(10, 7),
            "e": torch.empty(2, 45),
            "f": torch.empty(9, dtype=torch.bfloat16),
            "g": torch.empty(6, dtype=torch.int64),
            "h": torch.empty(6),
        }
    )
    found = list(spans(layout, 20))
    assert {span.dtype for span in found} == {torch.float32, torch.bfloat16}
    for dtype in (torch.float32, torch.bfloat16):
        stop = 0
        for span in (span for span in found if span.dtype == dtype):
            assert span.start == stop
            assert span.numel == sum(r * c for r, c in span.matrices) <= 20
            stop += span.numel
        assert stop == layout.numels[dtype]
    assert ((2, 7),) in [span.matrices for span in found]


def filled(layout: Layout, seed: int, scale: float = 1.0) -> NamedTensors:
    made = NamedTensors.zeros(layout)
    for _, flat in made.floating():
        flat.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed)) * scale)
    return made


def total(tensors: NamedTensors) -> Tensor:
    return torch.cat([flat.double() for _, flat in tensors.floating()])


@pytest.mark.parametrize(
    "stages",
    [[TopK(KeepOptions(keep=0.1)), Uniform(UniformOptions(bits=4))], [Sign()], [LowRank()], [RandomK()], [BFloat16()]],
    ids=lambda stages: "+".join(s.name for s in stages),
)
def test_what_was_sent_and_what_is_late_is_all_there_was(stages: list[Stage]) -> None:
    layout = layout_of(a=(8, 30), b=(30, 8), c=(7,))
    coder, errors = Coder([Codec(stages)], layout, 0), {"delta": NamedTensors.zeros(layout, wide=True)}
    wanted, sent = torch.zeros(487, dtype=torch.float64), torch.zeros(487, dtype=torch.float64)
    for round in (1, 2, 3, 7, 8):
        update = filled(layout, round)
        wanted += total(update)
        for _ in coder.encode({"delta": update}, errors, seed=round):
            pass
        sent += total(update)
    torch.testing.assert_close(sent + total(errors["delta"]), wanted, rtol=0, atol=1e-5)


def test_what_is_late_stays_bounded() -> None:
    layout = layout_of(a=(40, 25))
    coder = Coder([Codec([TopK(KeepOptions(keep=0.1))])], layout, 0)
    errors = {"delta": NamedTensors.zeros(layout, wide=True)}
    norms = []
    for round in range(1, 120):
        update = filled(layout, round)
        for _ in coder.encode({"delta": update}, errors, seed=round):
            pass
        norms.append(float(total(errors["delta"]).norm()))
    bound = math.sqrt(1000) * 1.1 * 2 * math.sqrt(1 - 0.1) / 0.1  # ‖e‖ ≤ 2 √(1−δ)/δ · max ‖Δ‖, δ = keep
    assert max(norms) < bound
    assert max(norms[60:]) < 1.3 * max(norms[:60])


def test_payloads_give_what_the_site_believes_was_sent() -> None:
    layout = Layout.of({"a": torch.empty(9, 20), "b": torch.empty(30, dtype=torch.bfloat16)})
    codec = Codec([TopK(), Uniform(UniformOptions(bits=4)), Huffman()])
    coder, update = Coder([codec], layout, 5), filled(layout, 1)
    read = NamedTensors.zeros(layout)
    for number, coded in enumerate(coder.encode({"delta": update}, {}, seed=4)):
        span = coded.span
        values = codec.decode(coded.payload, span.matrices, draw_of(4, "delta", number % 2))
        read.flats[span.dtype][span.start : span.start + span.numel].copy_(values)
    assert torch.equal(total(read), total(update))


def test_an_update_that_is_not_finite_is_named() -> None:
    layout = layout_of(a=(3,), b=(2,))
    update = filled(layout, 0)
    update["b"][0] = math.inf
    with pytest.raises(SiteError, match="NaN or infinity in 'b'"):
        list(Coder([Codec([Int8()])], layout, 0).encode({"delta": update}, {}, seed=1))


# --- a budget


@pytest.mark.parametrize("budget", [200, 700, 3000, 20_000])
def test_a_budget_is_kept_and_no_codec_within_it_loses_less(budget: int) -> None:
    layout = layout_of(a=(60, 70), b=(50,))
    coder = coder_of(CompressionSpec(budget_mb=budget / 1e6), layout, 0)
    assert coder is not None
    update, seed = filled(layout, 3), coder.update_seed("north", 1)
    before = total(update)
    coded = list(coder.encode({"delta": update}, {}, seed))
    assert sum(len(one.payload) for one in coded) <= budget
    lost = float(((total(update) - before) ** 2).sum())
    for codec in coder.codecs:
        other, alone = filled(layout, 3), Coder([codec], layout, 0)
        payloads = list(alone.encode({"delta": other}, {}, seed))
        if sum(len(one.payload) for one in payloads) <= budget:
            assert lost <= float(((total(other) - before) ** 2).sum()) * (1 + 1e-9)


def test_a_budget_that_no_codec_keeps_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"budget_mb is 1e-05.*may take"):
        coder_of(CompressionSpec(budget_mb=1e-5), layout_of(a=(60, 70)), 0)


def test_factors_of_huge_and_tiny_matrices_do_not_overflow_whatever_rounds_them() -> None:
    for size in (1e-40, 1e-20, 1.0, 1.4e19, 3e38):
        values, shape = torch.full((42,), size), [(14, 3)]
        for stages in ([LowRank()], [LowRank(), Sign()], [LowRank(), Uniform(UniformOptions(bits=4))]):
            codec = Codec(stages)
            back = codec.decode(codec.encode(values, shape, DRAW), shape, DRAW)
            torch.testing.assert_close(back / size, values / size, rtol=0.5, atol=0.5)

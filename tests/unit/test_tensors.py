"""Named tensors over flat memory: nothing is lost, nothing overlaps, views are views."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor

from commonweight.model.tensors import Layout, NamedTensors, accumulator_dtype, first_non_finite

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def mixed() -> dict[str, Tensor]:
    return {
        "b.weight": torch.arange(15, dtype=torch.float32).view(5, 3),
        "a.weight": torch.arange(28, dtype=torch.float32).view(4, 7).to(torch.bfloat16),
        "scale": torch.tensor(2.5),
        "ids": torch.tensor([7, -1, 2**40]),
        "a.bias": torch.full((3,), -1.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
    }


def test_of_copies_values_dtypes_and_shapes_in_name_order() -> None:
    tensors = mixed()
    made = NamedTensors.of(tensors)
    assert list(made) == sorted(tensors)
    assert len(made) == len(tensors)
    for name, tensor in tensors.items():
        assert made[name].dtype == tensor.dtype
        assert made[name].shape == tensor.shape
        assert torch.equal(made[name], tensor)
    tensors["b.weight"].fill_(99)
    assert made["b.weight"].max() == 14


def test_of_takes_what_a_model_holds() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    made = NamedTensors.of({"p": parameter, "t": parameter.t()})
    assert not made["p"].requires_grad
    assert torch.equal(made["t"], parameter.detach().t())


def test_of_nothing() -> None:
    made = NamedTensors.of({})
    assert len(made) == 0
    assert dict(made) == {}
    assert made.layout == Layout(())
    assert made.layout.num_bytes == made.layout.arena_bytes == 0
    assert first_non_finite(made) is None
    assert made.digest() == made.clone().digest()
    assert len(NamedTensors.over(torch.empty(0, dtype=torch.uint8), made.layout)) == 0


def test_layout_counts_bytes() -> None:
    layout = NamedTensors.of(mixed()).layout
    assert layout.numels == {torch.bfloat16: 31, torch.float32: 16, torch.int64: 3}
    assert layout.num_bytes == 31 * 2 + 16 * 4 + 3 * 8
    assert layout.arena_bytes == 64 + 64 + 64


def test_layout_does_not_depend_on_insertion_order() -> None:
    tensors = mixed()
    assert Layout.of(tensors) == Layout.of(dict(reversed(tensors.items())))


def test_layout_survives_pickling() -> None:
    layout = Layout.of(mixed())
    digest = layout.digest
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout
    assert again.digest == digest


def test_round_trip_over_an_arena() -> None:
    original = NamedTensors.of(mixed())
    buffer = torch.zeros(original.layout.arena_bytes + 5, dtype=torch.uint8)
    NamedTensors.over(buffer, original.layout).copy_(original)
    read = NamedTensors.over(buffer.clone(), original.layout)
    assert read.digest() == original.digest()
    assert not buffer[original.layout.arena_bytes :].any()


def test_flats_in_an_arena_are_aligned_and_apart() -> None:
    layout = NamedTensors.of(mixed()).layout
    buffer = torch.zeros(layout.arena_bytes, dtype=torch.uint8)
    spans = []
    for flat in NamedTensors.over(buffer, layout).flats.values():
        start = flat.data_ptr() - buffer.data_ptr()
        assert start % 64 == 0
        spans.append((start, start + flat.numel() * flat.element_size()))
    spans.sort()
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= layout.arena_bytes


def test_views_write_through_both_ways() -> None:
    tensors = NamedTensors.of(mixed())
    tensors["scale"].fill_(-3)
    tensors["b.weight"][4, 2] = 77
    assert {-3.0, 77.0} <= set(tensors.flats[torch.float32].tolist())
    tensors.flats[torch.bfloat16].fill_(4)
    assert bool((tensors["a.weight"] == 4).all())
    assert bool((tensors["a.bias"] == 4).all())


def test_writing_one_tensor_changes_no_other() -> None:
    for name in mixed():
        before, after = NamedTensors.of(mixed()), NamedTensors.of(mixed())
        after[name].fill_(9)
        assert all(torch.equal(before[other], after[other]) for other in before if other != name)


def test_clone_is_apart_and_copy_overwrites() -> None:
    original = NamedTensors.of(mixed())
    twin = original.clone()
    twin["scale"].fill_(0)
    assert original["scale"] == 2.5
    assert original.digest() != twin.digest()
    assert twin.copy_(original) is twin
    assert original.digest() == twin.digest()


def test_layout_digest_is_sensitive_to_names_dtypes_and_shapes() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    variants = [
        {"a": torch.zeros(3, 2), "b": torch.zeros(4)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(4)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float16)},
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(4), "b": torch.zeros(2, 3)},
    ]
    layouts = [Layout.of(base), *(Layout.of(variant) for variant in variants)]
    assert len({layout.digest for layout in layouts}) == len(layouts)
    assert len(set(layouts)) == len(layouts)
    assert Layout.of({name: torch.ones_like(t) for name, t in base.items()}).digest == layouts[0].digest


def test_digest_is_sensitive_to_every_value_and_to_the_layout() -> None:
    original = NamedTensors.of(mixed())
    digests = {original.digest()}
    for flat_dtype in original.flats:
        for index in (0, -1):
            changed = original.clone()
            changed.flats[flat_dtype][index] += 1
            digests.add(changed.digest())
    digests.add(NamedTensors.of({"x": original["b.weight"]}).digest())
    digests.add(NamedTensors.of({"x": original["b.weight"].view(3, 5)}).digest())
    assert len(digests) == 1 + 2 * len(original.flats) + 2


def test_digest_sees_the_sign_of_zero() -> None:
    assert NamedTensors.of({"x": torch.tensor(0.0)}).digest() != NamedTensors.of({"x": torch.tensor(-0.0)}).digest()


def test_zeros_keep_dtypes_and_wide_zeros_are_at_least_float32() -> None:
    layout = Layout.of(mixed() | {"d": torch.zeros(2, dtype=torch.float64), "h": torch.zeros(2, dtype=torch.float16)})
    narrow, wide = NamedTensors.zeros(layout), NamedTensors.zeros(layout, wide=True)
    for name, entry in layout.by_name.items():
        assert narrow[name].dtype == entry.dtype
        assert wide[name].dtype == accumulator_dtype(entry.dtype)
        assert wide[name].shape == entry.shape
        assert not wide[name].any()
    assert wide["a.weight"].dtype == torch.float32
    assert wide["d"].dtype == torch.float64
    assert wide["ids"].dtype == torch.int64


def test_only_floating_flats_are_averaged() -> None:
    assert {dtype for dtype, _ in NamedTensors.of(mixed()).floating()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 3, 17, 129, 70_001])
def test_a_non_finite_value_is_found_wherever_it_is(dtype: torch.dtype, size: int, bad: float) -> None:
    tensors = NamedTensors.of({"a": torch.ones(5, dtype=dtype), "b": torch.ones(size, dtype=dtype), "i": torch.ones(3)})
    assert first_non_finite(tensors) is None
    for index in {0, size // 2, size - 1}:
        tensors["b"][index] = bad
        assert first_non_finite(tensors) == "b"
        tensors["b"][index] = 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_values_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    tensors = NamedTensors.of({"x": torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)})
    assert not math.isfinite(tensors["x"].sum().item())
    assert first_non_finite(tensors) is None
    tensors["x"][500] = math.nan
    assert first_non_finite(tensors) == "x"


def test_opposite_infinities_do_not_cancel() -> None:
    assert first_non_finite(NamedTensors.of({"x": torch.tensor([math.inf, 1.0, -math.inf])})) == "x"

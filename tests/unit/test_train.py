"""One site's local work: the gradient is the right one, every token weighs the same, the optimizer is torch's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD, AdamW

from commonweight.data.tokens import Tokens
from commonweight.engines.bench import build_bench
from commonweight.engines.hand import Hand, Memory
from commonweight.errors import RecipeError, SiteError
from commonweight.federation.messages import TrainTask
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.model.trainables import Trainables
from commonweight.recipe import Recipe
from commonweight.recipe.schema import TrainingSpec
from commonweight.registry import resolve
from commonweight.strategies.scaffold import Scaffold as ScaffoldServer
from commonweight.strategies.update import Update
from commonweight.train import batches, loss
from commonweight.train.corrections import Prox, Scaffold, correction
from commonweight.train.local import GradientObjective, LocalWork, Participant, clip, make_optimizer
from commonweight.train.loss import LanguageModel
from commonweight.train.schedule import lr_in_round
from commonweight.train.sft import SupervisedFineTuning
from tests.unit.tiny_models import CPU, VOCABULARY, examples, participant, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

UNEQUAL = examples((3, 9), (5, 1), (1, 4), (7, 2), (2, 12), (4, 3))
CASES = [
    *[(name, "lora") for name in ("llama", "untied", "conv1d", "head bias", "capped")],
    *[(name, "full") for name in ("llama", "untied", "conv1d", "head bias", "capped")],
    *[("llama", kind) for kind in ("dora", "ia3", "prompt", "prefix", "p-tuning")],
]


def collated(tokens: Tokens, rows: list[list[int]] | None = None) -> batches.Batch:
    return batches.collate(tokens, rows or [[i] for i in range(len(tokens))], CPU)


def padded(tokens: Tokens, indices: list[int] | None = None) -> dict[str, torch.Tensor]:
    """What transformers wants for the same examples."""
    chosen = range(len(tokens)) if indices is None else indices
    width = max(len(tokens.ids_of(i)) for i in chosen)
    ids, labels, mask = [], [], []
    for i in chosen:
        row, flags = tokens.ids_of(i).tolist(), tokens.labelled_of(i).tolist()
        rest = width - len(row)
        ids.append(row + [0] * rest)
        labels.append([t if flag else -100 for t, flag in zip(row, flags, strict=True)] + [-100] * rest)
        mask.append([1] * len(row) + [0] * rest)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def gradient(who: Participant) -> torch.Tensor:
    return torch.cat([flat.double() for flat in who.trainables.gradients.flats.values()]).clone()


def values(who: Participant) -> torch.Tensor:
    return torch.cat([flat.double() for flat in who.trainables.values.flats.values()]).clone()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance."""
    return float((one - other).norm() / other.norm())


def own_gradient(who: Participant, batch: batches.Batch) -> tuple[float, torch.Tensor]:
    """Mean nats and its gradient, by the code under test."""
    who.trainables.zero_gradients()
    nats = loss.backward(who.language_model, batch, 1 / batch.num_label_tokens)
    return nats / batch.num_label_tokens, gradient(who)


def work(who: Participant, tokens: Tokens = UNEQUAL, **options: Any) -> Any:
    """Local work in the settings given; those of `LocalWork` by name, all others go into the recipe's section."""
    task = {key: options.pop(key) for key in ("lr", "steps", "seed", "correction") if key in options}
    spec = TrainingSpec(**({"optimizer": "sgd", "clip_norm": None, "max_tokens": 32} | options))
    steps = batches.num_steps(spec, len(batches.sequences(tokens, spec, 0)))
    task = {"lr": 0.1, "steps": steps, "seed": 0} | task
    return SupervisedFineTuning().work(who, LocalWork(tokens, spec, **task))


# --- the loss and its gradient ---


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_loss_and_gradient_are_those_of_transformers(name: str, adapter: str) -> None:
    who = participant(name, kind=adapter, virtual_tokens=3)
    value, own = own_gradient(who, collated(UNEQUAL))
    who.trainables.zero_gradients()
    theirs = who.language_model.model(**padded(UNEQUAL), use_cache=False).loss
    theirs.backward()
    assert value == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert own.norm() > 0
    assert apart(own, gradient(who)) < 1e-6


@pytest.mark.parametrize("name", ["llama", "untied", "conv1d", "head bias", "capped", "blind"])
def test_the_output_layer_is_split_off_unless_something_follows_it(name: str) -> None:
    assert LanguageModel(tiny(name)).split_head == (name != "capped")


@pytest.mark.parametrize("cap", [0.5, 30.0, 100.0])
def test_a_cap_is_found_though_a_fresh_models_logits_are_far_below_it(cap: float) -> None:
    assert not LanguageModel(tiny("capped", final_logit_softcapping=cap)).split_head
    assert LanguageModel(tiny("capped", final_logit_softcapping=None)).split_head


@pytest.mark.parametrize("name", ["llama", "capped"])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_the_size_of_a_piece_does_not_matter(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    who, batch = participant(name, kind="full"), collated(UNEQUAL)
    value, whole = own_gradient(who, batch)
    monkeypatch.setattr(loss, "_PIECE_LOGITS", rows * VOCABULARY)
    pieced_value, pieced = own_gradient(who, batch)
    assert pieced_value == pytest.approx(value, rel=1e-12)
    assert apart(pieced, whole) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 4, "auto"])
def test_the_size_of_a_micro_batch_does_not_matter(size: int | str) -> None:
    whole, pieced = participant(), participant()
    first = work(whole, batch_size=6, micro_batch_size=6, steps=3)
    second = work(pieced, batch_size=6, micro_batch_size=size, steps=3)
    assert second.loss == pytest.approx(first.loss, rel=1e-9)
    assert apart(values(pieced), values(whole)) < 1e-9


def test_every_label_token_weighs_the_same_however_long_its_example() -> None:
    tokens = examples((4, 1), (3, 11))
    who = participant("conv1d")  # float64 throughout, where a Llama's norms are float32
    value, own = own_gradient(who, collated(tokens))
    sums, gradients = [], []
    for i in range(2):
        who.trainables.zero_gradients()
        whole = padded(tokens, [i])
        logits = who.language_model.model(input_ids=whole["input_ids"]).logits[0, :-1]
        nats = functional.cross_entropy(logits, whole["labels"][0, 1:], ignore_index=-100, reduction="sum")
        nats.backward()
        sums.append(float(nats.detach()))
        gradients.append(gradient(who))
    assert value == pytest.approx(sum(sums) / 12, rel=1e-9)
    assert apart(own, (gradients[0] + gradients[1]) / 12) < 1e-9
    assert apart(own, (gradients[0] / 1 + gradients[1] / 11) / 2) > 0.1


def test_a_step_divides_by_the_labels_of_the_whole_batch() -> None:
    who, other = participant(), participant()
    _, expected = own_gradient(other, collated(UNEQUAL))
    before = values(who)
    work(who, batch_size=6, micro_batch_size=1, lr=0.5)
    assert apart((before - values(who)) / 0.5, expected) < 1e-9


def test_logits_are_formed_at_labels_only_and_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    who, rows = participant(), []
    monkeypatch.setattr(loss, "_PIECE_LOGITS", 5 * VOCABULARY)

    def count(_: Any, __: Any, output: torch.Tensor) -> None:
        if output.shape[-1] == VOCABULARY:
            rows.append(output.numel() // VOCABULARY)

    who.language_model.head.register_forward_hook(count)
    own_gradient(who, collated(UNEQUAL))
    assert sum(rows) == UNEQUAL.num_label_tokens < UNEQUAL.lengths.sum()
    assert max(rows) == 5


def test_the_output_layer_is_as_it_was_afterwards() -> None:
    model = tiny()
    marked = model.lm_head.forward
    model.lm_head.forward = marked  # as accelerate's hooks do
    who = LanguageModel(model)
    with torch.no_grad():
        who.at_labels(collated(UNEQUAL))
    assert model.lm_head.__dict__["forward"] is marked
    plain = tiny()
    LanguageModel(plain).at_labels(collated(UNEQUAL))
    assert "forward" not in plain.lm_head.__dict__


def test_padding_changes_nothing() -> None:
    who = participant("conv1d")
    _, alone = own_gradient(who, collated(UNEQUAL, [[1]]))
    _, beside = own_gradient(who, collated(UNEQUAL.subset([1, 4])))
    _, other = own_gradient(who, collated(UNEQUAL, [[4]]))
    assert apart(beside * 13, alone * 1 + other * 12) < 1e-9


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_gradient_checkpointing_gives_the_same_gradient(adapter: str) -> None:
    plain, recomputing = participant(kind=adapter), participant(kind=adapter)
    layer_calls: list[int] = []
    model = recomputing.language_model.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inner = model.get_base_model() if adapter == "lora" else model
    inner.model.layers[0].mlp.register_forward_pre_hook(lambda *_: layer_calls.append(1))
    for who in (plain, recomputing):
        who.language_model.model.train()
    expected, found = own_gradient(plain, collated(UNEQUAL)), own_gradient(recomputing, collated(UNEQUAL))
    assert len(layer_calls) == 2
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert apart(found[1], expected[1]) < 1e-12


@pytest.mark.parametrize("name", ["llama", "capped"])
def test_bfloat16_arithmetic_trains_float32_values(name: str) -> None:
    who = participant(name, dtype=torch.float32)
    expected, exact = own_gradient(who, collated(UNEQUAL))
    who.language_model.autocast_dtype = torch.bfloat16
    found, rough = own_gradient(who, collated(UNEQUAL))
    assert set(who.trainables.values.flats) == {torch.float32}
    assert found == pytest.approx(expected, rel=0.02)
    assert 0 < apart(rough, exact) < 0.2


# --- packing ---


@pytest.mark.parametrize("name", ["llama", "conv1d", "capped", "head bias"])
def test_packed_examples_do_not_see_each_other(name: str) -> None:
    language_model = LanguageModel(tiny(name))
    tokens = examples((3, 9), (5, 1), (1, 4), (7, 2), (2, 12), (4, 3), (1, 1))
    rows = batches.sequences(tokens, TrainingSpec(packing=True, max_tokens=20), seed=3)
    assert len(rows) < len(tokens)
    losses = []
    for batch in (collated(tokens), collated(tokens, rows)):
        nats, _, which = loss.score(language_model, batch)
        losses.append(np.bincount(which.numpy(), nats.numpy(), minlength=len(tokens)))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert language_model.keeps_packed_apart()


def test_packing_is_refused_where_packed_examples_would_see_each_other(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from tests.unit.tiny_tokenizers import bpe

    model = tiny("blind", dtype=torch.float32, vocab_size=len(bpe()))
    assert not LanguageModel(model).keeps_packed_apart()
    model.save_pretrained(tmp_path)
    bpe().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="see each other"):
        build_bench(make_recipe(model={"name": str(tmp_path)}, training={"packing": True}))


def test_packing_holds_every_example_once_within_the_bound() -> None:
    tokens = examples(*[(int(n), 3) for n in np.random.default_rng(0).integers(1, 14, 40)])
    spec = TrainingSpec(packing=True, max_tokens=24)
    rows = batches.sequences(tokens, spec, seed=0)
    assert sorted(e for row in rows for e in row) == list(range(40))
    assert max(sum(tokens.lengths[e] for e in row) for row in rows) <= 24
    assert rows == batches.sequences(tokens, spec, seed=0) != batches.sequences(tokens, spec, seed=1)
    assert batches.sequences(tokens, spec.model_copy(update={"packing": False}), 0) == [[i] for i in range(40)]


def test_no_label_lies_across_a_seam() -> None:
    tokens = examples((0, 5), (2, 3), (1, 6), (0, 2))
    batch = collated(tokens, [[0, 1], [2, 3]])
    assert batch.positions is not None
    assert not batch.labelled[batch.positions == 0].any()
    assert batch.num_label_tokens == tokens.num_label_tokens
    before, at = batch.examples[:, :-1], batch.examples[:, 1:]
    assert bool((before == at)[batch.labelled[:, 1:]].all())
    assert collated(tokens).positions is None


def test_a_packed_step_is_the_same_step() -> None:
    tokens = examples((3, 5), (2, 4), (1, 6), (4, 2))
    plain, packed = participant(), participant()
    work(plain, tokens, batch_size=4)
    work(packed, tokens, batch_size=4, packing=True, max_tokens=32)
    assert apart(values(packed), values(plain)) < 1e-9


# --- order, steps, schedule ---


def passed(tokens: Tokens, steps: int, batch_size: int, seed: int = 0) -> list[list[int]]:
    rows = batches.sequences(tokens, TrainingSpec(), 0)
    found = batches.order(rows, batch_size=batch_size, steps=steps, seed=seed)
    return [[e for row in batch for e in row] for batch in found]


def test_a_pass_takes_each_example_once_and_passes_are_shuffled_anew() -> None:
    tokens = examples(*[(1, 1)] * 10)
    done = passed(tokens, 6, 4)
    assert [len(batch) for batch in done] == [4, 4, 2, 4, 4, 2]
    first, second = [e for b in done[:3] for e in b], [e for b in done[3:] for e in b]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_steps_go_on_through_as_many_passes_as_they_need() -> None:
    done = passed(examples(*[(1, 1)] * 3), 11, 2)
    assert len(done) == 11
    assert sorted(e for batch in done[:10] for e in batch) == sorted(list(range(3)) * 5)


def test_the_order_depends_on_the_seed_only() -> None:
    tokens = examples(*[(1, 1)] * 10)
    assert passed(tokens, 5, 3, seed=4) == passed(tokens, 5, 3, seed=4) != passed(tokens, 5, 3, seed=5)


@pytest.mark.parametrize(
    ("epochs", "steps"), [(None, 3), (1, 3), (0.5, 2), (0.01, 1), (1.5, 5), (2, 6), (3, 9), (2.1, 7)]
)
def test_steps_of_so_many_epochs_of_ten_examples_in_batches_of_four(epochs: float | None, steps: int) -> None:
    assert batches.num_steps(TrainingSpec(epochs=epochs, batch_size=4), 10) == steps


@pytest.mark.parametrize(("epochs", "size", "number"), [(2, 4, 10), (3, 7, 9), (1, 100, 5), (4, 3, 9)])
def test_so_many_epochs_take_each_example_so_many_times(epochs: int, size: int, number: int) -> None:
    steps = batches.num_steps(TrainingSpec(epochs=epochs, batch_size=size), number)
    done = Counter(e for batch in passed(examples(*[(1, 1)] * number), steps, size) for e in batch)
    assert done == dict.fromkeys(range(number), epochs)


def test_given_steps_come_before_epochs() -> None:
    assert batches.num_steps(TrainingSpec(steps=17), 10) == 17


@pytest.mark.parametrize(
    ("size", "batch", "max_tokens", "expected"), [(3, 8, 64, 3), ("auto", 8, 64, 8), ("auto", 8, 4096, 1)]
)
def test_micro_batches_by_the_recipe(size: Any, batch: int, max_tokens: int, expected: int) -> None:
    spec = TrainingSpec(micro_batch_size=size, batch_size=batch, max_tokens=max_tokens)
    assert batches.micro_batch_size(spec, CPU) == expected


def test_micro_batches_hold_the_batch_with_like_lengths_together() -> None:
    rows = [[i] for i in range(6)]
    cut = list(batches.micro_batches(UNEQUAL, rows, 2, CPU))
    assert sorted(int(e) for batch in cut for e in batch.examples.unique() if e >= 0) == list(range(6))
    assert [batch.ids.shape[1] for batch in cut] == [14, 9, 6]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1.0, 0.2 + 0.8 * (1 + np.sqrt(0.5)) / 2, 0.6, 0.2 + 0.8 * (1 - np.sqrt(0.5)) / 2, 0.2]),
    ],
)
def test_learning_rates_of_five_rounds(schedule: Any, expected: list[float]) -> None:
    spec = TrainingSpec(lr=1.0, schedule=schedule, final_lr_ratio=0.2)
    assert [lr_in_round(spec, r, 5) for r in range(1, 6)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.02, 1.0])
def test_the_last_rounds_rate_is_the_given_share_of_the_first(schedule: Any, warmup: int, ratio: float) -> None:
    spec = TrainingSpec(lr=0.03, schedule=schedule, warmup_rounds=warmup, final_lr_ratio=ratio)
    rates = [lr_in_round(spec, r, 20) for r in range(1, 21)]
    assert rates[-1] == pytest.approx(0.03 * ratio, abs=1e-12)
    assert max(rates) == rates[warmup] == pytest.approx(0.03)
    assert all(b <= a for a, b in pairwise(rates[warmup:]))


def test_warming_up_rises_evenly_to_the_rate() -> None:
    spec = TrainingSpec(lr=0.4, warmup_rounds=3, schedule="constant")
    assert [lr_in_round(spec, r, 5) for r in range(1, 6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert lr_in_round(TrainingSpec(lr=0.4), 1, 1) == 0.4


# --- the optimizer ---


def test_a_gradient_above_the_bound_is_scaled_to_it() -> None:
    who = participant()
    own_gradient(who, collated(UNEQUAL))
    before = gradient(who)
    norm = float(before.norm())
    assert clip(who.trainables, norm * 2) == pytest.approx(norm)
    assert torch.equal(gradient(who), before)
    assert clip(who.trainables, norm / 4) == pytest.approx(norm)
    assert float(gradient(who).norm()) == pytest.approx(norm / 4, rel=1e-3)
    assert apart(gradient(who), before / 4) < 1e-3


def test_clipping_is_torchs_over_all_tensors_together() -> None:
    who = participant(kind="dora")
    own_gradient(who, collated(UNEQUAL))
    separate = [nn.Parameter(torch.zeros_like(t)) for t in who.trainables.gradients.values()]
    for parameter, grad in zip(separate, who.trainables.gradients.values(), strict=True):
        parameter.grad = grad.clone()
    nn.utils.clip_grad_norm_(separate, 0.01)
    clip(who.trainables, 0.01)
    for parameter, grad in zip(separate, who.trainables.gradients.values(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("spec", "theirs"),
    [
        (
            {"optimizer": "adamw", "weight_decay": 0.1, "betas": (0.8, 0.99)},
            lambda p: AdamW(p, lr=0.01, betas=(0.8, 0.99), weight_decay=0.1, foreach=False),
        ),
        ({"optimizer": "sgd", "momentum": 0.0}, lambda p: SGD(p, lr=0.01)),
        (
            {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
            lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, foreach=False),
        ),
    ],
)
def test_steps_over_flat_memory_are_torchs_over_the_tensors(dtype: torch.dtype, spec: Any, theirs: Any) -> None:
    who = participant(dtype=dtype)
    separate = [nn.Parameter(t.clone()) for t in who.trainables.values.values()]
    other, own = theirs(separate), make_optimizer(who.trainables, TrainingSpec(lr=0.01, **spec))
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        who.trainables.zero_gradients()
        for parameter, grad in zip(separate, who.trainables.gradients.values(), strict=True):
            drawn = torch.randn(grad.shape, generator=generator, dtype=dtype)
            grad.add_(drawn)
            parameter.grad = drawn
        own.step()
        other.step()
    for parameter, value in zip(separate, who.trainables.values.values(), strict=True):
        torch.testing.assert_close(value, parameter.detach(), rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-7)


def test_training_is_torchs_own_loop_over_the_same_batches() -> None:
    who = participant()
    result = work(who, optimizer="adamw", lr=0.02, batch_size=2, epochs=2, clip_norm=1.0)
    other = participant()
    model, named = other.language_model.model, dict(other.language_model.model.named_parameters())
    parameters = [nn.Parameter(p.detach().clone()) for p in named.values() if p.requires_grad]
    names = [n for n, p in named.items() if p.requires_grad]
    optimizer = AdamW(parameters, lr=0.02, weight_decay=0.0)
    for batch in batches.order([[i] for i in range(6)], batch_size=2, steps=6, seed=0):
        optimizer.zero_grad()
        call = torch.func.functional_call(
            model, dict(zip(names, parameters, strict=True)), (), padded(UNEQUAL, [e for row in batch for e in row])
        )
        call.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    for name, parameter in zip(names, parameters, strict=True):
        torch.testing.assert_close(who.trainables.values[name], parameter.detach(), rtol=1e-4, atol=1e-6)
    assert (result.num_steps, result.num_examples) == (6, 12)
    assert result.num_label_tokens == 2 * UNEQUAL.num_label_tokens


def test_the_loss_falls_on_what_is_trained() -> None:
    who = participant(kind="full", dtype=torch.float32)
    first = work(who, optimizer="adamw", lr=0.01, batch_size=6, steps=1).loss
    last = work(who, optimizer="adamw", lr=0.01, batch_size=6, steps=30).loss
    assert last < 0.8 * first


def test_an_optimizer_that_is_handed_in_goes_on_from_its_state() -> None:
    whole, parted = participant(), participant()
    optimizer = make_optimizer(parted.trainables, TrainingSpec())
    settings: dict[str, Any] = {"optimizer": "adamw", "batch_size": 6, "micro_batch_size": 6, "lr": 0.01}
    work(whole, UNEQUAL, **settings, steps=4)
    for _ in range(4):
        task = LocalWork(UNEQUAL, TrainingSpec(**settings, clip_norm=None), lr=0.01, steps=1, seed=0)
        task.optimizer = optimizer
        SupervisedFineTuning().work(parted, task)
    assert apart(values(parted), values(whole)) < 1e-9


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_is_drawn_from_the_tasks_seed(kind: str) -> None:
    found = []
    for seed, disturb in ((5, 1), (5, 2), (6, 1)):
        who = participant(kind=kind, dropout=0.5)
        torch.manual_seed(disturb)
        work(who, batch_size=6, seed=seed, steps=2)
        found.append(values(who))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


# --- what a strategy changes ---


class Bowl(GradientObjective):
    """½‖θᵢ − b‖², whose gradient is θᵢ − b whatever the data; its value is NaN at one step, if asked for."""

    name = "bowl"

    def __init__(self, trainables: Trainables, bottom: float, nan_at: int | None = None) -> None:
        super().__init__()
        self.trainables, self.bottom, self.nan_at, self.calls = trainables, bottom, nan_at, 0

    def backward(self, language_model: LanguageModel, batch: batches.Batch, scale: float) -> float:
        self.calls += 1
        for dtype, flat in self.trainables.values.flats.items():
            gradient = (flat - self.bottom) * (scale * batch.num_label_tokens)
            self.trainables.gradients.flats[dtype].add_(gradient)
        return float("nan") if self.calls == self.nan_at else 1.0


def toy() -> Participant:
    module = nn.Linear(3, 2, dtype=torch.float64)
    language_model: Any = SimpleNamespace(model=module, device=CPU)
    return Participant(language_model, Trainables(module))


def steps_in_bowl(who: Participant, bottom: float, change: Any, steps: int, lr: float) -> None:
    spec = TrainingSpec(optimizer="sgd", clip_norm=None, batch_size=2, micro_batch_size=1)
    task = LocalWork(examples((2, 1), (2, 4)), spec, lr=lr, steps=steps, seed=0, correction=change)
    Bowl(who.trainables, bottom).work(who, task)


def like(layout: Layout, seed: int) -> NamedTensors:
    made = NamedTensors.zeros(layout)
    for flat in made.flats.values():
        flat.copy_(torch.from_numpy(np.random.default_rng(seed).normal(size=len(flat))))
    return made


def as_array(tensors: NamedTensors) -> np.ndarray:
    return np.concatenate([flat.double().numpy() for flat in tensors.flats.values()]).copy()


def test_fedprox_adds_the_gradient_of_its_penalty() -> None:
    mu = 0.7
    who = participant()
    theta = who.trainables.values.clone()
    for flat in who.trainables.values.flats.values():
        flat.add_(torch.linspace(-0.1, 0.1, len(flat), dtype=flat.dtype))
    own_gradient(who, collated(UNEQUAL))
    Prox(theta, mu).adjust(who.trainables.values, who.trainables.gradients)
    found = gradient(who)
    who.trainables.zero_gradients()
    named = {n: p for n, p in who.language_model.model.named_parameters() if p.requires_grad}
    penalty = sum(((p - theta[n]) ** 2).sum() for n, p in named.items())
    total = who.language_model.model(**padded(UNEQUAL)).loss + mu / 2 * penalty
    total.backward()
    assert apart(found, gradient(who)) < 1e-6


def test_fedprox_pulls_from_the_second_step_on() -> None:
    free, held = participant(), participant()
    for who, change in ((free, None), (held, Prox(held.trainables.values.clone(), 5.0))):
        work(who, batch_size=6, steps=1, correction=change)
    assert torch.equal(values(free), values(held))
    start = values(participant())
    for who, change in ((free, None), (held, Prox(participant().trainables.values.clone(), 5.0))):
        work(who, batch_size=6, steps=4, correction=change)
    assert (values(held) - start).norm() < (values(free) - start).norm()


@pytest.mark.parametrize("lr", [0.1, 0.02])
@pytest.mark.parametrize("steps", [1, 7])
def test_scaffold_steps_and_its_new_control_are_the_papers(lr: float, steps: int) -> None:
    who = toy()
    layout = who.trainables.values.layout
    theta, c, c_i = as_array(who.trainables.values), like(layout, 1), like(layout, 2)
    change = Scaffold(c, c_i)
    steps_in_bowl(who, 0.5, change, steps, lr)
    expected = theta.copy()
    for _ in range(steps):
        expected = expected - lr * ((expected - 0.5) - as_array(c_i) + as_array(c))
    theta_i = as_array(who.trainables.values)
    np.testing.assert_allclose(theta_i, expected, rtol=1e-12)
    delta = like(layout, 0)
    delta.copy_(who.trainables.values)
    for flat in delta.flats.values():
        flat.sub_(torch.from_numpy(theta))
    sent, kept = change.finish(delta, lr=lr, steps=steps)
    new = as_array(c_i) - as_array(c) + (theta - theta_i) / (steps * lr)
    np.testing.assert_allclose(as_array(kept["control"]), new, rtol=1e-9)
    np.testing.assert_allclose(as_array(sent["control"]), new - as_array(c_i), rtol=1e-9)
    np.testing.assert_allclose(as_array(c_i), as_array(like(layout, 2)))


def test_after_one_step_the_control_is_the_gradient_itself() -> None:
    who = participant()
    layout = who.trainables.values.layout
    theta = who.trainables.values.clone()
    _, expected = own_gradient(who, collated(UNEQUAL))
    change = Scaffold(like(layout, 1), like(layout, 2))
    work(who, batch_size=6, steps=1, lr=0.1, correction=change)
    delta = who.trainables.values.clone()
    for dtype, flat in delta.flats.items():
        flat.sub_(theta.flats[dtype])
    _, kept = change.finish(delta, lr=0.1, steps=1)
    assert apart(torch.from_numpy(as_array(kept["control"])), expected) < 1e-6


def test_the_servers_control_stays_the_mean_of_the_sites_though_some_are_absent() -> None:
    sites, lr, steps = ("a", "b", "c"), 0.1, 3
    who = toy()
    server = ScaffoldServer(num_sites=len(sites))
    state = server.init(who.trainables.values.clone())
    own: dict[str, dict[str, NamedTensors]] = {site: {} for site in sites}
    for number, cohort in enumerate((sites, ("a", "c"), ("b",), sites), 1):
        fold = server.open(state)
        for place, site in enumerate(cohort):
            theta = state.theta
            broadcast = {"theta": theta, "control": state.slots["control"].clone()}
            change = correction(server.correction(), theta, broadcast, own[site])
            who.trainables.values.copy_(theta)
            steps_in_bowl(who, float(ord(site) - 97), change, steps + place, lr)
            delta = who.trainables.values.clone()
            for dtype, flat in delta.flats.items():
                flat.sub_(theta.flats[dtype])
            sent, own[site] = change.finish(delta, lr=lr, steps=steps + place)
            fold.add(Update(site, number, {"delta": delta, **sent}, 1.0 + place, 1, 1, steps))
        state = server.close(state, fold)
        mean = sum(as_array(o["control"]) if o else np.zeros(8) for o in own.values()) / len(sites)
        np.testing.assert_allclose(as_array(state.slots["control"]), mean, rtol=1e-9, atol=1e-12)


def test_scaffold_learns_nothing_from_a_round_at_rate_nought() -> None:
    layout = toy().trainables.values.layout
    change = Scaffold(like(layout, 1), like(layout, 2))
    sent, kept = change.finish(NamedTensors.zeros(layout), lr=0.0, steps=3)
    assert not as_array(sent["control"]).any()
    np.testing.assert_array_equal(as_array(kept["control"]), as_array(like(layout, 2)))


def test_a_loss_that_is_not_finite_names_the_step() -> None:
    who = toy()
    task = LocalWork(examples((2, 1), (2, 4)), TrainingSpec(batch_size=2), lr=0.1, steps=5, seed=0)
    with pytest.raises(SiteError, match="nan at local step 3") as caught:
        Bowl(who.trainables, 0.0, nan_at=3).work(who, task)
    assert "training.lr" in caught.value.hint


def test_a_model_that_has_diverged_is_found_at_the_first_step() -> None:
    who = participant()
    for flat in who.trainables.values.flats.values():
        flat.fill_(float("nan"))
    with pytest.raises(SiteError, match="local step 1"):
        work(who)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "scaffold"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_local_work_leaves_what_was_broadcast_untouched(
    strategy: str, kind: str, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(federation={"strategy": strategy}, model={"adapter": {"kind": kind, "r": 2}})
    bench = build_bench(recipe)
    method = resolve("strategy", strategy)(num_sites=3)
    memory = Memory.allocate(method, bench.theta, 1)
    hand = Hand(bench, method, memory, tmp_path, lambda _: None)
    for number, tensors in enumerate(hand.broadcast.values()):
        tensors.copy_(bench.theta if number == 0 else like(bench.theta.layout, number))
    before = memory.broadcast.clone()
    state_out = "north.safetensors" if method.site_state else None
    task = TrainTask(1, "north", 0.01, 3, correction=method.correction(), state_out=state_out)
    found = hand.train(task, 0)
    assert torch.equal(memory.broadcast, before)
    delta = hand.slots[0]["delta"]
    assert found["num_steps"] == 3
    for dtype, flat in delta.flats.items():
        expected = bench.participant.trainables.values.flats[dtype] - bench.theta.flats[dtype]
        assert flat.any()
        assert torch.equal(flat, expected)

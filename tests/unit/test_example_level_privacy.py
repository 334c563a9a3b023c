"""Privacy of single examples: gradients of their own, clipping, draws, noise, and the key of which these are made."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from commonweight.data.tokens import Tokens
from commonweight.engines.noise_secret import SECRET_FILE, SPENT_FILE, NoiseSecret
from commonweight.errors import RecipeError, SiteError, StateError
from commonweight.model.tensors import NamedTensors, l2_norm
from commonweight.model.trainables import Trainables
from commonweight.privacy.example_level import NoisySteps, planned_steps
from commonweight.privacy.noise import Coins, derived
from commonweight.recipe.schema import TrainingSpec
from commonweight.train import batches
from commonweight.train.local import LocalWork, Participant
from commonweight.train.loss import LanguageModel, backward
from commonweight.train.per_example import check_examples, example_gradients
from commonweight.train.sft import SupervisedFineTuning

VOCABULARY, KEY = 96, bytes(range(32))
CPU = torch.device("cpu")


def small_llama(**lora: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    options = {"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(**{**options, **lora}))


@pytest.fixture
def participant() -> Participant:
    """In float64, its LoRA halves away from zero."""
    model = small_llama()
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2, generator=draw)
    return Participant(LanguageModel(model), Trainables(model))


def some_tokens(lengths: tuple[int, ...]) -> Tokens:
    """Examples of these lengths; of each, what comes after its third token is learned."""
    draw = np.random.default_rng(2)
    ids = draw.integers(0, VOCABULARY, size=sum(lengths), dtype=np.int32)
    labelled = np.concatenate([np.arange(length) > 2 for length in lengths])
    return Tokens(ids, labelled, np.cumsum([0, *lengths]))


def alone(participant: Participant, tokens: Tokens, example: int) -> dict[str, torch.Tensor]:
    """The gradient of one example's mean loss a label token, by torch alone."""
    model = participant.language_model.model
    ids = torch.as_tensor(np.asarray(tokens.ids_of(example), dtype=np.int64))[None]
    labelled = torch.as_tensor(np.asarray(tokens.labelled_of(example), dtype=bool))[None]
    logits = model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits[labelled[:, 1:]], ids[:, 1:][labelled[:, 1:]])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


LENGTHS = (12, 4, 9, 20, 7)
#: as a forward pass takes them: the longest first
IN_ORDER = [3, 0, 2, 4, 1]


@pytest.mark.parametrize("room", [0, 24, 60], ids=["padded", "packed", "in one sequence"])
def test_gradients_of_a_batch_are_those_that_each_example_has_alone(participant: Participant, room: int) -> None:
    tokens = some_tokens(LENGTHS)
    (batch,) = batches.unit_batches(tokens, [[k] for k in IN_ORDER], len(LENGTHS), CPU, room=room)
    assert len(batch.batch.ids) == {0: 5, 24: 3, 60: 1}[room]
    participant.language_model.model.train()
    with example_gradients(participant.language_model, participant.trainables) as examples:
        found, nats = examples.take(batch, backward)
    assert nats > 0
    for example in range(len(LENGTHS)):
        for name, expected in alone(participant, tokens, example).items():
            error = torch.linalg.vector_norm(found[name][IN_ORDER.index(example)] - expected)
            assert error <= 1e-6 * torch.linalg.vector_norm(expected), (example, name)


def test_the_hooks_are_gone_afterwards(participant: Participant) -> None:
    model = participant.language_model.model
    with example_gradients(participant.language_model, participant.trainables):
        pass
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


@pytest.mark.parametrize("bound", [1e-3, 0.5, 1e6])
def test_clipped_gradients_are_no_longer_than_the_bound(participant: Participant, bound: float) -> None:
    """One at a time, so that the sum is the clipped gradient itself; above the bound it is what it was."""
    tokens = some_tokens(LENGTHS)
    participant.language_model.model.train()
    with example_gradients(participant.language_model, participant.trainables) as examples:
        for example in range(len(LENGTHS)):
            examples.forget()
            (one,) = batches.unit_batches(tokens, [[example]], 1, CPU)
            examples.add_clipped(one, backward, bound)
            whole = math.hypot(*(float(g.norm()) for g in alone(participant, tokens, example).values()))
            assert l2_norm(examples.total) <= bound * (1 + 1e-6)
            assert l2_norm(examples.total) == pytest.approx(min(whole, bound), rel=1e-6)


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_a_sum_of_clipped_gradients_does_not_depend_on_how_the_batch_is_cut(
    participant: Participant, micro: int
) -> None:
    tokens, bound = some_tokens(LENGTHS), 0.7
    expected = {name: torch.zeros_like(tensor) for name, tensor in participant.trainables.values.items()}
    for example in range(len(LENGTHS)):
        gradient = alone(participant, tokens, example)
        scale = min(1.0, bound / math.hypot(*(float(g.norm()) for g in gradient.values())))
        for name, tensor in gradient.items():
            expected[name] += scale * tensor
    participant.language_model.model.train()
    with example_gradients(participant.language_model, participant.trainables) as examples:
        rows = [[k] for k in range(len(LENGTHS))]
        for batch in batches.unit_batches(tokens, rows, micro, CPU):
            examples.add_clipped(batch, backward, bound)
    for name, tensor in expected.items():
        torch.testing.assert_close(examples.total[name], tensor, rtol=1e-9, atol=1e-12)


GROUPS = [[1, 4], [3], [0, 2]]


def of_groups(participant: Participant, tokens: Tokens, groups: list[list[int]], bound: float) -> dict[str, Any]:
    """Σ over groups of the mean of its examples' gradients, clipped as one, by torch alone."""
    total: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in participant.trainables.values.items()}
    for group in groups:
        rows = [alone(participant, tokens, example) for example in group]
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in total}
        scale = min(1.0, bound / math.hypot(*(float(g.norm()) for g in mean.values())))
        for name, tensor in mean.items():
            total[name] += scale * tensor
    return total


@pytest.mark.parametrize("room", [0, 24], ids=["padded", "packed"])
@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_a_groups_gradient_is_the_mean_of_its_rows_and_clipped_as_one(
    participant: Participant, micro: int, room: int
) -> None:
    """Also where a forward pass ends in the middle of a group, or one is longer than a pass."""
    tokens = some_tokens(LENGTHS)
    for groups in (GROUPS, [[0, 1, 2, 3, 4]], [[0, 1, 3, 4], [2]]):
        participant.language_model.model.train()
        with example_gradients(participant.language_model, participant.trainables) as examples:
            for batch in batches.unit_batches(tokens, groups, micro, CPU, room=room):
                assert len(batch.batch.ids) <= micro
                examples.add_clipped(batch, backward, 0.3)
        for name, tensor in of_groups(participant, tokens, groups, 0.3).items():
            # Llama's norms are in float32, whatever the weights
            error = torch.linalg.vector_norm(examples.total[name] - tensor)
            assert error <= 1e-6 * torch.linalg.vector_norm(tensor), (groups, name)


def test_an_example_whose_gradient_is_not_finite_counts_as_none(participant: Participant) -> None:
    tokens = some_tokens((6, 8))

    def broken(language_model: LanguageModel, batch: Any, scale: Any) -> float:
        hit = batch.examples[:, 1:][batch.labelled[:, 1:]] == 1
        return backward(language_model, batch, torch.where(hit, torch.inf, scale))

    participant.language_model.model.train()
    sums = []
    with example_gradients(participant.language_model, participant.trainables) as examples:
        for rows, use in (([[0], [1]], broken), ([[0]], backward)):
            examples.forget()
            (both,) = batches.unit_batches(tokens, rows, 2, CPU)
            examples.add_clipped(both, use, 1.0)
            sums.append(examples.total.clone())
    assert l2_norm(sums[0]) > 0
    for name, tensor in sums[1].items():
        torch.testing.assert_close(sums[0][name], tensor, rtol=1e-9, atol=1e-12)


class Still:
    """Privacy without noise: in each step the units that it is given, and the sum as it is."""

    bound, seed = 0.7, 3

    def __init__(self, *units: list[list[int]]) -> None:
        self.units = units

    def drawn(self, step: int) -> list[list[int]]:
        return self.units[step]

    def release(self, total: NamedTensors, step: int) -> NamedTensors:
        return total


def work(tokens: Tokens, privacy: Any, steps: int, **training: Any) -> LocalWork:
    spec = TrainingSpec(batch_size=4, max_tokens=32, optimizer="sgd", lr=0.5, **training)
    return LocalWork(tokens, spec, lr=0.5, steps=steps, seed=0, privacy=privacy)


def test_an_empty_batch_is_a_step_of_noise_alone(participant: Participant) -> None:
    tokens = some_tokens(LENGTHS)
    before = participant.trainables.values.clone()
    result = SupervisedFineTuning().work(participant, work(tokens, Still([]), 1))
    assert (result.num_steps, result.num_examples) == (1, 0)
    for name, tensor in before.items():
        assert torch.equal(participant.trainables.values[name], tensor)

    noisy = NoisySteps(bound=1.0, noise_multiplier=0.3, sampling=1e-9, expected=2.0, key=KEY, units=[[0], [1]])
    SupervisedFineTuning().work(participant, work(tokens, noisy, 1))
    moved = torch.cat([(participant.trainables.values[n] - t).flatten() for n, t in before.items()])
    assert float(moved.std()) == pytest.approx(0.5 * 0.3 / 2, rel=0.1)  # lr·zC/(qn)


def test_a_private_step_is_the_sum_over_what_was_drawn(participant: Participant) -> None:
    """And `clip_norm`, which is set by default, does not scale it again."""
    tokens = some_tokens(LENGTHS)
    before = participant.trainables.values.clone()
    expected = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    for example in range(3):
        gradient = alone(participant, tokens, example)
        scale = min(1.0, 0.7 / math.hypot(*(float(g.norm()) for g in gradient.values())))
        for name, tensor in gradient.items():
            expected[name] += scale * tensor
    SupervisedFineTuning().work(participant, work(tokens, Still([[0], [1], [2]]), 1, clip_norm=1e-3))
    for name, tensor in before.items():
        torch.testing.assert_close(
            participant.trainables.values[name], tensor - 0.5 * expected[name], rtol=1e-6, atol=1e-9
        )


def steps(**changes: Any) -> NoisySteps:
    values: dict[str, Any] = {"bound": 2.0, "noise_multiplier": 1.5, "sampling": 0.2, "expected": 8.0, "key": KEY}
    return NoisySteps(**{**values, **changes})


def test_noise_has_the_stated_size_over_a_million_draws() -> None:
    total = NamedTensors.of({"a": torch.zeros(1_000_000)})
    row = steps().release(total, 7)["a"].double()
    assert float(row.std()) == pytest.approx(1.5 * 2.0 / 8.0, rel=5e-3)
    assert abs(float(row.mean())) < 5 * 1.5 * 2.0 / 8.0 / 1000


def test_a_steps_noise_is_its_own_and_comes_again() -> None:
    def noise(step: int, key: bytes = KEY) -> torch.Tensor:
        return steps(key=key).release(NamedTensors.of({"a": torch.zeros(64)}), step)["a"]

    assert torch.equal(noise(0), noise(0))
    assert not torch.equal(noise(0), noise(1))
    assert not torch.equal(noise(0), noise(0, derived(KEY, "another task")))


def test_every_example_is_drawn_as_often_as_it_should_be() -> None:
    """Poisson's: each by itself with probability q. 4,000 steps of 50 examples; bounds of 5 standard deviations."""
    rounds, examples, q = 4000, 50, 0.2
    private = steps(units=[[k] for k in range(examples)])
    drawn = np.zeros((rounds, examples))
    for step in range(rounds):
        drawn[step, [k for (k,) in private.drawn(step)]] = 1
    sigma = math.sqrt(q * (1 - q) / rounds)
    assert abs(drawn.mean(0) - q).max() < 5 * sigma
    sizes = drawn.sum(1)
    assert sizes.mean() == pytest.approx(q * examples, abs=5 * math.sqrt(examples) * sigma)
    assert sizes.var() == pytest.approx(examples * q * (1 - q), rel=0.15)
    together = np.corrcoef(drawn[:, :8].T) - np.eye(8)
    assert abs(together).max() < 5 / math.sqrt(rounds)
    assert len(set(sizes)) > 10


def test_groups_are_drawn_as_one_and_their_rows_evenly() -> None:
    """2,000 steps; bounds of 5 standard deviations."""
    groups, rounds, q = [[0], [1, 2, 3, 4, 5], [6, 7], [8, 9, 10]], 2000, 0.3
    private = steps(units=groups, rows=2, sampling=q)
    times, together = np.zeros(11), np.zeros((11, 11))
    for step in range(rounds):
        drawn = private.drawn(step)
        assert drawn == private.drawn(step)
        for unit in drawn:
            (group,) = [group for group in groups if set(unit) <= set(group)]
            assert len(unit) == min(2, len(group))
            times[unit] += 1
            together[np.ix_(unit, unit)] += 1
    expected = np.array([q * min(2, len(g)) / len(g) for g in groups for _ in g])
    assert abs(times / rounds - expected).max() < 5 * math.sqrt(q * (1 - q) / rounds)
    pairs = together[np.ix_(groups[1], groups[1])][np.triu_indices(5, 1)] / rounds  # ten pairs, all alike
    assert abs(pairs - q / 10).max() < 5 * math.sqrt(q / 10 / rounds)


def test_coins_of_chance_one_are_all_heads() -> None:
    assert Coins(KEY).tossed(0, 13, 1.0).all()
    assert len(Coins(KEY).tossed(3, 13, 0.5)) == 13


def test_draws_and_noise_have_nothing_in_common() -> None:
    keys = [derived(KEY, purpose) for purpose in ("sampling", "noise", "dropout")]
    assert len({*keys, KEY}) == 4
    assert steps().seed != steps(key=derived(KEY, "x")).seed
    assert KEY.hex() not in repr(steps())


def test_a_sites_noise_is_calibrated_to_its_own_size() -> None:
    """Independently, by dp-accounting itself."""
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    sizes = {"large": 400, "small": 40, "tiny": 4}
    found = {
        name: planned_steps(units=n, batch_size=8, steps=5, rounds=4, delta=1e-5, epsilon=0.5)
        for name, n in sizes.items()
    }
    assert [found[name].sampling for name in sizes] == [0.02, 0.2, 1.0]
    assert found["large"].noise_multiplier < found["small"].noise_multiplier < found["tiny"].noise_multiplier
    for releases in found.values():
        accountant = PLDAccountant()
        event = PoissonSampledDpEvent(releases.sampling, GaussianDpEvent(releases.noise_multiplier))
        accountant.compose(event, 20)
        assert 0.497 < accountant.get_epsilon(1e-5) <= 0.5 * (1 + 1e-5)


# --- the secret


def test_a_task_that_is_done_again_has_its_key_and_no_other_has_it(tmp_path: Path) -> None:
    secret = NoiseSecret(tmp_path)
    secret.make()
    assert (tmp_path / SECRET_FILE).stat().st_mode & 0o077 == 0
    again = NoiseSecret(tmp_path)
    again.make()
    assert secret.key("a task", 5) == again.key("a task", 5)
    assert secret.key("a task", 5) != secret.key("another task", 5)
    secret.delete()
    with pytest.raises(StateError):
        secret.key("a task", 5)


def test_no_more_steps_are_taken_than_were_planned_for(tmp_path: Path) -> None:
    secret = NoiseSecret(tmp_path, most=10)
    secret.make()
    keys = {secret.key("round 1", 5), secret.key("round 1", 5), secret.key("round 2", 5)}
    assert len(keys) == 2
    with pytest.raises(SiteError, match="planned for 10 steps"):
        NoiseSecret(tmp_path, most=10).key("round 1 from another model", 1)
    assert secret.key("round 2", 5) in keys
    (tmp_path / SPENT_FILE).write_text("[]")
    with pytest.raises(StateError, match="damaged"):
        secret.key("round 1", 5)


# --- models that hooks cannot follow


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the output layer is trained"),
    ],
)
def test_adapters_without_gradients_of_single_examples_are_refused(lora: dict[str, Any], why: str) -> None:
    model = small_llama(**lora)
    language_model, trainables = LanguageModel(model), Trainables(model)
    before = trainables.values.clone()
    with pytest.raises(RecipeError, match=why):
        check_examples(language_model, trainables, backward)
    for name, tensor in before.items():
        assert torch.equal(trainables.values[name], tensor)


def test_a_layer_that_mixes_rows_is_found_out() -> None:
    model = small_llama(target_modules=["v_proj"])

    def mixed(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] + inputs[0].mean(0, keepdim=True), *inputs[1:])

    layers = [module for name, module in model.named_modules() if name.endswith("layers.0.mlp.up_proj")]
    layers[0].register_forward_pre_hook(mixed)
    with pytest.raises(RecipeError, match="lora_"):
        check_examples(LanguageModel(model), Trainables(model), backward)


def test_a_model_that_looks_across_the_seams_of_packed_examples_is_found_out() -> None:
    """Here a layer sees the token before; beside each other, examples stay what they are alone."""
    model = small_llama(target_modules=["v_proj"])

    def shifted(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] + 1e-6 * torch.nn.functional.pad(inputs[0][:, :-1], (0, 0, 1, 0)), *inputs[1:])

    language_model, trainables = LanguageModel(model), Trainables(model)
    check_examples(language_model, trainables, backward, packing=True)
    layers = [module for name, module in model.named_modules() if name.endswith("layers.0.mlp.up_proj")]
    layers[0].register_forward_pre_hook(shifted)
    check_examples(language_model, trainables, backward)
    with pytest.raises(RecipeError, match="packed examples see each other"):
        check_examples(language_model, trainables, backward, packing=True)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=14),
    cuts=st.sets(st.integers(1, 13)),
    size=st.integers(1, 4),
    room=st.sampled_from([0, 12, 20]),
    most=st.none() | st.integers(1, 5),
)
def test_passes_hold_every_example_once_and_leave_one_unit_open_at_most(
    lengths: list[int], cuts: set[int], size: int, room: int, most: int | None
) -> None:
    tokens, edges = some_tokens(tuple(lengths)), sorted({0, *(c for c in cuts if c < len(lengths)), len(lengths)})
    units = [list(range(a, b)) for a, b in pairwise(edges)]
    owner = {example: number for number, unit in enumerate(units) for example in unit}
    seen: list[int] = []
    whole: list[int] = []
    going_on: int | None = None
    for one in batches.unit_batches(tokens, units, size, CPU, room=room, most=most):
        assert len(one.batch.ids) <= size
        assert most is None or len(one.pieces) <= most
        assert not room or one.batch.ids.shape[1] <= room
        here: dict[int, set[int]] = {}
        for row, start, stop, unit in one.pieces:
            (example,) = set(one.batch.examples[row, start:stop].tolist())
            assert one.batch.ids[row, start:stop].tolist() == tokens.ids_of(example).tolist()
            seen.append(example)
            here.setdefault(unit, set()).add(owner[example])
        assert sorted(here) == list(range(one.num_units))
        numbers = [number for unit in sorted(here) for number in here[unit]]
        assert len(numbers) == one.num_units
        assert going_on is None or numbers[0] == going_on
        whole += numbers[: one.num_units - one.goes_on]
        going_on = numbers[-1] if one.goes_on else None
    assert sorted(seen) == list(range(len(lengths)))
    assert sorted(whole) == list(range(len(units)))


def test_dropout_and_an_unusual_mode_do_not_matter() -> None:
    model = small_llama(lora_dropout=0.3)
    model.eval()
    language_model, trainables = LanguageModel(model), Trainables(model)
    before = trainables.values.clone()
    check_examples(language_model, trainables, backward)
    assert not model.training
    for name, tensor in before.items():
        assert torch.equal(trainables.values[name], tensor)

"""Sites that hold different parts of one adapter: what a part is, that training it is training a smaller adapter, and
what the strategies make of parts, against dense float64 NumPy and against real peft models of the sites' own shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from commonweight.cli.progress import Progress
from commonweight.coordinator.blobs import Blobs
from commonweight.coordinator.frame_files import FrameFiles
from commonweight.coordinator.plans import RunPlan
from commonweight.coordinator.stored_model import StoredModel
from commonweight.coordinator.stored_updates import StoredUpdate
from commonweight.coordinator.vault import SealedFile
from commonweight.engines.bench import Bench, build_bench
from commonweight.engines.handshake import handshake
from commonweight.engines.work import TaskWork
from commonweight.errors import CommonweightError, RecipeError, SiteError
from commonweight.evaluate.text import parts_in_words
from commonweight.federation.folder import read_tensors
from commonweight.federation.messages import ChainTask, TrainTask
from commonweight.launch import run
from commonweight.lead.submit import prepare
from commonweight.model.base import load_base
from commonweight.model.shapes import Shape, matrices, shapes_of, worn
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.model.trainables import Trainables
from commonweight.recipe import Recipe
from commonweight.recipe.docs import reference_markdown
from commonweight.recipe.load import load_recipe
from commonweight.recipe.resolved import recipe_text
from commonweight.recipe.schema import AdapterSpec, TrainingSpec
from commonweight.registry import names as registered
from commonweight.registry import resolve
from commonweight.result import open_result, score
from commonweight.seeding import derive_seed
from commonweight.site.policy import JobFacts
from commonweight.site.settings import SiteSettings
from commonweight.site.workshop import RecipeWorkshop
from commonweight.strategies.base import ServerState
from commonweight.strategies.lora.flexlora import FlexLoRA
from commonweight.strategies.lora.hetlora import HetLoRA
from commonweight.strategies.lora.pairs import PairsStrategy
from commonweight.strategies.update import Update, check
from commonweight.train.local import LocalWork, Participant
from commonweight.train.loss import LanguageModel
from commonweight.train.sft import SupervisedFineTuning
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import Channel, Plan, frame_of, piece_of
from commonweight.wire.manifest import check_frame
from commonweight.wire.refusals import Refusal, Refused
from tests.unit.tiny_models import CPU, examples, participant, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

MakeRecipe = Callable[..., Recipe]
Array = NDArray[np.float64]


def layer(k: int, name: str, letter: str) -> str:
    return f"m.layers.{k}.{name}.lora_{letter}.default.weight"


def layout_of(r: int, sizes: Mapping[tuple[int, str], tuple[int, int]]) -> Layout:
    """Of an adapter of rank r over modules (block, name), each with its (out, in)."""
    tensors = {}
    for (k, name), (out, inner) in sizes.items():
        tensors[layer(k, name, "A")] = torch.zeros(r, inner, dtype=torch.float64)
        tensors[layer(k, name, "B")] = torch.zeros(out, r, dtype=torch.float64)
    return Layout.of(tensors)


SIZES = {(k, name): size for k in range(3) for name, size in (("q", (6, 10)), ("up", (20, 5)))}
PER_RANK = 16 + 25  # parameters of a block at rank 1


# --- which part a site holds --------------------------------------------------------------------------------------


def part_of(adapter: Mapping[str, Any], site: str = "s") -> Shape:
    spec = AdapterSpec.model_validate({"r": 4, "alpha": 8, **adapter})
    return shapes_of(spec, layout_of(4, SIZES))[site]


def test_a_site_holds_what_the_recipe_says_of_it() -> None:
    shape = part_of({"sites": {"s": {"r": 3, "alpha": 9, "targets": ["q"], "layers": [0, 2]}}})
    assert (shape.rank, shape.scale, shape.ratio) == (3, 3.0, 1.5)
    assert {name: entry.shape for name, entry in shape.layout.by_name.items()} == {
        layer(0, "q", "A"): (3, 10),
        layer(0, "q", "B"): (6, 3),
        layer(2, "q", "A"): (3, 10),
        layer(2, "q", "B"): (6, 3),
    }
    assert shape.num_parameters == 2 * 3 * 16
    assert shape.layout.num_bytes == 8 * shape.num_parameters
    assert shape.modules == {"m.layers.0.q", "m.layers.2.q"}


def test_what_is_left_out_is_the_adapters_own_the_scale_too() -> None:
    whole = part_of({"sites": {"s": {}}})
    assert whole.layout == layout_of(4, SIZES)
    assert (whole.scale, whole.ratio) == (2.0, 1.0)
    lower = part_of({"sites": {"s": {"r": 1}}})
    assert (lower.rank, lower.scale, lower.ratio) == (1, 2.0, 1.0)
    assert part_of({"sites": {"s": {"alpha": 16}}}).ratio == 2.0
    root = part_of({"kind": "rslora", "sites": {"s": {"r": 2, "alpha": 8}}})
    assert root.scale == 8 / math.sqrt(2)
    assert root.ratio == pytest.approx(math.sqrt(2))


def test_a_target_is_found_as_peft_finds_it() -> None:
    assert part_of({"sites": {"s": {"targets": ["layers.1.q"]}}}).modules == {"m.layers.1.q"}
    with pytest.raises(RecipeError):
        part_of({"sites": {"s": {"targets": ["p"]}}})  # not the end of `up`


@pytest.mark.parametrize(
    ("share", "rank", "blocks"),
    [
        (1.0, 4, {0, 1, 2}),
        (0.99, 3, {0, 1, 2}),
        (0.5, 2, {0, 1, 2}),
        (0.25, 1, {0, 1, 2}),
        (0.249, 1, {1, 2}),
        (1 / 6, 1, {1, 2}),
        (0.16, 1, {2}),
        (1 / 12, 1, {2}),
    ],
)
def test_a_budget_lowers_the_rank_first_and_then_leaves_out_the_first_blocks(
    share: float, rank: int, blocks: set[int]
) -> None:
    shape = part_of({"budget": {"s": share}})
    assert (shape.rank, shape.ratio) == (rank, 1.0)
    assert {int(module.split(".")[2]) for module in shape.modules} == blocks
    assert shape.num_parameters == rank * len(blocks) * PER_RANK
    assert shape.num_parameters <= share * 4 * 3 * PER_RANK + 1e-6
    larger = (rank + 1) * 3 if len(blocks) == 3 else len(blocks) + 1
    assert larger * PER_RANK > share * 4 * 3 * PER_RANK  # nothing larger by that rule would fit


def test_modules_of_no_block_are_the_first_to_go() -> None:
    sizes = {**SIZES, (0, "q"): SIZES[0, "q"]}
    tensors = {name: torch.zeros(entry.shape) for name, entry in layout_of(4, sizes).by_name.items()}
    tensors |= {"m.head.lora_A.default.weight": torch.zeros(4, 3), "m.head.lora_B.default.weight": torch.zeros(7, 4)}
    spec = AdapterSpec(r=4, budget={"s": 0.24})
    assert "m.head" not in shapes_of(spec, Layout.of(tensors))["s"].modules


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"sites": {"s": {"targets": ["qq"]}}}, ["sites.s.targets names 'qq'", "did you mean 'q'?", "q, up"]),
        ({"sites": {"s": {"layers": [0, 3]}}}, ["sites.s.layers names block 3", "count from 0", "0, 1, 2"]),
        ({"budget": {"s": 0.08}}, ["model.adapter.budget.s is 0.08", "rank 1 in the last block", "at least 0.0834"]),
    ],
)
def test_a_part_that_is_none_is_refused(adapter: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        part_of(adapter)
    assert all(word in str(refused.value.message) + str(refused.value.hint) for word in words)


def test_an_adapter_with_tensors_in_no_pair_is_not_cut() -> None:
    tensors = {name: torch.zeros(entry.shape) for name, entry in layout_of(4, SIZES).by_name.items()}
    layout = Layout.of({**tensors, "m.embed.lora_embedding_A.default": torch.zeros(4, 9)})
    assert shapes_of(AdapterSpec(r=4), layout) == {}
    with pytest.raises(RecipeError, match=r"'m\.embed\.lora_embedding_A\.default' is in no pair"):
        shapes_of(AdapterSpec(r=4, budget={"s": 0.5}), layout)


ADAPTERS = {
    "rank above": ("{r: 4, sites: {a: {r: 5}}}", ["sites.a.r is 5", "above the adapter's r of 4"]),
    "rank 0": ("{sites: {a: {r: 0}}}", ["`model.adapter.sites.a.r` is 0", "a whole number of at least 1"]),
    "twice": ("{sites: {a: {r: 1}}, budget: {a: 0.5}}", ["a is in `sites` and in `budget`"]),
    "kind": ("{kind: dora, budget: {a: 0.5}}", ["lora or rslora adapter", "kind is dora"]),
    "share": ("{budget: {a: 1.5}}", ["`model.adapter.budget.a` is 1.5", "above 0 and of at most 1"]),
    "unknown key": ("{sites: {a: {zz: 2}}}", ["unknown key `model.adapter.sites.a.zz`", "here: `r`, `alpha`, `targ"]),
    "key elsewhere": ("{sites: {a: {rank: 2}}}", ["did you mean `model.adapter.sites.a.r`?"]),
    "near key": ("{sites: {a: {layer: [1]}}}", ["did you mean `model.adapter.sites.a.layers`?"]),
    "no section": ("{sites: {a: 4}}", ["`model.adapter.sites.a` is 4", "a mapping of names, each to a section"]),
    "no target": ("{sites: {a: {targets: []}}}", ["`model.adapter.sites.a.targets` is []"]),
    "negative block": ("{sites: {a: {layers: [-1]}}}", ["model.adapter.sites.a.layers", "-1"]),
    "typed": ("{sites: {a: {r: two}}}", ['`model.adapter.sites.a.r` is "two"', "a whole number"]),
}


@pytest.mark.parametrize(("adapter", "words"), ADAPTERS.values(), ids=ADAPTERS)
def test_what_a_recipe_cannot_mean_is_refused_by_its_place(adapter: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"name: a\nmodel:\n  adapter: {adapter}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert all(word in refused.value.message for word in (*words, "recipe.yaml:3"))


def test_parts_are_written_out_and_can_be_set_from_the_command_line(tmp_path: Path) -> None:
    text = "name: a\nmodel: {adapter: {sites: {north: {r: 2}}}}\nfederation: {strategy: flexlora}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    more = ["model.adapter.sites.south.layers=[1]", "model.adapter.budget.west=0.5", "model.adapter.sites.north.r=3"]
    recipe = load_recipe(tmp_path / "recipe.yaml", more)
    assert recipe.model.adapter.shaped == ("north", "south", "west")
    assert recipe.model.adapter.sites["north"].r == 3
    assert recipe.model.adapter.sites["south"].layers == [1]
    (tmp_path / "again.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_the_reference_has_a_sites_own_fields() -> None:
    section = reference_markdown().partition("## `model.adapter.sites`\n")[2].partition("\n## ")[0]
    for field in ("r", "alpha", "targets", "layers"):
        assert f"\n| `{field}` |" in section
    assert "a mapping of names, each to [a section](#modeladaptersites)" in reference_markdown()


def test_sites_that_are_not_there_are_refused_with_the_nearest_name(make_recipe: MakeRecipe) -> None:
    for section in ({"sites": {"sout": {"r": 1}}}, {"budget": {"sout": 0.5}}):
        recipe = make_recipe(model={**make_recipe().model.model_dump(), "adapter": {"r": 2, **section}})
        with pytest.raises(RecipeError, match=rf"model\.adapter\.{next(iter(section))} names 'sout'") as refused:
            build_bench(recipe)
        assert "did you mean 'south'?" in str(refused.value.hint)


def test_strategies_that_combine_parts_say_so_and_know_pairs() -> None:
    mixed = {name for name in registered("strategy") if resolve("strategy", name).mixed_shapes}
    assert {"flexlora", "hetlora"} <= mixed
    assert all(resolve("strategy", name).pairs for name in mixed)
    assert "lora-fair" not in mixed
    assert "fedavg" not in mixed


# --- training a part is training a smaller adapter ----------------------------------------------------------------


def smaller(name: str, shape: Shape, start: NamedTensors, *, dropout: float = 0.0, rslora: bool = False) -> Participant:
    """A real peft model of the shape, with nothing beyond it, that starts from the same values."""
    import peft

    torch.manual_seed(0)
    alpha = shape.scale * (math.sqrt(shape.rank) if rslora else shape.rank)
    config = peft.LoraConfig(
        r=shape.rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=[module.removeprefix("base_model.model.") for module in sorted(shape.modules)],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(tiny(name).requires_grad_(False), config)
    trainables = Trainables(model)
    assert trainables.values.layout == shape.layout
    for tensor_name, tensor in trainables.values.items():
        tensor.copy_(shape.part(tensor_name, start[tensor_name]))
    return Participant(LanguageModel(model), trainables)


DATA = examples((3, 4), (2, 6), (5, 2), (1, 3), (4, 4), (2, 2))
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
}
PARTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rank": ("llama", {}, {"r": 1}),
    "alpha": ("llama", {}, {"r": 2, "alpha": 3}),
    "modules, dropout": ("llama", {"dropout": 0.3}, {"r": 2, "targets": ["q_proj", "down_proj"]}),
    "blocks, dropout": ("llama", {"dropout": 0.3}, {"alpha": 5, "layers": [1]}),
    "rslora": ("llama", {"kind": "rslora"}, {"r": 2, "alpha": 3, "targets": ["up_proj", "v_proj"]}),
    "conv1d": ("conv1d", {}, {"r": 2, "targets": ["c_attn"]}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("part", PARTS)
def test_a_turn_in_the_whole_adapters_memory_is_that_of_a_smaller_adapter(part: str, optimizer: str) -> None:
    name, adapter, own = PARTS[part]
    adapter = {"r": 4, "alpha": 8, **adapter}
    whole = participant(name, **adapter)
    values = whole.trainables.values
    shape = shapes_of(AdapterSpec.model_validate({**adapter, "sites": {"s": own}}), values.layout)["s"]
    start = shape.start(values)
    small = smaller(name, shape, start, dropout=adapter.get("dropout", 0.0), rslora=adapter.get("kind") == "rslora")
    values.copy_(start)
    spec = TrainingSpec(batch_size=2, max_tokens=32, weight_decay=0.1, clip_norm=0.5, **OPTIMIZERS[optimizer])
    task = LocalWork(DATA, spec, lr=spec.lr, steps=6, seed=3)
    with worn(whole.language_model.model, shape):
        here = SupervisedFineTuning().work(whole, task)
    there = SupervisedFineTuning().work(small, task)
    assert here.loss == pytest.approx(there.loss, rel=1e-12)
    for tensor_name, tensor in small.trainables.values.items():
        mine = shape.part(tensor_name, values[tensor_name])
        torch.testing.assert_close(mine, tensor, rtol=1e-9, atol=1e-12)
        assert (mine - shape.part(tensor_name, start[tensor_name])).abs().max() > 1e-5
    assert shape.beyond(values) is None


def test_after_a_turn_the_model_is_whole_again() -> None:
    who = participant("llama", r=4, alpha=8)
    model, data = who.language_model.model.eval(), torch.arange(4, 12)[None]
    spec = AdapterSpec(r=4, alpha=8, sites={"s": {"r": 1, "alpha": 5, "layers": [0]}})  # type: ignore[dict-item]
    shape = shapes_of(spec, who.trainables.values.layout)["s"]
    resting = next(p for n, p in model.named_parameters() if "layers.1" in n and "lora_A" in n)
    resting.requires_grad_(False)
    before, trained = model(data).logits, {n for n, p in model.named_parameters() if p.requires_grad}
    with worn(model, shape):
        assert not torch.equal(model(data).logits, before)
    assert torch.equal(model(data).logits, before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    with suppress(ValueError), worn(model, shape):
        raise ValueError
    assert torch.equal(model(data).logits, before)
    with worn(model, None):
        assert torch.equal(model(data).logits, before)


# --- what strategies make of parts --------------------------------------------------------------------------------

RANK, SCALE = 4, 2.0
LAYERS = {(0, "q"): (23, 14), (1, "up"): (9, 31), (1, "lone"): (8, 12)}
SITES: dict[str, dict[str, Any]] = {
    "whole": {},
    "low": {"r": 1, "targets": ["q", "up"]},
    "middle": {"r": 2, "alpha": 7, "targets": ["q", "up"]},
    "part": {"r": 3, "alpha": 3, "targets": ["up", "lone"]},
}
WEIGHTS = {"whole": 3.0, "low": 1.0, "middle": 7.5, "part": 20.0}
SPEC = AdapterSpec.model_validate(
    {"r": RANK, "alpha": SCALE * RANK, "sites": {site: own for site, own in SITES.items() if own}}
)
THETA = layout_of(RANK, LAYERS)
SHAPES = shapes_of(SPEC, THETA)
#: rᵢ and αᵢ as the recipe says them, and which modules: written again, apart from `shapes_of`
RANKS = {"whole": 4, "low": 1, "middle": 2, "part": 3}
SCALES = {"whole": 2.0, "low": 2.0, "middle": 3.5, "part": 1.0}
HOLDERS = {"q": ("whole", "low", "middle"), "up": ("whole", "low", "middle", "part"), "lone": ("whole", "part")}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def initial() -> NamedTensors:
    theta = NamedTensors.zeros(THETA)
    for seed, tensor in enumerate(theta.values()):
        tensor.copy_(drawn(seed, *tensor.shape))
    return theta


def cohort_of(round: int, sites: Sequence[str]) -> list[Update]:
    found = []
    for site in sites:
        delta = NamedTensors.zeros(THETA)
        for seed, (name, tensor) in enumerate(delta.items()):
            shape = SHAPES.get(site)
            if shape is None or shape.holds(name):
                mine = tensor if shape is None else shape.part(name, tensor)
                mine.copy_(0.7 * drawn(1000 * round + 100 * list(SITES).index(site) + seed, *mine.shape))
        found.append(Update(site, round, {"delta": delta}, WEIGHTS[site], 1, 1, 1))
    return found


def closed(strategy: PairsStrategy, state: ServerState, cohort: Sequence[Update]) -> ServerState:
    fold = strategy.open(state)
    for update in cohort:
        check(update, round=update.round, layout=THETA, channels=strategy.update_channels)
        fold.add(update)
    return strategy.close(state, fold)


def started(kind: type[PairsStrategy]) -> tuple[PairsStrategy, ServerState]:
    strategy = kind()
    strategy.shapes = SHAPES
    return strategy, strategy.init(initial())


def own_factors(theta: NamedTensors, update: Update, block: int, name: str) -> tuple[Array, Array]:
    """Bᵢ, Aᵢ after the work: the first rᵢ columns and rows, B so scaled that sᵢBᵢAᵢ is what sBA was."""
    r, letters = RANKS[update.site], (layer(block, name, "B"), layer(block, name, "A"))
    B, A = (theta[letter].numpy() for letter in letters)
    dB, dA = (update.delta[letter].numpy() for letter in letters)
    return B[:, :r] * (SCALE / SCALES[update.site]) + dB[:, :r], A[:r] + dA[:r]


def product(theta: NamedTensors, block: int, name: str) -> Array:
    found: Array = SCALE * theta[layer(block, name, "B")].numpy() @ theta[layer(block, name, "A")].numpy()
    return found


def relative(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def padded_average(theta: NamedTensors, held: Sequence[Update], block: int, name: str) -> Array:
    """What the plain average of zero-padded factors would give."""
    out, inner = LAYERS[block, name]
    p, B, A = np.array([u.weight for u in held]), np.zeros((out, RANK)), np.zeros((RANK, inner))
    for share, update in zip(p / p.sum(), held, strict=True):
        own_b, own_a = own_factors(theta, update, block, name)
        B[:, : own_b.shape[1]] += share * own_b
        A[: len(own_a)] += share * own_a
    found: Array = SCALE * B @ A
    return found


ROUNDS: tuple[tuple[str, ...], ...] = (
    ("whole", "low", "middle", "part"),
    ("low", "middle", "part"),
    ("whole", "part"),
    ("low", "middle"),
)


def test_flexlora_gives_the_best_product_of_the_sites_own_ranks_scales_and_modules() -> None:
    strategy, state = started(FlexLoRA)
    for number, sites in enumerate(ROUNDS, start=1):
        before, cohort = state.theta.clone(), cohort_of(number, sites)
        state = closed(strategy, state, cohort)
        for block, name in LAYERS:
            held = [update for update in cohort if update.site in HOLDERS[name]]
            if not held:
                assert (sites, name) == (("low", "middle"), "lone")
                assert relative(product(state.theta, block, name), product(before, block, name)) == 0
                continue
            total = sum(update.weight for update in held)
            W = np.zeros(LAYERS[block, name])
            for update in held:
                B, A = own_factors(before, update, block, name)
                W += update.weight / total * SCALES[update.site] * B @ A
            u, s, vt = np.linalg.svd(W, full_matrices=False)
            best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
            assert relative(product(state.theta, block, name), best) < 1e-12
            if len(held) > 1:
                assert relative(padded_average(before, held, block, name), best) > 0.05


def test_flexlora_is_exact_where_the_ranks_together_are_at_most_r_and_the_padded_average_is_not() -> None:
    strategy, state = started(FlexLoRA)
    before, cohort = state.theta.clone(), cohort_of(1, ("low", "middle"))
    state = closed(strategy, state, cohort)
    for block, name in ((0, "q"), (1, "up")):
        W = sum(
            update.weight / 8.5 * SCALES[update.site] * B @ A
            for update in cohort
            for B, A in [own_factors(before, update, block, name)]
        )
        assert relative(product(state.theta, block, name), W) < 1e-12
        assert relative(padded_average(before, cohort, block, name), W) > 0.1


def test_what_flexlora_hands_to_a_site_is_the_nearest_that_its_rank_allows() -> None:
    strategy, state = started(FlexLoRA)
    state = closed(strategy, state, cohort_of(1, ROUNDS[0]))
    for site, shape in SHAPES.items():
        start = shape.start(state.theta)
        assert shape.beyond(start) is None
        for block, name in LAYERS:
            B, A = start[layer(block, name, "B")].numpy(), start[layer(block, name, "A")].numpy()
            if site not in HOLDERS[name]:
                assert not B.any()
                assert not A.any()
                continue
            u, s, vt = np.linalg.svd(product(state.theta, block, name), full_matrices=False)
            best = (u[:, : RANKS[site]] * s[: RANKS[site]]) @ vt[: RANKS[site]]
            assert relative(SCALES[site] * B @ A, best) < 1e-12


def test_flexlora_filled_up_is_the_old_product_and_the_mean_of_what_the_parts_changed() -> None:
    strategy = FlexLoRA(FlexLoRA.Options(fill=True))
    strategy.shapes = SHAPES
    state = strategy.init(initial())
    for number, sites in enumerate(ROUNDS, start=1):
        before, cohort = state.theta.clone(), cohort_of(number, sites)
        state = closed(strategy, state, cohort)
        for block, name in LAYERS:
            held = [update for update in cohort if update.site in HOLDERS[name]]
            if not held:
                continue
            W, total = product(before, block, name), sum(update.weight for update in held)
            for update in held:
                B, A = own_factors(before, update, block, name)
                dB, dA = (update.delta[layer(block, name, letter)].numpy() for letter in "BA")
                r = RANKS[update.site]
                was = (B - dB[:, :r]) @ (A - dA[:r])
                W = W + update.weight / total * SCALES[update.site] * (B @ A - was)
            u, s, vt = np.linalg.svd(W, full_matrices=False)
            best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
            assert relative(product(state.theta, block, name), best) < 1e-11


def test_a_module_that_one_site_holds_is_not_worn_away_by_those_that_do_not() -> None:
    strategy, state = started(FlexLoRA)
    before, cohort = state.theta.clone(), cohort_of(1, ("low", "part"))
    state = closed(strategy, state, cohort)
    B, A = own_factors(before, cohort[1], 1, "lone")
    assert relative(product(state.theta, 1, "lone"), SCALES["part"] * B @ A) < 1e-12


def test_hetlora_is_the_padded_average_weighed_by_the_norms_of_the_products() -> None:
    strategy, state = started(HetLoRA)
    for number, sites in enumerate(ROUNDS, start=1):
        before, cohort = state.theta.clone(), cohort_of(number, sites)
        state = closed(strategy, state, cohort)
        for block, name in LAYERS:
            held = [update for update in cohort if update.site in HOLDERS[name]]
            B, A = (before[layer(block, name, letter)].numpy().copy() for letter in "BA")
            if held:
                most = max(RANKS[update.site] for update in held)
                B[:, :most], A[:most] = 0, 0
                parts = [(u.site, *own_factors(before, u, block, name)) for u in held]
                norms = [np.linalg.norm(SCALES[site] * own_b @ own_a) for site, own_b, own_a in parts]
                for (site, own_b, own_a), norm in zip(parts, norms, strict=True):
                    share = norm / sum(norms)
                    B[:, : RANKS[site]] += share * SCALES[site] / SCALE * own_b
                    A[: RANKS[site]] += share * own_a
            np.testing.assert_allclose(state.theta[layer(block, name, "B")].numpy(), B, rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(state.theta[layer(block, name, "A")].numpy(), A, rtol=1e-11, atol=1e-12)
            if len(held) > 1:
                assert relative(padded_average(before, held, block, name), product(state.theta, block, name)) > 0.01


def test_hetlora_keeps_what_no_site_of_the_round_holds_and_all_while_there_is_no_product() -> None:
    strategy, state = started(HetLoRA)
    before = state.theta.clone()
    after = closed(strategy, state, cohort_of(1, ("low", "middle"))).theta
    for name in (layer(0, "q", "A"), layer(1, "up", "A")):
        assert torch.equal(after[name][2:], before[name][2:])
        assert not torch.equal(after[name][:2], before[name][:2])
    strategy, state = started(HetLoRA)
    for name, tensor in state.theta.items():
        if "lora_B" in name:
            tensor.zero_()
    before, cohort = state.theta.clone(), cohort_of(1, ROUNDS[0])
    for update in cohort:
        for tensor in update.delta.values():
            tensor.zero_()
    assert closed(strategy, state, cohort).theta.digest() == before.digest()


@pytest.mark.parametrize(("kind", "options"), [(FlexLoRA, {}), (FlexLoRA, {"fill": True}), (HetLoRA, {})])
def test_a_site_that_is_named_but_holds_all_changes_no_bit(kind: type[PairsStrategy], options: dict[str, Any]) -> None:
    everything = shapes_of(AdapterSpec(r=RANK, budget={"whole": 1.0}), THETA)
    cohort = cohort_of(1, ("whole",))
    digests = set()
    for shapes in ({}, everything):
        strategy = kind(kind.Options(**options))
        strategy.shapes = shapes
        digests.add(closed(strategy, strategy.init(initial()), cohort).theta.digest())
    assert len(digests) == 1


# --- whole runs ---------------------------------------------------------------------------------------------------

ADAPTER: dict[str, Any] = {
    "r": 4,
    "alpha": 8,
    "dropout": 0.1,
    "sites": {"south": {"r": 2, "alpha": 6, "targets": ["q_proj", "down_proj"]}},
    "budget": {"west": 0.125},
}
ROWS = {"north": 20, "south": 14, "west": 8}


@pytest.fixture
def mixed(make_recipe: MakeRecipe) -> MakeRecipe:
    """A recipe with a site that holds all, one of rank 2 in two modules, and one whose budget leaves it one block."""

    def make(strategy: str = "flexlora", **sections: Any) -> Recipe:
        federation = {"rounds": 2, "strategy": strategy, **sections.pop("federation", {})}
        recipe = make_recipe(federation=federation, **sections)
        model = {**recipe.model.model_dump(), "adapter": ADAPTER}
        return Recipe.model_validate({**recipe.model_dump(), "model": model})

    return make


def adapter_in(folder: Path) -> dict[str, Tensor]:
    return {
        name.replace(".weight", ".default.weight"): tensor.double()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }


def by_hand(recipe: Recipe, bench: Bench, site: str, alpha: float, shape: Shape) -> tuple[dict[str, Tensor], int]:
    """What a site's real peft model of its own shape is after round 1, and its examples."""
    import peft

    base = load_base(recipe.model, CPU)
    config = peft.LoraConfig(
        r=shape.rank,
        lora_alpha=alpha,
        lora_dropout=0.1,
        target_modules=[module.removeprefix("base_model.model.") for module in sorted(shape.modules)],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base.model, config)
    trainables = Trainables(model)
    for name, tensor in trainables.values.items():
        tensor.copy_(shape.part(name, bench.theta[name]))  # B is zero: its scale does not matter yet
    task = LocalWork(
        bench.sites[site].train,
        recipe.training,
        lr=recipe.training.lr,
        steps=-(-ROWS[site] // 4),
        seed=derive_seed(0, "work", site, 1),
    )
    SupervisedFineTuning().work(Participant(LanguageModel(model), trainables), task)
    return {name: tensor.detach().double().clone() for name, tensor in trainables.values.items()}, ROWS[site]


def test_a_run_of_three_shapes_is_what_three_peft_models_and_a_dense_svd_give(
    mixed: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = mixed(federation={"rounds": 1}, training={"schedule": "constant"})
    metrics = run(recipe, tmp_path / "run", listeners=(Progress(quiet=False).listen,))
    bench = build_bench(recipe)
    found, pairs = adapter_in(tmp_path / "run" / "adapter"), matrices(bench.theta.layout)
    shapes = {**bench.shapes, "north": shapes_of(AdapterSpec(r=4, budget={"n": 1.0}), bench.theta.layout)["n"]}
    alphas = {"north": 8.0, "south": 6.0, "west": 2.0}
    ranks = {"north": 4, "south": 2, "west": 1}
    sites = {site: by_hand(recipe, bench, site, alphas[site], shapes[site]) for site in ROWS}
    moved = 0
    for name_a, name_b in pairs.values():
        held = {site: (values, rows) for site, (values, rows) in sites.items() if name_a in values}
        total = sum(rows for _, rows in held.values())
        W = sum(
            rows / total * alphas[site] / ranks[site] * values[name_b] @ values[name_a]
            for site, (values, rows) in held.items()
        )
        assert isinstance(W, Tensor)
        u, s, vt = torch.linalg.svd(W, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vt[:4]
        got = 8 / 4 * found[name_b] @ found[name_a]
        assert torch.linalg.matrix_norm(got - best) < 1e-4 * torch.linalg.matrix_norm(best)
        moved += len(held) == 3
    assert moved == 2  # the last block's q_proj and down_proj are everybody's
    whole = bench.theta.layout.num_bytes
    sizes = {site: shape.layout.num_bytes for site, shape in shapes.items()}
    assert sizes["west"] <= 0.125 * whole
    assert sizes["south"] < 0.5 * whole
    assert sizes["north"] == whole
    assert metrics["bytes"]["up"] == metrics["bytes"]["down"] == sum(sizes.values())
    assert metrics["parts"]["west"] == {
        "r": 1,
        "scale": 2.0,
        "modules": 7,
        "of_modules": 14,
        "parameters": sizes["west"] // 4,
        "bytes": sizes["west"],
    }
    assert set(metrics["parts"]) == {"south", "west"}
    words = parts_in_words(metrics["parts"])
    assert words == ["south: rank 2, 4 of 14 modules", "west: rank 1, 7 of 14 modules"]
    assert "; ".join(words) in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert parts_in_words(metrics["parts"], shown=1) == [words[0], "and 1 more"]
    assert "\n".join(words) in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["flexlora", "hetlora"])
def test_a_run_of_three_shapes_learns_and_its_adapter_is_opened_like_any_other(
    mixed: MakeRecipe, tmp_path: Path, strategy: str
) -> None:
    recipe = mixed(strategy, federation={"rounds": 3}, evaluation={"controls": ["base", "local"]})
    metrics = run(recipe, tmp_path / "run")
    assert metrics["arms"]["federated"]["macro_loss"] < metrics["arms"]["base"]["macro_loss"] - 0.01
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 4
    found = score(open_result(tmp_path / "run", [], round=None, base=False), exact_match=False)
    for site, summary in metrics["arms"]["federated"]["sites"].items():
        assert found[site]["loss"] == pytest.approx(summary["loss"], rel=1e-5)


def test_any_number_of_workers_gives_the_same_bits(mixed: MakeRecipe, tmp_path: Path) -> None:
    recipes = [mixed("hetlora", federation={"rounds": 1}, engine={"workers": workers}) for workers in (1, 2)]
    digests = {run(recipe, tmp_path / str(k))["adapter"]["digest"] for k, recipe in enumerate(recipes)}
    assert len(digests) == 1


def test_a_site_alone_trains_its_own_part_at_its_own_scale(mixed: MakeRecipe, tmp_path: Path) -> None:
    """With plain SGD a round of the local control arm does the very steps of the federated one."""
    training = {"optimizer": "sgd", "lr": 0.3, "schedule": "constant"}
    recipe = mixed(federation={"rounds": 1}, training=training, evaluation={"controls": ["local"]})
    run(recipe, tmp_path / "run")
    bench = build_bench(recipe)
    for place, site in enumerate(bench.sites):
        kept = tmp_path / "run" / "controls" / "local" / f"{place:03d}" / "chain.safetensors"
        theta = read_tensors(kept, bench.theta.layout)["theta"]
        delta = NamedTensors.zeros(bench.theta.layout)
        task = TrainTask(1, site, 0.3, -(-ROWS[site] // 4))
        TaskWork(bench, tmp_path, lambda _: None).train(task, {"theta": bench.theta}, delta, {})
        start = bench.shapes[site].start(bench.theta) if site in bench.shapes else bench.theta
        for name, tensor in delta.items():
            torch.testing.assert_close(theta[name], start[name] + tensor, rtol=1e-6, atol=1e-7)
        assert any(tensor.any() for tensor in delta.values())


class Reckless(SupervisedFineTuning):
    """An objective that moves every value, gradient or not."""

    def work(self, participant: Participant, task: LocalWork) -> Any:
        result = super().work(participant, task)
        for flat in participant.trainables.values.flats.values():
            flat.add_(1e-3)
        return result


def test_an_objective_that_goes_beyond_a_sites_part_is_refused(mixed: MakeRecipe, tmp_path: Path) -> None:
    bench = build_bench(mixed(training={"objective": "tests.unit.test_site_shapes:Reckless"}))
    work, delta = TaskWork(bench, tmp_path, lambda _: None), NamedTensors.zeros(bench.theta.layout)
    work.train(TrainTask(1, "north", 0.01, 1), {"theta": bench.theta}, delta, {})
    with pytest.raises(SiteError, match="beyond the part that site 'south' holds"):
        work.train(TrainTask(1, "south", 0.01, 1), {"theta": bench.theta}, delta, {})


def test_a_strategy_for_one_shape_refuses_the_recipe_before_anything_is_loaded(
    mixed: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(CommonweightError, match="does not go with sites of different shapes") as refused:
        run(mixed("fedavg"), tmp_path / "run")
    assert "flexlora or hetlora" in str(refused.value.hint)


# --- over a network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FlexLoRA, HetLoRA])
def test_parts_in_files_give_the_bits_of_whole_tensors_in_memory(kind: type[PairsStrategy], tmp_path: Path) -> None:
    chunk_bytes, files = 1024, FrameFiles(Blobs(str(tmp_path / "blobs"), tmp_path / "cache"), tmp_path / "scratch", "r")
    strategy, state = started(kind)
    initial = files.write({"theta": state.theta}, Plan(THETA, (Channel("theta"),), chunk_bytes))
    leads = kind()
    leads.shapes = SHAPES
    stored = StoredModel(leads, files, initial.digest)
    stored.first()
    for number, sites in enumerate(ROUNDS, start=1):
        cohort = cohort_of(number, sites)
        stored.open()
        for update in cohort:
            shape = SHAPES.get(update.site)
            channels = {"delta": update.delta if shape is None else shape.own(update.delta)}
            plan, path = Plan(channels["delta"].layout, (Channel("delta"),), chunk_bytes), tmp_path / update.site
            with SealedFile(path, bytes(32), chunk_bytes) as sealed:
                for piece in plan.pieces:
                    sealed.write(piece.index, piece_of(channels, piece))
            frame = frame_of(channels, plan)
            stored.fold(
                StoredUpdate(update.site, number, {}, update.weight, 1, 1, 1, frame=frame, path=path, key=bytes(32))
            )
        state = closed(strategy, state, cohort)
        stored.close(number)
        assert stored.digest() == state.theta.digest()


def test_a_coordinator_and_a_sites_policy_know_from_the_job_what_the_site_sends(mixed: MakeRecipe) -> None:
    recipe = mixed(federation={"rounds": 1})
    bench = build_bench(recipe)
    plan = RunPlan.of(job_of(recipe, bench), ["flexlora"])
    plan.check_initial()
    assert plan.update_layout("north") == bench.theta.layout
    for site, shape in bench.shapes.items():
        assert plan.update_layout(site) == shape.layout
        assert plan.parts[site] == shape.facts(bench.theta.layout)
        frame = frame_of({"delta": bench.theta}, Plan(bench.theta.layout, (Channel("delta"),), 1024))
        with pytest.raises(Refused) as refused:
            check_frame(frame, plan.update_layout(site), ("delta",))
        assert refused.value.code is Refusal.WRONG_SHAPE
        initial = plan.initial.header
        facts = JobFacts.of(
            recipe,
            run="r",
            kind="train",
            purpose="",
            signer="lena",
            signer_key="",
            signer_role="lead",
            must_match={},
            initial=initial,
            num_sites=3,
            site=site,
        )
        assert facts.update_bytes == shape.layout.num_bytes


def job_of(recipe: Recipe, bench: Bench) -> pb.Job:
    frame = frame_of({"theta": bench.theta}, Plan(bench.theta.layout, (Channel("theta"),), 1024))
    return pb.Job(id="run-1", recipe=recipe_text(recipe), must_match=handshake(bench), initial=frame.header)


def test_a_networked_site_sends_its_part_with_the_bits_of_the_in_process_engine(
    mixed: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    """The recipe names a site as it is enrolled; in its own rows it may be called something else."""
    recipe = mixed(federation={"rounds": 1})
    bench, adapter = build_bench(recipe), recipe.model.adapter
    enrolled = adapter.model_copy(update={"sites": {"clinic": adapter.sites["south"]}, "budget": {"south": 0.01}})
    networked = recipe.model_copy(update={"model": recipe.model.model_copy(update={"adapter": enrolled})})
    values = {
        "name": "clinic",
        "address": "localhost:1",
        "data": {"path": str(small_data), "partition": "south"},
        "device": "cpu",
        "threads": 1,
    }
    workshop = RecipeWorkshop(SiteSettings.model_validate(values), tmp_path / "site")
    workshop.join(job_of(networked, bench))
    task, delta = TrainTask(1, "south", 0.01, 3), NamedTensors.zeros(bench.theta.layout)
    TaskWork(bench, tmp_path, lambda _: None).train(task, {"theta": bench.theta}, delta, {})
    work = workshop.train("run-1", TrainTask(1, "clinic", 0.01, 3), {"theta": bench.theta})
    shape = bench.shapes["south"]
    assert work.channels["delta"].layout == shape.layout
    assert work.channels["delta"].digest() == shape.own(delta).digest()
    chain = ChainTask("k", "local", ("clinic",), ((1, 0.01, 2),), ("clinic",), (), "controls/local/000")
    alone = workshop.answer("run-1", chain, {"theta": bench.theta})
    here = TaskWork(bench, tmp_path, lambda _: None).chain(replace(chain, sites=("south",), own=("south",)))
    assert alone["final"]["clinic"] == here["final"]["south"]


def test_a_lead_refuses_parts_of_sites_that_are_not_asked(mixed: MakeRecipe) -> None:
    identity: Any = SimpleNamespace()  # refused before anything is signed
    for sites, option in ((["north", "west"], "sites"), (["north", "south"], "budget")):
        with pytest.raises(RecipeError, match=rf"model\.adapter\.{option} names"):
            prepare(mixed(), identity, sites=sites)

"""Base models and adapters: every kind trains, is saved and opened again; what cannot be used is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

from commonweight.engines.bench import build_bench
from commonweight.errors import CommonweightError, ModelError, RecipeError
from commonweight.model.adapters import adapter_off, attach_adapter, is_adapter, save_adapter
from commonweight.model.base import (
    Base,
    choose_device,
    load_base,
    load_tokenizer,
    load_weights,
    tokenizer_digest,
    weights_digest,
)
from commonweight.model.trainables import Trainables
from commonweight.recipe import Recipe
from commonweight.recipe.schema import AdapterSpec, ModelSpec, TrainingSpec
from commonweight.train.local import make_optimizer
from tests.unit.tiny_models import CPU, MODELS, VOCABULARY, base_of, tiny
from tests.unit.tiny_tokenizers import CHATML, bpe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

KINDS = ("lora", "dora", "rslora", "ia3", "prompt", "prefix", "p-tuning", "full")
IDS = torch.tensor([[2, 9, 4, 30, 7, 60, 3, 11]])


def spec_of(kind: str, **options: Any) -> AdapterSpec:
    return AdapterSpec(**({"kind": kind, "r": 2, "alpha": 4, "virtual_tokens": 3} | options))


def logits_of(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits[:, -IDS.shape[1] :]
    return found


def train_one_step(model: Any) -> Trainables:
    trainables = Trainables(model)
    optimizer = make_optimizer(trainables, TrainingSpec(lr=0.05))
    logits = model(input_ids=IDS).logits[0, -IDS.shape[1] :]
    functional.cross_entropy(logits[:-1], IDS[0, 1:]).backward()
    optimizer.step()
    return trainables


def saved_model(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    """A model folder in transformers layout."""
    tokenizer = bpe() if tokenizer is None else tokenizer
    model = tiny(dtype=torch.float32, vocab_size=len(bpe())) if model is None else model
    model.save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path | str, **options: Any) -> Base:
    return load_base(ModelSpec(name=str(folder), **options), CPU)


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# --- adapters ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "conv1d"])
def test_every_kind_trains_and_opens_again_with_the_same_logits(name: str, kind: str, tmp_path: Path) -> None:
    base = base_of(tiny(name, dtype=torch.float32))
    model = attach_adapter(base, spec_of(kind), seed=1)
    before = logits_of(model)
    train_one_step(model)
    after = logits_of(model)
    assert not torch.allclose(before, after, atol=1e-4)
    save_adapter(model, None, tmp_path)
    if kind == "full":
        opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        from peft import PeftModel

        opened = PeftModel.from_pretrained(tiny(name, dtype=torch.float32), tmp_path)
    torch.testing.assert_close(logits_of(opened), after)
    assert is_adapter(model) == (kind != "full")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("llama", "conv1d")])
def test_lora_goes_onto_every_architecture(name: str) -> None:
    model = attach_adapter(base_of(tiny(name, dtype=torch.float32)), spec_of("lora"), seed=1)
    before = logits_of(model)
    train_one_step(model)
    assert not torch.allclose(logits_of(model), before, atol=1e-4)


@pytest.mark.parametrize(("kind", "scale", "decomposed"), [("lora", 2, 0), ("rslora", 8 / 2, 0), ("dora", 2, 14)])
def test_lora_dora_and_rslora_are_what_they_say(kind: str, scale: float, decomposed: int) -> None:
    model = attach_adapter(base_of(tiny()), spec_of(kind, r=4, alpha=8, dropout=0.25), seed=1)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == scale
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.lora_A["default"].weight.shape == (4, 32)
    assert sum("magnitude" in name for name, _ in model.named_parameters()) == decomposed


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_depend_on_the_seed_alone(kind: str) -> None:
    found = []
    for seed, disturb in ((5, 1), (5, 2), (6, 1)):
        base = base_of(tiny())
        torch.manual_seed(disturb)
        state = torch.random.get_rng_state()
        found.append(Trainables(attach_adapter(base, spec_of(kind), seed=seed)).values.digest())
        assert torch.equal(torch.random.get_rng_state(), state)
    assert found[0] == found[1]
    assert (found[0] != found[2]) == (kind not in ("full", "ia3"))  # these begin with the base's values, and with ones


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_off_leaves_the_base(kind: str) -> None:
    base = base_of(tiny())
    expected = logits_of(base.model)
    model = attach_adapter(base, spec_of(kind), seed=1)
    if kind in ("lora", "dora", "rslora", "ia3", "full"):
        torch.testing.assert_close(logits_of(model), expected)
    train_one_step(model)
    with adapter_off(model):
        assert torch.allclose(logits_of(model), expected) == (kind != "full")
    assert not torch.allclose(logits_of(model), expected)


@pytest.mark.parametrize(
    ("targets", "trained"),
    [("all-linear", 14), ("auto", 4), (["q_proj"], 2), (["model.layers.0.mlp.up_proj"], 1)],
)
def test_targets_choose_the_modules(targets: Any, trained: int) -> None:
    model = attach_adapter(base_of(tiny()), spec_of("lora", targets=targets), seed=1)
    assert sum(name.endswith("lora_B.default.weight") for name, _ in model.named_parameters()) == trained
    assert not any("lm_head" in name for name in Trainables(model).values)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_prj"], "did you mean 'q_proj'?"),
        (["q_proj", "nonsense"], "down_proj, gate_proj, k_proj"),
        (["input_layernorm"], "down_proj, gate_proj, k_proj"),
        ([], "down_proj, gate_proj, k_proj"),
    ],
)
def test_targets_that_are_not_there_are_refused_and_names_suggested(targets: list[str], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        attach_adapter(base_of(tiny()), spec_of("lora", targets=targets), seed=1)
    assert said in caught.value.hint
    is_one_sentence(caught.value)


# --- trainables ---


@pytest.mark.parametrize("kind", ["lora", "full", "p-tuning"])
def test_trainables_are_views_of_flat_memory_and_stay_so(kind: str) -> None:
    model = attach_adapter(base_of(tiny()), spec_of(kind), seed=1)
    before = logits_of(model)
    trainables = train_one_step(model)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert list(trainables.values) == sorted(parameters)
    assert trainables.num_parameters == sum(p.numel() for p in parameters.values())
    for name, parameter in parameters.items():
        assert parameter.data_ptr() == trainables.values[name].data_ptr()
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == trainables.gradients[name].data_ptr()
    assert any(flat.any() for flat in trainables.gradients.flats.values())
    trainables.zero_gradients()
    assert not any(bool(parameter.grad.any()) for parameter in parameters.values() if parameter.grad is not None)
    for flat in trainables.values.flats.values():
        flat.mul_(1.5).add_(0.01)
    assert not torch.allclose(logits_of(model), before)


def test_gradients_of_several_passes_add_up() -> None:
    model = attach_adapter(base_of(tiny()), spec_of("lora"), seed=1)
    trainables = Trainables(model)
    found = []
    for _ in range(2):
        functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:]).backward()
        found.append(trainables.gradients.clone())
    for dtype, flat in found[1].flats.items():
        torch.testing.assert_close(flat, 2 * found[0].flats[dtype])


def test_tied_weights_stay_one_tensor() -> None:
    model = attach_adapter(base_of(tiny()), spec_of("full"), seed=1)
    trainables = Trainables(model)
    assert "lm_head.weight" not in trainables.values
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == trainables.values["model.embed_tokens.weight"].data_ptr()


def test_a_model_without_trainables_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing in the model is trainable"):
        Trainables(tiny().requires_grad_(False))


# --- digests ---


def test_the_weights_digest_changes_with_one_weight() -> None:
    first, second = tiny(), tiny()
    assert weights_digest(first) == weights_digest(second)
    with torch.no_grad():
        second.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert weights_digest(first) != weights_digest(second)
    assert weights_digest(first) != weights_digest(tiny(dtype=torch.float32))


def test_the_tokenizer_digest_changes_with_the_rules_the_special_tokens_and_the_chat_template() -> None:
    variants = [bpe(), bpe(bos=False), bpe(chat=CHATML), bpe(chat=CHATML + " "), bpe(eos="<|end|>"), bpe(eos=None)]
    assert len({tokenizer_digest(tokenizer) for tokenizer in variants}) == len(variants)


def test_the_tokenizer_digest_survives_saving_and_use(tmp_path: Path) -> None:
    tokenizer = bpe(chat=CHATML)
    tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    before = tokenizer_digest(opened)
    opened(["a", "some words"])
    assert tokenizer_digest(tokenizer) == before == tokenizer_digest(opened)


def test_a_runs_base_digest_is_of_the_base_whatever_the_adapter(make_recipe: Callable[..., Recipe]) -> None:
    digests, thetas = set(), set()
    for kind, seed in (("lora", 0), ("lora", 1), ("ia3", 0), ("full", 0)):
        bench = build_bench(make_recipe(model={"adapter": {"kind": kind}}, seed=seed))
        digests.add(bench.base_digest)
        thetas.add(bench.theta.digest())
    assert len(digests) == 1
    assert len(thetas) == 4
    assert digests == {weights_digest(load_base(make_recipe().model, CPU).model)}


# --- loading ---


def test_a_loaded_base_is_frozen_and_ready(small_model: Path) -> None:
    base = load(small_model)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert base.context == 128
    assert base.num_parameters == sum(p.numel() for p in base.model.parameters())
    assert {p.dtype for p in load(small_model, dtype="bfloat16").model.parameters()} == {torch.bfloat16}


def test_a_tokenizer_may_come_from_elsewhere(small_model: Path, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", tokenizer=False)
    base = load(folder, tokenizer=str(small_model))
    assert tokenizer_digest(base.tokenizer) == tokenizer_digest(load_tokenizer(ModelSpec(name=str(small_model))))


def test_a_tokenizer_without_a_pad_token_will_do(make_recipe: Callable[..., Recipe]) -> None:
    bench = build_bench(make_recipe())
    assert bench.base.tokenizer.pad_token_id is None
    assert bench.sites["north"].train.num_label_tokens > 0


def test_untied_and_tied_weights_load_whole(tmp_path: Path) -> None:
    for name in MODELS:
        model = tiny(name, dtype=torch.float32, vocab_size=len(bpe()))
        loaded = load(saved_model(tmp_path / name.replace(" ", "-"), model)).model
        torch.testing.assert_close(logits_of(loaded), logits_of(model))


def is_one_sentence(error: CommonweightError) -> None:
    """What a person reads: a message and a hint, each one line, no trace of another library's way of speaking."""
    for text in (error.message, error.hint):
        assert text
        assert "\n" not in text
        assert len(text) < 320
        assert not text.endswith(".")
        assert "<class" not in text
        assert "trust_remote_code" not in text
        assert ". " not in text.replace("…", "")


def damaged(name: str, folder: Path) -> ModelSpec:
    """A model that cannot be used, in one of many ways."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    shape: dict[str, Any] = {"vocab_size": len(bpe()), "max_position_embeddings": 64}
    match name:
        case "no folder":
            return ModelSpec(name=str(folder / "nowhere"))
        case "no relative folder":
            return ModelSpec(name="./nowhere")
        case "no tokenizer":
            saved_model(folder, tokenizer=False)
        case "no config":
            saved_model(folder)
            config.unlink()
        case "broken config":
            saved_model(folder)
            config.write_text("{")
        case "unknown type":
            saved_model(folder)
            rewrite(config, lambda c: c.update(model_type="mystery"))
        case "no weights":
            saved_model(folder)
            weights.unlink()
        case "cut weights":
            saved_model(folder)
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "cut header":
            saved_model(folder)
            weights.write_bytes(weights.read_bytes()[:100])
        case "a weight missing" | "a weight of another shape":
            saved_model(folder)
            tensors = load_file(weights)
            lost = tensors.pop("model.layers.0.mlp.up_proj.weight")
            if name != "a weight missing":
                tensors["model.layers.0.mlp.up_proj.weight"] = lost[:-1].contiguous()
            save_file(tensors, weights, metadata={"format": "pt"})
        case "encoder by type":
            sizes = {"dim": 32, "hidden_dim": 40, "n_layers": 1, "n_heads": 2}
            saved_model(folder, DistilBertForMaskedLM(DistilBertConfig(**shape, **sizes)))
        case "encoder by deed":
            sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
            saved_model(folder, BertForMaskedLM(BertConfig(**shape, **sizes)))
        case "large tokenizer":
            saved_model(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.add_tokens(["<one>", "<two>"])
            tokenizer.save_pretrained(folder)
        case "code":
            saved_model(folder)
            classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
            rewrite(config, lambda c: c.update(model_type="mystery", auto_map=classes))
            (folder / "code.py").write_text("raise SystemExit('the code ran')")
        case "tokenizer's code":
            saved_model(folder)
            rewrite(
                folder / "tokenizer_config.json",
                lambda c: c.update(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["code.Mine", None]}),
            )
            (folder / "code.py").write_text("raise SystemExit('the code ran')")
        case "adapter":
            save_adapter(attach_adapter(base_of(tiny()), spec_of("lora"), seed=0), None, folder)
        case "quantization":
            return ModelSpec(name=str(saved_model(folder)), quantization="4bit")
        case _:
            raise AssertionError(name)
    return ModelSpec(name=str(folder))


@pytest.mark.parametrize(
    ("name", "said", "advice"),
    [
        ("no folder", "there is no model folder .*nowhere", "model.name"),
        ("no relative folder", "there is no model folder ./nowhere", "model.name"),
        ("no tokenizer", "no tokenizer could be loaded", "tokenizer.json"),
        ("no config", "could not be loaded", "config.json"),
        ("broken config", "not a valid JSON", "config.json"),
        ("unknown type", "mystery", "config.json"),
        ("no weights", "no file named model.safetensors", "model.safetensors"),
        ("cut weights", "weights .* damaged", "copy the model again"),
        ("cut header", "weights .* damaged", "copy the model again"),
        ("a weight missing", "lack the weights model.layers.0.mlp.up_proj.weight", "copy the model again"),
        ("a weight of another shape", "another shape of the weights model.layers.0", "copy the model again"),
        ("encoder by type", "type distilbert, which is no causal language model", "predicts the next token"),
        ("encoder by deed", "no causal language model: its tokens see", "predicts the next token"),
        ("large tokenizer", "tokenizer has 326 tokens, .* embeddings for 324", "belongs to the model"),
        ("code", "Python code of its own, which is never run", "transformers itself"),
        ("tokenizer's code", "Python code of its own, which is never run", "transformers itself"),
        ("adapter", "holds an adapter, not a model", "export --merge"),
        ("quantization", "4bit needs a CUDA GPU", "quantization: none"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_in_a_sentence(
    name: str, said: str, advice: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = damaged(name, tmp_path)
    capfd.readouterr()
    with pytest.raises(ModelError, match=said) as caught:
        load_base(spec, CPU)
    assert advice in caught.value.hint
    is_one_sentence(caught.value)
    printed = capfd.readouterr()
    assert "LOAD REPORT" not in printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_a_hub_id_that_cannot_be_reached_is_said_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="could not be loaded") as caught:
        load(name)
    assert "hub" in caught.value.hint
    is_one_sentence(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="no CUDA GPU") as caught:
        choose_device("cuda")
    is_one_sentence(caught.value)
    assert choose_device("auto") == choose_device("cpu") == CPU


@pytest.mark.parametrize(("kind", "bound", "said"), [("lora", 129, "positions for 128"), ("prompt", 120, "adds 16")])
def test_more_tokens_than_the_model_has_positions_for_are_refused(
    kind: str, bound: int, said: str, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(training={"max_tokens": bound}, model={"adapter": {"kind": kind}})
    with pytest.raises(RecipeError, match=said) as caught:
        build_bench(recipe)
    assert f"at most {128 if kind == 'lora' else 112}" in caught.value.hint
    is_one_sentence(caught.value)


def test_weights_of_another_folder_load_by_the_same_rules(small_model: Path, tmp_path: Path) -> None:
    """What a `full` run saves is opened as a model is."""
    spec = ModelSpec(name=str(small_model))
    base = load(small_model)
    base.model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(load_weights(spec, str(tmp_path))), logits_of(base.model))
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ModelError, match="damaged"):
        load_weights(spec, str(tmp_path))


def test_known_architectures_load_without_the_code_beside_them(small_model: Path, tmp_path: Path) -> None:
    shutil.copytree(small_model, tmp_path, dirs_exist_ok=True)
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    rewrite(tmp_path / "config.json", lambda c: c.update(auto_map=classes))
    (tmp_path / "code.py").write_text("raise SystemExit('the code ran')")
    assert type(load(tmp_path).model).__name__ == "LlamaForCausalLM"
    assert VOCABULARY < 324

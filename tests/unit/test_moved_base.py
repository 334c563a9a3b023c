"""A base that is added to: layers of both layouts, what stays as it was loaded, and who sees what was added."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from commonweight.errors import ModelError
from commonweight.model.adapters import adapter_off, attach_adapter
from commonweight.model.moved_base import MovedBase
from commonweight.recipe.schema import AdapterSpec
from tests.unit.tiny_models import base_of, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

IDS = torch.tensor([[0, 9, 4, 30, 7, 60, 3, 11]])
S = 2.0  # α/r


def adapted(name: str, dtype: torch.dtype = torch.float64, **adapter: Any) -> Any:
    return attach_adapter(base_of(tiny(name, dtype=dtype)), AdapterSpec(**({"r": 2, "alpha": 4} | adapter)), seed=1)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits.double()
    return found


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers_of(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {f"{n}.default": m.get_base_layer() for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def residual_for(model: Any, seed: int, scale: float = 0.02) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of rank 3 for every layer, float32, as a run keeps them."""
    found = {}
    for k, (name, layer) in enumerate(layers_of(model).items()):
        out, inner = layer.weight.shape if isinstance(layer, torch.nn.Linear) else reversed(layer.weight.shape)
        found[name] = (scale * drawn(seed + 2 * k, out, 3).float(), drawn(seed + 2 * k + 1, 3, inner).float())
    return found


def densely(name: str, residuals: list[dict[str, tuple[Tensor, Tensor]]]) -> Any:
    """A model without an adapter, to whose weights s·BA was added by hand."""
    plain = tiny(name)
    weights = dict(plain.named_parameters())
    for residual in residuals:
        for module, (B, A) in residual.items():
            change = S * B.double() @ A.double()
            with torch.no_grad():
                weight = weights[module.removeprefix("base_model.model.").removesuffix(".default") + ".weight"]
                weight += change.T if name == "conv1d" else change
    return plain


@pytest.mark.parametrize("name", ["llama", "conv1d"])
def test_what_is_added_is_the_product_times_the_adapters_scale_in_layers_of_both_layouts(name: str) -> None:
    model = adapted(name)
    sizes = {tuple(layer.weight.shape) for layer in layers_of(model).values()}
    assert any(rows != columns for rows, columns in sizes)
    loaded = logits_of(model)
    moved = MovedBase(model)
    assert torch.equal(logits_of(model), loaded)
    residuals = [residual_for(model, 0), residual_for(model, 500)]
    for count, residual in enumerate(residuals, start=1):
        moved.add(residual)
        found = logits_of(model)
        torch.testing.assert_close(found, logits_of(densely(name, residuals[:count])), rtol=1e-10, atol=1e-10)
    assert (found - loaded).abs().max() > 0.05


def test_a_layer_may_be_left_out() -> None:
    model = adapted("llama")
    residual = residual_for(model, 0)
    some = dict(list(residual.items())[::2])
    MovedBase(model).add(some)
    torch.testing.assert_close(logits_of(model), logits_of(densely("llama", [some])), rtol=1e-10, atol=1e-10)


def test_rslora_is_added_with_its_own_scale() -> None:
    one, other = adapted("llama"), adapted("llama", kind="rslora", r=4, alpha=4)  # 4/2 and 4/√4
    for model in (one, other):
        MovedBase(model).add(residual_for(model, 0))
    assert torch.equal(logits_of(one), logits_of(other))


def test_the_loaded_weights_keep_their_bits_and_can_be_gone_back_to() -> None:
    model = adapted("llama")
    layers = layers_of(model)
    loaded = {name: layer.weight for name, layer in layers.items()}
    bits = {name: weight.detach().clone() for name, weight in loaded.items()}
    before = logits_of(model)
    moved = MovedBase(model)
    moved.add(residual_for(model, 0))
    after = logits_of(model)
    with moved.as_loaded():
        assert torch.equal(logits_of(model), before)
        assert all(layer.weight is loaded[name] for name, layer in layers.items())
        with adapter_off(model):
            assert torch.equal(logits_of(model), before)
    with pytest.raises(RuntimeError, match="inside"), moved.as_loaded():
        raise RuntimeError("inside")
    assert torch.equal(logits_of(model), after)
    assert all(torch.equal(loaded[name], bits[name]) for name in loaded)
    assert not any(layer.weight.requires_grad for layer in layers.values())


def test_an_output_layer_that_shares_the_embeddings_weight_moves_alone() -> None:
    model = adapted("llama", targets=["lm_head", "q_proj"])
    inner = model.get_base_model()
    embedding = inner.get_input_embeddings().weight
    assert inner.lm_head.base_layer.weight is embedding
    bits = embedding.detach().clone()
    MovedBase(model).add(residual_for(model, 0))
    assert inner.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, bits)
    assert not torch.equal(inner.lm_head.base_layer.weight, bits)


def test_narrow_weights_are_rounded_once_from_the_sum_of_all_that_was_added() -> None:
    model = adapted("llama", torch.bfloat16)
    layers = layers_of(model)
    loaded = {name: layer.weight.detach().double() for name, layer in layers.items()}
    moved = MovedBase(model)
    # each is less than half a unit in the last place of most weights: rounded one by one they would vanish
    residuals = [residual_for(model, 40 * k, scale=1e-5) for k in range(30)]
    for residual in residuals:
        moved.add(residual)
    for name, layer in layers.items():
        exact = loaded[name] + sum(S * r[name][0].double() @ r[name][1].double() for r in residuals)
        assert layer.weight.dtype == torch.bfloat16
        nearest = exact.bfloat16()
        assert (layer.weight != nearest).double().mean() < 0.01  # but for ties at float32's last bits
        assert (nearest != loaded[name]).double().mean() > 0.05


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks where there are any")
def test_what_one_process_adds_its_forks_see() -> None:
    torch.set_num_threads(1)
    model = adapted("llama", torch.float32)
    moved = MovedBase(model)
    ask, answer = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:  # a worker, forked before anything was added
        os.read(ask[0], 1)
        os.write(answer[1], logits_of(model).numpy().tobytes())
        os._exit(0)
    moved.add(residual_for(model, 0))
    os.write(ask[1], b"!")
    expected = logits_of(model).numpy().tobytes()
    seen = b""
    while len(seen) < len(expected):
        seen += os.read(answer[0], len(expected))
    os.waitpid(pid, 0)
    for end in (*ask, *answer):
        os.close(end)
    assert seen == expected


def test_the_same_residuals_give_the_same_bits() -> None:
    found = []
    for _ in range(2):
        model = adapted("conv1d", torch.float32)
        moved = MovedBase(model)
        for k in range(3):
            moved.add(residual_for(model, 100 * k))
        found.append(torch.cat([layer.weight.flatten() for layer in layers_of(model).values()]))
    assert torch.equal(*found)


def test_a_residual_of_another_model_is_refused_by_the_name_of_its_module() -> None:
    model = adapted("llama")
    moved = MovedBase(model)
    name, (B, A) = next(iter(residual_for(model, 0).items()))
    for module, factors, words in (
        ("model.nowhere.default", (B, A), "which has no such layer"),
        (name, (B[:-1], A), rf"a layer of \[{len(B) - 1}, 32\] does not fit this model, where it is \[{len(B)}, 32\]"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            moved.add({module: factors})
        assert module in caught.value.message
        assert caught.value.hint


def test_an_embedding_and_rounded_weights_are_refused() -> None:
    with pytest.raises(ModelError, match=r"nothing can be added to the weights of '.*embed_tokens', a Embedding"):
        MovedBase(adapted("untied", targets=["embed_tokens", "q_proj"]))
    model = adapted("llama")
    layer = next(iter(layers_of(model).values()))
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"a Linear of torch\.int8") as caught:
        MovedBase(model)
    assert "flexlora" in caught.value.hint

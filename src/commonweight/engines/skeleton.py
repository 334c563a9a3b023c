"""A recipe's model without its weights: shapes from the configuration alone, for figures that are wanted beforehand.

Nothing of the size of the model is allocated or read, so that a 7B model's figures take seconds on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..model.adapters import attach_adapter, freeze, is_adapter
from ..model.base import Base, bare_base, choose_device
from ..model.tensors import Layout
from ..model.trainables import has_part
from ..recipe.compatibility import personal_parts
from ..recipe.schema import Recipe
from ..train.batches import micro_batch_size
from ..train.loss import passing_through
from .bench import asked_by_strategy, check_context

#: bytes a weight of a quantized linear layer: 4 bits and its share of scales that are themselves quantized; 8 bits
_QUANTIZED = {"4bit": 0.516, "8bit": 1.0}


@dataclass(frozen=True)
class Skeleton:
    """What is known of a recipe's model before it is loaded.

    Args:
        device: that it would be loaded on.
        model: the adapter on its base, every parameter on the device `meta`.
        layout: of the global tensors.
        trained: of everything that a site trains, what it keeps to itself included.
        base_bytes: of the weights as they will be held.
        num_parameters: of the base.
    """

    recipe: Recipe
    device: torch.device
    model: Any
    layout: Layout
    trained: Layout
    base_bytes: int
    num_parameters: int

    @classmethod
    def of(cls, recipe: Recipe) -> Skeleton:
        """From the model's configuration.

        Raises:
            ModelError: there is no configuration, it is of no causal language model, or the adapter does not fit it.
            RecipeError: the recipe asks for more than the model has.
        """
        spec, device = recipe.model, choose_device(recipe.engine.device)
        base = bare_base(spec, device)
        check_context(recipe, base)
        base_bytes = _base_bytes(base, spec.quantization)
        model = attach_adapter(base, spec.adapter, seed=0)
        if recipe.training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        part = asked_by_strategy(recipe, "frozen", "")
        if part:
            freeze(model, part)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        own = personal_parts(recipe)
        shared = {name: p for name, p in trained.items() if not any(has_part(name, part) for part in own)}
        layout = Layout.of(shared)
        return cls(recipe, device, model, layout, Layout.of(trained), base_bytes, base.num_parameters)

    @cached_property
    def activation_bytes(self) -> int:
        """What the largest forward pass of a training step keeps for its backward pass, without the output layer,
        whose logits are formed in pieces: every tensor that autograd saves, found by a pass over tensors without
        contents."""
        spec = self.recipe.training
        ids = micro_batch_size(spec, self.device), spec.max_tokens
        kept = _saved(self.model, ids)
        if not spec.gradient_checkpointing:
            return kept
        # with checkpointing blocks keep their inputs, and one at a time everything
        self.model.gradient_checkpointing_disable()
        try:
            whole = _saved(self.model, ids)
        finally:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        blocks = max(1, getattr(self.model.config, "num_hidden_layers", 1))
        return kept + whole // blocks


def _base_bytes(base: Base, quantization: str) -> int:
    each = {id(p): p.numel() * p.element_size() for p in base.model.parameters()}
    if quantization != "none":
        head = base.model.get_output_embeddings()
        for module in base.model.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                each[id(module.weight)] = int(module.weight.numel() * _QUANTIZED[quantization])
    return sum(each.values())


def _saved(model: Any, size: tuple[int, int]) -> int:
    """Bytes of the tensors that a forward pass over [B, T] tokens saves, each memory once, parameters not."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[int, tuple[int, Tensor]] = {}
    training = model.training
    model.train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _without_contents(model), passing_through(_head(model)):
            known = {p.untyped_storage()._cdata for p in model.parameters()}

            def see(tensor: Tensor) -> Tensor:
                memory = tensor.untyped_storage()
                if memory._cdata not in known:
                    found[memory._cdata] = memory.nbytes(), tensor  # held, or its memory's name might be used again
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
                model(input_ids=torch.zeros(size, dtype=torch.long), use_cache=False)
    finally:
        model.train(training)
    return sum(num_bytes for num_bytes, _ in found.values())


@contextmanager
def _without_contents(model: Any) -> Iterator[None]:
    """Inside, parameters and buffers are the mode's tensors on the CPU, so that the pass takes the ways that it takes
    there; outside they are what they were."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                before.append((held, name, tensor))
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = (
                        torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, torch.nn.Parameter)
                        else empty
                    )
                held[name] = made[id(tensor)]
    try:
        yield
    finally:
        for held, name, tensor in before:
            held[name] = tensor


def _head(model: Any) -> Any:
    """The output layer."""
    return (model.get_base_model() if is_adapter(model) else model).get_output_embeddings()

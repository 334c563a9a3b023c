"""A base that rounds add to: the frozen weights under LoRA's pairs, moved by what an adapter cannot hold.

Each such layer computes with a weight of its own, which begins as a copy of the loaded one. The loaded weight is kept
and never written to: the base arm, the control arms and a resumed run start from it, and it is memory that forked
workers share as long as nobody writes there. The moved weight lies in memory that forks share for good: a residual is
added once, by the process that has it, and every worker computes with the same bits.

Legend: W a layer's weight, out × in (`Conv1D` of GPT-2 holds it as in × out); B (out × R) and A (R × in) a residual's
factors; s the adapter's scale, α/r or α/√r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from ..errors import ModelError
from .tensors import accumulator_dtype, shared_memory


@dataclass(frozen=True)
class _Layer:
    """One layer's weights.

    Args:
        loaded: the weight as it was loaded.
        moved: what the layer computes with.
        total: the moved weight in the accumulator's precision: itself, unless it is narrower than float32.
    """

    module: Module
    scale: float
    transposed: bool
    loaded: Parameter
    moved: Parameter
    total: Tensor


class MovedBase:
    """The layers under a model's LoRA pairs, by the name of the module and of the adapter in it (`….q_proj.default`).

    Beside the model this takes the memory of these layers' weights once more, and in float32 too if they are narrower.

    Raises:
        ModelError: the adapter has a pair on something else than a linear layer, or on rounded weights.
    """

    def __init__(self, model: Any) -> None:
        from peft.tuners.lora import LoraLayer

        self._layers = {
            f"{name}.{adapter}": _layer(name, module.get_base_layer(), module.scaling[adapter])
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
            for adapter in module.scaling
        }
        self._use("moved")

    def _use(self, which: str) -> None:
        for layer in self._layers.values():
            layer.module.weight = getattr(layer, which)

    @torch.no_grad()
    def add(self, residual: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """W ← W + s·BA for each module's (B, A). What was added before is summed in float32 and rounded once.

        Raises:
            ModelError: a module that is not there, or factors of another size.
        """
        for name, (B, A) in residual.items():
            layer = self._layers.get(name)
            size = None if layer is None else tuple(layer.total.T.shape if layer.transposed else layer.total.shape)
            if layer is None or size != (B.shape[0], A.shape[1]):
                raise ModelError(
                    f"a residual of {name!r} for a layer of {[B.shape[0], A.shape[1]]} does not fit this model"
                    + (f", where it is {list(size)}" if size else ", which has no such layer"),
                    hint="was the run moved to another base model, or its folder changed?",
                )
            left, right = (A.T, B.T) if layer.transposed else (B, A)
            layer.total.addmm_(left.to(layer.total), right.to(layer.total), alpha=layer.scale)
            if layer.total.dtype != layer.moved.dtype:
                layer.moved.copy_(layer.total)

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """Inside, the layers compute with the weights that were loaded."""
        self._use("loaded")
        try:
            yield
        finally:
            self._use("moved")


def _layer(name: str, module: Module, scale: float) -> _Layer:
    from transformers.pytorch_utils import Conv1D

    weight: Any = module.weight
    if not isinstance(module, Linear | Conv1D) or not weight.is_floating_point() or weight.element_size() < 2:
        raise ModelError(
            f"nothing can be added to the weights of {name!r}, a {type(module).__name__} of {weight.dtype}",
            hint="use a base that is not quantized and model.adapter.targets that are linear layers, or "
            "federation.strategy flexlora",
        )
    moved = _copy(weight.detach())
    wide = accumulator_dtype(weight.dtype)
    return _Layer(
        module,
        scale,
        isinstance(module, Conv1D),
        weight,
        Parameter(moved, requires_grad=False),
        moved if wide == weight.dtype else weight.detach().to(wide),
    )


def _copy(weight: Tensor) -> Tensor:
    if weight.device.type != "cpu":
        return weight.clone()
    copy = shared_memory(weight.numel() * weight.element_size()).view(weight.dtype).view(weight.shape)
    return copy.copy_(weight)

"""A model's trainable part as flat memory: parameters and gradients that are views of one buffer for each dtype."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ModelError
from .tensors import NamedTensors


def has_part(name: str, part: str) -> bool:
    """Whether a parameter's dotted name has this part: `lora_A` in `….q_proj.lora_A.default.weight`."""
    return part in name.split(".")


class Trainables:
    """The trainable tensors of a model, moved into flat buffers; the model goes on using them.

    Args:
        values: the parameters' values, by parameter name.
        gradients: their gradients, of the same layout. They are accumulated in place by backward passes, so they must
            be zeroed with `zero_gradients`, never set to None.
    """

    def __init__(self, model: Any) -> None:
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ModelError("nothing in the model is trainable", hint="check model.adapter")
        self.values = NamedTensors.of(parameters)
        self.gradients = NamedTensors.empty(self.values.layout, next(iter(parameters.values())).device)
        self.zero_gradients()
        for name, parameter in parameters.items():
            parameter.data = self.values[name]
            parameter.grad = self.gradients[name]
        self.flat_parameters = [self._flat_parameter(dtype) for dtype in self.values.flats]

    def _flat_parameter(self, dtype: torch.dtype) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(self.values.flats[dtype])
        parameter.grad = self.gradients.flats[dtype]
        return parameter

    @property
    def num_parameters(self) -> int:
        return sum(self.values.layout.numels.values())

    def zero_gradients(self) -> None:
        for flat in self.gradients.flats.values():
            flat.zero_()
